"""Two feed-forward layers.

Axes: B batch, D model width, F hidden width.
"""

from __future__ import annotations

import functools

import jax
from flax import nnx
from jaxtyping import Array, Float

from vla_jax.nn.dense import Dense

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": functools.partial(jax.nn.gelu, approximate=True)}


class GeluMLP(nnx.Module):
    """W2 gelu(W1 x), with biases. outputs: width of the result (default: that of x). exact: the error function's GELU,
    not its tanh form."""

    def __init__(
        self,
        width: int,
        hidden: int,
        outputs: int | None = None,
        *,
        exact: bool = False,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.up = Dense(width, hidden, dtype=dtype, rngs=rngs)
        self.down = Dense(hidden, outputs or width, dtype=dtype, rngs=rngs)
        self.exact = exact

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=not self.exact))


class GatedMLP(nnx.Module):
    """W3 (f(W1 x) * W2 x), without biases (arXiv 2002.05202): SwiGLU with f = "silu", GeGLU with f = "gelu"."""

    def __init__(self, width: int, hidden: int, activation: str, *, dtype: str = "float32", rngs: nnx.Rngs):
        self.gate = Dense(width, hidden, bias=False, dtype=dtype, rngs=rngs)
        self.up = Dense(width, hidden, bias=False, dtype=dtype, rngs=rngs)
        self.down = Dense(hidden, width, bias=False, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))
