"""Figures of curves and success rates; drawn off screen, the same in reports and notebooks."""

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vla_jax.evaluation.records import Run
from vla_jax.evaluation.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE = ("#2f6fdf", "#e0752d", "#2a9d6f", "#a34fc4", "#c8394f", "#6b7280")
INK, GRID = "#1f2430", "#e5e7eb"
PANEL = (4.2, 2.6)  # inches


def curves_figure(runs: Sequence[Run], names: Sequence[str] | None = None, columns: int = 3) -> "Figure":
    """One panel a metric, one line a run. Without `names`: every loss term, then the other curves that change."""
    names = list(names) if names is not None else default_curves(runs)
    rows = max(1, -(-len(names) // columns))
    figure, axes = canvas(rows, columns)
    for axis, name in zip(axes, names, strict=False):
        for run, colour in zip(runs, colours(len(runs)), strict=True):
            if name in run.metrics:
                curve = run.metrics[name]
                marker = "o" if len(curve.steps) < 20 else None
                style = {"color": colour, "linewidth": 1.4, "marker": marker, "markersize": 3}
                axis.plot(curve.steps, curve.values, label=run.name, **style)
        axis.set_title(name, fontsize=9, color=INK, loc="left")
        axis.set_xlabel("step", fontsize=8)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    if names and len(runs) > 1:
        axes[0].legend(fontsize=8, frameon=False)
    return figure


def default_curves(runs: Sequence[Run]) -> list[str]:
    """The metrics worth a panel: the losses, every term, the success rates measured in training."""
    known = [name for run in runs for name, curve in run.metrics.items() if len(curve.steps) > 1]
    chosen = [name for name in ("loss", "validation/loss") if name in known]
    chosen += sorted({name for name in known if name.startswith("terms/")})
    return chosen + sorted({name for name in known if name.startswith("evaluation/") and name.endswith("/rate")})


def success_figure(results: Sequence[Results]) -> "Figure":
    """Success rate with its 95 % Wilson interval by split, a colour an arm; a hollow diamond is the stick rate."""
    from matplotlib.figure import Figure

    splits = list(dict.fromkeys(row["split"] for result in results for row in result.rows))
    figure = Figure(figsize=(8.6, 0.9 + 0.52 * len(splits)), layout="constrained")
    axis = figure.subplots()
    style_axis(axis)
    offsets = np.linspace(-0.22, 0.22, len(results)) if len(results) > 1 else [0.0]
    for result, colour, offset in zip(results, colours(len(results)), offsets, strict=True):
        heights = np.array([splits.index(row["split"]) for row in result.rows]) + offset
        rates = np.array([row["rate"] for row in result.rows])
        errors = np.array([[row["rate"] - row["low"], row["high"] - row["rate"]] for row in result.rows]).T
        axis.errorbar(rates, heights, xerr=errors, fmt="o", color=colour, markersize=6, capsize=3, label=result.arm)
        sticks = [(row["stick"], y) for row, y in zip(result.rows, heights, strict=True) if row["stick"] is not None]
        style = {"marker": "D", "s": 26, "facecolors": "white", "edgecolors": colour, "zorder": 3}
        axis.scatter(*np.array(sticks).reshape(-1, 2).T, **style)
    axis.set_yticks(range(len(splits)), [spaced(split) for split in splits])
    axis.set_xlim(-0.02, 1.02)
    axis.set_ylim(len(splits) - 0.5, -0.5)
    axis.set_xlabel("success rate (dot, 95 % interval) and stick rate (diamond)", fontsize=8)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def to_svg(figure: "Figure") -> str:
    """The figure as an <svg> element with its letters drawn as shapes: it looks the same on every machine."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "vla_jax"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return re.sub("<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def canvas(rows: int, columns: int) -> "tuple[Figure, list]":
    """A figure off screen with rows x columns styled panels, and these in a list."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        style_axis(axis)
    return figure, axes


def style_axis(axis) -> None:
    """The look of all figures."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GRID)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, colors=INK, length=0)


def spaced(name: str) -> str:
    """A split, measure or other name of the code as people read it: "held out pairs"."""
    return name.replace("_", " ")


def colours(count: int) -> list[str]:
    """One for each of so many lines; they repeat where there are more than PALETTE has."""
    return [PALETTE[index % len(PALETTE)] for index in range(count)]
