"""Guidance by the gradient of a reward.

Axes: S scenes, P particles, C chunk length, A action width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.flow.solve import Field, Transform
from vla_jax.flow.transforms import Weight, clean_estimate, weigh

Reward = Callable[[Float[Array, "*B C A"], Float[Array, ""]], Float[Array, "*B"]]
"""(x, t) -> reward of each sample, a function of that sample alone. t is the time of the point that it is shown: 1 for
clean actions and their estimates. A reward of actions ignores it."""

POINTS = ("noisy", "clean", "jacobian")
NORMS = ("none", "clip", "particle", "batch")


def guide(
    reward: Reward,
    weight: Weight,
    *,
    point: str = "clean",
    velocity: Field | None = None,
    norm: str = "particle",
    window: tuple[float, float] = (0.0, 1.0),
    strength: Callable[[Float[Array, "*B"]], Float[Array, "*B"]] | None = None,
) -> Transform:
    """v <- v + w * strength(R) * g / |g|, g the gradient of the reward: eq. 5 of VLS (arXiv 2602.03973).

    Args:
        reward: R.
        weight: w; `tilt` makes an unnormalised gradient of log E[exp R(x_1) | x_t] the field of the law p exp(R).
        point: where R is measured. "noisy": on x_t itself, as in VLS; "clean": on the estimate x_1 = x + (1 - t) v, v
            held fast (no backward pass); "jacobian": on the same with the derivative through the network.
        velocity: the field, for "jacobian" only.
        norm: "particle": each sample's gradient is made a unit vector; "clip": only if it is longer; "none"; "batch":
            by the norm over all particles of a scene, as in the released code, where the strength then falls with
            their number and with the number of steps.
        window: guided while window[0] <= t < window[1]. Unit vectors do not vanish at the optimum: to stop before the
            end lets the policy return to what it knows.
        strength: multiplier of each sample from its present reward (adaptive strength).

    Raises:
        ValueError: unknown point or norm, or "jacobian" without a field.
    """
    check_choice("point", point, POINTS)
    check_choice("norm", norm, NORMS)
    if (point == "jacobian") != (velocity is not None):
        raise ValueError("guide takes a velocity field for point='jacobian', and only for that")

    def update(x, v, t, state):
        field = velocity or (lambda x, t: v)
        measure = jax.value_and_grad(lambda x: _total(reward, *seen(point, x, field(x, t), t)), has_aux=True)
        (_, value), gradient = measure(x)
        amount = weigh(weight, t) * within(window, t)
        bend = amount * normalize(gradient, norm)
        if strength is not None:
            bend = strength(value)[..., None, None] * bend
        return x, v + bend, state

    return Transform(lambda noise: (), update)


def tilt(t: Float[Array, ""]) -> Float[Array, ""]:
    """(1 - t) / t: what a gradient of the log density at x_t is worth as a velocity, from v = (x + (1 - t) score) / t.

    Cut below t = 0.001; the gradient of log E[exp R(x_1) | x_t] is 0 at t = 0.
    """
    return (1 - t) / jnp.maximum(t, 1e-3)


def seen(
    point: str, x: Float[Array, "*B C A"], v: Float[Array, "*B C A"], t: Float[Array, ""]
) -> tuple[Float[Array, "*B C A"], Float[Array, ""]]:
    """The point at which a reward is measured, and its time."""
    return (x, t) if point == "noisy" else (clean_estimate(x, v, t), jnp.ones_like(t))


def within(window: tuple[float, float], t: Float[Array, ""]) -> Float[Array, ""]:
    """1 while window[0] <= t < window[1], else 0."""
    return ((t >= window[0]) & (t < window[1])).astype(jnp.float32)


def normalize(gradient: Float[Array, "*S P C A"], norm: str) -> Float[Array, "*S P C A"]:
    """Gradients by one of NORMS."""
    if norm == "none":
        return gradient
    axes = (-3, -2, -1) if norm == "batch" else (-2, -1)
    length = jnp.sqrt(jnp.square(gradient).sum(axes, keepdims=True))
    return gradient / (jnp.maximum(length, 1.0) if norm == "clip" else length + 1e-8)


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises ValueError for a value that is not known."""
    if value not in known:
        raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}")


def _total(reward, x, t):
    """The sum over samples, whose gradient is that of each, and the rewards themselves."""
    values = reward(x, t)
    return values.sum(), values
