import numpy as np
import pytest
from scipy import stats

from vla_jax.evaluation.intervals import compare_paired, compare_seeds, holm, mcnemar, wilson


@pytest.mark.parametrize("successes, trials", [(0, 10), (1, 10), (5, 10), (10, 10), (47, 200), (199, 200)])
def test_wilson_agrees_with_scipy(successes, trials):
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(wilson(successes, trials), (expected.low, expected.high), atol=1e-12)


def test_wilson_known_value():
    # 81 of 263: the worked example of Newcombe (1998), table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_wilson_covers_what_it_promises():
    rate, trials = 0.85, 200
    counts = np.random.default_rng(0).binomial(trials, rate, 4000)
    covered = np.mean([low <= rate <= high for low, high in (wilson(int(count), trials) for count in counts)])
    assert 0.93 < covered < 0.97


@pytest.mark.parametrize("successes, trials", [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_impossible_counts(successes, trials):
    with pytest.raises(ValueError):
        wilson(successes, trials)


@pytest.mark.parametrize("first, second", [(0, 0), (1, 0), (3, 9), (10, 10), (0, 12), (40, 61)])
def test_mcnemar_is_the_exact_binomial_test(first, second):
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(second, first) == mcnemar(first, second)


def test_paired_comparison_of_known_counts():
    first = np.array([True] * 30 + [True] * 5 + [False] * 20 + [False] * 45)
    second = np.array([True] * 30 + [False] * 5 + [True] * 20 + [False] * 45)
    comparison = compare_paired(first, second)
    assert (comparison.only_first, comparison.only_second, comparison.trials) == (5, 20, 100)
    assert comparison.difference == pytest.approx(0.15)
    assert comparison.p == pytest.approx(stats.binomtest(5, 25).pvalue)
    # Standard error of a paired difference: sqrt((b + c) - (b - c)^2 / n) / n.
    error = np.sqrt(25 - 15**2 / 100) / 100
    assert comparison.low == pytest.approx(0.15 - 1.96 * error, abs=0.015)
    assert comparison.high == pytest.approx(0.15 + 1.96 * error, abs=0.015)


def test_pairing_is_sharper_than_two_independent_rates():
    generator = np.random.default_rng(1)
    easy = generator.random(300) < 0.5
    second = easy | (generator.random(300) < 0.1)
    comparison = compare_paired(easy, second)
    assert comparison.low > 0
    assert comparison.high - comparison.low < 0.1
    assert compare_paired(easy, easy).difference == 0 == compare_paired(easy, easy).high


def test_paired_comparison_refuses_unequal_lengths():
    with pytest.raises(ValueError):
        compare_paired(np.ones(3, bool), np.ones(4, bool))


def test_wilson_holds_the_rate_at_both_ends():
    for trials in range(1, 400):
        assert wilson(0, trials)[0] == 0.0 < wilson(0, trials)[1]
        assert wilson(trials, trials)[0] < wilson(trials, trials)[1] == 1.0


def test_comparison_over_seeds_covers_what_it_promises():
    """Seeds differ in their rates, and the interval holds for the mean of all seeds: scenes alone would be too sure."""
    random, covered, too_sure = np.random.default_rng(0), 0, 0
    for trial in range(200):
        lift = 0.2 + 0.1 * random.normal(size=(8, 1))
        first = random.random((8, 100)) < 0.4
        second = random.random((8, 100)) < 0.4 + lift
        found = compare_seeds(first, second, resamples=400, seed=trial)
        scenes = compare_paired(first.ravel(), second.ravel(), resamples=400)
        covered += found.low <= 0.2 <= found.high
        too_sure += scenes.low <= 0.2 <= scenes.high
    assert covered / 200 > 0.86 and too_sure / 200 < covered / 200 - 0.1


def test_comparison_over_seeds_knows_no_difference():
    outcomes = np.random.default_rng(0).random((3, 50)) < 0.5
    same = compare_seeds(outcomes, outcomes)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1) and same.by_seed == (0, 0, 0)
    better = compare_seeds(np.zeros((3, 50), bool), np.ones((3, 50), bool))
    assert better.difference == 1 and better.p < 1e-3
    with pytest.raises(ValueError, match="two tables"):
        compare_seeds(outcomes, outcomes[:2])


def test_holm_steps_down():
    # By hand: 0.01 x 4, 0.02 x 3, then 0.03 x 2 and 0.04 x 1 may not fall below what came before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([]) == []
