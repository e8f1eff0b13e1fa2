"""Collects demonstrations as an RLDS dataset and prints what they hold.

python -m experiments.collect --config=configs/collect.py --config.env.task=reach --workdir=runs/data
"""

import sys
from collections.abc import Sequence

from vla_jax import config as configuration
from vla_jax.envs.collect import CollectConfig, collect
from vla_jax.errors import UserError


def main(argv: Sequence[str]) -> None:
    """Runs one collection; see the module's text."""
    arguments = configuration.parse_args(argv, schema=CollectConfig, default_config="configs/collect.py")
    if arguments.workdir is None:
        raise UserError("no directory for the data: give one by --workdir=DIR")
    try:
        collection = collect(configuration.resolve(CollectConfig, arguments.config), arguments.workdir)
    except KeyboardInterrupt:
        print("nothing was kept of this collection: run the command again", file=sys.stderr)
        raise
    print(collection.summary())


if __name__ == "__main__":
    configuration.run_entry(main)
