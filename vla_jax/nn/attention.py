"""Attention with grouped heads, for self- and cross-attention.

Axes: B batch, T query length, S key length, N query heads, K key/value heads, H head width, D model width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from vla_jax.nn.dense import Dense
from vla_jax.nn.norm import RMSNorm
from vla_jax.nn.rotary import Rotation, rotate


def attention_weights(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], mask: Bool[Array, "#B #T S"] | None = None
) -> Float[Array, "B N T S"]:
    """softmax(q k / sqrt(H)) in float32; see `attend`."""
    B, T, N, _ = query.shape
    return _weights(*_by_heads(query, key), mask).reshape(B, N, T, -1)


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "#B #T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q k / sqrt(H)) v, the softmax in float32; N is a multiple of K, and query head n reads key head n K / N.

    mask: True where a query may look; None is everywhere. Every query must see at least one key.
    """
    seen = _attend(*_by_heads(query, key), jnp.swapaxes(value, 1, 2), mask)
    return jnp.moveaxis(seen, 3, 1).reshape(query.shape)


# Below, N counts query heads of one key head. Heads before tokens makes every product a batch of plain matrices.


def _by_heads(query, key) -> tuple[Float[Array, "B K N T H"], Float[Array, "B K S H"]]:
    B, T, N, H = query.shape
    K = key.shape[2]
    return jnp.moveaxis((query * H**-0.5).reshape(B, T, K, N // K, H), 1, 3), jnp.swapaxes(key, 1, 2)


def _scores(query, key) -> Float[Array, "B K N T S"]:
    return jnp.einsum("BKNTH,BKSH->BKNTS", query, key, preferred_element_type=jnp.float32)


def _weights(query, key, mask) -> Float[Array, "B K N T S"]:
    scores = _scores(query, key)
    return jax.nn.softmax(scores if mask is None else jnp.where(mask[:, None, None], scores, -1e30), -1)


def _mix(weights, value) -> Float[Array, "B K N T H"]:
    return jnp.einsum("BKNTS,BKSH->BKNTH", weights.astype(value.dtype), value)


@jax.custom_jvp
def _attend(query, key, value, mask) -> Float[Array, "B K N T H"]:
    return _mix(_weights(query, key, mask), value)


@_attend.defjvp
def _attend_jvp(primals, tangents):
    """The derivative with sum_s P dS taken where a query has H numbers, not S (FlashAttention, arXiv 2205.14135,
    appendix B.2), and without the mask, since P is zero there: transposed, one pass over T x S numbers, not four.

    In float32 alone: rounded to fewer digits, what is taken off would not match what is there, and where keys share a
    mean, as those of trained models do, their queries' gradients would mostly be that error."""
    (query, key, value, mask), (query_dot, key_dot, value_dot, _) = primals, tangents
    weights = _weights(query, key, mask)
    seen = _mix(weights, value)
    change = weights * (_scores(query_dot, key) + _scores(query, key_dot))
    total = jnp.sum(change, -1, keepdims=True)
    if value.dtype == jnp.float32:
        return seen, _mix(weights, value_dot) + _mix(change, value) - total * seen
    return seen, _mix(weights, value_dot) + _mix(change - weights * total, value)


class Block(NamedTuple):
    """Part of an attention pattern: a run of queries, the runs of keys that they may look at, and which of them."""

    queries: slice
    keys: tuple[slice, ...]
    mask: Bool[Array, "#B T S"]


Mask = Bool[Array, "#B #T S"] | tuple[Block, ...] | None


def attend_in_blocks(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    blocks: tuple[Block, ...],
) -> Float[Array, "B T N H"]:
    """`attend`, computing only what `blocks` names. Their queries follow one another and cover all T."""
    seen = []
    for block in blocks:
        keys, values = (jnp.concatenate([x[:, where] for where in block.keys], 1) for x in (key, value))
        seen.append(attend(query[:, block.queries], keys, values, block.mask))
    return jnp.concatenate(seen, 1)


class Attention(nnx.Module):
    """Projections around `attend`. Queries come from x; keys and values from x, or from a context of another width."""

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        *,
        kv_heads: int | None = None,
        context_width: int | None = None,
        qk_norm: bool = False,
        epsilon: float = 1e-6,
        bias: bool = True,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        kv_heads, context_width = kv_heads or heads, context_width or width
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads cannot share {kv_heads} key/value heads evenly")
        options = dict(bias=bias, dtype=dtype, rngs=rngs)
        self.query = Dense(width, heads * head_width, **options)
        self.key = Dense(context_width, kv_heads * head_width, **options)
        self.value = Dense(context_width, kv_heads * head_width, **options)
        self.output = Dense(heads * head_width, width, **options)
        self.query_norm = RMSNorm(head_width, epsilon) if qk_norm else None
        self.key_norm = RMSNorm(head_width, epsilon) if qk_norm else None
        self.head_width = head_width

    def queries(self, x: Float[Array, "B T D"], rotary: Rotation | None = None) -> Float[Array, "B T N H"]:
        """What looks."""
        query = self._heads(self.query(x))
        if self.query_norm is not None:
            query = self.query_norm(query)
        return query if rotary is None else rotate(query, rotary)

    def keys_values(
        self, context: Float[Array, "B S D"], rotary: Rotation | None = None
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """What there is to look at."""
        key, value = self._heads(self.key(context)), self._heads(self.value(context))
        if self.key_norm is not None:
            key = self.key_norm(key)
        return (key if rotary is None else rotate(key, rotary)), value

    def look(
        self,
        x: Float[Array, "B T D"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        mask: Mask = None,
        rotary: Rotation | None = None,
    ) -> Float[Array, "B T D"]:
        """Look from x at given keys and values, everywhere or as `mask` says."""
        seen = (attend_in_blocks if isinstance(mask, tuple) else attend)(self.queries(x, rotary), key, value, mask)
        return self.output(seen.reshape(*x.shape[:2], -1))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Mask = None,
        rotary: Rotation | None = None,
    ) -> Float[Array, "B T D"]:
        """Self-attention."""
        return self.look(x, *self.keys_values(x, rotary), mask, rotary)

    def _heads(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        return x.reshape(*x.shape[:-1], -1, self.head_width)
