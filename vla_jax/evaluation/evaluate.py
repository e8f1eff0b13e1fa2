"""A policy's closed-loop success on every split, with intervals.

    evaluator = Evaluator(contract, EvalConfig())
    results = evaluator(policy, arm="full", step=1000)

An Evaluator keeps its scenes and its compiled program, so that evaluating the next checkpoint costs no compilation, and
two arms meet the same scenes and the same noise.
"""

import copy
import dataclasses
import time
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import UInt8

from vla_jax.data.contract import Contract
from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.collect import interface_of
from vla_jax.envs.env import EnvConfig, Tabletop
from vla_jax.envs.sampling import SceneConfig
from vla_jax.envs.splits import SPLITS, make_cases
from vla_jax.envs.views import LOOK
from vla_jax.errors import UserError
from vla_jax.evaluation.results import Results, fingerprint, make_columns, make_row
from vla_jax.evaluation.rollout import Trials, concatenate, in_batches, make_rollout, take_rows


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How a policy is judged.

    Attributes:
        splits: names of `envs.splits.SPLITS`.
        scenes: test cases a split.
        seed: of the scenes and of the policy's noise.
        execute: actions of a chunk that are executed before the policy looks again.
        sampler_steps: Euler steps from noise to actions.
        guidance: w of v_prior + w (v_post - v_prior), a number or one for each part of the flow's time (`extrapolate`);
            None acts by the posterior branch alone (see `Policy.act`).
        batch: scenes in one call of the compiled program.
        videos: successes, and as many failures, that are filmed a split; 0 films none.
        engine: physics, see EnvConfig.
        max_ticks: control ticks of an episode; 0 takes the task's own.
    """

    splits: tuple[str, ...] = SPLITS
    scenes: int = 200
    seed: int = 0
    execute: int = 4
    sampler_steps: int = 4
    guidance: float | tuple[float, ...] | None = None
    batch: int = 100
    videos: int = 2
    engine: str = "auto"
    max_ticks: int = 0

    def __post_init__(self):
        for name in ("scenes", "execute", "sampler_steps", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"eval.{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("videos", "max_ticks"):
            if getattr(self, name) < 0:
                raise UserError(f"eval.{name} is {getattr(self, name)}: it must not be negative")
        if not self.splits:
            raise UserError(f"eval.splits is empty: name some of {', '.join(SPLITS)}")


@dataclasses.dataclass(frozen=True)
class World:
    """Where a policy is judged. By default the one in which its demonstrations were made."""

    env: EnvConfig
    bias: BiasConfig
    scene: SceneConfig

    @classmethod
    def of(cls, contract: Contract, config: EvalConfig) -> "World":
        """The world that a contract's data come from."""
        facts = contract.facts
        missing = [name for name in ("task", "coupling", "rho", "objects", "look") if name not in facts]
        if missing:
            raise UserError(
                f"the dataset {contract.dataset!r} does not say its {' and '.join(missing)}, so it was not collected "
                "on the simulated table: a policy trained on it cannot be judged there"
            )
        if facts["look"] != LOOK:
            raise UserError(
                f"the pictures of the dataset {contract.dataset!r} were drawn by look {facts['look']} of the table, "
                f"this version draws look {LOOK}: collect and train again, or use the version that drew them"
            )
        size = next(iter(contract.images.values()))[0]
        return cls(
            EnvConfig(contract.embodiment, facts["task"], config.engine, size, config.max_ticks),
            BiasConfig(facts["coupling"], facts["rho"]),
            SceneConfig(facts["objects"]),
        )


@dataclasses.dataclass(frozen=True)
class Clip:
    """One filmed scene."""

    split: str
    index: int  # of the scene in its split
    text: str
    success: bool
    stuck: bool  # did what the look suggests instead
    frames: UInt8[np.ndarray, "T H W 3"]


class Evaluator:
    """Judges policies of one contract on fixed scenes."""

    def __init__(self, contract: Contract, config: EvalConfig = EvalConfig(), world: World | None = None):
        """Draws the scenes. Raises UserError where the world does not fit the contract."""
        self.config = config
        self.world = world or World.of(contract, config)
        contract.check_interface(interface_of(self.world.env), f"the {self.world.env.task!r} table")
        self.contract = contract
        self.env = Tabletop(self.world.env)
        self._texts: dict[str, list[str]] = {}
        self._trials = {split: self._make_trials(split) for split in config.splits}
        self._run, self._film = self._compile(False), self._compile(True)

    def reading(self, contract: Contract, what: str) -> "Evaluator":
        """The same scenes and programs for policies of another contract: each reads the texts by its own tokenizer.

        Raises:
            UserError: a policy of this contract, called `what` in the message, cannot be judged on these scenes.
        """
        self.contract.check_interface(contract, what)
        if (task := World.of(contract, self.config).env.task) != self.world.env.task:
            raise UserError(f"{what} was trained on task {task!r} and cannot be judged on {self.world.env.task!r}")
        other = copy.copy(self)
        other.contract, other._trials = contract, {}
        for split, trials in self._trials.items():
            tokens, mask = contract.encode(self._texts[split])
            other._trials[split] = dataclasses.replace(trials, tokens=tokens, token_mask=mask)
        return other

    def _compile(self, record: bool):
        return make_rollout(
            self.env,
            execute=self.config.execute,
            ticks=self.env.max_ticks,
            sampler_steps=self.config.sampler_steps,
            record=record,
        )

    def _make_trials(self, split: str) -> Trials:
        world, config = self.world, self.config
        cases = make_cases(split, world.env.task, world.bias, config.seed, config.scenes, world.scene)
        tokens, mask = self.contract.encode(cases.text)
        self._texts[split] = list(cases.text)
        # On the host, so that a batch is cut out without compiling anything.
        return jax.device_get(Trials(cases.scene, cases.command, cases.cue, tokens, mask, np.arange(config.scenes)))

    def __call__(self, policy: nnx.Module, arm: str = "policy", step: int = 0) -> Results:
        """Runs every split. The splits are joined, so that only the last batch of all is filled up."""
        began = time.perf_counter()
        graphdef, weights = nnx.split(policy)
        trials = concatenate(list(self._trials.values()))
        key, batch, guidance = jax.random.key(self.config.seed), self.config.batch, self.config.guidance
        outcomes = [outcome for outcome, _ in in_batches(self._run, graphdef, weights, trials, key, batch, guidance)]
        joined = concatenate(outcomes)
        rows, scenes, start = [], {}, 0
        for split, part in self._trials.items():
            end = start + len(part.index)
            scenes[split] = make_columns(part, take_rows(joined, slice(start, end)), self._texts[split])
            rows.append(make_row(arm, step, split, scenes[split]))
            start = end
        return Results(
            arm=arm,
            step=step,
            config={**dataclasses.asdict(self.config), **dataclasses.asdict(self.world)},
            rows=rows,
            scenes=scenes,
            fingerprints={split: fingerprint((part.scene, part.command)) for split, part in self._trials.items()},
            seconds=time.perf_counter() - began,
        )

    def film(self, policy: nnx.Module, results: Results) -> list[Clip]:
        """Runs the first successes and failures of every split again and returns their front pictures.

        A clip is labelled by the outcome of the filmed run itself.
        """
        count = self.config.videos
        chosen = [
            (split, int(index))
            for split in self._trials
            for wanted in (True, False)
            for index in np.flatnonzero(results.success(split) == wanted)[:count]
        ]
        if not chosen:
            return []
        trials = concatenate([take_rows(self._trials[split], slice(index, index + 1)) for split, index in chosen])
        graphdef, weights = nnx.split(policy)
        parts = in_batches(
            self._film, graphdef, weights, trials, jax.random.key(self.config.seed), 2 * count, self.config.guidance
        )
        outcome, recording = concatenate(list(parts))
        columns = make_columns(trials, outcome, [self._texts[split][index] for split, index in chosen])
        return [
            Clip(split, index, text, success, stuck, frames[:ticks])
            for (split, index), text, success, stuck, ticks, frames in zip(
                chosen,
                columns["text"],
                columns["success"],
                columns["stuck"],
                columns["ticks"],
                recording.pictures,
                strict=True,
            )
        ]


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows as text for the terminal."""
    width = max([16, *(len(row["arm"]) + 2 for row in rows)])
    lines = [f"{'arm':<{width}}{'split':<20}{'success':>9}  {'95 % interval':<16}{'stick':>7}  {'ticks':>5}"]
    for row in rows:
        interval = f"[{row['low']:.2f}, {row['high']:.2f}]"
        stick = "-" if row["stick"] is None else f"{row['stick']:.2f}"
        ticks = "-" if row["ticks"] is None else f"{row['ticks']:.0f}"
        score = f"{row['successes']}/{row['trials']}"
        lines.append(f"{row['arm']:<{width}}{row['split']:<20}{score:>9}  {interval:<16}{stick:>7}  {ticks:>5}")
    return "\n".join(lines)
