"""What the loader needs to know of a dataset, and how one is opened, whatever wrote it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from vla_jax.data.episode import StoredEpisode
from vla_jax.data.interface import Interface
from vla_jax.data.rlds import open_rlds
from vla_jax.data.steps import DESCRIPTION, StepDataset


class Dataset(Protocol):
    """Episodes with random access, that can be sent to another process.

    Attributes:
        directory, name: where it lies and what it is called.
        interface: names, units and sizes of its arrays.
        facts: what is known about the dataset as a whole.
        lengths: int32, steps of each episode.
        episode_names: what each episode is called for ever, wherever the dataset lies.
        fingerprint: hash of the content; equal for equal content, wherever it lies.
        reads_steps: of each episode, whether a step of it can be read without the whole.
    """

    directory: Path
    name: str
    interface: Interface
    facts: dict[str, Any]
    lengths: Int[np.ndarray, "E"]
    episode_names: tuple[str, ...]
    fingerprint: str
    reads_steps: Bool[np.ndarray, "E"]

    def __len__(self) -> int: ...

    def read(self, index: int) -> StoredEpisode:
        """One episode, its pictures encoded."""

    def numbers(self) -> Iterator[tuple[Float[np.ndarray, "T A"], Float[np.ndarray, "T S"]]]:
        """Actions and states of all steps, stretch by stretch; no picture is decoded."""


def open_dataset(directory: str | Path) -> Dataset:
    """Opens what `experiments.convert` or `experiments.collect` wrote.

    Raises:
        UserError: nothing there, another kind of dataset, or it is damaged.
    """
    if (Path(directory) / DESCRIPTION).is_file():
        return StepDataset(directory)
    return open_rlds(directory)
