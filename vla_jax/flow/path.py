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
    predicted: Float[Array, "*B C A"], target: Float[Array, "*B C A"], mask: Bool[Array, "*#B C A"]
) -> Float[Array, "*B"]:
    """Mean of (predicted - target)^2 over what counts; 0 where nothing does. Float32.

    mask: True where an action is one of the episode and a dimension one of the robot; all actions of a sample have the
        same dimensions. The gradient of the others is exactly 0.

    Green-VLA (arXiv 2602.00919) leaves dimensions that a robot lacks out of the error, as a target of 0 there would
    teach nothing but padding. Its released code divides the sum over a batch by what counts in the batch, so that a
    robot of 14 dimensions pulls twice as hard as one of 7. Here every sample is divided by what counts in it: how much
    a robot matters is said by the weights of the mixture alone.
    """
    error = jnp.square(jnp.where(mask, predicted.astype(jnp.float32) - target, 0.0)).mean(-1).sum(-1)
    actions, dimensions = mask.any(-1).sum(-1), mask.any(-2).sum(-1)
    # The last factor is exactly 1 where no dimension is missing: a robot alone has the numbers of the plain mean.
    return error / jnp.maximum(actions, 1) * (mask.shape[-1] / jnp.maximum(dimensions, 1))
