"""Steers frozen policies on shifted scenes and compares the arms; writes results.json and results.md.

python -m experiments.steer --config=configs/steer.py --policy=RUN[,RUN2,…] --workdir=runs/steer

With --pointer=RUN, a run whose language model can point (configs/grounding.py, or an arm with questions), {target} in
a stored program is the place that it points at, told the picture and the instruction, not the simulator's mask of the
commanded object. With --noise=DSRL, a run of experiments.dsrl on the same checkpoint of the policy, every arm starts
from the noise that it has learned.
Every finished arm is kept in WORKDIR/results with its settings, a hash of the stored program and the steps of all runs
among them, so a run that stopped goes on where it stopped.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from vla_jax import config as configuration
from vla_jax.data.contract import Contract
from vla_jax.errors import UserError
from vla_jax.files import write_atomically
from vla_jax.platform import setup_compilation_cache
from vla_jax.steering.pointing import Pointer
from vla_jax.steering.report import make_rows, markdown
from vla_jax.steering.steer import NoiseSource, SteerConfig
from vla_jax.steering.study import SteerStudy, SteerStudyConfig
from vla_jax.steering.writer import Cached, Endpoint, Stored, Writer
from vla_jax.training.checkpoints import load_actor, load_policy, newest_step
from vla_jax.training.improve import load_improved


@dataclasses.dataclass(frozen=True)
class WriterConfig:
    """Who writes reward programs.

    Attributes:
        kind: "stored" (the file `path`) or "endpoint" (`url`, `model`, `key_variable`: see writer.Endpoint).
        switches: the endpoint also decides about stages.
    """

    kind: Literal["stored", "endpoint"] = "stored"
    path: str = ""
    url: str = ""
    model: str = ""
    key_variable: str = ""
    switches: bool = False

    def make(self, cache: Path) -> tuple[Writer, Writer | None]:
        """The writer of programs and that of the stage switcher."""
        if self.kind == "stored":
            if self.switches:
                raise UserError("writer.switches needs writer.kind = 'endpoint': a stored text sees no picture")
            return Stored.read(self.path), None
        if not self.url or not self.model:
            raise UserError("writer.kind = 'endpoint' needs writer.url and writer.model")
        endpoint = Cached(Endpoint(self.url, self.model, self.key_variable), cache)
        return endpoint, endpoint if self.switches else None


@dataclasses.dataclass(frozen=True)
class SteerRunConfig:
    """What is run.

    Attributes:
        study: see SteerStudyConfig. writer: see WriterConfig.
        step: of the checkpoints; None is the newest. ema: averaged weights, where the runs keep them.
    """

    study: SteerStudyConfig = SteerStudyConfig()
    writer: WriterConfig = WriterConfig()
    step: int | None = None
    ema: bool = True


def main(argv: Sequence[str]) -> None:
    """Runs every arm that has no result yet, and prints the tables; see the module's text."""
    arguments = configuration.parse_args(
        argv, schema=SteerRunConfig, default_config="configs/steer.py", options=("policy", "noise", "pointer")
    )
    if arguments.workdir is None or not arguments.flags["policy"]:
        raise UserError("give the frozen policy by --policy=RUN and where results go by --workdir=DIR")
    setup_compilation_cache()
    config = configuration.resolve(SteerRunConfig, arguments.config)
    policies = [Path(name) for name in arguments.flags["policy"].split(",") if name]
    run(config, policies, Path(arguments.workdir), arguments.flags["noise"], arguments.flags["pointer"])


def run(
    config: SteerRunConfig,
    policies: Sequence[Path],
    workdir: Path,
    noise: str | None = None,
    pointer: str | None = None,
) -> list[dict[str, Any]]:
    """The rows of all shifts, arms and policies. noise: the run that learned from which noise to start. pointer: the
    run that points.

    Raises:
        UserError: also for results in `workdir` that other settings made. What is finished is kept.
    """
    if len({path.resolve().name for path in policies}) < len(policies):
        raise UserError("two of the policies have the same directory name, by which results are told apart: rename one")
    results = []
    for path in policies:
        results += _of_policy(config, path, workdir, {"noise": noise, "pointer": pointer})
        rows = make_rows(results)
        text = markdown(rows)
        write_atomically(
            workdir / "results.json", json.dumps({"config": dataclasses.asdict(config), "rows": rows}, indent=1)
        )
        write_atomically(workdir / "results.md", text)
    print(f"{text}\nresults: {workdir / 'results.json'}")
    return rows


def _of_policy(
    config: SteerRunConfig, path: Path, workdir: Path, helpers: dict[str, str | None]
) -> list[dict[str, Any]]:
    """helpers: other runs, by what they do."""
    settings = dataclasses.asdict(config)
    for name in ("shifts", "arms"):
        del settings["study"][name]
    helpers = {name: run for name, run in helpers.items() if run}
    step = newest_step(path) if config.step is None else config.step
    contents = _contents(config.writer, helpers)
    settings = json.loads(json.dumps({**settings, "step": step, **helpers, **contents}))
    study, results = None, []
    for shift in config.study.shifts:
        for arm in config.study.arms:
            name = path.resolve().name
            file = workdir / "results" / name / f"{shift}-{arm}.json"
            if file.is_file():
                kept = json.loads(file.read_text())
                made = {**contents, **kept["settings"]}  # earlier versions kept the names alone: those are believed
                if changed := sorted(key for key in {*made, *settings} if made.get(key) != settings.get(key)):
                    raise UserError(
                        f"{file} was made with other settings ({', '.join(changed)}): give another --workdir"
                    )
                results.append(kept)
                continue
            if study is None:
                policy, contract, trained = load_actor(path, step, config.ema)
                trained.check_guidance(config.study.steer.extrapolate)
                writers = config.writer.make(workdir / "replies")
                source = _learned(helpers["noise"], path, step, config.study.steer) if "noise" in helpers else None
                pointer = (
                    _pointer(helpers["pointer"], contents["pointer_step"], contract) if "pointer" in helpers else None
                )
                study = SteerStudy(policy, contract, config.study, *writers, source, pointer)
            result = {"policy": name, **study.run(shift, arm), "settings": settings}
            write_atomically(file, json.dumps(result))
            results.append(result)
            successes = sum(result["success"])
            print(f"{name} {shift} {arm}: {successes}/{len(result['success'])}, {result['seconds']:.0f} s", flush=True)
    return results


def _contents(writer: WriterConfig, helpers: dict[str, str]) -> dict[str, Any]:
    """What the files and runs that the settings name hold by now: a hash of the stored program, the runs' steps."""
    contents: dict[str, Any] = {}
    if writer.kind == "stored":
        contents["program"] = hashlib.sha256(Stored.read(writer.path).text.encode()).hexdigest()[:12]
    if "pointer" in helpers:
        contents["pointer_step"] = newest_step(helpers["pointer"])
    if "noise" in helpers:
        seed = Path(helpers["noise"]) / "seed0"
        if not seed.is_dir():
            raise UserError(f"{helpers['noise']} is no run of experiments.dsrl: there is no {seed.name}/ in it")
        contents["noise_step"] = newest_step(seed)
    return contents


def _pointer(run: str, step: int, contract: Contract) -> Pointer:
    """Who points for a policy of this contract. Raises UserError for a run without questions, or on another task."""
    policy, theirs, trained = load_policy(run, step)
    if not trained.questions.batch_size:
        raise UserError(f"{run} learned no questions, so it cannot point: give a run of configs/grounding.py")
    tasks = theirs.facts.get("task"), contract.facts.get("task")
    if tasks[0] != tasks[1]:
        raise UserError(f"{run} learned to point on the task {tasks[0]!r}, and the policy is of {tasks[1]!r}")
    return Pointer(policy, theirs)


def _learned(noise: str, path: Path, step: int, config: SteerConfig) -> NoiseSource:
    """What chooses the noise of a policy's checkpoint; says where it was learned with another sampler.

    Raises:
        UserError: a run that learned no noise, or for another policy or checkpoint.
    """
    improved, _, theirs = load_improved(noise)
    if theirs.arm == "cloning":
        raise UserError(f"{noise} went on cloning and learned weights, no noise: give a run of another arm")
    if Path(theirs.policy).resolve() != path.resolve():
        raise UserError(f"the noise of {noise} was learned for {theirs.policy}, not for {path}")
    learned_for = newest_step(path) if theirs.policy_step is None else theirs.policy_step
    if learned_for != step:
        raise UserError(
            f"the noise of {noise} was learned for step {learned_for} of {path}, not for step {step}: "
            f"set --config.step={learned_for}"
        )
    how = theirs.eval
    if (how.sampler_steps, how.guidance) != (config.steps, config.extrapolate):
        print(
            f"note: the noise of {noise} was learned for a sampler of {how.sampler_steps} steps with guidance "
            f"{how.guidance}, and is used in one of {config.steps} with {config.extrapolate}",
            flush=True,
        )
    return improved.noise


if __name__ == "__main__":
    configuration.run_entry(main)
