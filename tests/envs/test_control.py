"""The controller obeys actions to the millimetre, and the kinematics below it are MuJoCo's."""

import functools

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from vla_jax.envs import control, panda
from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.env import EnvConfig, Tabletop
from vla_jax.envs.kinematics import Kinematics, jacobian, yaw_of
from vla_jax.envs.mjcf import EMBODIMENTS, build_model, mjcf
from vla_jax.envs.sampling import sample_episode
from vla_jax.errors import UserError

SCENES = 32


@functools.cache
def environment(embodiment):
    return Tabletop(EnvConfig(embodiment=embodiment, task="reach", engine="c"))


@functools.cache
def episodes():
    sample = jax.jit(jax.vmap(lambda key: sample_episode(key, "reach", BiasConfig())))
    return sample(jax.random.split(jax.random.key(7), SCENES))


@functools.cache
def step(embodiment):
    return jax.jit(environment(embodiment).step)


@functools.cache
def start(embodiment):
    return jax.jit(environment(embodiment).reset)(*episodes())


def actions(move, turn=0.0, opening=0.08):
    move = np.broadcast_to(np.asarray(move, np.float32), (SCENES, 3))
    rest = np.broadcast_to(np.array([turn, opening], np.float32), (SCENES, 2))
    return jnp.asarray(np.concatenate([move, rest], -1))


def test_clip_keeps_the_direction_of_a_move_and_bounds_the_rest():
    clipped = control.clip_action(jnp.array([[0.3, -0.4, 0.0, 2.0, 0.2], [0.01, 0.02, -0.03, -0.1, 0.04]]))
    np.testing.assert_allclose(clipped[0], [0.03, -0.04, 0.0, 0.3, 0.08], atol=1e-6)
    np.testing.assert_allclose(clipped[1], [0.01, 0.02, -0.03, -0.1, 0.04], atol=1e-6)
    np.testing.assert_allclose(control.clip_action(jnp.zeros((1, 5)) - 1)[0, 3:], [-0.3, 0.0])


@pytest.mark.parametrize("embodiment", EMBODIMENTS)
def test_an_action_that_is_too_large_moves_no_further_than_the_limit(embodiment):
    state = start(embodiment)
    after = step(embodiment)(state, actions([0.0, 0.0, 1.0]))
    moved = after.bodies.tcp_position - state.bodies.tcp_position
    assert np.linalg.norm(moved, axis=-1).max() < control.MAX_STEP + 0.01
    assert np.all(np.asarray(moved[:, 2]) > 0.03)


@pytest.mark.parametrize("embodiment", EMBODIMENTS)
def test_the_tcp_follows_commanded_deltas_within_5_mm(embodiment):
    state = start(embodiment)
    rng = np.random.default_rng(0)
    errors, turns = [], []
    heading = rng.normal(size=(SCENES, 3))
    for tick in range(16):
        wanted = 0.02 * heading / np.linalg.norm(heading, axis=-1, keepdims=True) * (1 if tick % 8 < 4 else -1)
        turn = 0.1 if tick % 4 < 2 else -0.1
        before = state.bodies.tcp_position, yaw_of(state.bodies.tcp_rotation)
        state = step(embodiment)(state, actions(wanted, turn))
        errors.append(np.linalg.norm(state.bodies.tcp_position - before[0] - wanted, axis=-1))
        turns.append(np.abs(control.wrap(yaw_of(state.bodies.tcp_rotation) - before[1] - turn)))
    assert np.max(errors) < 0.005
    assert np.percentile(turns, 95) < 0.05
    tilt = np.degrees(np.arccos(np.clip(-np.asarray(state.bodies.tcp_rotation[:, 2, 2]), -1, 1)))
    assert tilt.max() < 3.0  # the hand points down


@pytest.mark.parametrize("embodiment", EMBODIMENTS)
def test_the_hand_comes_to_rest_on_the_set_point_and_its_fingers_obey(embodiment):
    state = start(embodiment)
    for move in ([0.03, 0.02, 0.01], [0.03, 0.02, 0.01]):
        state = step(embodiment)(state, actions(move, 0.2))
    for _ in range(5):
        state = step(embodiment)(state, actions([0.0, 0.0, 0.0], opening=0.03))
    assert np.abs(state.bodies.tcp_position - state.target_pose.position).max() < 0.001
    np.testing.assert_allclose(state.bodies.opening, 0.03, atol=0.003)


@pytest.mark.parametrize("embodiment", EMBODIMENTS)
def test_the_set_point_stays_inside_the_workspace(embodiment):
    state = start(embodiment)
    for _ in range(12):
        state = step(embodiment)(state, actions([0.02, 0.03, -0.03]))
    low, high = control.WORKSPACE[:, 0], control.WORKSPACE[:, 1]
    position = np.asarray(state.target_pose.position)
    assert (position >= low - 1e-6).all() and (position <= high + 1e-6).all()
    assert np.asarray(state.bodies.tcp_position)[:, 2].min() > 0.0


@pytest.mark.parametrize("embodiment", EMBODIMENTS)
def test_forward_kinematics_are_mujocos(embodiment):
    model = build_model(embodiment)
    data, rng = mujoco.MjData(model), np.random.default_rng(0)
    joints = EMBODIMENTS[embodiment].JOINTS
    data.qpos[:joints] = rng.normal(size=joints) * 0.3
    data.qpos[joints : joints + 2] = [0.01, 0.03]
    for at in range(joints + 2, model.nq, 7):
        turn = rng.normal(size=4)
        data.qpos[at + 3 : at + 7] = turn / np.linalg.norm(turn)
    data.mocap_pos[:, :2] = [[0.4, 0.1], [0.5, -0.1]]
    mujoco.mj_forward(model, data)
    forward = jax.jit(Kinematics(model).bodies)
    bodies = forward(jnp.asarray(data.qpos, jnp.float32), jnp.asarray(data.mocap_pos[:, :2]))
    np.testing.assert_allclose(bodies.geom_position, data.geom_xpos, atol=1e-5)
    np.testing.assert_allclose(bodies.geom_rotation.reshape(-1, 9), data.geom_xmat, atol=1e-5)
    np.testing.assert_allclose(bodies.tcp_position, data.site("tcp").xpos, atol=1e-5)
    np.testing.assert_allclose(bodies.object_position[2], data.body("object2").xpos, atol=1e-5)
    np.testing.assert_allclose(bodies.opening, 0.04, atol=1e-6)


def test_the_jacobian_is_the_derivative_of_the_tcp():
    kinematics = Kinematics(build_model("panda"))
    arm = jnp.asarray(panda.HOME) + 0.2 * jax.random.normal(jax.random.key(0), (7,))
    chain = jax.jit(kinematics.chain)
    rows = jacobian(chain(arm))
    linear = jax.jacfwd(lambda q: chain(q).tcp_position)(arm)
    np.testing.assert_allclose(rows[:3], linear, atol=1e-4)
    spin = jax.jacfwd(lambda q: chain(q).tcp_rotation)(arm)  # [3, 3, J] = [omega]x R
    rotation = chain(arm).tcp_rotation
    cross = jnp.einsum("ikj,lk->ilj", spin, rotation)
    angular = jnp.stack([cross[2, 1], cross[0, 2], cross[1, 0]])
    np.testing.assert_allclose(rows[3:], angular, atol=1e-4)


@pytest.mark.parametrize("embodiment", EMBODIMENTS)
def test_the_mass_matrix_is_mujocos(embodiment):
    model, joints = build_model(embodiment), EMBODIMENTS[embodiment].JOINTS
    data, arm = mujoco.MjData(model), np.random.default_rng(1).normal(size=joints) * 0.4
    data.qpos[:joints] = arm
    mujoco.mj_forward(model, data)
    full = np.zeros((model.nv, model.nv))
    mujoco.mj_fullM(model, data, full)
    matrix = jax.jit(Kinematics(model).mass_matrix)(jnp.asarray(arm, jnp.float32))
    np.testing.assert_allclose(matrix, full[:joints, :joints], atol=2e-3)  # the fingers count as part of the hand


def test_the_small_solver_solves():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(16, 6, 6)).astype(np.float32)
    matrix = root @ np.swapaxes(root, 1, 2) + 0.1 * np.eye(6, dtype=np.float32)
    vector = rng.normal(size=(16, 6)).astype(np.float32)
    solved = panda._solve(jnp.asarray(matrix), jnp.asarray(vector))
    np.testing.assert_allclose(np.einsum("bij,bj->bi", matrix, solved), vector, atol=2e-2)


def test_an_unknown_robot_is_a_clear_error():
    with pytest.raises(UserError, match="unknown embodiment 'ur5'"):
        mjcf("ur5")
