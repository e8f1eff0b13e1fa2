"""Two feed-forward layers.

Axes: B batch, D model width, F hidden width.
"""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from vla_jax.nn.dense import Dense


class GeluMLP(nnx.Module):
    """W2 gelu(W1 x), with biases and the tanh form of GELU."""

    def __init__(self, width: int, hidden: int, *, dtype: str = "float32", rngs: nnx.Rngs):
        self.up = Dense(width, hidden, dtype=dtype, rngs=rngs)
        self.down = Dense(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class SwiGLU(nnx.Module):
    """W3 (silu(W1 x) * W2 x), without biases (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, *, dtype: str = "float32", rngs: nnx.Rngs):
        self.gate = Dense(width, hidden, bias=False, dtype=dtype, rngs=rngs)
        self.up = Dense(width, hidden, bias=False, dtype=dtype, rngs=rngs)
        self.down = Dense(hidden, width, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
