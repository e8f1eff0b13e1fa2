"""Keypoints: each step of the procedure on made-up data, and the whole of it in simulated scenes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.camera import Camera, project
from vla_jax.envs.env import EnvConfig, Tabletop
from vla_jax.envs.splits import make_cases
from vla_jax.envs.views import cameras_of
from vla_jax.errors import UserError
from vla_jax.steering.keypoints import (
    KeypointConfig,
    back_project,
    color_features,
    k_means,
    mean_shift,
    pca,
    propose,
    resize,
)
from vla_jax.steering.perceive import POINTED, Attached, _look, body_label, disturb, frames, join, perceive, track


def test_clusters_that_stand_apart_are_found():
    random = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    truth = np.repeat(np.arange(3), 30)
    values = centres[truth] + 0.05 * random.normal(size=(90, 2))
    found, member = k_means(values, 3, random)
    assert len({tuple(member[truth == k]) for k in range(3)}) == 3 and len(set(member)) == 3
    np.testing.assert_allclose(found[member[[0, 30, 60]]], centres, atol=0.05)
    assert len(k_means(np.zeros((5, 2)), 3, random)[0]) == 1, "equal values make one cluster"


def test_near_points_share_a_mode():
    points = np.array([[0.0, 0, 0], [0.03, 0, 0], [0.0, 0.03, 0], [0.3, 0, 0], [0.31, 0, 0]])
    modes = mean_shift(points, 0.05)
    np.testing.assert_allclose(modes[:3], [[0.01, 0.01, 0]] * 3, atol=1e-6)
    np.testing.assert_allclose(modes[3:], [[0.305, 0, 0]] * 2, atol=1e-6)


def test_strongest_directions_are_not_centred():
    values = np.array([[3.0, 4.0], [6.0, 8.0]])
    np.testing.assert_allclose(np.abs(pca(values, 1)), [[5.0], [10.0]], rtol=1e-6)
    assert pca(values, 3).shape == (2, 2)


def test_features_are_enlarged_evenly():
    grid = np.array([[0.0, 1.0]])[..., None]
    np.testing.assert_allclose(resize(grid, (2, 4))[..., 0], [[0, 0.25, 0.75, 1]] * 2)


def test_back_projection_inverts_the_camera():
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0].astype(np.float32)
    turn *= np.sign(np.linalg.det(turn))
    camera = Camera(jnp.array([0.1, 0.2, 1.0]), jnp.asarray(turn), jnp.float32(0.8))
    depth = np.random.default_rng(1).uniform(0.5, 2.0, (6, 8)).astype(np.float32)
    points = back_project(depth, *(np.asarray(leaf) for leaf in (camera.position, camera.rotation, camera.fovy)))
    pixels, again = project(camera, jnp.asarray(points), height=6, width=8)
    np.testing.assert_allclose(again, depth, rtol=1e-4)
    expected = np.stack(np.meshgrid(np.arange(8) + 0.5, np.arange(6) + 0.5), -1)
    np.testing.assert_allclose(pixels, expected, atol=1e-3)


def flat_scene():
    """Two flat things on a background: thing 1 is half red, half blue; thing 2 is small and green."""
    image, masks = np.zeros((20, 40, 3), np.uint8), np.zeros((20, 40), int)
    masks[5:15, 5:25], masks[5:10, 30:35] = 1, 2
    image[5:15, 5:15, 0], image[5:15, 15:25, 2], image[masks == 2] = 255, 255, (0, 255, 0)
    column, row = np.meshgrid(np.arange(40) / 40, np.arange(20) / 40)
    points = np.stack([column, row, np.zeros_like(row)], -1)
    return image, points, np.ones((20, 40)), masks


def test_parts_of_one_thing_get_points_of_their_own():
    image, points, depth, masks = flat_scene()
    names = {1: "flag", 2: "leaf"}
    found = propose(image, points, depth, masks, names, color_features, KeypointConfig(per_mask=2))
    assert found.labels == ("flag", "flag", "leaf")
    red, blue = sorted(found.position[:2, 0])
    assert 5 / 40 <= red < 15 / 40 <= blue < 25 / 40
    merged = propose(image, points, depth, masks, names, color_features, KeypointConfig(per_mask=2, merge=10.0))
    assert merged.labels == ("flag", "leaf"), "each mask keeps one"


def test_what_is_no_object_is_passed_over():
    image, points, depth, masks = flat_scene()
    names = {0: "table", 1: "flag", 2: "leaf"}
    config = KeypointConfig(per_mask=2)
    assert "table" not in propose(image, points, depth, masks, names, color_features, config).labels
    depth[masks == 2] = 0
    assert "leaf" not in propose(image, points, depth, masks, names, color_features, config).labels
    with pytest.raises(UserError, match="none of flag is seen"):
        propose(image, points, depth, np.zeros_like(masks), {1: "flag"}, color_features)
    inside = dataclasses.replace(config, high=(0.3, 1, 1))
    found = propose(image, points, depth, masks, {1: "flag"}, color_features, inside)
    assert len(found.labels) == 1 and found.position[0, 0] <= 0.3


@pytest.fixture(scope="module")
def env():
    return Tabletop(EnvConfig(task="reach", image_size=32))


@pytest.fixture(scope="module")
def table(env):
    cases = make_cases("in_distribution", "reach", BiasConfig("uniqueness", 0.1), 0, 2)
    state = jax.jit(env.reset)(cases.scene, cases.command, cases.cue)
    return state, perceive(env, state, size=80)


def test_a_second_batch_compiles_nothing_and_what_fills_it_up_is_passed_over(env, table):
    state, found = table
    compiled = _look._cache_size()
    (first,) = perceive(env, state, size=80, count=1)
    assert _look._cache_size() == compiled
    np.testing.assert_array_equal(first.keypoints.position, found[0].keypoints.position)


def test_every_object_of_a_simulated_scene_is_found(table):
    state, found = table
    for row, one in enumerate(found):
        present = np.flatnonzero(np.asarray(state.scene.present)[row])
        scene = jax.tree.map(lambda leaf, row=row: np.asarray(leaf)[row], state.scene)
        assert set(one.keypoints.labels) == {body_label(scene, slot) for slot in present}
        centre = np.asarray(state.bodies.object_position)[row][one.attached.body]
        gap = np.linalg.norm(one.keypoints.position - centre, axis=-1)
        assert gap.max() < 0.02 * 3**0.5 + 0.003, "on the object's surface"
        assert one.picture.startswith(b"\x89PNG")


def test_keypoints_ride_on_their_objects(table):
    state, found = table
    attached = join(found)
    before = track(attached, frames(state))
    for row, one in enumerate(found):
        np.testing.assert_allclose(before[row, : len(one.keypoints.labels)], one.keypoints.position, atol=1e-5)
    turn = jnp.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    bodies = state.bodies
    moved = dataclasses.replace(
        bodies,
        object_position=bodies.object_position + jnp.array([0.1, 0, 0]),
        object_rotation=turn @ bodies.object_rotation,
    )
    after = track(attached, frames(dataclasses.replace(state, bodies=moved)))
    pick = jax.vmap(lambda leaf, index: leaf[index])
    centre = pick(bodies.object_position, attached.body)
    np.testing.assert_allclose(after, centre + (before - centre) @ turn.T + jnp.array([0.1, 0, 0]), atol=1e-5)


def test_what_is_pointed_at_becomes_a_keypoint_that_stands_still(env, table):
    state, found = table
    cameras = jax.tree.map(lambda leaf: leaf[:, 0], cameras_of(env.model, state.bodies, state.scene))
    places = np.asarray(
        jax.vmap(lambda c, p: project(c, p, height=1, width=1)[0])(cameras, state.bodies.object_position)
    )
    pointed = perceive(env, state, size=80, places=np.stack([places[0, 1], [np.nan, np.nan]]))
    assert pointed[0].keypoints.labels == (*found[0].keypoints.labels, POINTED)
    assert pointed[1].keypoints.labels == found[1].keypoints.labels, "nobody pointed here"
    gap = pointed[0].keypoints.position[-1] - np.asarray(state.bodies.object_position)[0, 1]
    assert np.linalg.norm(gap) < 0.04 and gap[2] > 0, "on top of the object"
    moved = dataclasses.replace(state.bodies, object_position=state.bodies.object_position + 1.0)
    after = track(join(pointed), frames(dataclasses.replace(state, bodies=moved)))
    np.testing.assert_allclose(after[0, len(found[0].keypoints.labels)], pointed[0].keypoints.position[-1], atol=1e-6)
    np.testing.assert_allclose(after[0, 0], pointed[0].keypoints.position[0] + 1.0, atol=1e-5)


def test_pose_noise_has_its_size():
    attached = Attached(np.zeros((1, 5000), int), np.ones((1, 5000, 3), np.float32))
    off = disturb(attached, 0.02, jax.random.key(0)).local - 1
    assert abs(float(off.std()) - 0.02) < 0.001 and abs(float(off.mean())) < 0.001
    np.testing.assert_array_equal(disturb(attached, 0.0, jax.random.key(0)).local, attached.local)
