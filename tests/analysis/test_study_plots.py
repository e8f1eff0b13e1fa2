"""The figures of a study show the outcomes of its cells."""

import dataclasses

import numpy as np
import pytest

from vla_jax.analysis.study_plots import coverage, front, plot_differences, plot_measure, plot_misses, plot_tradeoff
from vla_jax.errors import UserError
from vla_jax.evaluation.study import Cell, CellResult

SCENES = 40


def cell(arm, seed, told, look=0.0, known=0.9, sensitivity=0.5, rho=0.1):
    """On swapped instructions `told` of the scenes succeed and `look` of the rest end at what the look names."""
    order = np.arange(SCENES) / SCENES
    success = {"in_distribution": order < known, "swapped": order < told}
    stuck = {"in_distribution": order < known, "swapped": (order >= told) & (order < told + look)}
    conflict = {"in_distribution": order < 0, "swapped": order >= 0}
    lists = ({split: column.tolist() for split, column in one.items()} for one in (success, stuck, conflict))
    marks = dict.fromkeys(success, "same")
    return CellResult(Cell("uniqueness", rho, arm, seed), *lists, marks, 10, {}, {"sensitivity": sensitivity})


@pytest.fixture
def results():
    found = [
        cell("baseline", seed, rate, 0.5, sensitivity=0.3 + rate / 3) for seed, rate in enumerate((0.2, 0.25, 0.3))
    ]
    found += [cell("listens", seed, 0.6, 0.1, sensitivity=0.6) for seed in range(3)]
    return [*found, cell("aims", 0, 0.1, 0.8, known=1.0, sensitivity=0.1), cell("loses", 0, 0.15, 0.4, known=0.5)]


def ticks(axis):
    return [label.get_text() for label in axis.get_yticklabels()]


def test_what_is_there_is_counted(results):
    lines = coverage([*results, cell("baseline", 0, 0.5, rho=0.3)]).splitlines()
    assert lines[0] == "| arm | uniqueness, ρ = 0.1 | uniqueness, ρ = 0.3 |"
    assert {"| baseline | 3 | 1 |", "| listens | 3 | – |", "| aims | 1 | – |"} < set(lines)


def test_the_front_is_what_nothing_beats_on_both_axes():
    assert front(np.array([[1, 9], [5, 5], [4, 4], [9, 1], [9, 0], [5, 5]])) == [0, 1, 5, 3]


def test_the_trade_off_names_its_front_and_the_reference(results):
    (axis,) = plot_tradeoff(results).axes
    np.testing.assert_allclose(axis.lines[1].get_xydata(), [[90, 60], [100, 10]])
    assert {text.get_text(): tuple(text.xy) for text in axis.texts} == {
        "aims": (100, 10),
        "baseline": (90, pytest.approx(25)),
        "listens": (90, 60),
    }
    heights = [text.xyann[1] for text in axis.texts]
    assert heights == sorted(heights) and np.diff(heights).min() >= 4.5


def test_differences_are_sorted_and_hollow_where_seeds_are_few(results):
    known, swapped = plot_differences(results).axes
    assert ticks(known) == ["aims", "loses", "listens"]
    dots = [container.lines[0] for container in swapped.containers]
    np.testing.assert_allclose([dot.get_xdata()[0] for dot in dots], [-10, -5, 35])
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [True, True, False]
    low, high = swapped.containers[2].lines[2][0].get_segments()[0][:, 0]
    assert low < 35 < high
    assert known.containers[0].lines[0].get_xdata()[0] == pytest.approx(10)
    other = dataclasses.replace(cell("other", 0, 0.9), success={"swapped": [True] * SCENES})
    assert ticks(plot_differences([*results, other]).axes[0]) == ["aims", "loses", "listens"], "it lacks a split"
    with pytest.raises(UserError, match="no arm has a seed of in_distribution and swapped in common with 'nobody'"):
        plot_differences(results, "nobody")


def test_misses_are_told_apart(results):
    (axis,) = plot_misses(results).axes
    assert ticks(axis) == ["aims", "loses", "baseline", "listens"]
    widths = np.array([bar.get_width() for bar in axis.patches]).reshape(3, 4)
    np.testing.assert_allclose(widths[0], [10, 15, 25, 60])
    np.testing.assert_allclose(widths[1], [80, 40, 50, 10], atol=1e-6)
    np.testing.assert_allclose(widths.sum(0), 100)
    told = np.array([bar.get_width() for bar in plot_misses(results, "in_distribution").axes[0].patches])
    assert (told[4:8] == 0).all(), "nobody is stuck where the look and the words agree"


def test_a_measure_is_shown_with_how_well_it_ranks(results):
    (axis,) = plot_measure([*results, cell("baseline", 0, 0.5, rho=0.3)], "sensitivity").axes
    points = axis.lines[0].get_xydata()
    assert points.shape == (8, 2) and sorted(points[:, 1])[0] == 10
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels[0].startswith("uniqueness, ρ = 0.1, rank correlation 0.") and labels[1] == "uniqueness, ρ = 0.3"
    with pytest.raises(UserError, match="no cell has both 'pmi' and 'swapped'; there are the measures sensitivity"):
        plot_measure(results, "pmi")


@pytest.mark.parametrize("plot", [plot_tradeoff, plot_differences, plot_misses])
def test_settings_are_not_mixed(plot, results):
    with pytest.raises(UserError, match="uniqueness at rho 0.1, uniqueness at rho 0.3: give those of one"):
        plot([*results, cell("baseline", 0, 0.5, rho=0.3)])
