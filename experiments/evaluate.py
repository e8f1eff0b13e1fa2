"""Judges trained policies in closed loop; prints the table and writes results.json, report.html and report.png.

python -m experiments.evaluate --workdir=runs/x [--config.eval.scenes=1000] [--compare=runs/y,runs/z] [--report=x.html]
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from vla_jax import config as configuration
from vla_jax.analysis.likelihood import guidance_curve
from vla_jax.data.contract import Contract
from vla_jax.data.loader import make_loader
from vla_jax.errors import UserError
from vla_jax.evaluation.evaluate import EvalConfig, Evaluator, format_table
from vla_jax.evaluation.records import load_run
from vla_jax.evaluation.report import require_extra, write_report, write_stills
from vla_jax.evaluation.results import Results, compare, save_results
from vla_jax.models.policy import Policy
from vla_jax.platform import setup_compilation_cache
from vla_jax.training.checkpoints import load_actor, load_config, newest_step
from vla_jax.training.train_config import TrainConfig

ACTING = ("execute", "sampler_steps", "guidance", "ema")  # what makes another policy of the same weights


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Which weights are judged, and how.

    Attributes:
        eval: see EvalConfig; what is left out is as in the first run's configuration.
        step: of the checkpoint; None is the newest.
        ema: averaged weights, where the run keeps them.
        choose_guidance: the values of eval.guidance among which held-out demonstrations of the first run choose; empty:
            it is not chosen.
    """

    eval: EvalConfig = EvalConfig()
    step: int | None = None
    ema: bool = True
    choose_guidance: tuple[float, ...] = ()


def main(argv: Sequence[str]) -> None:
    """Judges one run or several; see the module's text."""
    arguments = configuration.parse_args(
        argv, schema=EvaluateConfig, default_config="configs/evaluate.py", options=("compare", "report")
    )
    if arguments.workdir is None:
        raise UserError("no run directory: give one by --workdir=DIR")
    setup_compilation_cache()
    others = (arguments.flags["compare"] or "").split(",")
    run_dirs = [Path(name) for name in (arguments.workdir, *others) if name]
    evaluate_runs(run_dirs, arguments.config.to_dict(), arguments.flags["report"])


def evaluate_runs(
    run_dirs: Sequence[Path], settings: Mapping[str, Any], report: str | Path | None = None
) -> tuple[list[Results], Path]:
    """Judges every run on the same scenes; returns what was found, by run, and the path of the report.

    Args:
        run_dirs: --workdir of trainings; the first decides how the others are judged.
        settings: of EvaluateConfig; `eval` may be given in part.
        report: where the page goes; by default report.html of the first run.
    """
    require_extra()
    first, results, runs, clips, ema = None, [], [], {}, settings.get("ema", True)
    for run_dir in run_dirs:
        policy, contract, trained = load_actor(run_dir, settings.get("step"), ema)
        if first is None:
            own = {**dataclasses.asdict(trained.eval), **settings.get("eval", {})}
            if choices := settings.get("choose_guidance", ()):
                own["guidance"] = _chosen_guidance(policy, contract, trained, choices)
            first = Evaluator(contract, configuration.resolve(EvalConfig, own, "eval"))
            for one in run_dirs:
                load_config(one).check_guidance(first.config.guidance)
        evaluator = first.reading(contract, str(run_dir))
        step = settings.get("step") or newest_step(run_dir)
        changes = _changes(trained.eval, evaluator.config, ema)
        acts = [f"{name}={value}" for name, value in changes.items() if name in ACTING]
        results.append(evaluator(policy, " ".join([trained.arm, *acts]), step))
        save_results(run_dir, results[-1], ",".join(f"{name}={value}" for name, value in changes.items()))
        runs.append(dataclasses.replace(load_run(run_dir), name=results[-1].arm, results=[results[-1]]))
        clips[run_dir] = evaluator.film(policy, results[-1])
        print(f"{format_table(results[-1].rows)}\n", flush=True)
    print(_comparisons(results), end="")
    path = write_report(report or run_dirs[0] / "report.html", runs, clips)
    stills = write_stills(path.with_suffix(".png"), runs, clips)
    print(f"report: {path}" + (f"   stills: {stills}" if stills else ""))
    return results, path


def _chosen_guidance(policy: Policy, contract: Contract, trained: TrainConfig, weights: Sequence[float]) -> float:
    """The weight under which the demonstrations that the run validates with are most likely; prints all of them."""
    trained.check_guidance(tuple(weights))
    data = dataclasses.replace(trained.data, split="held_out", workers=0)
    with contextlib.closing(make_loader(data, contract, views=trained.policy.views)) as loader:
        best, curve = guidance_curve(policy, list(islice(loader, trained.validation_batches)), weights)
    listed = "   ".join(f"w = {weight:g}: {nats:.2f}" for weight, nats in zip(weights, curve, strict=True))
    print(f"held-out demonstrations, nats a chunk: {listed}\nguidance: {best:g}\n", flush=True)
    return best


def _changes(own: EvalConfig, used: EvalConfig, ema: bool) -> dict[str, str]:
    """The settings that could change an outcome and are not the run's own, as text for a file's name."""
    differing = configuration.diff(own, used) | ({} if ema else {"ema": (True, False)})

    def text(value: Any) -> str:
        return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return {name: text(value) for name, (_, value) in sorted(differing.items()) if name not in ("videos", "batch")}


def _comparisons(results: Sequence[Results]) -> str:
    """Every run against the first, as text."""
    lines = []
    for other in results[1:]:
        lines.append(f"{other.arm} minus {results[0].arm}, same scenes:")
        for split, paired in compare(results[0], other).items():
            low, high = 100 * paired.low, 100 * paired.high
            points = f"{100 * paired.difference:+6.1f} points  [{low:+.1f}, {high:+.1f}]"
            lines.append(f"  {split:<20}{points}  p = {paired.p:.3g}")
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    configuration.run_entry(main)
