"""Converts somebody's dataset (RLDS, LeRobot, or a folder) into the form that training reads, once.

python -m experiments.convert --config.source=DIR --config.layout=bridge --workdir=runs/data
python -m experiments.convert --config.source=DIR --config.layout=my_robot.py --workdir=runs/data

An interrupted conversion goes on when the command is given again.
"""

from collections.abc import Sequence

from vla_jax import config as configuration
from vla_jax.data.contract import compute_contract
from vla_jax.data.convert import ConvertConfig, convert
from vla_jax.errors import UserError


def main(argv: Sequence[str]) -> None:
    """Runs one conversion; see the module's text."""
    arguments = configuration.parse_args(argv, schema=ConvertConfig, default_config="configs/convert.py")
    if arguments.workdir is None:
        raise UserError("no directory for the data: give one by --workdir=DIR")
    conversion = convert(configuration.resolve(ConvertConfig, arguments.config), arguments.workdir)
    print(compute_contract(conversion.dataset).table())
    print(conversion.summary())


if __name__ == "__main__":
    configuration.run_entry(main)
