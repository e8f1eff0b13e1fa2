"""Qwen3-VL, dense (arXiv 2511.21631): a tower for pictures of any size, positions in time, height and width.

Axes: B batch, T sequence length, I pictures, F numbers in a patch, D model width.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vla_jax.errors import UserError
from vla_jax.models.prompt import Prompt, check_pixels, check_tokens, count_pictures
from vla_jax.models.qwen_vision import Pictures, QwenVision, QwenVisionConfig, lay_out
from vla_jax.models.trunk import TrunkConfig
from vla_jax.models.vlm import VLM

INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig:
    """image_token, video_token, vision_start, vision_end: their ids. tied: the head is the word embedding."""

    vision: QwenVisionConfig
    trunk: TrunkConfig
    vocabulary: int = 151_936
    tied: bool = True
    image_token: int = 151_655
    video_token: int = 151_656
    vision_start: int = 151_652
    vision_end: int = 151_653
    dtype: str = "float32"


class Qwen3VL(VLM):
    """Causal throughout; pictures enter at their image tokens and, tapped, in the first layers of the trunk."""

    def __init__(self, config: Qwen3VLConfig, rngs: nnx.Rngs):
        super().__init__(config, QwenVision(config.vision, config.trunk.width, dtype=config.dtype, rngs=rngs), rngs)

    def prepare(self, **inputs: np.ndarray) -> Prompt:
        """input_ids [B, T], attention_mask [B, T], pixel_values [patches, F] and image_grid_thw [I, 3], as the
        processor returns them; mm_token_type_ids is not needed."""
        config = self.config
        tokens, valid = check_tokens(inputs, INPUTS, config.vocabulary)
        is_picture = (tokens == config.image_token) & valid
        if (tokens == config.video_token).any():
            raise UserError("videos are not supported: this model reads text and pictures")
        grids = check_grids(inputs.get("image_grid_thw"), config.vision.merge)
        sizes = [rows * columns for rows, columns in grids]
        pictures, numbers = None, np.full(tokens.shape, -1, np.int32)
        count = count_pictures(is_picture, sum(sizes) // config.vision.merge**2)
        if grids:
            shape = (sum(sizes), config.vision.patch_width)
            pixels = check_pixels(inputs.get("pixel_values"), shape, f"[{shape[0]} patches, {shape[1]} numbers]")
            pictures = lay_out(config.vision, pixels, grids)
            numbers = _in_padded_rows(count, sizes, config.vision.merge)
        position = positions(is_picture, valid, grids, config.vision.merge)
        return Prompt(tokens, valid, np.zeros_like(valid), position, numbers, pictures)

    def see(self, pictures: Pictures) -> tuple[Float[Array, "S D"], Float[Array, "n S D"]]:
        tokens, taps = self.vision(pictures)
        return tokens.reshape(-1, tokens.shape[-1]), taps.reshape(len(taps), -1, taps.shape[-1])


def check_grids(grids: np.ndarray | None, merge: int) -> list[tuple[int, int]]:
    """(rows, columns) of each picture in patches, from image_grid_thw. Raises UserError where they cannot be merged."""
    if grids is None:
        return []
    grids = np.asarray(grids)
    if grids.ndim != 2 or grids.shape[1] != 3 or (grids[:, 0] != 1).any() or (grids[:, 1:] % merge).any():
        raise UserError(
            f"image_grid_thw must be rows of 1 and the picture's height and width in patches, multiples of {merge}; "
            f"got {grids.tolist()}"
        )
    return [(int(rows), int(columns)) for _, rows, columns in grids]


def positions(
    is_picture: Bool[np.ndarray, "B T"], valid: Bool[np.ndarray, "B T"], grids: list[tuple[int, int]], merge: int
) -> Int[np.ndarray, "B 3 T"]:
    """Time, height and width of every token.

    Words count up in all three. A picture stands still in time and counts rows and columns from where it begins; the
    next word goes on after the longer of its sides. Padding has no place.
    """
    out = np.zeros((len(valid), 3, valid.shape[1]), np.int32)
    remaining = iter(grids)
    for row, (pictured, real) in enumerate(zip(is_picture, valid, strict=True)):
        index, now, pieces = np.flatnonzero(real), 0, []
        at = 0
        while at < len(index):
            if pictured[index[at]]:
                rows, columns = (side // merge for side in next(remaining))
                place = np.indices((1, rows, columns)).reshape(3, -1)
                pieces.append(now + place)
                now, at = now + max(rows, columns), at + rows * columns
            else:
                pieces.append(np.full((3, 1), now))
                now, at = now + 1, at + 1
        if pieces:
            placed = np.concatenate(pieces, 1)
            if placed.shape[1] != len(index):
                raise UserError(f"prompt {row} has fewer image tokens than its pictures make")
            out[row][:, index] = placed
    return out


def _in_padded_rows(count: Int[np.ndarray, "B T"], sizes: list[int], merge: int) -> Int[np.ndarray, "B T"]:
    """Picture tokens numbered through, as numbers among rows that are padded to the largest picture."""
    tokens = np.array(sizes) // merge**2
    starts = np.arange(len(tokens)) * tokens.max()
    padded = np.concatenate([start + np.arange(length) for start, length in zip(starts, tokens, strict=True)])
    return np.where(count >= 0, padded[count], -1).astype(np.int32)
