"""Statistics of a stream of vectors, in one pass and bounded memory."""

import dataclasses

import numpy as np
from jaxtyping import Float

# Quantiles are exact up to this many rows, and estimated from a uniform sample of this size beyond
# (standard error of the rank of q01: 1e-4).
MAX_ROWS = 1_000_000


@dataclasses.dataclass(frozen=True)
class Statistics:
    """One entry per dimension, in the units of the data."""

    count: int
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]

    @classmethod
    def from_json(cls, values: dict) -> "Statistics":
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


class Rows:
    """A uniform sample of a stream of rows (Vitter's Algorithm R, seeded: the same stream gives the same sample)."""

    def __init__(self, width: int, most: int):
        self._count = 0
        self._reservoir = np.empty((most, width), np.float32)
        self._random = np.random.default_rng(0)

    def update(self, rows: Float[np.ndarray, "N D"]) -> None:
        """Adds N rows."""
        capacity = len(self._reservoir)
        free = max(0, min(capacity - self._count, len(rows)))
        self._reservoir[self._count : self._count + free] = rows[:free]
        if free < len(rows):
            order = np.arange(self._count + free, self._count + len(rows))
            slots = self._random.integers(0, order + 1)
            kept = slots < capacity
            self._reservoir[slots[kept]] = rows[free:][kept]
        self._count += len(rows)

    @property
    def rows(self) -> Float[np.ndarray, "M D"]:
        """The sample: every row as long as there is room."""
        return self._reservoir[: min(self._count, len(self._reservoir))]


class RunningStatistics:
    """Accumulates rows; `result()` gives their Statistics.

    Mean and variance are merged block by block (Chan, Golub and LeVeque, 1979); quantiles are those of `Rows`.
    """

    def __init__(self, width: int, max_rows: int = MAX_ROWS):
        self._count = 0
        self._mean = np.zeros(width)
        self._squares = np.zeros(width)  # sum of squared deviations from the mean
        self._minimum = np.full(width, np.inf)
        self._maximum = np.full(width, -np.inf)
        self._sample = Rows(width, max_rows)

    def update(self, rows: Float[np.ndarray, "N D"]) -> None:
        """Adds N rows."""
        number = len(rows)
        if number == 0:
            return
        self._sample.update(rows)
        values = np.asarray(rows, np.float64)
        mean = values.mean(axis=0)
        delta = mean - self._mean
        total = self._count + number
        self._squares += ((values - mean) ** 2).sum(axis=0) + delta**2 * (self._count * number / total)
        self._mean += delta * (number / total)
        self._minimum = np.minimum(self._minimum, values.min(axis=0))
        self._maximum = np.maximum(self._maximum, values.max(axis=0))
        self._count = total

    def result(self) -> Statistics:
        """Statistics of all rows so far. Raises ValueError if there were none."""
        if self._count == 0:
            raise ValueError("no rows")
        q01, q99 = np.quantile(self._sample.rows.astype(np.float64), (0.01, 0.99), axis=0)
        std = np.sqrt(self._squares / self._count)

        def listed(array):
            return tuple(float(value) for value in array)

        return Statistics(
            self._count,
            listed(self._minimum),
            listed(self._maximum),
            listed(self._mean),
            listed(std),
            listed(q01),
            listed(q99),
        )
