"""Normalisation over the last axis, computed in float32 and returned in the input's type.

Axes: B batch, D model width.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale) (arXiv 1910.07467). Gemma keeps scale - 1 as its parameter: offset 1."""

    def __init__(self, width: int, epsilon: float = 1e-6, offset: float = 0.0):
        self.scale = nnx.Param(jnp.full((width,), 1 - offset, jnp.float32))
        self.epsilon, self.offset = epsilon, offset

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.epsilon)
        return (y * (self.offset + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias (arXiv 1607.06450)."""

    def __init__(self, width: int, epsilon: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return (standardize(x, self.epsilon) * scale + bias).astype(x.dtype)


def standardize(x: Float[Array, "*B D"], epsilon: float = 1e-6) -> Float[Array, "*B D"]:
    """Layer normalisation without parameters, in float32: (x - mean) / std."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True)
    return y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + epsilon)
