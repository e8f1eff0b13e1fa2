"""The environment: pure, repeatable, one scene untouched by its neighbours."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.envs import control
from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.demonstrate import AFTERMATH, demonstrate
from vla_jax.envs.env import EnvConfig, Tabletop
from vla_jax.envs.kinematics import yaw_of
from vla_jax.envs.mjcf import EMBODIMENTS
from vla_jax.envs.sampling import sample_episode
from vla_jax.envs.scene import OBJECT_HALF, PARKED_X, take
from vla_jax.errors import UserError

SCENES = 16


@functools.cache
def environment(embodiment="floating"):
    return Tabletop(EnvConfig(embodiment=embodiment, task="pick", engine="c", image_size=32))


@functools.cache
def episodes(seed=3):
    sample = jax.jit(jax.vmap(lambda key: sample_episode(key, "pick", BiasConfig())))
    return sample(jax.random.split(jax.random.key(seed), SCENES))


@pytest.mark.parametrize("embodiment", EMBODIMENTS)
def test_reset_puts_everything_where_the_scene_says(embodiment):
    scene, command, cue = episodes()
    state = jax.jit(environment(embodiment).reset)(scene, command, cue)
    assert np.linalg.norm(state.bodies.tcp_position - scene.tcp, axis=-1).max() < 0.002
    assert np.abs(control.wrap(yaw_of(state.bodies.tcp_rotation) - scene.tcp_yaw)).max() < 0.01
    np.testing.assert_allclose(state.bodies.opening, 0.08, atol=1e-6)
    present = np.asarray(scene.present)
    position = np.asarray(state.bodies.object_position)
    np.testing.assert_allclose(position[present][:, :2], np.asarray(scene.position)[present], atol=1e-6)
    np.testing.assert_allclose(position[..., 2], OBJECT_HALF, atol=1e-6)
    assert (~present).any() and (position[~present][:, 0] == PARKED_X).all()
    np.testing.assert_allclose(yaw_of(state.bodies.object_rotation)[present], np.asarray(scene.yaw)[present], atol=1e-5)


@pytest.mark.parametrize("embodiment", EMBODIMENTS)
def test_objects_lie_still_under_an_idle_hand(embodiment):
    env = environment(embodiment)
    state, step = jax.jit(env.reset)(*episodes()), jax.jit(env.step)
    for _ in range(5):
        state = step(state, jnp.array([[0.0, 0.0, 0.0, 0.0, 0.08]] * SCENES))
    assert np.abs(state.bodies.object_position - state.start).max() < 0.001
    assert np.abs(state.bodies.tcp_position - state.scene.tcp).max() < 0.002


def test_the_same_key_gives_the_same_episode_whatever_ran_before():
    env = environment()
    first = demonstrate(env, *episodes(), jax.random.key(5))
    demonstrate(env, *episodes(seed=4), jax.random.key(6))
    again = demonstrate(env, *episodes(), jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, dataclasses.astuple(first), dataclasses.astuple(again))
    other = demonstrate(env, *episodes(), jax.random.key(6))
    assert not np.array_equal(first.state, other.state)


def test_an_episode_does_not_depend_on_its_neighbours():
    env, order = environment(), np.random.default_rng(0).permutation(SCENES)
    straight = demonstrate(env, *episodes(), jax.random.key(0), noise=0.0)
    shuffled = demonstrate(env, *(take(part, order) for part in episodes()), jax.random.key(0), noise=0.0)
    np.testing.assert_allclose(shuffled.state, straight.state[:, order], atol=1e-5)
    np.testing.assert_array_equal(shuffled.success, straight.success[order])


def test_demonstrations_end_soon_after_success_and_hold_clean_actions():
    env = environment()
    noisy = demonstrate(env, *episodes(), jax.random.key(0), noise=0.01)
    assert noisy.actions.shape == (env.max_ticks, SCENES, 5) and noisy.state.shape == (env.max_ticks, SCENES, 6)
    np.testing.assert_allclose(noisy.actions, control.clip_action(noisy.actions), atol=1e-6)
    # The first action is what the expert wants from the start, without the noise that was executed.
    action, _ = jax.jit(lambda *drawn: env.expert(env.reset(*drawn)))(*episodes())
    np.testing.assert_allclose(noisy.actions[0], action, atol=1e-5)
    quick = demonstrate(env, *episodes(), jax.random.key(0), noise=0.0)
    held = quick.bodies.object_position[..., 2].max(-1) > 0.08
    first = np.argmax(held, axis=0)
    assert quick.success.all() and np.all(quick.length >= first + AFTERMATH) and np.all(quick.length <= env.max_ticks)


def test_observation_is_pictures_and_proprioception():
    env = environment()
    seen = jax.jit(lambda *drawn: env.observe(env.reset(*drawn)))(*episodes())
    assert set(seen["images"]) == {"front", "wrist"}
    for image in seen["images"].values():
        assert image.shape == (SCENES, 32, 32, 3) and image.dtype == jnp.uint8
    scene = episodes()[0]
    expected = np.column_stack([scene.tcp, np.sin(scene.tcp_yaw), np.cos(scene.tcp_yaw), np.full(SCENES, 0.08)])
    np.testing.assert_allclose(seen["state"], expected, atol=1e-3)


def test_episode_length_can_be_set():
    assert Tabletop(EnvConfig(engine="c")).max_ticks == 16
    assert Tabletop(EnvConfig(engine="c", max_ticks=9)).max_ticks == 9


@pytest.mark.parametrize(
    "field, message", [("task", "unknown task"), ("engine", "unknown physics engine"), ("embodiment", "unknown embodi")]
)
def test_a_bad_config_is_a_clear_error(field, message):
    with pytest.raises(UserError, match=message):
        Tabletop(EnvConfig(**{field: "nonsense"}))
