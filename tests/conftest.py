"""What every test runs under: eight host devices. Broadcasting between ranks is an
error, since users may forbid it; so are warnings (pyproject.toml).

float64 is never global: a test that wants it says `with jax.enable_x64():` or takes the fixture `x64`.
"""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    with jax.enable_x64():
        yield
