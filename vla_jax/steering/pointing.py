"""A language model that points: where, in the picture, is what an instruction is about?

It needs nothing but the picture and the words. The keypoint that comes of it (`perceive`) is as good as its answer.

Axes: B scenes, H x W picture, L instruction length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from vla_jax.data import tokenizer as tokenizers
from vla_jax.data.contract import Contract
from vla_jax.envs.questions import PLACE_WORDS, check_places, middle
from vla_jax.models.policy import Policy
from vla_jax.models.reasoning import last_words, reasoned


class Pointer:
    """The language model of a run that learned to answer instructions with places (`envs.questions`).

    policy, contract: of that run, whether it learned to act or not.

    Raises:
        UserError: the run's words have no places (`envs.questions.check_places`).
    """

    def __init__(self, policy: Policy, contract: Contract):
        policy = nnx.merge(*nnx.split(policy))  # the given one goes on saying as many words as it did
        tokenizer = tokenizers.from_json(contract.tokenizer)
        check_places(tokenizer)
        policy.config = dataclasses.replace(policy.config, reasoning=PLACE_WORDS)
        self._graph, self._weights = nnx.split(policy)
        self._tokenizer, self._contract = tokenizer, contract
        self.image_size = policy.facts.image_size

    def __call__(
        self, images: dict[str, UInt8[np.ndarray, "B H W 3"]], texts: Sequence[str]
    ) -> Float[np.ndarray, "B 2"]:
        """(column, row) in the front picture, from 0 to 1; not a number where the answer is no place."""
        tokens, mask = self._contract.encode(texts)
        said, said_mask = jax.device_get(reasoned(self._graph, self._weights, images, tokens, mask))
        own = np.take_along_axis(said, last_words(said_mask, PLACE_WORDS), 1)
        return np.stack([middle(self._tokenizer.decode(row)) for row in own])
