"""A study: arms x couplings x rho x seeds, each trained and judged once, in one growing table.

python -m experiments.study --config=configs/studies/language_following.py --workdir=runs/language_following

A cell is one training and its evaluation. On several accelerators each takes one cell after another, in a process of
its own; --config.workers=N divides the cores of a machine without accelerators. --cell=NAME runs one cell alone.

What is there already is kept: the same command goes on where it was stopped, a larger study reuses the cells of a
smaller one in the same directory, and a command that is started twice there shares the work with itself. Cells of other
settings are refused. Layout:

    data/<coupling>-rho<rho>/   demonstrations
    grounding/<coupling>-<number>/  the language model that trainings of a coupling start from
    balance/<coupling>-rho<rho>-<number>/  the weights of demonstrations for arms with data.balance, from that model
    runs/<cell>/                one training (see experiments.train); with rho1 in its name where the data are unbiased
    results/<cell>.json         the outcome of every scene, and the measures of listening: small, to be kept
    logs/<cell>.log             what a worker printed
    claims/                     empty files, locked by who is at it
    study.json, .md, .png       the table with differences to the reference arm, and the figure
"""

import dataclasses
import io
import json
import shlex
import sys
import time
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path

from tqdm import tqdm

from experiments.balance import balance_once
from experiments.compare import check_demonstrations, check_steps, collect_once, train_once
from vla_jax import config as configuration
from vla_jax.data.contract import Contract
from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.collect import CollectConfig
from vla_jax.errors import UserError
from vla_jax.evaluation import listening
from vla_jax.evaluation.evaluate import Evaluator, World
from vla_jax.evaluation.report import require_extra
from vla_jax.evaluation.results import save_results
from vla_jax.evaluation.retention import answer_accuracy
from vla_jax.evaluation.study import Cell, comparisons, figure, load_cells, markdown, measure_table, save_cell, table
from vla_jax.files import write_atomically
from vla_jax.platform import setup_compilation_cache
from vla_jax.training.checkpoints import has_begun, load_config, load_policy
from vla_jax.training.train_config import TrainConfig
from vla_jax.training.trainer import check_settings, on_pretrained, provenance
from vla_jax.workers import Place, Workers, claim, places


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """What is crossed with what.

    Attributes:
        collect: the demonstrations; coupling and rho are set by the study.
        arms: trainings by name.
        reference: the arm that the others are compared with; empty takes the first by name.
        unbiased: names of arms that learn from as many demonstrations with rho = 1, and are judged like the others:
            what could be had from data without a shortcut.
        grounding: a training on questions alone, for each coupling, from whose language model every arm starts that is
            not named in `scratch` and names no other one by `init_from`; None: all start from scratch.
        groundings: how many of them, with other weights and other questions each; the training with seed s starts from
            number s modulo groundings. With 1, intervals over seeds do not know what another would give.
        scratch: names of arms that start from nothing.
        balance: the training of experiments.balance, for arms with data.balance that name no data.weights.
        couplings, rhos: of the demonstrations and of the test scenes.
        seeds: trainings of each arm, numbered from 0.
        workers: cells at a time, on an accelerator or a share of the cores each; 0 is one for each accelerator. With 1,
            or 0 and no accelerators, cells run one after another in this process, with all of its devices.
    """

    collect: CollectConfig = CollectConfig()
    arms: dict[str, TrainConfig] = dataclasses.field(default_factory=dict)
    reference: str = ""
    unbiased: tuple[str, ...] = ()
    grounding: TrainConfig | None = None
    groundings: int = 1
    scratch: tuple[str, ...] = ()
    balance: TrainConfig | None = None
    couplings: tuple[str, ...] = ("uniqueness",)
    rhos: tuple[float, ...] = (0.1,)
    seeds: int = 3
    workers: int = 0

    def __post_init__(self):
        if not self.arms:
            raise UserError("arms is empty: name at least one training")
        reference = (self.reference,) if self.reference else ()
        for field, names in (("unbiased", self.unbiased), ("scratch", self.scratch), ("reference", reference)):
            if unknown := [name for name in names if name not in self.arms]:
                raise UserError(f"{field} names {unknown[0]!r}, which is none of the arms {', '.join(self.arms)}")
        if self.seeds < 1 or not self.couplings or not self.rhos:
            raise UserError("a study needs at least one seed, one coupling and one rho")
        if self.groundings < 1:
            raise UserError(f"groundings is {self.groundings}: it must be positive")
        if self.workers < 0:
            raise UserError(f"workers is {self.workers}: it must not be negative")
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


class Progress:
    """How many cells have a result, and how long the rest takes at the pace since the start."""

    def __init__(self, config: StudyConfig, workdir: Path):
        self._results = [_result(workdir, cell) for cell in config.cells()]
        self._before, self._began = self._done(), time.perf_counter()

    def __str__(self) -> str:
        done, total = self._done(), len(self._results)
        text = f"{done} of {total} cells done"
        if self._before < done < total:
            seconds = (time.perf_counter() - self._began) / (done - self._before) * (total - done)
            text += f", about {tqdm.format_interval(seconds)} left"
        return text

    def _done(self) -> int:
        return sum(path.exists() for path in self._results)


def main(argv: Sequence[str]) -> None:
    """Runs what is missing of a study; see the module's text."""
    arguments = configuration.parse_args(argv, schema=StudyConfig, options=("cell",))
    if arguments.workdir is None:
        raise UserError("no run directory: give one by --workdir=DIR")
    require_extra()
    setup_compilation_cache()
    config, workdir = configuration.resolve(StudyConfig, arguments.config), Path(arguments.workdir)
    if arguments.flags["cell"] is not None:
        run_cell(config, _named(config, arguments.flags["cell"]), workdir)
        return
    where = [] if config.workers == 1 else places(config.workers)
    if len(where) > 1:
        spread(config, workdir, where, [sys.executable, "-m", "experiments.study", *argv])
    else:
        run(config, workdir)


def run(config: StudyConfig, workdir: Path) -> None:
    """Trains and judges every cell that has no result yet, here and one after another; writes the table after each.

    Raises:
        UserError: a result is of other settings; or cells failed, and the others were run.
    """
    _check_results(config, workdir, config.cells())
    progress, failed = Progress(config, workdir), {}
    while cell := _next(config, workdir, failed):
        print(f"{progress}   next: {cell.name}", flush=True)
        try:
            run_cell(config, cell, workdir)
        except Exception as error:
            if isinstance(error, UserError):
                print(f"error: {error}", file=sys.stderr)
            else:
                traceback.print_exc()
            failed[cell.name] = "see above"
        write_summary(config, workdir)
    _finish(config, workdir, progress, failed)


def spread(config: StudyConfig, workdir: Path, where: Sequence[Place], command: Sequence[str]) -> None:
    """As `run`, with a process for each cell, one at a time in each place. command: this one, to run one cell with.

    Raises:
        UserError: a result is of other settings; or cells failed, and the others were run.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when every process has saved.
    """
    _check_results(config, workdir, config.cells())
    progress, failed = Progress(config, workdir), {}
    print(f"{progress}   {len(where)} workers, logs in {workdir / 'logs'}", flush=True)
    with Workers(where) as workers:
        while True:
            while workers.free and not workers.stopped:
                cell = _next(config, workdir, {*failed, *workers.running})
                if cell is None:
                    break
                workers.start(cell.name, [*command, f"--cell={cell.name}"], _log(workdir, cell.name))
            if not workers.running:
                break
            for name, status in workers.wait():
                if status and not workers.stopped:
                    failed[name] = f"see {_log(workdir, name)}"
                print(f"{progress}   {name} ended{f' with status {status}' if status else ''}", flush=True)
            write_summary(config, workdir)
    if workers.stopped:
        raise KeyboardInterrupt(f"stopped with {progress}; go on with: {shlex.join(command)}")
    _finish(config, workdir, progress, failed)


def run_cell(config: StudyConfig, cell: Cell, workdir: Path) -> None:
    """Trains and judges one cell, unless it has a result or another process is at it."""
    with claim(_claim(workdir, cell.name)) as mine:
        if not mine:
            print(f"{cell.name}: another process is at it")
        elif _result(workdir, cell).exists():
            _check_results(config, workdir, [cell])
            print(f"{cell.name} has a result already")
        else:
            _run_claimed(config, cell, workdir)


def _run_claimed(config: StudyConfig, cell: Cell, workdir: Path) -> None:
    dataset = _demonstrations(config, cell.coupling, _rho(config, cell), workdir)
    arm = _arm(config, cell)
    start = _start(config, cell, workdir)
    if start and not arm.init_from:
        _ground(config, cell, dataset, workdir)
    data = dataclasses.replace(arm.data, directory=str(dataset))
    if data.balance and not data.weights:
        data = dataclasses.replace(data, weights=str(_balance(config, cell, dataset, start, workdir)))
    run_dir = _run_dir(config, cell, workdir)
    with claim(_claim(workdir, f"training-{run_dir.name}"), wait=True):
        train_once(dataclasses.replace(arm, data=data, init_from=start), run_dir)
    policy, contract, _ = load_policy(run_dir)
    world = dataclasses.replace(World.of(contract, arm.eval), bias=BiasConfig(cell.coupling, cell.rho))
    results = Evaluator(contract, arm.eval, world)(policy, cell.arm, arm.steps)
    changes = "" if cell.rho == _rho(config, cell) else f"rho={cell.rho:g}"
    save_results(run_dir, results, changes)  # for who opens this run alone
    measures = listening.measure(policy, contract, arm.eval, world)
    measures |= answer_accuracy(policy, contract, world)
    save_cell(workdir / "results", cell, results, provenance(contract), measures)


def _arm(config: StudyConfig, cell: Cell) -> TrainConfig:
    """The training of a cell, but for the paths of its data, its weights and what it starts from."""
    return _seeded(dataclasses.replace(config.arms[cell.arm], arm=cell.arm), cell.seed)


def _rho(config: StudyConfig, cell: Cell) -> float:
    """Of the demonstrations that a cell learns from."""
    return 1.0 if cell.arm in config.unbiased else cell.rho


def _run_dir(config: StudyConfig, cell: Cell, workdir: Path) -> Path:
    """Of the training of a cell; of unbiased demonstrations there is one, which is judged for every rho."""
    return workdir / "runs" / dataclasses.replace(cell, rho=_rho(config, cell)).name


def _data_name(coupling: str, rho: float) -> str:
    return f"{coupling}-rho{rho:g}"


def _collection(config: StudyConfig, coupling: str, rho: float) -> CollectConfig:
    bias = dataclasses.replace(config.collect.bias, coupling=coupling, rho=rho)
    return dataclasses.replace(config.collect, bias=bias)


def _demonstrations(config: StudyConfig, coupling: str, rho: float, workdir: Path) -> Path:
    """The path of some demonstrations, which are collected where they are not there yet."""
    name = _data_name(coupling, rho)
    with claim(_claim(workdir, name), wait=True):
        return collect_once(_collection(config, coupling, rho), workdir / "data" / name)


def _check_results(config: StudyConfig, workdir: Path, cells: Sequence[Cell]) -> None:
    """Raises UserError where one of these cells has the result of other settings: it would stand in the same table."""
    there = {result.cell.name: result for result in load_cells(workdir / "results")}
    for cell in cells:
        result, run_dir = there.get(cell.name), _run_dir(config, cell, workdir)
        if result is None:
            continue
        arm = _arm(config, cell)
        if result.step != arm.steps:
            path = _result(workdir, cell)
            raise UserError(f"{path}: steps was {result.step}, is {arm.steps}. Choose another --workdir")
        if has_begun(run_dir):  # results may be kept without the runs
            contract, trained = Contract.load(run_dir / "contract.json"), load_config(run_dir)
            check_demonstrations(_collection(config, cell.coupling, _rho(config, cell)), contract.facts, run_dir)
            # By what weights it drew, the study itself has named.
            data = dataclasses.replace(arm.data, weights=arm.data.weights or trained.data.weights)
            arm = dataclasses.replace(arm, data=data, init_from=_start(config, cell, workdir))
            check_settings(run_dir, on_pretrained(arm, contract)[0])


def _number(config: StudyConfig, cell: Cell) -> int:
    """Of the grounding that a cell starts from."""
    return cell.seed % config.groundings


def _start(config: StudyConfig, cell: Cell, workdir: Path) -> str:
    """The run that a cell starts from; "" if it starts from nothing."""
    if config.arms[cell.arm].init_from or config.grounding is None or cell.arm in config.scratch:
        return config.arms[cell.arm].init_from
    return str(workdir / "grounding" / f"{cell.coupling}-{_number(config, cell)}")


def _ground(config: StudyConfig, cell: Cell, dataset: Path, workdir: Path) -> None:
    """Trains the grounding that a cell starts from, unless it is trained already."""
    run_dir, number = Path(_start(config, cell, workdir)), _number(config, cell)
    with claim(_claim(workdir, f"grounding-{run_dir.name}"), wait=True):
        if has_begun(run_dir):  # with the demonstrations of the cell that came first, and so it goes on
            check_steps(run_dir, config.grounding)
            rho = Contract.load(run_dir / "contract.json").facts["rho"]
            dataset = _demonstrations(config, cell.coupling, rho, workdir)
        # The data give its words and the look of its scenes alone, which are the same for every rho.
        data = dataclasses.replace(config.grounding.data, directory=str(dataset))
        train_once(_seeded(dataclasses.replace(config.grounding, data=data), number), run_dir)


def _seeded(config: TrainConfig, number: int) -> TrainConfig:
    """A training with other weights, other draws of demonstrations and other questions for each number."""
    data = dataclasses.replace(config.data, seed=config.data.seed + number)
    questions = dataclasses.replace(config.questions, seed=config.questions.seed + number)
    return dataclasses.replace(config, seed=config.seed + number, data=data, questions=questions)


def _balance(config: StudyConfig, cell: Cell, dataset: Path, start: str, workdir: Path) -> Path:
    """The weights of a cell's demonstrations, computed where they are not there yet."""
    if config.balance is None:
        raise UserError("an arm has data.balance and no data.weights: give the study a `balance` training")
    name = f"{_data_name(cell.coupling, _rho(config, cell))}-{_number(config, cell)}"
    data = dataclasses.replace(config.balance.data, directory=str(dataset))
    with claim(_claim(workdir, f"balance-{name}"), wait=True):
        return balance_once(dataclasses.replace(config.balance, data=data, init_from=start), workdir / "balance" / name)


def write_summary(config: StudyConfig, workdir: Path) -> None:
    """study.json, study.md and study.png from the results that are there, if any."""
    results, reference = load_cells(workdir / "results"), config.reference or next(iter(config.arms))
    if not results:
        return
    values = {"rows": table(results), "comparisons": comparisons(results, reference)}
    values["measures"] = measure_table(results)
    write_atomically(workdir / "study.json", json.dumps(values, indent=1) + "\n")
    write_atomically(workdir / "study.md", markdown(results, reference))
    picture = io.BytesIO()
    figure(results).savefig(picture, dpi=120)
    write_atomically(workdir / "study.png", picture.getvalue())


def _finish(config: StudyConfig, workdir: Path, progress: Progress, failed: dict[str, str]) -> None:
    """The last summary and what became of the study. failed: where to look, by name of the cell."""
    write_summary(config, workdir)
    print(f"{progress}   table: {workdir / 'study.md'}   figure: {workdir / 'study.png'}")
    missing = [cell.name for cell in config.cells() if not _result(workdir, cell).exists() and cell.name not in failed]
    if missing:
        print(f"another command is at: {', '.join(missing)}")
    if failed:
        listed = "; ".join(f"{name} ({look})" for name, look in failed.items())
        raise UserError(f"{len(failed)} of {len(config.cells())} cells failed: {listed}. The same command tries again")


def _next(config: StudyConfig, workdir: Path, skip: Collection[str]) -> Cell | None:
    """The first cell that has no result and that nobody is at."""
    for cell in config.cells():
        if cell.name not in skip and not _result(workdir, cell).exists():
            with claim(_claim(workdir, cell.name)) as free:
                if free:
                    return cell
    return None


def _named(config: StudyConfig, name: str) -> Cell:
    cells = {cell.name: cell for cell in config.cells()}
    if name not in cells:
        raise UserError(f"no cell '{name}' in this study{configuration.nearest(name, list(cells))}")
    return cells[name]


def _result(workdir: Path, cell: Cell) -> Path:
    return workdir / "results" / f"{cell.name}.json"


def _claim(workdir: Path, name: str) -> Path:
    return workdir / "claims" / name


def _log(workdir: Path, name: str) -> Path:
    return workdir / "logs" / f"{name}.log"


if __name__ == "__main__":
    configuration.run_entry(main)
