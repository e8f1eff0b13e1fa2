"""Whole runs of a very small policy on a very small dataset, with everything that can go wrong around them."""

import contextlib
import dataclasses
import json
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from experiments.inspect import describe_run
from vla_jax.config import diff, to_json
from vla_jax.data.contract import Contract, compute_contract
from vla_jax.data.loader import make_loader, members
from vla_jax.errors import UserError
from vla_jax.losses.llr import initial_gate
from vla_jax.losses.objective import objective
from vla_jax.training import trainer
from vla_jax.training.checkpoints import Checkpoints, has_begun, load_policy, policy_facts
from vla_jax.training.metrics import metric_lines
from vla_jax.training.trainer import train


@pytest.fixture(scope="module")
def run_dir(config, tmp_path_factory):
    """A finished run of ten steps."""
    return train(config, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def copy(run_dir, tmp_path):
    """A copy of the finished run that may be damaged."""
    return shutil.copytree(run_dir, tmp_path / "run")


def arrays(run_dir, step=None) -> dict:
    """Every array and the meta data of a checkpoint, as Orbax finds them."""
    loaded = Checkpoints(run_dir)._orbax.load_checkpointables(step)
    return {name: jax.device_get(part) for name, part in loaded.items()}


def test_a_run_directory_tells_what_was_run(run_dir, config, dataset):
    policy, contract, saved = load_policy(run_dir)
    assert saved == config
    assert json.loads((run_dir / "tokenizer.json").read_text()) == json.loads(contract.tokenizer)
    (start,) = json.loads((run_dir / "provenance.json").read_text())
    assert start["data"] == {"name": "tiny", "fingerprint": contract.fingerprint}
    assert start["versions"]["jax"] == jax.__version__
    lines = metric_lines(run_dir)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 4, 6, 8, 10]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [5, 10]
    assert {"terms/fm_posterior", "terms/fm_prior", "terms/llr", "valid/llr", "grad_norm"} <= set(lines[-2])
    assert lines[-2]["valid/llr"] == 1.0


def test_a_run_directory_can_be_inspected(run_dir):
    said = describe_run(run_dir)
    assert "step 5, 10, of 10" in said and "data: tiny" in said and "actions: dx, opening" in said
    count = sum(leaf.size for leaf in jax.tree.leaves(arrays(run_dir)["params"]))
    assert said.splitlines()[-1].split()[:2] == ["all", f"{count:,}"]


def test_a_mixture_is_validated_dataset_by_dataset(config, dataset, other_dataset, tmp_path):
    mixture = ((str(dataset), 1.0), (str(other_dataset), 3.0))
    data = dataclasses.replace(config.data, directory="", mixture=mixture)
    run_dir = train(dataclasses.replace(config, data=data, steps=3, validate_every=3), tmp_path / "run")
    (line,) = [line for line in metric_lines(run_dir) if line["kind"] == "validation"]
    policy, contract, _ = load_policy(run_dir)
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    both = {"": data, **members(data)}
    assert list(both) == ["", "tiny", "tiny_2"]
    for name, own in both.items():
        with contextlib.closing(make_loader(dataclasses.replace(own, split="held_out"), contract)) as loader:
            _, (terms, _) = jax.jit(objective, static_argnums=3)(policy, next(loader), key, config.loss, initial_gate())
        found = {term: line[f"{name}/terms/{term}".removeprefix("/")] for term in ("fm_posterior", "fm_prior")}
        np.testing.assert_allclose(list(found.values()), [terms[term].value for term in found], rtol=1e-4)
    assert len({line[name] for name in ("loss", "tiny/loss", "tiny_2/loss")}) == 3


def test_a_loaded_policy_acts_and_carries_the_chosen_weights(run_dir):
    observation = {"images": {"front": np.zeros((2, 16, 16, 3), np.uint8)}, "state": np.zeros((2, 2), np.float32)}
    tokens = np.array([[2, 3, 0, 0, 0, 0]] * 2)
    key = jax.random.key(0)
    actions = jax.jit(lambda policy: policy.act(observation, tokens, tokens > 0, key))(load_policy(run_dir)[0])
    assert actions.shape == (2, 2, 2) and np.isfinite(actions).all()
    saved = arrays(run_dir)
    for ema, name in ((True, "ema"), (False, "params")):
        loaded = load_policy(run_dir, ema=ema)[0]
        np.testing.assert_array_equal(loaded.words[...], saved[name]["words"])
    assert not np.array_equal(saved["ema"]["words"], saved["params"]["words"])
    older = load_policy(run_dir, step=5)[0]
    assert not np.array_equal(older.words[...], saved["ema"]["words"])


def test_five_and_five_steps_equal_ten(config, run_dir, tmp_path):
    # The schedule's end is fixed, so that the first half does not decay faster.
    fixed = dataclasses.replace(config.optimizer, decay_steps=10)
    config = dataclasses.replace(config, optimizer=fixed)
    train(dataclasses.replace(config, steps=5), tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    ours, whole = arrays(tmp_path / "run"), arrays(run_dir)
    assert ours["meta"] == whole["meta"] and whole["meta"]["data"]["batches"] == 10
    assert set(ours) == set(whole)
    jax.tree.map(np.testing.assert_array_equal, ours, whole)
    assert len(json.loads((tmp_path / "run" / "provenance.json").read_text())) == 2


def test_half_precision_computes_but_does_not_store(config, tmp_path):
    policy = dataclasses.replace(config.policy, dtype="bfloat16")
    config = dataclasses.replace(config, policy=policy, steps=4, validate_every=0)
    train(config, tmp_path / "run")
    losses = [line["loss"] for line in metric_lines(tmp_path / "run")]
    assert len(losses) == 3 and np.isfinite(losses).all()
    saved = arrays(tmp_path / "run")
    assert {leaf.dtype.name for leaf in saved["params"].values()} == {"float32"}


def test_a_used_directory_is_never_overwritten(config, copy):
    before = arrays(copy)
    with pytest.raises(UserError, match="is not empty: add --resume"):
        train(config, copy)
    changed = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=5.0), steps=20)
    with pytest.raises(UserError, match="optimizer.learning_rate was 0.001, is 5.0") as error:
        train(changed, copy, resume=True)
    assert "steps" not in str(error.value)
    jax.tree.map(np.testing.assert_array_equal, arrays(copy), before)
    (copy.parent / "foreign").mkdir()
    (copy.parent / "foreign" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="no contract at .*foreign"):
        train(config, copy.parent / "foreign", resume=True)


def test_a_run_has_begun_when_all_of_its_first_files_are_there(copy, tmp_path):
    """A disk that is full before that must not leave a directory in which the same command is refused."""
    begun = tmp_path / "begun"
    assert not has_begun(begun)
    begun.mkdir()
    for name in ("tokenizer.json", "contract.json", "config.json", "provenance.json"):
        assert not has_begun(begun)
        shutil.copy(copy / name, begun)
    assert has_begun(begun)


def test_settings_of_earlier_versions_are_read(config, copy):
    path = copy / "config.json"
    saved = json.loads(path.read_text())
    saved["policy"]["trunk"]["remat"], saved["policy"]["expert"]["remat"] = True, False
    path.write_text(json.dumps(saved))
    policy = load_policy(copy)[2].policy
    assert (policy.trunk.remat, policy.expert.remat) == ("all", "none")
    saved["policy"]["trunk"]["depht"] = 3
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match=f"{path} was written by another version .* did you mean 'policy.trunk.depth'"):
        load_policy(copy)


def test_a_checkpoint_with_frozen_parameters_among_the_trained_ones_is_of_an_earlier_version(config, copy):
    """As if these parameters had been frozen, and nobody had heard of keeping them as constants."""
    frozen = dataclasses.replace(config.optimizer, scales=(("^words", 0.0),))
    config = dataclasses.replace(config, optimizer=frozen)
    (copy / "config.json").write_text(to_json(config))
    for load in (lambda: load_policy(copy), lambda: train(config, copy, resume=True)):
        with pytest.raises(UserError, match="10 was written by an earlier version .* train it again, or load") as error:
            load()
        assert "damaged" not in str(error.value) and "\n" not in str(error.value)


def test_going_on_does_not_need_the_run_it_started_from(config, copy, tmp_path):
    config = dataclasses.replace(config, init_from=str(copy), steps=4, checkpoint_every=4, validate_every=0)
    started = train(config, tmp_path / "started")
    another = dataclasses.replace(config, init_from=str(tmp_path / "moved"), steps=5)
    with pytest.raises(UserError, match="init_from was .*run', is .*moved'"):
        train(another, started, resume=True)
    shutil.rmtree(copy)
    train(another, started, resume=True)
    assert Checkpoints(started).steps[-1] == 5, "of a run that has moved, the new place is as good"
    with pytest.raises(UserError, match="init_from was .*moved', is ''"):
        train(dataclasses.replace(config, init_from=""), started, resume=True)
    with pytest.raises(UserError, match="no run directory"):
        train(config, tmp_path / "new")


def test_another_dataset_is_refused(config, copy, other_dataset):
    data = dataclasses.replace(config.data, directory=str(other_dataset))
    with pytest.raises(UserError, match=f"the dataset at {other_dataset} differs in .*fingerprint"):
        train(dataclasses.replace(config, data=data, steps=20), copy, resume=True)
    other = Contract.load(copy / "contract.json")
    dataclasses.replace(other, fingerprint="0" * 16).save(copy / "contract.json")
    with pytest.raises(UserError, match="contract.json is not the contract of its checkpoints"):
        load_policy(copy)


@pytest.mark.parametrize(
    ("victim", "message"),
    [
        ("config.json", "no config.json in .*incomplete"),
        ("contract.json", "no contract at .*incomplete"),
        ("checkpoints", "no checkpoints/ in"),
        ("checkpoints/10/meta", "10 is incomplete: meta missing; use step 5"),
        ("checkpoints/10/ema", "10 is incomplete: ema missing; use step 5"),
        ("checkpoints/10/ema/manifest.ocdbt", "10 is damaged .*; use step 5"),
        ("checkpoints/10/ema/d", "10 is damaged .*; use step 5"),
    ],
)
def test_an_incomplete_run_says_what_is_missing(copy, victim, message):
    path = copy / victim
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=message) as error:
        load_policy(copy)
    assert "\n" not in str(error.value)


def test_a_directory_of_runs_names_them(copy):
    with pytest.raises(UserError, match=f"{copy.parent} is no run, but there are runs in it: give one of {copy}"):
        load_policy(copy.parent)


def test_a_checkpoint_that_is_not_there_lists_those_that_are(copy):
    with pytest.raises(UserError, match="no checkpoint 7 in .*complete are 5, 10"):
        load_policy(copy, step=7)
    for step in ("5", "10"):
        shutil.rmtree(copy / "checkpoints" / step)
    with pytest.raises(UserError, match="none is complete"):
        load_policy(copy)
    with pytest.raises(UserError, match="no run directory"):
        load_policy(copy / "nowhere")


def test_pictures_of_several_sizes_are_no_matter_where_the_policy_reads_one(dataset):
    contract = dataclasses.replace(compute_contract(dataset), images={"front": (16, 16), "wrist": (12, 16)})
    assert policy_facts(contract, ("front",)).image_size == 16
    with pytest.raises(UserError, match="set data.image_size"):
        policy_facts(contract)
    resized = dataclasses.replace(contract, images=contract.resized(8).images)
    assert policy_facts(resized, ("front", "wrist")).image_size == 8


def test_mistakes_are_found_before_anything_is_written(config, tmp_path):
    target = tmp_path / "run"
    with pytest.raises(UserError, match="data.directory is not set"):
        train(dataclasses.replace(config, data=dataclasses.replace(config.data, directory="")), target)
    with pytest.raises(UserError, match="set both alike"):
        dataclasses.replace(config, data=dataclasses.replace(config.data, chunk=3))
    scales = dataclasses.replace(config.optimizer, scales=(("visoin", 0.1),))
    with pytest.raises(UserError, match="matches no parameter"):
        train(dataclasses.replace(config, optimizer=scales), target)
    with pytest.raises(UserError, match="nobody taught this one: .* init_from=RUN"):
        train(dataclasses.replace(config, policy=dataclasses.replace(config.policy, reasoning=1)), target)
    assert not target.exists()


def test_machines_have_to_share_the_run_directory(config, copy, tmp_path, monkeypatch):
    """As one of two processes, of which the other has what this one lacks."""
    monkeypatch.setattr(trainer, "any_process", lambda flag: True)
    with pytest.raises(UserError, match="some processes see checkpoints in .*machines share"):
        train(config, copy, resume=True)
    monkeypatch.setattr(trainer, "any_process", lambda flag: flag)
    monkeypatch.setattr(trainer, "_write_run_files", lambda *arguments: None)
    with pytest.raises(UserError, match="not every process sees the files .*machines share"):
        train(config, tmp_path / "mine")


def test_a_chunk_has_as_many_actions_as_are_executed(config):
    with pytest.raises(UserError, match="eval.execute is 9, of chunks of"):
        dataclasses.replace(config, eval_every=1, eval=dataclasses.replace(config.eval, execute=9))


def wait_for_step(run_dir, step: int, process, since: float = 0.0) -> None:
    """Returns once the other process has logged `step`, after the time `since`."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").is_file() and any(
            line["step"] >= step and line["time"] > since for line in metric_lines(run_dir)
        ):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("the run did not get there in time")


def endless(config):
    return dataclasses.replace(config, steps=1_000_000, log_every=1, validate_every=0, checkpoint_every=4)


def test_kill_in_the_middle_of_saving_leaves_a_whole_checkpoint(config, start, tmp_path):
    run_dir = tmp_path / "run"
    process = start(endless(config), f"--workdir={run_dir}")
    wait_for_step(run_dir, 12, process)
    process.kill()  # some save is nearly always going on: one is due every fourth step
    process.wait()
    logged = max(line["step"] for line in metric_lines(run_dir))
    newest = Checkpoints(run_dir).steps[-1]
    assert newest % 4 == 0 and logged - newest <= 9  # a save waits for the one before it: two may be lost, never more
    policy, _, saved = load_policy(run_dir)
    assert np.isfinite(policy.words[...]).all()
    train(dataclasses.replace(saved, steps=newest + 4), run_dir, resume=True)
    assert Checkpoints(run_dir).steps[-1] == newest + 4


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills_at_random_moments_leave_a_whole_checkpoint_each(config, start, tmp_path):
    """Every step saves, so that many of the kills fall into a save."""
    run_dir, random, newest, saving = tmp_path / "run", np.random.default_rng(0), 0, 0
    config = dataclasses.replace(endless(config), checkpoint_every=1)
    for attempt in range(20):
        since = time.time()
        process = start(config, f"--workdir={run_dir}", *(["--resume"] if newest else []))
        wait_for_step(run_dir, max(3, newest + 1), process, since)
        time.sleep(random.uniform(0, 1))
        process.kill()
        process.wait()
        saving += any("tmp" in path.name for path in (run_dir / "checkpoints").iterdir())
        logged, before = max(line["step"] for line in metric_lines(run_dir)), newest
        newest = Checkpoints(run_dir).steps[-1]
        assert before <= newest <= logged <= newest + 2, f"kill {attempt}"  # a save waits for the one before it
        policy, _, _ = load_policy(run_dir)
        assert np.isfinite(policy.words[...]).all()
    assert saving >= 5


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_saves_and_prints_the_command_that_goes_on(config, start, tmp_path, number, status):
    run_dir = tmp_path / "run"
    process = start(endless(config), f"--workdir={run_dir}")
    wait_for_step(run_dir, 3, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    newest = Checkpoints(run_dir).steps[-1]
    assert newest == max(line["step"] for line in metric_lines(run_dir))
    assert f"saved step {newest} of 1000000; go on with: " in errors
    command = errors.splitlines()[-1].split("go on with: ")[1]
    assert command.endswith(f"-m experiments.train --config={tmp_path}/config.py --workdir={run_dir} --resume")


def test_the_entry_point_says_a_mistake_in_one_line(config, start):
    process = start(config, "--config.optimizer.learning_rat=1")
    output, errors = process.communicate(timeout=300)
    message = "error: unknown key 'optimizer.learning_rat': did you mean 'optimizer.learning_rate'?\n"
    assert (process.returncode, output, errors) == (2, "", message)


def test_a_config_survives_its_file(config, run_dir):
    assert diff(config, load_policy(run_dir)[2]) == {}
