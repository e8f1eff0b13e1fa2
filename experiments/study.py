"""A study: arms x couplings x rho x seeds, each trained and judged once, in one growing table.

python -m experiments.study --config=configs/studies/language_following.py --workdir=runs/language_following

What is there already is kept: the same command goes on where it was stopped, and a larger study reuses the cells of a
smaller one in the same directory. Layout:

    data/<coupling>-rho<rho>/   demonstrations
    runs/<cell>/                one training (see experiments.train)
    results/<cell>.json         the outcome of every scene, and the measures of listening: small, to be kept
    study.json, .md, .png       the table with differences to the first arm, and the figure
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from experiments.compare import collect_once, train_once
from vla_jax import config as configuration
from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.collect import CollectConfig
from vla_jax.errors import UserError
from vla_jax.evaluation import listening
from vla_jax.evaluation.evaluate import Evaluator, World
from vla_jax.evaluation.report import require_extra
from vla_jax.evaluation.results import write_atomically
from vla_jax.evaluation.study import Cell, comparisons, figure, load_cells, markdown, measure_table, save_cell, table
from vla_jax.platform import setup_compilation_cache
from vla_jax.training.checkpoints import load_policy
from vla_jax.training.train_config import TrainConfig
from vla_jax.training.trainer import provenance


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """What is crossed with what.

    Attributes:
        collect: the demonstrations; coupling and rho are set by the study.
        arms: trainings by name; the first is what the others are compared with.
        unbiased: names of arms that learn from as many demonstrations with rho = 1, and are judged like the others:
            what could be had from data without a shortcut.
        couplings, rhos: of the demonstrations and of the test scenes.
        seeds: trainings of each arm, numbered from 0.
    """

    collect: CollectConfig = CollectConfig()
    arms: dict[str, TrainConfig] = dataclasses.field(default_factory=dict)
    unbiased: tuple[str, ...] = ()
    couplings: tuple[str, ...] = ("uniqueness",)
    rhos: tuple[float, ...] = (0.1,)
    seeds: int = 3

    def __post_init__(self):
        if not self.arms:
            raise UserError("arms is empty: name at least one training")
        if unknown := [name for name in self.unbiased if name not in self.arms]:
            raise UserError(f"unbiased names {unknown[0]!r}, which is none of the arms {', '.join(self.arms)}")
        if self.seeds < 1 or not self.couplings or not self.rhos:
            raise UserError("a study needs at least one seed, one coupling and one rho")
        for coupling in self.couplings:
            for rho in self.rhos:
                BiasConfig(coupling, rho)

    def cells(self) -> list[Cell]:
        """Every training, in the order in which they run: a first seed of everything comes before any second."""
        return [
            Cell(coupling, rho, arm, seed)
            for seed in range(self.seeds)
            for coupling in self.couplings
            for rho in self.rhos
            for arm in self.arms
        ]


def main(argv: Sequence[str]) -> None:
    """Runs what is missing of a study; see the module's text."""
    arguments = configuration.parse_args(argv, schema=StudyConfig)
    if arguments.workdir is None:
        raise UserError("no run directory: give one by --workdir=DIR")
    require_extra()
    setup_compilation_cache()
    run(configuration.resolve(StudyConfig, arguments.config), Path(arguments.workdir))


def run(config: StudyConfig, workdir: Path) -> None:
    """Trains and judges every cell that has no result yet, and writes the table after each."""
    cells = config.cells()
    for number, cell in enumerate(cells, start=1):
        if (workdir / "results" / f"{cell.name}.json").exists():
            continue
        print(f"cell {number} of {len(cells)}: {cell.name}", flush=True)
        _run_cell(config, cell, workdir)
        write_summary(workdir, reference=next(iter(config.arms)))
    write_summary(workdir, reference=next(iter(config.arms)))
    print(f"table: {workdir / 'study.md'}   figure: {workdir / 'study.png'}")


def _run_cell(config: StudyConfig, cell: Cell, workdir: Path) -> None:
    rho = 1.0 if cell.arm in config.unbiased else cell.rho
    bias = dataclasses.replace(config.collect.bias, coupling=cell.coupling, rho=rho)
    directory = workdir / "data" / f"{cell.coupling}-rho{rho:g}"
    dataset = collect_once(dataclasses.replace(config.collect, bias=bias), directory)
    arm = config.arms[cell.arm]
    data = dataclasses.replace(arm.data, directory=str(dataset), seed=cell.seed)
    arm = dataclasses.replace(arm, arm=cell.arm, seed=cell.seed, data=data)
    run_dir = train_once(arm, workdir / "runs" / cell.name)
    policy, contract, trained = load_policy(run_dir)
    world = dataclasses.replace(World.of(contract, trained.eval), bias=BiasConfig(cell.coupling, cell.rho))
    results = Evaluator(contract, trained.eval, world)(policy, cell.arm, arm.steps)
    measures = listening.measure(policy, contract, trained.eval)
    save_cell(workdir / "results", cell, results, provenance(contract), measures)


def write_summary(workdir: Path, reference: str) -> None:
    """study.json, study.md and study.png from the results that are there."""
    results = load_cells(workdir / "results")
    values = {"rows": table(results), "comparisons": comparisons(results, reference)}
    values["measures"] = measure_table(results)
    write_atomically(workdir / "study.json", json.dumps(values, indent=1) + "\n")
    write_atomically(workdir / "study.md", markdown(results, reference))
    figure(results).savefig(workdir / "study.png", dpi=120)


if __name__ == "__main__":
    configuration.run_entry(main)
