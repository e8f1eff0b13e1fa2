"""What holds for all tests."""

import gc
import os

import jax
import pytest

from vla_jax.platform import setup_compilation_cache

# A test runs a program once or twice, so nearly all of its time would go into compiling it well. Read when JAX starts,
# here and in the processes that tests start; flags given by hand come last and win.
os.environ["XLA_FLAGS"] = " ".join(
    ("--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false", os.environ.get("XLA_FLAGS", ""))
)

# Several workers may share a GPU: none takes all of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def pytest_collection_modifyitems(items):
    """The longest file first: a worker takes one file after another, and would be alone with this one at the end."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """The same small programs are compiled by many modules, some in other processes: compile each once."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # what all workers have in common
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "compiled"))
    setup_compilation_cache()


@pytest.fixture(scope="module", autouse=True)
def free_programs():
    """Lets go of a module's compiled programs: each maps memory of its own, and one process may map only so much
    (65 530 places on Linux), after which the compiler aborts."""
    yield
    jax.clear_caches()
    gc.collect()
