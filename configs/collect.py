"""Demonstrations of one task family. Other settings: `vla_jax.envs.collect.CollectConfig`."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Settings of experiments.collect."""
    return ConfigDict(
        {
            "env": {"embodiment": "floating", "task": "reach", "image_size": 64},
            "bias": {"coupling": "background", "rho": 0.1},
            "episodes": 1000,
            "seed": 0,
        }
    )
