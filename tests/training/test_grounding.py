"""Language before action: a run on questions alone, a policy that starts from it, weights for its demonstrations."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

from configs.train import language_model_rate
from experiments.balance import balance_once
from experiments.steer import _pointer
from vla_jax.data.loader import DataConfig
from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.collect import CollectConfig, collect
from vla_jax.envs.env import EnvConfig
from vla_jax.envs.questions import KINDS, QuestionConfig
from vla_jax.errors import UserError
from vla_jax.evaluation.evaluate import EvalConfig, World
from vla_jax.evaluation.retention import answer_accuracy
from vla_jax.losses.objective import LossConfig
from vla_jax.models.policy import LANGUAGE_MODEL
from vla_jax.training.checkpoints import load_actor, load_config, load_policy
from vla_jax.training.state import flatten
from vla_jax.training.train_config import TrainConfig
from vla_jax.training.trainer import _make_data, train


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    config = CollectConfig(env=EnvConfig(image_size=16), bias=BiasConfig("uniqueness", 0.1), episodes=12, batch=12)
    return collect(config, tmp_path_factory.mktemp("table"), progress=False).path


@pytest.fixture(scope="module")
def acting(config, demonstrations) -> TrainConfig:
    """A few steps of a tiny policy on the table."""
    return dataclasses.replace(
        config,
        data=DataConfig(directory=str(demonstrations), batch_size=4, chunk=2, threads=1, held_out_fraction=0.2),
        loss=LossConfig(prior_weight=0.0, llr_weight=0.0, noise_draws=1),
        steps=2,
        log_every=1,
        validate_every=0,
        checkpoint_every=2,
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=0),
    )


def at_rest(config: TrainConfig, **changes) -> TrainConfig:
    """One step that changes no weight."""
    still = dataclasses.replace(config.optimizer, learning_rate=0.0, min_learning_rate=0.0, weight_decay=0.0)
    return dataclasses.replace(config, steps=1, checkpoint_every=1, optimizer=still, **changes)


@pytest.fixture(scope="module")
def grounding(acting, tmp_path_factory):
    """A run on questions alone."""
    config = dataclasses.replace(
        acting,
        questions=QuestionConfig(batch_size=8),
        loss=LossConfig(demonstrations=False, prior_weight=0.0, llr_weight=0.0, question_weight=1.0),
        validate_every=2,
    )
    return train(config, tmp_path_factory.mktemp("runs") / "grounding")


def params(run_dir, ema=True):
    policy = load_policy(run_dir, ema=ema)[0]
    return {path: np.asarray(leaf) for path, leaf in flatten(nnx.state(policy, nnx.Param)).items()}


def test_questions_alone_train_the_language_model_and_nothing_else(grounding, acting, tmp_path):
    lines = [json.loads(line) for line in (grounding / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"train", "validation"}
    terms = {name for line in lines for name in line if name.startswith("terms/")}
    assert terms == {"terms/questions", "terms/questions_right"}
    fresh, trained = params(train(at_rest(acting), tmp_path / "fresh")), params(grounding)
    moved = {path for path in fresh if not np.array_equal(fresh[path], trained[path])}
    decayed = {path for path in moved if path.split("/")[0] not in LANGUAGE_MODEL}
    assert any(path.startswith("trunk") for path in moved) and any(path.startswith("vision") for path in moved)
    for path in decayed:  # weight decay alone: every entry shrinks by the same tiny factor
        np.testing.assert_allclose(trained[path], fresh[path], rtol=1e-3)


def test_a_run_asks_what_it_is_told_to_ask(grounding):
    config, contract = load_config(grounding), load_policy(grounding)[1]
    some = dataclasses.replace(config, questions=dataclasses.replace(config.questions, kinds=("where", "what")))
    for split in ("train", "held_out"):
        stream = _make_data(some, contract, split)
        kinds = np.concatenate([next(stream)["questions"]["kind"] for _ in range(4)])
        stream.close()
        assert {KINDS[kind] for kind in kinds} == {"where", "what"}


def test_a_policy_starts_from_the_language_model_of_another_run(grounding, acting, tmp_path):
    still = at_rest(acting, init_from=str(grounding), seed=7)
    # The trained weights themselves: the average of equal numbers is theirs up to rounding only.
    given, started = params(grounding), params(train(still, tmp_path / "x"), ema=False)
    for path, leaf in started.items():
        same = np.array_equal(leaf, given[path])
        if path.split("/")[0] in LANGUAGE_MODEL:
            assert same, path
        elif leaf.std() > 0:
            assert not same, f"{path}: the rest begins with the run's own seed"


def test_what_answers_and_does_not_act_is_no_policy(grounding):
    with pytest.raises(UserError, match="never learned to act .*--config.init_from="):
        load_actor(grounding)
    contract = load_policy(grounding)[1]
    of_another_task = dataclasses.replace(contract, facts={**contract.facts, "task": "pick"})
    assert _pointer(str(grounding), 2, contract)
    with pytest.raises(UserError, match="learned to point on the task 'reach', and the policy is of 'pick'"):
        _pointer(str(grounding), 2, of_another_task)


def test_a_frozen_language_model_stays_and_is_kept_once(grounding, acting, tmp_path):
    optimizer = dataclasses.replace(acting.optimizer, scales=language_model_rate(0.0), decay_steps=2)
    frozen = dataclasses.replace(acting, init_from=str(grounding), optimizer=optimizer, checkpoint_every=1)
    train(dataclasses.replace(frozen, steps=1), tmp_path / "run")
    first = params(tmp_path / "run")
    run = train(frozen, tmp_path / "run", resume=True)
    given, last = params(grounding), params(run)
    for path, leaf in last.items():
        if path.split("/")[0] in LANGUAGE_MODEL:
            np.testing.assert_array_equal(leaf, given[path], err_msg=path)
    assert not np.array_equal(first["expert/action_in/kernel"], last["expert/action_in/kernel"])
    metadata = json.loads((run / "checkpoints" / "2" / "params" / "_METADATA").read_text())
    kept = {entry["key_metadata"][0]["key"].split("/")[0] for entry in metadata["tree_metadata"].values()}
    assert kept and kept.isdisjoint(LANGUAGE_MODEL)


def test_a_start_that_does_not_fit_is_refused(grounding, acting, other_dataset, tmp_path):
    wide = dataclasses.replace(acting.policy, trunk=dataclasses.replace(acting.policy.trunk, hidden=16))
    other = dataclasses.replace(acting, init_from=str(grounding), policy=wide)
    with pytest.raises(UserError, match=r"cannot start from .*trunk.*hidden|cannot start from .*trunk"):
        train(other, tmp_path / "wide")
    data = dataclasses.replace(acting.data, directory=str(other_dataset))
    words = dataclasses.replace(acting, init_from=str(grounding), data=data)
    with pytest.raises(UserError, match="speaks other words"):
        train(words, tmp_path / "words")
    with pytest.raises(UserError, match="no run directory"):
        train(dataclasses.replace(acting, init_from=str(tmp_path / "none")), tmp_path / "y")


def test_settings_that_do_not_go_together_are_named(acting):
    with pytest.raises(UserError, match="go together"):
        dataclasses.replace(acting, questions=QuestionConfig(batch_size=4))
    with pytest.raises(UserError, match="there is nothing to learn"):
        LossConfig(demonstrations=False)
    with pytest.raises(UserError, match="set eval_every = 0"):
        alone = LossConfig(demonstrations=False, question_weight=1.0)
        dataclasses.replace(acting, loss=alone, questions=QuestionConfig(batch_size=4), eval_every=1)


def test_what_is_retained_is_measured_on_questions_that_training_does_not_meet(grounding):
    policy, contract, config = load_policy(grounding)
    world = World.of(contract, EvalConfig())
    found = answer_accuracy(policy, contract, world, questions=64)
    assert set(found) == {"answers", "answer_nll", *(f"answers/{kind}" for kind in KINDS)}
    assert 0 <= found["answers"] < 0.3, "two steps teach nothing"
    assert found == answer_accuracy(policy, contract, world, questions=64)
    assert found["answer_nll"] != answer_accuracy(policy, contract, world, questions=64, seed=1)["answer_nll"]


def test_demonstrations_get_weights_and_are_drawn_by_them(grounding, acting, tmp_path):
    language = LossConfig(flow=False, prior_weight=0.0, llr_weight=0.0, language_weight=1.0, words_weight=1.0)
    config = dataclasses.replace(acting, loss=language, init_from=str(grounding))
    path = balance_once(config, tmp_path / "balance")
    saved = json.loads(path.read_text())
    assert len(saved["information"]) == 12 and np.isfinite(saved["information"]).all()
    before = path.stat().st_mtime_ns
    assert balance_once(config, tmp_path / "balance") == path and path.stat().st_mtime_ns == before, "kept"
    drawn = dataclasses.replace(acting, data=dataclasses.replace(acting.data, balance=1.0, weights=str(path)))
    assert (train(drawn, tmp_path / "balanced") / "checkpoints" / "2").is_dir()
