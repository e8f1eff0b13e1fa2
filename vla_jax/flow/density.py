"""How likely data are under a flow: the exact log-density by the instantaneous change of variables.

Axes: B batch, C chunk length, A action width, D = C A.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from vla_jax.flow.solve import Field


def log_density(velocity: Field, data: Float[Array, "B C A"], *, steps: int = 16) -> Float[Array, " B"]:
    """log p(data) in nats, p being the law of x_1 for dx/dt = velocity(x, t) from x_0 ~ N(0, 1).

    log p(x_1) = log N(x_0) - integral of the divergence along the path (Chen et al., arXiv 1806.07366), from t = 1 back
    to t = 0 with `steps` steps of the classical Runge-Kutta method. The divergence is the full trace of the Jacobian,
    one forward derivative for each of the D dimensions, not an estimate. Units are those of `data`: a change of units
    adds the log-determinant of its scale. A sample must not depend on the others of the batch.
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
    return -0.5 * (jnp.square(noise).sum((-2, -1)) + size * np.log(2 * np.pi)) - lost
