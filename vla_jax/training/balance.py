"""How much each demonstration's picture says about its instruction, by a language model trained on the demonstrations.

Axis legend: B batch, E episodes, L tokens.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float
from tqdm import tqdm

from vla_jax.data.balance import effective_share, episode_weights
from vla_jax.data.contract import Contract
from vla_jax.data.dataset import open_dataset
from vla_jax.data.loader import BatchReader, DataConfig
from vla_jax.files import write_atomically
from vla_jax.losses.information import likelihoods

BATCH = 256


def write_information(policy: nnx.Module, contract: Contract, directory: str | Path, path: Path) -> str:
    """Writes log p(l | v) - log p(l) of every episode, v being its first picture, and returns a summary.

    Args:
        policy: its trunk has learned both likelihoods (loss.language_weight and loss.words_weight).
        directory: the demonstrations that it has learned them from.
        path: of the file, for `DataConfig.weights`.
    """
    dataset = open_dataset(directory)
    information = episode_information(policy, contract, directory)
    write_atomically(path, json.dumps({"fingerprint": dataset.fingerprint, "information": information.tolist()}))
    share = effective_share(episode_weights(path, 1.0, dataset))
    low, middle, high = np.quantile(information, (0.05, 0.5, 0.95))
    return (
        f"the picture tells {information.mean():.2f} nats of the instruction on average (5 % below {low:.2f}, half "
        f"below {middle:.2f}, 5 % above {high:.2f})\nbalanced, the {len(information)} episodes count like "
        f"{share * len(information):.0f}"
    )


def episode_information(policy: nnx.Module, contract: Contract, directory: str | Path) -> Float[np.ndarray, "E"]:
    """log p(l | v) - log p(l) of every episode in nats."""
    config = DataConfig(directory=str(directory), held_out_fraction=0.0, chunk=policy.config.chunk, cache_mb=0)
    dataset = open_dataset(directory)
    reader, (graphdef, weights) = BatchReader(dataset, contract, config), nnx.split(policy)
    starts = np.concatenate([[0], np.cumsum(dataset.lengths)[:-1]])
    found = []
    for first in tqdm(range(0, len(starts), BATCH), desc="reading instructions", unit="batch", disable=None):
        rows = np.minimum(np.arange(first, first + BATCH), len(starts) - 1)
        batch = reader(starts[rows])
        asked = {name: batch[name] for name in ("images", "tokens", "token_mask")}
        found.append(np.asarray(_information(graphdef, weights, asked)))
    return np.concatenate(found)[: len(starts)]


@functools.partial(jax.jit, static_argnums=0)
def _information(graphdef, weights, batch):
    policy, mask = nnx.merge(graphdef, weights), batch["token_mask"]
    readings = policy.encode(batch["images"], batch["tokens"], mask, ("posterior", "words"))
    seen, alone = (likelihoods(policy, readings[name], batch["tokens"]) for name in ("posterior", "words"))
    return ((seen - alone) * mask).sum(-1)
