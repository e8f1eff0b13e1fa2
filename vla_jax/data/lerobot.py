"""LeRobot datasets, versions 2.1 and 3.0, read with pyarrow and PyAV; the lerobot package is not needed.

Version 2.1 keeps one parquet file and, for each camera, one mp4 file an episode; version 3.0 packs many episodes into a
file and says in meta/episodes/ where each of them lies (huggingface/lerobot docs/source/lerobot-dataset-v3.mdx, and
`lerobot.datasets.utils` for the paths). `meta/info.json` has the templates of the paths, the rate and the features.

Numbers come from the parquet columns under their own names, the instruction as the column "task". Frames of a video
are decoded in order and become JPEG of quality 95, since an mp4 holds no pictures that could be kept as they are;
pictures that lie in the parquet file itself keep their bytes.
"""

import functools
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vla_jax.data.episode import encode_jpeg
from vla_jax.data.layouts import Fault, Layout, RawEpisode
from vla_jax.data.sources import identity_of
from vla_jax.errors import UserError

VERSIONS = ("v2.0", "v2.1", "v3.0")


class LerobotSource:
    """A LeRobot directory; see `data.sources.Source`.

    Args:
        directory: holds meta/, data/ and videos/.
        layout: names the columns that are read; `layout.control_hz` must be the dataset's rate.

    Raises:
        UserError: no such dataset, a version that is not known, another rate, or a column that is not there.
    """

    def __init__(self, directory: str | Path, layout: Layout):
        self._directory = Path(directory)
        self._info = _read_json(self._directory / "meta/info.json")
        version, rate = self._info.get("codebase_version"), self._info.get("fps")
        if version not in VERSIONS:
            raise UserError(f"{directory} is LeRobot version {version}: known are {', '.join(VERSIONS)}")
        if rate != layout.control_hz:
            raise UserError(
                f"{directory} runs at {rate} steps/s, its layout at {layout.control_hz}: correct control_hz"
            )
        self._features = self._info["features"]
        known = {*self._features, "task"}
        if absent := sorted(layout.features() - known):
            raise UserError(f"{directory} has no column {absent[0]!r}: it has {', '.join(sorted(known))}")
        self._packed = version == "v3.0"
        self._columns = sorted((layout.features() - {"task"}) | {"task_index", "episode_index"})
        self._videos = [name for name in self._columns if self._features.get(name, {}).get("dtype") == "video"]
        self._columns = [name for name in self._columns if name not in self._videos]
        self._tasks = self._read_tasks()
        self._episodes = self._read_episodes()
        self.name = self._directory.name
        self.count = len(self._episodes)
        files = [path for folder in ("meta", "data", "videos") for path in (self._directory / folder).rglob("*.*")]
        self.identity = identity_of(files, self._directory)

    def episodes(self, start: int = 0) -> Iterator[RawEpisode | Fault]:
        """See `data.sources.Source.episodes`. A file that cannot be read costs the episodes in it."""
        for row in self._episodes[start:]:
            try:
                yield self._read(row)
            except (OSError, pa.ArrowException, av.error.FFmpegError) as error:
                message = f"episode {row['episode_index']} of {self._directory}: {str(error).splitlines()[0]}"
                yield Fault("damaged file", f"{message}: copy it again")
            except Fault as fault:
                yield fault

    def _read(self, row: dict[str, Any]) -> RawEpisode:
        table = self._table(row)
        columns = {name: _values(table[name]) for name in self._columns}
        columns["task"] = [self._tasks.get(int(number), "") for number in columns["task_index"].reshape(-1)]
        for name in self._videos:
            columns[name] = self._frames(name, row, len(table))
        return RawEpisode(str(row["episode_index"]), columns)

    def _path(self, template: str, row: dict[str, Any], kind: str, **names: str) -> Path:
        number = row["episode_index"]
        if self._packed:
            places = {place: row[f"{kind}/{place}"] for place in ("chunk_index", "file_index")}
        else:
            places = {"episode_chunk": number // self._info["chunks_size"], "episode_index": number}
        return self._directory / self._info[template].format(**places, **names)

    def _table(self, row: dict[str, Any]) -> pa.Table:
        path = self._path("data_path", row, "data")
        if not path.is_file():
            raise Fault("missing file", f"{path} is missing: copy the dataset again")
        if not self._packed:
            return pq.read_table(path, columns=self._columns)
        table = _packed_table(path, tuple(self._columns))
        return table.filter(pc.equal(table["episode_index"], row["episode_index"]))

    def _frames(self, name: str, row: dict[str, Any], count: int) -> list[bytes]:
        path = self._path("video_path", row, f"videos/{name}", video_key=name)
        if not path.is_file():
            raise Fault("missing file", f"{path} is missing: copy the dataset again")
        begin = row[f"videos/{name}/from_timestamp"] if self._packed else 0.0
        frames = [encode_jpeg(frame) for frame in read_frames(path, begin, self._info["fps"], count)]
        if len(frames) < count:
            raise Fault("damaged video", f"{path} has {len(frames)} of the {count} frames of {row['episode_index']}")
        return frames

    def _read_tasks(self) -> dict[int, str]:
        if not self._packed:
            return {row["task_index"]: row["task"] for row in _read_lines(self._directory / "meta/tasks.jsonl")}
        table = _read_parquet(self._directory / "meta/tasks.parquet").to_pydict()
        texts = table.get("task", table.get("__index_level_0__"))  # pandas wrote the texts as its index
        return dict(zip(table["task_index"], texts, strict=True))

    def _read_episodes(self) -> list[dict[str, Any]]:
        if not self._packed:
            return _read_lines(self._directory / "meta/episodes.jsonl")
        files = sorted((self._directory / "meta/episodes").glob("*/*.parquet"))
        rows = [row for path in files for row in _read_parquet(path, _is_place).to_pylist()]
        return sorted(rows, key=lambda row: row["episode_index"])


def _is_place(column: str) -> bool:
    return column == "episode_index" or column.startswith(("data/", "videos/"))


def read_frames(path: Path, begin: float, rate: float, count: int) -> Iterator[np.ndarray]:
    """Up to `count` RGB frames of a video, from the one shown at `begin` seconds on.

    Raises:
        av.error.FFmpegError: it is no video, or it is damaged.
    """
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        stream.thread_type = "AUTO"
        unit = stream.time_base or Fraction(1, 90_000)
        earliest = begin - 0.5 / rate  # a time of the table and one of the file differ by their rounding
        if begin:
            video.seek(max(0, int(earliest / unit)), stream=stream)  # the key frame before it
        shown = 0
        for frame in video.decode(stream):
            if frame.time is not None and frame.time < earliest:
                continue
            yield frame.to_ndarray(format="rgb24")
            shown += 1
            if shown == count:
                return


@functools.lru_cache(maxsize=2)
def _packed_table(path: Path, columns: tuple[str, ...]) -> pa.Table:
    return pq.read_table(path, columns=list(columns))


def _values(column: pa.ChunkedArray) -> Any:
    """Numbers as an array [T, D]; texts as they are; pictures, which are {"bytes", "path"}, as encoded bytes."""
    if pa.types.is_struct(column.type):
        return [entry["bytes"] for entry in column.to_pylist()]
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return [text or "" for text in column.to_pylist()]
    values = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.float64())
    while pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).astype(np.float64).reshape(len(column), -1 if len(column) else 1)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"no LeRobot dataset: {path} is missing") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: copy the dataset again") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged: copy the dataset again") from error


def _read_parquet(path: Path, wanted=None) -> pa.Table:
    try:
        names = [name for name in pq.read_schema(path).names if wanted is None or wanted(name)]
        return pq.read_table(path, columns=names)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is missing or damaged: copy the dataset again") from error
