"""One policy on one dataset. The argument is the arm: what conditions the actions and which losses are on.

python -m experiments.train --config=configs/train.py:bayesianvla --config.data.directory=DATA --workdir=runs/x

DATA is the path that `python -m experiments.collect` prints. All settings: `vla_jax.training.train_config.TrainConfig`.
"""

from ml_collections import ConfigDict

from vla_jax.config import nearest
from vla_jax.errors import UserError

# arm: (what conditions the action expert, weight of the prior's flow matching, weight of the log-likelihood ratio)
ARMS = {
    "baseline": ("tokens", 0.0, 0.0),
    "queries": ("queries", 0.0, 0.0),
    "prior": ("queries", 0.3, 0.0),
    "llr": ("queries", 0.0, 0.1),
    "bayesianvla": ("queries", 0.3, 0.1),
}


def get_config(arm: str = "bayesianvla") -> ConfigDict:
    """Settings of experiments.train."""
    if arm not in ARMS:
        raise UserError(f"unknown arm '{arm}'{nearest(arm, list(ARMS))}")
    conditioning, prior_weight, llr_weight = ARMS[arm]
    return ConfigDict(
        {
            "arm": arm,
            "steps": 2000,
            "policy": {"conditioning": conditioning},
            "loss": {"prior_weight": prior_weight, "llr_weight": llr_weight},
        }
    )
