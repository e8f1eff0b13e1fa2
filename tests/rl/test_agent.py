"""The agents on problems with known answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vla_jax.errors import UserError
from vla_jax.rl.agent import AgentConfig, NoiseAliased, Sac, Search, td_loss, td_target
from vla_jax.rl.networks import NoiseActor
from vla_jax.rl.replay import Transition, empty

FEATURES = 3
CONFIG = AgentConfig(width=32, batch_size=64, learning_rate=3e-3, polyak=0.05)
AGENTS = {"sac": Sac, "na": NoiseAliased, "search": Search}


def one_step(flow, count, key, reward=None):
    """Transitions of a bandit under the prior: reward 0 in the good mode, -1 in the other; every episode ends."""
    keys = jax.random.split(key)
    observation, noise = jax.random.normal(keys[0], (count, FEATURES)), jax.random.normal(keys[1], (count, 4))
    chunk = flow.decode(None, observation, flow.spread(noise))
    reward = jnp.where(chunk[:, 0, 0] > 0, 0.0, -1.0) if reward is None else reward
    zeros = jnp.zeros(count)
    return Transition(observation, noise, chunk, reward, zeros, observation, jnp.arange(count))


def learn(agent, flow, updates, key=0, rows=None):
    rows = one_step(flow, 512, jax.random.key(7)) if rows is None else rows
    replay = empty(rows, 512).add(rows)
    state = agent.init(jax.random.key(key))
    update = jax.jit(lambda state, key: agent.update(state, None, replay, key, updates))
    return update(state, jax.random.key(key + 1))


def share_of_good(agent, flow, state, key=3):
    observation = jax.random.normal(jax.random.key(key), (256, FEATURES))
    noise = agent.source(state)(observation, jax.random.key(key))
    return float((flow.decode(None, observation, flow.spread(noise))[:, 0, 0] > 0).mean())


@pytest.mark.parametrize("name", AGENTS)
def test_every_agent_finds_the_rare_mode_of_a_bandit(flow, name):
    agent = AGENTS[name](CONFIG, flow, FEATURES)
    before = share_of_good(agent, flow, agent.init(jax.random.key(0)))
    state, _ = learn(agent, flow, 400)
    assert share_of_good(agent, flow, state) > 0.9
    assert before < 0.9


def test_rewards_that_say_nothing_teach_nothing(flow):
    rows = one_step(flow, 512, jax.random.key(7))
    shuffled = jax.random.permutation(jax.random.key(9), rows.reward)
    agent = NoiseAliased(CONFIG, flow, FEATURES)
    state, _ = learn(agent, flow, 400, rows=dataclasses.replace(rows, reward=shuffled))
    assert share_of_good(agent, flow, state) < 0.6


def test_td_target_by_hand():
    """Success; a step on the way; the time limit, which counts like any step. The least critic counts."""
    reward, discount = jnp.array([0.0, -1.0, -1.0]), jnp.array([0.0, 0.9, 0.9])
    next_values = jnp.array([[-7.0, -2.0, -4.0], [-5.0, -3.0, -1.0]])
    np.testing.assert_allclose(td_target(reward, discount, next_values), [0.0, -1 + 0.9 * -3.0, -1 + 0.9 * -4.0])
    values = jnp.array([[1.0, 2.0], [0.0, 0.0]])
    assert float(td_loss(values, jnp.array([0.0, 0.0]))) == pytest.approx(0.5 * (1 + 4) / 2)


@pytest.mark.parametrize("backup", [False, True])
def test_the_critics_loss_is_that_of_the_target(flow, backup):
    """The critic's loss of SAC on one batch, worked out again from the networks."""
    config = dataclasses.replace(CONFIG, backup_entropy=backup)
    agent = Sac(config, flow, FEATURES)
    state, key = agent.init(jax.random.key(0)), jax.random.key(5)
    batch = dataclasses.replace(one_step(flow, 8, jax.random.key(1)), discount=jnp.full(8, 0.9))
    _, logs = agent.loss(state.params, state.target, None, batch, key)
    actor = agent.network("actor", state.params["actor"])
    noise, log_density = actor(batch.next_observation, jax.random.split(key)[0])
    following = agent.network("critic", state.target)(batch.next_observation, noise).min(0)
    following -= backup * config.temperature * log_density
    values = agent.network("critic", state.params["critic"])(batch.observation, batch.noise)
    expected = 0.5 * jnp.square(values - (batch.reward + 0.9 * following)).mean(-1).sum()
    assert float(logs["critic_loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_the_noise_critic_recovers_the_action_critic(flow):
    """With the action critic held still, the distilled one agrees with it on noises that it never saw."""
    agent = NoiseAliased(CONFIG, flow, FEATURES)
    state, _ = learn(agent, flow, 400)
    observation, noise = (jax.random.normal(jax.random.key(k), (256, n)) for k, n in ((11, FEATURES), (12, 4)))
    noise = jnp.clip(noise, -CONFIG.bound, CONFIG.bound)
    chunk = flow.decode(None, observation, flow.spread(noise)).reshape(256, -1)
    wanted = agent.network("critic", state.params["critic"])(observation, chunk)
    values = agent.network("noise_critic", state.params["noise_critic"])(observation, noise)
    assert float(jnp.square(values - wanted).mean() / wanted.var()) < 0.4


def test_the_actors_density_is_that_of_its_box():
    """exp(log density) integrates to 1 over [-b, b], whatever b is."""
    actor = NoiseActor(FEATURES, 1, 8, 1, 2.5, nnx.Rngs(0))
    noise, log_density = actor(jnp.tile(jnp.ones((1, FEATURES)), (20_000, 1)), jax.random.key(0))
    assert float(jnp.abs(noise).max()) <= 2.5
    # E[1 / p] over draws from p is the length of the box.
    assert float(jnp.mean(jnp.exp(-log_density))) == pytest.approx(5.0, rel=0.1)


def test_no_network_but_its_own_learns_from_a_loss(flow):
    """The distillation moves the noise critic alone; the actor's loss leaves both critics alone."""
    agent = NoiseAliased(CONFIG, flow, FEATURES)
    state, batch = agent.init(jax.random.key(0)), one_step(flow, 8, jax.random.key(1))
    noise = jnp.zeros((8, 4))

    def moved(loss):
        gradients = jax.grad(loss)(state.params)
        return {name for name, part in gradients.items() if any(jnp.any(leaf != 0) for leaf in part.values())}

    assert moved(lambda params: agent.distillation(params, None, batch, noise)) == {"noise_critic"}
    actor_loss = lambda params: agent._actor_loss(params, "noise_critic", batch, jax.random.key(0))[0]  # noqa: E731
    assert moved(actor_loss) == {"actor", "temperature"}


def test_repeated_noise_is_one_actions_noise(flow):
    agent = Sac(dataclasses.replace(CONFIG, repeat=True), flow, FEATURES)
    assert agent.width == 2
    spread = flow.spread(jnp.array([[1.0, 2.0]]))
    np.testing.assert_array_equal(spread, [[[1.0, 2.0], [1.0, 2.0]]])
    np.testing.assert_array_equal(flow.spread(jnp.arange(4.0)[None]), [[[0.0, 1.0], [2.0, 3.0]]])


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="agent.discount is 1.5"):
        AgentConfig(discount=1.5)
    with pytest.raises(UserError, match="agent.bound is 0.0"):
        AgentConfig(bound=0.0)
    with pytest.raises(UserError, match="agent.critics is 0"):
        AgentConfig(critics=0)
