"""One sampler, composed of transforms.

A transform is an (init, update) pair. `init(noise)` makes its state; `update(x, v, t, state)` is called at every step
after the velocity is known and before it is followed, and returns (x, v, state). So a transform can bend the velocity,
move the point, or carry a memory (and a random key) from step to step, and `chain` puts several in a row. Once more,
`update` is called at the end, at t = 1 and with no velocity: there what moves points has the last word (a final
selection, say), and what bends velocities has no effect.

Axes: S scenes, P particles (samples that may see each other), C chunk length, A action width. A transform that lets
particles see each other takes axis -3 for the particles; all axes before it are scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Field = Callable[[Float[Array, "*B C A"], Float[Array, ""]], Float[Array, "*B C A"]]
"""A velocity field: (x, t) -> v, one t for the whole batch."""

METHODS = ("euler", "heun")


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
    steps: int | Sequence[float],
    method: str = "euler",
    transform: Transform = identity,
) -> Float[Array, "*B C A"]:
    """Integrate dx/dt = velocity(x, t) from noise (t = 0) to data (t = 1). Differentiable in both modes.

    Args:
        velocity: the field. By Euler it is evaluated at the left ends of the steps only.
        noise: x_0.
        steps: how many equal steps, or the grid itself: rising times from 0 to 1.
        method: "euler", or "heun" (the mean of the field at both ends of the Euler step: second order, two evaluations
            a step). Transforms meet one velocity a step, by Heun the mean; what they add is of first order.
        transform: see the head of this file.

    Raises:
        ValueError: no step, a grid that does not rise from 0 to 1, or an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"solve knows the methods {' and '.join(METHODS)}, not {method!r}")
    grid = _grid(steps)

    def step(carry, span):
        x, state = carry
        t, end, h = span
        v = velocity(x, t)
        if method == "heun":
            v = (v + velocity(x + h * v, end)) / 2
        x, v, state = transform.update(x, v, t, state)
        return (x + h * v, state), None

    spans = tuple(jnp.asarray(part, jnp.float32) for part in (grid[:-1], grid[1:], np.diff(grid)))
    (x, state), _ = lax.scan(step, (noise, transform.init(noise)), spans)
    return transform.update(x, jnp.zeros_like(x), jnp.float32(1.0), state)[0]


def _grid(steps: int | Sequence[float]) -> Float[np.ndarray, " N"]:
    if isinstance(steps, int):
        if steps < 1:
            raise ValueError(f"solve needs at least one step, got {steps}")
        return np.arange(steps + 1) / steps
    grid = np.asarray(steps, float)
    if grid.ndim != 1 or len(grid) < 2 or grid[0] != 0 or grid[-1] != 1 or np.diff(grid).min() <= 0:
        raise ValueError(f"a grid of times rises from 0 to 1, got {tuple(steps)}")
    return grid
