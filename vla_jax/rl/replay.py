"""Experience as arrays on the device: a ring that is written and sampled inside the compiled loop.

Axes: N capacity, B scenes, R rows drawn, D numbers of one noise, C chunk length, A action width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transition:
    """One chunk of a scene. Both observations are what the policy's trunk made of the scene, computed once."""

    observation: Any  # pytree, leading axis B
    noise: Float[Array, "B D"]  # that the chunk was made from
    chunk: Float[Array, "B C A"]  # as it was sent to the robot, in model units
    reward: Float[Array, " B"]
    discount: Float[Array, " B"]  # of the next value: 0 after success, and not at the time limit
    next_observation: Any  # the last one of the episode where it ends, not the first of the next episode
    episode: Int[Array, " B"]  # a number that no other episode in the ring has


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replay:
    """The newest N transitions; rows from `size` on are not written yet."""

    rows: Transition  # leading axis N
    cursor: Int[Array, ""]  # the row that is written next
    size: Int[Array, ""]

    @property
    def capacity(self) -> int:
        """N."""
        return self.rows.reward.shape[0]

    def add(self, transitions: Transition) -> Replay:
        """With B new rows, which take the place of the oldest where there is no room. B <= N."""
        count = transitions.reward.shape[0]
        where = (self.cursor + jnp.arange(count)) % self.capacity
        rows = jax.tree.map(lambda ring, new: ring.at[where].set(new), self.rows, transitions)
        return Replay(rows, (self.cursor + count) % self.capacity, jnp.minimum(self.size + count, self.capacity))

    def take(self, indices: Int[Array, " R"]) -> Transition:
        """These rows."""
        return jax.tree.map(lambda ring: ring[indices], self.rows)

    def sample(self, key: PRNGKeyArray, count: int) -> Transition:
        """`count` rows drawn evenly, with replacement, from those that are written."""
        return self.take(jax.random.randint(key, (count,), 0, jnp.maximum(self.size, 1)))

    def succeeded(self) -> Bool[Array, " N"]:
        """Which rows belong to an episode that ended in success, as far as its last row is still there."""
        written = jnp.arange(self.capacity) < self.size
        number = self.rows.episode % (2 * self.capacity)
        won = jnp.zeros(2 * self.capacity, bool).at[number].max(written & (self.rows.discount == 0))
        return written & won[number]


def empty(example: Transition, capacity: int) -> Replay:
    """A ring for rows like those of `example` (arrays or shapes with a leading axis)."""
    rows = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape[1:]), leaf.dtype), example)
    return Replay(rows, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
