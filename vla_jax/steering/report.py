"""What the steering arms did, as rows and as a table: rates with intervals, differences on the same scenes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from vla_jax.evaluation.intervals import compare_paired, compare_seeds, wilson

REFERENCES = ("base", "best_of_n")


def make_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each shift and arm, over all policies that ran it.

    results: what `study.SteerStudy.run` returns, with "policy". A row's `against` gives, for each of REFERENCES that
    the same policies ran, the difference in success on the same scenes: a paired bootstrap over scenes, and over
    policies where there are several. `untouched` gives the same of successes that touched nothing else.
    """
    table: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for result in results:
        table.setdefault((result["shift"], result["arm"]), {})[result["policy"]] = result
    return [_row(shift, arm, runs, table) for (shift, arm), runs in table.items()]


def _row(shift: str, arm: str, runs: dict[str, dict[str, Any]], table) -> dict[str, Any]:
    others = {name: table.get((shift, name), {}) for name in REFERENCES if name != arm}
    return {
        "shift": shift,
        "arm": arm,
        "policies": len(runs),
        **_rate(runs, others, _success),
        "untouched": _rate(runs, others, lambda run: _success(run) & ~np.array(run["touched"], bool)),
        "by_policy": {policy: float(np.mean(run["success"])) for policy, run in runs.items()},
        "at_other": float(np.mean([run["at_other"] for run in runs.values()])),
        "distance": float(np.mean([run["distance"] for run in runs.values()])),
        "without_program": sum(bool(why) for run in runs.values() for why in run["failure"]),
        "seconds": float(np.sum([run["seconds"] for run in runs.values()])),
    }


def _success(run: dict[str, Any]) -> Bool[np.ndarray, " B"]:
    return np.array(run["success"], bool)


def _rate(runs, others, judge: Callable[[dict[str, Any]], Bool[np.ndarray, " B"]]) -> dict[str, Any]:
    """How often an arm succeeds as judged, and how much more often than other arms. The interval is Wilson's, over
    scenes; for several policies it also holds that of a bootstrap over policies and scenes."""
    success = np.array([judge(run) for run in runs.values()])
    low, high = wilson(int(success.sum()), success.size)
    if len(runs) > 1:
        found = compare_seeds(np.zeros_like(success), success)
        low, high = min(low, found.low), max(high, found.high)
    against = {}
    for name, other in others.items():
        if set(other) == set(runs):
            before = np.array([judge(other[policy]) for policy in runs])
            found = compare_paired(before[0], success[0]) if len(runs) == 1 else compare_seeds(before, success)
            against[name] = {"difference": found.difference, "low": found.low, "high": found.high, "p": found.p}
    counts = {"trials": success.size, "successes": int(success.sum()), "rate": float(success.mean())}
    return {**counts, "low": low, "high": high, "against": against}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as tables, one for each shift. "other": the hand ended nearest to the object of the wrong-target arm;
    "untouched": successes that touched no other object."""
    lines = []
    for shift in dict.fromkeys(row["shift"] for row in rows):
        lines += [f"### {shift}", "", "| arm | success | 95 % | − base | − best of N | untouched | other | distance |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for row in (row for row in rows if row["shift"] == shift):
            gaps = (_gap(row["against"].get(reference)) for reference in REFERENCES)
            lines.append(
                f"| {row['arm']} | {row['successes']}/{row['trials']} = {100 * row['rate']:.1f} % "
                f"| {100 * row['low']:.1f} … {100 * row['high']:.1f} | {' | '.join(gaps)} "
                f"| {row['untouched']['successes']}/{row['trials']} "
                f"| {100 * row['at_other']:.0f} % | {100 * row['distance']:.1f} cm |"
            )
        lines.append("")
    return "\n".join(lines)


def _gap(found: dict[str, float] | None) -> str:
    if found is None:
        return "–"
    return f"{100 * found['difference']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
