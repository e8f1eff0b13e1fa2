"""The results of many trainings as one table: arms against each other, over couplings, rho and seeds.

A *cell* is one training and its evaluation; a file holds each, so that a table grows as they come.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_jax.errors import UserError
from vla_jax.evaluation.charts import spaced
from vla_jax.evaluation.intervals import SeedComparison, compare_seeds, holm
from vla_jax.evaluation.results import Results
from vla_jax.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# With one or two seeds, a bootstrap calls chance differences between trainings certain far too often: where seeds
# differ by 13 points, 52 and 17 % of the time at p < .05, and 7 % with three.
SURE_SEEDS = 3


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """One training of a study."""

    coupling: str
    rho: float
    arm: str
    seed: int

    @property
    def setting(self) -> tuple[str, float]:
        """Coupling and rho: cells of one setting can be compared."""
        return self.coupling, self.rho

    @property
    def name(self) -> str:
        """Unique in a study; a file name."""
        return f"{self.coupling}-rho{self.rho:g}-{self.arm}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class CellResult:
    """What one cell found: per split the outcome of every scene (success; stuck and conflict, see Results), and the
    measures of `listening` (none in files written before there were any)."""

    cell: Cell
    success: dict[str, list[bool]]
    stuck: dict[str, list[bool]]
    conflict: dict[str, list[bool]]
    fingerprints: dict[str, str]
    step: int
    provenance: dict[str, Any]
    measures: dict[str, float] = dataclasses.field(default_factory=dict)


def save_cell(
    directory: Path, cell: Cell, results: Results, provenance: dict[str, Any], measures: dict[str, float]
) -> None:
    """Writes `directory/<cell>.json`."""
    columns = {
        name: {split: columns[name] for split, columns in results.scenes.items()}
        for name in ("success", "stuck", "conflict")
    }
    known = {"fingerprints": results.fingerprints, "step": results.step, "provenance": provenance}
    found = CellResult(cell, **columns, **known, measures=measures)
    write_atomically(directory / f"{cell.name}.json", json.dumps(dataclasses.asdict(found)) + "\n")


def load_cells(directory: str | Path) -> list[CellResult]:
    """Every cell saved in a directory, in order. Raises UserError for a file that is none."""
    found = []
    for path in sorted(Path(directory).glob("*.json")):
        try:
            values = json.loads(path.read_text())
            found.append(CellResult(**{**values, "cell": Cell(**values["cell"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} does not hold the result of a study's cell: delete it and run again") from error
    return sorted(found, key=lambda result: result.cell)


def table(results: Iterable[CellResult]) -> list[dict[str, Any]]:
    """One row for every coupling, rho, arm and split: mean success over seeds, its standard deviation, stick rate."""
    rows = []
    for (coupling, rho, arm), group in _grouped(results).items():
        for split in dict.fromkeys(split for result in group for split in result.success):
            have = [result for result in group if split in result.success]
            rates = [float(np.mean(result.success[split])) for result in have]
            sticks = [
                float(np.mean(stuck))
                for result in have
                if len(stuck := np.array(result.stuck[split])[np.array(result.conflict[split], bool)])
            ]
            rows.append(
                {
                    "coupling": coupling,
                    "rho": rho,
                    "arm": arm,
                    "split": split,
                    "seeds": len(rates),
                    "rate": float(np.mean(rates)),
                    "deviation": float(np.std(rates, ddof=1)) if len(rates) > 1 else None,
                    "stick": float(np.mean(sticks)) if sticks else None,
                    "by_seed": rates,
                }
            )
    return rows


def measure_table(results: Iterable[CellResult]) -> list[dict[str, Any]]:
    """One row for every coupling, rho, arm and measure of `listening`: mean over seeds and standard deviation."""
    rows = []
    for (coupling, rho, arm), group in _grouped(results).items():
        for name in dict.fromkeys(name for result in group for name in result.measures):
            by_seed = [result.measures[name] for result in group if name in result.measures]
            rows.append(
                {
                    "coupling": coupling,
                    "rho": rho,
                    "arm": arm,
                    "measure": name,
                    "seeds": len(by_seed),
                    "mean": float(np.mean(by_seed)),
                    "deviation": float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None,
                    "by_seed": by_seed,
                }
            )
    return rows


def comparisons(
    results: Sequence[CellResult], reference: str, splits: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Every other arm minus the reference arm, on the seeds that both have; on some splits, or (None) on all.

    p is corrected by Holm over the arms of one coupling, rho and split: which of them differ from the reference there?

    Raises:
        UserError: arms of one setting were judged on different scenes.
    """
    groups, rows = _grouped(results), []
    for (coupling, rho, arm), group in groups.items():
        base = {result.cell.seed: result for result in groups.get((coupling, rho, reference), ())}
        pairs = [(base[result.cell.seed], result) for result in group if result.cell.seed in base]
        if arm == reference or not pairs:
            continue
        for split in pairs[0][0].success:
            asked_for = splits is None or split in splits
            if not asked_for or any(split not in side.success for pair in pairs for side in pair):
                continue
            if len({side.fingerprints[split] for pair in pairs for side in pair}) > 1:
                raise UserError(f"{coupling}, rho {rho:g}: {arm} and {reference} met other scenes of {split!r}")
            sides = (np.array([pair[side].success[split] for pair in pairs]) for side in (0, 1))
            found: SeedComparison = compare_seeds(*sides)
            setting = {"coupling": coupling, "rho": rho, "arm": arm, "against": reference, "split": split}
            rows.append({**setting, "seeds": len(pairs), **dataclasses.asdict(found)})
    families = defaultdict(list)
    for row in rows:
        families[row["coupling"], row["rho"], row["split"]].append(row)
    for family in families.values():
        for row, corrected in zip(family, holm([row["p"] for row in family]), strict=True):
            row["p_holm"] = corrected
    return rows


def markdown(results: Sequence[CellResult], reference: str) -> str:
    """The tables as Markdown: success, one block for each coupling and rho, arms down and splits across; then the
    measures of listening, one block for each coupling."""
    rows = {(row["coupling"], row["rho"], row["arm"], row["split"]): row for row in table(results)}
    gaps = {(row["coupling"], row["rho"], row["arm"], row["split"]): row for row in comparisons(results, reference)}
    blocks = []
    for coupling, rho in dict.fromkeys((key[0], key[1]) for key in rows):
        here = [key for key in rows if key[:2] == (coupling, rho)]
        splits = list(dict.fromkeys(key[3] for key in here))
        lines = [f"### {coupling}, ρ = {rho:g}", "", f"| arm | seeds | {' | '.join(spaced(s) for s in splits)} |"]
        lines.append("|---" * (2 + len(splits)) + "|")
        for arm in dict.fromkeys(key[2] for key in here):
            keys = [(coupling, rho, arm, split) for split in splits]
            seeds = max(rows[key]["seeds"] for key in keys if key in rows)
            cells = [_cell(rows.get(key), gaps.get(key)) for key in keys]
            lines.append(f"| {arm} | {seeds} | {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    note = (
        f"Success in %, mean ± standard deviation over seeds; in brackets the stick rate. Second line: points above "
        f"{reference} on the same scenes with a 95 % bootstrap interval, over seeds and scenes where there are several "
        f"seeds (too narrow with two), over scenes alone where there is one: then it holds for these two policies and "
        f"not for the methods. \\* where p < .05 after Holm's correction, from {SURE_SEEDS} seeds on."
    )
    return "\n\n".join([*blocks, note, *_listening(results)]) + "\n"


def _listening(results: Sequence[CellResult]) -> list[str]:
    """Blocks of Markdown: arms and rho down, measures across."""
    rows = {(row["coupling"], row["arm"], row["rho"], row["measure"]): row for row in measure_table(results)}
    blocks = []
    for coupling in dict.fromkeys(key[0] for key in rows):
        lines = [f"### Listening, {coupling}", ""]
        lines += [
            "| arm | ρ | seeds | identification, % | PMI | of | calibration gap | sensitivity | heeding |",
            "|---" * 9 + "|",
        ]
        for arm, rho in dict.fromkeys(key[1:3] for key in rows if key[0] == coupling):
            have = {key[3]: row for key, row in rows.items() if key[:3] == (coupling, arm, rho)}
            cells = [_spread(have["identification"], 100, 1)]
            names = ("pmi", "target_entropy", "calibration_gap", "sensitivity", "heeding")
            cells += [_spread(have[name]) if name in have else "–" for name in names]
            lines.append(f"| {arm} | {rho:g} | {have['identification']['seeds']} | {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    note = (
        "Mean ± standard deviation over seeds; PMI, what it could be at most (of) and calibration gap in nats. "
        "`vla_jax/evaluation/listening.py` says what each is."
    )
    return [*blocks, note] if blocks else []


def figure(results: Sequence[CellResult], splits: Sequence[str] = ("in_distribution", "swapped")) -> "Figure":
    """Success of every arm, a row an arm, a colour a rho, a panel a split and coupling; small dots are seeds."""
    from matplotlib.figure import Figure

    rows = table(results)
    couplings, arms, rhos = ({row[name]: None for row in rows} for name in ("coupling", "arm", "rho"))
    height = {arm: -place for place, arm in enumerate(arms)}
    drawn = Figure(figsize=(1.5 + 3.5 * len(splits), (1.2 + 0.25 * len(arms)) * len(couplings)), layout="constrained")
    panels = drawn.subplots(len(couplings), len(splits), squeeze=False, sharey=True)
    for coupling, line in zip(couplings, panels, strict=True):
        for split, axis in zip(splits, line, strict=True):
            for index, rho in enumerate(rhos):
                points = [r for r in rows if (r["coupling"], r["split"], r["rho"]) == (coupling, split, rho)]
                places = [height[row["arm"]] for row in points]
                axis.plot([r["rate"] for r in points], places, "o", color=f"C{index}", label=f"ρ = {rho:g}", alpha=0.8)
                for row, place in zip(points, places, strict=True):
                    axis.plot(row["by_seed"], [place] * row["seeds"], ".", color=f"C{index}", markersize=4)
            axis.set(xlabel="success", xlim=(-0.02, 1.02), title=f"{spaced(split)} ({coupling})")
            axis.set_yticks([*height.values()], [*height])
            axis.grid(axis="both", linewidth=0.3)
    panels[0][-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawn


def _grouped(results: Iterable[CellResult]) -> dict[tuple[str, float, str], list[CellResult]]:
    groups = defaultdict(list)
    for result in results:
        groups[result.cell.coupling, result.cell.rho, result.cell.arm].append(result)
    return dict(groups)


def _spread(row: dict[str, Any], scale: float = 1, digits: int = 3) -> str:
    deviation = "" if row["deviation"] is None else f" ± {scale * row['deviation']:.{digits}f}"
    return f"{scale * row['mean']:.{digits}f}{deviation}"


def _cell(row: dict[str, Any] | None, gap: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    spread = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.1f}"
    stick = "" if row["stick"] is None else f" [{100 * row['stick']:.0f}]"
    text = f"{100 * row['rate']:.1f}{spread}{stick}"
    if gap is None:
        return text
    sure = "\\*" if gap["p_holm"] < 0.05 and gap["seeds"] >= SURE_SEEDS else ""
    points, low, high = (100 * gap[name] for name in ("difference", "low", "high"))
    return f"{text}<br>{points:+.1f} [{low:+.1f}, {high:+.1f}]{sure}"
