"""A vision transformer over pictures: over the camera views, and, at another size, SigLIP (arXiv 2303.15343).

Axes: B batch, I pictures, T query length (patches of one view), N query heads, H head width, D model width, F hidden
width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from vla_jax.errors import UserError
from vla_jax.nn.attention import Attention, Mask
from vla_jax.nn.dense import Dense
from vla_jax.nn.mlp import GeluMLP
from vla_jax.nn.norm import LayerNorm
from vla_jax.nn.rotary import Rotation
from vla_jax.nn.stack import Stack


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """patch: side of a patch in pixels. merge: merge x merge neighbouring patches become one token of the trunk.
    view_embedding: tell views apart by a learned embedding, not only by their places in the sequence."""

    patch: int = 8
    merge: int = 2
    view_embedding: bool = True
    width: int = 64
    depth: int = 2
    heads: int = 4
    hidden: int = 256
    scan: bool = False
    remat: str = "none"


class VisionBlock(nnx.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), every patch seeing every patch of its picture that `mask` allows."""

    def __init__(self, config, *, dtype: str, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(config.width)
        self.attention = Attention(config.width, config.heads, config.width // config.heads, dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(config.width)
        self.mlp = GeluMLP(config.width, config.hidden, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], each: None, mask: Mask = None, rotary: Rotation | None = None
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), mask, rotary)
        return x + self.mlp(self.mlp_norm(x))


class VisionEncoder(nnx.Module):
    """Images to tokens of width `out_width`. Views share all weights; `read` reads pictures that are no views."""

    def __init__(
        self,
        config: VisionConfig,
        image_size: int,
        views: tuple[str, ...],
        out_width: int,
        *,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        if image_size % (config.patch * config.merge):
            raise UserError(
                f"image size {image_size} is not a multiple of vision.patch x vision.merge = "
                f"{config.patch} x {config.merge}; change one of them"
            )
        if config.width % config.heads:
            raise UserError(f"vision.width = {config.width} is not a multiple of vision.heads = {config.heads}")
        side = image_size // config.patch
        self.patch = Dense(3 * config.patch**2, config.width, dtype=dtype, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (side**2, config.width)))
        shape = (len(views), config.width)
        self.view = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape)) if config.view_embedding else None
        self.blocks = Stack(
            lambda r: VisionBlock(config, dtype=dtype, rngs=r),
            config.depth,
            scan=config.scan,
            remat=config.remat,
            rngs=rngs,
        )
        self.norm = LayerNorm(config.width)
        self.project = Dense(config.width * config.merge**2, out_width, dtype=dtype, rngs=rngs)
        self.views, self.image_size, self.patch_size, self.merge = views, image_size, config.patch, config.merge

    @property
    def tokens(self) -> int:
        """Number of tokens for all views together, or for one picture where there are no views."""
        return max(len(self.views), 1) * self.grid[0] * self.grid[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of one view's tokens."""
        return (self.image_size // (self.patch_size * self.merge),) * 2

    @property
    def reach(self) -> int:
        """Side in pixels of the square that a token stands for."""
        return self.image_size // self.grid[0]

    def places(self, images: dict[str, UInt8[Array, "B height width 3"]]) -> Float[Array, "B T 2"]:
        """(column, row) of the middle of every token's square, in pixels of its view."""
        return middles(self.grid, self.image_size, self.views, len(images[self.views[0]]))

    def __call__(self, images: dict[str, UInt8[Array, "B height width 3"]]) -> Float[Array, "B T D"]:
        """All views' tokens, view after view, each in raster order."""
        pixels = stack_views(images, self.views, self.image_size)
        B, views = pixels.shape[:2]
        x = self._embed(pixels / 127.5 - 1.0)
        if self.view is not None:
            x = x + self.view[...][:, None]
        return self._read(x.reshape(B * views, *x.shape[2:])).reshape(B, self.tokens, -1)

    def read(self, pixels: Float[Array, "I height width 3"]) -> Float[Array, "I T D"]:
        """The tokens of pictures with values from -1 to 1."""
        return self._read(self._embed(pixels))

    def _embed(self, pixels: Float[Array, "*B height width 3"]) -> Float[Array, "*B T D"]:
        return self.patch(patchify(pixels, self.patch_size)) + self.position[...]

    def _read(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.project(merge_patches(self.norm(self.blocks(x.astype(self.patch.dtype))), self.merge))


def middles(grid: tuple[int, int], image_size: int, views: tuple[str, ...], samples: int) -> Float[Array, "B T 2"]:
    """(column, row), in pixels, of the middles of the squares that an even grid cuts a picture into: view after view,
    each in raster order, the same for all samples."""
    row, column = (image_size / cells * (np.indices(grid)[axis] + 0.5) for axis, cells in enumerate(grid))
    one_view = np.stack([column.ravel(), row.ravel()], -1)
    every = np.tile(one_view, (len(views), 1))
    return jnp.broadcast_to(every, (samples, *every.shape))


def stack_views(
    images: dict[str, UInt8[Array, "B size size 3"]], views: tuple[str, ...], size: int
) -> UInt8[Array, "B views size size 3"]:
    """The named pictures side by side. Raises UserError where one is missing, of another size, or not uint8."""
    for view in views:
        shape = images[view].shape[1:] if view in images else None
        if shape != (size, size, 3):
            raise UserError(
                f"the policy needs a {size} x {size} RGB image {view!r}, got {'none' if shape is None else shape}"
            )
        if images[view].dtype != jnp.uint8:
            raise UserError(f"the image {view!r} must be uint8, 0 to 255, got {images[view].dtype}: do not scale it")
    return jnp.stack([images[view] for view in views], 1)


def patchify(pixels: Array, size: int) -> Float[Array, "*B T D"]:
    """Cut images [*B, height, width, 3] into size x size patches in raster order; each becomes a row of 3 size^2
    numbers."""
    *lead, height, width, channels = pixels.shape
    pixels = pixels.reshape(*lead, height // size, size, width // size, size, channels)
    return jnp.moveaxis(pixels, -3, -4).reshape(*lead, -1, size * size * channels).astype(jnp.float32)


def merge_patches(x: Float[Array, "B T D"], merge: int) -> Float[Array, "B S F"]:
    """Concatenate the features of merge x merge neighbouring patches of a square grid: T / merge^2 tokens."""
    B, T, D = x.shape
    side = round(T**0.5)
    x = x.reshape(B, side // merge, merge, side // merge, merge, D)
    return jnp.moveaxis(x, 3, 2).reshape(B, T // merge**2, merge**2 * D)
