"""Shifted scenes: targets lie where no demonstration has them, and are still what the sentence names."""

import dataclasses

import jax
import numpy as np
import pytest

from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.language import instructions
from vla_jax.envs.sampling import SceneConfig
from vla_jax.envs.scene import POST_SLOT, TABLE_X, TABLE_Y, take
from vla_jax.envs.splits import make_cases
from vla_jax.errors import UserError
from vla_jax.steering.shifts import BESIDE, CLEARANCE, POOL, ROOM, beyond_edge, make_shift

BIAS = BiasConfig("uniqueness", 0.1)


def shift(name, n=12):
    return make_shift(name, "reach", BIAS, 0, n, SceneConfig(3))


def test_points_leave_by_the_nearest_edge():
    place = np.array([[0.5, 0.19], [0.5, -0.17], [0.61, 0.0]], np.float32)
    found = beyond_edge(place, 0.05)
    np.testing.assert_allclose(found, [[0.5, TABLE_Y[1] + 0.05], [0.5, TABLE_Y[0] - 0.05], [TABLE_X[1] + 0.05, 0]])


@pytest.mark.parametrize(("name", "distance"), [("moved", 0.03), ("unseen", 0.08)])
def test_only_targets_move_and_stay_what_they_are_called(name, distance):
    cases = shift(name)
    rows, target = np.arange(12), np.asarray(cases.command.target)
    position, present = np.asarray(cases.scene.position), np.asarray(cases.scene.present)
    x, y = position[rows, target].T
    outside = np.maximum(np.maximum(np.abs(y) - TABLE_Y[1], x - TABLE_X[1]), 0)
    np.testing.assert_allclose(outside, distance, atol=1e-5)
    gap = np.linalg.norm(position - position[rows, target][:, None], axis=-1)
    assert gap[present & (np.arange(4) != target[:, None])].min() > CLEARANCE
    others = position[present & (np.arange(4) != target[:, None])]
    assert (np.abs(others[:, 1]) <= TABLE_Y[1] + 1e-6).all() and (others[:, 0] <= TABLE_X[1] + 1e-6).all()
    assert instructions("reach", cases.scene, cases.command) == cases.text, "each name fits its object alone"


def test_an_obstacle_stands_on_the_straight_way_and_nothing_else_changes():
    cases, rows = shift("obstacle"), np.arange(12)
    before = make_cases("in_distribution", "reach", BIAS, 0, 12 * POOL, SceneConfig(3))
    (kept,) = np.nonzero((np.asarray(before.scene.tcp)[:, None] == np.asarray(cases.scene.tcp)).all(-1).any(1))
    plain = take(before.scene, kept)
    for field in dataclasses.fields(plain):
        old, new = (np.asarray(getattr(scene, field.name)) for scene in (plain, cases.scene))
        if old.shape == (12, 4) or field.name == "position":
            old, new = old[:, :POST_SLOT], new[:, :POST_SLOT]
        np.testing.assert_array_equal(old, new, field.name)
    scene = jax.tree.map(np.asarray, cases.scene)
    assert scene.present[:, POST_SLOT].all() and not scene.movable[:, POST_SLOT].any()
    start, post = scene.tcp[:, :2], scene.position[:, POST_SLOT]
    way = scene.position[rows, np.asarray(cases.command.target)] - start
    length = np.linalg.norm(way, axis=-1, keepdims=True)
    along = ((post - start) * way).sum(-1) / length[:, 0]
    np.testing.assert_allclose(post - start, along[:, None] * way / length, atol=1e-6)
    assert along.min() > ROOM and (length[:, 0] - along).min() > ROOM
    assert np.linalg.norm(scene.position[:, :POST_SLOT] - post[:, None], axis=-1).min() > BESIDE
    assert (scene.color[:, :POST_SLOT] != scene.color[:, POST_SLOT:]).all(), "the post's name is its own"
    assert instructions("reach", cases.scene, cases.command) == cases.text, "each name fits its object alone"


def test_an_obstacle_needs_a_place():
    with pytest.raises(UserError, match="at most 3 objects"):
        make_shift("obstacle", "reach", BIAS, 0, 2, SceneConfig(4))


def test_wrong_names_and_numbers_are_named(monkeypatch):
    with pytest.raises(UserError, match="unknown shift 'rotated'"):
        shift("rotated")
    monkeypatch.setattr("vla_jax.steering.shifts.CLEARANCE", 1.0)
    with pytest.raises(UserError, match=f"only 0 of {12 * POOL} scenes can be moved"):
        shift("moved")
