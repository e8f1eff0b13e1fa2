"""Trains a policy on a dataset of demonstrations, with closed-loop evaluation on the way.

python -m experiments.train --config=configs/train.py --config.data.directory=runs/data/… --workdir=runs/x [--resume]

The same command, once a process, trains on several machines (docs/scaling.md): [--distributed], where SLURM, Open MPI
or a Cloud TPU says who is who, or [--coordinator=HOST:PORT --processes=N --process=I].
"""

from collections.abc import Sequence

from vla_jax import config as configuration
from vla_jax.errors import UserError
from vla_jax.platform import setup_compilation_cache, start_processes
from vla_jax.training.train_config import TrainConfig
from vla_jax.training.trainer import train


def main(argv: Sequence[str]) -> None:
    """Runs one training; see the module's text."""
    options = ("coordinator", "processes", "process")
    arguments = configuration.parse_args(argv, schema=TrainConfig, flags=("resume", "distributed"), options=options)
    if arguments.workdir is None:
        raise UserError("no run directory: give one by --workdir=DIR")
    config = configuration.resolve(TrainConfig, arguments.config)
    setup_compilation_cache()
    start_processes(*(arguments.flags[name] for name in options), autodetect=arguments.flags["distributed"])
    run_dir = train(config, arguments.workdir, resume=arguments.flags["resume"])
    print(f"finished: {run_dir}")


if __name__ == "__main__":
    configuration.run_entry(main)
