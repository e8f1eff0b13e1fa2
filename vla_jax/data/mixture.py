"""Several datasets as one: drawn by weight, with the statistics of each robot, in one batch.

Datasets of one robot (the same embodiment, rate, names, units and meaning of actions and state) share one contract in
SI units, with the statistics of all of them together: nothing else changes, and closed-loop evaluation still works.

Different robots cannot share units. Each keeps its own contract; a batch holds what these make of actions and states,
about [-1, 1], and 0 in the dimensions that a robot does not have (as pi0 pads, arXiv 2410.24164, section IV). The
policy's contract is one of numbers without unit, with the robots' contracts sealed in it: whoever drives robot r undoes
the normalisation by `contract.robots[r]`. A batch's `action_mask` is False in dimensions that a robot lacks, and the
losses and the policy leave them out (`flow.path.squared_error`, `models.expert.ActionExpert`); whoever drives robot r
names those that it has by `contract.dimensions(r)`.

Every dataset must have the views that are used, so those that all of them have are.

Axis legend: T steps, A action width, S state width; E episodes.
"""

import bisect
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Float

from vla_jax.data import tokenizer as tokenizers
from vla_jax.data.contract import Contract, pooled_contract
from vla_jax.data.dataset import Dataset
from vla_jax.data.episode import StoredEpisode
from vla_jax.data.interface import Interface
from vla_jax.data.statistics import Statistics
from vla_jax.errors import UserError

SAME_ROBOT = (
    "embodiment", "control_hz", "action_names", "action_units", "action_representation", "state_names", "state_units",
    "prompt_format",
)  # fmt: skip


def mixture_contract(datasets: Sequence[Dataset], image_size: int = 0) -> Contract:
    """The contract of a mixture: the module's text tells of what.

    Raises:
        UserError: the datasets have no view in common, or pictures of different sizes and no `image_size`.
    """
    views = common_views(datasets, image_size)
    tokenizer, longest = _words(datasets)
    words = dict(tokenizer=tokenizer, max_tokens=longest)
    groups = robots_of(datasets)
    shared = {
        key: value for key, value in datasets[0].facts.items() if all(d.facts.get(key) == value for d in datasets)
    }
    if len(groups) == 1:
        return pooled_contract(datasets, dataclasses.replace(datasets[0].interface, images=views, **words), shared)
    robots = {}
    for name, members in groups.items():
        interface = dataclasses.replace(members[0].interface, images=views, tokenizer="", max_tokens=0)
        robots[name] = pooled_contract(members, interface, {})
    action, state = (max(len(getattr(r, f"{kind}_names")) for r in robots.values()) for kind in ("action", "state"))
    count = sum(robot.action_statistics.count for robot in robots.values())
    return Contract(
        embodiment="+".join(robots),
        control_hz=0.0,  # each robot's own
        images=views,
        action_names=tuple(f"action_{number}" for number in range(action)),
        action_units=("1",) * action,
        action_representation="normalised by the robot's own contract, 0 where it has fewer dimensions",
        state_names=tuple(f"state_{number}" for number in range(state)),
        state_units=("1",) * state,
        **words,
        dataset="+".join(dataset.name for dataset in datasets),
        fingerprint=_hash([dataset.fingerprint for dataset in datasets]),
        facts=shared,
        action_statistics=_unit(count, action),
        state_statistics=_unit(count, state),
        robots=robots,
    )


def robots_of(datasets: Sequence[Dataset]) -> dict[str, list[Dataset]]:
    """The datasets of each robot; a second robot of one embodiment is named with its first dataset too."""
    groups: dict[tuple, list[Dataset]] = {}
    for dataset in datasets:
        groups.setdefault(tuple(getattr(dataset.interface, name) for name in SAME_ROBOT), []).append(dataset)
    named: dict[str, list[Dataset]] = {}
    for members in groups.values():
        name = members[0].interface.embodiment
        named[f"{name} ({members[0].name})" if name in named else name] = members
    return named


def common_views(datasets: Sequence[Dataset], image_size: int) -> dict[str, tuple[int, int]]:
    """The views that all datasets have, and their size."""
    first = datasets[0].interface.resized(image_size).images
    views = {view: size for view, size in first.items() if all(view in d.interface.images for d in datasets)}
    if not views:
        listed = "; ".join(f"{dataset.name} has {', '.join(dataset.interface.images)}" for dataset in datasets)
        raise UserError(f"the datasets have no view in common: {listed}")
    for dataset in datasets:
        for view, size in views.items():
            if (found := dataset.interface.resized(image_size).images[view]) != size:
                raise UserError(
                    f"view {view} is {size} in {datasets[0].name} and {found} in {dataset.name}: set data.image_size"
                )
    return views


class MixedDataset:
    """Several datasets one after the other, each episode in the units of the mixture's contract; see `Dataset`.

    Args:
        datasets: the members, in the order of their weights.
        weights: how often a step of each member is drawn, relative to the others.
        contract: of `mixture_contract`.

    Raises:
        UserError: a member does not fit the contract.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float], contract: Contract):
        self.members = tuple(datasets)
        self.weights = np.asarray(weights, np.float64) / np.sum(weights)
        self.directory = Path(", ".join(str(dataset.directory) for dataset in datasets))
        self.name, self.facts = "+".join(dataset.name for dataset in datasets), contract.facts
        self.interface = _interface(contract)
        self.lengths = np.concatenate([dataset.lengths for dataset in datasets])
        self.episode_names = tuple(name for dataset in datasets for name in dataset.episode_names)
        self.fingerprint = _hash([[d.fingerprint for d in datasets], self.weights.tolist()])
        self.reads_steps = np.concatenate([dataset.reads_steps for dataset in datasets])
        self.first = np.concatenate([[0], np.cumsum([len(dataset) for dataset in datasets])])
        self._contract = contract
        self._robots: list[str] = []  # of each member, its name in the contract; "" where all are of one robot
        for dataset in datasets:
            robot = _robot(dataset, contract) if contract.robots else ""
            expected = contract.robots[robot] if robot else contract
            theirs = dataclasses.replace(dataset.interface, images=expected.images)
            expected.check_interface(theirs, f"the dataset at {dataset.directory}")
            self._robots.append(robot)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, index: int) -> StoredEpisode:
        """One episode of a member, with the mixture's views and units."""
        member = bisect.bisect_right(self.first, index) - 1
        episode, name = self.members[member].read(int(index - self.first[member])), self._robots[member]
        episode = dataclasses.replace(episode, images={view: episode.images[view] for view in self.interface.images})
        if not name:
            return episode
        robot = self._contract.robots[name]
        return dataclasses.replace(
            episode,
            actions=_padded(robot.normalize_action(episode.actions), len(self.interface.action_names)),
            state=_padded(robot.normalize_state(episode.state), len(self.interface.state_names)),
            dimensions=self._contract.dimensions(name),
        )

    def numbers(self) -> Iterator[tuple[Float[np.ndarray, "T A"], Float[np.ndarray, "T S"]]]:
        """Actions and states of all steps, in the members' own units."""
        for dataset in self.members:
            yield from dataset.numbers()

    def step_numbers(self, lengths: Sequence[int], seed: int) -> grain.MapDataset:
        """An endless sequence of step numbers, members by weight, each member's steps shuffled anew every round.

        lengths: steps of each member that take part; step numbers count them on through the members. A member's seed
        is its own, so that adding one leaves the order within the others.
        """
        taken = [index for index, length in enumerate(lengths) if length]
        first = np.concatenate([[0], np.cumsum(lengths)])
        streams = [
            grain.MapDataset.range(int(first[index]), int(first[index + 1])).seed(seed + index).shuffle().repeat()
            for index in taken
        ]
        return grain.MapDataset.mix(streams, self.weights[taken].tolist())


def describe_members(datasets: Sequence[Dataset], weights: Sequence[float], samples: int) -> str:
    """Per dataset: steps, share of `samples` draws, and how often these go through it (its effective epochs)."""
    lines = [f"{'dataset':<28}{'robot':<16}{'episodes':>10}{'steps':>12}{'share':>8}{'epochs':>9}"]
    for dataset, weight in zip(datasets, np.asarray(weights) / np.sum(weights), strict=True):
        steps = int(dataset.lengths.sum())
        lines.append(
            f"{dataset.name:<28}{dataset.interface.embodiment:<16}{len(dataset):>10,}{steps:>12,}{weight:>8.1%}"
            f"{samples * weight / steps:>9.2f}"
        )
    return "\n".join(lines)


def _robot(dataset: Dataset, contract: Contract) -> str:
    """The name of a dataset's robot in the contract of a mixture of robots."""
    for name, robot in contract.robots.items():
        if all(getattr(robot, field) == getattr(dataset.interface, field) for field in SAME_ROBOT):
            return name
    raise UserError(
        f"the dataset at {dataset.directory} is of none of the robots of the contract ({', '.join(contract.robots)})"
    )


def _padded(values: Float[np.ndarray, "T D"], width: int) -> Float[np.ndarray, "T W"]:
    return np.pad(values, ((0, 0), (0, width - values.shape[1])))


def _unit(count: int, width: int) -> Statistics:
    """Statistics whose bounds are -1 and 1: those of numbers that are normalised already."""
    low, middle, high = (-1.0,) * width, (0.0,) * width, (1.0,) * width
    return Statistics(count, low, high, middle, high, low, high)


def _interface(contract: Contract) -> Interface:
    return Interface(**{field.name: getattr(contract, field.name) for field in dataclasses.fields(Interface)})


def _words(datasets: Sequence[Dataset]) -> tuple[str, int]:
    """The text of a tokenizer that knows the words of all datasets, and the longest of their instructions."""
    known = {word for dataset in datasets for word in tokenizers.from_json(dataset.interface.tokenizer).get_vocab()}
    tokenizer = tokenizers.train_tokenizer(known - {tokenizers.PAD, tokenizers.UNKNOWN})
    return tokenizers.to_json(tokenizer), max(dataset.interface.max_tokens for dataset in datasets)


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
