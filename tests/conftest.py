"""What every test runs under: eight host devices, and warnings that are errors.

float64 is never global: a test that wants it says `with jax.enable_x64():`.
"""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    config.addinivalue_line("markers", "slow: exhaustive form, run by `make test-all`")


@pytest.fixture
def x64():
    with jax.enable_x64():
        yield
