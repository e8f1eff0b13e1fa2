"""Reads a run directory: configuration, contract, metrics, results."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.errors import UserError
from vla_jax.evaluation.results import Results, load_results


@dataclasses.dataclass(frozen=True)
class Curve:
    """One logged number over training."""

    steps: np.ndarray  # int[N]
    values: np.ndarray  # float[N]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run directory holds.

    Attributes:
        name: of the arm where it was evaluated, else of the directory.
        directory: where it lies.
        config: config.json, {} where there is none.
        provenance: provenance.json, one entry a start of the run (command, commit, versions, devices, data).
        facts: what the contract says of the data, {} without a contract.
        metrics: name -> Curve, from metrics.jsonl; see `read_metrics`.
        results: every evaluation, by training step.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    provenance: list[dict[str, Any]]
    facts: dict[str, Any]
    metrics: dict[str, Curve]
    results: list[Results]

    @property
    def last(self) -> Results | None:
        """The evaluation of the newest weights, as the run itself says where there is one."""
        return self.results[-1] if self.results else None


def load_run(directory: str | Path) -> Run:
    """Reads a run directory; parts that are not there yet are empty.

    Raises:
        UserError: the directory is missing, holds neither metrics nor results, or holds a damaged file.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"no run directory '{directory}': python -m experiments.train --workdir={directory} makes one")
    metrics, results = read_metrics(directory / "metrics.jsonl"), load_results(directory)
    if not metrics and not results:
        raise UserError(f"'{directory}' holds neither metrics.jsonl nor evaluation/: it is not a run directory")
    return Run(
        name=results[-1].arm if results else directory.name,
        directory=directory,
        config=_read_json(directory / "config.json", {}),
        provenance=_read_json(directory / "provenance.json", []),
        facts=_contract_facts(_read_json(directory / "contract.json", {})),
        metrics=metrics,
        results=results,
    )


def read_metrics(path: Path) -> dict[str, Curve]:
    """Columns of a metrics.jsonl, whose lines are {"kind", "step", name: number, ...}.

    A column is called by its name in lines of kind "train" ("loss", "terms/llr"), "<kind>/<name>" in others
    ("validation/loss"), and "<kind>/<split>/<name>" in lines that name a split ("evaluation/swapped/rate"). A step that
    was logged twice keeps its last line. A last line that was cut off while it was written is left out.
    """
    if not path.is_file():
        return {}
    columns: dict[str, dict[int, float]] = {}
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            kind, step = entry["kind"], int(entry["step"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number} is not a JSON object with a kind and a step; remove it") from error
        prefix = "" if kind == "train" else f"{kind}/{entry['split']}/" if "split" in entry else f"{kind}/"
        for name, value in entry.items():
            if name not in ("kind", "step", "time") and isinstance(value, int | float):
                columns.setdefault(prefix + name, {})[step] = float(value)
    return {
        name: Curve(np.array(sorted(column)), np.array([column[step] for step in sorted(column)]))
        for name, column in columns.items()
    }


def _contract_facts(sealed: dict[str, Any]) -> dict[str, Any]:
    contract = sealed.get("contract", {})
    kept = ("dataset", "fingerprint", "embodiment", "control_hz")
    return {**{name: contract[name] for name in kept if name in contract}, **contract.get("facts", {})}


def _read_json(path: Path, missing: Any) -> Any:
    if not path.is_file():
        return missing
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON; restore it or remove it") from error
