"""Where numbers go: metrics.jsonl (one JSON object a line), TensorBoard, and the line on the terminal."""

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vla_jax.errors import UserError
from vla_jax.files import write_atomically
from vla_jax.losses.term import Term

METRICS_FILE = "metrics.jsonl"


@contextlib.contextmanager
def disk_space(directory: Path) -> Iterator[None]:
    """Turns "no space left on device", whoever reports it, into a UserError that says that nothing is lost."""
    try:
        yield
    except Exception as error:  # TensorStore reports a full disk as a ValueError
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and os.strerror(errno.ENOSPC).lower() not in str(error).lower():
            raise
        raise UserError(
            f"no space left for {directory}: free some and run the same command with --resume; "
            "the finished checkpoints there are intact"
        ) from error


class MetricsWriter:
    """Appends numbers to metrics.jsonl and to TensorBoard event files.

    A line is {"kind", "step", "time" (seconds since 1970), ...}: kinds are "train" (means since the last such line),
    "validation" (held-out loss; of a mixture also "<dataset>/loss", ...) and "evaluation" (one line a split). Values
    that are not finite become null.
    """

    def __init__(self, run_dir: Path, resumed_step: int):
        """Lines after `resumed_step` are dropped: the run is about to write them again."""
        self.path = run_dir / METRICS_FILE
        self._run_dir = run_dir
        with disk_space(run_dir):
            kept = [line for line in metric_lines(run_dir) if line["step"] <= resumed_step]
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a")
        self._board = _tensorboard(run_dir / "tensorboard", resumed_step)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Adds one line. Nested names are written "group/name"."""
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **_finite(values)}
        with disk_space(self._run_dir):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            if self._board is not None:
                self._board_line(kind, step, values)

    def _board_line(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        prefix = f"{kind}/{values['split']}" if "split" in values else kind
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value) and name != "step":
                self._board.add_scalar(f"{prefix}/{name}", value, step)
        self._board.flush()

    def close(self) -> None:
        """Writes what is buffered and closes the files."""
        with disk_space(self._run_dir):
            self._file.close()
            if self._board is not None:
                self._board.close()


class SilentWriter:
    """Writes nothing: of several processes, the first writes for all."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Means:
    """Means of losses and terms over the steps since the last log line; a term's mean is over what carried it."""

    def __init__(self):
        self._sums: dict[str, float] = {}
        self._terms: dict[str, list[float]] = {}
        self.steps = 0

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Adds one step's metrics (numbers, and "terms": {name: Term})."""
        self.steps += 1
        for name, value in metrics.items():
            if name != "terms":
                self._sums[name] = self._sums.get(name, 0.0) + float(value)
        for name, (value, fraction, weight) in metrics["terms"].items():
            sums = self._terms.setdefault(name, [0.0, 0.0, 0.0])
            sums[0] += float(value) * float(fraction)
            sums[1] += float(fraction)
            sums[2] = float(weight)

    def terms(self) -> dict[str, Term]:
        """The mean of every term, and the mean share of samples that carried it."""
        return {
            name: Term(total / carried if carried else 0.0, carried / self.steps, weight)
            for name, (total, carried, weight) in self._terms.items()
        }

    def values(self) -> dict[str, float]:
        """Everything by name: "loss", ..., "terms/fm_posterior", "valid/fm_posterior"."""
        values = {name: total / self.steps for name, total in self._sums.items()}
        for name, term in self.terms().items():
            values[f"terms/{name}"], values[f"valid/{name}"] = term.value, term.valid_fraction
        return values


class Stopwatch:
    """Wall time by phase of the loop, in seconds."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside to `name`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    @property
    def total(self) -> float:
        """Seconds since the start, phases or not."""
        return time.perf_counter() - self._began

    def sum(self, *names: str) -> float:
        """Seconds in these phases together."""
        return sum(self.seconds.get(name, 0.0) for name in names)

    def shares(self) -> dict[str, float]:
        """The share of the total that each phase took."""
        return {name: seconds / self.total for name, seconds in self.seconds.items()}


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def metric_lines(run_dir: str | Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl; the last line of a killed run may be torn and is left out."""
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _tensorboard(directory: Path, resumed_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        print("no TensorBoard curves: tensorboardX is not installed (pip install 'vla_jax[report]')")
        return None
    return SummaryWriter(str(directory), purge_step=resumed_step + 1)
