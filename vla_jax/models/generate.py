"""Text from a vision-language model, token by token: a cache of fixed size and one compiled loop.

Axes: B batch, T prompt length, S cache length, A axes of positions, V vocabulary, D model width, G generated tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vla_jax.models.trunk import Cache
from vla_jax.nn.attention import Mask


class Opening(NamedTuple):
    """What is there before the first new token.

    embedded, taps: the trunk's inputs. mask: who sees whom among them. valid: False at padding, wherever it stands.
    position: for the trunk's rotary embedding.
    """

    embedded: Float[Array, "B T D"]
    taps: Float[Array, "n B T D"] | None
    mask: Mask
    valid: Bool[Array, "B T"]
    position: Int[Array, "B *A T"]


class Generation(NamedTuple):
    """tokens: ids, 0 after the end of an answer. lengths: tokens of each answer, with the one that stopped it."""

    tokens: Int[Array, "B G"]
    lengths: Int[Array, " B"]


class _Going(NamedTuple):
    """The loop between two tokens. `token` was chosen and not read yet; it will be number `count`."""

    count: Int[Array, ""]
    token: Int[Array, " B"]
    done: Bool[Array, " B"]
    answer: Generation
    cache: Cache
    key: PRNGKeyArray


def generate(
    model,
    opening: Opening,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    key: PRNGKeyArray,
    *,
    max_tokens: int,
    stop: tuple[int, ...],
    sample: bool,
) -> Generation:
    """Reads the openings at once and goes on until every answer has stopped or has `max_tokens` tokens.

    What was padded in an opening stays hidden, so the answers do not depend on it: a new token sees all real tokens
    before it, and its position follows the opening's last one.

    model: `models.words.Words` with a trunk.
    """

    def choose(hidden: Float[Array, "B D"], key: PRNGKeyArray) -> Int[Array, " B"]:
        logits = model.word_logits(hidden)
        return draw(logits, temperature, top_p, key) if sample else jnp.argmax(logits, -1)

    x, taps, mask, valid, where = opening
    B, T = valid.shape
    hidden, cache = model.trunk.begin(x, max_tokens, mask, model.trunk.rotary(where), taps)
    last = T - 1 - jnp.argmax(valid[:, ::-1], 1)
    known = jnp.pad(valid, ((0, 0), (0, max_tokens)))
    position = _next_position(valid, where)
    empty = Generation(jnp.zeros((B, max_tokens), jnp.int32), jnp.zeros(B, jnp.int32))
    key, now = jax.random.split(key)
    token = choose(jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0], now)
    begin = _Going(jnp.zeros((), jnp.int32), token, jnp.zeros(B, bool), empty, cache, key)

    def step(going: _Going) -> _Going:
        count, token, done, (tokens, lengths), cache, key = going
        tokens = tokens.at[:, count].set(jnp.where(done, 0, token))
        lengths = lengths + ~done
        done = done | jnp.isin(token, jnp.array(stop, jnp.int32))
        slot = jnp.arange(T + max_tokens)
        visible = known | ((slot >= T) & (slot <= T + count))
        hidden, cache = model.trunk.extend(
            model.embed_words(token)[:, None], cache, T + count, visible[:, None], model.trunk.rotary(position + count)
        )
        key, now = jax.random.split(key)
        return _Going(count + 1, choose(hidden[:, 0], now), done, Generation(tokens, lengths), cache, key)

    return lax.while_loop(lambda going: (going.count < max_tokens) & ~going.done.all(), step, begin).answer


def _next_position(valid: Bool[Array, "B T"], position: Int[Array, "B *A T"]) -> Int[Array, "B *A 1"]:
    """Where the first new token stands: behind all others, on every axis."""
    real = jnp.expand_dims(valid, range(1, position.ndim - 1))
    furthest = jnp.where(real, position, -1).max(tuple(range(1, position.ndim)))
    shape = (len(furthest), *position.shape[1:-1], 1)
    return jnp.broadcast_to(jnp.expand_dims(furthest + 1, range(1, len(shape))), shape)


def draw(
    logits: Float[Array, "B V"], temperature: Float[Array, ""], top_p: Float[Array, ""], key: PRNGKeyArray
) -> Int[Array, " B"]:
    """Tokens drawn from softmax(logits / temperature), cut to the fewest likeliest tokens whose probabilities add up to
    `top_p` (nucleus sampling, arXiv 1904.09751)."""
    logits = logits / temperature
    ordered = jnp.sort(logits, -1, descending=True)
    probability = jax.nn.softmax(ordered, -1)
    kept = (jnp.cumsum(probability, -1) - probability < top_p).at[..., 0].set(True)  # the likeliest is always kept
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), -1, keepdims=True)
    return jax.random.categorical(key, jnp.where(logits >= least, logits, -jnp.inf))
