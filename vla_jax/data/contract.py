"""The contract: everything that turns arrays into physical quantities and back, sealed in one small file.

A policy's checkpoint carries the contract of the data it was trained on. Whatever feeds or drives the policy is checked
against it, so that a difference in units, rates, sizes or normalisation is an error and not a success rate of zero.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from vla_jax.data.dataset import Dataset, open_dataset
from vla_jax.data.interface import Interface, describe_difference, interface_from_json
from vla_jax.data.statistics import RunningStatistics, Statistics
from vla_jax.errors import UserError
from vla_jax.files import write_atomically

# The narrowest range that is stretched to [-1, 1], by unit. A dimension that hardly moves would otherwise turn sensor
# noise, or one rare value, into enormous targets. 2 mm and 0.02 rad are as good as standing still.
FLOORS = {"m": 2e-3, "rad": 2e-2, "1": 2e-2}


@dataclasses.dataclass(frozen=True)
class Contract(Interface):
    """An Interface, and the statistics of one dataset that fix its normalisation.

    Attributes:
        dataset, fingerprint: name and content hash of the data.
        facts: facts about that dataset (task, coupling, rho, entropy in nats, ...).
        action_statistics, state_statistics: per dimension, in the units of the interface.
        robots: of a mixture of different robots (see `data.mixture`), the contract of each; empty otherwise. Their
            words are those of the mixture.
    """

    dataset: str = dataclasses.field(kw_only=True)
    fingerprint: str = dataclasses.field(kw_only=True)
    facts: dict[str, Any] = dataclasses.field(kw_only=True)
    action_statistics: Statistics = dataclasses.field(kw_only=True)
    state_statistics: Statistics = dataclasses.field(kw_only=True)
    robots: "dict[str, Contract]" = dataclasses.field(kw_only=True, default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        if unknown := sorted(set(self.action_units + self.state_units) - set(FLOORS)):
            raise UserError(f"unknown unit {unknown[0]!r}: convert the data to one of {', '.join(FLOORS)} (SI)")

    def action_bounds(self) -> tuple[Float[np.ndarray, "A"], Float[np.ndarray, "A"]]:
        """(low, high): what normalises to -1 and +1. The 1 % and 99 % quantiles, at least the unit's floor apart."""
        return bounds(self.action_statistics, self.action_units)

    def state_bounds(self) -> tuple[Float[np.ndarray, "S"], Float[np.ndarray, "S"]]:
        """(low, high) of the state; see `action_bounds`."""
        return bounds(self.state_statistics, self.state_units)

    def normalize_action(self, action: Float[Any, "*B A"]) -> Float[Any, "*B A"]:
        """SI units to about [-1, 1]; nothing is clipped, so that it can be inverted. Works on NumPy and JAX arrays."""
        return normalize(action, *self.action_bounds())

    def denormalize_action(self, action: Float[Any, "*B A"]) -> Float[Any, "*B A"]:
        """Inverse of `normalize_action`."""
        return denormalize(action, *self.action_bounds())

    def normalize_state(self, state: Float[Any, "*B S"]) -> Float[Any, "*B S"]:
        """SI units to about [-1, 1]; see `normalize_action`."""
        return normalize(state, *self.state_bounds())

    def denormalize_state(self, state: Float[Any, "*B S"]) -> Float[Any, "*B S"]:
        """Inverse of `normalize_state`."""
        return denormalize(state, *self.state_bounds())

    def dimensions(self, robot: str) -> Bool[np.ndarray, "A"]:
        """Which dimensions of a mixture's action the robot has: the first ones. Raises UserError for an unknown one."""
        if robot not in self.robots:
            raise UserError(f"the policy knows no robot {robot!r}: choose one of {', '.join(self.robots)}")
        return np.arange(len(self.action_names)) < len(self.robots[robot].action_names)

    def nearly_constant(self) -> tuple[str, ...]:
        """The dimensions, as "action dx" or "state x", whose range is so small that `bounds` widened it."""
        found = []
        for kind in ("action", "state"):
            statistics, names = getattr(self, f"{kind}_statistics"), getattr(self, f"{kind}_names")
            for i, (name, unit) in enumerate(zip(names, getattr(self, f"{kind}_units"), strict=True)):
                if statistics.q99[i] - statistics.q01[i] < FLOORS[unit]:
                    found.append(f"{kind} {name}")
        return tuple(found)

    def check(self, other: "Contract", what: str = "the other contract") -> None:
        """Raises UserError that names, in one line, every field in which `other` (called `what`) differs."""
        mine, theirs = _flat(self), _flat(other)
        names = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
        if names:
            listed = "; ".join(describe_difference(name, mine.get(name), theirs.get(name)) for name in names[:6])
            more = f"; and {len(names) - 6} more" if len(names) > 6 else ""
            raise UserError(
                f"{what} differs in {listed}{more}. Use the data and settings that the policy was trained with"
            )

    def table(self) -> str:
        """The statistics as text, one dimension a line: `farthest` is the largest normalised value."""
        if self.robots:
            return "\n\n".join(f"{name}\n{contract.table()}" for name, contract in self.robots.items())
        columns = ("q01", "q99", "min", "max", "mean", "std", "farthest")
        lines = [f"{'dimension':<16}{'unit':>5}" + "".join(f"{column:>10}" for column in columns)]
        for kind in ("action", "state"):
            statistics, (low, high) = getattr(self, f"{kind}_statistics"), getattr(self, f"{kind}_bounds")()
            names, units = getattr(self, f"{kind}_names"), getattr(self, f"{kind}_units")
            extremes = np.array([statistics.minimum, statistics.maximum])
            farthest = np.abs(normalize(extremes, low, high)).max(axis=0)
            for i, (name, unit) in enumerate(zip(names, units, strict=True)):
                values = [getattr(statistics, key)[i] for key in ("q01", "q99", "minimum", "maximum", "mean", "std")]
                floored = f"{kind} {name}" in self.nearly_constant()
                note = f"  nearly constant: range widened to {FLOORS[unit]:g} {unit}" if floored else ""
                numbers = "".join(f"{value:10.4f}" for value in values) + f"{farthest[i]:10.2f}"
                lines.append(f"{kind + ' ' + name:<16}{unit:>5}{numbers}{note}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """All fields as JSON text. That of one robot has no `robots`, so that it reads as it did without mixtures."""
        values = dataclasses.asdict(self)
        if not self.robots:
            del values["robots"]
        return json.dumps(values, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Contract":
        """Inverse of `to_json`."""
        return cls._from_values(json.loads(text))

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> "Contract":
        values = interface_from_json(values)
        for kind in ("action_statistics", "state_statistics"):
            values[kind] = Statistics.from_json(values[kind])
        values["robots"] = {name: cls._from_values(robot) for name, robot in values.get("robots", {}).items()}
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Writes the contract and its seal (a hash of the text) at once: the file is the old one or the new one."""
        text = self.to_json()
        sealed = {"seal": _seal(text), "contract": json.loads(text)}
        write_atomically(Path(path), json.dumps(sealed, indent=1, sort_keys=True))

    @classmethod
    def load(cls, path: str | Path) -> "Contract":
        """Reads a contract. Raises UserError if there is none, or if it was changed since it was sealed."""
        try:
            sealed = json.loads(Path(path).read_text())
            text = json.dumps(sealed["contract"], indent=1, sort_keys=True)
            seal = sealed["seal"]
        except FileNotFoundError as error:
            raise UserError(f"no contract at {path}: the run directory is incomplete") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a contract file") from error
        if seal != _seal(text):
            raise UserError(f"{path} was changed after it was sealed: restore it from the run that wrote it")
        return cls.from_json(text)


def normalize(value, low, high):
    """2 (value - low) / (high - low) - 1."""
    return 2 * (value - low) / (high - low) - 1


def denormalize(value, low, high):
    """(value + 1) / 2 (high - low) + low."""
    return (value + 1) / 2 * (high - low) + low


def bounds(statistics: Statistics, units: tuple[str, ...]) -> tuple[Float[np.ndarray, "D"], Float[np.ndarray, "D"]]:
    """The 1 % and 99 % quantiles, moved apart about their middle where they are closer than the unit's floor."""
    q01, q99 = np.array(statistics.q01), np.array(statistics.q99)
    middle, half = (q01 + q99) / 2, np.maximum((q99 - q01) / 2, np.array([FLOORS[unit] / 2 for unit in units]))
    return (middle - half).astype(np.float32), (middle + half).astype(np.float32)


def compute_contract(directory: str | Path | Dataset, image_size: int = 0) -> Contract:
    """Reads every action and state of a dataset once, decodes no picture, and returns the dataset's contract.

    Args:
        directory: a dataset, or where one lies.
        image_size: pixels of the square pictures that the policy will see; 0 for those of the dataset.

    Raises:
        UserError: no dataset there, or a faulty episode (which is named).
    """
    dataset = open_dataset(directory) if isinstance(directory, str | Path) else directory
    return pooled_contract([dataset], dataset.interface.resized(image_size), dataset.facts)


def pooled_contract(datasets: Sequence[Dataset], interface: Interface, facts: dict[str, Any]) -> Contract:
    """The contract of datasets of one robot, with the statistics of all their steps together."""
    actions = RunningStatistics(len(interface.action_names))
    states = RunningStatistics(len(interface.state_names))
    for dataset in datasets:
        for action, state in dataset.numbers():
            actions.update(action)
            states.update(state)
    fields = {field.name: getattr(interface, field.name) for field in dataclasses.fields(Interface)}
    prints = [dataset.fingerprint for dataset in datasets]
    return Contract(
        **fields,
        dataset="+".join(dataset.name for dataset in datasets),
        fingerprint=prints[0] if len(prints) == 1 else _seal("\n".join(prints)),
        facts=facts,
        action_statistics=actions.result(),
        state_statistics=states.result(),
    )


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _flat(contract: Contract) -> dict[str, Any]:
    flat = {}
    for name, value in dataclasses.asdict(contract).items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            flat[name] = value
    return flat
