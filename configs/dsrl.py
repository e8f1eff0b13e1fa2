"""Which noise a frozen policy should start from, learned in simulation. The argument is the arm.

python -m experiments.dsrl --config=configs/dsrl.py:na --policy=runs/base --workdir=runs/dsrl_na

All settings: `vla_jax.training.improve.ImproveConfig`.
"""

from ml_collections import ConfigDict


def get_config(arm: str = "na") -> ConfigDict:
    """Settings of experiments.dsrl."""
    return ConfigDict({"arm": arm, "agent": {}, "loop": {}})
