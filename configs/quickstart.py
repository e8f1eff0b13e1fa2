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
                "episodes": 2000,
            },
            "arms": {name: _arm(name) for name in ("baseline", "bayesianvla")},
        }
    )


def _arm(name: str) -> ConfigDict:
    config = train.get_config(name)
    config.steps = 1200
    config.eval_every = 0
    return config
