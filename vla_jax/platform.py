"""What an entry point sets up before the first computation."""

import ctypes
import os
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of malloc.h


def setup_compilation_cache() -> str:
    """Keeps compiled programs on disk, so that the second start of a run does not compile again; returns the directory.

    The directory is $JAX_COMPILATION_CACHE_DIR where that is set, else ~/.cache/vla_jax/jax. Programs of any size and
    any compile time are kept: a policy on a CPU is made of many small ones.
    """
    import jax  # the package is importable without starting JAX

    directory = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path.home() / ".cache" / "vla_jax" / "jax")
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory


def keep_freed_memory() -> None:
    """Makes the C library keep what a step frees for the next one, where the library is glibc; else nothing happens.

    XLA on a CPU allocates its temporary buffers anew for every call. Large ones glibc takes from the system and gives
    back each time, and the system clears every page again, which took up to a third of a small policy's training step
    (docs/benchmarks.md). The process just does not shrink between steps.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**30)
    mallopt(_M_ARENA_MAX, 1)
