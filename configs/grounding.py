"""Stage 0: a language model that knows the table, before any action: captions, pointing, yes and no.

python -m experiments.train --config=configs/grounding.py --config.data.directory=DATA --workdir=runs/grounding
python -m experiments.train --config=configs/train.py:cotrained --config.init_from=runs/grounding \
    --config.policy.encoder=keypoints --config.policy.keypoints.points=32 --config.policy.views=front \
    --config.data.directory=DATA --workdir=runs/x

One that is to point, and nothing else (`configs/train.py:pointing_only`, `experiments.steer --pointer`), can end with
questions for places alone, which are half of all otherwise:

python -m experiments.train --config=configs/grounding.py --config.init_from=runs/grounding --config.steps=16000 \
    --config.questions.kinds="('where','point')" --config.data.directory=DATA --workdir=runs/places

DATA gives the words and the look of the table; its demonstrations are not read. The questions are those of
`vla_jax.envs.questions`. What the run learns are the parts in `models.policy.LANGUAGE_MODEL`; who starts
from them has to have the same sizes.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Settings of experiments.train."""
    return ConfigDict(
        {
            "arm": "grounding",
            "steps": 8000,
            "eval_every": 0,
            "questions": {"batch_size": 64},
            "policy": {"encoder": "keypoints", "keypoints": {"points": 32}, "views": ("front",)},
            "loss": {
                "demonstrations": False,
                "prior_weight": 0.0,
                "llr_weight": 0.0,
                "question_weight": 1.0,
            },
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 200, "ema_decay": 0.999},
        }
    )
