"""The straight path from noise to data, its time sampler and its loss.

One convention everywhere: t = 0 is noise, t = 1 is data, x_t = (1 - t) noise + t data, v = data - noise.

Axes: B batch, C chunk length, A action width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray


def point(
    noise: Float[Array, "*B C A"], data: Float[Array, "*B C A"], time: Float[Array, "*B"]
) -> Float[Array, "*B C A"]:
    """x_t = (1 - t) noise + t data."""
    t = time[..., None, None]
    return (1 - t) * noise + t * data


def velocity(noise: Float[Array, "*B C A"], data: Float[Array, "*B C A"]) -> Float[Array, "*B C A"]:
    """dx_t / dt = data - noise, the same at every t."""
    return data - noise


def sample_time(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, ...]:
    """t = (0.999 - b) / 0.999 with b ~ Beta(1.5, 1) cut at 0.999: in [0, 1], mean about 0.4, so noise is favoured.

    The distribution function of Beta(1.5, 1) is b^1.5, which is inverted exactly.
    """
    b = jax.random.uniform(key, shape) ** (1 / 1.5)
    return (0.999 - jnp.minimum(b, 0.999)) / 0.999


def squared_error(
    predicted: Float[Array, "*B C A"], target: Float[Array, "*B C A"], mask: Bool[Array, "*#B C"]
) -> Float[Array, "*B"]:
    """Mean of (predicted - target)^2 over the actions where `mask` is True; 0 where there is none. Float32."""
    error = jnp.square(predicted.astype(jnp.float32) - target).mean(-1)
    weight = jnp.broadcast_to(mask, error.shape).astype(jnp.float32)
    return (error * weight).sum(-1) / jnp.maximum(weight.sum(-1), 1.0)
