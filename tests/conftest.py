"""What every test runs under: eight host devices. Broadcasting between ranks is an error, since users may
forbid it; so are warnings (pyproject.toml).

float64 is never global: a test that wants it says `with jax.enable_x64():` or takes the fixture `x64`.

Most of the time goes into compiling, so that what one process has compiled the others take from a cache,
which ends with the run. `make test` compiles at `xla_backend_optimization_level=1`. At 0 XLA computes wrong
gradients on CPUs, some of them NaN (jaxlib 0.10; LeNet with batch norm).
"""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes so many objects that Python's search for cycles among them took 8% of the time.
gc.set_threshold(50_000, 20, 100)
MOST_MEMORY = 3 * 2**30  # of a process, before what it has compiled is thrown away
STATM = Path("/proc/self/statm")


def pytest_configure(config):
    # Made by the first process; those that it starts inherit the variable.
    if "NETDECONV_TEST_CACHE" not in os.environ:
        os.environ["NETDECONV_TEST_CACHE"] = config.compiled = tempfile.mkdtemp(prefix="compiled")
    jax.config.update("jax_compilation_cache_dir", os.environ["NETDECONV_TEST_CACHE"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_unconfigure(config):
    if hasattr(config, "compiled"):
        shutil.rmtree(config.compiled, ignore_errors=True)


@pytest.fixture
def x64():
    with jax.enable_x64():
        yield


@pytest.fixture(autouse=True)
def bounded_memory():
    """Compiled programs are kept for ever, and whole networks run op by op leave thousands of them."""
    yield
    if (
        STATM.exists()
        and int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > MOST_MEMORY
    ):
        jax.clear_caches()
