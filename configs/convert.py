"""Somebody's dataset into the form that training reads: give source and layout on the command line.

Other settings: `vla_jax.data.convert.ConvertConfig`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Settings of experiments.convert."""
    return ConfigDict({"faulty": "error"})
