"""The study of arms: which scenes run together, whom a wrong reward names, what the table says."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from vla_jax.errors import UserError
from vla_jax.evaluation.intervals import compare_paired, compare_seeds, wilson
from vla_jax.steering import loop
from vla_jax.steering.perceive import Attached
from vla_jax.steering.program import parse, stack
from vla_jax.steering.report import make_rows, markdown
from vla_jax.steering.steer import SteerConfig, remember_nothing
from vla_jax.steering.study import (
    ARMS,
    SINGLE,
    SteerStudy,
    SteerStudyConfig,
    batches,
    by_structure,
    not_finite,
    wrong_targets,
)
from vla_jax.steering.switch import VlmSwitcher
from vla_jax.steering.writer import Stored

ROOT = Path(__file__).parents[2]
REACH = '{"stages": [{"name": "reach", "terms": [{"term": "distance", "keypoint": 0}]}]}'
RISE = (
    '{"stages": [{"name": "rise", "terms": [{"term": "height", "height": 0.2}, {"term": "distance", "keypoint": 0}]}]}'
)


def test_programs_of_one_structure_run_together():
    texts = REACH, RISE, REACH.replace('"reach"', '"go to the cube"')
    programs = [parse(text, ("cube",)) for text in texts]
    assert [rows.tolist() for rows in by_structure(programs)] == [[0, 2], [1]]
    assert [(rows.tolist(), count) for rows, count in batches(5, 3)] == [([0, 1, 2], 3), ([3, 4, 4], 2)]


def test_a_wrong_target_is_a_third_object_where_there_is_one():
    present = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
    trials = SimpleNamespace(
        scene=SimpleNamespace(present=present),
        command=SimpleNamespace(target=np.array([0, 1, 1])),
        cue=SimpleNamespace(target=np.array([1, 0, 1])),
    )
    assert wrong_targets(trials).tolist() == [2, 0, 0]


def test_arms_differ_in_what_acts():
    config = SteerStudyConfig(guide=8.0, repel=3.0)
    assert dataclasses.astuple(config.arm("base")) == (0, 0, 0, 0, 0, 0)
    assert dataclasses.astuple(config.arm("best_of_n")) == (0, 0, 0, 1, 0, 0)
    assert dataclasses.astuple(config.arm("random")) == (8, 1, 0, 0, 0, 0)
    assert dataclasses.astuple(config.arm("reward_only")) == (8, 0, 0, 0, 0, 1)
    assert (
        dataclasses.astuple(config.arm("wrong_target"))
        == dataclasses.astuple(config.arm("gradient"))
        == (8, 0, 0, 0, 0, 0)
    )
    assert dataclasses.astuple(config.arm("full")) == (8, 0, 3, 1, 1, 0)
    assert len({dataclasses.astuple(config.arm(name)) for name in ARMS}) == len(ARMS) - 1
    assert all(not config.arm(name).select for name in SINGLE)
    for wrong, message in (
        ({"arms": ("besst",)}, "unknown 'besst'"),
        ({"shifts": ("rotated",)}, "unknown 'rotated'"),
        ({"steer": SteerConfig(norm="clip")}, "the arm 'random'"),
        ({"steer": SteerConfig(inner=1)}, "the arm 'reward_only'"),
        ({"scenes": 0}, "scenes is 0"),
    ):
        with pytest.raises(UserError, match=message):
            SteerStudyConfig(**wrong)


def run_alone(policy, contract, task, text):
    """How `reward_only` ends in four scenes of a task in which the keypoints are those of the instruction's object."""
    contract = dataclasses.replace(contract, facts={**contract.facts, "task": task})
    config = SteerStudyConfig(("in_distribution",), ("reward_only",), scenes=4, batch=4, guide=5.0)
    return SteerStudy(policy, contract, config, Stored(text)).run("in_distribution", "reward_only")


def test_the_reward_alone_reaches_what_its_keypoint_names(policy, contract):
    text = (ROOT / "configs/steering/reach.json").read_text()
    assert run_alone(policy, contract, "reach", text)["success"] == [True] * 4


def test_a_scene_whose_reply_has_no_program_is_a_failure(policy, contract):
    """Of two scenes one gets prose: the other's program stands in for it, so that it can be run."""

    def writer(request):
        replies.append("I would move there." if not replies else REACH)
        return replies[-1]

    config = SteerStudyConfig(("in_distribution",), ("base",), scenes=2, batch=4)
    replies = []
    study = SteerStudy(policy, contract, config, writer, switch_writer=lambda request: '{"stage": 0, "guidance": true}')
    written = study.prepare("in_distribution").target
    assert written.programs[0] is None and written.complete() == [written.programs[1]] * 2
    assert written.failures == ["the model replied with prose and no JSON: 'I would move there.'", ""]
    switcher = study._runner("in_distribution", "gradient")[1]
    picture = np.zeros((4, 4, 3), np.uint8)
    assert [switcher.ask(row, loop.RISE, 0, picture).stage for row in range(2)] == [0, 0], (
        "all is done, in its last stage"
    )
    with pytest.raises(UserError, match="no scene of 'in_distribution' has a reward program: the model replied"):
        SteerStudy(policy, contract, config, Stored("No.")).prepare("in_distribution")


def test_a_wrong_target_needs_a_program_that_leaves_the_target_open(policy, contract):
    """What names its keypoint by number would take the hand to the same place in both arms."""
    config = SteerStudyConfig(("in_distribution",), ("gradient", "wrong_target"), scenes=2, batch=2)
    with pytest.raises(UserError, match="'wrong_target' .* write {target} in the stored program, or leave the arm out"):
        SteerStudy(policy, contract, config, Stored(REACH)).prepare("in_distribution")
    text = REACH.replace('"keypoint": 0', '"keypoint": "{target}"')
    prepared = SteerStudy(policy, contract, config, Stored(text)).prepare("in_distribution")
    target, wrong = ([program.to_json() for program in one.programs] for one in (prepared.target, prepared.wrong))
    assert all(one != other for one, other in zip(target, wrong, strict=True))


def test_a_switcher_that_fails_is_reported_of_a_scene_that_is_watched(policy, contract, monkeypatch):
    config = SteerStudyConfig(("in_distribution",), ("gradient",), scenes=2, batch=2)
    study = SteerStudy(policy, contract, config, Stored(REACH))
    switcher = VlmSwitcher(lambda request: "It is nearly there.", ["reach"], [["reach"]])
    switcher.of(np.int32(0), np.zeros((4, 4, 3), np.uint8))(np.int32(loop.RISE), loop.begin(), 1)
    monkeypatch.setattr(study, "_runner", lambda *arguments, record: (lambda *inputs: (0, 0, 0), switcher))
    with pytest.raises(UserError, match="prose and no JSON: 'It is nearly there"):
        study.watch("in_distribution", "gradient", 0)


@pytest.mark.slow
def test_the_reward_alone_cannot_grasp(policy, contract):
    """It brings the open hand to the object, and there the fingers stay as they are."""
    term = {"term": "distance", "keypoint": "{target}", "offset": [0, 0, -0.01]}
    text = json.dumps({"stages": [{"name": "come", "terms": [term]}]})
    found = run_alone(policy, contract, "pick", text)
    assert found["success"] == [False] * 4 and max(found["distance"]) < 0.06


def test_what_is_not_finite_is_named(policy):
    program = parse(RISE, ("cube",))
    memory = remember_nothing(stack([program] * 2), Attached(np.zeros((2, 1), int), np.zeros((2, 1, 3))), policy)
    memory = dataclasses.replace(memory, scene=np.array([7, 8]), origin=np.full((2, 1, 3), np.nan))
    found = not_finite(program, jax.device_get(memory), 1)
    assert found == "the reward of stage 1 ('rise'), term 2 ('distance') is not finite in scene 8"


def result(policy, arm, success):
    count = len(success)
    columns = {"success": success, "at_other": [False] * count, "distance": [0.1] * count, "failure": [""] * count}
    columns["touched"] = [False, True] + [False] * (count - 2)
    return {"policy": policy, "shift": "swapped", "arm": arm, "seconds": 1.0, **columns}


def test_rows_pair_arms_by_scene_and_policy():
    base = {name: [True, False, False, False, False] for name in "ab"}
    full = {"a": [True, True, True, False, True], "b": [False, True, True, True, True]}
    results = [result(name, arm, runs[name]) for arm, runs in (("base", base), ("full", full)) for name in "ab"]
    rows = {row["arm"]: row for row in make_rows(results)}
    assert rows["base"]["successes"] == 2 and rows["base"]["trials"] == 10 and not rows["base"]["against"]

    def wider(success):
        """The interval of several policies: Wilson's, and that of a bootstrap over them and their scenes."""
        between, (low, high) = compare_seeds(np.zeros((2, 5)), success), wilson(int(np.sum(success)), 10)
        return min(low, between.low), max(high, between.high)

    for arm, success in (("base", base), ("full", full)):
        assert (rows[arm]["low"], rows[arm]["high"]) == wider(np.array([success["a"], success["b"]]))
    assert rows["base"]["high"] > wilson(2, 10)[1], "wider than if ten scenes had been met"
    paired = compare_seeds(np.array([base["a"], base["b"]]), np.array([full["a"], full["b"]]))
    assert rows["full"]["against"]["base"] == {k: getattr(paired, k) for k in ("difference", "low", "high", "p")}
    assert rows["full"]["by_policy"] == {"a": 0.8, "b": 0.8} and "best_of_n" not in rows["full"]["against"]
    (row,) = (row for row in make_rows(results[::2]) if row["arm"] == "full")
    assert (row["low"], row["high"]) == wilson(4, 5)
    assert row["against"]["base"]["p"] == compare_paired(np.array(base["a"]), np.array(full["a"])).p
    untouched = rows["full"]["untouched"]
    clean = np.array([full["a"], full["b"]]) & (np.arange(5) != 1)  # the second scene was touched
    assert (untouched["successes"], untouched["low"], untouched["high"]) == (6, *wider(clean))
    assert np.isclose(untouched["against"]["base"]["difference"], 0.4), "of base both successes were untouched"
    table = markdown(make_rows(results))
    assert "### swapped" in table and "| full | 8/10 = 80.0 % | 40.0 … 100.0 | +60.0 [" in table
    assert " | 6/10 | 0 % | 10.0 cm |" in table
