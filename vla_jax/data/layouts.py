"""What the columns of somebody's dataset mean, and how they become an episode in this library's units.

A `Layout` says where pictures, actions, state and instruction lie and what they mean. It is all that a new robot needs:
readers (`data.sources`, `data.lerobot`) give columns, `assemble` makes an episode of them or says what is wrong.

Axis legend: T steps, A action width, S state width.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float

from vla_jax.data.episode import StoredEpisode, decode_jpeg
from vla_jax.errors import UserError

# What a stored number is multiplied with to become SI.
UNITS = {
    "m": ("m", 1.0),
    "mm": ("m", 1e-3),
    "cm": ("m", 1e-2),
    "rad": ("rad", 1.0),
    "deg": ("rad", np.pi / 180),
    "1": ("1", 1.0),
    "%": ("1", 1e-2),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A stretch of an action or state vector that shares one feature and one unit.

    Attributes:
        feature: path of the feature below `steps/` of an RLDS dataset, or the name of a LeRobot column.
        names: what its numbers are called here.
        unit: what they are stored in, a key of UNITS; they become SI.
        columns: which numbers of the feature, in order; all of them where empty.
        gripper: a key of GRIPPERS, where this is a gripper's opening that becomes 1 (open) ... 0 (closed).
    """

    feature: str
    names: tuple[str, ...]
    unit: str
    columns: tuple[int, ...] = ()
    gripper: str = ""

    def __post_init__(self):
        if self.unit not in UNITS:
            raise UserError(f"{self.feature}: unknown unit {self.unit!r}: one of {', '.join(UNITS)}")
        if self.gripper and self.gripper not in GRIPPERS:
            raise UserError(
                f"{self.feature}: unknown gripper convention {self.gripper!r}: one of {', '.join(GRIPPERS)}"
            )
        if self.gripper and (len(self.names) != 1 or self.unit != "1"):
            raise UserError(f"{self.feature}: a gripper convention needs one number of unit '1'")
        if self.columns and len(self.columns) != len(self.names):
            raise UserError(f"{self.feature}: {len(self.columns)} columns but {len(self.names)} names")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where one family of datasets keeps what a policy needs, and what it means.

    Attributes:
        embodiment: the robot.
        control_hz: actions per second.
        images: view -> feature. Views of the same kind should be called alike in all layouts ("front", "wrist").
        action, state: the vectors, part by part.
        action_representation: what an action means, in words.
        instruction: features with text; the first one that is not empty counts.
        episode_id: features below `episode_metadata/` that name an episode for ever; its position where there are none.
        drop_first: steps at the start of every episode that are left out.
    """

    embodiment: str
    control_hz: float
    images: Mapping[str, str]
    action: tuple[Part, ...]
    state: tuple[Part, ...]
    action_representation: str
    instruction: tuple[str, ...] = ("language_instruction",)
    episode_id: tuple[str, ...] = ()
    drop_first: int = 0

    def features(self) -> set[str]:
        """Every feature that is read."""
        numbers = {part.feature for part in self.action + self.state}
        return {*numbers, *self.images.values(), *self.instruction}


class Fault(UserError):
    """An episode that cannot be used. `kind` is what faults of its sort are counted under."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class RawEpisode:
    """One episode as its file has it.

    Attributes:
        id: names it for ever.
        columns: feature -> [T, ...] numbers, T encoded pictures, or T texts.
    """

    id: str
    columns: Mapping[str, Any]


def assemble(raw: RawEpisode, layout: Layout) -> StoredEpisode:
    """The episode in SI units, pictures as they were stored.

    Raises:
        Fault: it has no step, no instruction, numbers that are not finite, a gripper outside its convention, ...
        UserError: the dataset lacks a feature that the layout names.
    """
    if absent := sorted(set(layout.images.values()) - set(raw.columns)):
        raise _no_feature(absent[0], raw)
    actions, state = _vector(raw, layout.action), _vector(raw, layout.state)
    kept = slice(layout.drop_first, None)
    images = {view: list(raw.columns[feature])[kept] for view, feature in layout.images.items()}
    actions, state = actions[kept], state[kept]
    if len(actions) == 0:
        raise Fault("no steps", f"episode {raw.id} has no steps")
    lengths = {"state": len(state), **{view: len(column) for view, column in images.items()}}
    for what, length in lengths.items():
        if length != len(actions):
            raise Fault("lengths", f"episode {raw.id} has {len(actions)} actions and {length} entries of {what}")
    for what, numbers in (("actions", actions), ("state", state)):
        if not np.isfinite(numbers).all():
            step = int(np.argmin(np.isfinite(numbers).all(axis=1)))
            raise Fault("not finite", f"episode {raw.id}: {what} of step {step} are not finite numbers")
    return StoredEpisode(images, state, actions, _instruction(raw, layout), {"episode_id": raw.id})


def picture_sizes(episode: StoredEpisode) -> dict[str, tuple[int, int]]:
    """(height, width) of each view, by its first picture. Raises Fault if that is no picture."""
    sizes = {}
    for view, column in episode.images.items():
        try:
            sizes[view] = tuple(decode_jpeg(column[0]).shape[:2])
        except UserError as error:
            raise Fault("damaged picture", f"episode {episode.metadata['episode_id']}: view {view}: {error}") from error
    return sizes


def _no_feature(feature: str, raw: RawEpisode) -> UserError:
    return UserError(f"the layout names the feature {feature!r}; the dataset has {', '.join(sorted(raw.columns))}")


def _instruction(raw: RawEpisode, layout: Layout) -> str:
    for feature in layout.instruction:
        for text in raw.columns.get(feature, ()):
            text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
            if text.strip():
                return text.strip()
    raise Fault("no instruction", f"episode {raw.id} has no instruction in {', '.join(layout.instruction)}")


def _vector(raw: RawEpisode, parts: tuple[Part, ...]) -> Float[np.ndarray, "T D"]:
    stretches = []
    for part in parts:
        if part.feature not in raw.columns:
            raise _no_feature(part.feature, raw)
        numbers = np.asarray(raw.columns[part.feature], np.float64)
        if numbers.size == 0:
            raise Fault("no steps", f"episode {raw.id} has no steps")
        numbers = numbers.reshape(len(numbers), -1)
        columns = part.columns or range(len(part.names))
        if (not part.columns and numbers.shape[1] != len(part.names)) or max(columns) >= numbers.shape[1]:
            raise UserError(f"{part.feature} has {numbers.shape[1]} numbers: they do not fit {', '.join(part.names)}")
        numbers = numbers[:, list(columns)] * UNITS[part.unit][1]
        if part.gripper:
            numbers = _opening(numbers[:, 0], part, raw)[:, None]
        stretches.append(numbers)
    return np.concatenate(stretches, axis=1).astype(np.float32)


def _opening(values: Float[np.ndarray, "T"], part: Part, raw: RawEpisode) -> Float[np.ndarray, "T"]:
    low, high, opening = GRIPPERS[part.gripper]
    slack = 0.25 * (high - low)  # sensors overshoot; another convention is further off
    if np.isfinite(values).all() and not (values.min() >= low - slack and values.max() <= high + slack):
        raise Fault(
            "gripper convention",
            f"episode {raw.id}: {part.feature} goes from {values.min():.3g} to {values.max():.3g}, which is not the "
            f"convention {part.gripper!r}: correct the layout",
        )
    return opening(values)


def _held(values: Float[np.ndarray, "T"]) -> Float[np.ndarray, "T"]:
    """Opening from commands that close (+1), open (-1) or leave the gripper (0).

    As for RT-1 data elsewhere (octo `rel2abs_gripper_actions`): commands weaker than 0.1 leave it as it was, and before
    the first command it was the opposite of that command; it is open where there is none.
    """
    command = np.where(values < -0.1, 1.0, np.where(values > 0.1, 0.0, np.nan))
    given = np.flatnonzero(~np.isnan(command))
    first = 1.0 - command[given[0]] if len(given) else 1.0
    last = np.maximum.accumulate(np.where(np.isnan(command), -1, np.arange(len(command))))
    return np.where(last < 0, first, command[np.maximum(last, 0)])


# name -> (least value, largest value, opening that is 1 when open and 0 when closed)
GRIPPERS: dict[str, tuple[float, float, Callable[[np.ndarray], np.ndarray]]] = {
    "1 open, 0 closed": (0, 1, lambda x: np.clip(x, 0, 1)),
    "0 open, 1 closed": (0, 1, lambda x: 1 - np.clip(x, 0, 1)),
    "1 open, -1 closed": (-1, 1, lambda x: (np.clip(x, -1, 1) + 1) / 2),
    "-1 open, 1 closed": (-1, 1, lambda x: (1 - np.clip(x, -1, 1)) / 2),
    "-1 opens, 1 closes, 0 holds": (-1, 1, _held),
}


EpisodeFunction = Callable[[Path], Iterator[Mapping[str, Any]]]


def load_robot(path: str | Path) -> tuple[Layout, EpisodeFunction | None]:
    """The LAYOUT of a Python file of the user's, and its `episodes` function where it has one.

    Raises:
        UserError: no such file, it fails, or it defines no LAYOUT.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}: write one that defines LAYOUT (docs/add_your_robot.md)")
    module = _run(path)
    if not isinstance(layout := getattr(module, "LAYOUT", None), Layout):
        raise UserError(f"{path} must define LAYOUT, a vla_jax.data.layouts.Layout (docs/add_your_robot.md)")
    return layout, getattr(module, "episodes", None)


def _run(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"robot_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:  # whatever a user's file raises is to be read as its mistake
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    return module
