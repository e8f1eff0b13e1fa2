"""The agents on problems with known answers: a bandit whose flow has two modes, of which the noise decides."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vla_jax.errors import UserError
from vla_jax.rl.agent import AgentConfig, NoiseAliased, Sac, Search, td_loss, td_target
from vla_jax.rl.frozen import Flow
from vla_jax.rl.networks import NoiseActor
from vla_jax.rl.replay import Transition, empty

FEATURES, ROWS = 3, 512
CONFIG = AgentConfig(width=32, batch_size=64, learning_rate=3e-3, polyak=0.05)
AGENTS = {"sac": Sac, "na": NoiseAliased, "search": Search}


def two_modes(weights, observation, noise):
    """Chunk +1 where the first noise is above 1 (16 % of the prior), else -1; a little of the noise added."""
    return jnp.where(noise[:, :1, :1] > 1, 1.0, -1.0) + 0.05 * noise


# Observations are their own features; chunks are of two actions of two numbers.
FLOW = Flow(None, lambda observation: observation, two_modes, None, (2, 2))


@functools.partial(jax.jit, static_argnums=0)
def one_step(count, key):
    """Transitions of the bandit under the prior: reward 0 in the good mode, -1 in the other; every episode ends."""
    keys = jax.random.split(key)
    observation, noise = jax.random.normal(keys[0], (count, FEATURES)), jax.random.normal(keys[1], (count, 4))
    chunk = FLOW.decode(None, observation, FLOW.spread(noise))
    reward, zeros = jnp.where(chunk[:, 0, 0] > 0, 0.0, -1.0), jnp.zeros(count)
    return Transition(observation, noise, chunk, reward, zeros, observation, jnp.arange(count))


@functools.cache
def trainer(name):
    """(agent, f): f(rows) trains it and returns its state and the share of good modes before and after."""
    agent = AGENTS[name](CONFIG, FLOW, FEATURES)

    def share_of_good(state):
        observation = jax.random.normal(jax.random.key(3), (256, FEATURES))
        noise = agent.source(state)(observation, jax.random.key(4))
        return (FLOW.decode(None, observation, FLOW.spread(noise))[:, 0, 0] > 0).mean()

    @jax.jit
    def train(rows):
        first = agent.init(jax.random.key(0))
        state, _ = agent.update(first, None, empty(rows, ROWS).add(rows), jax.random.key(1), 400)
        return state, share_of_good(first), share_of_good(state)

    return agent, train


@pytest.mark.parametrize("name", AGENTS)
def test_every_agent_finds_the_rare_mode_of_a_bandit(name):
    _, before, after = trainer(name)[1](one_step(ROWS, jax.random.key(7)))
    assert before < 0.9 < after


def test_rewards_that_say_nothing_teach_nothing():
    rows = one_step(ROWS, jax.random.key(7))
    shuffled = jax.random.permutation(jax.random.key(9), rows.reward)
    _, _, after = trainer("na")[1](dataclasses.replace(rows, reward=shuffled))
    assert after < 0.6


def test_td_target_by_hand():
    """Success; a step on the way; the time limit, which counts like any step. The least critic counts."""
    reward, discount = jnp.array([0.0, -1.0, -1.0]), jnp.array([0.0, 0.9, 0.9])
    next_values = jnp.array([[-7.0, -2.0, -4.0], [-5.0, -3.0, -1.0]])
    np.testing.assert_allclose(td_target(reward, discount, next_values), [0.0, -1 + 0.9 * -3.0, -1 + 0.9 * -4.0])
    values = jnp.array([[1.0, 2.0], [0.0, 0.0]])
    assert float(td_loss(values, jnp.array([0.0, 0.0]))) == pytest.approx(0.5 * (1 + 4) / 2)


@pytest.mark.parametrize("backup", [False, True])
def test_the_critics_loss_is_that_of_the_target(backup):
    """The critic's loss of SAC on one batch, worked out again from the networks."""
    config = dataclasses.replace(CONFIG, backup_entropy=backup)
    agent, key = Sac(config, FLOW, FEATURES), jax.random.key(5)
    batch = dataclasses.replace(one_step(8, jax.random.key(1)), discount=jnp.full(8, 0.9))

    @jax.jit
    def both():
        state = agent.init(jax.random.key(0))
        target = jax.tree.map(lambda leaf: leaf + 0.01, state.target)
        logs = agent.loss(state.params, target, None, batch, key)[1]
        actor = agent.network("actor", state.params["actor"])
        noise, log_density = actor(batch.next_observation, jax.random.split(key)[0])
        following = agent.network("critic", target)(batch.next_observation, noise).min(0)
        following -= backup * config.temperature * log_density
        values = agent.network("critic", state.params["critic"])(batch.observation, batch.noise)
        return logs["critic_loss"], 0.5 * jnp.square(values - (batch.reward + 0.9 * following)).mean(-1).sum()

    ours, expected = both()
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)


def test_the_noise_critic_recovers_the_action_critic():
    """After learning, the distilled critic agrees with the one over chunks on noises that neither has seen."""
    agent, train = trainer("na")
    state = train(one_step(ROWS, jax.random.key(7)))[0]

    @jax.jit
    def both():
        observation, noise = (jax.random.normal(jax.random.key(k), (256, n)) for k, n in ((11, FEATURES), (12, 4)))
        noise = jnp.clip(noise, -CONFIG.bound, CONFIG.bound)
        chunk = FLOW.decode(None, observation, FLOW.spread(noise)).reshape(256, -1)
        wanted = agent.network("critic", state.params["critic"])(observation, chunk)
        return agent.network("noise_critic", state.params["noise_critic"])(observation, noise), wanted

    values, wanted = both()
    assert float(np.square(values - wanted).mean() / wanted.var()) < 0.4


def test_the_actors_density_is_that_of_its_box():
    """E[1 / p] over draws from p is the length of the box, whatever the bound is."""

    @jax.jit
    def draw():
        actor = NoiseActor(FEATURES, 1, 8, 1, 2.5, nnx.Rngs(0))
        return actor(jnp.ones((20_000, FEATURES)), jax.random.key(0))

    noise, log_density = draw()
    assert float(np.abs(noise).max()) <= 2.5
    assert float(np.exp(-np.asarray(log_density)).mean()) == pytest.approx(5.0, rel=0.1)


def test_no_network_but_its_own_learns_from_a_loss():
    """The distillation moves the noise critic alone; the actor's loss leaves both critics alone."""
    agent, batch, noise = NoiseAliased(CONFIG, FLOW, FEATURES), one_step(8, jax.random.key(1)), jnp.ones((8, 4))

    @jax.jit
    def gradients():
        params = agent.init(jax.random.key(0)).params
        distilled = jax.grad(lambda params: agent.distillation(params, None, batch, noise))(params)
        acted = jax.grad(lambda params: agent._actor_loss(params, "noise_critic", batch, jax.random.key(0))[0])(params)
        return distilled, acted

    def moved(gradient):
        return {name for name, part in gradient.items() if any(np.any(leaf) for leaf in part.values())}

    distilled, acted = gradients()
    assert moved(distilled) == {"noise_critic"} and moved(acted) == {"actor", "temperature"}


def test_repeated_noise_is_one_actions_noise():
    agent = Sac(dataclasses.replace(CONFIG, repeat=True), FLOW, FEATURES)
    assert agent.width == 2
    spread = FLOW.spread(jnp.array([[1.0, 2.0]]))
    np.testing.assert_array_equal(spread, [[[1.0, 2.0], [1.0, 2.0]]])
    np.testing.assert_array_equal(FLOW.spread(jnp.arange(4.0)[None]), [[[0.0, 1.0], [2.0, 3.0]]])


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="agent.discount is 1.5"):
        AgentConfig(discount=1.5)
    with pytest.raises(UserError, match="agent.bound is 0.0"):
        AgentConfig(bound=0.0)
    with pytest.raises(UserError, match="agent.critics is 0"):
        AgentConfig(critics=0)
