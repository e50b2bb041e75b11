"""Make every test strict, with no silent promotion of dtypes or ranks, and fast.

Most programs of the tests are compiled to run once. All are compiled alike: compiled programs stay
in caches, and an operation that is optimized rounds otherwise than one that is not. All processes
of a run share what they compile.
"""

import os
import tempfile

import jax
import pytest

FOLDER = "JAX_COMPILATION_CACHE_DIR"
if FOLDER not in os.environ:  # else this is a worker, or started by a test
    folder = tempfile.TemporaryDirectory()
    os.environ[FOLDER] = folder.name

jax.config.update("jax_compilation_cache_dir", os.environ[FOLDER])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def compiled():
    """Return a function that compiles another for some arguments, optimized as by default."""
    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    return lambda fn, *args: jax.jit(fn).lower(*args).compile(options)


@pytest.fixture
def as_on(monkeypatch):
    """Return a function that makes programs compute here what they do on a platform.

    JAX keeps what it traces of a function, so what was traced before does not count, nor does what
    is traced with this for others after.
    """

    def set_platform(platform):
        def choose(*args, default, **branches):
            return branches.get(platform, default)(*args)

        monkeypatch.setattr(jax.lax, "platform_dependent", choose)
        jax.clear_caches()

    yield set_platform
    jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)
