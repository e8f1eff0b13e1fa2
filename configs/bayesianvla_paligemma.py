"""BayesianVLA on PaliGemma 3B: pictures see themselves both ways, the instruction is the suffix.

python -m experiments.train --config=configs/bayesianvla_paligemma.py[:ARM[,MODE]] \
    --config.pretrained.directory=CHECKPOINT --config.data.directory=DATA --workdir=runs/x

Everything else is as in configs/bayesianvla_qwen3vl_4b.py. The data's pictures must have the checkpoint's size (224).
"""

from ml_collections import ConfigDict

from configs.bayesianvla_qwen3vl_4b import settings


def get_config(argument: str = "bayesianvla") -> ConfigDict:
    """Settings of experiments.train."""
    return settings("paligemma_3b", argument, {})
