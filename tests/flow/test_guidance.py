"""Guidance by a reward: its gradient against differences, its law against the analytic tilt, and that it can be off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.flow.mixture import assert_mixture, mixture_field, mixture_twist, tilted
from vla_jax.flow.guidance import guide, normalize, tilt
from vla_jax.flow.solve import solve

MEANS, WEIGHTS, DEVIATION = np.array([-1.0, 1.0]), np.array([0.6, 0.4]), 0.5


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def field(x, t):
    """Mixes the numbers of a chunk, so that its Jacobian is not diagonal."""
    return jnp.tanh(jnp.roll(x, 1, axis=-2) + 0.5 * x * t)


def reward(x, t):
    return jnp.sin(x).sum((-2, -1)) - 0.3 * jnp.square(x[..., -1, :]).sum(-1)


def bend(x, v, t, **options):
    return np.asarray(guide(reward, 1.0, norm="none", **options).update(x, v, jnp.float32(t), ())[1] - v)


def test_gradients_agree_with_finite_differences():
    x, t, h = normal(2, 3, 4, 2), 0.3, 1e-2
    v = np.asarray(field(x, t))
    shown = {
        "noisy": lambda y: y,
        "clean": lambda y: y + (1 - t) * v,
        "jacobian": lambda y: y + (1 - t) * field(y, t),
    }
    for point, see in shown.items():
        found = bend(x, v, t, point=point, velocity=field if point == "jacobian" else None)
        for place in ((0, 1, 0, 0), (1, 2, 3, 1)):
            step = np.zeros_like(x)
            step[place] = h
            difference = (reward(see(x + step), 1.0) - reward(see(x - step), 1.0)).sum() / (2 * h)
            np.testing.assert_allclose(found[place], difference, atol=2e-3, err_msg=point)


@pytest.mark.parametrize("point", ["noisy", "clean", "jacobian"])
@pytest.mark.parametrize("norm", ["none", "clip", "particle", "batch"])
def test_weight_zero_is_the_plain_sampler_bit_by_bit(point, norm):
    def run(noise, weight):
        velocity = field if point == "jacobian" else None
        transform = guide(reward, weight, point=point, velocity=velocity, norm=norm, strength=lambda r: 1 + r**2)
        return solve(field, noise, steps=5, transform=transform)

    noise = normal(2, 3, 4, 2)
    plain = jax.jit(lambda noise: solve(field, noise, steps=5))(noise)
    guided = jax.jit(run)
    np.testing.assert_array_equal(plain, guided(noise, 0.0))
    assert not np.array_equal(plain, guided(noise, 0.1))


def test_the_exact_twist_gives_the_tilted_mixture():
    slope = 1.0
    base, twist = mixture_field(MEANS, WEIGHTS, DEVIATION), mixture_twist(MEANS, WEIGHTS, DEVIATION, slope)
    transform = guide(twist, tilt, point="noisy", norm="none")
    x = jax.jit(lambda noise: solve(base, noise, steps=200, transform=transform))(normal(20_000, 1, 1))
    assert_mixture(x, *tilted(MEANS, WEIGHTS, DEVIATION, slope), DEVIATION, 0.02)
    with pytest.raises(AssertionError, match="gap"):
        assert_mixture(x, MEANS, WEIGHTS, DEVIATION, 0.02)


def test_a_linear_reward_on_the_clean_estimate_is_exact_for_a_gaussian():
    """log E[exp(a x_1) | x_t] is a E[x_1 | x_t] and a constant: the derivative through the field is needed, and enough.

    Without it the mean is not a sigma^2 away."""
    mean, deviation, slope = np.array([0.5]), 0.4, 2.0
    base = mixture_field(mean, np.ones(1), deviation)

    def sample(point, velocity=None):
        transform = guide(lambda x, t: slope * x.sum((-2, -1)), tilt, point=point, velocity=velocity, norm="none")
        return jax.jit(lambda noise: solve(base, noise, steps=400, transform=transform))(normal(5_000, 1, 1))

    x = sample("jacobian", base)
    assert abs(float(x.mean()) - (0.5 + slope * deviation**2)) < 0.02 and abs(float(x.std()) - deviation) < 0.02
    assert abs(float(sample("clean").mean()) - (0.5 + slope * deviation**2)) > 0.3


def test_norms():
    gradient = jnp.asarray(normal(2, 3, 4, 2)) * jnp.array([0.01, 1.0, 100.0])[:, None, None]
    length = jnp.linalg.norm(gradient.reshape(2, 3, 8), axis=-1)

    def lengths(norm):
        return jnp.linalg.norm(normalize(gradient, norm).reshape(2, 3, 8), axis=-1)

    np.testing.assert_allclose(lengths("particle"), 1.0, rtol=1e-5)
    np.testing.assert_allclose(lengths("clip"), jnp.minimum(length, 1.0), rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(lengths("batch"), axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(normalize(jnp.zeros((1, 1, 2, 2)), "particle"), 0.0)


def test_guided_only_inside_its_window_and_by_its_strength():
    x, v = normal(3, 4, 2), normal(3, 4, 2, seed=1)
    moved = [np.abs(bend(x, v, t, window=(0.2, 0.8))).max() > 0 for t in (0.0, 0.19, 0.2, 0.79, 0.8, 1.0)]
    assert moved == [False, False, True, True, False, False]
    shown = []
    doubled = bend(x, v, 0.5, strength=lambda r: shown.append(r) or jnp.array([0.0, 1.0, 2.0]))
    np.testing.assert_allclose(doubled, bend(x, v, 0.5) * np.array([0, 1, 2])[:, None, None], rtol=1e-6)
    np.testing.assert_allclose(shown[0], reward(x + 0.5 * v, 1.0), rtol=1e-6)


def test_wrong_choices_are_named():
    for options, message in (
        ({"point": "tweedie"}, "point is one of"),
        ({"norm": "unit"}, "norm is one of"),
        ({"point": "jacobian"}, "velocity field"),
        ({"velocity": field}, "velocity field"),
    ):
        with pytest.raises(ValueError, match=message):
            guide(reward, 1.0, **options)
