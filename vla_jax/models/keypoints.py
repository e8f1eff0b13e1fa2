"""Camera views as a few learned points: what is where in the picture.

The encoder of deep spatial autoencoders (Finn et al., arXiv 1509.06113; Levine et al., arXiv 1504.00702). Two
convolutions make one map a keypoint, a softmax over the map's pixels makes it a distribution, and the mean place is the
keypoint. Each becomes one token. Where a transformer over patches has to find out first that patches have places, these
tokens are places, so that a policy learns to aim from scratch within minutes; a large model does better with patches.

Axes: B batch, T tokens, D model width, P keypoints of one view, G grid: pixels of one map in raster order.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from vla_jax.errors import UserError
from vla_jax.models.vision import patchify, stack_views
from vla_jax.nn.dense import Dense

SHARPNESS = 4.0  # of the first maps' softmax: a flat map puts every keypoint into the middle, whatever there is to see


@dataclasses.dataclass(frozen=True)
class KeypointConfig:
    """points: P. patch: side in pixels of the first, not overlapping convolution; the second is 3 x 3. hidden: channels
    between the two."""

    points: int = 16
    patch: int = 4
    hidden: int = 32


class KeypointEncoder(nnx.Module):
    """Images to P tokens a view. The views share the convolutions; every token has an embedding of its own."""

    def __init__(
        self,
        config: KeypointConfig,
        image_size: int,
        views: tuple[str, ...],
        out_width: int,
        *,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        if image_size % config.patch:
            raise UserError(f"image size {image_size} is not a multiple of keypoints.patch = {config.patch}")
        self.patch = Dense(3 * config.patch**2, config.hidden, dtype=dtype, rngs=rngs)
        self.maps = nnx.Conv(config.hidden, config.points, (3, 3), padding="SAME", dtype=dtype, rngs=rngs)
        self.project = Dense(3, out_width, dtype=dtype, rngs=rngs)
        self.identity = nnx.Param(0.5 * jax.random.normal(rngs.params(), (len(views) * config.points, out_width)))
        self.views, self.image_size, self.config = views, image_size, config

    @property
    def tokens(self) -> int:
        """Number of tokens for all views together."""
        return len(self.views) * self.config.points

    @property
    def grid(self) -> tuple[int, int]:
        """Keypoints lie in no order: one row."""
        return 1, self.config.points

    def __call__(self, images: dict[str, UInt8[Array, "B height width 3"]]) -> Float[Array, "B T D"]:
        """All views' tokens, view after view."""
        tokens = self.project(self._locate_all(images))
        return tokens + self.identity[...].astype(tokens.dtype)

    @property
    def reach(self) -> int:
        """Side in pixels of the square that a token stands for: a pixel of its map."""
        return self.config.patch

    def places(self, images: dict[str, UInt8[Array, "B height width 3"]]) -> Float[Array, "B T 2"]:
        """(column, row) of every token's keypoint, in pixels of its view."""
        steps = (self._locate_all(images)[..., :2] / 3**0.5 + 1) / 2 * (self.image_size // self.reach - 1)
        return self.reach * (steps + 0.5)

    def _locate_all(self, images) -> Float[Array, "B T 3"]:
        pixels = stack_views(images, self.views, self.image_size)
        return self.locate(pixels.reshape(-1, *pixels.shape[2:])).reshape(len(pixels), self.tokens, 3)

    def locate(self, pixels: UInt8[Array, "B height width 3"]) -> Float[Array, "B P 3"]:
        """(column, row, strength) of every keypoint. Places are those of `grid`; strength is the map's mean there."""
        side = self.image_size // self.config.patch
        x = jax.nn.relu(self.patch(patchify(pixels, self.config.patch) / 127.5 - 1.0))
        maps = self.maps(x.reshape(len(pixels), side, side, -1)).astype(jnp.float32).reshape(len(pixels), side**2, -1)
        weights = jax.nn.softmax(SHARPNESS * maps, 1)
        places = jnp.einsum("BGP,GF->BPF", weights, grid(side))
        return jnp.concatenate([places, jnp.einsum("BGP,BGP->BP", weights, maps)[..., None]], -1)


def grid(side: int) -> Float[np.ndarray, "G 2"]:
    """(column, row) of the pixels of a square map, each with mean 0 and, as `side` grows, variance 1."""
    row, column = np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side), indexing="ij")
    return (3**0.5 * np.stack([column.ravel(), row.ravel()], -1)).astype(np.float32)
