"""Attraction to a target and real-time chunking, against conditional laws, differences and the paper's mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.flow.solve import solve
from vla_jax.flow.transforms import attract, extrapolate, inpaint, soft_mask

CORRELATION = 0.8


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pair_field(x, t):
    """The exact field of chunks of two actions of width 1, standard normal and correlated."""
    covariance = jnp.array([[1.0, CORRELATION], [CORRELATION, 1.0]])
    spread = (1 - t) ** 2 * jnp.eye(2) + t**2 * covariance
    gain = (t * covariance - (1 - t) * jnp.eye(2)) @ jnp.linalg.inv(spread)
    return jnp.einsum("ij,...ja->...ia", gain, x)


def test_off_is_the_plain_sampler_bit_by_bit():
    noise = normal(3, 4, 2, 1)
    plain = jax.jit(lambda noise: solve(pair_field, noise, steps=5))(noise)
    target = jnp.ones((2, 1))
    for transform in (
        attract(pair_field, target, 0.0),
        inpaint(pair_field, target, 0.0, executed=1, frozen=1),
        extrapolate(lambda x, t: -x, 1.0),
    ):
        found = jax.jit(lambda noise, transform=transform: solve(pair_field, noise, steps=5, transform=transform))(
            noise
        )
        np.testing.assert_array_equal(plain, found)


def test_the_pull_agrees_with_finite_differences():
    """J' mask (target - x_1) is the gradient of -1/2 mask (target - x_1)^2."""
    x, target, mask, t, h = normal(2, 4, 3), normal(4, 3, seed=1), np.array([[1.0], [0.5], [0.2], [0.0]]), 0.4, 1e-2

    def field(x, t):
        return jnp.tanh(jnp.roll(x, 1, axis=-2) + x * t)

    def loss(x):
        return float((0.5 * mask * (target - (x + (1 - t) * field(x, t))) ** 2).sum())

    pull = attract(field, target, mask=mask, limit=1.0).update(x, 0 * x, jnp.float32(t), ())[1]
    for place in ((0, 0, 1), (1, 2, 2), (0, 3, 0)):
        step = np.zeros_like(x)
        step[place] = h
        np.testing.assert_allclose(pull[place], (loss(x - step) - loss(x + step)) / (2 * h), atol=2e-3)


def test_attraction_without_a_limit_gives_the_conditional_law():
    """The first action is held at 1.2: the second follows N(0.8 * 1.2, 1 - 0.8^2) as far as r^2 is the right variance.

    For the held action alone r^2 is exact; the law of the other is met to a tenth."""
    transform = attract(pair_field, jnp.full((2, 1), 1.2), mask=jnp.array([[1.0], [0.0]]), limit=1e6)
    x = jax.jit(lambda noise: solve(pair_field, noise, steps=200, transform=transform))(normal(4_000, 2, 1))
    np.testing.assert_allclose(x[:, 0], 1.2, atol=0.02)
    assert abs(float(x[:, 1].mean()) - CORRELATION * 1.2) < 0.1 and abs(float(x[:, 1].std()) - 0.6) < 0.1


def test_the_soft_mask_is_that_of_real_time_chunking():
    mask = soft_mask(8, 2, 3)
    np.testing.assert_array_equal(mask[:2], 1.0)
    np.testing.assert_array_equal(mask[5:], 0.0)
    share = np.array([3, 2, 1]) / 4
    np.testing.assert_allclose(mask[2:5], share * (np.exp(share) - 1) / (np.e - 1), rtol=1e-6)
    with pytest.raises(ValueError, match="cannot hold"):
        soft_mask(4, 3, 2)


def test_a_chunk_continues_the_one_before():
    """Independent actions: the frozen ones come near what was promised, the fresh ones are the policy's own."""

    def field(x, t):
        return (2 * t - 1) / (t**2 + (1 - t) ** 2) * x  # of data ~ N(0, 1)

    previous, noise = normal(6, 1, seed=3), normal(64, 6, 1)
    transform = inpaint(field, previous, executed=2, frozen=2)
    found = solve(field, noise, steps=20, transform=transform)
    plain = solve(field, noise, steps=20)
    np.testing.assert_allclose(found[:, -2:], plain[:, -2:], rtol=1e-5)
    left = np.broadcast_to(previous[2:4], (64, 2, 1))
    before, after = (float(np.abs(np.asarray(x[:, :2]) - left).mean()) for x in (plain, found))
    assert after < 0.15 * before
    loose = float(np.abs(np.asarray(found[:, 2:4]) - previous[4:6]).mean())
    assert after < loose < float(np.abs(np.asarray(plain[:, 2:4]) - previous[4:6]).mean())
