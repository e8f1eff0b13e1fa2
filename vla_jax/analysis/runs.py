"""Loads runs and compares them."""

import dataclasses
from typing import Any

from vla_jax.errors import UserError
from vla_jax.evaluation.evaluate import format_table
from vla_jax.evaluation.records import Curve, Run, load_run
from vla_jax.evaluation.results import common_splits, compare

__all__ = ["Curve", "Run", "compare_runs", "load_run", "sibling_runs", "success_table"]


def success_table(*runs: Run) -> str:
    """The newest results of each run as text, one line an arm and split."""
    return format_table([row for run in runs for row in _last(run).rows])


def compare_runs(first: Run, second: Run) -> list[dict[str, Any]]:
    """Second minus first on the same scenes: one dict a split with difference, low, high, p, only_first, only_second.

    Raises:
        UserError: a run has not been evaluated, or the two were judged on other scenes.
    """
    pairs = compare(_last(first), _last(second))
    return [{"split": split, **dataclasses.asdict(paired)} for split, paired in pairs.items()]


def sibling_runs(run: Run) -> list[Run]:
    """The other runs in the directory that holds this one, by name, where both were judged on the same scenes.

    It prints which it leaves out, and why.
    """
    found = sorted(path.parent for path in run.directory.parent.glob("*/evaluation"))
    siblings = [load_run(directory) for directory in found if directory != run.directory]
    comparable = []
    for sibling in siblings:
        try:
            common_splits(_last(run), _last(sibling))
            comparable.append(sibling)
        except UserError as error:
            print(f"without {sibling.directory}: {error}")
    return comparable


def _last(run: Run):
    if run.last is None:
        raise UserError(f"{run.directory} has no results: python -m experiments.evaluate --workdir={run.directory}")
    return run.last
