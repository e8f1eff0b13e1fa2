"""How likely data are under a flow: exactly, and cheaply up to a number that fields share.

Axes: B batch, R noise draws of one sample, C chunk length, A action width, D = C A.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vla_jax.flow.path import point
from vla_jax.flow.solve import Field

TIMES = (0.02, 0.999)  # of `relative_log_likelihood`; what lies beyond weighs next to nothing


def log_density(
    velocity: Field, data: Float[Array, "B C A"], dimensions: Bool[Array, "B A"] | None = None, *, steps: int = 16
) -> Float[Array, " B"]:
    """log p(data) in nats, p being the law of x_1 for dx/dt = velocity(x, t) from x_0 ~ N(0, 1).

    log p(x_1) = log N(x_0) - integral of the divergence along the path (Chen et al., arXiv 1806.07366), from t = 1 back
    to t = 0 with `steps` steps of the classical Runge-Kutta method. The divergence is the full trace of the Jacobian,
    one forward derivative for each of the D dimensions, not an estimate. Units are those of `data`: a change of units
    adds the log-determinant of its scale. A sample must not depend on the others of the batch.

    dimensions: those that a sample's robot has (None: all); data and velocity are 0 in the others, which count nothing.
    """
    size = data.shape[1] * data.shape[2]
    basis = jnp.eye(size, dtype=data.dtype).reshape(size, *data.shape[1:])

    def slope(x, t):
        """The velocity and its divergence."""

        def derivative(direction):
            v, change = jax.jvp(lambda x: velocity(x, t), (x,), (jnp.broadcast_to(direction, x.shape),))
            return v, (change * direction).sum((-2, -1))

        v, diagonal = jax.vmap(derivative, out_axes=(None, 0))(basis)
        return v, diagonal.sum(0)

    def step(carry, t):
        x, lost = carry
        h = -1.0 / steps
        first = slope(x, t)
        second = slope(x + h / 2 * first[0], t + h / 2)
        third = slope(x + h / 2 * second[0], t + h / 2)
        fourth = slope(x + h * third[0], t + h)
        moved, gained = (
            h / 6 * (a + 2 * b + 2 * c + d) for a, b, c, d in zip(first, second, third, fourth, strict=True)
        )
        return (x + moved, lost - gained), None

    times = 1.0 - jnp.arange(steps, dtype=jnp.float32) / steps
    (noise, lost), _ = lax.scan(step, (data, jnp.zeros(len(data), data.dtype)), times)
    numbers = size if dimensions is None else data.shape[1] * dimensions.sum(-1)
    return -0.5 * (jnp.square(noise).sum((-2, -1)) + numbers * np.log(2 * np.pi)) - lost


def relative_log_likelihood(
    velocity: Field, data: Float[Array, "B C A"], key: PRNGKeyArray, *, draws: int = 16
) -> Float[Array, " B"]:
    """log p(data) in nats but for a number that depends on data and key alone: only differences between fields count.

    log p1(data) - log p0(data) is the integral over t of t / (1 - t) times the expected difference of the summed
    squared velocity errors, e0 - e1: the pointwise I-MMSE relation (Kong et al., arXiv 2302.03792) on the path x_t =
    (1 - t) noise + t data, whose signal-to-noise ratio is t^2 / (1 - t)^2. In s = log t / (1 - t) it is the integral of
    t^2 (e0 - e1) ds: a law as narrow as 0.01 is felt only where 1 - t is about 0.01, and times that are uniform in s,
    find it there. Exact for exact fields and many draws. Three things keep the variance of a difference low: under one
    key the fields meet the same noise and times, the times are stratified, and each sees its noise and the negative of
    it, which cancels what is odd in the noise (all of the variance, if both laws are Gaussian and as wide).

    draws: of times; the field is evaluated at twice as many points.
    """
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (draws, *data.shape), data.dtype)
    first, last = (np.log(t / (1 - t)) for t in TIMES)
    share = (jnp.arange(draws) + jax.random.uniform(time_key, (draws,))) / draws
    time = jax.nn.sigmoid(first + (last - first) * share)

    def error(noise, t):
        return jnp.square(velocity(point(noise, data, t), t) - (data - noise)).sum((-2, -1))

    errors = jax.vmap(error)(jnp.concatenate([noise, -noise]), jnp.tile(time, 2))
    return -(last - first) * (errors * jnp.square(jnp.tile(time, 2))[:, None]).mean(0)
