"""Collection, replay and updates in one compiled program.

    advance = make_advance(collector, learner, config, pool, rounds)
    state = begin(...)
    state, log = advance(weights, state)       # `rounds` rounds; the state's arrays are taken over

A round: every scene executes one chunk, the transitions go into the replay, the learner takes its updates (none before
the warm-up is over, in which the noise is the prior's). Randomness is a function of the run's key and the round's
number, so a run that goes on from a saved state takes exactly the rounds that an uninterrupted one takes.

Axes: B scenes, R rounds of a call, U updates of a round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from vla_jax.errors import UserError
from vla_jax.evaluation.rollout import Trials
from vla_jax.rl.collect import Collector, Scenes
from vla_jax.rl.replay import Replay, empty

Log = dict[str, Float[Array, " R"]]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How much is collected and how often something is learned.

    Attributes:
        scenes: B, simulated side by side.
        capacity: transitions in the replay.
        warmup: control steps with the prior's noise and without updates, counted in all budgets.
        updates: for each new transition.
    """

    scenes: int = 200
    capacity: int = 32_000
    warmup: int = 8_000
    updates: float = 0.5

    def __post_init__(self):
        for name in ("scenes", "capacity"):
            if getattr(self, name) < 1:
                raise UserError(f"loop.{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("warmup", "updates"):
            if getattr(self, name) < 0:
                raise UserError(f"loop.{name} is {getattr(self, name)}: it must not be negative")
        if self.capacity < self.scenes:
            raise UserError(f"loop.capacity = {self.capacity} must hold a round of loop.scenes = {self.scenes}")

    @property
    def updates_a_round(self) -> int:
        """U."""
        return max(1, round(self.updates * self.scenes)) if self.updates else 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopState:
    """Everything that a run changes."""

    round: Int[Array, ""]  # rounds done
    scenes: Scenes
    replay: Replay
    learner: Any
    key: UInt32[Array, " 2"]  # data of the run's key


def begin(collector: Collector, learner: Any, config: LoopConfig, pool: Trials, weights: Any, seed: int) -> LoopState:
    """The state before the first round."""
    learner_key, scene_key, run_key = jax.random.split(jax.random.key(seed), 3)
    learned = learner.init(learner_key, weights)

    def first(weights, pool):
        scenes = collector.start(weights, pool, config.scenes, scene_key)
        return scenes, _replay(collector, learner, config, weights, pool, scenes)

    scenes, replay = jax.jit(first)(weights, pool)
    state = LoopState(jnp.int32(0), scenes, replay, learned, jax.random.key_data(run_key))
    # Types and places as they are after a round: weak and undecided ones would cost a second compilation.
    device = jax.devices()[0]
    return jax.tree.map(lambda leaf: jax.device_put(leaf.astype(leaf.dtype), device), state)


def _replay(collector, learner, config, weights, pool, scenes) -> Replay:
    noise = jax.ShapeDtypeStruct((config.scenes, learner.width), jnp.float32)
    example = jax.eval_shape(lambda noise: collector.step(weights, pool, scenes, noise, jax.random.key(0))[1], noise)
    return empty(example, config.capacity)


def make_advance(collector: Collector, learner: Any, config: LoopConfig, pool: Trials, rounds: int) -> Callable:
    """The compiled `advance(weights, state) -> (state, Log)`, which takes over the state's arrays."""

    def advance(weights, pool, state: LoopState):
        return jax.lax.scan(
            lambda state, _: play(collector, learner, config, weights, pool, state), state, length=rounds
        )

    compiled = jax.jit(advance, donate_argnums=2)

    def run(weights, state: LoopState):
        return compiled(weights, pool, state)

    run.compiled = compiled
    return run


def play(
    collector: Collector, learner: Any, config: LoopConfig, weights: Any, pool: Trials, state: LoopState
) -> tuple[LoopState, dict[str, Float[Array, ""]]]:
    """One round."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.round)
    noise_key, prior_key, scene_key, update_key = jax.random.split(key, 4)
    warm = state.round * config.scenes * collector.execute >= config.warmup
    features = collector.flow.features(state.scenes.observation)
    chosen = learner.source(state.learner)(features, noise_key)
    noise = jnp.where(warm, chosen, jax.random.normal(prior_key, chosen.shape))
    acting = learner.weights(state.learner, weights)
    scenes, transition, ends = collector.step(acting, pool, state.scenes, noise, scene_key)
    replay = state.replay.add(transition)

    def update(learned):
        return learner.update(learned, weights, replay, update_key, config.updates_a_round)

    def wait(learned):
        return learned, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(update, learned)[1])

    learned, log = jax.lax.cond(warm, update, wait, state.learner) if config.updates_a_round else wait(state.learner)
    log = log | {
        "reward": transition.reward.mean(),
        "episodes": ends.ended.sum() * 1.0,
        "successes": ends.success.sum() * 1.0,
        "noise_rms": jnp.sqrt(jnp.mean(noise**2)),
        "chunk": jnp.abs(transition.chunk).max(),
        "learning": warm * 1.0,
    }
    return LoopState(state.round + 1, scenes, replay, learned, state.key), log
