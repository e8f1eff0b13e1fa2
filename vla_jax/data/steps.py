"""The dataset that training reads: every step's pictures can be read alone, numbers without pictures.

RLDS and LeRobot files hold whole episodes, so that one random step costs a file of megabytes or a seek in a video;
shuffling them well needs a buffer of memory, and resuming one exactly needs its content. `experiments.convert` writes
a dataset once in this form, in which any step is one small read:

    dataset.json          interface, facts, parts, fingerprint
    part-00000/
        pictures.array_record     encoded pictures as they came, uncompressed, one a record: step * views + view
        actions.npy, state.npy    float32[T, A], float32[T, S] of all steps, in SI units
        episodes.json             id, length and instruction of each episode; what was left out; a digest

A part is written whole or not at all, so an interrupted conversion goes on behind its last whole part.
"""

import bisect
import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float

from vla_jax.data.episode import StoredEpisode
from vla_jax.data.interface import Interface, interface_from_json
from vla_jax.errors import UserError

FORMAT = "vla_jax steps 1"
DESCRIPTION = "dataset.json"
PICTURES = "pictures.array_record"
WRITER_OPTIONS = "group_size:1,uncompressed"  # one record a read; pictures are compressed already


def _allow_open_files() -> None:
    """A part is three open files, and a dataset of thousands of hours a thousand parts: takes all that the system gives
    without asking, where systems have such a limit."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _check_open_files(error: Exception) -> None:
    """Raises UserError where this is the system's limit and no damage."""
    if "Too many open files" in str(error):
        raise UserError(
            f"too many open files ({error}): raise the hard limit of `ulimit -n`, or convert with a larger part_mb"
        ) from error


class _Column(Sequence):
    """The encoded pictures of one view of an episode, read when they are asked for."""

    def __init__(self, records: ArrayRecordDataSource, first: int, length: int, stride: int):
        self._records, self._first, self._length, self._stride = records, first, length, stride

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, step: int) -> bytes:
        if not 0 <= step < self._length:
            raise IndexError(step)
        try:
            return self._records[self._first + step * self._stride]
        except RuntimeError as error:  # ArrayRecord reports damage in no narrower way
            _check_open_files(error)
            raise UserError(f"this part of the dataset is damaged, convert or copy it again ({error})") from error


class StepDataset:
    """A `data.dataset.Dataset` with random access to steps: it holds paths, not data.

    instructions: what was asked for in each episode.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        try:
            about = json.loads((self.directory / DESCRIPTION).read_text())
            if about["format"] != FORMAT:
                raise UserError(f"{directory} has the format {about['format']!r}, not {FORMAT!r}: convert it again")
            self.interface = Interface(**interface_from_json(about["interface"]))
            self.name, self.facts, self.fingerprint = about["name"], about["facts"], about["fingerprint"]
            self._parts = [self.directory / name for name in about["parts"]]
            episodes = [json.loads((part / "episodes.json").read_text())["episodes"] for part in self._parts]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{directory} is not a readable dataset ({error}): convert or copy it again") from error
        rows = [row for part in episodes for row in part]
        self.lengths = np.array([row["length"] for row in rows], np.int32)
        self.episode_names = tuple(f"{self.name}/{row['id']}" for row in rows)
        self.reads_steps = np.ones(len(rows), bool)
        self.instructions = tuple(row["instruction"] for row in rows)
        self._first = np.concatenate([[0], np.cumsum([len(part) for part in episodes])])  # episode of each part
        self._begin = np.concatenate(
            [np.concatenate([[0], np.cumsum([row["length"] for row in part])[:-1]]) for part in episodes]
        ).astype(np.int64)  # step of its part at which an episode begins
        self._open()

    def _open(self):
        _allow_open_files()
        try:
            self._records = [ArrayRecordDataSource([str(part / PICTURES)]) for part in self._parts]
            self._actions, self._states = (
                [np.asarray(np.load(part / name, mmap_mode="r")) for part in self._parts]  # plain views are cheaper
                for name in ("actions.npy", "state.npy")
            )
        except (OSError, ValueError, RuntimeError) as error:
            _check_open_files(error)
            raise UserError(f"a part of {self.directory} is damaged: convert or copy it again ({error})") from error
        for index, part in enumerate(self._parts):
            steps = int(self.lengths[self._first[index] : self._first[index + 1]].sum())
            found = {len(self._actions[index]), len(self._states[index])}
            if found != {steps} or len(self._records[index]) != steps * len(self.interface.images):
                raise UserError(f"{part} does not hold its {steps} steps: convert or copy it again")

    def __getstate__(self):
        transient = ("_records", "_actions", "_states")
        return {name: value for name, value in self.__dict__.items() if name not in transient}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, index: int) -> StoredEpisode:
        """One episode; its numbers and pictures are read from disk when they are used."""
        part = bisect.bisect_right(self._first, index) - 1
        begin, length, views = int(self._begin[index]), int(self.lengths[index]), tuple(self.interface.images)
        images = {
            view: _Column(self._records[part], begin * len(views) + number, length, len(views))
            for number, view in enumerate(views)
        }
        steps = slice(begin, begin + length)
        return StoredEpisode(
            images,
            self._states[part][steps],
            self._actions[part][steps],
            self.instructions[index],
            {"episode_id": self.episode_names[index].removeprefix(f"{self.name}/")},
        )

    def numbers(self) -> Iterator[tuple[Float[np.ndarray, "T A"], Float[np.ndarray, "T S"]]]:
        """Actions and states of all steps, part by part; no picture is read."""
        yield from zip(self._actions, self._states, strict=True)

    def close(self) -> None:
        """Closes the files."""
        for records in self._records:
            records.__exit__(None, None, None)


class PartWriter:
    """Writes one part under a draft's name, and gives it its own when all is there.

    Attributes:
        path: the part's directory.
        nbytes: of pictures so far.
        skipped: how many episodes of each kind of fault were left out.
    """

    def __init__(self, path: Path):
        self.path = path
        self.nbytes = 0
        self.skipped: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._actions: list[np.ndarray] = []
        self._states: list[np.ndarray] = []
        self._digest = hashlib.sha256()
        self._draft = self.path.with_name(self.path.name + ".draft")
        shutil.rmtree(self._draft, ignore_errors=True)  # of a conversion that was interrupted
        self._draft.mkdir()
        self._pictures = ArrayRecordWriter(str(self._draft / PICTURES), WRITER_OPTIONS)

    def add(self, episode: StoredEpisode) -> None:
        """Appends one episode."""
        for pictures in zip(*episode.images.values(), strict=True):
            for picture in pictures:
                self._pictures.write(picture)
                self._digest.update(picture)
                self.nbytes += len(picture)
        self._actions.append(np.asarray(episode.actions, np.float32))
        self._states.append(np.asarray(episode.state, np.float32))
        row = {
            "id": episode.metadata["episode_id"],
            "length": len(episode.actions),
            "instruction": episode.instruction,
        }
        self._episodes.append(row)
        for data in (self._actions[-1].tobytes(), self._states[-1].tobytes(), json.dumps(row).encode()):
            self._digest.update(data)

    def skip(self, kind: str) -> None:
        """Counts an episode that is left out."""
        self.skipped[kind] = self.skipped.get(kind, 0) + 1

    def __len__(self) -> int:
        return len(self._episodes)

    def close(self, stop: int, sizes: dict[str, tuple[int, int]]) -> None:
        """Writes the rest and gives the part its name.

        stop: the number of the source's next episode. sizes: (height, width) of each view.
        """
        self._pictures.close()
        np.save(self._draft / "actions.npy", np.concatenate(self._actions))
        np.save(self._draft / "state.npy", np.concatenate(self._states))
        about = {
            "stop": stop,
            "sizes": sizes,
            "skipped": self.skipped,
            "digest": self._digest.hexdigest(),
            "episodes": self._episodes,
        }
        (self._draft / "episodes.json").write_text(json.dumps(about))
        self._draft.rename(self.path)

    def abandon(self) -> None:
        """Removes what was written."""
        self._pictures.close()
        shutil.rmtree(self._draft, ignore_errors=True)
