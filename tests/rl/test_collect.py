"""Transitions on a line, worked out by hand: how episodes end, and what is kept of their ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rl.walk import WEIGHTS, Walk, make_pool, walking
from vla_jax.errors import UserError
from vla_jax.rl.collect import Collector


@pytest.fixture(scope="module")
def ended():
    """Two chunks (the time limit) in two scenes that begin at 0: one walks 0.6 a chunk, the other 0.1."""
    collector = Collector(Walk(), walking(), execute=1, ticks=2, discount=0.9)
    pool, noise = make_pool([0.0]), jnp.array([[1.2], [0.2]])
    step = jax.jit(lambda scenes: collector.step(WEIGHTS, pool, scenes, noise, jax.random.key(1)))
    scenes = collector.start(WEIGHTS, pool, 2, jax.random.key(0))
    first, one, _ = step(scenes)
    second, two, ends = step(first)
    return first, one, second, two, ends


def test_a_step_on_the_way(ended):
    first, one, *_ = ended
    np.testing.assert_allclose(one.observation, [0.0, 0.0])
    np.testing.assert_allclose(one.chunk[:, 0, 0], [0.6, 0.1])
    np.testing.assert_allclose(one.next_observation, [0.6, 0.1], rtol=1e-6)
    np.testing.assert_allclose(one.reward, [-1, -1])
    np.testing.assert_allclose(one.discount, [0.9, 0.9])
    np.testing.assert_array_equal(first.observation, one.next_observation)
    assert first.chunks.tolist() == [1, 1]


def test_success_ends_the_value_and_the_time_limit_does_not(ended):
    *_, two, ends = ended
    assert ends.ended.tolist() == [True, True] and ends.success.tolist() == [True, False]
    np.testing.assert_allclose(two.reward, [0, -1])
    np.testing.assert_allclose(two.discount, [0, 0.9])
    # What counts at the limit is where the old episode ended, not where the next one begins.
    np.testing.assert_allclose(two.next_observation, [1.2, 0.2], rtol=1e-6)


def test_ended_scenes_begin_anew(ended):
    first, one, second, two, _ = ended
    np.testing.assert_allclose(second.observation, [0, 0])
    np.testing.assert_allclose(second.state.place, [0, 0])
    assert second.chunks.tolist() == [0, 0] and not second.state.success.any()
    assert one.episode.tolist() == two.episode.tolist() == [0, 1]
    assert second.episode.tolist() == [2, 3] and int(second.begun) == 4


def test_a_scene_that_goes_on_is_left_alone():
    """One scene reaches the goal at once; the other one's episode is not touched by that."""
    collector = Collector(Walk(), walking(), execute=1, ticks=5, discount=0.9)
    pool = make_pool([0.0])
    scenes = collector.start(WEIGHTS, pool, 2, jax.random.key(0))
    scenes, _, _ = collector.step(WEIGHTS, pool, scenes, jnp.array([[4.0], [0.2]]), jax.random.key(1))
    np.testing.assert_allclose(scenes.observation, [0.0, 0.1], rtol=1e-6)
    assert scenes.chunks.tolist() == [0, 1] and scenes.episode.tolist() == [2, 1]


def test_chunks_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="execute = 2, but the policy's chunks hold 1"):
        Collector(Walk(), walking(), execute=2, ticks=4, discount=0.9)
    with pytest.raises(UserError, match="no whole number of chunks"):
        Collector(Walk(), walking()._replace(shape=(3, 1)), execute=3, ticks=4, discount=0.9)
