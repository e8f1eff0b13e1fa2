"""From nothing to a measured comparison: demonstrations, one training an arm, closed-loop evaluation, one report.

python -m experiments.compare --config=configs/quickstart.py --workdir=runs/quickstart

What is there already is kept: the same command goes on where it was stopped. Layout of the run directory:

    data/<dataset>/1.0.0    the demonstrations
    <arm>/                  one training (see experiments.train)
    results.json            `rows` of all arms and `comparisons` of each arm with the first, on the same scenes
    report.html             the same to look at, with curves and videos
"""

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.evaluate import evaluate_runs
from vla_jax import config as configuration
from vla_jax.data.rlds import dataset_path
from vla_jax.envs.collect import CollectConfig, collect
from vla_jax.errors import UserError
from vla_jax.evaluation.report import require_extra
from vla_jax.evaluation.results import compare, load_results
from vla_jax.files import write_atomically
from vla_jax.platform import setup_compilation_cache
from vla_jax.training.checkpoints import Checkpoints
from vla_jax.training.train_config import TrainConfig
from vla_jax.training.trainer import train


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """The demonstrations, and the trainings on them by name. The first arm is the one that others are compared with."""

    collect: CollectConfig = CollectConfig()
    arms: dict[str, TrainConfig] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.arms:
            raise UserError("arms is empty: name at least one training")


def main(argv: Sequence[str]) -> None:
    """Runs what is missing of a comparison; see the module's text."""
    arguments = configuration.parse_args(argv, schema=CompareConfig, default_config="configs/quickstart.py")
    if arguments.workdir is None:
        raise UserError("no run directory: give one by --workdir=DIR")
    require_extra()
    setup_compilation_cache()
    run(configuration.resolve(CompareConfig, arguments.config), Path(arguments.workdir))


def run(config: CompareConfig, workdir: Path) -> Path:
    """Collects, trains, evaluates and reports; returns the report's path."""
    began = time.perf_counter()
    dataset = collect_once(config.collect, workdir / "data")
    run_dirs = []
    for name, arm in config.arms.items():
        arm = dataclasses.replace(arm, arm=name, data=dataclasses.replace(arm.data, directory=str(dataset)))
        run_dirs.append(train_once(arm, workdir / name))
    report = evaluate_runs(run_dirs, {}, workdir / "report.html")
    _save_results(run_dirs, workdir)
    print(f"results: {workdir / 'results.json'}   ({(time.perf_counter() - began) / 60:.1f} min in all)")
    return report


def collect_once(config: CollectConfig, directory: Path) -> Path:
    """The path of the demonstrations, which are collected where they are not there yet."""
    dataset = dataset_path(directory, config.dataset_name)
    if dataset.exists():
        print(f"demonstrations: {dataset} is there already")
    else:
        print(collect(config, directory).summary())
    return dataset


def train_once(config: TrainConfig, run_dir: Path) -> Path:
    """Trains one arm, or goes on with it; a finished one is left as it is."""
    started = run_dir.is_dir() and any(run_dir.iterdir())
    if started and config.steps in Checkpoints(run_dir).steps:
        print(f"{config.arm}: {run_dir} is trained already")
        return run_dir
    return train(config, run_dir, resume=started, resume_command=shlex.join(sys.orig_argv))


def _save_results(run_dirs: Sequence[Path], workdir: Path) -> None:
    results = [load_results(run_dir)[-1] for run_dir in run_dirs]
    comparisons = [
        {"arm": other.arm, "against": results[0].arm, "split": split, **dataclasses.asdict(paired)}
        for other in results[1:]
        for split, paired in compare(results[0], other).items()
    ]
    rows = [row for result in results for row in result.rows]
    drops = [{"arm": result.arm, **drop} for result in results for drop in result.drops()]
    values = {"rows": rows, "comparisons": comparisons, "drops": drops}
    write_atomically(workdir / "results.json", json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    configuration.run_entry(main)
