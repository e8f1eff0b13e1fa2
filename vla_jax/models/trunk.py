"""The causal transformer that reads the sequence.

Axes: B batch, T query length, N query heads, K key/value heads, H head width, D model width, F hidden width.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from vla_jax.errors import UserError
from vla_jax.nn.attention import Attention, Block, Mask
from vla_jax.nn.mlp import ACTIVATIONS, GatedMLP
from vla_jax.nn.norm import RMSNorm
from vla_jax.nn.rotary import Rotation, interleaved_rotation, rotation
from vla_jax.nn.stack import Stack
from vla_jax.sequence.spans import Layout, Sight, sees


@dataclasses.dataclass(frozen=True)
class TrunkConfig:
    """The defaults are a small trunk; `models.presets` has those of released models.

    activation: of the gated feed-forward layers, "silu" or "gelu". norm_offset: 1 where the norms' parameters are
    scale - 1 (Gemma). rope_sections: numbers of rotary angles for time, height and width; () is positions on a line.
    scan: one compiled loop over the layers, not unrolled code. remat: see `nn.stack.Stack`.
    """

    width: int = 96
    depth: int = 3
    heads: int = 4
    kv_heads: int = 4
    head_width: int = 24
    hidden: int = 256
    activation: str = "silu"
    rope_theta: float = 10_000.0
    rope_sections: tuple[int, ...] = ()
    qk_norm: bool = True
    norm_offset: float = 0.0
    epsilon: float = 1e-6
    scan: bool = False
    remat: str = "none"


class Cache(NamedTuple):
    """Keys and values of the tokens that the layers have read, with room for more: [layers, B, S, K, H]."""

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]


class TrunkBlock(nnx.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: TrunkConfig, *, dtype: str, rngs: nnx.Rngs):
        norm = config.epsilon, config.norm_offset
        self.attention_norm = RMSNorm(config.width, *norm)
        self.attention = Attention(
            config.width,
            config.heads,
            config.head_width,
            kv_heads=config.kv_heads,
            qk_norm=config.qk_norm,
            epsilon=config.epsilon,
            bias=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = RMSNorm(config.width, *norm)
        self.mlp = GatedMLP(config.width, config.hidden, config.activation, dtype=dtype, rngs=rngs)

    def keys_values(self, x: Float[Array, "B T D"], rotary: Rotation) -> tuple[Array, Array]:
        """What later tokens will look at."""
        return self.attention.keys_values(self.attention_norm(x), rotary)

    def look(self, x: Float[Array, "B T D"], key, value, mask: Mask, rotary: Rotation) -> Float[Array, "B T D"]:
        """The block, looking at given keys and values."""
        x = x + self.attention.look(self.attention_norm(x), key, value, mask, rotary)
        return x + self.mlp(self.mlp_norm(x))

    def __call__(self, x: Float[Array, "B T D"], mask: Mask, rotary: Rotation) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), mask, rotary)
        return x + self.mlp(self.mlp_norm(x))


class Trunk(nnx.Module):
    """Embeddings to hidden states after the final norm.

    taps [n, B, T, D], where given, are added to what the first n layers return (DeepStack, arXiv 2406.04334).
    """

    def __init__(self, config: TrunkConfig, *, dtype: str, rngs: nnx.Rngs):
        _check(config)
        self.blocks = Stack(
            lambda r: TrunkBlock(config, dtype=dtype, rngs=r),
            config.depth,
            scan=config.scan,
            remat=config.remat,
            rngs=rngs,
        )
        self.norm = RMSNorm(config.width, config.epsilon, config.norm_offset)
        self.config, self.dtype = config, dtype

    def __call__(
        self,
        x: Float[Array, "B T D"],
        layout: Layout,
        valid: Bool[Array, "B T"],
        position: Int[Array, "*A T"] | None = None,
        taps: Float[Array, "n B T D"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Read a sequence that is laid out as `layout`.

        valid: False at padding tokens, which nobody sees. Hidden states at padding tokens mean nothing.
        position: for the rotary embedding; those of the layout where not given.
        """
        mask = tuple(Block(queries, keys, _mask(layout, valid, queries, keys)) for queries, keys in layout.blocks)
        return self.read(x, mask, self.rotary(layout.sight.position if position is None else position), taps)

    def rotary(self, position: Int[Array, "*B T"]) -> Rotation:
        """The rotation of all layers. position: [*B, T] on a line, or, with `rope_sections`, [*B, 3, T] (time, height,
        width); a NumPy array [T] of positions on a line will do for both."""
        config = self.config
        if not config.rope_sections or position.ndim == 1:
            return rotation(position, config.head_width, config.rope_theta)
        return interleaved_rotation(position, config.head_width, config.rope_theta, config.rope_sections)

    def read(
        self, x: Float[Array, "B T D"], mask: Mask, rotary: Rotation, taps: Float[Array, "n B T D"] | None = None
    ) -> Float[Array, "B T D"]:
        """Hidden states."""

        def layer(block, x, index):
            return tap(block(x, mask, rotary), index, taps), None

        x, _ = self.blocks.run(layer, x.astype(self.dtype), self._indices)
        return self.norm(x)

    def begin(
        self,
        x: Float[Array, "B T D"],
        room: int,
        mask: Mask,
        rotary: Rotation,
        taps: Float[Array, "n B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """`read`, and a cache of it with room for `room` more tokens."""

        def layer(block, x, index):
            cached = block.keys_values(x, rotary)
            return tap(block.look(x, *cached, mask, rotary), index, taps), cached

        x, (keys, values) = self.blocks.run(layer, x.astype(self.dtype), self._indices)
        more = ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))
        return self.norm(x), Cache(jnp.pad(keys, more), jnp.pad(values, more))

    def extend(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        start: Int[Array, ""],
        mask: Bool[Array, "#B T S"],
        rotary: Rotation,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Read T more tokens that lie in the cache from `start` on; S is the cache's whole length."""

        def layer(block, carried, index):
            x, cache = carried
            place = (index, 0, start, 0, 0)
            cache = Cache(
                *(
                    lax.dynamic_update_slice(old, new[None].astype(old.dtype), place)
                    for old, new in zip(cache, block.keys_values(x, rotary), strict=True)
                )
            )
            keys, values = (lax.dynamic_index_in_dim(part, index, keepdims=False) for part in cache)
            return (block.look(x, keys, values, mask, rotary), cache), None

        (x, cache), _ = self.blocks.run(layer, (x.astype(self.dtype), cache), self._indices)
        return self.norm(x), cache

    @property
    def _indices(self) -> Int[Array, " L"]:
        return jnp.arange(self.config.depth)


def tap(x: Float[Array, "B T D"], index: Int[Array, ""], taps: Float[Array, "n B T D"] | None) -> Float[Array, "B T D"]:
    """Layer number `index`'s result with its tap added, where it has one."""
    if taps is None:
        return x
    mine = lax.dynamic_index_in_dim(taps, jnp.minimum(index, len(taps) - 1), keepdims=False)
    return x + jnp.where(index < len(taps), mine, 0).astype(x.dtype)


def _mask(layout: Layout, valid: Bool[Array, "B T"], queries: slice, keys: tuple[slice, ...]) -> Bool[Array, "B T S"]:
    """The rule of sight between some tokens, without padding keys."""
    index = np.concatenate([np.arange(where.start, where.stop) for where in keys])
    query, key = (Sight(*(jnp.asarray(vector[where]) for vector in layout.sight)) for where in (queries, index))
    return sees(query, key) & jnp.concatenate([valid[:, where] for where in keys], 1)[:, None]


def _check(config: TrunkConfig) -> None:
    if config.heads % config.kv_heads:
        raise UserError(f"trunk.heads = {config.heads} is not a multiple of trunk.kv_heads = {config.kv_heads}")
    if config.head_width % 2:
        raise UserError(f"trunk.head_width = {config.head_width} must be even for the rotary embedding")
    if config.activation not in ACTIVATIONS:
        raise UserError(f"trunk.activation must be one of {', '.join(ACTIVATIONS)}, got {config.activation!r}")
    if config.rope_sections and (len(config.rope_sections) != 3 or 2 * sum(config.rope_sections) != config.head_width):
        raise UserError(
            f"trunk.rope_sections = {config.rope_sections} must be three numbers with the sum trunk.head_width / 2"
        )
