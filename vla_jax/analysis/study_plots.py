"""Figures of a study: what each arm gains and costs, how it misses, and which measure tells it without a rollout.

The results are those of `evaluation.study.load_cells`; but for `coverage` and `plot_measure`, of one coupling and rho.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from vla_jax.errors import UserError
from vla_jax.evaluation.charts import GRID, INK, PALETTE, colours, spaced, style_axis
from vla_jax.evaluation.study import SURE_SEEDS, CellResult, comparisons, table

SPLITS = ("in_distribution", "swapped")


def coverage(results: Sequence[CellResult]) -> str:
    """How many seeds of each arm are there, arms down, couplings and rho across, as Markdown."""
    settings = sorted({result.cell.setting for result in results})
    lines = [f"| arm | {' | '.join(f'{coupling}, ρ = {rho:g}' for coupling, rho in settings)} |"]
    lines.append("|---" * (1 + len(settings)) + "|")
    for arm in sorted({result.cell.arm for result in results}):
        cells = [result.cell for result in results if result.cell.arm == arm]
        counts = [sum(cell.setting == setting for cell in cells) for setting in settings]
        lines.append(f"| {arm} | {' | '.join(str(count or '–') for count in counts)} |")
    return "\n".join(lines)


def plot_tradeoff(results: Sequence[CellResult], splits: Sequence[str] = SPLITS, reference: str = "baseline") -> Figure:
    """Success on one split over success on another, a dot an arm with the deviation of its seeds.

    Named are the reference and the arms that no other one beats on both splits; the line joins the latter.
    """
    _check_one_setting(results)
    rows = {(row["arm"], row["split"]): row for row in table(results)}
    arms = [arm for arm in dict.fromkeys(arm for arm, _ in rows) if all((arm, split) in rows for split in splits)]
    places = np.array([[100 * rows[arm, split]["rate"] for split in splits] for arm in arms])
    spreads = np.array([[100 * (rows[arm, split]["deviation"] or 0.0) for split in splits] for arm in arms])
    best = front(places)
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axis = figure.subplots()
    style_axis(axis)
    axis.errorbar(*places.T, *spreads.T[::-1], fmt="none", ecolor=GRID, elinewidth=2, zorder=1)
    axis.plot(*places.T, "o", color=PALETTE[5], markersize=5, zorder=2)
    axis.plot(*places[best].T, "-o", color=PALETTE[1], linewidth=1, markersize=7, zorder=3)
    axis.set(ylim=(-3, 103), xlabel=f"{spaced(splits[0])}, % of scenes", ylabel=f"{spaced(splits[1])}, % of scenes")
    named = sorted({*best, *(n for n, arm in enumerate(arms) if arm == reference)}, key=lambda n: places[n, 1])
    height = -np.inf
    for number in named:  # beside the panel, one above the other
        height = max(places[number, 1], height + 4.5)
        colour = PALETTE[1] if number in best else INK
        line = {"arrowprops": {"arrowstyle": "-", "color": GRID}, "va": "center", "annotation_clip": False}
        at = {"xycoords": "data", "textcoords": ("axes fraction", "data")}
        axis.annotate(arms[number], places[number], (1.03, height), fontsize=8, color=colour, **line, **at)
    return figure


def front(places: np.ndarray) -> list[int]:
    """The points that no other one beats on both axes (from [N, 2]), from left to right."""
    beaten = [any((other >= one).all() and (other > one).any() for other in places) for one in places]
    return [number for number in np.argsort(places[:, 0], kind="stable") if not beaten[number]]


def plot_differences(
    results: Sequence[CellResult], reference: str = "baseline", splits: Sequence[str] = SPLITS
) -> Figure:
    """Points of success above the reference arm on the same scenes, with 95 % intervals, a panel a split.

    Sorted by the last split. Hollow: fewer than `SURE_SEEDS` seeds, whose interval knows scenes and not trainings.
    """
    _check_one_setting(results)
    rows = {(row["arm"], row["split"]): row for row in comparisons(results, reference, splits)}
    arms = [arm for arm in {arm for arm, _ in rows} if all((arm, split) in rows for split in splits)]
    if not arms:
        raise UserError(
            f"no arm has a seed of {' and '.join(splits)} in common with '{reference}': name another reference"
        )
    arms.sort(key=lambda arm: rows[arm, splits[-1]]["difference"])
    figure = Figure(figsize=(2.0 + 3.2 * len(splits), 1.0 + 0.26 * len(arms)), layout="constrained")
    for axis, split in zip(figure.subplots(1, len(splits), sharey=True, squeeze=False)[0], splits, strict=True):
        style_axis(axis)
        axis.axvline(0, color=INK, linewidth=0.8)
        for height, arm in enumerate(arms):
            row = rows[arm, split]
            middle, low, high = (100 * row[name] for name in ("difference", "low", "high"))
            filled = PALETTE[0] if row["seeds"] >= SURE_SEEDS else "white"
            style = {"fmt": "o", "color": PALETTE[0], "markerfacecolor": filled, "markersize": 5, "capsize": 2}
            axis.errorbar(middle, height, xerr=[[middle - low], [high - middle]], **style)
        axis.set_title(spaced(split), fontsize=9, color=INK, loc="left")
        axis.set_xlabel(f"points above {reference}", fontsize=8)
        axis.set_yticks(range(len(arms)), arms)
    return figure


def plot_misses(results: Sequence[CellResult], split: str = "swapped") -> Figure:
    """Where the hand ended: at what it was told, at what the look names, or at neither; a bar an arm, over its seeds.

    An arm that does not listen ends at what the look names; one that listens and aims badly ends at neither.
    """
    _check_one_setting(results)
    arms = {}
    for result in results:
        if split in result.success:
            stuck = np.array(result.stuck[split], bool) & np.array(result.conflict[split], bool)
            arms.setdefault(result.cell.arm, []).append((np.mean(result.success[split]), stuck.mean()))
    means = {arm: 100 * np.mean(seeds, axis=0) for arm, seeds in arms.items()}
    means = dict(sorted(means.items(), key=lambda item: item[1][0]))
    told, stuck = np.array([*means.values()]).T
    figure = Figure(figsize=(7.2, 1.0 + 0.26 * len(means)), layout="constrained")
    axis = figure.subplots()
    style_axis(axis)
    parts = {"what it was told": told, "what the look names": stuck, "neither": 100 - told - stuck}
    left, shades = np.zeros(len(means)), (PALETTE[2], PALETTE[1], GRID)
    for (name, widths), colour in zip(parts.items(), shades, strict=True):
        axis.barh(range(len(means)), widths, left=left, color=colour, label=name, height=0.75)
        left = left + widths
    axis.set_yticks(range(len(means)), means)
    axis.set(xlim=(0, 100), xlabel=f"% of scenes, {spaced(split)}")
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title="the hand ended at")
    return figure


def plot_measure(results: Sequence[CellResult], measure: str, split: str = "swapped") -> Figure:
    """Success on a split over a measure that needs no rollout (see `evaluation.listening`), a dot a training.

    The legend has Spearman's rank correlation within each coupling and rho of more than two trainings: how well the
    measure alone would have ranked them.
    """
    have = [result for result in results if measure in result.measures and split in result.success]
    if not have:
        names = sorted({name for result in results for name in result.measures})
        raise UserError(f"no cell has both '{measure}' and '{split}'; there are the measures {', '.join(names)}")
    settings = sorted({result.cell.setting for result in have})
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    style_axis(axis)
    for setting, colour in zip(settings, colours(len(settings)), strict=True):
        here = [result for result in have if result.cell.setting == setting]
        values = np.array([[r.measures[measure], 100 * np.mean(r.success[split])] for r in here])
        both_vary = len(here) > 2 and np.ptp(values, axis=0).min() > 0
        ranked = f", rank correlation {spearmanr(*values.T).statistic:.2f}" if both_vary else ""
        label = f"{setting[0]}, ρ = {setting[1]:g}{ranked}"
        axis.plot(*values.T, "o", color=colour, markersize=5, alpha=0.8, label=label)
    axis.set_xlabel(spaced(measure), fontsize=9)
    axis.set_ylabel(f"{spaced(split)}, % of scenes", fontsize=9)
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0.0, -0.14), ncols=2)
    return figure


def _check_one_setting(results: Sequence[CellResult]) -> None:
    settings = sorted({result.cell.setting for result in results})
    if len(settings) != 1:
        listed = ", ".join(f"{coupling} at rho {rho:g}" for coupling, rho in settings) or "none"
        raise UserError(f"the results are of {listed}: give those of one coupling and rho")
