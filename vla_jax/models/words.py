"""Words into a model and out of it.

Axes: B batch, D model width, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from vla_jax.nn.dense import Dense


class Words(nnx.Module):
    """The word embeddings of a model, and its head: the same table (tied), or a layer of its own.

    scale: factor on embeddings where they enter the model (Gemma: the root of the width); the head does not have it.
    """

    def __init__(self, vocabulary: int, width: int, *, tied: bool, scale: float, dtype: str, rngs: nnx.Rngs):
        self.words = nnx.Param(jax.random.normal(rngs.params(), (vocabulary, width)) * width**-0.5)
        self.head = None if tied else Dense(width, vocabulary, bias=False, dtype=dtype, rngs=rngs)
        self.word_scale, self.dtype = scale, dtype

    def embed_words(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Words as the trunk reads them."""
        # Looked up, then cast: so the gradients of a word that occurs often add up in float32.
        return self.words[...][tokens].astype(self.dtype) * jnp.asarray(self.word_scale, self.dtype)

    def word_logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Next-token logits, computed in the type of `hidden` and returned as float32."""
        if self.head is not None:
            return self.head(hidden).astype(jnp.float32)
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = flat @ self.words[...].astype(hidden.dtype).T
        return logits.reshape(*hidden.shape[:-1], -1).astype(jnp.float32)
