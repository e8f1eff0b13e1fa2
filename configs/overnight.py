"""The main job, larger: pick a named object up and put it on the plate or into the bowl, as told.

python -m experiments.compare --config=configs/overnight.py --workdir=runs/overnight

As in configs/quickstart.py, the look of a scene names the object nine times in ten. Where it goes, the plate or the
bowl, only the words say, so that even a policy which goes by the look has to listen.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """Settings of experiments.compare."""
    config = quickstart.get_config()
    config.collect.env.task = "place_on"
    config.collect.episodes = 3000
    for arm in config.arms.values():
        arm.update(
            {
                "steps": 30_000,
                "eval_every": 10_000,
                "policy": {"keypoints": {"points": 24}},
                "optimizer": {"learning_rate": 2e-3, "warmup_steps": 500, "ema_decay": 0.999},
            }
        )
    return config
