"""A run that improves a frozen policy by choosing its noise: its directory, its loop, its evaluations.

run/config.json, contract.json, provenance.json    what is run on what
run/seed<k>/metrics.jsonl      lines "train" and "evaluation" (held-out scenes) by control step
run/seed<k>/checkpoints/       everything that the run changes, the replay included, by control step
run/seed<k>/results.json, before_after.json, curve.png, before.mp4, after.mp4      where it ended
"""

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from vla_jax.config import diff, from_json, to_json
from vla_jax.data.contract import Contract
from vla_jax.envs.splits import make_cases
from vla_jax.errors import UserError
from vla_jax.evaluation import charts, video
from vla_jax.evaluation.evaluate import EvalConfig, Evaluator, World, format_table
from vla_jax.evaluation.records import load_run
from vla_jax.evaluation.report import BAD, GOOD, require_extra
from vla_jax.evaluation.results import Results, save_results
from vla_jax.evaluation.rollout import Trials
from vla_jax.files import write_atomically
from vla_jax.rl.agent import AgentConfig, NoiseAliased, Sac, Search
from vla_jax.rl.collect import Collector
from vla_jax.rl.controls import Cloning, FixedNoise
from vla_jax.rl.frozen import Flow, SteeredPolicy, flow_of
from vla_jax.rl.loop import LoopConfig, LoopState, begin, make_advance
from vla_jax.rl.networks import merge, split
from vla_jax.training.checkpoints import Checkpoints, has_begun, load_actor, newest_step
from vla_jax.training.loop import BAR, Stopped
from vla_jax.training.metrics import MetricsWriter, Stopwatch, disk_space
from vla_jax.training.signals import StopRequest
from vla_jax.training.trainer import command_to_resume, may_be_one_run, provenance

ARMS = ("sac", "na", "search", "fixed", "cloning")
FREE_ON_RESUME = ("seeds", "steps", "eval_every", "checkpoint_every", "eval.videos", "eval.batch")


@dataclasses.dataclass(frozen=True)
class ImproveConfig:
    """One run.

    Attributes:
        policy: the run directory of the policy (`--policy` of experiments.dsrl); policy_step: None is the newest when
            the run begins, and that one when it goes on; config.json has its number.
        arm: "sac" and "na" (DSRL), "search" (best of N by the critic), "fixed" (one noise), "cloning" (the policy's
            own successes).
        agent, loop: see there.
        eval: how the policy acts (execute, sampler_steps, guidance, engine, max_ticks), in collection too, and the
            held-out scenes on which it is judged. The first of its splits is the law of the scenes that are collected.
        rho: of the scenes, collected and held out, see `envs.bias`; None is that of the policy's data.
        pool: scenes to collect in.
        pool_seed: of these scenes; another one than that of the held-out scenes, eval.seed.
        seeds: runs, numbered from 0, which differ in the networks' first weights and in all noise.
        steps: control steps of all scenes together, warm-up included.
        log_every, eval_every, checkpoint_every: control steps between lines, evaluations and checkpoints, rounded up to
            whole calls of `log_every`.
    """

    policy: str = ""
    policy_step: int | None = None
    arm: str = "na"
    agent: AgentConfig = AgentConfig()
    loop: LoopConfig = LoopConfig()
    eval: EvalConfig = EvalConfig(splits=("in_distribution",), batch=200)
    rho: float | None = None
    pool: int = 4096
    pool_seed: int = 1
    seeds: int = 1
    steps: int = 100_000
    log_every: int = 4_000
    eval_every: int = 12_000
    checkpoint_every: int = 12_000

    def __post_init__(self):
        if self.arm not in ARMS:
            raise UserError(f"arm must be one of {', '.join(ARMS)}, got {self.arm!r}")
        for name in ("pool", "seeds", "steps", "log_every", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.pool_seed == self.eval.seed:
            raise UserError(
                f"pool_seed and eval.seed are both {self.pool_seed}: learn on other scenes than those judged"
            )

    @property
    def round_steps(self) -> int:
        """Control steps of a round."""
        return self.loop.scenes * self.eval.execute

    @property
    def call_rounds(self) -> int:
        """Rounds of one call of the compiled loop."""
        return max(1, round(self.log_every / self.round_steps))


def improve(config: ImproveConfig, workdir: str | Path, resume: bool = False) -> Path:
    """Runs, or goes on with, one arm on one policy, seed after seed; returns the run directory.

    Raises:
        UserError: anything that the user can put right, numbers that are not finite among them; the last checkpoint,
            with the replay, is kept.
        loop.Stopped: after Ctrl-C or SIGTERM, with everything saved.
    """
    require_extra()
    if not config.policy:
        raise UserError("no policy: give the run directory of one by --policy=DIR")
    run_dir = Path(workdir)
    begun = _load_config(run_dir) if resume and has_begun(run_dir) else config
    if config.policy_step is None:
        # The policy may train on meanwhile; this run stays with what it began with. Earlier versions wrote no number.
        step = newest_step(config.policy) if begun.policy_step is None else begun.policy_step
        config = dataclasses.replace(config, policy_step=step)
    policy, contract, trained = load_actor(config.policy, config.policy_step)
    trained.check_guidance(config.eval.guidance)
    world = _world(config, contract)
    _check_run_dir(run_dir, config, contract, resume)
    improvement = Improvement(config, policy, Evaluator(contract, config.eval, world))
    with disk_space(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / "config.json", to_json(config) + "\n")
        contract.save(run_dir / "contract.json")
        path = run_dir / "provenance.json"
        starts = json.loads(path.read_text()) if path.is_file() else []
        write_atomically(path, json.dumps([*starts, provenance(contract)], indent=1) + "\n")
    for seed in range(config.seeds):
        Run(improvement, run_dir / f"seed{seed}", seed)()
    return run_dir


def load_improved(workdir: str | Path, seed: int = 0) -> tuple[SteeredPolicy, Contract, ImproveConfig]:
    """The policy with the noise that a run has learned to choose, as its newest checkpoint has it.

    Raises:
        UserError: no such run, or nothing saved yet.
    """
    config = _load_config(Path(workdir))
    policy, contract, _ = load_actor(config.policy, config.policy_step)
    improvement = Improvement(config, policy, Evaluator(contract, config.eval, _world(config, contract)))
    checkpoints = Checkpoints(Path(workdir) / f"seed{seed}")
    state, _ = _restore(checkpoints, improvement.begin(seed))
    checkpoints.close()
    return improvement.acting(state), contract, config


def make_learner(config: ImproveConfig, flow: Flow, graphdef: nnx.GraphDef, features: int) -> Any:
    """The learner of an arm. graphdef: of the policy. features: numbers of `flow.features`."""
    agents = {"sac": Sac, "na": NoiseAliased, "search": Search}
    if config.arm in agents:
        return agents[config.arm](config.agent, flow, features)
    return FixedNoise(config.agent, flow) if config.arm == "fixed" else Cloning(config.agent, flow, graphdef)


def make_pool(evaluator: Evaluator, config: ImproveConfig) -> Trials:
    """The scenes to collect in, on the device."""
    world, law = evaluator.world, config.eval.splits[0]
    cases = make_cases(law, world.env.task, world.bias, config.pool_seed, config.pool, world.scene)
    tokens, mask = evaluator.contract.encode(cases.text)
    trials = Trials(cases.scene, cases.command, cases.cue, tokens, mask, np.arange(config.pool))
    return jax.tree.map(jnp.asarray, trials)


class Improvement:
    """What the seeds share: the policy, the scenes, the compiled loop and the compiled evaluation."""

    def __init__(self, config: ImproveConfig, policy: nnx.Module, evaluator: Evaluator):
        self.config, self.evaluator = config, evaluator
        self.graphdef, self.weights = split(policy)
        shape, how = (policy.config.chunk, len(policy.facts.action_low)), config.eval
        self.flow = flow_of(self.graphdef, shape, how.sampler_steps, how.guidance, config.agent.summary)
        self.collector = Collector(
            evaluator.env,
            self.flow,
            execute=how.execute,
            ticks=evaluator.env.max_ticks,
            discount=config.agent.discount,
        )
        self.pool = make_pool(evaluator, config)
        self.learner = make_learner(config, self.flow, self.graphdef, self._features())
        self.advance = make_advance(self.collector, self.learner, config.loop, self.pool, config.call_rounds)

    def begin(self, seed: int) -> LoopState:
        """The state before the first round."""
        return begin(self.collector, self.learner, self.config.loop, self.pool, self.weights, seed)

    def acting(self, state: LoopState, greedy: bool = False) -> SteeredPolicy:
        """The policy as it acts now. greedy: without the noise actor's chance."""
        weights = self.learner.weights(state.learner, self.weights)
        source = self.learner.source(state.learner, greedy)
        return SteeredPolicy(merge(self.graphdef, weights), source, self.config.agent.summary)

    def untouched(self, state: LoopState) -> SteeredPolicy:
        """The policy as it was: its own weights, the prior's noise."""
        source = self.learner.source(state.learner)
        return SteeredPolicy(merge(self.graphdef, self.weights), source, self.config.agent.summary, steered=False)

    def _features(self) -> int:
        def features(weights, pool):
            one = jax.tree.map(lambda leaf: leaf[:1], pool)
            observation = self.evaluator.env.observe(self.evaluator.env.reset(one.scene, one.command, one.cue))
            return self.flow.features(self.flow.read(weights, observation, one.tokens, one.token_mask))

        return jax.eval_shape(features, self.weights, self.pool).shape[-1]


class Run:
    """One seed between its start and its end."""

    def __init__(self, improvement: Improvement, run_dir: Path, seed: int):
        self.improvement, self.config = improvement, improvement.config
        self.run_dir, self.seed = run_dir, seed
        self._call = self.config.call_rounds * self.config.round_steps  # control steps
        self._last = math.ceil(self.config.steps / self._call) * self._call
        self._watch, self._evaluated, self._steps = Stopwatch(), -1, 0

    def __call__(self) -> None:
        """Restores what there is, runs to the last round, writes the results; nothing where it is finished."""
        results = self.run_dir / "before_after.json"
        if results.is_file() and json.loads(results.read_text())["steps"] >= self._last:
            print(f"{self.run_dir} is finished")
            return
        checkpoints = Checkpoints(self.run_dir, keep=1, write=True)
        state = self.improvement.begin(self.seed)
        if checkpoints.steps:
            state, self._evaluated = _restore(checkpoints, state)
            print(f"resumed at control step {int(state.round) * self.config.round_steps}")
        self._steps = int(state.round) * self.config.round_steps
        writer = MetricsWriter(self.run_dir, self._steps)
        try:
            state = self._loop(state, checkpoints, writer)
        finally:
            writer.close()
            checkpoints.close()
        self._finish(state)

    def _loop(self, state: LoopState, checkpoints: Checkpoints, writer: MetricsWriter) -> LoopState:
        name = f"{self.config.arm} {self.run_dir.name}"
        bar = tqdm(total=self._last, initial=self._steps, desc=name, disable=None, bar_format=BAR)
        with StopRequest() as stop, bar:
            self._judge(state, writer)
            while self._steps < self._last and not stop.requested:
                with self._watch.phase("rounds"):
                    state, log = self.improvement.advance(self.improvement.weights, state)
                    log = jax.device_get(log)
                self._guard(log, checkpoints)
                self._steps += self._call
                self._log(log, writer, bar)
                if not stop.requested:
                    self._judge(state, writer)
                if stop.requested or self._due(self.config.checkpoint_every):
                    self._save(state, checkpoints)
            checkpoints.wait()
            if stop.requested and self._steps < self._last:
                saved = f"saved control step {self._steps} of {self._last}; go on with: {command_to_resume()}"
                raise Stopped(saved, stop.status)
        return state

    def _due(self, every: int) -> bool:
        """Whether a multiple of `every` was passed by the last call, or the run is at its end."""
        return self._steps == self._last or self._steps // every > (self._steps - self._call) // every

    def _judge(self, state: LoopState, writer: MetricsWriter) -> None:
        if self._evaluated >= self._steps or not self._due(self.config.eval_every):
            return
        with self._watch.phase("eval"):
            policy = self.improvement.acting(state)
            rows = self.improvement.evaluator(policy, self.config.arm, self._steps).rows
        for row in rows:
            writer.write("evaluation", self._steps, row)
        self._evaluated = self._steps
        tqdm.write(f"after {self._steps} control steps\n{format_table(rows)}")

    def _guard(self, log: dict[str, np.ndarray], checkpoints: Checkpoints) -> None:
        bad = [name for name, values in log.items() if not np.isfinite(values).all()]
        if bad:
            checkpoints.wait()
            saved = checkpoints.steps
            kept = f"the checkpoint of step {saved[-1]}, with its replay, is kept" if saved else "nothing was saved yet"
            raise UserError(
                f"not finite after control step {self._steps}: {', '.join(bad)}; {kept}, and the curve so far is in "
                f"{self.run_dir / 'metrics.jsonl'}. Look at the policy and the reward, or lower agent.learning_rate"
            )

    def _log(self, log: dict[str, np.ndarray], writer: MetricsWriter, bar: tqdm) -> None:
        ended, won = log.pop("episodes").sum(), log.pop("successes").sum()
        values = {name: float(part.mean()) for name, part in log.items()}
        call, seconds = self._call, self._watch.sum("rounds")
        values |= {"success": float(won / max(ended, 1)), "episodes": float(ended)}
        values |= {"steps_per_second": call / seconds, "seconds": seconds}
        writer.write("train", self._steps, values)
        text = f"success {values['success']:.0%}  value {values.get('value', 0):.2f}  {call / seconds:.0f} steps/s"
        bar.update(call)
        bar.set_postfix_str(text)
        if bar.disable:
            print(f"control step {self._steps}  {text}", flush=True)
        self._watch = Stopwatch()

    def _save(self, state: LoopState, checkpoints: Checkpoints) -> None:
        checkpoints.save_parts(self._steps, {"run": _flat(state)}, {"evaluated": self._evaluated})

    def _finish(self, state: LoopState) -> None:
        """The last table, by chance and without, against the policy as it was; curve and videos."""
        judge, now = self.improvement.evaluator, self.improvement.acting(state)
        before = judge(self.improvement.untouched(state), "before", 0)
        after = judge(now, self.config.arm, self._steps)
        greedy = judge(self.improvement.acting(state, True), f"{self.config.arm} greedy", self._steps)
        print(format_table([*before.rows, *after.rows, *greedy.rows]))
        with disk_space(self.run_dir):
            save_results(self.run_dir, after)
            self._film("before", self.improvement.untouched(state), before)
            self._film("after", now, after)
            picture = io.BytesIO()
            names = [f"evaluation/{split}/rate" for split in self.config.eval.splits] + ["success", "value"]
            charts.curves_figure([load_run(self.run_dir)], names).savefig(picture, dpi=120)
            write_atomically(self.run_dir / "curve.png", picture.getvalue())
            rows = {"before": before.rows, "after": after.rows, "greedy": greedy.rows, "steps": self._steps}
            write_atomically(self.run_dir / "before_after.json", json.dumps(rows, indent=1) + "\n")

    def _film(self, name: str, policy: SteeredPolicy, results: Results) -> None:
        clips = self.improvement.evaluator.film(policy, results)
        if clips:
            panels = [video.titled(clip.frames, clip.text, GOOD if clip.success else BAD) for clip in clips]
            write_atomically(self.run_dir / f"{name}.mp4", video.encode_mp4(video.side_by_side(panels)))


def _world(config: ImproveConfig, contract: Contract) -> World:
    world = World.of(contract, config.eval)
    return (
        world
        if config.rho is None
        else dataclasses.replace(world, bias=dataclasses.replace(world.bias, rho=config.rho))
    )


def _restore(checkpoints: Checkpoints, like: LoopState) -> tuple[LoopState, int]:
    """The newest state, and the control step of its last evaluation."""
    loaded = checkpoints.restore_weights(None, {"run": _flat(like)})
    state = jax.tree.unflatten(jax.tree.structure(like), [loaded["run"][name] for name in _flat(like)])
    return state, loaded["meta"]["evaluated"]


def _load_config(run_dir: Path) -> ImproveConfig:
    path = run_dir / "config.json"
    if not path.is_file():
        raise UserError(f"no config.json in {run_dir}: it is not a run of experiments.dsrl")
    return from_json(ImproveConfig, path.read_text())


def _flat(state: LoopState) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _check_run_dir(run_dir: Path, config: ImproveConfig, contract: Contract, resume: bool) -> None:
    """Raises UserError unless the directory is free, or `resume` fits what it holds."""
    if not has_begun(run_dir):
        return
    if not resume:
        raise UserError(f"{run_dir} is not empty: add --resume to go on with that run, or choose another --workdir")
    begun = _load_config(run_dir)
    Contract.load(run_dir / "contract.json").check(contract, f"the policy {config.policy}")
    changed = diff(begun, config)
    if begun.policy_step is None:
        changed.pop("policy_step", None)
    if may_be_one_run(*changed.get("policy", ("", ""))):
        del changed["policy"]
    changed = {key: pair for key, pair in changed.items() if key not in FREE_ON_RESUME}
    if changed:
        listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        raise UserError(f"cannot resume {run_dir} with other settings: {listed}. Choose another --workdir")
