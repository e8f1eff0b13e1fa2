"""Shifted scenes: targets lie where no demonstration has them, and are still what the sentence names."""

import numpy as np
import pytest

from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.language import instructions
from vla_jax.envs.sampling import SceneConfig
from vla_jax.envs.scene import TABLE_X, TABLE_Y
from vla_jax.errors import UserError
from vla_jax.steering.shifts import CLEARANCE, beyond_edge, make_shift

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


def test_wrong_names_and_numbers_are_named(monkeypatch):
    with pytest.raises(UserError, match="unknown shift 'rotated'"):
        shift("rotated")
    monkeypatch.setattr("vla_jax.steering.shifts.CLEARANCE", 1.0)
    with pytest.raises(UserError, match="only 0 of 48 scenes can be moved"):
        shift("moved")
