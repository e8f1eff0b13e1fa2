"""Drawing episodes so that the picture no longer gives the instruction away.

In biased data p(l | v) is sharp: who sees the scene knows what will be asked, and imitation has no reason to read.
Drawing every episode in proportion to w = p(l) / p(l | v) turns the joint law of pictures and instructions into the
product of its margins, under which the picture says nothing about the instruction (as far as the data hold both at
all). It is the importance weight of learning under a shifted law of contexts (Shimodaira 2000,
doi 10.1016/S0378-3758(00)00115-4); -log w is the information between this picture and these words. Drawing by weight
has the expected gradient of weighting the loss, and less variance: no step is spent on samples that hardly count.

Both likelihoods are those of a language model (`training.balance`), so nothing but pictures and text is needed.

Axis legend: E episodes, T steps of all of them.
"""

import json
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Float

from vla_jax.data.rlds import RldsDataset
from vla_jax.errors import UserError

LIMIT = 4.0  # nats: no episode is drawn more than e^4 times, or less than e^-4 times, as often as unweighted


def episode_weights(path: str | Path, exponent: float, dataset: RldsDataset) -> Float[np.ndarray, "E"]:
    """(p(l) / p(l | v))^exponent of every episode, with mean 1, from a file of `training.balance.write_information`.

    exponent: 1 balances, 0 leaves the data as they are.

    Raises:
        UserError: no such file, or one about other data.
    """
    try:
        saved = json.loads(Path(path).read_text())
        fingerprint, information = saved["fingerprint"], np.array(saved["information"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"data.weights: {path} is no file of python -m experiments.balance") from error
    if fingerprint != dataset.fingerprint:
        raise UserError(f"data.weights: {path} is about other data than {dataset.directory}: run experiments.balance")
    weights = np.exp(exponent * np.clip(-information, -LIMIT, LIMIT))
    return weights / weights.mean()


def effective_share(weights: Float[np.ndarray, "E"]) -> float:
    """Kish's effective sample size as a share: (sum w)^2 / (E sum w^2)."""
    return float(weights.sum() ** 2 / (len(weights) * np.square(weights).sum()))


def drawn_by_weight(weights: Float[np.ndarray, "T"], seed: int) -> grain.MapDataset:
    """An endless sequence of step numbers, drawn in proportion to `weights`; number k depends on (seed, k) alone."""
    ends = np.cumsum(weights)

    def draw(number: int) -> int:
        place = np.random.default_rng((seed, number)).random() * ends[-1]
        return int(np.searchsorted(ends, place, side="right"))

    return grain.MapDataset.range(2**31 - 1).map(draw).repeat()
