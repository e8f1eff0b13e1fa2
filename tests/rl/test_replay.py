"""The ring: what is kept, what is drawn, which episodes won."""

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.rl.replay import Transition, empty


def rows(numbers, discount=0.9, episode=None):
    """Transitions that are told apart by their numbers, in every field."""
    numbers = jnp.asarray(numbers, jnp.float32)
    discount = jnp.broadcast_to(jnp.asarray(discount, jnp.float32), numbers.shape)
    episode = jnp.asarray(numbers if episode is None else episode, jnp.int32)
    column = numbers[:, None]
    return Transition({"x": column}, column, column[..., None], numbers, discount, {"x": column + 0.5}, episode)


def test_the_newest_rows_take_the_place_of_the_oldest():
    replay = empty(rows([0]), 5)
    for start in (0, 3, 6):
        replay = replay.add(rows([start, start + 1, start + 2]))
    assert int(replay.size) == 5 and int(replay.cursor) == 9 % 5
    assert sorted(np.asarray(replay.rows.reward)) == [4, 5, 6, 7, 8]
    # all parts of a row stay together across the seam
    np.testing.assert_array_equal(replay.rows.next_observation["x"][:, 0], replay.rows.reward + 0.5)
    np.testing.assert_array_equal(replay.rows.chunk[:, 0, 0], replay.rows.noise[:, 0])


def test_rows_that_are_not_written_are_not_drawn():
    replay = empty(rows([0]), 100).add(rows([7, 8, 9]))
    drawn = np.asarray(replay.sample(jax.random.key(0), 300).reward)
    assert set(drawn) == {7, 8, 9}
    assert np.bincount(drawn.astype(int))[7:].min() > 70


def test_all_rows_of_an_episode_that_won_are_found():
    replay = empty(rows([0]), 6)
    replay = replay.add(rows([0, 1], episode=[10, 11]))  # the first chunks of two episodes
    replay = replay.add(rows([2, 3], discount=[0.0, 0.9], episode=[10, 11]))  # 10 succeeds, 11 goes on
    assert np.asarray(replay.succeeded()).tolist() == [True, False, True, False, False, False]
    # A discount of 0 in a row that is not written yet is no success.
    assert not np.asarray(empty(rows([0]), 6).succeeded()).any()
