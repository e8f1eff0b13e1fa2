"""Improves a frozen policy by learning which noise to start from (docs/methods/dsrl.md), or by one of the controls.

python -m experiments.dsrl --config=configs/dsrl.py:na --policy=runs/x --workdir=runs/y [--config.seeds=5] [--resume]
"""

import dataclasses
from collections.abc import Sequence

from vla_jax import config as configuration
from vla_jax.errors import UserError
from vla_jax.platform import setup_compilation_cache
from vla_jax.training.improve import ImproveConfig, improve


def main(argv: Sequence[str]) -> None:
    """Runs one arm; see the module's text."""
    arguments = configuration.parse_args(
        argv, schema=ImproveConfig, default_config="configs/dsrl.py", flags=("resume",), options=("policy",)
    )
    if arguments.workdir is None:
        raise UserError("no run directory: give one by --workdir=DIR")
    config = configuration.resolve(ImproveConfig, arguments.config)
    if arguments.flags["policy"]:
        config = dataclasses.replace(config, policy=arguments.flags["policy"])
    setup_compilation_cache()
    print(f"finished: {improve(config, arguments.workdir, arguments.flags['resume'])}")


if __name__ == "__main__":
    configuration.run_entry(main)
