"""Sampler transforms: ways to bend the velocity while `solve` follows it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.flow.solve import Field, Transform

Weight = Float[Array, ""] | Float[Array, " W"] | float
"""A number, or a schedule: W of them for W equal parts of the time from 0 to 1."""


def extrapolate(reference: Field, weight: Weight) -> Transform:
    """v <- v_ref + w (v - v_ref): away from what a reference field would do, towards what only this one would.

    Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) written for velocities; with a vision-only reference it
    is counterfactual action guidance for policies (arXiv 2602.17659). w = 1 changes nothing, w = 0 follows the
    reference, w > 1 exaggerates the difference. `weight` may be traced, so that one compiled sampler serves every w;
    as a schedule it can be kept to a part of the path (arXiv 2404.07724).
    """
    schedule = jnp.atleast_1d(jnp.asarray(weight, jnp.float32))

    def update(x, v, t, state):
        start = reference(x, t)
        part = jnp.minimum(jnp.floor(t * len(schedule)), len(schedule) - 1).astype(jnp.int32)
        return x, start + schedule[part] * (v - start), state

    return Transform(lambda noise: (), update)
