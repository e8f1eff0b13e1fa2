"""Qwen3-VL's vision tower (arXiv 2511.21631): pictures of any size, 2 x 2 merging, and DeepStack taps.

Patches arrive in the order in which they are merged, so that each merge^2 neighbours in a row make one token. Pictures
of different sizes are padded to one length; padding is never seen.

Axes: I pictures, P patches of one picture, T tokens of one picture, F numbers in a patch, H head width, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from vla_jax.errors import UserError
from vla_jax.models.vision import VisionBlock, middles, stack_views
from vla_jax.nn.dense import Dense
from vla_jax.nn.mlp import GeluMLP
from vla_jax.nn.norm import LayerNorm
from vla_jax.nn.rotary import plane_rotation
from vla_jax.nn.stack import Stack


@dataclasses.dataclass(frozen=True)
class QwenVisionConfig:
    """patch: side in pixels; frames: of a video in one patch, a still picture is repeated. merge: merge x merge patches
    become one token. grid: side of the square table of position embeddings. taps: the layers after which features are
    tapped for the first layers of the trunk."""

    patch: int = 16
    frames: int = 2
    merge: int = 2
    width: int = 1024
    depth: int = 24
    heads: int = 16
    hidden: int = 4096
    grid: int = 48
    taps: tuple[int, ...] = (5, 11, 17)
    scan: bool = True
    remat: str = "none"

    @property
    def patch_width(self) -> int:
        """Numbers in a patch: channels x frames x rows x columns."""
        return 3 * self.frames * self.patch**2


class Pictures(NamedTuple):
    """Pictures cut into patches (in merging order), with what their places in the picture imply.

    valid: False at padding; None where all pictures are of one size, so that nothing has to be masked.
    place: row and column, counted in patches. corner, weight: which four entries of the position table surround the
    patch and how near they are.
    """

    patches: Float[Array, "I P F"]
    valid: Bool[Array, "I P"] | None
    place: Int[Array, "I 2 P"]
    corner: Int[Array, "I P 4"]
    weight: Float[Array, "I P 4"]


class Merger(nnx.Module):
    """merge^2 neighbouring patches to one token: concatenate, and two layers with the exact GELU. The norm is over each
    patch, or, at the taps, over the concatenation."""

    def __init__(self, config: QwenVisionConfig, outputs: int, *, norm_merged: bool, dtype: str, rngs: nnx.Rngs):
        merged = config.width * config.merge**2
        self.norm = LayerNorm(merged if norm_merged else config.width)
        self.mlp = GeluMLP(merged, merged, outputs, exact=True, dtype=dtype, rngs=rngs)
        self.merge, self.norm_merged = config.merge, norm_merged

    def __call__(self, x: Float[Array, "I P D"]) -> Float[Array, "I T D"]:
        merged = (len(x), x.shape[1] // self.merge**2, -1)
        return self.mlp(self.norm(x.reshape(merged)) if self.norm_merged else self.norm(x).reshape(merged))


class QwenVision(nnx.Module):
    """Pictures to tokens of width `out_width`, and to taps of the same shape for the first layers of the trunk."""

    def __init__(self, config: QwenVisionConfig, out_width: int, *, dtype: str, rngs: nnx.Rngs):
        if config.width % (4 * config.heads):
            raise UserError(f"vision.width = {config.width} is no multiple of four times vision.heads = {config.heads}")
        if not config.taps or not all(0 <= layer < config.depth for layer in config.taps):
            raise UserError(
                f"vision.taps = {config.taps} must be layers, at least one, below vision.depth = {config.depth}"
            )
        options = dict(dtype=dtype, rngs=rngs)
        self.patch = Dense(config.patch_width, config.width, **options)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.grid**2, config.width)))
        self.blocks = Stack(
            lambda r: VisionBlock(config, dtype=dtype, rngs=r),
            config.depth,
            scan=config.scan,
            remat=config.remat,
            rngs=rngs,
        )
        self.merger = Merger(config, out_width, norm_merged=False, **options)
        self.tap_mergers = Stack(
            lambda r: Merger(config, out_width, norm_merged=True, dtype=dtype, rngs=r),
            len(config.taps),
            scan=False,
            remat="none",
            rngs=rngs,
        )
        self.config = config

    def __call__(self, pictures: Pictures) -> tuple[Float[Array, "I T D"], Float[Array, "n I T D"]]:
        """(tokens, taps); at padding they mean nothing."""
        table = self.position[...].astype(jnp.float32)
        position = jnp.einsum("IPWD,IPW->IPD", table[pictures.corner], pictures.weight)
        patches = self.patch(pictures.patches)
        mask = None if pictures.valid is None else pictures.valid[:, None]
        rotary = plane_rotation(pictures.place, self.config.width // self.config.heads)

        # Each tap is written to its place as it comes; results of the layers would be kept for all of them.
        count = len(self.config.taps)
        slots = np.full(self.config.depth, count)  # of most layers, none: past the last
        slots[list(self.config.taps)] = np.arange(count)

        def layer(block, carry, slot):
            x, tapped = carry
            x = block(x, None, mask, rotary)
            return (x, tapped.at[slot].set(x, mode="drop")), None

        x = patches + position.astype(patches.dtype)
        (x, tapped), _ = self.blocks.run(layer, (x, jnp.zeros((count, *x.shape), x.dtype)), slots)
        _, taps = self.tap_mergers.run(lambda merger, carry, x: (carry, merger(x)), None, tapped)
        return self.merger(x), taps


class QwenViews(QwenVision):
    """The tower as a policy's encoder: square camera views of one size, one after another."""

    def __init__(
        self,
        config: QwenVisionConfig,
        image_size: int,
        views: tuple[str, ...],
        out_width: int,
        *,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        if image_size % (config.patch * config.merge):
            raise UserError(
                f"image size {image_size} is not a multiple of qwen_vision.patch x qwen_vision.merge = "
                f"{config.patch} x {config.merge}; change one of them"
            )
        super().__init__(config, out_width, dtype=dtype, rngs=rngs)
        self.views, self.image_size = views, image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of one view's tokens."""
        return (self.image_size // (self.config.patch * self.config.merge),) * 2

    @property
    def tokens(self) -> int:
        """Number of tokens for all views together."""
        return len(self.views) * self.grid[0] * self.grid[1]

    @property
    def reach(self) -> int:
        """Side in pixels of the square that a token stands for."""
        return self.image_size // self.grid[0]

    def places(self, images: dict[str, UInt8[Array, "B height width 3"]]) -> Float[Array, "B T 2"]:
        """(column, row) of the middle of every token's square, in pixels of its view."""
        return middles(self.grid, self.image_size, self.views, len(images[self.views[0]]))

    def __call__(
        self, images: dict[str, UInt8[Array, "B height width 3"]]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "n B T D"]]:
        """All views' tokens, view after view, each in raster order of the merged squares, and their taps."""
        pixels = stack_views(images, self.views, self.image_size)
        B, views = pixels.shape[:2]
        side = self.image_size // self.config.patch
        place = in_merging_order((side, side), self.config.merge)
        corner, weight = surroundings(place, (side, side), self.config.grid)
        patches = cut(pixels.reshape(B * views, *pixels.shape[2:]) / 127.5 - 1.0, self.config)
        tokens, taps = super().__call__(Pictures(patches, None, place[None], corner[None], weight[None]))
        return tokens.reshape(B, self.tokens, -1), taps.reshape(len(taps), B, self.tokens, -1)


def cut(pixels: Float[Array, "I size size 3"], config: QwenVisionConfig) -> Float[Array, "I P F"]:
    """Patches in merging order, each [channels, frames, rows, columns] with the same picture in every frame."""
    count, size = pixels.shape[:2]
    blocks = size // (config.patch * config.merge)
    x = pixels.reshape(count, blocks, config.merge, config.patch, blocks, config.merge, config.patch, 3)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)[..., None, :, :]
    x = jnp.broadcast_to(x, (*x.shape[:-3], config.frames, *x.shape[-2:]))
    return x.reshape(count, (size // config.patch) ** 2, config.patch_width)


def lay_out(config: QwenVisionConfig, patches: Float[np.ndarray, "S F"], grids: Sequence[tuple[int, int]]) -> Pictures:
    """Pictures from their patches in one row. grids: (rows, columns) of each, counted in patches."""
    sizes = [rows * columns for rows, columns in grids]
    most = max(sizes)
    merge = config.merge
    out = Pictures(
        np.zeros((len(grids), most, config.patch_width), np.float32),
        np.arange(most) < np.array(sizes)[:, None] if min(sizes) < most else None,
        np.zeros((len(grids), 2, most), np.int32),
        np.zeros((len(grids), most, 4), np.int32),
        np.zeros((len(grids), most, 4), np.float32),
    )
    start = 0
    for index, ((rows, columns), size) in enumerate(zip(grids, sizes, strict=True)):
        place = in_merging_order((rows, columns), merge)
        out.patches[index, :size] = patches[start : start + size]
        out.place[index, :, :size] = place
        out.corner[index, :size], out.weight[index, :size] = surroundings(place, (rows, columns), config.grid)
        start += size
    return out


def in_merging_order(size: tuple[int, int], merge: int) -> Int[np.ndarray, "2 P"]:
    """Rows and columns of a picture's patches in the order in which they are merged."""
    rows, columns = size
    place = np.indices(size).reshape(2, rows // merge, merge, columns // merge, merge)
    return place.swapaxes(2, 3).reshape(2, -1)


def surroundings(
    place: Int[np.ndarray, "2 P"], size: tuple[int, int], side: int
) -> tuple[Int[np.ndarray, "P 4"], Float[np.ndarray, "P 4"]]:
    """Bilinear interpolation in a table of side x side: the picture's corners lie on the table's corners."""
    indices, weights = [], []
    for coordinate, count in zip(place, size, strict=True):
        exact = (coordinate * (side - 1) / max(count - 1, 1)).astype(np.float32)
        low = np.floor(exact).astype(np.int32)
        indices.append(np.stack([low, np.minimum(low + 1, side - 1)]))
        weights.append(np.stack([1 - (exact - low), exact - low]))
    corner = (indices[0][:, None] * side + indices[1][None]).reshape(4, -1)
    return corner.T, (weights[0][:, None] * weights[1][None]).reshape(4, -1).T.astype(np.float32)
