"""Transforms of several samples of one scene: they repel each other, are drawn anew by their reward, are re-noised.

Axes: S scenes, P particles (axis -3 of a batch of chunks), C chunk length, A action width, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vla_jax.flow.guidance import NORMS, POINTS, Reward, check_choice, normalize, seen, within
from vla_jax.flow.solve import Field, Transform, identity
from vla_jax.flow.transforms import Weight, weigh

KERNELS = ("inverse", "rbf")
ENDS = ("draw", "best")


def flatten(x: Float[Array, "*S P C A"]) -> Float[Array, "*S P F"]:
    """A chunk's numbers as one vector."""
    return x.reshape(*x.shape[:-2], -1)


def repel(
    weight: Weight,
    *,
    features: Callable[[Float[Array, "*S P C A"]], Float[Array, "*S P F"]] = flatten,
    kernel: str = "inverse",
    bandwidth: float | None = None,
    norm: str = "none",
    window: tuple[float, float] = (0.0, 0.2),
) -> Transform:
    """v <- v - w grad U: particles of a scene drive each other apart in the space of `features`.

    Args:
        weight: w.
        features: what is compared, for example end-effector paths; by default the chunks themselves.
        kernel: U = sum over i != j of 1 / (d_ij + eps) ("inverse": eq. 8 of VLS, arXiv 2602.03973, which calls it RBF),
            or of exp(-d_ij^2 / (2 bandwidth^2)) ("rbf").
        bandwidth: of "rbf", in units of the features; None takes the scene's median distance at every step.
        norm: of the force, see `guide`.
        window: while window[0] <= t < window[1]: diversity is made early, while particles can still change their mode.

    Raises:
        ValueError: unknown kernel or norm.
    """
    check_choice("kernel", kernel, KERNELS)
    check_choice("norm", norm, NORMS)

    def potential(x):
        points = features(x)
        square = jnp.square(points[..., :, None, :] - points[..., None, :, :]).sum(-1)
        other = ~jnp.eye(points.shape[-2], dtype=bool)
        if kernel == "inverse":
            each = 1 / (jnp.sqrt(square + 1e-6) + 1e-6)
        else:
            each = jnp.exp(-square / (2 * (_median(square, other) if bandwidth is None else bandwidth**2)))
        return jnp.where(other, each, 0.0).sum()

    def update(x, v, t, state):
        force = normalize(-jax.grad(potential)(x), norm)
        return x, v + weigh(weight, t) * within(window, t) * force, state

    return Transform(lambda noise: (), update)


def _median(square: Float[Array, "*S P P"], other) -> Float[Array, "*S 1 1"]:
    """The median squared distance of two particles of a scene; a constant to the gradient."""
    pairs = jnp.where(other, lax.stop_gradient(square), jnp.nan)
    return jnp.maximum(jnp.nan_to_num(jnp.nanmedian(pairs, (-2, -1), keepdims=True)), 1e-6)


class Weighted(NamedTuple):
    """State of `resample`: the log weights since the last drawing, and the potential that they hold so far."""

    key: PRNGKeyArray
    log_weight: Float[Array, "*S P"]
    potential: Float[Array, "*S P"]


def resample(
    reward: Reward,
    key: PRNGKeyArray,
    *,
    weight: Weight = 1.0,
    point: str = "clean",
    window: tuple[float, float] = (0.0, 1.0),
    threshold: float = 0.5,
    end: str = "best",
) -> Transform:
    """Feynman-Kac steering: particles of a scene are drawn anew in proportion to exp(potential).

    A step multiplies each weight by exp(b R now - b R before), R measured at `point`; so the weights of a lineage
    multiply to exp(b R(x_1)), and a particle drawn at the end follows p(x_1) exp(b R(x_1)), p being the law of the
    sampler (Singhal et al., arXiv 2501.06848, difference potentials; VLS, arXiv 2602.03973, eq. 9, weighs by exp R at
    every step, which counts R once a step). Drawing is systematic, and happens only when the effective sample size
    falls below `threshold` P. Other transforms' memories of single particles are not drawn along.

    The sampler is deterministic: particles drawn twice stay together unless something moves them apart (`mcmc`).

    Args:
        reward: R. weight: b, an inverse temperature. point: see `guide`.
        window: potentials are looked at while window[0] <= t < window[1], and at the end.
        threshold: share of P.
        end: at t = 1, "draw" draws once more, so that the particles are an unweighted sample; "best" sorts them by
            falling reward, so that particle 0 is the best one.

    Raises:
        ValueError: unknown point or end.
    """
    check_choice("point", point, POINTS[:2])
    check_choice("end", end, ENDS)

    def init(noise):
        zeros = jnp.zeros(noise.shape[:-2])
        return Weighted(key, zeros, zeros)

    def update(x, v, t, state):
        key, draw_key = jax.random.split(state.key)
        last = t >= 1.0
        potential = jnp.where(
            last | (within(window, t) > 0), weigh(weight, t) * reward(*seen(point, x, v, t)), state.potential
        )
        log_weight = state.log_weight + potential - state.potential
        index = systematic(draw_key, log_weight)
        # At the end an even sample is left alone, an uneven one drawn whatever its effective size.
        enough = jnp.where(last, 1 - 1e-5, threshold)
        draw = effective_size(log_weight) < enough * log_weight.shape[-1]
        if end == "best":
            index = jnp.where(last, jnp.argsort(-potential, -1, stable=True), index)
            draw |= last
        index = jnp.where(draw[..., None], index, jnp.arange(index.shape[-1]))
        x, v = (jnp.take_along_axis(each, index[..., None, None], axis=-3) for each in (x, v))
        log_weight = jnp.where(draw[..., None], 0.0, log_weight)
        return x, v, Weighted(key, log_weight, jnp.take_along_axis(potential, index, axis=-1))

    return Transform(init, update)


def effective_size(log_weight: Float[Array, "*S P"]) -> Float[Array, "*S"]:
    """(sum w)^2 / sum w^2: how many equally weighted particles the weights are worth."""
    return jnp.exp(2 * jax.nn.logsumexp(log_weight, -1) - jax.nn.logsumexp(2 * log_weight, -1))


def systematic(key: PRNGKeyArray, log_weight: Float[Array, "*S P"]) -> Int[Array, "*S P"]:
    """Indices drawn in proportion to the weights: one uniform number a scene, P evenly spaced positions."""
    count = log_weight.shape[-1]
    upper = jnp.cumsum(jax.nn.softmax(log_weight, -1), -1)
    position = (jnp.arange(count) + jax.random.uniform(key, (*log_weight.shape[:-1], 1))) / count
    rows = jax.vmap(lambda upper, position: jnp.searchsorted(upper, position, side="right"))
    index = rows(upper.reshape(-1, count), position.reshape(-1, count)).reshape(log_weight.shape)
    return jnp.minimum(index, count - 1)


def mcmc(
    velocity: Field, key: PRNGKeyArray, *, count: int, stride: float, transform: Transform = identity
) -> Transform:
    """`transform`, applied `count` more times at the same noise level, with fresh noise between (VLS, algorithm 1).

    An inner step follows the bent velocity from t to s = t + stride and goes back by the kernel
    x_t = (t / s) x_s + sqrt((1 - t)^2 - (t (1 - s) / s)^2) noise, under which the path's marginals are kept: so without
    a `transform` the law of the samples does not change, while guided particles get time to agree with their reward,
    and copies of one particle (`resample`) part. At t = 0 it draws new noise. VLS states the inner steps without saying
    how they re-noise, and the released code does not run them.

    velocity: the field that is solved. Each inner step begins from it again, so what bends it belongs into `transform`:
    of what comes before this transform in a chain nothing is left. stride: the solver's step is natural. count = 0 is
    `transform` alone.
    """

    def update(x, v, t, state):
        key, inner = state
        s = jnp.minimum(t + stride, 1.0)
        spread = jnp.sqrt(jnp.maximum((1 - t) ** 2 - (t * (1 - s) / s) ** 2, 0.0))

        def again(carry, key):
            x, v, inner = carry
            x, v, inner = transform.update(x, v, t, inner)
            x = t / s * (x + (s - t) * v) + spread * jax.random.normal(key, x.shape, x.dtype)
            return (x, velocity(x, t), inner), None

        key, draw_key = jax.random.split(key)
        # At the end there is nothing to repeat: t = s = 1 leaves the point where it is.
        (x, v, inner), _ = lax.scan(again, (x, v, inner), jax.random.split(draw_key, count))
        x, v, inner = transform.update(x, v, t, inner)
        return x, v, (key, inner)

    return Transform(lambda noise: (key, transform.init(noise)), update)
