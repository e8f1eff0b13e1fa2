"""Which cells of a study are run, by whom, and what is said of those that fail; with stand-ins for the trainings."""

import json
import shlex
import sys

import pytest

from experiments import study
from experiments.study import StudyConfig, run, run_cell, spread
from vla_jax.errors import UserError
from vla_jax.evaluation.results import Results
from vla_jax.evaluation.study import save_cell
from vla_jax.training.train_config import TrainConfig
from vla_jax.workers import Place, claim

CONFIG = StudyConfig(arms=dict.fromkeys(("good", "bad", "fine"), TrainConfig()), seeds=1)
NAMES = [f"uniqueness-rho0.1-{arm}-seed0" for arm in CONFIG.arms]


@pytest.fixture
def ran(monkeypatch):
    """The arms that were run; "bad" fails while `ran.failing`."""

    class Ran(list):
        failing = True

    ran = Ran()

    def stand_in(config, cell, workdir):
        ran.append(cell.arm)
        if cell.arm == "bad" and ran.failing:
            raise ValueError("not a number")
        columns = {name: [True] * 4 for name in ("success", "stuck", "conflict")}
        results = Results(cell.arm, config.arms[cell.arm].steps, {}, [], {"swapped": columns}, {"swapped": "same"}, 1.0)
        save_cell(workdir / "results", cell, results, {}, measures={})

    monkeypatch.setattr(study, "_run_claimed", stand_in)
    return ran


def arms_in_table(workdir):
    return {row["arm"] for row in json.loads((workdir / "study.json").read_text())["rows"]}


def test_a_failing_cell_stops_no_other_and_is_tried_again(ran, tmp_path, capsys):
    with pytest.raises(UserError, match=f"1 of 3 cells failed: {NAMES[1]} .see above."):
        run(CONFIG, tmp_path)
    assert ran == ["good", "bad", "fine"] and arms_in_table(tmp_path) == {"good", "fine"}
    said = capsys.readouterr()
    assert "ValueError: not a number" in said.err and "2 of 3 cells done" in said.out
    ran.failing = False
    run(CONFIG, tmp_path)
    assert ran[3:] == ["bad"] and arms_in_table(tmp_path) == {"good", "bad", "fine"}
    run(CONFIG, tmp_path)
    assert len(ran) == 4


def test_what_another_command_is_at_is_left_to_it(ran, tmp_path, capsys):
    ran.failing = False
    with claim(tmp_path / "claims" / NAMES[0]):
        run(CONFIG, tmp_path)
        run_cell(CONFIG, CONFIG.cells()[0], tmp_path)
    said = capsys.readouterr().out
    assert ran == ["bad", "fine"]
    assert f"another command is at: {NAMES[0]}" in said and f"{NAMES[0]}: another process is at it" in said
    run(CONFIG, tmp_path)
    assert ran == ["bad", "fine", "good"]


def test_the_time_left_is_at_the_pace_so_far(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(study.time, "perf_counter", lambda: now[0])
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / f"{NAMES[0]}.json").touch()
    progress = study.Progress(CONFIG, tmp_path)
    assert str(progress) == "1 of 3 cells done"
    now[0] += 90
    (tmp_path / "results" / f"{NAMES[2]}.json").touch()
    assert str(progress) == "2 of 3 cells done, about 01:30 left"


WORKER = """
import sys
name = sys.argv[-1].removeprefix("--cell=")
print("at", name, sys.argv[1], flush=True)
if "bad" in name:
    raise SystemExit(5)
(__import__("pathlib").Path(sys.argv[1]) / f"{name}.json").touch()
"""


def test_each_cell_is_a_command_of_its_own(tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(study, "write_summary", lambda config, workdir: written.append(len(written)))
    (tmp_path / "results").mkdir()
    command = [sys.executable, "-c", WORKER, str(tmp_path / "results")]
    with pytest.raises(UserError, match=f"1 of 3 cells failed: {NAMES[1]} .see .*logs/{NAMES[1]}.log"):
        spread(CONFIG, tmp_path, [Place(), Place()], command)
    for name in NAMES:
        assert (tmp_path / "logs" / f"{name}.log").read_text() == f"at {name} {tmp_path / 'results'}\n"
    out = capsys.readouterr().out
    assert f"{NAMES[1]} ended with status 5" in out and f"{NAMES[2]} ended\n" in out and "2 of 3 cells done" in out
    assert len(written) >= 2


def test_a_stopped_study_names_the_command_that_goes_on(tmp_path):
    stops = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    command = [sys.executable, "-c", stops]
    with pytest.raises(KeyboardInterrupt) as stopped:
        spread(CONFIG, tmp_path, [Place()], command)
    assert str(stopped.value) == f"stopped with 0 of 3 cells done; go on with: {shlex.join(command)}"
    assert len(list((tmp_path / "logs").iterdir())) == 1, "no further cell was started"


def test_a_misspelt_cell_gets_a_suggestion(tmp_path):
    config = f"--config={tmp_path / 'config.py'}"
    text = "def get_config():\n    return {'arms': {'baseline': {}}, 'seeds': 1}\n"
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(UserError, match="did you mean 'uniqueness-rho0.1-baseline-seed0'"):
        study.main([config, f"--workdir={tmp_path}", "--cell=uniqueness-rho0.1-basline-seed0"])


@pytest.mark.parametrize(
    "wrong", [{"arms": {}}, {"workers": -1}, {"groundings": 0}, {"unbiased": ("none",)}, {"rhos": (2.0,)}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError):
        StudyConfig(**{"arms": CONFIG.arms, **wrong})
