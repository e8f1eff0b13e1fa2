"""Rotary position embedding (arXiv 2104.09864), half-split convention.

Axes: B batch, T query length, N query heads, H head width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Rotation(NamedTuple):
    """Cosines and sines of every position's angles, float32[T, H / 2]."""

    cos: Float[Array, "T H"]
    sin: Float[Array, "T H"]


def rotation(position: Int[np.ndarray, " T"], head_width: int, theta: float = 10_000.0) -> Rotation:
    """Angles position / theta^(2 i / H), made once at trace time for all layers. `head_width` must be even."""
    if head_width % 2:
        raise ValueError(f"rotary embedding needs an even head width, got {head_width}")
    frequency = theta ** (-np.arange(0, head_width, 2) / head_width)
    angle = np.asarray(position)[:, None] * frequency
    return Rotation(np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32))


def rotate(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Turn the pairs (x[i], x[i + H/2]) by the angles of their token's position."""
    cos, sin = jnp.asarray(by.cos)[:, None, :], jnp.asarray(by.sin)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
