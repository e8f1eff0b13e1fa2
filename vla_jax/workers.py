"""Several processes that share a job: a place on the machine for each, claims that keep them apart, one way to stop.

A claim is a file locked by the operating system, which lets go of it when its process ends, however that ends. So a
killed process blocks nobody, and nothing has to be cleaned up.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from vla_jax.errors import UserError

VISIBLE = {"gpu": "CUDA_VISIBLE_DEVICES", "tpu": "TPU_VISIBLE_CHIPS"}
# Without these a process that sees one TPU chip still waits for the others of its machine.
ONE_CHIP = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
# A TPU chip of some generations is two devices; both belong to the process that has the chip.
PROBE = """
import jax
devices = jax.local_devices()
print(devices[0].platform, sum(getattr(device, "core_on_chip", 0) == 0 for device in devices))
"""


@contextlib.contextmanager
def claim(path: Path, wait: bool = False) -> Iterator[bool]:
    """Claims `path` for this process while it is entered; yields whether that worked.

    wait: until it is free, instead of yielding False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:  # stays behind, empty: to remove it would let two processes lock two files
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        yield mine


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a worker runs. environment: set before its JAX starts. cores: those that it may use; None is all."""

    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    cores: frozenset[int] | None = None


def places(workers: int) -> list[Place]:
    """The places of this machine: an accelerator each (a GPU, a TPU chip), or with CPUs alone a share of the cores.

    The devices are counted in another process, so that this one starts none.

    Args:
        workers: how many; 0 is one for each accelerator, or one with CPUs alone.

    Raises:
        UserError: there are fewer accelerators, or cores, than workers.
    """
    platform, count = _devices()
    if platform == "cpu":
        return _shares(workers) if workers > 1 else [Place()]
    _check(workers, count, platform.upper())
    variable = VISIBLE[platform]
    names = os.environ[variable].split(",") if os.environ.get(variable) else [str(index) for index in range(count)]
    shared = ONE_CHIP if platform == "tpu" else {}
    return [Place({variable: name, **shared}) for name in names[: workers or count]]


def _shares(workers: int) -> list[Place]:
    """The cores that this process may use, divided; XLA makes as many threads as its process may use cores."""
    cores = sorted(os.sched_getaffinity(0))
    _check(workers, len(cores), "core")
    bounds = [index * len(cores) // workers for index in range(workers + 1)]
    return [Place(cores=frozenset(cores[low:high])) for low, high in itertools.pairwise(bounds)]


def _check(workers: int, room: int, unit: str) -> None:
    if workers > room:
        raise UserError(f"workers is {workers}, but there is room for {room} here: one for each {unit}")


def _devices() -> tuple[str, int]:
    """JAX's platform ("cpu", "gpu", "tpu") and the number of its chips in this machine."""
    done = subprocess.run([sys.executable, "-c", PROBE], stdout=subprocess.PIPE, text=True, check=True)
    platform, count = done.stdout.split()[-2:]
    return platform, int(count)


class Workers:
    """Processes, at most one in each place. While it is entered, SIGINT and SIGTERM go on to every one of them."""

    def __init__(self, places: Sequence[Place]):
        self.stopped = False  # by such a signal
        self._free = list(places)
        self._running: dict[str, tuple[subprocess.Popen, Place]] = {}
        self._previous = {}

    @property
    def free(self) -> bool:
        """Whether a place is free."""
        return bool(self._free)

    @property
    def running(self) -> list[str]:
        """Names of the processes that run."""
        return list(self._running)

    def start(self, name: str, command: Sequence[str], log: Path) -> None:
        """Starts a process in a free place; its output is added to `log`."""
        place = self._free.pop(0)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output, _pinned(place.cores):
            process = subprocess.Popen(
                command,
                env={**os.environ, **place.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C in the terminal reaches it through us alone, once
            )
        self._running[name] = process, place
        if self.stopped:  # the signal came in between
            process.send_signal(signal.SIGTERM)

    def wait(self) -> list[tuple[str, int]]:
        """Name and exit status of those that ended; waits until one has."""
        while not (ended := [name for name, (process, _) in self._running.items() if process.poll() is not None]):
            time.sleep(0.1)
        return [self._settle(name) for name in ended]

    def _settle(self, name: str) -> tuple[str, int]:
        process, place = self._running.pop(name)
        self._free.append(place)
        return name, process.wait()

    def __enter__(self) -> "Workers":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception) -> None:
        self._send(signal.SIGTERM)  # nothing runs any more, unless there was an exception
        for name in self.running:
            self._settle(name)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame) -> None:
        if not self.stopped:
            print("\nstopping; every worker saves first (Ctrl-C again stops at once)", file=sys.stderr)
        self.stopped = True
        self._send(number)

    def _send(self, number: int) -> None:
        for process, _ in list(self._running.values()):
            process.send_signal(number)


@contextlib.contextmanager
def _pinned(cores: frozenset[int] | None) -> Iterator[None]:
    """Processes that are started inside may use these cores only: they inherit them from the thread that does it."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
