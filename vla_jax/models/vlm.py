"""A vision-language model: word embeddings, a vision tower and a trunk. The families differ in tower and positions.

`prepare` turns what a checkpoint's processor returns into arrays of fixed shapes (NumPy, on the host); everything after
that is compiled. Padding may stand anywhere; what stands in for an image token is found by index, not by order.

Axes: B batch, T sequence length, S key length, I pictures, D model width, V vocabulary.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from vla_jax.models.generate import Generation, Opening, generate
from vla_jax.models.prompt import Prompt, mask_of
from vla_jax.models.trunk import Trunk
from vla_jax.models.words import Words


class VLM(Words):
    """What the families share. A family adds `prepare` and `see`."""

    def __init__(self, config, tower: nnx.Module, rngs: nnx.Rngs, word_scale: float = 1.0):
        size = config.vocabulary, config.trunk.width
        super().__init__(*size, tied=config.tied, scale=word_scale, dtype=config.dtype, rngs=rngs)
        self.vision = tower
        self.trunk = Trunk(config.trunk, dtype=config.dtype, rngs=rngs)
        self.config = config

    @abc.abstractmethod
    def prepare(self, **inputs: np.ndarray) -> Prompt:
        """The arrays of a processor of this family, checked and laid out."""

    @abc.abstractmethod
    def see(self, pictures: Any) -> tuple[Float[Array, "S D"], Float[Array, "n S D"] | None]:
        """All pictures' tokens, one after another, and their taps for the first trunk layers."""

    def embed(self, prompt: Prompt) -> tuple[Float[Array, "B T D"], Float[Array, "n B T D"] | None]:
        """The trunk's inputs."""
        words = self.embed_words(prompt.tokens)
        if prompt.pictures is None:
            return words, None
        features, taps = self.see(prompt.pictures)
        here = (prompt.picture >= 0)[..., None]
        x = jnp.where(here, features[prompt.picture].astype(words.dtype), words)
        return x, None if taps is None else jnp.where(here, taps[:, prompt.picture], 0).astype(words.dtype)

    def hidden(self, prompt: Prompt) -> Float[Array, "B T D"]:
        """Hidden states after the final norm; at padding they mean nothing."""
        x, taps = self.embed(prompt)
        return self.trunk.read(x, mask_of(prompt), self.trunk.rotary(prompt.position), taps)

    def __call__(self, prompt: Prompt) -> Float[Array, "B T V"]:
        """Next-token logits at every place; at padding they mean nothing."""
        return self.word_logits(self.hidden(prompt))

    def logits(self, **inputs: np.ndarray) -> Float[Array, "B T V"]:
        """Next-token logits of what the checkpoint's processor returns (as NumPy), float32."""
        return _logits(*nnx.split(self), self.prepare(**inputs))

    def generate(
        self,
        *,
        max_tokens: int,
        stop: Sequence[int] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        key: PRNGKeyArray | None = None,
        **inputs: np.ndarray,
    ) -> Generation:
        """Goes on after each prompt, whatever their lengths and wherever they are padded.

        max_tokens: the longest answer. stop: ids that end one. temperature: 0 takes the likeliest token; above it,
        tokens are drawn from the likeliest that have the probability `top_p` together, with the randomness of `key`.
        inputs: what the checkpoint's processor returns, as NumPy.
        """
        graphdef, state = nnx.split(self)
        settings = dict(max_tokens=max_tokens, stop=tuple(stop), sample=temperature > 0)
        chance = (jnp.float32(temperature), jnp.float32(top_p), jax.random.key(0) if key is None else key)
        return _generate(graphdef, state, self.prepare(**inputs), *chance, **settings)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: nnx.GraphDef, state: nnx.State, prompt: Prompt) -> Float[Array, "B T V"]:
    return nnx.merge(graphdef, state)(prompt)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_tokens", "stop", "sample"))
def _generate(graphdef, state, prompt, temperature, top_p, key, **settings) -> Generation:
    vlm = nnx.merge(graphdef, state)
    opening = Opening(*vlm.embed(prompt), mask_of(prompt), prompt.valid, prompt.position)
    return generate(vlm, opening, temperature, top_p, key, **settings)
