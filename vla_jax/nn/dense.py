"""A dense layer that multiplies flat matrices.

Axes: B batch, T query length, D model width, F hidden width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vla_jax.nn.placement import split_samples


class Dense(nnx.Module):
    """y = x W + b on the last axis. Parameters are float32; the product runs in `dtype`.

    Inputs are flattened to two axes first: with three, XLA on a CPU fuses a slow transposed copy into the gradient of
    W, which costs a third of a training step. The first axis of x is one of samples, which a mesh splits.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, dtype: str = "float32", rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (inputs, outputs), jnp.float32) * inputs**-0.5)
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32)) if bias else None
        self.adapter: nnx.Module | None = None  # see `nn.lora`
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """Shapes: [..., inputs] -> [..., outputs], in `dtype`."""
        kernel = self.kernel[...].astype(self.dtype)
        flat = split_samples(x).reshape(-1, x.shape[-1]).astype(self.dtype)
        y = flat @ kernel
        if self.adapter is not None:
            y = y + self.adapter(flat)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        return split_samples(y.reshape(*x.shape[:-1], kernel.shape[-1]))
