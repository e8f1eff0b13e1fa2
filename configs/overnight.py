"""The main job, larger: pick a named object up and put it on the plate or into the bowl, as told.

python -m experiments.compare --config=configs/overnight.py --workdir=runs/overnight

As in configs/quickstart.py, the look of a scene names the object nine times in ten. Where it goes, the plate or the
bowl, only the words say, so that even a policy which goes by the look has to listen.
"""

from ml_collections import ConfigDict

from configs import train


def get_config() -> ConfigDict:
    """Settings of experiments.compare."""
    return ConfigDict(
        {
            "collect": {
                "env": {"embodiment": "floating", "task": "place_on", "image_size": 64},
                "bias": {"coupling": "uniqueness", "rho": 0.1},
                "episodes": 3000,
            },
            "arms": {name: _arm(name) for name in ("baseline", "bayesianvla")},
        }
    )


def _arm(name: str) -> ConfigDict:
    config = train.get_config(name)
    config.steps = 30_000
    config.eval_every = 10_000
    config.policy.encoder = "keypoints"
    config.policy.keypoints = {"points": 24}
    config.policy.trunk = {"depth": 2}
    config.loss.noise_draws = 2
    config.optimizer = {"learning_rate": 2e-3, "warmup_steps": 500, "ema_decay": 0.999}
    return config
