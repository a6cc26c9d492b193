"""What every test runs under: eight host devices. Broadcasting between ranks is an error, since users may
forbid it; so are warnings (pyproject.toml).

float64 is never global: a test that wants it says `with jax.enable_x64():` or takes the fixture `x64`.
"""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

MOST_MEMORY = 3 * 2**30  # of a process, before what it has compiled is thrown away
STATM = Path("/proc/self/statm")


@pytest.fixture
def x64():
    with jax.enable_x64():
        yield


@pytest.fixture(scope="module")
def quick_compiler():
    """For small programs that run once: what they compute does not depend on how well they are compiled."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def bounded_memory():
    """Compiled programs are kept for ever, and whole networks run op by op leave thousands of them."""
    yield
    if (
        STATM.exists()
        and int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > MOST_MEMORY
    ):
        jax.clear_caches()
