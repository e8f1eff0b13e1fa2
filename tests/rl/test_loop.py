"""The compiled loop on a line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rl.walk import WEIGHTS, Walk, make_pool, walking
from vla_jax.errors import UserError
from vla_jax.rl.agent import AgentConfig, Sac
from vla_jax.rl.collect import Collector
from vla_jax.rl.controls import FixedNoise
from vla_jax.rl.loop import LoopConfig, begin, make_advance

AGENT = AgentConfig(width=8, batch_size=16, layers=1, learning_rate=3e-3)
LOOP = LoopConfig(scenes=8, capacity=64, warmup=16, updates=0.25)
POOL = make_pool([0.0, -0.2, 0.2])


def make(learner=Sac, loop=LOOP, rounds=2, **collector):
    flow = walking()
    collector = Collector(Walk(), flow, execute=1, ticks=3, discount=0.9, **collector)
    learner = learner(AGENT, flow, 2) if learner is Sac else learner(AGENT, flow)
    return lambda: begin(collector, learner, loop, POOL, WEIGHTS, 0), make_advance(
        collector, learner, loop, POOL, rounds
    )


@pytest.fixture(scope="module")
def sac():
    return make()


def run(program, calls, state=None, weights=WEIGHTS):
    start, advance = program
    state, logs = state or start(), []
    for _ in range(calls):
        state, log = advance(weights, state)
        logs.append(jax.device_get(log))
    return jax.device_get(state), jax.tree.map(lambda *parts: np.concatenate(parts), *logs)


def test_nothing_is_learned_before_the_warm_up_is_over(sac):
    start = jax.device_get(sac[0]())
    warm, log = run(sac, 1)
    assert log["learning"].tolist() == [0, 0]
    jax.tree.map(np.testing.assert_array_equal, warm.learner, start.learner)
    later, log = run(sac, 2)
    assert log["learning"].tolist() == [0, 0, 1, 1]
    kernel = "body/observed/kernel"
    assert (later.learner.params["actor"][kernel] != warm.learner.params["actor"][kernel]).any()
    assert int(later.round) == 4 and int(later.replay.size) == 32


def test_a_run_that_is_taken_up_again_is_the_same_run(sac):
    whole, _ = run(sac, 4)
    half, _ = run(sac, 2)  # on the host by now, as after a checkpoint
    again, _ = run(sac, 2, jax.tree.map(jnp.asarray, half))
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_the_noise_that_is_kept_is_the_noise_that_was_executed(sac):
    """Released code of DSRL-SAC denoises its warm-up twice and keeps the first noise."""
    state, _ = run(sac, 4)
    rows = jax.tree.map(lambda ring: ring[: int(state.replay.size)], state.replay.rows)
    np.testing.assert_allclose(rows.chunk[:, 0, 0], 0.5 * rows.noise[:, 0], rtol=1e-6)
    np.testing.assert_allclose(rows.next_observation - rows.observation, rows.chunk[:, 0, 0], atol=1e-6)
    assert np.abs(rows.noise[:16]).max() > AGENT.bound > np.abs(rows.noise[16:]).max()


def test_one_compilation_serves_the_whole_run():
    start, advance = make(FixedNoise, rounds=1)
    _, log = run((start, advance), 3, weights=jax.device_put(WEIGHTS, jax.devices()[0]))  # as a restored policy's are
    assert advance.compiled._cache_size() == 1
    # two rounds of warm-up, then one noise for all
    assert log["noise_rms"].std() > 0 and set(log) >= {"reward", "episodes", "successes"}


def test_a_fixed_noise_is_the_same_in_every_scene():
    state, _ = run(make(FixedNoise, rounds=1), 4)
    assert len(np.unique(state.replay.rows.noise[16:32])) == 1
    assert len(np.unique(state.replay.rows.noise[:16])) == 16


def test_learning_pays():
    """On a line where the prior's steps win one episode in four, the actor learns to step ahead."""
    loop = dataclasses.replace(LOOP, scenes=32, capacity=4096, warmup=320, updates=0.5)
    _, log = run(make(loop=loop, rounds=60), 1)
    success = log["successes"].cumsum()
    ended = log["episodes"].cumsum()
    early, late = success[9] / ended[9], (success[-1] - success[-15]) / (ended[-1] - ended[-15])
    assert early < 0.5 and late > 0.9


def test_a_reward_that_is_not_a_number_shows_in_the_log():
    _, log = run(make(rounds=1, reward=lambda state, success: jnp.where(state.place > 0.1, jnp.nan, -1.0)), 1)
    assert np.isnan(log["reward"]).any()


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="must hold a round"):
        LoopConfig(scenes=10, capacity=5)
    with pytest.raises(UserError, match="loop.updates is -1"):
        LoopConfig(updates=-1)
    assert LoopConfig(updates=0).updates_a_round == 0 and LoopConfig(updates=1e-9).updates_a_round == 1
