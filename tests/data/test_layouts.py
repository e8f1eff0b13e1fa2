"""Columns become SI units and openings; what does not fit is named."""

import dataclasses

import numpy as np
import pytest

from tests.data.published import picture
from vla_jax.data.episode import encode_jpeg
from vla_jax.data.layouts import GRIPPERS, Fault, Layout, Part, RawEpisode, assemble, load_robot
from vla_jax.data.registry import LAYOUTS, find_layout
from vla_jax.errors import UserError

LAYOUT = Layout(
    embodiment="arm",
    control_hz=10.0,
    images={"front": "camera"},
    action=(Part("move", ("dx", "turn"), "mm", (2, 0)), Part("grip", ("gripper",), "1", gripper="0 open, 1 closed")),
    state=(Part("joints", ("a", "b"), "deg"),),
    action_representation="a move",
    instruction=("said", "also_said"),
)


def raw(steps=4, **changes) -> RawEpisode:
    columns = {
        "camera": [encode_jpeg(picture(np.random.default_rng(step), 8, 8)) for step in range(steps)],
        "move": np.arange(3 * steps, dtype=np.float64).reshape(steps, 3),
        "grip": np.linspace(0, 1, steps),
        "joints": np.full((steps, 2), 180.0),
        "said": [b""] * steps,
        "also_said": [b" ", b"go home"],
    }
    return RawEpisode("e/7", columns | changes)


def test_columns_units_and_text():
    episode = assemble(raw(), LAYOUT)
    np.testing.assert_allclose(episode.actions[:, 0], [0.002, 0.005, 0.008, 0.011], rtol=1e-6)
    np.testing.assert_allclose(episode.actions[:, 1], [0.0, 0.003, 0.006, 0.009], rtol=1e-6)
    np.testing.assert_allclose(episode.actions[:, 2], [1, 2 / 3, 1 / 3, 0], atol=1e-6)
    np.testing.assert_allclose(episode.state, np.pi, rtol=1e-6)
    assert episode.instruction == "go home" and episode.metadata == {"episode_id": "e/7"}
    assert episode.images["front"] == raw().columns["camera"]
    assert episode.actions.dtype == episode.state.dtype == np.float32


def test_first_steps_are_dropped():
    episode, dropped = assemble(raw(), LAYOUT), assemble(raw(), dataclasses.replace(LAYOUT, drop_first=1))
    np.testing.assert_array_equal(dropped.actions, episode.actions[1:])
    assert dropped.images["front"] == episode.images["front"][1:] and len(dropped.state) == 3


OPENINGS = {
    "1 open, 0 closed": ([0, 0.5, 1, 1.1], [0, 0.5, 1, 1]),
    "0 open, 1 closed": ([0, 0.25, 1, 1.1], [1, 0.75, 0, 0]),
    "1 open, -1 closed": ([-1, 0, 0.5, 1], [0, 0.5, 0.75, 1]),
    "-1 open, 1 closed": ([-1, 0, 0.5, 1], [1, 0.5, 0.25, 0]),
    "-1 opens, 1 closes, 0 holds": ([0, 0.9, 0, -0.8], [1, 0, 0, 1]),
}


def opening(convention, values):
    part = Part("grip", ("gripper",), "1", gripper=convention)
    layout = dataclasses.replace(LAYOUT, action=(part,))
    return assemble(raw(len(values), grip=np.array(values, float)), layout).actions[:, 0].tolist()


@pytest.mark.parametrize("convention", GRIPPERS)
def test_every_convention_becomes_an_opening(convention):
    stored, expected = OPENINGS[convention]
    assert opening(convention, stored) == pytest.approx(expected)


@pytest.mark.parametrize(
    "commands, expected",
    [([0, 0, 0], [1, 1, 1]), ([0, -1, 0], [0, 1, 1]), ([0.05, 1, -0.05], [1, 0, 0]), ([1, 0, -1], [0, 0, 1])],
)
def test_commands_that_hold(commands, expected):
    assert opening("-1 opens, 1 closes, 0 holds", commands) == expected


def nan_in(name):
    values = raw().columns[name].copy()
    values[2] = np.nan
    return {name: values}


FAULTS = {
    "no instruction": {"also_said": [b""]},
    "not finite": nan_in("move"),
    "gripper convention": {"grip": np.array([0, 255.0, 0, 0])},
    "lengths": {"camera": raw().columns["camera"][:3]},
    "no steps": {"move": np.zeros((0, 3)), "grip": np.zeros(0), "joints": np.zeros((0, 2)), "camera": []},
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faulty_episode_is_named(kind):
    with pytest.raises(Fault, match="episode e/7") as raised:
        assemble(raw(**FAULTS[kind]), LAYOUT)
    assert raised.value.kind == kind


def test_nan_of_a_state_is_a_fault_too():
    with pytest.raises(Fault, match="state of step 2 are not finite"):
        assemble(raw(**nan_in("joints")), LAYOUT)


def test_a_feature_that_is_not_there_is_a_mistake_of_the_layout():
    columns = dict(raw().columns)
    del columns["joints"]
    with pytest.raises(UserError, match="names the feature 'joints'; the dataset has also_said, camera") as raised:
        assemble(RawEpisode("e", columns), LAYOUT)
    assert not isinstance(raised.value, Fault)
    with pytest.raises(UserError, match="joints has 3 numbers: they do not fit a, b"):
        assemble(raw(joints=np.zeros((4, 3))), LAYOUT)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gripper": "open"}, "unknown gripper convention 'open': one of 1 open, 0 closed"),
        ({"unit": "inch"}, "unknown unit 'inch'"),
        ({"gripper": "1 open, 0 closed", "names": ("a", "b")}, "needs one number"),
        ({"columns": (0, 1)}, "2 columns but 1 names"),
    ],
)
def test_wrong_part_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        Part(**({"feature": "f", "names": ("a",), "unit": "1"} | changes))


def test_unknown_layout_gets_a_suggestion():
    assert find_layout("droid") == (LAYOUTS["droid"], None)
    with pytest.raises(UserError, match="unknown layout 'fractl': did you mean 'fractal'"):
        find_layout("fractl")


def test_file_of_a_user(tmp_path):
    path = tmp_path / "my_robot.py"
    path.write_text(
        "from vla_jax.data.layouts import Layout, Part\n"
        "LAYOUT = Layout('arm', 5.0, {'front': 'c'}, (Part('a', ('x',), 'm'),), (Part('s', ('x',), 'm'),), 'a move')\n"
        "def episodes(directory):\n    yield {}\n"
    )
    layout, function = find_layout(str(path))
    assert layout.embodiment == "arm" and list(function(tmp_path)) == [{}]


@pytest.mark.parametrize("text, message", [("x = 1", "must define LAYOUT"), ("1 / 0", "ZeroDivisionError")])
def test_wrong_file_of_a_user(tmp_path, text, message):
    path = tmp_path / "my_robot.py"
    with pytest.raises(UserError, match="no file"):
        load_robot(path)
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_robot(path)
