"""RLDS datasets, written and read without TensorFlow.

One record is one episode in the layout of RLDS (Ramos et al., arXiv 2111.02767) as the Open X-Embodiment collection
uses it: nested `steps` with observation, action, reward, discount, is_first, is_last, is_terminal and
language_instruction, and `episode_metadata`. Records lie in ArrayRecord shards, images as JPEG.
`tfds.builder_from_directory` opens the result; the dataset's `metadata.json` also holds its Interface and facts such as
the true H(instruction | image).
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf import json_format, message
from jaxtyping import Float
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tensorflow_datasets.proto import tf_example_pb2

import vla_jax
from vla_jax.data.episode import Episode, StoredEpisode, encode_jpeg, validate
from vla_jax.data.interface import Interface, interface_from_json
from vla_jax.errors import UserError

VERSION = "1.0.0"
SPLIT = "train"
EPISODES_PER_WRITE = 16  # tfds writes all of its metadata anew each time, which costs more than an episode


def dataset_path(directory: str | Path, name: str) -> Path:
    """Where `write_rlds` puts the dataset `name` of `directory`."""
    return Path(directory) / name / VERSION


def write_rlds(
    directory: str | Path,
    name: str,
    episodes: Iterable[Episode],
    interface: Interface,
    facts: Mapping[str, Any],
    *,
    episodes_per_shard: int = 256,
) -> Path:
    """Writes episodes, one at a time, as the RLDS dataset `directory/name/1.0.0`, and returns that path.

    The dataset appears under its name only when it is complete; until then it lies in `1.0.0.incomplete` beside it,
    which an exception removes and the next call replaces.

    Args:
        directory: parent of all datasets of a collection.
        name: the dataset's name, a Python identifier in lower case.
        episodes: consumed once; nothing of an episode is kept after it is written.
        interface: names, units and sizes of the arrays; every episode must fit it.
        facts: JSON-able facts about the dataset as a whole (task, coupling, rho, ...), read after the last episode.
        episodes_per_shard: records a file.

    Raises:
        UserError: the dataset exists, an episode is faulty, there is none, or the disk is full.
    """
    target = dataset_path(directory, name)
    refuse_existing(target)
    draft = target.with_name(f"{VERSION}.incomplete")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with full_disk_as_user_error(draft, "nothing was kept"):
            draft.mkdir(parents=True)
            _write_shards(draft, name, episodes, interface, facts, episodes_per_shard)
            draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return target


def refuse_existing(target: Path) -> None:
    """Raises UserError if `target` exists, so that nothing is ever overwritten."""
    if target.exists():
        raise UserError(f"{target} already exists: choose another directory or name, or delete it first")


@contextlib.contextmanager
def full_disk_as_user_error(path: Path, kept: str) -> Iterator[None]:
    """Raises UserError where the operating system refuses to write `path`. kept: says what is left there."""
    message = f"no space left while writing {path}: {kept}; free some space or choose another directory"
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(message) from error
        if isinstance(error, PermissionError):
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        raise
    except RuntimeError as error:  # ArrayRecord reports the operating system's errors as text
        if "No space left" in str(error) or "File too large" in str(error) or "quota" in str(error):
            raise UserError(message) from error
        raise


def _write_shards(draft, name, episodes, interface, facts, episodes_per_shard):
    writer, info, lengths, waiting, digest = None, None, [], [], hashlib.sha256()
    for index, episode in enumerate(episodes):
        validate(episode, index, interface)
        kinds = {key: type(value) for key, value in episode.metadata.items()}
        if writer is None:
            first_kinds = kinds
            features = _features(interface, kinds, index)
            identity = DatasetIdentity(
                name=name, version=tfds.core.Version(VERSION), data_dir=str(draft), module_name="vla_jax.data.rlds"
            )
            info = tfds.core.DatasetInfo(
                builder=identity,
                features=features,
                description="Demonstrations of language-conditioned manipulation, one episode a record.",
                metadata=tfds.core.MetadataDict(),
                disable_shuffling=True,
            )
            writer = tfds.core.SequentialWriter(info, episodes_per_shard, file_format="array_record")
            writer.initialize_splits([SPLIT])
        if kinds != first_kinds:
            raise UserError(f"episode {index}: its metadata have other keys or types than those of episode 0")
        record = _record(episode, index)
        _update_digest(digest, record)
        lengths.append(len(episode.actions))
        waiting.append(record)
        if len(waiting) == EPISODES_PER_WRITE:
            writer.add_examples({SPLIT: waiting})
            waiting = []
    if writer is None:
        raise UserError("there is no episode to write: the collection found no successful demonstration")
    writer.add_examples({SPLIT: waiting})
    info.metadata.update(
        interface=dataclasses.asdict(interface),
        facts=dict(facts),
        episode_lengths=lengths,
        digest=digest.hexdigest(),
        writer=f"vla_jax {vla_jax.__version__}",
    )
    writer.close_all()


def _features(interface: Interface, kinds: Mapping[str, type], index: int) -> tfds.features.FeaturesDict:
    features = tfds.features
    stored_as = {bool: np.bool_, int: np.int64, float: np.float32, str: features.Text()}
    for name, kind in kinds.items():
        if kind not in stored_as:
            raise UserError(
                f"episode {index}: its metadata {name!r} is a {kind.__name__}, not an int, float, bool or str"
            )
    images = {
        f"image_{view}": features.Image(shape=(*size, 3), encoding_format="jpeg")
        for view, size in interface.images.items()
    }
    state = features.Tensor(shape=(len(interface.state_names),), dtype=np.float32)
    steps = {
        "observation": {**images, "state": state},
        "action": features.Tensor(shape=(len(interface.action_names),), dtype=np.float32),
        "reward": np.float32,
        "discount": np.float32,
        "is_first": np.bool_,
        "is_last": np.bool_,
        "is_terminal": np.bool_,
        "language_instruction": features.Text(),
    }
    about = {"episode_id": np.int64, "success": np.bool_, **{name: stored_as[kind] for name, kind in kinds.items()}}
    return features.FeaturesDict({"steps": features.Dataset(steps), "episode_metadata": about})


def _record(episode: Episode, index: int) -> dict[str, Any]:
    last = len(episode.actions) - 1
    steps = []
    for step in range(last + 1):
        observation = {f"image_{view}": encode_jpeg(column[step]) for view, column in episode.images.items()}
        observation["state"] = np.asarray(episode.state[step], np.float32)
        terminal = step == last and bool(episode.success)
        steps.append(
            {
                "observation": observation,
                "action": np.asarray(episode.actions[step], np.float32),
                "reward": float(terminal),
                "discount": float(not terminal),
                "is_first": step == 0,
                "is_last": step == last,
                "is_terminal": terminal,
                "language_instruction": episode.instruction,
            }
        )
    about = {"episode_id": index, "success": bool(episode.success), **episode.metadata}
    return {"steps": steps, "episode_metadata": about}


def _update_digest(digest, record: dict[str, Any]) -> None:
    for step in record["steps"]:
        observation = step["observation"]
        for view in sorted(observation):
            value = observation[view]
            digest.update(value if isinstance(value, bytes) else value.tobytes())
        digest.update(step["action"].tobytes())
    digest.update(record["steps"][0]["language_instruction"].encode())
    digest.update(json.dumps(record["episode_metadata"], sort_keys=True).encode())


class RldsDataset:
    """A `data.dataset.Dataset` that `write_rlds` wrote: it holds paths, not data."""

    def __init__(self, directory, name, interface, facts, lengths, fingerprint, shards):
        self.directory = directory
        self.name = name
        self.interface = interface
        self.facts = facts
        self.lengths = lengths
        self.reads_steps = np.zeros(len(lengths), bool)  # a step costs its whole episode: keep those
        self.episode_names = tuple(f"{name}/{number}" for number in range(len(lengths)))
        self.fingerprint = fingerprint
        with _damage_as_user_error(directory):
            self._records = ArrayRecordDataSource(shards)
        if len(self._records) != len(lengths):
            raise UserError(f"{directory} holds {len(self._records)} episodes, not {len(lengths)}: copy it again")

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, index: int) -> StoredEpisode:
        """Reads one episode; its pictures stay JPEG. Raises UserError if it is damaged or lacks an instruction."""
        with _damage_as_user_error(self.directory):
            features = tf_example_pb2.Example.FromString(self._records[index]).features.feature

        def rows(key, width):
            return np.array(features[key].float_list.value, np.float32).reshape(-1, width)

        instruction = features["steps/language_instruction"].bytes_list.value[0].decode()
        if not instruction.strip():
            raise UserError(f"episode {index} of {self.directory} has no instruction: remove it or write one")
        actions = rows("steps/action", len(self.interface.action_names))
        if not np.isfinite(actions).all():
            raise UserError(f"episode {index} of {self.directory} holds actions that are not finite numbers: remove it")
        return StoredEpisode(
            {
                view: list(features[f"steps/observation/image_{view}"].bytes_list.value)
                for view in self.interface.images
            },
            rows("steps/observation/state", len(self.interface.state_names)),
            actions,
            instruction,
            _episode_metadata(features),
        )

    def numbers(self) -> Iterator[tuple[Float[np.ndarray, "T A"], Float[np.ndarray, "T S"]]]:
        """Actions and states, episode by episode; no picture is decoded."""
        for index in range(len(self)):
            episode = self.read(index)
            yield episode.actions, episode.state

    def close(self) -> None:
        """Closes the shards."""
        self._records.__exit__(None, None, None)


@contextlib.contextmanager
def _damage_as_user_error(directory: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, message.DecodeError) as error:  # both libraries report damage in no narrower way
        raise UserError(f"a shard of {directory} is damaged: copy or collect the dataset again ({error})") from error


def _episode_metadata(features) -> dict[str, Any]:
    prefix, found = "episode_metadata/", {}
    for key in features:
        if key.startswith(prefix):
            feature = features[key]
            value = getattr(feature, feature.WhichOneof("kind")).value[0]
            found[key.removeprefix(prefix)] = value.decode() if isinstance(value, bytes) else value
    return found


def open_rlds(directory: str | Path) -> RldsDataset:
    """Opens a dataset that `write_rlds` wrote.

    Raises:
        UserError: nothing there, another kind of dataset (the message names what it lacks), or shards are missing.
    """
    directory = Path(directory)
    if not (directory / "dataset_info.json").is_file():
        found = sorted(path.parent for path in directory.glob("*/dataset_info.json")) + sorted(
            path.parent for path in directory.glob("*/*/dataset_info.json")
        )
        found = [path for path in found if not path.name.endswith(".incomplete")]
        hint = f"did you mean {found[0]}?" if found else "run python -m experiments.collect, or correct the path"
        raise UserError(f"no dataset at {directory}: {hint}")
    try:
        builder = tfds.builder_from_directory(directory)
        features = set(_flat_keys(builder.info.features))
        metadata = dict(builder.info.metadata or {})
        shards = [Path(path) for path in builder.info.splits[SPLIT].filepaths]
    except (OSError, ValueError, KeyError, json_format.ParseError) as error:
        raise UserError(f"{directory} is not a readable RLDS dataset: {str(error).splitlines()[0]}") from error
    needed = ["steps/action", "steps/language_instruction", "steps/observation/state"]
    if missing := [key for key in needed if key not in features]:
        raise UserError(f"the dataset at {directory} has no feature {', '.join(missing)}: it cannot train a policy")
    if missing := [key for key in ("interface", "facts", "episode_lengths", "digest") if key not in metadata]:
        raise UserError(
            f"the dataset at {directory} does not say its {', '.join(missing)} in metadata.json: "
            "convert it with python -m experiments.convert, which records names and units"
        )
    if absent := [path.name for path in shards if not path.is_file()]:
        raise UserError(
            f"the dataset at {directory} lacks {len(absent)} of {len(shards)} shards ({absent[0]}): copy it again"
        )
    interface = Interface(**interface_from_json(metadata["interface"]))
    lengths = np.asarray(metadata["episode_lengths"], np.int32)
    identity = [builder.name, VERSION, lengths.tolist(), metadata["digest"], metadata["interface"], metadata["facts"]]
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    names = [str(path) for path in shards]
    return RldsDataset(directory, builder.name, interface, metadata["facts"], lengths, fingerprint, names)


def _flat_keys(features, prefix: str = "") -> Iterator[str]:
    if isinstance(features, tfds.features.Dataset):
        features = features.feature
    if isinstance(features, tfds.features.FeaturesDict):
        for name, child in features.items():
            yield from _flat_keys(child, f"{prefix}/{name}" if prefix else name)
    else:
        yield prefix
