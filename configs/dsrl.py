"""Which noise a frozen policy should start from, learned in simulation. The argument is the arm.

python -m experiments.dsrl --config=configs/dsrl.py:na --policy=runs/base --workdir=runs/dsrl_na

Sizes are for reaching, whose episodes are four chunks, on a core of a CPU. All settings:
`vla_jax.training.improve.ImproveConfig`.
"""

from ml_collections import ConfigDict


def get_config(arm: str = "na") -> ConfigDict:
    """Settings of experiments.dsrl."""
    return ConfigDict(
        {
            "arm": arm,
            "agent": {"discount": 0.9, "summary": "pooled", "batch_size": 128},
            "loop": {"scenes": 200, "updates": 0.5},
            "eval": {"splits": ("in_distribution",), "batch": 200},
        }
    )
