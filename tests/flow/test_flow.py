"""The path, the time sampler and the solver against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.flow.mixture import mixture_field
from vla_jax.flow.density import log_density
from vla_jax.flow.path import point, sample_time, squared_error, velocity
from vla_jax.flow.solve import Transform, chain, identity, solve
from vla_jax.flow.transforms import extrapolate


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_path_runs_straight_from_noise_to_data():
    noise, data = normal(3, 4, 2), normal(3, 4, 2, seed=1)
    time = np.array([0.0, 1.0, 0.25], np.float32)
    x = point(noise, data, time)
    np.testing.assert_allclose(x[0], noise[0])
    np.testing.assert_allclose(x[1], data[1])
    slope = (point(noise, data, time + 0.5) - x) / 0.5
    np.testing.assert_allclose(slope, velocity(noise, data), rtol=1e-4, atol=1e-5)


def test_times_follow_their_law():
    time = np.asarray(sample_time(jax.random.key(0), (200_000,)))
    assert time.min() >= 0 and time.max() <= 1 and abs(time.mean() - 0.4) < 0.003
    for t in (0.1, 0.3, 0.5, 0.9):  # P(T <= t) = P(b >= 0.999 (1 - t)) = 1 - (0.999 (1 - t))^1.5
        assert abs((time <= t).mean() - (1 - (0.999 * (1 - t)) ** 1.5)) < 0.005
    assert (time < 0.5).mean() > 0.6, "the noisy end is favoured"


def test_masked_error():
    predicted, target = normal(2, 3, 2), np.zeros((2, 3, 2), np.float32)
    mask = np.array([[True, False, True], [False, False, False]])[..., None] & np.array([True, True])
    error = squared_error(predicted, target, mask)
    np.testing.assert_allclose(error, [(predicted[0, [0, 2]] ** 2).mean(), 0.0], rtol=1e-6)
    narrow = mask & np.array([True, False])  # a robot of one dimension weighs as much
    np.testing.assert_allclose(squared_error(predicted, target, narrow)[0], (predicted[0, [0, 2], 0] ** 2).mean())


def test_a_robot_with_every_dimension_has_the_number_of_the_plain_mean():
    predicted, target = normal(20, 5, 8, 7), normal(20, 1, 8, 7, seed=1)
    actions = (np.arange(8) < np.random.default_rng(2).integers(0, 9, (20, 1)))[:, None]

    def plain(predicted):
        """What the loss was before it knew of dimensions."""
        error, weight = jnp.square(predicted - target).mean(-1), actions.astype(np.float32)
        return (error * weight).sum(-1) / jnp.maximum(weight.sum(-1), 1.0)

    def masked(predicted):
        return squared_error(predicted, target, np.repeat(actions[..., None], 7, -1))

    np.testing.assert_array_equal(jax.jit(masked)(predicted), jax.jit(plain)(predicted))
    one, other = (jax.jit(jax.grad(lambda x, f=f: f(x).sum()))(predicted) for f in (masked, plain))
    np.testing.assert_array_equal(one, other)


def test_density_counts_the_dimensions_that_a_robot_has():
    data, matrix = normal(2, 2, 3), 0.3 * normal(2, 2, seed=1)
    exists = np.array([[True, True, False]] * 2)
    data[..., 2] = 0

    def field(x, t):
        return jnp.concatenate([x[..., :2] @ matrix, 0 * x[..., 2:]], -1)

    padded = log_density(field, data, exists)
    np.testing.assert_allclose(padded, log_density(lambda x, t: x @ matrix, data[..., :2]), rtol=1e-5)


def test_a_straight_field_is_solved_exactly_in_any_number_of_steps():
    noise, data = normal(5, 4, 2), normal(5, 4, 2, seed=1)
    for steps in (1, 4, 7):
        np.testing.assert_allclose(solve(lambda x, t: data - noise, noise, steps=steps), data, atol=1e-5)
    with pytest.raises(ValueError, match="at least one"):
        solve(lambda x, t: x, noise, steps=0)


def test_the_field_is_asked_at_the_left_ends_of_the_steps():
    x = solve(lambda x, t: jnp.full_like(x, t), jnp.zeros((1, 1, 1)), steps=4)
    np.testing.assert_allclose(x, (0 + 0.25 + 0.5 + 0.75) / 4)


def test_a_mixture_of_gaussians_is_recovered():
    """Data: means -2 and 1 with weights 0.3 and 0.7, deviation 0.1."""
    field = mixture_field(np.array([-2.0, 1.0]), np.array([0.3, 0.7]), 0.1)
    x = np.asarray(jax.jit(lambda noise: solve(field, noise, steps=200))(normal(20_000, 1, 1)))
    right = x > -0.5
    assert abs(right.mean() - 0.7) < 0.015
    for side, mean in ((x[~right], -2.0), (x[right], 1.0)):
        assert abs(side.mean() - mean) < 0.03 and abs(side.std() - 0.1) < 0.03


def test_a_grid_of_times_is_followed():
    grid = (0.0, 0.1, 0.4, 1.0)
    x = solve(lambda x, t: jnp.full_like(x, t), jnp.zeros((1, 1, 1)), steps=grid)
    np.testing.assert_allclose(x, 0.3 * 0.1 + 0.6 * 0.4, rtol=1e-6)
    for wrong in ((0.0, 0.5), (0.1, 1.0), (0.0, 0.5, 0.5, 1.0), (1.0,)):
        with pytest.raises(ValueError, match="rises from 0 to 1"):
            solve(lambda x, t: x, jnp.zeros((1, 1, 1)), steps=wrong)


def test_heun_is_of_second_order():
    """dx/dt = x: the error at t = 1 falls by 4 when the step is halved, Euler's by 2."""

    def error(steps, method):
        return np.e - float(solve(lambda x, t: x, jnp.ones((1, 1, 1)), steps=steps, method=method).squeeze())

    assert 3.6 < error(8, "heun") / error(16, "heun") < 4.1
    assert 1.8 < error(8, "euler") / error(16, "euler") < 2.1
    with pytest.raises(ValueError, match="euler and heun"):
        solve(lambda x, t: x, jnp.zeros((1, 1, 1)), steps=4, method="rk4")


def test_heun_asks_the_field_at_both_ends():
    x = solve(lambda x, t: jnp.full_like(x, t**2), jnp.zeros((1, 1, 1)), steps=(0.0, 0.5, 1.0), method="heun")
    np.testing.assert_allclose(x, (0 + 0.25) / 4 + (0.25 + 1) / 4)


def test_what_moves_points_has_the_last_word():
    """At the end a transform is called once more, at t = 1 with no velocity."""
    move = Transform(lambda noise: 0, lambda x, v, t, n: (jnp.where(t == 1, x + 10 * v + n, x), v + 1, n + 1))
    assert float(solve(lambda x, t: 0 * x + 2.0, jnp.zeros((1, 1, 1)), steps=4, transform=move).squeeze()) == 3.0 + 4


def adding(amount):
    """Adds to the velocity and counts its calls."""
    return Transform(lambda noise: 0, lambda x, v, t, state: (x, v + amount, state + 1))


def doubling():
    return Transform(lambda noise: (), lambda x, v, t, state: (x, 2 * v, state))


def test_transforms_are_applied_in_order():
    noise = np.zeros((1, 1, 1), np.float32)

    def run(transform):
        return float(solve(lambda x, t: jnp.ones_like(x), noise, steps=4, transform=transform)[0, 0, 0])

    assert run(identity) == 1.0 and run(chain()) == 1.0
    assert run(chain(adding(1.0), doubling())) == 4.0
    assert run(chain(doubling(), adding(1.0))) == 3.0


def test_a_transform_carries_its_own_state_and_may_move_the_point():
    def update(x, v, t, state):
        count, first = state
        return jnp.where(count == 2, 10.0, x), v, (count + 1, first)

    hold = Transform(lambda noise: (jnp.zeros((), int), noise), update)
    x = solve(lambda x, t: jnp.ones_like(x), jnp.zeros((1, 1, 1)), steps=4, transform=chain(adding(0.0), hold))
    assert float(x[0, 0, 0]) == 10.5, "two more steps of 1/4 after the point was moved to 10"


def test_the_solution_is_differentiable_in_the_noise():
    gradient = jax.grad(lambda noise: solve(lambda x, t: -x, noise, steps=4).sum())(jnp.ones((1, 1, 1)))
    np.testing.assert_allclose(gradient, 0.75**4, rtol=1e-6)


def test_the_density_of_a_mixture_is_exact():
    means, weights, deviation = np.array([-1.0, 1.5]), np.array([0.4, 0.6]), 0.5
    field = mixture_field(means, weights, deviation)
    x = np.linspace(-2.5, 3.0, 23, dtype=np.float32).reshape(-1, 1, 1)
    gaussian = np.exp(-((x[..., 0] - means) ** 2) / (2 * deviation**2)) / np.sqrt(2 * np.pi * deviation**2)
    found = jax.jit(lambda x: log_density(field, x, steps=64))(x)
    np.testing.assert_allclose(found, np.log(gaussian @ weights), atol=2e-3)


def test_the_density_counts_every_dimension():
    """A linear field mixes the six numbers of a chunk: x_1 = expm(M) x_0, so log p is that of a Gaussian."""
    matrix = 0.4 * normal(6, 6)
    x = normal(5, 3, 2, seed=1)
    found = jax.jit(lambda x: log_density(lambda x, t: (x.reshape(-1, 6) @ matrix.T).reshape(x.shape), x))(x)
    noise = x.reshape(5, 6) @ np.asarray(jax.scipy.linalg.expm(-matrix)).T
    expected = -0.5 * (noise**2).sum(-1) - 3 * np.log(2 * np.pi) - np.trace(matrix)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_extrapolation_leads_away_from_the_reference():
    noise = normal(2, 3, 1)

    def run(weight):
        transform = extrapolate(lambda x, t: 0 * x + 1.0, weight)
        return np.asarray(solve(lambda x, t: 0 * x + 3.0, noise, steps=4, transform=transform) - noise)

    for weight, moved in ((0.0, 1.0), (1.0, 3.0), (2.0, 5.0), (0.5, 2.0)):
        np.testing.assert_allclose(run(weight), moved, atol=1e-5)


def test_extrapolation_sharpens_towards_what_only_the_field_knows():
    """Reference: both modes alike. Field: the right one more likely. Guidance goes beyond the field's odds."""
    means, deviation = np.array([-1.5, 1.5]), 0.3
    reference, field = (mixture_field(means, np.array(w), deviation) for w in ((0.5, 0.5), (0.35, 0.65)))
    share = [
        float((solve(field, normal(20_000, 1, 1), steps=50, transform=extrapolate(reference, w)) > 0).mean())
        for w in (0.0, 1.0, 2.0, 4.0)
    ]
    assert abs(share[0] - 0.5) < 0.02 and abs(share[1] - 0.65) < 0.02
    assert share[2] > share[1] + 0.04 and share[3] > share[2] + 0.04


@pytest.mark.parametrize("weight", [2.0, (2.0,), (2.0, 2.0, 2.0)])
def test_a_constant_schedule_is_its_number(weight):
    transform = extrapolate(lambda x, t: 0 * x + 1.0, weight)
    moved = solve(lambda x, t: 0 * x + 4.0, jnp.zeros((1, 1, 1)), steps=6, transform=transform)
    assert np.isclose(float(moved.squeeze()), 1 + 2 * (4 - 1))


def test_a_schedule_is_followed_in_time():
    """v_ref + w(t) (v - v_ref) with w = 2, then 0: the second half of the path is the reference's."""
    transform = extrapolate(lambda x, t: 0 * x + 1.0, (2.0, 0.0))
    seen = [float(transform.update(jnp.zeros((1, 1, 1)), jnp.full((1, 1, 1), 4.0), t, ())[1].squeeze()) for t in
            (0.0, 0.25, 0.499, 0.5, 0.75, 1.0)]  # fmt: skip
    assert seen == [7.0, 7.0, 7.0, 1.0, 1.0, 1.0]
