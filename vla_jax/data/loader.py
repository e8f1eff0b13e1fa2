"""From disk to batches: Grain picks steps in a shuffled order, this module turns a list of steps into one batch.

The stream is a function of (dataset, seed, batch size, split) alone. Neither the number of threads, worker processes or
training processes, nor a resumption changes it: the position is the number of batches taken, and process p of P takes
rows p, p + P, ... of every global batch.

Axis legend: B batch, H height, W width, S state width, L tokens, C chunk length, A action width.
"""

import collections
import dataclasses
import hashlib
import threading
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Bool, Int

from vla_jax.data import tokenizer as tokenizers
from vla_jax.data.balance import drawn_by_weight, episode_weights
from vla_jax.data.contract import Contract, compute_contract
from vla_jax.data.dataset import Dataset, open_dataset
from vla_jax.data.episode import StoredEpisode, decode_into
from vla_jax.data.mixture import MixedDataset, describe_members, mixture_contract
from vla_jax.errors import UserError

SPLITS = ("train", "held_out")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data, in what batches.

    Attributes:
        directory: a dataset, the path that `experiments.convert` or `experiments.collect` prints.
        mixture: several of them instead, each with the weight by which its steps are drawn (see `data.mixture`).
        image_size: pixels of the square pictures that are made of those of the dataset; 0 leaves them as they are.
        batch_size: samples a training step, over all processes.
        chunk: C, actions a sample.
        seed: of the order.
        split: "train" or "held_out"; whole episodes belong to one of the two.
        held_out_fraction: share of episodes kept out of training, chosen by a hash of their names.
        threads: reading threads a process.
        workers: reading processes; 0 reads in threads of the training process, which is faster on few cores.
        prefetch: batches read ahead.
        balance: exponent of the weights with which episodes are drawn, 0 draws all alike (see `data.balance`).
        weights: the file that holds them, which `experiments.balance` writes.
        cache_mb: memory for episodes that were read before, in MiB, in each reading process; a converted dataset reads
            single steps and needs none.
    """

    directory: str = ""
    mixture: tuple[tuple[str, float], ...] = ()
    image_size: int = 0
    batch_size: int = 64
    chunk: int = 8
    seed: int = 0
    split: str = "train"
    held_out_fraction: float = 0.02
    threads: int = 2
    workers: int = 0
    prefetch: int = 4
    balance: float = 0.0
    weights: str = ""
    cache_mb: int = 512

    def __post_init__(self):
        for name in ("batch_size", "chunk", "threads", "prefetch"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("seed", "workers", "cache_mb", "image_size"):
            if getattr(self, name) < 0:
                raise UserError(f"data.{name} is {getattr(self, name)}: it must not be negative")
        if not 0 <= self.held_out_fraction < 1:
            raise UserError(f"data.held_out_fraction is {self.held_out_fraction}: it must be at least 0 and below 1")
        if self.mixture and (self.directory or self.balance):
            raise UserError("data.mixture takes the place of data.directory, and data.balance cannot be used with it")
        if any(weight <= 0 for _, weight in self.mixture):
            raise UserError(f"data.mixture is {self.mixture}: every weight must be above 0")
        if self.split not in SPLITS:
            raise UserError(f"data.split is {self.split!r}: choose one of {', '.join(SPLITS)}")


def split_episodes(dataset: Dataset, config: DataConfig) -> Int[np.ndarray, "N"]:
    """The numbers of the episodes that are in the split `config.split`."""
    held_out = held_out_episodes(dataset.episode_names, config.held_out_fraction)
    return np.flatnonzero(held_out if config.split == "held_out" else ~held_out)


def held_out_episodes(names: Sequence[str], fraction: float) -> Bool[np.ndarray, "E"]:
    """Which of the named episodes are held out; others that are added later change nothing here."""

    def place(name):
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64

    return np.array([place(name) < fraction for name in names], bool)


class EpisodeCache:
    """Episodes read before, least recently used first out, bounded by their bytes. Safe to use from several threads.

    Episodes whose steps can be read alone hold no pictures, so they are not kept.
    """

    def __init__(self, dataset: Dataset, max_bytes: int):
        self._dataset = dataset
        self._max_bytes = max_bytes
        self._episodes: collections.OrderedDict[int, tuple[StoredEpisode, int]] = collections.OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> StoredEpisode:
        if self._dataset.reads_steps[index]:
            return self._dataset.read(index)
        with self._lock:
            if index in self._episodes:
                self._episodes.move_to_end(index)
                return self._episodes[index][0]
        episode = self._dataset.read(index)  # without the lock: other threads go on meanwhile
        size = episode.nbytes
        with self._lock:
            if index not in self._episodes:
                self._episodes[index] = episode, size
                self._bytes += size
            while self._bytes > self._max_bytes:
                self._bytes -= self._episodes.popitem(last=False)[1][1]
        return episode

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._bytes


class BatchReader:
    """Turns step numbers into a batch. Step numbers count the steps of the chosen episodes in order."""

    def __init__(self, dataset: Dataset, contract: Contract, config: DataConfig, views: Sequence[str] | None = None):
        self.episodes = split_episodes(dataset, config)
        if len(self.episodes) == 0:
            raise UserError(
                f"none of the {len(dataset)} episodes of {dataset.directory} is in the split {config.split!r}: "
                "change data.held_out_fraction or collect more"
            )
        self._ends = np.cumsum(dataset.lengths[self.episodes])
        self._dataset = dataset
        self._contract = contract
        self._sizes = contract.images if views is None else {view: contract.images[view] for view in views}
        self._chunk = config.chunk
        self._max_bytes = config.cache_mb * 2**20
        self._start()

    def _start(self):
        self._read = EpisodeCache(self._dataset, self._max_bytes).__getitem__
        self._tokenizer = tokenizers.from_json(self._contract.tokenizer)
        self._tokens: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._cut = 0

    def __getstate__(self):
        transient = ("_read", "_tokenizer", "_tokens", "_cut")
        return {name: value for name, value in self.__dict__.items() if name not in transient}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._start()

    def __len__(self) -> int:
        """Number of steps."""
        return int(self._ends[-1])

    def __call__(self, steps: Int[np.ndarray, "B"]) -> dict[str, Any]:
        """Reads one batch; the module's brief and `make_loader` tell its shapes."""
        contract, size = self._contract, len(steps)
        batch = {
            "images": {view: np.empty((size, *shape, 3), np.uint8) for view, shape in self._sizes.items()},
            "state": np.empty((size, len(contract.state_names)), np.float32),
            "tokens": np.empty((size, contract.max_tokens), np.int32),
            "token_mask": np.empty((size, contract.max_tokens), bool),
            "actions": np.empty((size, self._chunk, len(contract.action_names)), np.float32),
            "action_mask": np.empty((size, self._chunk, len(contract.action_names)), bool),
            "episode": np.empty(size, np.int32),
            "step": np.empty(size, np.int32),
        }
        for row, number in enumerate(steps):
            position = int(np.searchsorted(self._ends, number, side="right"))
            episode_id = int(self.episodes[position])
            step = int(number - (self._ends[position - 1] if position else 0))
            episode = self._read(episode_id)
            for view, pictures in batch["images"].items():
                self._read_picture(pictures[row], episode, view, episode_id, step)
            batch["state"][row] = episode.state[step]
            batch["tokens"][row], batch["token_mask"][row] = self._encode(episode.instruction)
            batch["actions"][row], inside = action_chunk(episode.actions, step, self._chunk)
            batch["action_mask"][row] = inside[:, None] & episode.dimensions
            batch["episode"][row], batch["step"][row] = episode_id, step
        return batch

    def _read_picture(self, place, episode, view, episode_id, step):
        try:
            decode_into(place, episode.images[view][step])
        except UserError as error:
            name = self._dataset.episode_names[episode_id]
            raise UserError(f"view {view} of step {step} of {name} in {self._dataset.directory}: {error}") from error

    def _encode(self, instruction):
        if instruction not in self._tokens:
            prompt = self._contract.prompt(instruction)
            tokens, mask = tokenizers.encode(self._tokenizer, [prompt], self._contract.max_tokens)
            self._tokens[instruction] = tokens[0], mask[0]
            if lost := tokenizers.cut_off(self._tokenizer, prompt):
                self._cut += 1
                print(f"cut off the last {lost} tokens of {prompt!r} (instruction number {self._cut} that is too long)")
        return self._tokens[instruction]


def action_chunk(actions, step: int, chunk: int):
    """The `chunk` actions from `step` on, and which of them exist; past the end the last action is repeated."""
    index = np.arange(step, step + chunk)
    last = len(actions) - 1
    return actions[np.minimum(index, last)], index <= last


class Loader(grain.DatasetIterator):
    """An endless stream of batches whose position can be saved and restored, also by Orbax.

    The position does not depend on threads, workers or the number of processes: all of them may change on resumption.
    """

    def __init__(self, batches: grain.MapDataset, config: DataConfig, stream: dict[str, Any]):
        super().__init__()
        self._batches = batches
        self._config = config
        self._stream = stream
        self._taken = 0
        self._iterator: grain.DatasetIterator | None = None

    def __next__(self) -> dict[str, Any]:
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        self._taken += 1
        return batch

    def _start(self):
        options = grain.ReadOptions(num_threads=self._config.threads, prefetch_buffer_size=self._config.prefetch)
        stream = self._batches[self._taken :].to_iter_dataset(options)
        if self._config.workers:
            if not flags.FLAGS.is_parsed():  # Grain's workers inherit absl's flags and refuse unparsed ones
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(self._config.workers, per_worker_buffer_size=self._config.prefetch)
            )
        return iter(stream)

    def get_state(self) -> dict[str, Any]:
        """The position, as a JSON-able dictionary."""
        return {"batches": self._taken, "stream": dict(self._stream)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position of `get_state`. Raises UserError if it belongs to another stream."""
        theirs = state["stream"]
        differing = [
            f"{name} was {theirs.get(name)}, is {value}"
            for name, value in self._stream.items()
            if theirs.get(name) != value
        ]
        if differing:
            raise UserError(f"cannot resume the data at the saved position: {'; '.join(differing)}")
        self.close()
        self._closed = False
        self._taken = int(state["batches"])

    def close(self) -> None:
        """Stops reading ahead."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
        super().close()


def make_loader(
    config: DataConfig,
    contract: Contract,
    process_index: int = 0,
    process_count: int = 1,
    views: Sequence[str] | None = None,
) -> Loader:
    """Batches of this process, shuffled anew every epoch, without end. views: which are read and decoded; None: all.

    A batch is a dictionary of NumPy arrays, B = batch_size / process_count:
        images: {view: uint8[B, H, W, 3]}, RGB
        state: float32[B, S], SI units
        tokens: int32[B, L]; token_mask: bool[B, L], True on tokens, which are left-aligned
        actions: float32[B, C, A], SI units
        action_mask: bool[B, C, A], False past the episode's end and in dimensions that the robot lacks
        episode, step: int32[B], where the sample comes from

    Raises:
        UserError: no such dataset, it does not fit the contract or lacks a view, the split is empty, or a batch cannot
            be divided.
    """
    if absent := [view for view in views or () if view not in contract.images]:
        raise UserError(
            f"the data have no view {absent[0]!r}: they have {', '.join(contract.images)}; set policy.views"
        )
    if config.batch_size % process_count:
        raise UserError(f"data.batch_size {config.batch_size} cannot be divided among {process_count} processes")
    dataset = open_data(config, contract)
    reader = BatchReader(dataset, contract, config, views)
    drawn_by = {}
    if config.balance and not config.weights:
        raise UserError("data.balance needs data.weights: the file that python -m experiments.balance writes")
    if config.balance:
        weights = episode_weights(config.weights, config.balance, dataset)[reader.episodes]
        drawn_by = {"weights": hashlib.sha256(weights.tobytes()).hexdigest()[:12]}
        steps = drawn_by_weight(np.repeat(weights, dataset.lengths[reader.episodes]), config.seed)
    elif isinstance(dataset, MixedDataset):
        member = np.searchsorted(dataset.first, reader.episodes, side="right") - 1
        lengths = np.bincount(member, dataset.lengths[reader.episodes], len(dataset.members)).astype(int)
        steps = dataset.step_numbers(lengths.tolist(), config.seed)
    else:
        steps = grain.MapDataset.range(len(reader)).seed(config.seed).shuffle().repeat()
    batches = steps.batch(config.batch_size, drop_remainder=True, batch_fn=np.array).map(
        lambda rows: reader(rows[process_index::process_count])
    )
    stream = {name: getattr(config, name) for name in ("batch_size", "seed", "split", "held_out_fraction", "balance")}
    return Loader(batches, config, {"dataset": dataset.fingerprint, **stream, **drawn_by})


def data_contract(config: DataConfig) -> Contract:
    """The contract of the configured data: reads every action and state once, decodes no picture.

    Raises:
        UserError: no data are configured, or there is none, or the datasets of a mixture do not go together.
    """
    if config.mixture:
        return mixture_contract([open_dataset(path) for path, _ in config.mixture], config.image_size)
    return compute_contract(open_dataset(_directory(config)), config.image_size)


def open_data(config: DataConfig, contract: Contract) -> Dataset:
    """The configured data, opened. Raises UserError where they do not fit the contract."""
    if config.mixture:
        paths, weights = zip(*config.mixture, strict=True)
        return MixedDataset([open_dataset(path) for path in paths], weights, contract)
    dataset = open_dataset(_directory(config))
    contract.check_interface(dataset.interface.resized(config.image_size), f"the dataset at {config.directory}")
    return dataset


def members(config: DataConfig) -> dict[str, DataConfig]:
    """Each dataset of a mixture alone, by its name; {} where there is no mixture.

    A dataset without an episode in `config.split` is left out; one that is called like another gets its place as well.
    """
    alone: dict[str, DataConfig] = {}
    for place, (path, _) in enumerate(config.mixture, 1):
        dataset = open_dataset(path)
        if len(split_episodes(dataset, config)):
            name = f"{dataset.name}_{place}" if dataset.name in alone else dataset.name
            alone[name] = dataclasses.replace(config, mixture=((path, 1.0),))
    return alone


def describe_data(config: DataConfig, contract: Contract, samples: int) -> str:
    """What a run of `samples` draws sees of each dataset, and which dimensions hardly ever move."""
    dataset = open_data(config, contract)
    members = dataset.members if isinstance(dataset, MixedDataset) else (dataset,)
    weights = [weight for _, weight in config.mixture] or [1.0]
    still = [name for robot in (contract.robots or {"": contract}).values() for name in robot.nearly_constant()]
    lines = [describe_members(members, weights, samples)]
    return "\n".join(lines + ([f"nearly constant: {', '.join(still)}"] if still else []))


def _directory(config: DataConfig) -> str:
    if not config.directory:
        raise UserError(
            "data.directory is not set: give the path that python -m experiments.collect or experiments.convert printed"
        )
    return config.directory
