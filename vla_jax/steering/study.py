"""Steering arms on shifted scenes: every arm of a policy meets the same scenes, with the same noise.

Axes: B scenes, K keypoints.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from vla_jax.data.contract import Contract
from vla_jax.envs.env import EnvState, Tabletop
from vla_jax.envs.scene import POST_SLOT
from vla_jax.envs.views import observe_images
from vla_jax.errors import UserError
from vla_jax.evaluation.evaluate import EvalConfig, World
from vla_jax.evaluation.results import make_columns
from vla_jax.evaluation.rollout import Outcome, Recording, Trials, rollout_with_memory, take_rows
from vla_jax.models.policy import Policy
from vla_jax.steering.perceive import POINTED, Perceived, Watched, body_label, disturb, join, perceive
from vla_jax.steering.pointing import Pointer
from vla_jax.steering.program import Program, place, stack, unnamed
from vla_jax.steering.shifts import SHIFTS, make_shift
from vla_jax.steering.steer import Arm, Decoder, Memory, NoiseSource, SteerConfig, act, remember_nothing
from vla_jax.steering.switch import VlmSwitcher
from vla_jax.steering.terms import View
from vla_jax.steering.writer import Request, Writer, make_prompt, read_program

TARGET = "{target}"  # in a stored program: the name of the commanded object
OBSTACLE = "{obstacle}"  # in a stored program: the name of the post
TOUCHED = 0.01  # metres: an object that has moved farther was touched
SINGLE = ("base", "random", "wrong_target", "reward_only", "gradient")  # arms of one particle
ARMS = (*SINGLE, "best_of_n", "repel_best", "gradient_repel", "gradient_resample", "full")


@dataclasses.dataclass(frozen=True)
class SteerStudyConfig:
    """Which arms meet which scenes.

    Attributes:
        shifts: names of `shifts.SHIFTS`. arms: names of ARMS. scenes: of each shift. seed: of scenes and noise.
        batch: scenes in one call of the compiled program.
        execute: actions of a chunk that are executed before the policy looks again.
        guide, repel: weights of the arms that have them.
        pose_noise: metres; each keypoint is off by a fixed normal error (`perceive.disturb`).
        engine: see EnvConfig.
        steer: see SteerConfig; arms in SINGLE run with one particle.
    """

    shifts: tuple[str, ...] = ("swapped", "moved", "unseen")
    arms: tuple[str, ...] = ARMS
    scenes: int = 300
    seed: int = 0
    batch: int = 100
    execute: int = 4
    guide: float = 20.0
    repel: float = 5.0
    pose_noise: float = 0.0
    engine: str = "auto"
    steer: SteerConfig = SteerConfig()

    def __post_init__(self):
        for what, names, known in (("shifts", self.shifts, SHIFTS), ("arms", self.arms, ARMS)):
            if unknown := [name for name in names if name not in known]:
                raise UserError(f"{what} has an unknown {unknown[0]!r}: choose among {', '.join(known)}")
        if "random" in self.arms and self.steer.norm != "particle":
            raise UserError("the arm 'random' has the gradient's norm only by steer.norm = 'particle': set it")
        if "reward_only" in self.arms and self.steer.inner:
            raise UserError("the arm 'reward_only' has no noise to go back to: set steer.inner = 0, or leave it out")
        for name in ("scenes", "batch", "execute"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")

    def arm(self, name: str) -> Arm:
        """What acts in an arm."""
        return Arm(
            guide=0.0 if name in ("base", "best_of_n", "repel_best") else self.guide,
            random=float(name == "random"),
            repel=self.repel if name in ("repel_best", "gradient_repel", "full") else 0.0,
            select=float(name not in SINGLE),
            resample=float(name in ("gradient_resample", "full")),
            alone=float(name == "reward_only"),
        )


@dataclasses.dataclass(frozen=True)
class Written:
    """The programs of one shift's scenes for one kind of target: None where there is none, and why."""

    programs: list[Program | None]
    failures: list[str]

    def complete(self) -> list[Program]:
        """With another scene's program where there is none, so that the scene can be run; it counts as a failure."""
        spare = next(program for program in self.programs if program is not None)
        return [program or spare for program in self.programs]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One shift, ready to run. target, wrong: programs for the commanded object and for another (in slot `other`)."""

    trials: Trials
    texts: list[str]
    found: list[Perceived]
    other: Int[np.ndarray, " B"]
    target: Written
    wrong: Written

    def written(self, arm: str) -> Written:
        """The programs that steer an arm."""
        return self.wrong if arm == "wrong_target" else self.target


class SteerStudy:
    """Runs the arms of one frozen policy.

    Args:
        policy, contract: as loaded from a run.
        writer: of the programs. A stored program with TARGET or OBSTACLE in it gets the names put in; any other writer
            is asked with the instruction, the keypoints and the numbered picture.
        switch_writer: a model that decides about stages; None leaves it to the deterministic switcher.
        source: chooses the noise from which every arm's first particle starts (see `steer.act`).
        pointer: a model that points at what the instruction is about. TARGET is then the place pointed at when the
            episode begins, not the mask of the commanded object. It knows no other target than the commanded one.

    Raises:
        UserError: the contract's actions do not move an end effector, or its data are not from the simulated table; an
            arm with another target, and a pointer.
    """

    def __init__(
        self,
        policy: Policy,
        contract: Contract,
        config: SteerStudyConfig,
        writer: Writer,
        switch_writer: Writer | None = None,
        source: NoiseSource | None = None,
        pointer: Pointer | None = None,
    ):
        if pointer and "wrong_target" in config.arms:
            raise UserError("a pointer points at the commanded object alone: leave the arm 'wrong_target' out")
        self.decoder = Decoder.of(contract)
        self.policy, self.contract, self.config = policy, contract, config
        self.world = World.of(contract, EvalConfig(engine=config.engine))
        self._writer, self._switch_writer, self._source = writer, switch_writer, source
        self._pointer = pointer
        self._graph, self._weights = nnx.split(policy)
        self._tables: dict[bool, Tabletop] = {}
        self._reset = jax.jit(Tabletop.reset, static_argnums=0)
        self._look = jax.jit(observe_images, static_argnums=(0, 3))
        self._prepared: dict[str, Prepared] = {}
        self._runners: dict[tuple, Callable] = {}

    def prepare(self, shift: str) -> Prepared:
        """Scenes, keypoints and programs of a shift.

        Raises:
            UserError: no scene has a program; the writer gives no reply; the arm 'wrong_target' with a reply that names
                no TARGET, as its program would be that of the other arms.
        """
        if shift in self._prepared:
            return self._prepared[shift]
        config, world = self.config, self.world
        cases = make_shift(shift, world.env.task, world.bias, config.seed, config.scenes, world.scene)
        tokens, mask = self.contract.encode(cases.text)
        table = self._table(shift)
        trials = Trials(cases.scene, cases.command, cases.cue, tokens, mask, np.arange(config.scenes))
        trials, found = jax.device_get(trials), []
        for rows, count in batches(config.scenes, config.batch):
            some = take_rows(trials, rows)
            state = self._reset(table, some.scene, some.command, some.cue)
            places = self._point(table, state, [cases.text[row] for row in rows]) if self._pointer else None
            found += perceive(table, state, places=places, count=count)
        other = wrong_targets(trials)
        replies = self._ask(cases.text, found)
        target = self._read(replies, trials, found, np.asarray(trials.command.target))
        if not any(target.programs):
            raise UserError(f"no scene of {shift!r} has a reward program: {target.failures[0]}")
        wrong = target
        if "wrong_target" in config.arms:
            if any(program and TARGET not in reply for reply, program in zip(replies, target.programs, strict=True)):
                raise UserError(
                    f"the arm 'wrong_target' puts another object in place of {TARGET}, and a reward program has none: "
                    f"write {TARGET} in the stored program, or leave the arm out"
                )
            wrong = self._read(replies, trials, found, other)
        self._prepared[shift] = Prepared(trials, list(cases.text), found, other, target, wrong)
        return self._prepared[shift]

    def _point(self, table: Tabletop, state: EnvState, texts: list[str]) -> Float[np.ndarray, "B 2"]:
        """Where the pointer sees what each instruction is about."""
        return self._pointer(self._look(table.model, state.bodies, state.scene, self._pointer.image_size), texts)

    def _table(self, shift: str) -> Tabletop:
        """The same one for the same kind of table: what is compiled for it is compiled once."""
        post = shift == "obstacle"
        if post not in self._tables:
            self._tables[post] = Tabletop(self.world.env, post)
        return self._tables[post]

    def _ask(self, texts: Sequence[str], found: Sequence[Perceived]) -> list[str]:
        """What the writer replies for each scene."""
        replies = []
        for text, one in zip(texts, found, strict=True):
            points = one.keypoints
            view = View(points.position, points.position)
            replies.append(self._writer(Request(make_prompt(text, points.labels, view), one.picture)))
        return replies

    def _read(self, replies: Sequence[str], trials: Trials, found: Sequence[Perceived], slots) -> Written:
        """One program a scene; what is wrong with a reply is kept, and its scene is a failure."""
        programs: list[Program | None] = []
        failures: list[str] = []
        for row, (reply, one) in enumerate(zip(replies, found, strict=True)):
            points, scene = one.keypoints, take_rows(trials.scene, row)
            reply = reply.replace(TARGET, POINTED if self._pointer else body_label(scene, int(slots[row])))
            reply = reply.replace(OBSTACLE, body_label(scene, POST_SLOT))
            try:
                programs.append(read_program(reply, points.labels, View(points.position, points.position)))
                failures.append("")
            except UserError as error:
                programs.append(None)
                failures.append(str(error))
        return Written(programs, failures)

    def run(self, shift: str, arm: str) -> dict[str, Any]:
        """The outcome of every scene, as JSON-able columns; a scene without a program is a failure (but for `base`).

        Raises:
            UserError: a reward that is not finite in some scene (it names the term), or a stage switcher that failed.
        """
        began = time.perf_counter()
        prepared, config = self.prepare(shift), self.config
        written = prepared.written(arm)
        outcomes: dict[int, Outcome] = {}
        programs = written.complete()
        for group in by_structure(programs):
            trials, memory = self._episodes(prepared, programs, group)
            outcomes |= self._run_group(trials, memory, arm, shift)
        outcome = jax.tree.map(lambda *leaves: np.stack(leaves), *(outcomes[row] for row in range(config.scenes)))
        columns = make_columns(prepared.trials, outcome, prepared.texts)
        failures = [""] * config.scenes if arm == "base" else written.failures
        columns["failure"] = failures
        columns["success"] = [ok and not why for ok, why in zip(columns["success"], failures, strict=True)]
        columns["touched"] = (np.asarray(outcome.pushed) > TOUCHED).tolist()
        columns["at_other"] = (np.asarray(outcome.nearest) == prepared.other).tolist()
        return {"shift": shift, "arm": arm, "seconds": round(time.perf_counter() - began, 1), **columns}

    def watch(self, shift: str, arm: str, scene: int) -> tuple[Recording, bool]:
        """What was seen and done in one scene, up to the end of its episode (without the axis B), and its success as
        `run` counts it.

        Raises:
            UserError: a stage switcher that failed.
        """
        prepared = self.prepare(shift)
        written = prepared.written(arm)
        rows = np.array([scene])
        trials, memory = self._episodes(prepared, written.complete(), rows)
        run, switcher = self._runner(shift, arm, record=True)
        outcome, seen, _ = jax.device_get(run(self._weights, trials, memory, self._strengths(arm)))
        if switcher is not None:
            switcher.raise_error()
        success = outcome.success[0] and (arm == "base" or not written.failures[scene])
        return jax.tree.map(lambda leaf: leaf[0, : outcome.ticks[0]], seen), bool(success)

    def _episodes(self, prepared: Prepared, programs: list[Program], rows) -> tuple[Trials, Memory]:
        """Scenes that are about to begin, whose programs have one structure."""
        attached = join(prepared.found)
        if self.config.pose_noise:
            attached = jax.device_get(disturb(attached, self.config.pose_noise, jax.random.key(self.config.seed)))
        memory = remember_nothing(stack([programs[row] for row in rows]), take_rows(attached, rows), self.policy)
        return take_rows(prepared.trials, rows), dataclasses.replace(memory, scene=rows.astype(np.int32))

    def _strengths(self, arm: str) -> Arm:
        return jax.tree.map(np.float32, self.config.arm(arm))

    def _run_group(self, trials: Trials, memory: Memory, arm: str, shift: str) -> dict[int, Outcome]:
        """The outcomes, by scene number, of scenes whose programs share a structure."""
        run, switcher = self._runner(shift, arm)
        outcomes: dict[int, Outcome] = {}
        for rows, count in batches(len(trials.index), self.config.batch):
            some, own = take_rows(trials, rows), take_rows(memory, rows)
            outcome, _, after = jax.device_get(run(self._weights, some, own, self._strengths(arm)))
            if switcher is not None:
                switcher.raise_error()
            if not after.loop.finite.all():
                row = int(np.flatnonzero(~after.loop.finite)[0])
                programs = self._prepared[shift].written(arm).complete()
                raise UserError(not_finite(programs[int(after.scene[row])], after, row))
            outcomes |= {int(some.index[row]): take_rows(outcome, row) for row in range(count)}
        return outcomes

    def _runner(self, shift: str, arm: str, record: bool = False) -> tuple[Callable, VlmSwitcher | None]:
        """The compiled rollout for an arm's number of particles; with a model as switcher it knows the scenes of its
        shift and the stages of the arm's programs."""
        table, particles = self._table(shift), 1 if arm in SINGLE else self.config.steer.particles
        key = (particles, record, table, (shift, arm == "wrong_target") if self._switch_writer else None)
        if key not in self._runners:
            switcher = None
            if self._switch_writer:
                prepared = self._prepared[shift]
                stages = [[stage.name for stage in one.stages] for one in prepared.written(arm).complete()]
                switcher = VlmSwitcher(self._switch_writer, prepared.texts, stages)
            steer = dataclasses.replace(self.config.steer, particles=particles)
            noise = jax.random.key(self.config.seed)
            own = functools.partial(self._rollout, table, steer, switcher, noise, record)
            self._runners[key] = jax.jit(own), switcher
        return self._runners[key]

    def _rollout(self, table, steer, switcher, noise, record, weights, trials: Trials, memory: Memory, arm: Arm):
        def steered(observation, tokens, token_mask, key, memory):
            policy, execute = nnx.merge(self._graph, weights), self.config.execute
            inputs = (observation, tokens, token_mask, key, memory, arm)
            return act(policy, self.decoder, steer, *inputs, execute=execute, switcher=switcher, source=self._source)

        times = {"execute": self.config.execute, "ticks": table.max_ticks}
        return rollout_with_memory(Watched(table), steered, trials, memory, noise, record=record, **times)


def batches(count: int, batch: int) -> Iterator[tuple[Int[np.ndarray, " B"], int]]:
    """Rows of each batch, the last one filled up with the last row, and how many of them are real."""
    for start in range(0, count, batch):
        yield np.minimum(np.arange(start, start + batch), count - 1), min(batch, count - start)


def by_structure(programs: Sequence[Program]) -> list[Int[np.ndarray, " B"]]:
    """The rows of programs that can be stacked."""
    groups: dict[Any, list[int]] = {}
    for row, program in enumerate(programs):
        groups.setdefault(jax.tree.structure(unnamed(program)), []).append(row)
    return [np.array(rows) for rows in groups.values()]


def wrong_targets(trials: Trials) -> Int[np.ndarray, " B"]:
    """In each scene an object that is not the commanded one, nor, where there is a third, the one the look names."""
    slots = np.arange(trials.scene.present.shape[1])
    other = np.asarray(trials.scene.present) & (slots != np.asarray(trials.command.target)[:, None])
    third = other & (slots != np.asarray(trials.cue.target)[:, None])
    return np.where(third.any(1), third.argmax(1), other.argmax(1))


def not_finite(program: Program, memory: Memory, row: int) -> str:
    """What to say of a scene, and its program, whose reward is not a finite number."""
    scene = int(memory.scene[row])
    view = View(memory.origin[row], memory.origin[row])
    path = np.zeros((2, 3), np.float32)
    for number, stage in enumerate(program.stages, 1):
        for index, term in enumerate(stage.terms, 1):
            if not np.isfinite(term(view, path)):
                return f"the reward of {place(number, stage.name, index, term.name)} is not finite in scene {scene}"
    return f"the reward is not finite in scene {scene}: its path is not"
