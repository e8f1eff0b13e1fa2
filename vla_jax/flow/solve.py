"""One sampler, composed of transforms.

A transform is an (init, update) pair. `init(noise)` makes its state; `update(x, v, t, state)` is called at every step
after the velocity is known and before it is followed, and returns (x, v, state). So a transform can bend the velocity,
move the point, or carry a memory from step to step, and `chain` puts several in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Field = Callable[[Float[Array, "*B C A"], Float[Array, ""]], Float[Array, "*B C A"]]
"""A velocity field: (x, t) -> v, one t for the whole batch."""


class Transform(NamedTuple):
    """init(noise) -> state; update(x, v, t, state) -> (x, v, state)."""

    init: Callable[[Array], Any]
    update: Callable[[Array, Array, Array, Any], tuple[Array, Array, Any]]


identity = Transform(lambda noise: (), lambda x, v, t, state: (x, v, state))


def chain(*transforms: Transform) -> Transform:
    """Apply the transforms one after another; the state is the tuple of their states."""

    def init(noise):
        return tuple(transform.init(noise) for transform in transforms)

    def update(x, v, t, states):
        new = []
        for transform, state in zip(transforms, states, strict=True):
            x, v, state = transform.update(x, v, t, state)
            new.append(state)
        return x, v, tuple(new)

    return Transform(init, update)


def solve(
    velocity: Field,
    noise: Float[Array, "*B C A"],
    *,
    steps: int,
    transform: Transform = identity,
) -> Float[Array, "*B C A"]:
    """Integrate dx/dt = velocity(x, t) from noise (t = 0) to data (t = 1) with `steps` Euler steps.

    The field is evaluated at t = 0, 1/steps, ..., 1 - 1/steps. Differentiable in both modes.
    """
    if steps < 1:
        raise ValueError(f"solve needs at least one step, got {steps}")

    def step(carry, t):
        x, state = carry
        x, v, state = transform.update(x, velocity(x, t), t, state)
        return (x + v / steps, state), None

    times = jnp.arange(steps, dtype=jnp.float32) / steps
    return lax.scan(step, (noise, transform.init(noise)), times)[0][0]
