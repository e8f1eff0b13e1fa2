"""How a trained policy is judged. What is not set here is as in the run's own configuration (its `eval` group).

Other settings: `vla_jax.evaluation.evaluate.EvalConfig`, as --config.eval.scenes=1000.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Settings of experiments.evaluate."""
    return ConfigDict({"ema": True, "eval": {}})
