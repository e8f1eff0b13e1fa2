"""Learning curves of several arms and seeds in one figure and one table.

Axes: S seeds, E evaluations of a run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from vla_jax.errors import UserError
from vla_jax.evaluation.charts import INK, PALETTE, style_axis
from vla_jax.evaluation.records import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESAMPLES = 10_000  # of seeds, for the band


@dataclasses.dataclass(frozen=True)
class Arm:
    """Success on held-out scenes by control step, as far as all of an arm's seeds have come.

    before: success of the untouched policy on the same scenes; None until a seed is finished.
    """

    name: str
    steps: Int[np.ndarray, " E"]
    rates: Float[np.ndarray, "S E"]
    before: float | None

    def band(self) -> tuple[Float[np.ndarray, " E"], Float[np.ndarray, " E"]]:
        """95 % bootstrap interval of the mean over seeds, at every evaluation."""
        seeds = len(self.rates)
        drawn = np.random.default_rng(0).integers(0, seeds, (RESAMPLES, seeds))
        low, high = np.quantile(self.rates[drawn].mean(1), (0.025, 0.975), axis=0)
        return low, high


def load_arm(run_dir: str | Path, split: str) -> Arm:
    """The seeds of one run of experiments.dsrl.

    Raises:
        UserError: there is no seed, or one was not judged on `split`.
    """
    run_dir = Path(run_dir)
    seeds = sorted(run_dir.glob("seed*"), key=lambda path: int(path.name.removeprefix("seed")))
    name = f"evaluation/{split}/rate"
    curves = [read_metrics(seed / "metrics.jsonl").get(name) for seed in seeds]
    if not curves or None in curves:
        raise UserError(f"{run_dir} holds no seed that was judged on {split!r}: give the --workdir of experiments.dsrl")
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    rates = np.array([curve.values[np.isin(curve.steps, steps)] for curve in curves])
    outcomes = [json.loads(path.read_text()) for seed in seeds if (path := seed / "before_after.json").is_file()]
    rows = [row for outcome in outcomes[:1] for row in outcome["before"] if row["split"] == split]
    return Arm(run_dir.name, steps, rates, rows[0]["rate"] if rows else None)


def table(arms: Sequence[Arm]) -> str:
    """Markdown: where every arm began, where it ended, and how soon it was 20 points above the untouched policy."""
    lines = [
        "| arm | seeds | control steps | before | after [95 % over seeds] | steps to +20 points |",
        "|---|---|---|---|---|---|",
    ]
    for arm in arms:
        (low, high), mean = arm.band(), arm.rates.mean(0)
        band = f" [{100 * low[-1]:.1f}, {100 * high[-1]:.1f}]" if len(arm.rates) > 1 else ""
        before = "–" if arm.before is None else f"{100 * arm.before:.1f} %"
        gained = np.flatnonzero(mean - arm.before > 0.2 - 1e-9) if arm.before is not None else np.array([], int)
        soon = f"{arm.steps[gained[0]]:,}" if len(gained) else "–"
        after = f"{100 * mean[-1]:.1f} %{band}"
        lines.append(f"| {arm.name} | {len(arm.rates)} | {arm.steps[-1]:,} | {before} | {after} | {soon} |")
    return "\n".join(lines) + "\n"


def figure(arms: Sequence[Arm]) -> Figure:
    """The mean of every arm over its seeds, its band, and every seed as a thin line."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = drawing.subplots()
    style_axis(axis)
    for number, arm in enumerate(arms):
        colour = PALETTE[number % len(PALETTE)]
        axis.plot(arm.steps, arm.rates.T, color=colour, linewidth=0.6, alpha=0.5)
        axis.plot(arm.steps, arm.rates.mean(0), color=colour, linewidth=1.8, label=f"{arm.name} ({len(arm.rates)})")
        if len(arm.rates) > 1:
            axis.fill_between(arm.steps, *arm.band(), color=colour, alpha=0.15, linewidth=0)
    known = [arm.before for arm in arms if arm.before is not None]
    if known:
        axis.axhline(known[0], color=INK, linewidth=0.8, linestyle="--", label="untouched policy")
    axis.set_ylim(0, 1)
    axis.set_xlabel("control steps, warm-up included", fontsize=8)
    axis.set_title("success on held-out scenes (seeds)", fontsize=9, color=INK, loc="left")
    axis.legend(fontsize=8, frameon=False)
    return drawing
