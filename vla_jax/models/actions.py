"""Action chunks as tokens of the trunk, so that the instruction can be read off the action: log p(l | a, v).

Axes: B batch, D model width, C chunk length, A action width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vla_jax.models.expert import BUCKETS, sinusoid
from vla_jax.nn.dense import Dense


class ActionReader(nnx.Module):
    """One token an action: a projection of the action, its place in the chunk, and how noisy it is."""

    def __init__(self, action_width: int, chunk: int, width: int, *, dtype: str, rngs: nnx.Rngs):
        self.action = Dense(action_width, width, dtype=dtype, rngs=rngs)
        self.time = Dense(width, width, dtype=dtype, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (chunk, width)))

    def __call__(self, actions: Float[Array, "B C A"], time: Float[Array, " B"]) -> Float[Array, "B C D"]:
        """actions: points x_t of the flow in model units; time: their t, 1 for clean actions."""
        x = self.action(actions)
        moment = self.time(sinusoid(jnp.floor(time * BUCKETS), x.shape[-1]))
        return x + moment[:, None] + self.position[...].astype(x.dtype)
