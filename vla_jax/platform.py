"""What an entry point sets up before the first computation."""

import os
from pathlib import Path


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
