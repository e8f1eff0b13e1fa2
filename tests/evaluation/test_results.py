import dataclasses
import json

import numpy as np
import pytest

from vla_jax.envs.scene import Command
from vla_jax.errors import UserError
from vla_jax.evaluation.evaluate import format_table
from vla_jax.evaluation.intervals import wilson
from vla_jax.evaluation.results import (
    Results,
    compare,
    fingerprint,
    load_results,
    make_columns,
    make_row,
    save_results,
)
from vla_jax.evaluation.rollout import Outcome, Trials


def columns(success, cue_success, targets, cues):
    count = len(success)
    zeros = np.zeros(count, np.int32)

    def command(target):
        return Command(np.array(target, np.int32), zeros, zeros, zeros, zeros)

    outcome = Outcome(np.array(success), np.array(cue_success), zeros + 7, np.full(count, 0.1), zeros, zeros)
    trials = Trials(None, command(targets), command(cues), None, None, np.arange(count))
    return make_columns(trials, outcome, ["touch it"] * count)


def results(success, arm="full", step=100, splits=("in_distribution",), mark="same"):
    scenes = {split: columns(success, ~np.array(success), [0] * len(success), [1] * len(success)) for split in splits}
    config = {"scenes": len(success), "env": {"task": "reach", "embodiment": "floating"}}
    config["bias"] = {"coupling": "background", "rho": 0.1}
    rows = [make_row(arm, step, split, scenes[split]) for split in splits]
    return Results(arm, step, config, rows, scenes, dict.fromkeys(splits, mark), 1.0)


def test_a_row_counts_successes_and_sticks():
    # Scenes 0-3 contradict the look: it obeys on 0, sticks on 1, visits both and obeys on 2, does neither on 3.
    found = columns([1, 0, 1, 0, 1, 0], [0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1])
    row = make_row("full", 5, "swapped", found)
    assert (row["successes"], row["trials"], row["rate"]) == (3, 6, 0.5)
    assert (row["low"], row["high"]) == wilson(3, 6)
    assert (row["stick_successes"], row["stick_trials"], row["stick"]) == (1, 4, 0.25)
    assert (row["arm"], row["step"], row["split"], row["ticks"]) == ("full", 5, "swapped", 7.0)


def test_a_row_without_contradiction_has_no_stick_rate():
    row = make_row("full", 5, "in_distribution", columns([0, 0], [0, 0], [1, 1], [1, 1]))
    assert row["stick"] is None and row["stick_trials"] == 0 and row["ticks"] is None
    assert "  in_distribution" in format_table([{**row, "arm": "an_arm_with_a_long_name"}])


def test_language_drop_is_paired():
    found = results(np.array([True] * 80 + [False] * 20), splits=("in_distribution", "blank"))
    blank = dict(found.scenes["blank"], success=[True] * 30 + [False] * 70)
    found = dataclasses.replace(found, scenes={**found.scenes, "blank": blank})
    (drop,) = found.drops()
    assert drop["name"] == "language_drop" and drop["difference"] == pytest.approx(0.5)
    assert 0.35 < drop["low"] < 0.5 < drop["high"] < 0.65 and drop["p"] < 1e-6
    assert results(np.ones(3, bool), splits=("swapped",)).drops() == []


def test_saved_results_come_back(tmp_path):
    late, early = results(np.ones(4, bool), step=200), results(np.zeros(4, bool), step=100)
    save_results(tmp_path, early)
    path = save_results(tmp_path, late)
    assert load_results(tmp_path) == [early, late]
    written = json.loads(path.read_text())
    assert written["rows"] == late.rows and "scenes" not in written
    assert not list(tmp_path.rglob("*.tmp"))


def test_results_under_other_settings_stand_beside_the_runs_own(tmp_path):
    own, guided = results(np.ones(4, bool), step=200), results(np.zeros(4, bool), "full guidance=2.0", step=200)
    save_results(tmp_path, own)
    path = save_results(tmp_path, guided, "guidance=2.0")
    assert load_results(tmp_path) == [guided, own], "the run's own comes last"
    assert json.loads(path.read_text())["arm"] == "full guidance=2.0"


def test_damaged_results_are_named(tmp_path):
    save_results(tmp_path, results(np.ones(4, bool)))
    (tmp_path / "evaluation" / "00000100.json").write_text('{"arm": ')
    with pytest.raises(UserError, match="00000100.json is not the result"):
        load_results(tmp_path)


def test_comparison_is_second_minus_first():
    better, worse = np.array([True] * 9 + [False]), np.array([True] * 4 + [False] * 6)
    paired = compare(results(worse, "a"), results(better, "b"))["in_distribution"]
    assert paired.difference == pytest.approx(0.5) and (paired.only_first, paired.only_second) == (0, 5)


def test_comparison_refuses_other_scenes():
    first = results(np.ones(4, bool), "a")
    with pytest.raises(UserError, match="other scenes of 'in_distribution'"):
        compare(first, results(np.ones(4, bool), "b", mark="other"))
    table = dataclasses.replace(first, config={"env": {**first.config["env"], "task": "pick"}})
    with pytest.raises(UserError, match="judged on another task: reach and pick"):
        compare(first, table)
    with pytest.raises(UserError, match="share no split"):
        compare(first, results(np.ones(4, bool), "b", splits=("swapped",)))


def test_fingerprint_sees_every_value():
    tree = {"a": np.zeros(3), "b": np.ones(2, np.int32)}
    assert fingerprint(tree) == fingerprint({key: leaf.copy() for key, leaf in tree.items()})
    assert fingerprint(tree) != fingerprint({**tree, "a": np.array([0.0, 0.0, 1e-9])})
