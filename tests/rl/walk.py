"""A world to walk in: a point moves along a line by the sum of a chunk; success lies at 1 and beyond."""

import dataclasses

import jax
import jax.numpy as jnp

from vla_jax.evaluation.rollout import Trials
from vla_jax.rl.frozen import Flow


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WalkState:
    place: jax.Array
    success: jax.Array


class Walk:
    """A scene is where the point starts."""

    def reset(self, scene, command, cue):
        return WalkState(scene, jnp.zeros(scene.shape, bool))

    def observe(self, state):
        return state.place

    def step(self, state, action):
        place = state.place + action[:, 0]
        return WalkState(place, state.success | (place >= 1.0))


def make_pool(starts) -> Trials:
    starts = jnp.asarray(starts, jnp.float32)
    zeros = jnp.zeros(len(starts), jnp.int32)
    return Trials(starts, zeros, zeros, zeros[:, None], zeros[:, None] > 0, jnp.arange(len(starts)))


def walking(scale=1.0) -> Flow:
    """Chunks of one action: the noise times weights["pace"]. Features: the place, and one that is always 1."""

    def read(weights, observation, tokens, mask):
        return observation

    def features(observation):
        return jnp.stack([observation, jnp.ones_like(observation)], -1)

    def decode(weights, observation, noise):
        return weights["pace"] * noise

    return Flow(read, features, decode, lambda weights, chunk: chunk * scale, (1, 1))


WEIGHTS = {"pace": jnp.float32(0.5)}
