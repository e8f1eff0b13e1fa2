"""How sure a success rate is: the Wilson interval, and the comparison of two policies on the same scenes.

Two checkpoints are run on the same scenes with the same noise, so their outcomes are paired and only the scenes on
which they disagree carry information: the difference gets a paired bootstrap interval, the question "is it chance?"
McNemar's exact test.
"""

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool

CONFIDENCE = 0.95  # of every interval


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % score interval of a binomial rate (Wilson 1927), well behaved at 0 % and 100 %.

    Args:
        successes: number of successes, 0 .. trials.
        trials: number of trials, at least 1.

    Returns:
        (low, high) in [0, 1].

    Raises:
        ValueError: for counts that cannot be.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials is not a count of outcomes")
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # At the ends one bound is the rate itself; rounding must push it neither past 0 or 1 nor past the rate.
    low = (centre - half) / scale if successes else 0.0
    high = (centre + half) / scale if successes < trials else 1.0
    return low, high


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of "both policies are equally good" from the scenes on which just one succeeded.

    Under that hypothesis each such scene is a fair coin, so the smaller count is Binomial(n, 1/2) (McNemar 1947).
    """
    disagreements = only_first + only_second
    smaller = min(only_first, only_second)
    tail = sum(math.comb(disagreements, k) for k in range(smaller + 1))
    return min(1.0, 2 * tail / 2**disagreements)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Paired difference of two success rates on the same scenes."""

    difference: float  # second minus first
    low: float
    high: float
    p: float  # McNemar, exact, two-sided
    only_first: int  # scenes on which only the first succeeded
    only_second: int
    trials: int


def compare_paired(
    first: Bool[np.ndarray, "B"],
    second: Bool[np.ndarray, "B"],
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compares two vectors of outcomes on the same scenes: `second` minus `first`.

    The percentile bootstrap resamples scenes. A scene's difference is -1, 0 or +1, so one resample is one multinomial
    draw of how often each occurs: no scene has to be touched. Without any disagreement the interval is the point 0.

    Raises:
        ValueError: when the vectors differ in length or are empty.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape or first.ndim != 1 or first.size == 0:
        raise ValueError(f"paired outcomes need two vectors of one length, not {first.shape} and {second.shape}")
    trials = first.size
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    shares = np.array([only_first, only_second, trials - only_first - only_second]) / trials
    counts = np.random.default_rng(seed).multinomial(trials, shares, size=resamples)
    differences = (counts[:, 1] - counts[:, 0]) / trials
    low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Comparison(
        difference=(only_second - only_first) / trials,
        low=float(low),
        high=float(high),
        p=mcnemar(only_first, only_second),
        only_first=only_first,
        only_second=only_second,
        trials=trials,
    )


@dataclasses.dataclass(frozen=True)
class SeedComparison:
    """Difference of two methods, each trained with several seeds, on the same scenes."""

    difference: float  # second minus first, mean over seeds and scenes
    low: float
    high: float
    p: float  # two-sided, of the bootstrap
    by_seed: tuple[float, ...]


def compare_seeds(
    first: Bool[np.ndarray, "S B"],
    second: Bool[np.ndarray, "S B"],
    resamples: int = 10_000,
    seed: int = 0,
) -> SeedComparison:
    """Compares outcomes of S training seeds on the same B scenes: `second` minus `first`, seed by seed.

    The percentile bootstrap resamples training seeds and scenes, so the interval holds for another seed on another
    scene. With one seed it speaks of scenes alone. p is twice the smaller share of resamples on either side of 0.

    Raises:
        ValueError: when the shapes differ or are empty.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape or first.ndim != 2 or first.size == 0:
        raise ValueError(f"paired outcomes need two tables [seeds, scenes], not {first.shape} and {second.shape}")
    gaps = second.astype(float) - first
    seeds, scenes = gaps.shape
    random = np.random.default_rng(seed)
    seed_counts = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    scene_counts = random.multinomial(scenes, np.full(scenes, 1 / scenes), size=resamples)
    differences = ((seed_counts @ gaps) * scene_counts).sum(1) / gaps.size
    low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    beyond = min((differences <= 0).sum(), (differences >= 0).sum())
    return SeedComparison(
        difference=float(gaps.mean()),
        low=float(low),
        high=float(high),
        p=min(1.0, 2 * (int(beyond) + 1) / (resamples + 1)),
        by_seed=tuple(gaps.mean(1).tolist()),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method (1979), in the given order."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
