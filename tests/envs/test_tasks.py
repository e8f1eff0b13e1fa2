"""Task families: the expert fulfils them, recovers from noise, and success means what it says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.demonstrate import demonstrate
from vla_jax.envs.env import STREAK, EnvConfig, Tabletop
from vla_jax.envs.mjcf import EMBODIMENTS
from vla_jax.envs.sampling import sample_episode
from vla_jax.envs.scene import RELATION_VECTORS, take
from vla_jax.envs.tasks import TASKS, get_task
from vla_jax.errors import UserError

SCENES = 128


@functools.cache
def episodes(task, count=SCENES, seed=1):
    sample = jax.jit(jax.vmap(lambda key: sample_episode(key, task, BiasConfig(rho=1.0))))
    return sample(jax.random.split(jax.random.key(seed), count))


@functools.cache
def environment(task, embodiment="floating"):
    return Tabletop(EnvConfig(embodiment=embodiment, task=task, engine="c"))


@functools.cache
def reset(task, count):
    return jax.jit(environment(task).reset)(*take(episodes(task), slice(0, count)))


@functools.cache
def judge(task):
    return jax.jit(get_task(task).success)


@pytest.mark.parametrize("embodiment", EMBODIMENTS)
@pytest.mark.parametrize("task", TASKS)
def test_expert_succeeds_with_and_without_noise(task, embodiment):
    env, drawn = environment(task, embodiment), episodes(task)
    clean = demonstrate(env, *drawn, jax.random.key(0), noise=0.0)
    assert clean.success.mean() >= 0.98
    noisy = demonstrate(env, *drawn, jax.random.key(0), noise=0.005)
    assert noisy.success.mean() >= 0.95
    # Stages are passed through in order, and the time given is ample.
    assert clean.phase.max() == len(env.task.stages) - 1
    assert np.percentile(clean.length, 95) < 0.9 * env.max_ticks


def test_reach_is_quick():
    lengths = demonstrate(environment("reach"), *episodes("reach"), jax.random.key(0)).length
    assert 6 <= np.median(lengths) <= 12 and lengths.max() <= 14


@pytest.mark.parametrize("task", TASKS)
def test_nothing_is_fulfilled_at_the_start(task):
    scene, command, _ = episodes(task)
    state = reset(task, SCENES)
    assert not judge(task)(scene, command, state.bodies, state.start).any()


@pytest.mark.parametrize("task", ["reach", "pick"])
def test_the_expert_fulfils_its_command_and_not_another_objects(task):
    env = environment(task)
    scene, command, _ = episodes(task)
    other = dataclasses.replace(command, target=(command.target + 1) % 3)
    trace = run(env, scene, command, other)
    assert trace.success.mean() >= 0.98 and trace.cue_success.mean() <= 0.02
    swapped = run(env, scene, other, command)
    assert swapped.success.mean() >= 0.98 and swapped.cue_success.mean() <= 0.02


@functools.partial(jax.jit, static_argnames="env")
def run(env, scene, command, cue):
    def tick(state, _):
        action, state = env.expert(state)
        return env.step(state, action), None

    return jax.lax.scan(tick, env.reset(scene, command, cue), length=env.max_ticks)[0]


def start(task, count=8):
    state = reset(task, count)
    return state.scene, state.command, state.bodies, state.start


def move(bodies, index, offset):
    rows = jnp.arange(index.shape[0])
    return dataclasses.replace(bodies, object_position=bodies.object_position.at[rows, index].add(offset))


def test_pushed_means_along_the_direction_and_nothing_else_moved():
    scene, command, bodies, first = start("push")
    success, ahead = judge("push"), jnp.asarray(RELATION_VECTORS)[command.relation]
    ahead = jnp.pad(ahead, ((0, 0), (0, 1)))
    aside = jnp.stack([-ahead[:, 1], ahead[:, 0], ahead[:, 2]], -1)
    pushed = move(bodies, command.target, 0.08 * ahead)
    bystander = (command.target + 1) % 3
    assert success(scene, command, pushed, first).all()
    assert not success(scene, command, move(bodies, command.target, 0.05 * ahead), first).any()
    assert not success(scene, command, move(bodies, command.target, -0.08 * ahead), first).any()
    assert not success(scene, command, move(pushed, command.target, 0.05 * aside), first).any()
    assert not success(scene, command, move(pushed, bystander, 0.04 * aside), first).any()
    assert success(scene, command, move(pushed, bystander, 0.02 * aside), first).all()


def test_picked_means_between_the_fingers():
    scene, command, bodies, first = start("pick")
    success, rows = judge("pick"), jnp.arange(8)
    up = jnp.array([0.0, 0.0, 0.1])
    lifted = move(bodies, command.target, up)
    held = dataclasses.replace(
        lifted, tcp_position=lifted.object_position[rows, command.target], opening=jnp.full(8, 0.04)
    )
    assert success(scene, command, held, first).all()
    assert not success(scene, command, lifted, first).any()  # thrown, not held
    low = move(held, command.target, jnp.array([0.0, 0.0, -0.06]))
    assert not success(scene, command, low, first).any()


@pytest.mark.parametrize("task", ["place_on", "place_relative"])
def test_placed_means_on_the_spot_and_let_go(task):
    scene, command, bodies, first = start(task)
    success, rows = judge(task), jnp.arange(8)
    if task == "place_on":
        spot = scene.zone_position[rows, command.goal]
    else:
        relation = jnp.asarray(RELATION_VECTORS)[command.relation]
        spot = scene.position[rows, command.goal] + 0.09 * relation
    shift = jnp.pad(spot - scene.position[rows, command.target], ((0, 0), (0, 1)))
    placed = move(bodies, command.target, shift)
    target = placed.object_position[rows, command.target]
    away = dataclasses.replace(placed, tcp_position=target + jnp.array([0.0, 0.0, 0.1]))
    assert success(scene, command, away, first).all()
    still_held = dataclasses.replace(away, tcp_position=target)
    closed = dataclasses.replace(away, opening=jnp.full(8, 0.04))
    raised = move(away, command.target, jnp.array([0.0, 0.0, 0.03]))
    beside = move(away, command.target, jnp.array([0.06, 0.06, 0.0]))
    for wrong in (bodies, still_held, closed, raised, beside):
        assert not success(scene, command, wrong, first).any()


def test_reached_means_nearest_to_the_named_object():
    scene, command, bodies, first = start("reach")
    success, rows = judge("reach"), jnp.arange(8)
    above = bodies.object_position[rows, command.target].at[:, 2].set(0.065)
    there = dataclasses.replace(bodies, tcp_position=above)
    assert success(scene, command, there, first).all()
    other = dataclasses.replace(command, target=(command.target + 1) % 3)
    assert not success(scene, other, there, first).any()
    high = dataclasses.replace(bodies, tcp_position=above.at[:, 2].add(0.04))
    assert not success(scene, command, high, first).any()


def test_success_needs_consecutive_ticks_and_is_latched():
    env = environment("reach")
    state = reset("reach", 8)
    step, expert = jax.jit(env.step), jax.jit(env.expert)
    streaks, successes = [], []
    for tick in range(env.max_ticks):
        action, state = expert(state)
        action = action if tick < 12 else jnp.array([[0.0, 0.0, 0.05, 0.0, 0.08]] * 8)  # leave at the end
        state = step(state, action)
        streaks.append(np.asarray(state.streak))
        successes.append(np.asarray(state.success))
    streaks, successes = np.stack(streaks), np.stack(successes)
    first = np.argmax(streaks >= STREAK, axis=0)
    assert np.array_equal(np.argmax(successes, axis=0), first)
    assert (streaks[-1] == 0).all() and successes[-1].all()


def test_an_unknown_family_gets_a_suggestion():
    with pytest.raises(UserError, match="did you mean 'place_on'"):
        get_task("place-on")
