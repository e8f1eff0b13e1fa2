"""Sampler transforms that follow other fields and targets: ways to bend the velocity while `solve` follows it.

`guidance.py` bends it by the gradient of a reward, `particles.py` lets samples see each other.

Axes: C chunk length, A action width, W parts of the time from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vla_jax.flow.solve import Field, Transform

Weight = Float[Array, ""] | Float[Array, " W"] | float | Callable[[Float[Array, ""]], Float[Array, ""]]
"""A number, W of them for W equal parts of the time from 0 to 1, or a function of t. May be traced."""


def weigh(weight: Weight, t: Float[Array, ""]) -> Float[Array, ""]:
    """The weight at time t."""
    if callable(weight):
        return weight(t)
    schedule = jnp.atleast_1d(jnp.asarray(weight, jnp.float32))
    part = jnp.minimum(jnp.floor(t * len(schedule)), len(schedule) - 1).astype(jnp.int32)
    return schedule[part]


def clean_estimate(x: Float[Array, "*B C A"], v: Float[Array, "*B C A"], t: Float[Array, ""]) -> Float[Array, "*B C A"]:
    """E[data | x_t] = x + (1 - t) v, for an exact field."""
    return x + (1 - t) * v


def extrapolate(reference: Field, weight: Weight) -> Transform:
    """v <- v_ref + w (v - v_ref): away from what a reference field would do, towards what only this one would.

    Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) written for velocities; with a vision-only reference it
    is counterfactual action guidance for policies (arXiv 2602.17659). w = 1 changes nothing, w = 0 follows the
    reference, w > 1 exaggerates the difference. `weight` may be traced, so that one compiled sampler serves every w;
    as a schedule it can be kept to a part of the path (arXiv 2404.07724).
    """

    def update(x, v, t, state):
        w = weigh(weight, t)
        return x, (1 - w) * reference(x, t) + w * v, state  # so written, both w = 1 and w = 0 are exact

    return Transform(lambda noise: (), update)


def attract(
    velocity: Field,
    target: Float[Array, "*#B C A"],
    weight: Weight = 1.0,
    *,
    mask: Float[Array, "*#B #C #A"] | float = 1.0,
    limit: float = 5.0,
) -> Transform:
    """Pseudo-inverse guidance towards a target: v <- v + w min(limit, s(t)) J' mask (target - x_1(x)).

    x_1(x) = x + (1 - t) velocity(x, t) is the clean estimate, J its Jacobian through the network (one backward pass a
    step), and s(t) = (1 - t) / (t r^2) with r^2 = (1 - t)^2 / (t^2 + (1 - t)^2), the variance of x_1 given x_t for
    data ~ N(0, 1): then, without a limit, it is the exact conditional law (Song et al., "Pseudoinverse-guided
    diffusion models"; for flows Pokle et al., arXiv 2310.04432, and eqs. 2 to 4 of Black et al., arXiv 2506.07339,
    from where the limit comes: with few steps the growing s overshoots).

    velocity: the field that is solved, or one of the same policy. mask: 0 where the target says nothing, 1 where it
    holds, and between: how much it counts.
    """

    def update(x, v, t, state):
        clean, pull_back = jax.vjp(lambda x: clean_estimate(x, velocity(x, t), t), x)
        (pull,) = pull_back(jnp.broadcast_to(mask * (target - clean), clean.shape))
        scale = jnp.minimum(limit, (t**2 + (1 - t) ** 2) / jnp.maximum(t * (1 - t), 1e-6))
        return x, v + weigh(weight, t) * scale * pull, state

    return Transform(lambda noise: (), update)


def soft_mask(chunk: int, frozen: int, fresh: int) -> Float[np.ndarray, " C"]:
    """How much each action of a chunk is bound to the chunk before: eq. 5 of arXiv 2506.07339.

    1 for the first `frozen` actions, which will have been executed before the new chunk is known, 0 for the last
    `fresh`, of which the old chunk says nothing, and an exponential decay between.

    Raises:
        ValueError: frozen + fresh > chunk.
    """
    if frozen < 0 or fresh < 0 or frozen + fresh > chunk:
        raise ValueError(f"a chunk of {chunk} actions cannot hold {frozen} frozen and {fresh} fresh ones")
    index = np.arange(chunk)
    share = np.clip((chunk - fresh - index) / (chunk - fresh - frozen + 1), 0, 1)
    between = share * np.expm1(share) / np.expm1(1)
    return np.where(index < frozen, 1.0, np.where(index < chunk - fresh, between, 0.0)).astype(np.float32)


def inpaint(
    velocity: Field,
    previous: Float[Array, "*#B C A"],
    weight: Weight = 1.0,
    *,
    executed: int,
    frozen: int,
    limit: float = 5.0,
) -> Transform:
    """Real-time chunking (arXiv 2506.07339): the new chunk continues the one that is still being executed.

    The new chunk begins `executed` actions after `previous` did, and is attracted to what is left of it under a soft
    mask: the first `frozen` actions, executed while it is computed, are bound to it, the last `executed` are free.
    """
    mask = soft_mask(previous.shape[-2], frozen, executed)[:, None]
    return attract(velocity, jnp.roll(previous, -executed, axis=-2), weight, mask=mask, limit=limit)
