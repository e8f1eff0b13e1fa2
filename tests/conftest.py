"""What holds for all tests."""

import gc

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def free_programs():
    """Lets go of a module's compiled programs: each maps memory of its own, and one process may map only so much
    (65 530 places on Linux), after which the compiler aborts."""
    yield
    jax.clear_caches()
    gc.collect()
