"""Judging policies on the real table, small."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.env import EnvConfig, Tabletop
from vla_jax.envs.sampling import SceneConfig
from vla_jax.envs.views import LOOK
from vla_jax.errors import UserError
from vla_jax.evaluation.evaluate import EvalConfig, Evaluator, World
from vla_jax.evaluation.results import compare
from vla_jax.evaluation.rollout import Trials, concatenate, in_batches, make_rollout

ENV = EnvConfig(task="reach", image_size=16)
CONFIG = EvalConfig(
    splits=("in_distribution", "swapped", "blank"), scenes=6, batch=5, execute=2, sampler_steps=1, videos=1, max_ticks=8
)


class Drift(nnx.Module):
    """Moves along y as fast as its weight says, faster with words than without; reads the picture not to ignore it."""

    def __init__(self, speed):
        self.speed = nnx.Param(np.float32(speed))

    def act(self, observation, tokens, token_mask, key, steps, guidance=None):
        batch = len(tokens)
        seen = observation["images"]["front"].astype(np.float32).mean((1, 2, 3)) * 1e-9
        along = self.speed[...] * (1 + token_mask.any(1)) + seen
        noise = 0.002 * jax.random.normal(key, (batch, 4, 5))
        return noise.at[..., 1].add(along[:, None])


@pytest.fixture(scope="module")
def evaluator(make_contract):
    return Evaluator(make_contract(), CONFIG)


@pytest.fixture(scope="module")
def results(evaluator):
    return evaluator(Drift(0.01), arm="drift", step=3)


def test_every_split_gets_its_row_and_scenes(evaluator, results):
    assert [row["split"] for row in results.rows] == list(CONFIG.splits)
    assert all(row["trials"] == 6 and row["arm"] == "drift" and row["step"] == 3 for row in results.rows)
    assert all(len(column) == 6 for columns in results.scenes.values() for column in columns.values())
    assert results.scenes["blank"]["text"] == [""] * 6
    assert results.scenes["swapped"]["conflict"] == [True] * 6
    # The same scenes and noise, but no words: this policy goes only half as far.
    assert results.scenes["blank"]["distance"] != results.scenes["in_distribution"]["distance"]
    assert results.fingerprints["blank"] == results.fingerprints["in_distribution"] != results.fingerprints["swapped"]


def test_the_same_policy_gets_the_same_outcomes(evaluator, results):
    again = evaluator(Drift(0.01), arm="again")
    assert again.scenes == results.scenes
    assert {paired.difference for paired in compare(results, again).values()} == {0.0}
    assert evaluator(Drift(-0.01)).scenes != results.scenes
    assert evaluator._run._cache_size() == 1


def test_films_show_the_scenes_that_were_judged(evaluator, results, make_contract):
    clips = evaluator.film(Drift(0.01), results)
    assert {clip.split for clip in clips} == set(CONFIG.splits)
    for clip in clips:
        assert clip.frames.shape[1:] == (16, 16, 3)
        judged = {name: column[clip.index] for name, column in results.scenes[clip.split].items()}
        assert (clip.text, clip.success, clip.stuck) == (judged["text"], judged["success"], judged["stuck"])
        assert len(clip.frames) == judged["ticks"]
        assert clip.frames.std() > 5 and (clip.frames[0] != clip.frames[-1]).any()
    silent = Evaluator(make_contract(), dataclasses.replace(CONFIG, videos=0))
    assert silent.film(Drift(0.01), results) == []


def test_a_world_that_does_not_fit_is_refused(make_contract):
    world = World(dataclasses.replace(ENV, image_size=32), BiasConfig(), SceneConfig())
    with pytest.raises(UserError, match="images: expected"):
        Evaluator(make_contract(), CONFIG, world)
    with pytest.raises(UserError, match="embodiment"):
        Evaluator(make_contract(), CONFIG, dataclasses.replace(world, env=EnvConfig("panda", image_size=16)))


def test_data_from_elsewhere_cannot_be_judged_on_the_table(make_contract):
    contract = make_contract()
    facts = {name: value for name, value in contract.facts.items() if name != "coupling"}
    with pytest.raises(UserError, match="does not say its coupling"):
        Evaluator(dataclasses.replace(contract, facts=facts), CONFIG)


def test_pictures_of_another_look_are_refused(make_contract):
    with pytest.raises(UserError, match=f"drawn by look {LOOK + 1} of the table, this version draws look {LOOK}"):
        Evaluator(make_contract(look=LOOK + 1), CONFIG)


def test_another_tasks_policy_is_refused(evaluator, make_contract):
    with pytest.raises(UserError, match="runs/b was trained on task 'pick'"):
        evaluator.reading(make_contract(task="pick"), "runs/b")
    with pytest.raises(UserError, match=f"drawn by look {LOOK + 1}"):
        evaluator.reading(make_contract(look=LOOK + 1), "runs/b")


def test_every_policy_reads_the_same_texts_by_its_own_tokenizer(evaluator, make_contract):
    ours = make_contract()
    words = json.loads(ours.tokenizer)
    vocabulary = words["model"]["vocab"]
    first, second = [word for word in vocabulary if word.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    theirs = dataclasses.replace(ours, tokenizer=json.dumps(words), max_tokens=ours.max_tokens + 3)
    other = evaluator.reading(theirs, "runs/b")
    for split, trials in other._trials.items():
        tokens, mask = theirs.encode(evaluator._texts[split])
        np.testing.assert_array_equal(trials.tokens, tokens)
        np.testing.assert_array_equal(trials.token_mask, mask)
        np.testing.assert_array_equal(trials.index, evaluator._trials[split].index)
    results = other(Drift(0.01), arm="other")
    assert compare(evaluator(Drift(0.01)), results)["in_distribution"].difference == 0


def test_splits_and_counts_are_checked(make_contract):
    with pytest.raises(UserError, match="unknown split 'swaped': did you mean 'swapped'"):
        Evaluator(make_contract(), dataclasses.replace(CONFIG, splits=("swaped",)))
    with pytest.raises(UserError, match="eval.scenes is 0"):
        EvalConfig(scenes=0)
    with pytest.raises(UserError, match="eval.max_ticks is -1"):
        EvalConfig(max_ticks=-1)


class ExpertTable(Tabletop):
    """The table on which the expert acts whatever the policy says; nothing is drawn."""

    def observe(self, state):
        return {"state": state.bodies.tcp_position}

    def step(self, state, action):
        action, state = self.expert(state)
        return super().step(state, action)


class Idle(nnx.Module):
    def act(self, observation, tokens, token_mask, key, steps, guidance=None):
        return jax.numpy.zeros((len(tokens), 1, 5))


def test_the_expert_succeeds_through_the_same_program(make_contract):
    config = EvalConfig(splits=("in_distribution", "swapped"), scenes=32)
    evaluator = Evaluator(make_contract(), config)
    env = ExpertTable(ENV)
    run = make_rollout(env, execute=1, ticks=env.max_ticks, sampler_steps=1)
    trials: Trials = concatenate(list(evaluator._trials.values()))
    batches = in_batches(run, *nnx.split(Idle()), trials, jax.random.key(0), 64)
    outcome, _ = concatenate(list(batches))
    assert outcome.success.mean() >= 0.98
    assert (outcome.nearest == trials.command.target).mean() >= 0.98
    assert not (outcome.cue_success & outcome.success)[32:].any()  # swapped: what is asked for is not the cue
