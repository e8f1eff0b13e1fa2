"""What a policy says to itself between instruction and action.

Axes: B batch, T sequence length, L instruction length, P words said.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from vla_jax.models.generate import Opening, generate


def continued(
    policy, packed, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"], words: int
) -> tuple[Int[Array, "B L+P"], Bool[Array, "B L+P"]]:
    """Instructions with the likeliest next words (greedy, one after another) behind their last word.

    packed: `models.policy.Packed` of the posterior ordering.
    """
    end = packed.layout["posterior/text"].stop  # what follows are queries
    valid = packed.valid[:, :end]
    position = packed.layout.sight.position if packed.position is None else packed.position
    opening = Opening(
        packed.sequence[:, :end],
        None if packed.taps is None else packed.taps[:, :, :end],
        packed.layout.mask[:end, :end] & valid[:, None],
        valid,
        jnp.broadcast_to(position[..., :end], (len(tokens), *position.shape[:-1], end)),
    )
    unused = jnp.ones(()), jnp.ones(()), jax.random.key(0)  # nothing is drawn
    said = generate(policy, opening, *unused, max_tokens=words, stop=(), sample=False).tokens
    row, place = jnp.arange(len(tokens))[:, None], mask.sum(1, keepdims=True) + jnp.arange(words)
    room = ((0, 0), (0, words))
    return jnp.pad(tokens, room).at[row, place].set(said), jnp.pad(mask, room).at[row, place].set(True)


def last_words(mask: Bool[Array, "B L"], words: int) -> Int[Array, "B P"]:
    """Where the last P words that count stand: those of `continued`, in what it returns."""
    return mask.sum(1, keepdims=True) - words + np.arange(words)


@functools.partial(jax.jit, static_argnums=0)
def reasoned(graphdef: nnx.GraphDef, weights: nnx.State, images: dict[str, jax.Array], tokens, mask):
    """`Policy.reason`, compiled once for all policies of one architecture."""
    return nnx.merge(graphdef, weights).reason(images, tokens, mask)
