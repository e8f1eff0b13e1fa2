"""A language model's answer becomes the target of a reward program."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vla_jax.data import tokenizer as tokenizers
from vla_jax.envs import language
from vla_jax.envs.questions import BINS
from vla_jax.errors import UserError
from vla_jax.models.policy import Instruction, PolicyConfig
from vla_jax.steering.perceive import POINTED
from vla_jax.steering.pointing import Pointer
from vla_jax.steering.study import SteerStudy, SteerStudyConfig
from vla_jax.steering.writer import Stored
from vla_jax.training.checkpoints import policy_facts

PROGRAM = '{"stages": [{"name": "reach", "terms": [{"term": "distance", "keypoint": "{target}"}]}]}'


class Saying(nnx.Module):
    """Goes on with a place after an instruction that begins with a certain word, with a name after all others."""

    def __init__(self, contract, answer):
        words = tokenizers.from_json(contract.tokenizer).token_to_id
        self.config, self.facts = PolicyConfig(), dataclasses.replace(policy_facts(contract), image_size=24)
        self.begins, self.name = words("touch"), (words("red"), words("cube"))
        self.answer = tuple(map(words, answer.split()))

    def reason(self, images, tokens, mask):
        count = self.config.reasoning
        assert images["front"].shape[1:] == (24, 24, 3) and count == 2
        said = jnp.where(tokens[:, :1] == self.begins, jnp.array(self.answer), jnp.array(self.name))
        row, place = jnp.arange(len(tokens))[:, None], mask.sum(1, keepdims=True) + jnp.arange(count)
        room = ((0, 0), (0, count))
        return Instruction(jnp.pad(tokens, room).at[row, place].set(said), jnp.pad(mask, room).at[row, place].set(True))


def test_an_answer_is_a_place_in_the_picture_or_none(contract):
    pictures = {"front": np.zeros((3, 24, 24, 3), np.uint8)}
    policy = Saying(contract, "x12 y20")
    pointer = Pointer(policy, contract)
    assert policy.config == PolicyConfig(), "it is left as it was"
    places = pointer(pictures, ["touch the red cube", "reach the blue ball", "touch the leftmost object"])
    np.testing.assert_allclose(places[[0, 2]], [[12.5 / BINS, 20.5 / BINS]] * 2)
    assert np.isnan(places[1]).all() and pointer.image_size == 24
    silent = tokenizers.to_json(tokenizers.train_tokenizer(language.sentences()))
    with pytest.raises(UserError, match="it cannot point"):
        Pointer(Saying(contract, "x12 y20"), dataclasses.replace(contract, tokenizer=silent))


def test_the_target_of_a_program_is_what_is_pointed_at(policy, contract):
    config = SteerStudyConfig(("in_distribution",), ("base",), scenes=8, batch=8)
    pointer = Pointer(Saying(contract, "x12 y20"), contract)
    study = SteerStudy(policy, contract, config, Stored(PROGRAM), pointer=pointer)
    prepared = study.prepare("in_distribution")
    answered = [text.startswith("touch") for text in prepared.texts]
    assert 0 < sum(answered) < 8
    for found, program, failure, there in zip(
        prepared.found, prepared.target.programs, prepared.target.failures, answered, strict=True
    ):
        assert (POINTED in found.keypoints.labels) == (program is not None) == there
        assert there or POINTED in failure
        if there:
            assert program.stages[0].terms[0].keypoint == found.keypoints.labels.index(POINTED)
    with pytest.raises(UserError, match="leave the arm 'wrong_target' out"):
        config = dataclasses.replace(config, arms=("wrong_target",))
        SteerStudy(policy, contract, config, Stored(PROGRAM), pointer=pointer)
