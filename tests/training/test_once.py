"""What compare, study and balance find there: kept if it is what is asked for, gone on with, or refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from experiments import balance, compare, study
from experiments.compare import CompareConfig, check_demonstrations, collect_once, train_once
from experiments.study import StudyConfig
from vla_jax.data.contract import Contract
from vla_jax.data.rlds import dataset_path
from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.collect import CollectConfig
from vla_jax.envs.env import EnvConfig
from vla_jax.errors import UserError
from vla_jax.evaluation.results import Results
from vla_jax.evaluation.study import save_cell
from vla_jax.training.trainer import train

COLLECT = CollectConfig(env=EnvConfig(image_size=16), bias=BiasConfig("uniqueness", 0.1), episodes=20)


@pytest.fixture(scope="module")
def short(config):
    return dataclasses.replace(config, steps=3, checkpoint_every=3, validate_every=0)


@pytest.fixture(scope="module")
def finished(short, tmp_path_factory):
    return train(short, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def untrained(monkeypatch):
    """Nothing is trained: the runs that would have been, and whether they were to be resumed."""
    started = []
    monkeypatch.setattr(
        compare, "train", lambda config, run_dir, resume, resume_command: started.append((run_dir, resume))
    )
    return started


def slower(config):
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-4))


def test_a_finished_run_is_kept_for_its_own_settings_alone(short, copy, other_dataset, untrained, capsys):
    assert train_once(dataclasses.replace(short, arm="renamed", log_every=1), copy) == copy
    assert "renamed" in capsys.readouterr().out
    with pytest.raises(UserError, match="learning_rate was 0.001, is 0.0001. Choose another --workdir"):
        train_once(slower(short), copy)
    data = dataclasses.replace(short.data, directory=str(other_dataset))
    with pytest.raises(UserError, match="differs in .*fingerprint.*choose another --workdir"):
        train_once(dataclasses.replace(short, data=data), copy)
    with pytest.raises(UserError, match="has 3 steps already"):
        train_once(dataclasses.replace(short, steps=2), copy)
    assert untrained == []
    train_once(dataclasses.replace(short, steps=4), copy)
    assert untrained == [(copy, True)]


def test_a_run_that_stopped_before_its_checkpoints_were_begun_goes_on(short, copy, untrained):
    shutil.rmtree(copy / "checkpoints")
    train_once(short, copy)
    assert untrained == [(copy, True)]


@pytest.mark.parametrize(
    ("names", "reference", "order"),
    [
        (("ablation", "baseline", "mine"), "", ["baseline", "ablation", "mine"]),
        (("ablation", "baseline", "mine"), "mine", ["mine", "ablation", "baseline"]),
        (("ablation", "mine"), "", ["ablation", "mine"]),
    ],
)
def test_arms_are_compared_with_the_reference_and_judged_as_it_says_now(
    short, tmp_path, monkeypatch, names, reference, order
):
    judged = dataclasses.replace(short.eval, scenes=7)
    arms = {name: dataclasses.replace(short, eval=judged if name == order[0] else short.eval) for name in names}
    compared = []
    monkeypatch.setattr(compare, "collect_once", lambda config, directory: directory)
    monkeypatch.setattr(compare, "train_once", lambda config, run_dir: run_dir)

    def judge(run_dirs, settings, report):
        compared.append((run_dirs, settings))
        columns = {name: [True] * 7 for name in ("success", "stuck", "conflict")}
        rows = [{"arm": run_dir.name, "trials": 7} for run_dir in run_dirs]
        kept = [Results(row["arm"], 3, {}, [row], {"swapped": columns}, {"swapped": "same"}, 1.0) for row in rows]
        return kept, report

    monkeypatch.setattr(compare, "evaluate_runs", judge)
    compare.run(CompareConfig(COLLECT, arms, reference), tmp_path)
    ((run_dirs, settings),) = compared
    saved = json.loads((tmp_path / "results.json").read_text())
    assert [(row["arm"], row["trials"]) for row in saved["rows"]] == [(name, 7) for name in order], "what was found now"
    assert {row["against"] for row in saved["comparisons"]} == {order[0]}
    assert [run_dir.name for run_dir in run_dirs] == order and settings["eval"]["scenes"] == 7
    with pytest.raises(UserError, match="reference names 'other'"):
        CompareConfig(COLLECT, arms, "other")


def test_weights_of_demonstrations_are_kept_for_their_own_settings_alone(short, copy):
    (copy / "information.json").write_text("{}")
    assert balance.balance_once(short, copy) == copy / "information.json"
    with pytest.raises(UserError, match="learning_rate was"):
        balance.balance_once(slower(short), copy)
    with pytest.raises(UserError, match="steps was 3, is 4"):
        balance.balance_once(dataclasses.replace(short, steps=4), copy)


def facts_of(config: CollectConfig) -> dict:
    return {"task": "reach", "rho": config.bias.rho, "noise": config.noise, "seed": config.seed}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": BiasConfig("uniqueness", 0.5)}, "rho was 0.1, is 0.5"),
        ({"noise": 0.0}, "noise was 0.005, is 0.0"),
        ({"seed": 1, "episodes": 30}, "seed was 0, is 1; episodes was 20, is 30"),
        ({"env": EnvConfig(image_size=32)}, "image_size was 16, is 32"),
    ],
)
def test_demonstrations_are_kept_for_their_own_settings_alone(dataset, tmp_path, monkeypatch, changes, message):
    monkeypatch.delattr(compare, "collect")
    path = shutil.copytree(dataset, dataset_path(tmp_path, COLLECT.dataset_name))
    opened = compare.open_dataset(path)
    opened.facts = facts_of(COLLECT)
    monkeypatch.setattr(compare, "open_dataset", lambda directory: opened)
    assert collect_once(COLLECT, tmp_path) == path
    asked = dataclasses.replace(COLLECT, **changes)
    with pytest.raises(UserError, match=f"are others: {message}. Choose another --workdir"):
        collect_once(asked, tmp_path)


def test_what_a_dataset_does_not_say_is_not_compared(tmp_path):
    check_demonstrations(COLLECT, {"task": "reach"}, tmp_path)


@pytest.fixture
def table(short, finished, tmp_path):
    """A study of one cell with its result and its run."""
    config = StudyConfig(COLLECT, {"a": short}, seeds=1)
    columns = {name: [True] * 4 for name in ("success", "stuck", "conflict")}
    results = Results("a", 3, {}, [], {"swapped": columns}, {"swapped": "same"}, 1.0)
    (cell,) = config.cells()
    save_cell(tmp_path / "results", cell, results, {}, measures={})
    shutil.copytree(finished, tmp_path / "runs" / cell.name)
    return config


def test_a_cell_is_kept_for_its_own_settings_alone(table, tmp_path, monkeypatch):
    monkeypatch.delattr(study, "_run_claimed")
    study.run(table, tmp_path)
    (cell,) = table.cells()

    def refused(message, config, workdir=tmp_path):
        with pytest.raises(UserError, match=message):
            study.run(config, workdir)
        with pytest.raises(UserError, match=message):
            study.run_cell(config, cell, workdir)

    arm = table.arms["a"]
    refused("learning_rate was", dataclasses.replace(table, arms={"a": slower(arm)}))
    refused("steps was 3, is 4", dataclasses.replace(table, arms={"a": dataclasses.replace(arm, steps=4)}))
    refused("init_from was '', is .*grounding/uniqueness-0", dataclasses.replace(table, grounding=arm))
    run_dir = tmp_path / "runs" / cell.name
    contract = Contract.load(run_dir / "contract.json")
    dataclasses.replace(contract, facts={"task": "pick"}).save(run_dir / "contract.json")
    refused("task was 'pick', is 'reach'", table)
    # The results alone, as docs/results has them, say nothing but their steps.
    shutil.rmtree(tmp_path / "runs")
    study.run(dataclasses.replace(table, arms={"a": slower(arm)}), tmp_path)
    refused("steps was 3, is 4", dataclasses.replace(table, arms={"a": dataclasses.replace(arm, steps=4)}))


def test_stage_0_goes_on_with_the_demonstrations_that_it_began_with(short, copy, tmp_path, monkeypatch):
    config = StudyConfig(COLLECT, {"a": short}, grounding=short, rhos=(0.5, 0.1))
    cell = config.cells()[0]
    run_dir = shutil.copytree(copy, tmp_path / "grounding" / "uniqueness-0")
    contract = Contract.load(run_dir / "contract.json")
    dataclasses.replace(contract, facts={"rho": 0.1}).save(run_dir / "contract.json")
    trained = []
    monkeypatch.setattr(study, "train_once", lambda config, run_dir: trained.append(config.data.directory) or run_dir)
    monkeypatch.setattr(study, "collect_once", lambda config, directory: directory / f"rho {config.bias.rho}")
    first = tmp_path / "data" / "uniqueness-rho0.1" / "rho 0.1"
    study._ground(config, cell, tmp_path / "another", tmp_path)
    assert trained == [str(first)]
    shutil.rmtree(run_dir)
    study._ground(config, cell, tmp_path / "another", tmp_path)
    assert trained[1:] == [str(tmp_path / "another")]
    shutil.copytree(copy, run_dir)
    longer = dataclasses.replace(config, grounding=dataclasses.replace(short, steps=4))
    with pytest.raises(UserError, match="steps was 3, is 4"):
        study._ground(longer, cell, tmp_path / "another", tmp_path)


def test_seeds_start_from_groundings_of_their_own(short, tmp_path, monkeypatch):
    grounding = dataclasses.replace(short, seed=5)
    config = StudyConfig(COLLECT, {"a": short}, grounding=grounding, groundings=2, balance=short, seeds=3)
    trained, balanced = [], []
    monkeypatch.setattr(study, "train_once", lambda config, run_dir: trained.append((config, run_dir.name)) or run_dir)
    monkeypatch.setattr(study, "balance_once", lambda config, place: balanced.append((config, place.name)) or place)
    for cell in config.cells():
        study._ground(config, cell, tmp_path / "data", tmp_path)
        study._balance(config, cell, tmp_path / "data", study._start(config, cell, tmp_path), tmp_path)
    numbers = [0, 1, 0]
    assert [name for _, name in trained] == [f"uniqueness-{number}" for number in numbers]
    assert [(run.seed, run.questions.seed - short.questions.seed) for run, _ in trained] == [(5, 0), (6, 1), (5, 0)]
    assert [name for _, name in balanced] == [f"uniqueness-rho0.1-{number}" for number in numbers]
    assert [Path(run.init_from).name for run, _ in balanced] == [f"uniqueness-{number}" for number in numbers]
