"""experiments.steer: what it takes from other runs, and which results it takes for its own."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import steer
from vla_jax.errors import UserError
from vla_jax.evaluation.evaluate import EvalConfig
from vla_jax.steering.steer import SteerConfig
from vla_jax.steering.study import SteerStudyConfig
from vla_jax.training.improve import ImproveConfig

LEARNED = ImproveConfig(policy="runs/base", policy_step=40, eval=EvalConfig(splits=("in_distribution",)))
LIKE_THEIRS = SteerConfig(steps=4)


def learned(monkeypatch, config=LIKE_THEIRS, path="runs/base", step=40, **changes):
    """What steering at a step of a policy takes from a DSRL run of these settings, or what it says against it."""
    improved = SimpleNamespace(noise="the learned noise"), None, dataclasses.replace(LEARNED, **changes)
    monkeypatch.setattr(steer, "load_improved", lambda run: improved)
    monkeypatch.setattr(steer, "newest_step", lambda run: 60)
    return steer._learned("runs/dsrl", Path(path), step, config)


def test_a_learned_noise_is_that_of_the_same_checkpoint(monkeypatch, capsys):
    assert learned(monkeypatch) == "the learned noise" and not capsys.readouterr().out
    assert learned(monkeypatch, step=60, policy_step=None) == "the learned noise", "of a run that wrote no number"
    for changes, message in (
        ({"arm": "cloning"}, "learned weights, no noise"),
        ({"path": "runs/other"}, "was learned for runs/base, not for runs/other"),
        ({"step": 60}, "learned for step 40 of runs/base, not for step 60: set --config.step=40"),
        ({"policy_step": None}, "learned for step 60 of runs/base, not for step 40"),
    ):
        with pytest.raises(UserError, match=message):
            learned(monkeypatch, **changes)


def test_a_noise_that_was_learned_for_another_sampler_is_said(monkeypatch, capsys):
    for config, said in (
        (SteerConfig(), "4 steps with guidance None, and is used in one of 10 with None"),
        (SteerConfig(steps=4, extrapolate=2.0), "4 steps with guidance None, and is used in one of 4 with 2.0"),
    ):
        assert learned(monkeypatch, config) == "the learned noise"
        assert said in capsys.readouterr().out


class Study:
    """Two scenes, won in every arm."""

    def __init__(self, *arguments):
        pass

    def run(self, shift, arm):
        columns = {"success": [True] * 2, "at_other": [False] * 2, "distance": [0.1] * 2, "failure": [""] * 2}
        return {"shift": shift, "arm": arm, "seconds": 1.0, "touched": [False] * 2, **columns}


@pytest.fixture
def steered(monkeypatch, tmp_path):
    """Steers a policy with a pointer and a learned noise, at these steps; and the file of the result."""
    steps, program = {"base": 40, "points": 20, "seed0": 10}, tmp_path / "program.json"
    program.write_text("{}")
    (tmp_path / "dsrl" / "seed0").mkdir(parents=True)
    monkeypatch.setattr(steer, "SteerStudy", Study)
    monkeypatch.setattr(steer, "newest_step", lambda run: steps[Path(run).name])
    trained = SimpleNamespace(questions=SimpleNamespace(batch_size=1), check_guidance=lambda guidance: None)
    contract = SimpleNamespace(facts={"task": "reach"})
    for name in ("load_policy", "load_actor"):
        monkeypatch.setattr(steer, name, lambda run, step, ema=True: (step, contract, trained))
    monkeypatch.setattr(steer, "Pointer", lambda policy, contract: policy)
    monkeypatch.setattr(steer, "_learned", lambda *arguments: None)
    study = SteerStudyConfig(("swapped",), ("base",), scenes=2)
    config = steer.SteerRunConfig(study, steer.WriterConfig(path=str(program)))

    def run():
        return steer.run(config, [Path("base")], tmp_path / "work", str(tmp_path / "dsrl"), "points")

    return run, steps, program, tmp_path / "work" / "results" / "base" / "swapped-base.json"


def test_a_result_is_that_of_what_its_files_and_runs_held(steered):
    run, steps, program, file = steered
    run()
    settings = json.loads(file.read_text())["settings"]
    assert (settings["step"], settings["pointer_step"], settings["noise_step"]) == (40, 20, 10)
    run()
    for name, key in (("base", "step"), ("points", "pointer_step"), ("seed0", "noise_step")):
        steps[name] += 1
        with pytest.raises(UserError, match=rf"made with other settings \({key}\): give another --workdir"):
            run()
        steps[name] -= 1
    program.write_text('{"stages": []}')
    with pytest.raises(UserError, match=r"other settings \(program\)"):
        run()


def test_results_of_earlier_versions_are_read(steered):
    """They name the program, the pointer and the noise, and not what these held."""
    run, _, _, file = steered
    rows = run()
    kept = json.loads(file.read_text())
    for key in ("program", "pointer_step", "noise_step"):
        del kept["settings"][key]
    file.write_text(json.dumps(kept))
    assert run() == rows
    (file.parents[3] / "dsrl" / "seed0").rmdir()
    with pytest.raises(UserError, match="is no run of experiments.dsrl"):
        run()
