"""Readers of datasets as their publishers ship them: a numbered row of episodes, each of them columns.

A source gives, in order and from any number on, a `RawEpisode` or, in the place of one that cannot be read, a `Fault`:
a damaged file costs the episodes in it and no others, and the numbers of all others stay.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf import json_format, message
from tensorflow_datasets.core.file_adapters import FileFormat
from tensorflow_datasets.proto import tf_example_pb2

from vla_jax.data.episode import encode_jpeg
from vla_jax.data.layouts import EpisodeFunction, Fault, Layout, RawEpisode
from vla_jax.data.tfrecord import DamagedRecord, read_records
from vla_jax.errors import UserError


class Source(Protocol):
    """A dataset of another library.

    Attributes:
        name: what it is called.
        count: episodes, where that is known beforehand.
        identity: hash of the names and sizes of its files, by which an interrupted conversion knows it again.
    """

    name: str
    count: int | None
    identity: str

    def episodes(self, start: int = 0) -> Iterator[RawEpisode | Fault]:
        """The episodes from number `start` on."""


def identity_of(files: list[Path], root: Path) -> str:
    """Hash of the names and sizes of files."""
    listed = [f"{path.relative_to(root)} {path.stat().st_size}" for path in sorted(files)]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()


class RldsSource:
    """An RLDS dataset in TFRecord or ArrayRecord shards, as Open X-Embodiment ships it; TensorFlow is not needed.

    Args:
        directory: the version's directory, which holds dataset_info.json.
        layout: names the features that are read.
        split: which split.

    Raises:
        UserError: no such dataset or split, or shards are missing. Whether it has the features of the layout is seen
            when an episode is put together (`data.layouts.assemble`).
    """

    def __init__(self, directory: str | Path, layout: Layout, split: str = "train"):
        directory = Path(directory)
        try:
            info = tfds.builder_from_directory(directory).info
        except (OSError, ValueError, KeyError, json_format.ParseError) as error:
            raise UserError(f"{directory} is not a readable RLDS dataset: {str(error).splitlines()[0]}") from error
        if split not in info.splits:
            raise UserError(f"{directory} has no split {split!r}: it has {', '.join(info.splits)}")
        self.name = info.name
        self._layout = layout
        self._shards = [Path(path) for path in info.splits[split].filepaths]
        self._lengths = list(info.splits[split].shard_lengths)
        self._split = split
        self._is_tfrecord = info.file_format != FileFormat.ARRAY_RECORD
        if absent := [path.name for path in self._shards if not path.is_file()]:
            raise UserError(
                f"{directory} lacks {len(absent)} of {len(self._shards)} shards ({absent[0]}): copy it again"
            )
        self.count = sum(self._lengths)
        self.identity = identity_of(self._shards, directory)

    def episodes(self, start: int = 0) -> Iterator[RawEpisode | Fault]:
        """See `Source.episodes`. What follows a damaged place of a TFRecord file is lost, record by record."""
        first = 0
        for path, length in zip(self._shards, self._lengths, strict=True):
            skipped = min(max(start - first, 0), length)
            if skipped < length:
                yield from self._shard(path, first, skipped, length)
            first += length

    def _shard(self, path: Path, first: int, skipped: int, length: int) -> Iterator[RawEpisode | Fault]:
        number = skipped
        try:
            for record in self._records(path, skipped):
                yield self._episode(record, first + number)
                number += 1
        except (DamagedRecord, RuntimeError, message.DecodeError) as error:
            damage = Fault("damaged shard", f"{error} (episode {self._split}/{first + number} and on in {path.name})")
        else:
            damage = Fault("damaged shard", f"{path} ends before episode {self._split}/{first + number}: copy it again")
        for _ in range(number, length):
            yield damage

    def _records(self, path: Path, start: int) -> Iterator[bytes]:
        if self._is_tfrecord:
            yield from read_records(path, start)
        else:
            with ArrayRecordDataSource([str(path)]) as records:
                for number in range(start, len(records)):
                    yield records[number]

    def _episode(self, record: bytes, number: int) -> RawEpisode | Fault:
        """One tf.train.Example: a feature of T steps is one flat list, and its width is the list's length over T."""
        features = tf_example_pb2.Example.FromString(record).features.feature
        steps = len(features["steps/is_first"].int64_list.value)
        columns, wanted = {}, self._layout.features()
        for key in features:
            name = key.removeprefix("steps/")
            if name in wanted and key != name:
                try:
                    columns[name] = _column(features[key], steps)
                except ValueError:
                    return Fault("lengths", f"episode {self._split}/{number}: {name} does not hold {steps} steps")
        found = [features[f"episode_metadata/{key}"] for key in self._layout.episode_id]
        names = [_text(feature) for feature in found if feature.WhichOneof("kind")]
        return RawEpisode("/".join(names) or f"{self._split}/{number}", columns)


def _text(feature) -> str:
    value = getattr(feature, feature.WhichOneof("kind")).value[0]
    return value.decode() if isinstance(value, bytes) else str(value)


def _column(feature, steps: int) -> Any:
    kind = feature.WhichOneof("kind")
    if kind is None:
        return []
    values = getattr(feature, kind).value
    if kind == "bytes_list":
        return list(values)
    return np.array(values).reshape(steps, -1) if steps else np.zeros((0, 1))


@dataclasses.dataclass
class FunctionSource:
    """A folder that a function of the user's reads: `episodes(directory)` yields one mapping of columns an episode.

    Pictures may be uint8[T, H, W, 3], which become JPEG, or encoded bytes; texts one `str` or one a step; "id" names
    the episode (its number where it is missing).
    """

    name: str
    directory: Path
    function: EpisodeFunction

    def __post_init__(self):
        self.count = None
        self.identity = identity_of([path for path in self.directory.rglob("*") if path.is_file()], self.directory)

    def episodes(self, start: int = 0) -> Iterator[RawEpisode | Fault]:
        """See `Source.episodes`; the function itself always begins at the first."""
        for number, columns in enumerate(self.function(self.directory)):
            if number >= start:
                yield _given(columns, number)


def _given(columns: Mapping[str, Any], number: int) -> RawEpisode:
    found = {}
    for name, column in columns.items():
        if isinstance(column, str):
            found[name] = [column]
        elif isinstance(column, np.ndarray) and column.dtype == np.uint8 and column.ndim == 4:
            found[name] = [encode_jpeg(picture) for picture in column]
        elif name != "id":
            found[name] = column
    return RawEpisode(str(columns.get("id", number)), found)
