"""Rotary position embedding (arXiv 2104.09864), half-split convention.

Axes: B batch, T query length, N query heads, H head width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Rotation(NamedTuple):
    """Cosines and sines of every position's angles, float32[T, H / 2], or one such table a sample of the batch."""

    cos: Float[Array, "*B T H"]
    sin: Float[Array, "*B T H"]


def rotation(position: Int[Array, "*B T"], head_width: int, theta: float = 10_000.0) -> Rotation:
    """Angles position / theta^(2 i / H), made once for all layers. `head_width` must be even.

    Positions in a NumPy array are known at trace time, and so are their angles.
    """
    if head_width % 2:
        raise ValueError(f"rotary embedding needs an even head width, got {head_width}")
    frequency = theta ** (-np.arange(0, head_width, 2) / head_width)
    if isinstance(position, np.ndarray):
        angle = position[..., None] * frequency
        return Rotation(np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32))
    angle = position[..., None].astype(jnp.float32) * frequency.astype(np.float32)
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def interleaved_rotation(
    position: Int[Array, "*B 3 T"], head_width: int, theta: float, sections: tuple[int, int, int]
) -> Rotation:
    """Positions in time, height and width share one spectrum: the angles i take turns, t h w t h w ...

    sections: number of angles of each; they add up to H / 2, and where h and w are used up t has the rest (Qwen3-VL,
    arXiv 2511.21631).
    """
    axis = np.zeros(head_width // 2, np.int32)
    for which in (1, 2):
        axis[which : 3 * sections[which] : 3] = which
    time, height, width = (rotation(position[..., which, :], head_width, theta) for which in range(3))
    tables = zip(time, height, width, strict=True)
    return Rotation(*(jnp.where(axis == 0, t, jnp.where(axis == 1, h, w)) for t, h, w in tables))


def plane_rotation(position: Int[Array, "*B 2 T"], head_width: int, theta: float = 10_000.0) -> Rotation:
    """Half of the angles turn with the row, half with the column; each half has the whole spectrum."""
    tables = rotation(position, head_width // 2, theta)
    return Rotation(*(jnp.concatenate([table[..., 0, :, :], table[..., 1, :, :]], -1) for table in tables))


def rotate(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Turn the pairs (x[i], x[i + H/2]) by the angles of their token's position."""
    cos, sin = jnp.asarray(by.cos)[..., None, :], jnp.asarray(by.sin)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
