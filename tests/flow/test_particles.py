"""Particles: repulsion against differences, resampling and re-noising against the laws that they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.flow.mixture import assert_mixture, mixture_field, tilted
from vla_jax.flow.guidance import guide
from vla_jax.flow.particles import effective_size, mcmc, repel, resample, systematic
from vla_jax.flow.solve import chain, solve

MEANS, WEIGHTS, DEVIATION, SLOPE = np.array([-1.0, 1.0]), np.array([0.6, 0.4]), 0.5, 1.0
KEY = jax.random.key(0)
BASE = mixture_field(MEANS, WEIGHTS, DEVIATION)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def linear(x, t):
    return x.sum((-2, -1))


def run(noise, transform, steps=5):
    return jax.jit(lambda noise: solve(BASE, noise, steps=steps, transform=transform))(noise)


@pytest.mark.parametrize("kernel", ["inverse", "rbf"])
def test_repulsion_is_the_negative_gradient_of_its_potential(kernel):
    x, h = normal(2, 3, 2, 2), 1e-2

    def potential(x):
        points = np.asarray(x, float).reshape(2, 3, 4)
        distance = np.linalg.norm(points[:, :, None] - points[:, None], axis=-1)
        each = 1 / np.maximum(distance, 1e-9) if kernel == "inverse" else np.exp(-(distance**2) / (2 * 0.7**2))
        return each[:, ~np.eye(3, dtype=bool)].sum()

    force = repel(1.0, kernel=kernel, bandwidth=0.7).update(x, 0 * x, jnp.float32(0.1), ())[1]
    for place in ((0, 1, 0, 0), (1, 2, 1, 1)):
        step = np.zeros_like(x)
        step[place] = h
        np.testing.assert_allclose(force[place], (potential(x - step) - potential(x + step)) / (2 * h), rtol=2e-2)


def test_particles_of_one_scene_part_and_scenes_do_not_meet():
    x = normal(1, 4, 2, 1)
    both = np.concatenate([x, x + 0.01])
    force = repel(1.0, kernel="rbf").update(both, 0 * both, jnp.float32(0.0), ())[1]
    np.testing.assert_allclose(force[0], force[1], rtol=1e-3, atol=1e-4)
    spread = [np.std(run(x, repel(w)), axis=1).mean() for w in (0.0, 0.5)]
    assert spread[1] > 1.2 * spread[0]
    outside = repel(1.0, window=(0.0, 0.2)).update(x, 0 * x, jnp.float32(0.2), ())[1]
    np.testing.assert_array_equal(outside, 0.0)


def test_weight_zero_and_one_particle_are_the_plain_sampler_bit_by_bit():
    noise = normal(2, 8, 1, 1)
    plain = jax.jit(lambda noise: solve(BASE, noise, steps=5))
    off = (
        repel(0.0),
        repel(0.0, kernel="rbf", norm="particle"),
        resample(linear, KEY, weight=0.0, end="draw"),
        resample(linear, KEY, weight=0.0, end="best"),
        mcmc(BASE, KEY, count=0, stride=0.2, transform=guide(linear, 0.0)),
    )
    for transform in off:
        np.testing.assert_array_equal(plain(noise), run(noise, transform))
    alone = noise[:, :1]
    for transform in (repel(3.0), resample(linear, KEY, weight=3.0)):
        np.testing.assert_array_equal(plain(alone), run(alone, transform))


@pytest.mark.parametrize("renoised", [False, True])
def test_resampled_particles_follow_the_tilted_mixture(renoised):
    """By weights at every step, drawn when few particles carry them; with re-noising between, the copies part."""
    drawn = resample(linear, KEY, weight=SLOPE, end="draw", threshold=0.8)
    moved = (mcmc(BASE, jax.random.key(1), count=1, stride=1 / 100),) if renoised else ()
    x = np.asarray(run(normal(20_000, 1, 1), chain(*moved, drawn), steps=100))
    assert_mixture(x, *tilted(MEANS, WEIGHTS, DEVIATION, SLOPE), DEVIATION, 0.025)
    with pytest.raises(AssertionError, match="gap"):
        assert_mixture(x, MEANS, WEIGHTS, DEVIATION, 0.025)
    distinct = len(np.unique(x)) / x.size
    assert (distinct > 0.8) if renoised else (distinct < 0.8), distinct


def test_the_best_particle_comes_first():
    noise = normal(3, 6, 1, 1)
    plain = np.asarray(run(noise, resample(linear, KEY, weight=0.0)))
    x = np.asarray(run(noise, resample(linear, KEY, weight=1.0, window=(0.0, 0.0))))
    np.testing.assert_array_equal(x, -np.sort(-plain, axis=1))


def test_systematic_drawing_keeps_expected_counts():
    weights = np.array([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]])
    index = systematic(KEY, jnp.log(weights))
    for row, expected in zip(np.asarray(index), weights, strict=True):
        np.testing.assert_array_equal(np.bincount(row, minlength=4), 4 * expected)
    np.testing.assert_allclose(effective_size(jnp.log(weights)), [1 / 0.375, 1.0], rtol=1e-5)


def test_resampling_waits_until_few_particles_carry_the_weight():
    x = normal(1, 4, 1, 1)
    values = jnp.array([[0.0, 0.0, 0.0, 0.5]])
    transform = resample(lambda x, t: values, KEY, threshold=0.5)
    y, v, state = transform.update(x, 2 * x, jnp.float32(0.3), transform.init(x))
    np.testing.assert_array_equal(y, x)
    np.testing.assert_allclose(state.log_weight, values)
    values = jnp.array([[0.0, 0.0, 0.0, 50.0]])
    y, v, state = transform.update(x, 2 * x, jnp.float32(0.3), state)
    np.testing.assert_array_equal(y, np.broadcast_to(x[:, 3:], x.shape))
    np.testing.assert_array_equal(v, 2 * y)
    np.testing.assert_array_equal(state.log_weight, 0.0)
    np.testing.assert_array_equal(state.potential, 50.0)


def test_renoising_keeps_the_law_and_moves_the_samples():
    noise = normal(20_000, 1, 1)
    x = run(noise, mcmc(BASE, KEY, count=2, stride=0.01), steps=100)
    assert_mixture(x, MEANS, WEIGHTS, DEVIATION, 0.025)
    correlation = np.corrcoef(np.ravel(x), np.ravel(run(noise, chain(), steps=100)))[0, 1]
    assert abs(correlation) < 0.2, "hundreds of fresh draws leave little of the first noise"


def test_inner_steps_repeat_the_guidance():
    """A gentle pull to the right, weighed by (1 - t) / t: more inner steps obey it more."""
    pull = guide(lambda x, t: x.sum((-2, -1)), 0.6, point="noisy", norm="none")
    means = [
        float(run(normal(4_000, 1, 1), mcmc(BASE, KEY, count=count, stride=0.05, transform=pull), steps=20).mean())
        for count in (0, 3)
    ]
    assert means[1] > means[0] + 0.1


def test_wrong_choices_are_named():
    with pytest.raises(ValueError, match="kernel is one of inverse, rbf"):
        repel(1.0, kernel="gauss")
    with pytest.raises(ValueError, match="end is one of draw, best"):
        resample(linear, KEY, end="first")
    with pytest.raises(ValueError, match="point is one of noisy, clean"):
        resample(linear, KEY, point="jacobian")
