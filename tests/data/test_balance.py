"""Episodes drawn by weight."""

import json

import numpy as np
import pytest

from vla_jax.data.balance import LIMIT, drawn_by_weight, effective_share, episode_weights
from vla_jax.errors import UserError


class Dataset:
    fingerprint, directory = "f", "data/x"


@pytest.fixture
def write(tmp_path):
    def write(information, fingerprint="f"):
        path = tmp_path / "information.json"
        path.write_text(json.dumps({"fingerprint": fingerprint, "information": information}))
        return path

    return write


def test_weights_undo_what_the_picture_tells(write):
    path = write(np.log([1.8, 0.2, 1.0]).tolist())
    weights = episode_weights(path, 1.0, Dataset)
    np.testing.assert_allclose(weights / weights[2], [1 / 1.8, 5.0, 1.0], rtol=1e-6)
    assert np.isclose(weights.mean(), 1.0)
    half = episode_weights(path, 0.5, Dataset)
    np.testing.assert_allclose(half[1] / half[0], 3.0, rtol=1e-6)
    np.testing.assert_array_equal(episode_weights(path, 0.0, Dataset), np.ones(3))


def test_no_episode_counts_too_much(write):
    weights = episode_weights(write([50.0, -50.0, 0.0]), 1.0, Dataset)
    np.testing.assert_allclose(weights / weights[2], [np.exp(-LIMIT), np.exp(LIMIT), 1.0], rtol=1e-6)


def test_a_file_about_other_data_is_refused(write, tmp_path):
    with pytest.raises(UserError, match="is about other data than data/x"):
        episode_weights(write([0.0], "g"), 1.0, Dataset)
    (tmp_path / "x.json").write_text("[]")
    for path in (tmp_path / "x.json", tmp_path / "none.json"):
        with pytest.raises(UserError, match="is no file of python -m experiments.balance"):
            episode_weights(path, 1.0, Dataset)


def test_the_effective_share():
    assert effective_share(np.ones(7)) == 1.0
    assert np.isclose(effective_share(np.array([3.0, 0.0, 0.0, 0.0])), 0.25)


def test_steps_are_drawn_in_proportion_and_repeatably():
    weights = np.array([1.0, 0.0, 3.0])
    steps = drawn_by_weight(weights, seed=0)
    drawn = np.array([steps[k] for k in range(4000)])
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 4000, [0.25, 0, 0.75], atol=0.02)
    assert [drawn_by_weight(weights, seed=0)[k] for k in (5, 900)] == [steps[5], steps[900]]
    assert [drawn_by_weight(weights, seed=1)[k] for k in range(50)] != list(drawn[:50])
