"""Policy, camera, physics and success in one compiled program, over a batch of scenes.

A rollout is a scan over replans. Each replan looks at the scene, asks the policy for a chunk of C actions and executes
the first `execute` of them in an inner scan of `env.step` (receding horizon). The policy's weights are arguments of the
program, so every checkpoint of one architecture runs through the same compiled code.

Axis legend: B scenes, L instruction length, C chunk length, A action width, T ticks, H x W picture, N object slots.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from vla_jax.envs.scene import Command, Scene
from vla_jax.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trials:
    """What a policy is put through. `index` numbers the scene and, with the seed, fixes the policy's noise there."""

    scene: Scene
    command: Command  # what is asked for; decides success
    cue: Command  # what the look of the scene suggests
    tokens: Int[Array, "B L"]
    token_mask: Bool[Array, "B L"]
    index: Int[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outcome:
    """How each scene ended: at its success or, without one, at the last tick."""

    success: Bool[Array, "B"]
    cue_success: Bool[Array, "B"]  # what the cue suggests was fulfilled (before success, if that came)
    ticks: Int[Array, "B"]  # control ticks lived through
    distance: Float[Array, "B"]  # metres from the gripper's tool point to the commanded object
    nearest: Int[Array, "B"]  # object slot nearest to the tool point
    pushed: Float[Array, "B"]  # metres that another object than the commanded one has moved: the farthest of them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recording:
    """What was seen and done, at the beginning of every tick."""

    pictures: UInt8[Array, "B T H W 3"]  # front view
    path: Float[Array, "B T 3"]  # the gripper's tool point, metres


def rollout(
    env,
    act: Callable,
    trials: Trials,
    key: Key[Array, ""],
    *,
    execute: int,
    ticks: int,
    record: bool = False,
) -> tuple[Outcome, Recording | None]:
    """Runs `act` in closed loop on every scene; pure and traceable.

    Args:
        env: `reset(scene, command, cue)`, `observe(state)`, `step(state, action)` over a batch (`envs.env.Tabletop`).
        act: `(observation, tokens, token_mask, key) -> Float[B C A]`, actions in SI units.
        trials: the scenes and instructions.
        key: with `trials.index`, fixes the policy's noise: another policy meets the same noise on the same scene,
            whatever else is in the batch.
        execute: actions of a chunk that are executed before the policy is asked again, 1 .. C.
        ticks: control ticks an episode lasts.
        record: also return pictures and paths.

    Returns:
        The outcomes and, when recording, the recordings (else None).
    """

    def forgetful(*arguments):
        *rest, memory = arguments
        return act(*rest), memory

    memory = jnp.zeros(trials.index.shape)
    return rollout_with_memory(env, forgetful, trials, memory, key, execute=execute, ticks=ticks, record=record)[:2]


def rollout_with_memory(
    env,
    act: Callable,
    trials: Trials,
    memory: Any,
    key: Key[Array, ""],
    *,
    execute: int,
    ticks: int,
    record: bool = False,
) -> tuple[Outcome, Recording | None, Any]:
    """`rollout` of a policy that remembers.

    Args:
        act: `(observation, tokens, token_mask, key, memory) -> (Float[B C A], memory)`.
        memory: a pytree with the leading axis B.

    Returns:
        The outcomes, the recordings, and what is remembered in the end.
    """
    scene_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, trials.index)

    def act_alone(observation, tokens, token_mask, key, memory):
        observation, tokens, token_mask, memory = _add_batch_axis((observation, tokens, token_mask, memory))
        return jax.tree.map(lambda leaf: leaf[0], act(observation, tokens, token_mask, key, memory))

    def tick(carry, action):
        state, outcome, now = carry
        seen = Recording(env.observe(state)["images"]["front"], state.bodies.tcp_position) if record else None
        state = env.step(state, action)
        # A finished scene goes on moving harmlessly; what is reported of it no longer changes.
        live = ~outcome.success & (now < ticks)
        measured = _measure(state, now + 1)
        outcome = jax.tree.map(lambda new, old: jnp.where(live, new, old), measured, outcome)
        return (state, outcome, now + 1), seen

    def replan(carry, number):
        carry, memory = carry
        keys = jax.vmap(jax.random.fold_in, (0, None))(scene_keys, number)
        observation = env.observe(carry[0])
        chunk, memory = jax.vmap(act_alone)(observation, trials.tokens, trials.token_mask, keys, memory)
        if not 1 <= execute <= chunk.shape[1]:
            raise UserError(f"execute={execute}, but the policy's chunks hold {chunk.shape[1]} actions: take 1 to that")
        carry, seen = jax.lax.scan(tick, carry, jnp.swapaxes(chunk[:, :execute], 0, 1))
        return (carry, memory), seen

    state = env.reset(trials.scene, trials.command, trials.cue)
    start = (state, _measure(state, 0), jnp.int32(0))
    replans = jnp.arange(math.ceil(ticks / max(execute, 1)))
    ((_, outcome, _), memory), seen = jax.lax.scan(replan, (start, memory), replans)
    recording = jax.tree.map(lambda leaf: jnp.moveaxis(leaf.reshape(-1, *leaf.shape[2:])[:ticks], 1, 0), seen)
    return outcome, recording, memory


def _add_batch_axis(tree):
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _measure(state, now) -> Outcome:
    offsets = state.bodies.object_position - state.bodies.tcp_position[:, None]
    distances = jnp.linalg.norm(offsets, axis=-1)
    moved = jnp.linalg.norm(state.bodies.object_position - state.start, axis=-1)
    others = state.scene.present & (jnp.arange(moved.shape[1]) != state.command.target[:, None])
    return Outcome(
        success=state.success,
        cue_success=state.cue_success,
        ticks=jnp.full_like(state.command.target, now),
        distance=jnp.take_along_axis(distances, state.command.target[:, None], axis=1)[:, 0],
        nearest=jnp.argmin(jnp.where(state.scene.present, distances, jnp.inf), axis=1).astype(jnp.int32),
        pushed=jnp.where(others, moved, 0.0).max(1),
    )


def make_rollout(env, *, execute: int, ticks: int, sampler_steps: int, record: bool = False) -> Callable:
    """The compiled form: `run(graphdef, weights, trials, key, guidance)` with `graphdef, weights = nnx.split(policy)`.

    `graphdef` is static and compares by content: checkpoints of one architecture share one compilation per batch shape.
    guidance: see `Policy.act`; None, or numbers that may change without a compilation.
    """

    def run(graphdef, weights, trials, key, guidance=None):
        def act(observation, tokens, token_mask, key):
            policy = nnx.merge(graphdef, weights)
            return policy.act(observation, tokens, token_mask, key, sampler_steps, guidance)

        return rollout(env, act, trials, key, execute=execute, ticks=ticks, record=record)

    return jax.jit(run, static_argnums=0)


def in_batches(
    run: Callable,
    graphdef,
    weights,
    trials: Trials,
    key: Key[Array, ""],
    batch: int,
    guidance: float | tuple[float, ...] | None = None,
) -> Iterator:
    """Runs any number of trials through one fixed batch shape; yields numpy (Outcome, Recording) of the real ones.

    The last batch is filled up with repeats of the last trial, which are dropped from what is yielded.
    """
    count = trials.index.shape[0]
    for start in range(0, count, batch):
        rows = np.minimum(np.arange(start, start + batch), count - 1)
        yield take_rows(
            run(graphdef, weights, take_rows(trials, rows), key, guidance), slice(min(batch, count - start))
        )


def take_rows(tree: Any, rows: slice | Int[np.ndarray, "R"]) -> Any:
    """Indexes the leading axis of every leaf on the host, where a new shape costs no compilation."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], tree)


def concatenate(parts: list[Any]) -> Any:
    """Joins pytrees of arrays along their leading axis."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
