"""Sampler transforms: ways to bend the velocity while `solve` follows it."""

from __future__ import annotations

from jaxtyping import Array, Float

from vla_jax.flow.solve import Field, Transform


def extrapolate(reference: Field, weight: Float[Array, ""] | float) -> Transform:
    """v <- v_ref + w (v - v_ref): away from what a reference field would do, towards what only this one would.

    Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) written for velocities; with a vision-only reference it
    is counterfactual action guidance for policies (arXiv 2602.17659). w = 1 changes nothing, w = 0 follows the
    reference, w > 1 exaggerates the difference. `weight` may be traced, so that one compiled sampler serves every w.
    """

    def update(x, v, t, state):
        start = reference(x, t)
        return x, start + weight * (v - start), state

    return Transform(lambda noise: (), update)
