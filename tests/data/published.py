"""Small datasets in the layouts that their publishers use, written without TensorFlow.

RLDS: the feature dictionaries are those of the sources that `vla_jax.data.registry` cites, pictures made smaller.
LeRobot: paths, columns and metadata of versions 2.1 and 3.0.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.splits import SplitInfo

from vla_jax.data.episode import encode_jpeg
from vla_jax.data.tfrecord import frame_record

F = tfds.features
EVERY_STEP = {"is_first": np.bool_, "is_last": np.bool_, "is_terminal": np.bool_}


def _vector(width: int, dtype=np.float32) -> F.Tensor:
    return F.Tensor(shape=(width,), dtype=dtype)


def _image(height: int, width: int) -> F.Image:
    return F.Image(shape=(height, width, 3), encoding_format="jpeg")


BRIDGE = {
    "steps": F.Dataset(
        {
            "observation": {**{f"image_{i}": _image(32, 32) for i in range(4)}, "state": _vector(7)},
            "action": _vector(7),
            **EVERY_STEP,
            "reward": np.float32,
            "discount": np.float32,
            "language_instruction": F.Text(),
            "language_embedding": _vector(512),
        }
    ),
    "episode_metadata": {
        "file_path": F.Text(),
        "episode_id": np.int32,
        **{f"has_image_{i}": np.bool_ for i in range(4)},
        "has_language": np.bool_,
    },
}

FRACTAL = {
    "steps": F.Dataset(
        {
            "observation": {
                "image": _image(32, 40),
                "natural_language_instruction": F.Text(),
                "natural_language_embedding": _vector(512),
                "base_pose_tool_reached": _vector(7),
                "gripper_closed": _vector(1),
                "gripper_closedness_commanded": _vector(1),
                "height_to_bottom": _vector(1),
                "orientation_box": F.Tensor(shape=(2, 3), dtype=np.float32),
                "workspace_bounds": F.Tensor(shape=(3, 3), dtype=np.float32),
            },
            "action": {
                "world_vector": _vector(3),
                "rotation_delta": _vector(3),
                "gripper_closedness_action": _vector(1),
                "terminate_episode": _vector(3, np.int32),
                "base_displacement_vector": _vector(2),
                "base_displacement_vertical_rotation": _vector(1),
            },
            **EVERY_STEP,
            "reward": np.float32,
        }
    ),
    "aspects": {"success": np.bool_, "has_aspects": np.bool_},
}

DROID = {
    "steps": F.Dataset(
        {
            "observation": {
                "gripper_position": _vector(1, np.float64),
                "cartesian_position": _vector(6, np.float64),
                "joint_position": _vector(7, np.float64),
                "wrist_image_left": _image(18, 32),
                "exterior_image_1_left": _image(18, 32),
                "exterior_image_2_left": _image(18, 32),
            },
            "action_dict": {
                "gripper_position": _vector(1, np.float64),
                "gripper_velocity": _vector(1, np.float64),
                "cartesian_position": _vector(6, np.float64),
                "cartesian_velocity": _vector(6, np.float64),
                "joint_position": _vector(7, np.float64),
                "joint_velocity": _vector(7, np.float64),
            },
            "action": _vector(7, np.float64),
            **EVERY_STEP,
            "reward": np.float32,
            "discount": np.float32,
            "language_instruction": F.Text(),
            "language_instruction_2": F.Text(),
            "language_instruction_3": F.Text(),
        }
    ),
    "episode_metadata": {"recording_folderpath": F.Text(), "file_path": F.Text()},
}

BRIDGE_OXE = {
    "steps": F.Dataset(
        {
            "observation": {
                "image": _image(48, 64),
                "natural_language_instruction": F.Text(),
                "natural_language_embedding": _vector(512),
                "state": _vector(7),
            },
            "action": {
                "world_vector": _vector(3),
                "rotation_delta": _vector(3),
                "open_gripper": np.bool_,
                "terminate_episode": np.float32,
            },
            **EVERY_STEP,
            "reward": np.float32,
        }
    ),
}

PUBLISHED = {
    "bridge": ("bridge_dataset", "1.0.0", BRIDGE),
    "bridge_oxe": ("bridge", "0.1.0", BRIDGE_OXE),
    "fractal": ("fractal20220817_data", "0.1.0", FRACTAL),
    "droid": ("droid", "1.0.0", DROID),
}


def picture(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A smooth random picture."""
    coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def example(kind: str, number: int, length: int, text: str) -> dict:
    """One episode of `length` steps with random numbers in every feature of the layout."""
    random = np.random.default_rng(number)
    spec = F.FeaturesDict(PUBLISHED[kind][2])

    def fill(feature, name):
        if isinstance(feature, F.FeaturesDict):
            return {key: fill(child, key) for key, child in feature.items()}
        if isinstance(feature, F.Image):
            return encode_jpeg(picture(random, *feature.shape[:2]))
        if isinstance(feature, F.Text):
            return text if "language" in name else f"{name}/{number}"
        if feature.np_dtype == np.bool_:
            return bool(random.integers(2))
        if np.issubdtype(feature.np_dtype, np.integer):
            return np.full(feature.shape, number, feature.np_dtype)
        return random.uniform(0, 1, feature.shape).astype(feature.np_dtype)

    values = {key: fill(child, key) for key, child in spec.items() if key != "steps"}
    steps = []
    for step in range(length):
        filled = fill(spec["steps"].feature, "")
        filled |= {"is_first": step == 0, "is_last": step == length - 1, "is_terminal": step == length - 1}
        steps.append(filled)
    return {"steps": steps, **values}


def write_tfrecord_rlds(
    directory: Path, name: str, version: str, spec: dict, shards: Iterable[list[dict]], split: str = "train"
) -> Path:
    """Writes one TFRecord file a shard, dataset_info.json and features.json, as tfds does; returns the path."""
    path = Path(directory) / name / version
    path.mkdir(parents=True)
    features = F.FeaturesDict(spec)
    serializer = ExampleSerializer(features.get_serialized_info())
    identity = DatasetIdentity(
        name=name, version=tfds.core.Version(version), data_dir=str(path), module_name="tests.data.published"
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features, description="A small copy of a layout.")
    info.set_file_format("tfrecord")
    shards, total = list(shards), 0
    for number, examples in enumerate(shards):
        file = path / f"{name}-{split}.tfrecord-{number:05d}-of-{len(shards):05d}"
        records = [serializer.serialize_example(features.encode_example(one)) for one in examples]
        file.write_bytes(b"".join(map(frame_record, records)))
        total += file.stat().st_size
    template = tfds.core.ShardedFileTemplate(data_dir=path, dataset_name=name, split=split, filetype_suffix="tfrecord")
    splits = [SplitInfo(split, [len(one) for one in shards], total, template)]
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(path)
    return path


def write_published(directory: Path, kind: str, lengths: list[list[int]], text: str = "put the cup away") -> Path:
    """A dataset in the published layout `kind`: one list of episode lengths a shard."""
    name, version, spec = PUBLISHED[kind]
    numbers = iter(range(1000))
    shards = [[example(kind, next(numbers), length, text) for length in shard] for shard in lengths]
    return write_tfrecord_rlds(directory, name, version, spec, shards)


LEROBOT_JOINTS = ("shoulder_pan", "shoulder_lift", "elbow", "wrist_flex", "wrist_roll", "gripper")
LEROBOT_RATE = 30
CAMERAS = ("observation.images.top", "observation.images.wrist")
LEROBOT_SIZE = (32, 48)


def lerobot_episode(number: int, length: int) -> dict:
    """Columns of one episode: joints in degrees, gripper in per cent, and the frames of two cameras."""
    random = np.random.default_rng(number)
    joints = random.uniform(-90, 90, (length, 6)).astype(np.float32)
    joints[:, 5] = random.uniform(0, 100, length)
    hue = (number * 40) % 256
    frames = {  # plain colours that change from step to step: a wrong frame cannot hide behind compression
        name: np.stack(
            [np.full((*LEROBOT_SIZE, 3), (hue, (20 * step) % 256, 90 * k + 30), np.uint8) for step in range(length)]
        )
        for k, name in enumerate(CAMERAS)
    }
    return {"state": joints, "action": joints + 1, "frames": frames, "task": f"fold towel number {number % 2}"}


def write_video(path: Path, frames: np.ndarray) -> None:
    """An h264 mp4 with a key frame every second frame, as LeRobot writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as video:
        stream = video.add_stream("libx264", rate=LEROBOT_RATE, options={"crf": "12", "g": "2"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        video.mux(stream.encode())


def _table(episode: dict, number: int, first: int, tasks: list[str]) -> pa.Table:
    length = len(episode["state"])
    return pa.table(
        {
            "observation.state": pa.FixedSizeListArray.from_arrays(pa.array(episode["state"].reshape(-1)), 6),
            "action": pa.array([row.tolist() for row in episode["action"]], pa.list_(pa.float32())),
            "timestamp": pa.array(np.arange(length, dtype=np.float32) / LEROBOT_RATE),
            "frame_index": pa.array(np.arange(length)),
            "episode_index": pa.array(np.full(length, number)),
            "index": pa.array(np.arange(first, first + length)),
            "task_index": pa.array(np.full(length, tasks.index(episode["task"]))),
        }
    )


def _info(version: str, episodes: list[dict], data_path: str, video_path: str) -> dict:
    vector = {"dtype": "float32", "shape": [6], "names": list(LEROBOT_JOINTS)}
    scalars = ("timestamp", "frame_index", "episode_index", "index", "task_index")
    video = {"dtype": "video", "shape": [*LEROBOT_SIZE, 3], "names": ["height", "width", "channels"]}
    return {
        "codebase_version": version,
        "robot_type": "so101",
        "total_episodes": len(episodes),
        "fps": LEROBOT_RATE,
        "chunks_size": 1000,
        "data_path": data_path,
        "video_path": video_path,
        "features": {
            "observation.state": vector,
            "action": vector,
            **{name: video for name in CAMERAS},
            **{name: {"dtype": "int64", "shape": [1], "names": None} for name in scalars},
        },
    }


def write_lerobot(directory: Path, version: str, episodes: list[dict]) -> Path:
    """A LeRobot directory of version "v2.1" or "v3.0" (two episodes a data file, all of them in one video a camera)."""
    meta = directory / "meta"
    meta.mkdir(parents=True)
    tasks = sorted({episode["task"] for episode in episodes})
    (_write_v21 if version == "v2.1" else _write_v30)(directory, episodes, tasks)
    return directory


def _write_v21(directory: Path, episodes: list[dict], tasks: list[str]) -> None:
    data = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    video = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    rows, first = [], 0
    for number, episode in enumerate(episodes):
        path = directory / data.format(episode_chunk=0, episode_index=number)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(_table(episode, number, first, tasks), path)
        for name, frames in episode["frames"].items():
            write_video(directory / video.format(episode_chunk=0, video_key=name, episode_index=number), frames)
        rows.append({"episode_index": number, "tasks": [episode["task"]], "length": len(episode["state"])})
        first += len(episode["state"])
    (directory / "meta/info.json").write_text(json.dumps(_info("v2.1", episodes, data, video)))
    (directory / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [json.dumps({"task_index": index, "task": task}) for index, task in enumerate(tasks)]
    (directory / "meta/tasks.jsonl").write_text("\n".join(lines))


def _write_v30(directory: Path, episodes: list[dict], tasks: list[str]) -> None:
    data = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    video = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    rows, first, tables = [], 0, {}
    for number, episode in enumerate(episodes):
        length = len(episode["state"])
        tables.setdefault(number // 2, []).append(_table(episode, number, first, tasks))
        row = {
            "episode_index": number,
            "tasks": [episode["task"]],
            "length": length,
            "data/chunk_index": 0,
            "data/file_index": number // 2,
            "dataset_from_index": first,
            "dataset_to_index": first + length,
            "stats/action/mean": [0.0] * 6,
        }
        for name in CAMERAS:
            begin = first / LEROBOT_RATE
            row |= {f"videos/{name}/chunk_index": 0, f"videos/{name}/file_index": 0}
            row |= {
                f"videos/{name}/from_timestamp": begin,
                f"videos/{name}/to_timestamp": begin + length / LEROBOT_RATE,
            }
        rows.append(row)
        first += length
    for index, parts in tables.items():
        path = directory / data.format(chunk_index=0, file_index=index)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(parts), path)
    for name in CAMERAS:
        frames = np.concatenate([episode["frames"][name] for episode in episodes])
        write_video(directory / video.format(video_key=name, chunk_index=0, file_index=0), frames)
    (directory / "meta/info.json").write_text(json.dumps(_info("v3.0", episodes, data, video)))
    path = directory / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    tasks_table = pa.table({"task_index": list(range(len(tasks))), "__index_level_0__": tasks})
    pq.write_table(tasks_table, directory / "meta/tasks.parquet")
