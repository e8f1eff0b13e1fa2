"""Many scenes at once, chunk by chunk, each beginning anew when its episode is over.

An episode ends in success, after which nothing is to be had (discount 0), or at the time limit, which the policy cannot
see and which therefore is no end to its value: the last observation's value still counts (Pardo et al., arXiv
1712.00378).

Axes: B scenes, P scenes of the pool, D numbers of one noise, L instruction length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vla_jax.errors import UserError
from vla_jax.evaluation.rollout import Trials
from vla_jax.rl.frozen import Flow
from vla_jax.rl.replay import Transition


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scenes:
    """B episodes that are going on."""

    state: Any  # of the environment
    trial: Int[Array, " B"]  # number in the pool
    chunks: Int[Array, " B"]  # executed so far
    episode: Int[Array, " B"]
    begun: Int[Array, ""]  # episodes so far
    observation: Any  # what the policy's trunk made of the present


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ends:
    """Which episodes ended with this chunk, and which of them in success."""

    ended: Bool[Array, " B"]
    success: Bool[Array, " B"]


def sparse_reward(state: Any, success: Bool[Array, " B"]) -> Float[Array, " B"]:
    """-1 for a chunk that did not bring success, 0 for the one that did."""
    return jnp.where(success, 0.0, -1.0)


class Collector:
    """Steps a batch of scenes by one chunk. Pure and traceable."""

    def __init__(
        self,
        env: Any,
        flow: Flow,
        *,
        execute: int,
        ticks: int,
        discount: float,
        reward: Callable[[Any, Bool[Array, " B"]], Float[Array, " B"]] = sparse_reward,
    ):
        """
        Args:
            env: see `evaluation.rollout.rollout`.
            execute: actions of a chunk that are executed.
            ticks: control ticks of an episode, a multiple of `execute`.
            discount: of the next value, a chunk.
            reward: of the state after a chunk and of whether that chunk brought success.
        """
        if not 1 <= execute <= flow.shape[0]:
            raise UserError(f"eval.execute = {execute}, but the policy's chunks hold {flow.shape[0]} actions")
        if ticks % execute:
            raise UserError(f"an episode of {ticks} ticks is no whole number of chunks: set eval.execute to a divisor")
        self.env, self.flow, self.execute, self.chunks = env, flow, execute, ticks // execute
        self.discount, self.reward = discount, reward

    def start(self, weights: Any, pool: Trials, scenes: int, key: PRNGKeyArray) -> Scenes:
        """The first state of B scenes drawn from the pool."""
        trial = jax.random.randint(key, (scenes,), 0, len(pool.index))
        state = self._reset(pool, trial)
        zeros, numbers = jnp.zeros(scenes, jnp.int32), jnp.arange(scenes, dtype=jnp.int32)
        return Scenes(state, trial, zeros, numbers, jnp.int32(scenes), self._read(weights, pool, trial, state))

    def step(
        self, weights: Any, pool: Trials, scenes: Scenes, noise: Float[Array, "B D"], key: PRNGKeyArray
    ) -> tuple[Scenes, Transition, Ends]:
        """Executes the chunk that the noise makes in every scene. key: draws the scenes that follow ended ones."""
        chunk = self.flow.decode(weights, scenes.observation, self.flow.spread(noise))
        actions = jnp.swapaxes(self.flow.to_robot(weights, chunk)[:, : self.execute], 0, 1)
        state, _ = jax.lax.scan(lambda state, action: (self.env.step(state, action), None), scenes.state, actions)
        success = state.success
        ended = success | (scenes.chunks + 1 >= self.chunks)
        transition = Transition(
            observation=scenes.observation,
            noise=noise,
            chunk=chunk,
            reward=self.reward(state, success),
            discount=self.discount * (1.0 - success),
            next_observation=self._read(weights, pool, scenes.trial, state),
            episode=scenes.episode,
        )
        drawn = jax.random.randint(key, ended.shape, 0, len(pool.index))
        trial = jnp.where(ended, drawn, scenes.trial)
        fresh = self._reset(pool, trial)
        state = _choose(ended, fresh, state)
        # Scenes that go on keep what was read of them a moment ago.
        read = _choose(ended, self._read(weights, pool, trial, fresh), transition.next_observation)
        number = scenes.begun + jnp.cumsum(ended) - 1
        following = Scenes(
            state=state,
            trial=trial,
            chunks=jnp.where(ended, 0, scenes.chunks + 1),
            episode=jnp.where(ended, number, scenes.episode).astype(jnp.int32),
            begun=(scenes.begun + ended.sum()).astype(jnp.int32),
            observation=read,
        )
        return following, transition, Ends(ended, success)

    def _reset(self, pool: Trials, trial: Int[Array, " B"]) -> Any:
        scene, command, cue = jax.tree.map(lambda leaf: leaf[trial], (pool.scene, pool.command, pool.cue))
        return self.env.reset(scene, command, cue)

    def _read(self, weights: Any, pool: Trials, trial: Int[Array, " B"], state: Any) -> Any:
        return self.flow.read(weights, self.env.observe(state), pool.tokens[trial], pool.token_mask[trial])


def _choose(which: Bool[Array, " B"], yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(which.reshape(-1, *(1,) * (a.ndim - 1)), a, b), yes, no)
