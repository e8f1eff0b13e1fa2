"""The causal transformer that reads the sequence.

Axes: B batch, T query length, N query heads, K key/value heads, H head width, D model width, F hidden width.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from vla_jax.errors import UserError
from vla_jax.nn.attention import Attention, Block
from vla_jax.nn.mlp import SwiGLU
from vla_jax.nn.norm import RMSNorm
from vla_jax.nn.rotary import Rotation, rotation
from vla_jax.nn.stack import Stack
from vla_jax.sequence.spans import Layout, Sight, sees


@dataclasses.dataclass(frozen=True)
class TrunkConfig:
    """scan: one compiled loop over the layers, not unrolled code. remat: recompute layers in the backward pass."""

    width: int = 96
    depth: int = 3
    heads: int = 4
    kv_heads: int = 4
    head_width: int = 24
    hidden: int = 256
    rope_theta: float = 10_000.0
    qk_norm: bool = True
    scan: bool = False
    remat: bool = False


class TrunkBlock(nnx.Module):
    """x += attention(norm(x)); x += swiglu(norm(x))."""

    def __init__(self, config: TrunkConfig, *, dtype: str, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(
            config.width,
            config.heads,
            config.head_width,
            kv_heads=config.kv_heads,
            qk_norm=config.qk_norm,
            bias=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = SwiGLU(config.width, config.hidden, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], each: None, mask: tuple[Block, ...], rotary: Rotation
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), mask, rotary)
        return x + self.mlp(self.mlp_norm(x))


class Trunk(nnx.Module):
    """Embeddings laid out as `layout` to hidden states after the final norm."""

    def __init__(self, config: TrunkConfig, *, dtype: str, rngs: nnx.Rngs):
        if config.heads % config.kv_heads:
            raise UserError(f"trunk.heads = {config.heads} is not a multiple of trunk.kv_heads = {config.kv_heads}")
        if config.head_width % 2:
            raise UserError(f"trunk.head_width = {config.head_width} must be even for the rotary embedding")
        self.blocks = Stack(
            lambda r: TrunkBlock(config, dtype=dtype, rngs=r),
            config.depth,
            scan=config.scan,
            remat=config.remat,
            rngs=rngs,
        )
        self.norm = RMSNorm(config.width)
        self.config, self.dtype = config, dtype

    def __call__(self, x: Float[Array, "B T D"], layout: Layout, valid: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        """valid: False at padding tokens, which nobody sees. Hidden states at padding tokens mean nothing."""
        mask = tuple(Block(queries, keys, _mask(layout, valid, queries, keys)) for queries, keys in layout.blocks)
        rotary = rotation(layout.sight.position, self.config.head_width, self.config.rope_theta)
        return self.norm(self.blocks(x.astype(self.dtype), mask, rotary))


def _mask(layout: Layout, valid: Bool[Array, "B T"], queries: slice, keys: tuple[slice, ...]) -> Bool[Array, "B T S"]:
    """The rule of sight between some tokens, without padding keys."""
    index = np.concatenate([np.arange(where.start, where.stop) for where in keys])
    query, key = (Sight(*(jnp.asarray(vector[where]) for vector in layout.sight)) for where in (queries, index))
    return sees(query, key) & jnp.concatenate([valid[:, where] for where in keys], 1)[:, None]
