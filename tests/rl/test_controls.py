"""Continued cloning on the policy's own successes, with a policy whose velocity field is one number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.rl.walk import walking
from vla_jax.rl.agent import AgentConfig
from vla_jax.rl.controls import Cloning
from vla_jax.rl.networks import split
from vla_jax.rl.replay import Transition, empty


class Expert(nnx.Module):
    def __init__(self):
        self.place = nnx.Param(jnp.float32(0.0))


class Toy(nnx.Module):
    """Flows to expert.place, wherever the noise is: v = (place - x) / (1 - t), kept finite."""

    def __init__(self):
        self.expert, self.trunk = Expert(), nnx.Param(jnp.float32(2.0))

    def velocity(self, x, t, condition):
        return (self.expert.place[...] - x) / jnp.maximum(1 - t, 0.05)[..., None, None]


@pytest.fixture(scope="module")
def cloning():
    graphdef, weights = split(Toy())
    return Cloning(AgentConfig(batch_size=32, learning_rate=3e-2), walking(), graphdef), weights


def experience(won):
    """Episode 0 made chunks of 1 and, if it `won`, ended in success; episode 1 made chunks of -1 and failed."""
    number = jnp.arange(40)
    episode = number % 2
    chunk = jnp.where(episode == 0, 1.0, -1.0)[:, None, None]
    discount = jnp.where((number == 38) & won, 0.0, 0.9)
    observation = {"posterior": jnp.zeros((40, 1))}
    rows = Transition(observation, chunk[:, 0], chunk, jnp.zeros(40), discount, observation, episode)
    return empty(rows, 64).add(rows)


def updated(cloning, replay):
    learner, weights = cloning
    state = learner.init(jax.random.key(0), weights)
    state, log = learner.update(state, weights, replay, jax.random.key(1), 100)
    return learner.weights(state, weights), log


def test_only_chunks_of_episodes_that_won_are_cloned(cloning):
    weights, log = updated(cloning, experience(True))
    assert float(weights["expert/place"]) == pytest.approx(1.0, abs=0.2)
    assert float(log["chunks"]) == 20


def test_without_a_success_nothing_moves(cloning):
    weights, log = updated(cloning, experience(False))
    assert float(weights["expert/place"]) == 0.0 and float(log["cloning_loss"]) == 0.0


def test_the_trunk_and_the_given_weights_stay(cloning):
    learner, given = cloning
    before = jax.tree.map(np.array, given)
    weights, _ = updated(cloning, experience(True))
    jax.tree.map(np.testing.assert_array_equal, given, before)
    assert set(weights) == set(given) and float(weights["trunk"]) == 2.0
