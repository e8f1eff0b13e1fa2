"""From nothing to a measured comparison: demonstrations, one training an arm, closed-loop evaluation, one report.

python -m experiments.compare --config=configs/quickstart.py --workdir=runs/quickstart

What is there already is kept: the same command goes on where it was stopped, and one with other settings is refused.
Layout of the run directory:

    data/<dataset>/1.0.0    the demonstrations
    <arm>/                  one training (see experiments.train)
    results.json            `rows` of all arms and `comparisons` of each with the reference, on the same scenes
    report.html             the same to look at, with curves and videos
"""

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.evaluate import evaluate_runs
from vla_jax import config as configuration
from vla_jax.data.dataset import open_dataset
from vla_jax.data.rlds import dataset_path
from vla_jax.envs.collect import CollectConfig, collect
from vla_jax.errors import UserError
from vla_jax.evaluation.report import require_extra
from vla_jax.evaluation.results import Results, compare
from vla_jax.files import write_atomically
from vla_jax.platform import setup_compilation_cache
from vla_jax.training.checkpoints import Checkpoints, load_config
from vla_jax.training.train_config import TrainConfig
from vla_jax.training.trainer import check_run, train


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """What is compared on what.

    Attributes:
        collect: the demonstrations.
        arms: trainings by name.
        reference: the arm that the others are compared with, whose `eval` says how; empty takes `baseline` where there
            is one, else the first by name.
    """

    collect: CollectConfig = CollectConfig()
    arms: dict[str, TrainConfig] = dataclasses.field(default_factory=dict)
    reference: str = ""

    def __post_init__(self):
        if not self.arms:
            raise UserError("arms is empty: name at least one training")
        if self.reference and self.reference not in self.arms:
            raise UserError(f"reference names {self.reference!r}, which is none of the arms {', '.join(self.arms)}")
        for arm in self.arms.values():
            arm.check_guidance(self.arms[self.names()[0]].eval.guidance)

    def names(self) -> list[str]:
        """The arms, the reference first."""
        reference = self.reference or ("baseline" if "baseline" in self.arms else next(iter(self.arms)))
        return [reference, *(name for name in self.arms if name != reference)]


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
    for name in config.names():
        arm = config.arms[name]
        arm = dataclasses.replace(arm, arm=name, data=dataclasses.replace(arm.data, directory=str(dataset)))
        run_dirs.append(train_once(arm, workdir / name))
    judged = config.arms[config.names()[0]].eval  # may have changed since the run was trained
    found, report = evaluate_runs(run_dirs, {"eval": dataclasses.asdict(judged)}, workdir / "report.html")
    _save_results(found, workdir)
    print(f"results: {workdir / 'results.json'}   ({(time.perf_counter() - began) / 60:.1f} min in all)")
    return report


def collect_once(config: CollectConfig, directory: Path) -> Path:
    """The path of the demonstrations, which are collected where they are not there yet."""
    path = dataset_path(directory, config.dataset_name)
    if path.exists():
        dataset = open_dataset(path)
        size = next(iter(dataset.interface.images.values()))[0]
        facts = {"embodiment": dataset.interface.embodiment, "image_size": size, "episodes": len(dataset)}
        check_demonstrations(config, dataset.facts | facts, path)
        print(f"demonstrations: {path} is there already")
    else:
        print(collect(config, directory).summary())
    return path


def check_demonstrations(config: CollectConfig, facts: Mapping[str, Any], path: Path) -> None:
    """Raises UserError where facts about demonstrations, those at `path`, are not what the settings ask for."""
    asked = {
        "task": config.env.task,
        "embodiment": config.env.embodiment,
        "image_size": config.env.image_size,
        "coupling": config.bias.coupling,
        "rho": config.bias.rho,
        "objects": config.scene.objects,
        "noise": config.noise,
        "seed": config.seed,
        "episodes": config.episodes,
    }
    differing = [
        f"{name} was {facts[name]!r}, is {value!r}"
        for name, value in asked.items()
        if facts.get(name, value) != value  # a fact that is not written down says nothing
    ]
    if differing:
        raise UserError(f"the demonstrations of {path} are others: {'; '.join(differing)}. Choose another --workdir")


def train_once(config: TrainConfig, run_dir: Path) -> Path:
    """Trains one arm, or goes on with it; a finished one is left as it is.

    Raises:
        UserError: what is there is a run with other settings or other data, or with more steps.
    """
    started = run_dir.is_dir() and any(run_dir.iterdir())
    steps = Checkpoints(run_dir).steps[-1] if Checkpoints.exist(run_dir) else 0
    if steps > config.steps:
        raise UserError(f"{run_dir} has {steps} steps already: set steps to that, or choose another --workdir")
    if steps == config.steps:
        check_run(run_dir, config)
        print(f"{config.arm}: {run_dir} is trained already")
        return run_dir
    return train(config, run_dir, resume=started, resume_command=shlex.join(sys.orig_argv))


def check_steps(run_dir: Path, config: TrainConfig) -> None:
    """Raises UserError where the run there was to have another number of steps: what was made of it would not fit."""
    if (steps := load_config(run_dir).steps) != config.steps:
        raise UserError(
            f"{run_dir} is a run with other settings: steps was {steps}, is {config.steps}. Choose another --workdir"
        )


def _save_results(results: Sequence[Results], workdir: Path) -> None:
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
