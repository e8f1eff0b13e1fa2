"""The closed loop: normalisation, strength, the Schmitt trigger, and both switchers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.errors import UserError
from vla_jax.steering import loop
from vla_jax.steering.loop import FALL, GRIPPER, QUIET, RISE, LoopConfig, begin, look, normalize, remember, strength
from vla_jax.steering.program import parse
from vla_jax.steering.switch import VlmSwitcher, read_decision
from vla_jax.steering.terms import View

VIEW = View(jnp.array([[0.5, 0.0, 0.0], [0.5, 0.3, 0.0]]), jnp.zeros((2, 3)))
REACH = {"term": "distance", "keypoint": 0}
CARRY = {"term": "distance", "keypoint": 1}
ONE = parse(json.dumps({"stages": [{"name": "reach", "terms": [REACH]}]}), ("cube", "plate"))
TWO = parse(
    json.dumps({"stages": [{"name": "reach", "terms": [REACH]}, {"name": "carry", "terms": [CARRY]}]}),
    ("cube", "plate"),
)
OPEN = jnp.bool_(False)


def at(distance, side=0.0):
    return jnp.array([0.5 - distance, side, 0.0])


RELEASED = LoopConfig(offset=0.75, high=0.8, low=0.6)


def walk(program, distances, config=RELEASED, closed=None):
    """The states at every look, the hand standing at these distances from the first keypoint."""
    state, states = begin(), []
    for step, distance in enumerate(distances):
        shut = jnp.bool_(False if closed is None else closed[step])
        state = look(config, state, program, VIEW, at(distance), shut)
        states.append(state)
    return states


def test_progress_is_normalised_and_clipped():
    rewards = jnp.array([-0.08, -0.04, -0.01, 0.0, -0.2, 0.5])
    np.testing.assert_allclose(normalize(rewards, jnp.float32(-0.04)), [0, 0, 0.75, 1, 0, 1.2])
    np.testing.assert_array_equal(normalize(rewards, jnp.float32(0.0)), 0.0)


def test_strength_falls_with_progress():
    state = dataclasses.replace(begin(), base=jnp.float32(-1.0))
    rewards = jnp.array([-1.0, -0.5, -0.25, 0.0])
    found = strength(LoopConfig(slope=10.0, offset=0.75), state)(rewards)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(10 * (np.array([0, 0.5, 0.75, 1]) - 0.75))), rtol=1e-5)
    np.testing.assert_array_equal(strength(LoopConfig(adaptive=False), state)(rewards), 1.0)
    off = dataclasses.replace(state, guided=jnp.bool_(False))
    for config in (LoopConfig(), LoopConfig(adaptive=False)):
        np.testing.assert_array_equal(strength(config, off)(rewards), 0.0)


def test_guidance_ends_at_the_goal_with_hysteresis():
    """Base 0.2^2: r = 1 - (d / 0.2)^2. Off when it rises through 0.8, on again only when it falls through 0.6."""
    states = walk(ONE, [0.2, 0.1, 0.05, 0.11, 0.12, 0.15, 0.1])
    np.testing.assert_allclose([float(s.progress) for s in states], [0, 0.75, 0.9375, 0.6975, 0.64, 0.4375, 0.75], 1e-4)
    assert [bool(s.guided) for s in states] == [True, True, False, False, False, True, True]
    assert [int(s.calls) for s in states] == [0, 0, 1, 1, 1, 2, 2]


def test_a_rise_or_the_gripper_advances_the_stage():
    states = walk(TWO, [0.2, 0.05, 0.05])
    assert [int(s.stage) for s in states] == [0, 1, 1] and all(bool(s.guided) for s in states)
    stage_two = float(TWO.reward(VIEW, jnp.stack([at(0.05)] * 2), 1))
    assert np.isclose(float(states[1].base), stage_two) and float(states[1].progress) == 0.0
    assert [int(s.stage) for s in walk(TWO, [0.2, 0.2, 0.2], closed=[False, True, True])] == [0, 1, 1]
    for until, stages in (("reward", [0, 0, 0, 1]), ("gripper", [0, 0, 1, 1]), ("either", [0, 0, 1, 1])):
        held = dataclasses.replace(TWO, stages=(dataclasses.replace(TWO.stages[0], until=until), TWO.stages[1]))
        found = walk(held, [0.2, 0.2, 0.2, 0.05], closed=[False, False, True, True])
        assert [int(s.stage) for s in found] == stages
        far, near = walk(held, [0.2, 0.05])
        assert (int(near.stage), int(near.calls)) == (int(until != "gripper"),) * 2
    with pytest.raises(UserError, match="0 < low < high"):
        LoopConfig(low=0.98)
    with pytest.raises(UserError, match="achieved, predicted"):
        LoopConfig(measure="hoped")


def test_what_ends_the_last_stage_ends_the_guidance():
    """The gripper as well as the reward, and both at once; a fall takes it up again, the gripper does not."""
    moves = [False, True, True, False, False]
    assert [bool(s.guided) for s in walk(ONE, [0.2, 0.2, 0.2, 0.2, 0.2], closed=moves)] == [True] + [False] * 4
    states = walk(ONE, [0.2, 0.05, 0.05, 0.15, 0.15], closed=moves)
    assert [bool(s.guided) for s in states] == [True, False, False, True, True], "the gripper changes at the fall, too"
    states = walk(ONE, [0.2, 0.05, 0.15, 0.05], closed=[False, True, True, True])
    assert [bool(s.guided) for s in states] == [True, False, True, False]
    held = dataclasses.replace(ONE, stages=(dataclasses.replace(ONE.stages[0], until="reward"),))
    assert all(bool(s.guided) for s in walk(held, [0.2, 0.2, 0.2], closed=[False, True, False]))


def test_a_stage_that_begins_at_its_goal_is_over():
    """Half a millimetre away there is no progress to measure; 2 cm off guidance is taken up again."""
    again = dataclasses.replace(ONE, stages=ONE.stages * 2)
    states = walk(again, [0.2, 0.0005, 0.0005, 0.0005, 0.02], LoopConfig())
    assert [int(s.stage) for s in states] == [0, 1, 1, 1, 1]
    assert [bool(s.guided) for s in states] == [True, True, False, False, True]
    assert [bool(s.guided) for s in walk(ONE, [0.0005, 0.0005], LoopConfig())] == [False, False]
    config = LoopConfig(measure="predicted")
    planned = remember(config, look(config, begin(), ONE, VIEW, at(0.2), OPEN), jnp.float32(-1e-7))
    assert not bool(look(config, planned, ONE, VIEW, at(0.2), OPEN).guided)


def test_the_released_measure_judges_by_plans():
    config = dataclasses.replace(RELEASED, measure="predicted")
    first = look(config, begin(), ONE, VIEW, at(0.2), OPEN)
    planned = remember(config, first, jnp.float32(-0.01))
    assert float(planned.base) == np.float32(-0.01) and float(first.base) == 0.0
    better = remember(config, look(config, planned, ONE, VIEW, at(0.2), OPEN), jnp.float32(-0.001))
    assert float(better.base) == np.float32(-0.01)
    assert not bool(look(config, better, ONE, VIEW, at(0.2), OPEN).guided), "planned, though the hand has not moved"
    assert float(remember(LoopConfig(), first, jnp.float32(-0.01)).base) == float(first.base)


def test_a_reward_that_is_no_number_is_noted():
    lost = View(VIEW.now.at[0].set(jnp.nan), VIEW.start)
    assert bool(look(LoopConfig(), begin(), ONE, VIEW, at(0.2), OPEN).finite)
    state = look(LoopConfig(), begin(), ONE, lost, at(0.2), OPEN)
    assert not bool(state.finite) and not bool(remember(LoopConfig(), state, jnp.float32(-1.0)).finite)
    assert not bool(remember(LoopConfig(), begin(), jnp.float32(jnp.inf)).finite)


class Scripted:
    """A writer that gives prepared replies and keeps the questions."""

    name = "scripted"

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def __call__(self, request):
        self.asked.append(request)
        return self.replies.pop(0)


def test_a_model_switches_stages_inside_a_compiled_program():
    writer = Scripted(
        'Sure: {"stage": 2, "guidance": true, "evidence": "it holds the cube"}', '{"stage": 0, "guidance": true}'
    )
    names = ("reach", "carry")
    switcher = VlmSwitcher(writer, ["put it away"] * 2, [names] * 2, limit=1)
    picture = jnp.zeros((2, 4, 4, 3), jnp.uint8)

    @jax.jit
    @jax.vmap
    def step(trigger, scene, picture):
        return switcher.of(scene, picture)(trigger, begin(), 2)

    triggers = jnp.array([QUIET, RISE])
    stage, guided = step(triggers, jnp.arange(2), picture)
    assert stage.tolist() == [0, 1] and guided.tolist() == [True, True]
    assert len(writer.asked) == 1 and "the reward rose" in writer.asked[0].text and "2: carry" in writer.asked[0].text
    assert writer.asked[0].picture.startswith(b"\x89PNG")
    stage, guided = step(jnp.array([FALL, QUIET]), jnp.arange(2), picture)
    assert stage.tolist() == [1, 0] and guided.tolist() == [False, True], "0: all is done"
    switcher.raise_error()


def test_a_model_that_fails_changes_nothing_and_is_reported():
    writer = Scripted("I think the arm is nearly there.", '{"stage": 2, "guidance": true}')
    switcher = VlmSwitcher(writer, ["go"], [("reach", "carry")])
    switch = switcher.of(jnp.int32(0), jnp.zeros((4, 4, 3), jnp.uint8))
    for _ in range(2):
        stage, guided = switch(jnp.int32(GRIPPER), begin(), 2)
        assert int(stage) == 0 and bool(guided)
    assert len(writer.asked) == 1
    with pytest.raises(UserError, match="prose and no JSON: 'I think"):
        switcher.raise_error()
    assert int(switch(jnp.int32(GRIPPER), begin(), 2)[0]) == 1, "what was said is over"
    switcher.raise_error()


def test_questions_are_limited():
    writer = Scripted('{"stage": 2, "guidance": true}')
    switch = VlmSwitcher(writer, ["go"], [("reach", "carry")], limit=3).of(
        jnp.int32(0), jnp.zeros((4, 4, 3), jnp.uint8)
    )
    tired = dataclasses.replace(begin(), calls=jnp.int32(3))
    assert int(switch(jnp.int32(RISE), tired, 2)[0]) == 0 and not writer.asked
    assert loop.TRIGGERS[RISE] == "the reward rose"


@pytest.mark.parametrize(
    "reply", ['{"stage": 3, "guidance": true}', '{"stage": true, "guidance": true}', '{"guidance": 1}']
)
def test_a_reply_that_is_no_decision_is_named(reply):
    with pytest.raises(UserError, match="stage from 0 to 2"):
        read_decision(reply, 2)
    with pytest.raises(UserError, match="guidance true or false"):
        read_decision('{"stage": 1, "guidance": "yes"}', 2)
