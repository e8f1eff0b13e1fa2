"""Improves a frozen policy by learning which noise to start from (docs/methods/dsrl.md), or by one of the controls.

python -m experiments.dsrl --config=configs/dsrl.py:na --policy=runs/x --workdir=runs/dsrl/na [--resume]

With `--compare=runs/dsrl/na,runs/dsrl/sac,…` nothing is run: curves.png and curves.md of these runs go to the workdir.
"""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

from vla_jax import config as configuration
from vla_jax.errors import UserError
from vla_jax.evaluation import improvement
from vla_jax.evaluation.report import require_extra
from vla_jax.files import write_atomically
from vla_jax.platform import setup_compilation_cache
from vla_jax.training.improve import ImproveConfig, improve


def main(argv: Sequence[str]) -> None:
    """Runs one arm, or compares some; see the module's text."""
    arguments = configuration.parse_args(
        argv, schema=ImproveConfig, default_config="configs/dsrl.py", flags=("resume",), options=("policy", "compare")
    )
    if arguments.workdir is None:
        raise UserError("no run directory: give one by --workdir=DIR")
    config = configuration.resolve(ImproveConfig, arguments.config)
    if arguments.flags["compare"]:
        compare(arguments.flags["compare"].split(","), config.eval.splits[0], Path(arguments.workdir))
        return
    if arguments.flags["policy"]:
        config = dataclasses.replace(config, policy=arguments.flags["policy"])
    setup_compilation_cache()
    print(f"finished: {improve(config, arguments.workdir, arguments.flags['resume'])}")


def compare(run_dirs: Sequence[str], split: str, workdir: Path) -> None:
    """Curves and a table of several arms."""
    require_extra()
    arms = [improvement.load_arm(run_dir, split) for run_dir in run_dirs]
    picture = io.BytesIO()
    improvement.figure(arms).savefig(picture, dpi=120)
    write_atomically(workdir / "curves.png", picture.getvalue())
    write_atomically(workdir / "curves.md", improvement.table(arms))
    print(improvement.table(arms), end="")


if __name__ == "__main__":
    configuration.run_entry(main)
