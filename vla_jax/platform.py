"""What an entry point sets up before the first computation."""

import ctypes
import os
import sys
from pathlib import Path

import numpy as np

from vla_jax.errors import UserError

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


def start_processes(coordinator: str | None, processes: str | None, process: str | None, autodetect: bool) -> None:
    """Makes this process one of several that train together, where it is told to; before JAX is used for anything else.

    Only the first process prints; errors come from all of them. A process drives all devices of its machine, except
    where SLURM or Open MPI started several on one: then the one GPU of its number there.

    Args:
        coordinator: "host:port" of the first process. processes: how many there are. process: which one this is.
        autodetect: let JAX find all three out, from SLURM, Open MPI, or the metadata of a Cloud TPU.
    """
    given = [value is not None for value in (coordinator, processes, process)]
    if not any(given) and not autodetect:
        return
    if any(given) and not (all(given) and processes.isdigit() and process.isdigit()):
        raise UserError("several processes need all of --coordinator=HOST:PORT, --processes=N and --process=0 … N-1")
    import jax

    # Of the GPUs of a node, JAX gives a task of SLURM or Open MPI the one with the task's number on that node.
    if any(given):
        jax.distributed.initialize(coordinator, int(processes), int(process), cluster_detection_method="deactivate")
    else:
        try:
            jax.distributed.initialize(local_device_ids=[] if _alone_on_its_node() else None)
        except (ValueError, OSError) as error:  # nothing says who is who; a TPU's metadata cannot be read
            raise UserError(
                f"--distributed found neither SLURM, Open MPI nor a TPU ({error}): give --coordinator"
            ) from error
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)


def _alone_on_its_node() -> bool:
    """Whether SLURM or Open MPI, which may run inside it, started one process on each node."""
    local = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    if local is not None:
        return local == "1"
    return os.environ.get("SLURM_STEP_NUM_NODES", "") == os.environ.get("SLURM_NTASKS")


def is_first() -> bool:
    """Whether this process writes and prints for all of a run."""
    import jax

    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when every process of the run is here."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process of the run; all of them must ask."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


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
