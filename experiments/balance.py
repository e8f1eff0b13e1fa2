"""Weighs demonstrations so that the look of a scene no longer gives away what is asked (see vla_jax/data/balance.py).

python -m experiments.balance --config.data.directory=DATA --config.init_from=runs/grounding --workdir=runs/balance
python -m experiments.train --config=configs/train.py:balanced --config.data.directory=DATA \
    --config.data.weights=runs/balance/information.json --workdir=runs/x

Trains a language model on the demonstrations' pictures and instructions, then asks it of every episode how much the
picture tells about the instruction. The same command goes on where it was stopped; one with other settings is refused.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments.compare import check_steps, train_once
from vla_jax import config as configuration
from vla_jax.errors import UserError
from vla_jax.platform import setup_compilation_cache
from vla_jax.training.balance import write_information
from vla_jax.training.checkpoints import load_policy
from vla_jax.training.train_config import TrainConfig
from vla_jax.training.trainer import check_run


def main(argv: Sequence[str]) -> None:
    """Trains, asks and writes; see the module's text."""
    arguments = configuration.parse_args(argv, schema=TrainConfig, default_config="configs/balance.py")
    if arguments.workdir is None:
        raise UserError("no run directory: give one by --workdir=DIR")
    setup_compilation_cache()
    balance_once(configuration.resolve(TrainConfig, arguments.config), Path(arguments.workdir))


def balance_once(config: TrainConfig, run_dir: Path) -> Path:
    """The path of the demonstrations' weights, which are computed where they are not there yet."""
    path = run_dir / "information.json"
    if path.exists():
        check_steps(run_dir, config)
        check_run(run_dir, config)
    else:
        policy, contract, _ = load_policy(train_once(config, run_dir))
        print(write_information(policy, contract, config.data.directory, path))
    print(f"weights: {path}")
    return path


if __name__ == "__main__":
    configuration.run_entry(main)
