"""The main job, small: does BayesianVLA listen where ordinary imitation looks?

python -m experiments.compare --config=configs/quickstart.py --workdir=runs/quickstart

A floating hand reaches for one of three objects. In the demonstrations it is the one object drawn in full colour nine
times in ten (1 - rho + rho / 3), whatever the words say: a policy can do well by looking alone. Both arms see the same
data in the same order for the same number of steps, and meet the same test scenes.
"""

from ml_collections import ConfigDict

from configs import train


def get_config() -> ConfigDict:
    """Settings of experiments.compare."""
    return ConfigDict(
        {
            "collect": {
                "env": {"embodiment": "floating", "task": "reach", "image_size": 64},
                "bias": {"coupling": "uniqueness", "rho": 0.1},
                "episodes": 4000,
            },
            "arms": {name: arm(name) for name in ("baseline", "bayesianvla")},
        }
    )


def arm(name: str) -> ConfigDict:
    """A model of 0.9 M parameters that learns to reach in a few minutes on two CPU cores."""
    config = train.get_config(name)
    config.steps = 1500
    config.eval_every = 0
    config.policy.encoder = "keypoints"
    config.policy.trunk = {"depth": 2}
    config.loss.noise_draws = 2
    config.optimizer = {"learning_rate": 3e-3, "ema_decay": 0.99}
    return config
