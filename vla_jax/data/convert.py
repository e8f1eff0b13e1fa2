"""Anybody's dataset, once, into the form that training reads (`data.steps`)."""

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from vla_jax.data import tokenizer as tokenizers
from vla_jax.data.episode import StoredEpisode
from vla_jax.data.interface import Interface
from vla_jax.data.layouts import UNITS, EpisodeFunction, Fault, Layout, assemble, picture_sizes
from vla_jax.data.registry import LAYOUTS, find_layout
from vla_jax.data.rlds import full_disk_as_user_error, refuse_existing
from vla_jax.data.sources import FunctionSource, RldsSource, Source
from vla_jax.data.steps import DESCRIPTION, FORMAT, PartWriter, StepDataset
from vla_jax.errors import UserError

Sizes = dict[str, tuple[int, int]]
MIB = 2**20
ORIGIN = "origin.json"  # in an unfinished conversion: what it is a conversion of


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """One conversion.

    Attributes:
        source: an RLDS version directory, a LeRobot directory, or a folder that the layout file's `episodes` reads.
        layout: a name of `data.registry.LAYOUTS`, or a Python file that defines LAYOUT.
        name: of the dataset that is written; the source's own where empty.
        split: of an RLDS dataset.
        faulty: whether an episode that cannot be used stops the conversion, or is left out and counted.
        max_episodes: stop after so many of the source; 0 takes all.
        part_mb: pictures in a part, in MiB. An interruption costs at most one part; each part is three open files.
    """

    source: str
    layout: str
    name: str = ""
    split: str = "train"
    faulty: Literal["error", "skip"] = "error"
    max_episodes: int = 0
    part_mb: int = 1024

    def __post_init__(self):
        if self.part_mb < 1 or self.max_episodes < 0:
            raise UserError("part_mb must be at least 1, and max_episodes not negative")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion left: the dataset, and how many episodes of each kind were not taken."""

    dataset: StepDataset
    skipped: dict[str, int]

    def summary(self) -> str:
        """A few lines of text."""
        dataset = self.dataset
        pictures = ", ".join(f"{view} {height}x{width}" for view, (height, width) in dataset.interface.images.items())
        lines = [f"{len(dataset)} episodes, {dataset.lengths.sum()} steps, {pictures}"]
        lines += [f"left out: {count} episodes ({kind})" for kind, count in sorted(self.skipped.items())]
        return "\n".join([*lines, str(dataset.directory)])


def convert(config: ConvertConfig, directory: str | Path) -> Conversion:
    """Converts a dataset to `directory/name`, and goes on where an interrupted conversion of the same source stopped.

    Until it is complete it lies in `name.incomplete` beside that.

    Raises:
        UserError: the target exists, the source cannot be read, an episode is faulty (with `faulty="error"`), what was
            begun there is a conversion of something else, or the disk is full. Whole parts are kept.
    """
    layout, function = find_layout(config.layout)
    code = Path(config.layout).read_bytes() if config.layout.endswith(".py") else b""  # `episodes` may have changed
    source = open_source(config, layout, function)
    target = Path(directory) / (config.name or source.name)
    refuse_existing(target)
    draft = target.with_name(f"{target.name}.incomplete")
    origin = {
        "source": source.identity,
        "layout": hashlib.sha256(repr(layout).encode() + code).hexdigest(),
        "settings": [config.split, config.faulty, config.max_episodes, config.part_mb],
    }
    with full_disk_as_user_error(draft, "what was complete is kept"):
        _begin(draft, origin)
        skipped = _write_parts(draft, source, layout, config)
        _describe(draft, target.name, layout, config, skipped)
        draft.rename(target)
        (target / ORIGIN).unlink()  # not before: without it, what lies in the draft is thrown away
    return Conversion(StepDataset(target), skipped)


def open_source(config: ConvertConfig, layout: Layout, function: EpisodeFunction | None) -> Source:
    """The reader that fits the directory.

    Raises:
        UserError: nothing there that one of them reads.
    """
    directory = Path(config.source)
    if not directory.is_dir():
        raise UserError(f"no directory {directory}: correct --config.source")
    if function is not None:
        return FunctionSource(directory.name, directory, function)
    if (directory / "meta/info.json").is_file():
        return _lerobot(directory, layout)
    if (directory / "dataset_info.json").is_file():
        return RldsSource(directory, layout, config.split)
    found = [path.parent for path in sorted(directory.glob("*/dataset_info.json"))]
    hint = f"did you mean {found[0]}?" if found else "expected dataset_info.json (RLDS) or meta/info.json (LeRobot)"
    raise UserError(f"no dataset at {directory}: {hint}")


def _lerobot(directory: Path, layout: Layout) -> Source:
    try:
        from vla_jax.data.lerobot import LerobotSource
    except ModuleNotFoundError as error:
        raise UserError(f"LeRobot data need {error.name}: install it by pip install 'vla_jax[lerobot]'") from error
    return LerobotSource(directory, layout)


def _begin(draft: Path, origin: dict[str, Any]) -> None:
    path = draft / ORIGIN
    if not path.is_file():
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        path.write_text(json.dumps(origin))
    elif json.loads(path.read_text()) != origin:
        raise UserError(
            f"{draft} was begun from another source or layout, or with other settings: delete it, or use another name"
        )


def _parts(draft: Path) -> list[dict[str, Any]]:
    paths = sorted(path for path in draft.glob("part-*") if path.suffix != ".draft")
    return [{"name": path.name, **json.loads((path / "episodes.json").read_text())} for path in paths]


def _write_parts(draft: Path, source: Source, layout: Layout, config: ConvertConfig) -> dict[str, int]:
    """Writes what is missing; returns how many episodes were left out, in all parts."""
    done = _parts(draft)
    start = done[-1]["stop"] if done else 0
    total = min(filter(None, (source.count, config.max_episodes)), default=None)
    sizes = {view: tuple(size) for view, size in done[0]["sizes"].items()} if done else None
    episodes = itertools.islice(source.episodes(start), config.max_episodes - start if config.max_episodes else None)
    part, number = PartWriter(draft / f"part-{len(done):05d}"), start
    try:
        for raw in tqdm(episodes, "episodes", total, initial=start, disable=None):
            number += 1
            try:
                episode = _usable(raw, layout)
                sizes = sizes or picture_sizes(episode)
                _check_sizes(episode, sizes)
                part.add(episode)
            except Fault as fault:
                if config.faulty == "error":
                    raise UserError(
                        f"{fault}. --config.faulty=skip leaves such episodes out and counts them"
                    ) from fault
                part.skip(fault.kind)
            if part.nbytes >= config.part_mb * MIB:
                part.close(number, sizes)
                done.append({"skipped": part.skipped})
                part = PartWriter(draft / f"part-{len(done):05d}")
        left_out = [entry["skipped"] for entry in done] + [part.skipped]
        if len(part):
            part.close(number, sizes)
    finally:
        part.abandon()
    return {kind: sum(one.get(kind, 0) for one in left_out) for kind in sorted({k for one in left_out for k in one})}


def _usable(raw: Any, layout: Layout) -> StoredEpisode:
    if isinstance(raw, Fault):
        raise raw
    return assemble(raw, layout)


def _check_sizes(episode: StoredEpisode, sizes: Sizes) -> None:
    if (found := picture_sizes(episode)) != sizes:
        raise Fault("picture size", f"episode {episode.metadata['episode_id']} has pictures {found}, others {sizes}")


def _describe(draft: Path, name: str, layout: Layout, config: ConvertConfig, skipped: dict[str, int]) -> None:
    """Writes dataset.json, which makes a dataset of the parts."""
    parts = _parts(draft)
    if not parts:
        listed = ", ".join(f"{count} with {kind}" for kind, count in skipped.items())
        raise UserError(f"no episode of {config.source} can be used: {listed or 'there is none'}")
    instructions = {row["instruction"] for part in parts for row in part["episodes"]}
    interface = interface_of(layout, parts[0]["sizes"], instructions)
    label = config.layout if config.layout in LAYOUTS else Path(config.layout).stem
    facts = {"layout": label, "source": Path(config.source).name, "skipped": skipped}
    identity = [name, dataclasses.asdict(interface), facts, [part["digest"] for part in parts]]
    about = {
        "format": FORMAT,
        "name": name,
        "interface": dataclasses.asdict(interface),
        "facts": facts,
        "parts": [part["name"] for part in parts],
        "fingerprint": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
    }
    (draft / DESCRIPTION).write_text(json.dumps(about, indent=1))


def interface_of(layout: Layout, sizes: Sizes, instructions: Iterable[str]) -> Interface:
    """What the converted data mean. Its tokenizer knows the words of `instructions`, and the longest of them fits."""

    def flat(parts):
        names = tuple(name for part in parts for name in part.names)
        return names, tuple(UNITS[part.unit][0] for part in parts for _ in part.names)

    tokenizer = tokenizers.train_tokenizer(instructions)
    (action_names, action_units), (state_names, state_units) = flat(layout.action), flat(layout.state)
    return Interface(
        embodiment=layout.embodiment,
        control_hz=layout.control_hz,
        images={view: tuple(size) for view, size in sizes.items()},
        action_names=action_names,
        action_units=action_units,
        action_representation=layout.action_representation,
        state_names=state_names,
        state_units=state_units,
        max_tokens=max(len(encoding.ids) for encoding in tokenizer.encode_batch(sorted(instructions))),
        tokenizer=tokenizers.to_json(tokenizer),
    )
