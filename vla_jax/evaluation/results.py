"""What an evaluation found: a row per split, the outcome of every scene, and files that hold them."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vla_jax.errors import UserError
from vla_jax.evaluation.intervals import Comparison, compare_paired, wilson
from vla_jax.evaluation.rollout import Outcome, Trials
from vla_jax.files import write_atomically

# What a policy loses, on the same scenes, when only the instruction changes.
DROPS = {"language_drop": "blank", "swap_drop": "swapped", "paraphrase_drop": "paraphrases"}


@dataclasses.dataclass(frozen=True)
class Results:
    """One policy on all splits.

    Attributes:
        arm: name of the policy in tables.
        step: training step of its checkpoint.
        config: everything that fixed the evaluation (scenes, seed, chunk execution, environment, bias).
        rows: one dict a split; see `make_row`.
        scenes: split -> column -> value per scene: success, stuck, conflict (bool), ticks, distance, nearest, text.
        fingerprints: split -> hash of its scenes and commands; equal hashes may be compared in pairs.
        seconds: wall time of the rollouts, compilation included.
    """

    arm: str
    step: int
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    scenes: dict[str, dict[str, list]]
    fingerprints: dict[str, str]
    seconds: float

    def success(self, split: str) -> np.ndarray:
        """bool[B]: success on each scene of a split."""
        return np.array(self.scenes[split]["success"], bool)

    def drops(self) -> list[dict[str, Any]]:
        """What the policy loses in pairs of splits that share scenes; see DROPS. Differences are in success rate."""
        if "in_distribution" not in self.scenes:
            return []
        base = self.success("in_distribution")
        found = {name: split for name, split in DROPS.items() if split in self.scenes}
        return [
            {"name": name, "split": split, **dataclasses.asdict(compare_paired(self.success(split), base))}
            for name, split in found.items()
        ]

    def summary(self) -> dict[str, Any]:
        """What results.json holds: everything but the single scenes."""
        values = dataclasses.asdict(self)
        del values["scenes"]
        return {"rows": values.pop("rows"), "drops": self.drops(), **values}


def make_row(arm: str, step: int, split: str, columns: dict[str, list]) -> dict[str, Any]:
    """One line of the table.

    `stick` is the share of scenes on which the policy did what the look suggests and not what it was told, among those
    where the two name different objects (`stick_trials`); None without such scenes. On them
    success + stick + neither = 1. `ticks` is the mean over successes, `distance` over all scenes (metres).
    """
    success, conflict = np.array(columns["success"], bool), np.array(columns["conflict"], bool)
    row = {"arm": arm, "step": step, "split": split, **_rate("", success)}
    sticks = np.array(columns["stuck"], bool)[conflict]
    row |= _rate("stick_", sticks) if len(sticks) else {"stick_trials": 0, "stick_rate": None}
    row["stick"] = row["stick_rate"]
    row["ticks"] = float(np.mean(np.array(columns["ticks"])[success])) if success.any() else None
    row["distance"] = float(np.mean(columns["distance"]))
    return row


def _rate(prefix: str, outcomes: np.ndarray) -> dict[str, Any]:
    successes, trials = int(outcomes.sum()), len(outcomes)
    low, high = wilson(successes, trials)
    values = {"successes": successes, "trials": trials, "rate": successes / trials, "low": low, "high": high}
    return {prefix + name: value for name, value in values.items()}


def make_columns(trials: Trials, outcome: Outcome, texts: list[str]) -> dict[str, list]:
    """The outcome of every scene of one split, as JSON-able columns."""
    success, cue_success = np.asarray(outcome.success), np.asarray(outcome.cue_success)
    conflict = np.asarray(trials.cue.target) != np.asarray(trials.command.target)
    return {
        "success": success.tolist(),
        "stuck": (cue_success & ~success & conflict).tolist(),
        "conflict": conflict.tolist(),
        "ticks": np.asarray(outcome.ticks).tolist(),
        "distance": np.round(np.asarray(outcome.distance, float), 4).tolist(),
        "nearest": np.asarray(outcome.nearest).tolist(),
        "text": list(texts),
    }


def fingerprint(tree: Any) -> str:
    """Hash of a pytree of arrays."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()[:16]


def common_splits(first: Results, second: Results) -> list[str]:
    """The splits that both ran, on the same scenes.

    Raises:
        UserError: no common split, or a common split with other scenes.
    """
    common = [split for split in first.scenes if split in second.scenes]
    if not common:
        raise UserError(f"{first.arm} and {second.arm} share no split; evaluate both with the same eval.splits")
    for name in ("task", "embodiment"):  # the fingerprint knows scenes and commands alone
        was, now = (result.config.get("env", {}).get(name) for result in (first, second))
        if was != now:
            raise UserError(f"{first.arm} and {second.arm} were judged on another {name}: {was} and {now}")
    for split in common:
        if first.fingerprints[split] != second.fingerprints[split]:
            raise UserError(
                f"{first.arm} and {second.arm} were judged on other scenes of {split!r}; "
                "evaluate both with the same seed, number of scenes, task and bias"
            )
    return common


def compare(first: Results, second: Results) -> dict[str, Comparison]:
    """Second minus first on every split that both ran, scene by scene.

    Raises:
        UserError: as `common_splits`.
    """
    splits = common_splits(first, second)
    return {split: compare_paired(first.success(split), second.success(split)) for split in splits}


def save_results(run_dir: str | Path, results: Results, changes: str = "") -> Path:
    """Writes evaluation/<step>.json (all scenes) and results.json (the summary of what was judged last).

    changes: how it was judged otherwise than the run says, as "guidance=2.0": such results, evaluation/<step>-<changes>
    .json, stand beside the run's own.

    Returns:
        The path of results.json.
    """
    run_dir = Path(run_dir)
    name = f"{results.step:08d}-{changes}" if changes else f"{results.step:08d}"
    write_atomically(run_dir / "evaluation" / f"{name}.json", json.dumps(dataclasses.asdict(results)))
    path = run_dir / "results.json"
    write_atomically(path, json.dumps(results.summary(), indent=1))
    return path


def load_results(run_dir: str | Path) -> list[Results]:
    """Every evaluation saved in a run directory, by training step; [] where there is none.

    Of one step, what was judged otherwise than the run says comes first: the last of all is the run's own.
    """
    loaded = []
    for path in sorted(Path(run_dir).glob("evaluation/*.json")):
        try:
            loaded.append(Results(**json.loads(path.read_text())))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is not the result of an evaluation; delete it and evaluate again") from error
    return loaded
