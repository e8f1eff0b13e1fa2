"""PaliGemma (arXiv 2407.07726): SigLIP pictures, then text, read by Gemma; the prefix sees itself both ways.

Axes: B batch, T sequence length, I pictures, D model width.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vla_jax.errors import UserError
from vla_jax.models.prompt import Prompt, check_pixels, check_tokens, count_pictures
from vla_jax.models.trunk import TrunkConfig
from vla_jax.models.vision import VisionConfig, VisionEncoder
from vla_jax.models.vlm import VLM

INPUTS = ("input_ids", "attention_mask", "pixel_values", "token_type_ids")


@dataclasses.dataclass(frozen=True)
class PaliGemmaConfig:
    """image_size: side of every picture in pixels. image_token: id of what stands in for picture tokens; it may lie
    beyond the vocabulary. tied: the head is the word embedding."""

    vision: VisionConfig
    trunk: TrunkConfig
    vocabulary: int = 257_216
    tied: bool = True
    image_size: int = 224
    image_token: int = 257_152
    dtype: str = "float32"


class PaliGemma(VLM):
    """Word embeddings are scaled by the root of their width; picture tokens are not."""

    def __init__(self, config: PaliGemmaConfig, rngs: nnx.Rngs):
        tower = VisionEncoder(config.vision, config.image_size, (), config.trunk.width, dtype=config.dtype, rngs=rngs)
        super().__init__(config, tower, rngs, word_scale=config.trunk.width**0.5)

    def prepare(self, **inputs: np.ndarray) -> Prompt:
        """input_ids [B, T], attention_mask [B, T], pixel_values [I, 3, height, width] and token_type_ids [B, T] (0: the
        prefix, 1: what follows it), as the processor returns them; without types all is prefix."""
        config = self.config
        tokens, valid = check_tokens(inputs, INPUTS, max(config.vocabulary, config.image_token + 1))
        is_picture = tokens == config.image_token
        types = inputs.get("token_type_ids")
        types = np.zeros_like(tokens) if types is None else np.asarray(types)
        if types.shape != tokens.shape:
            raise UserError(f"token_type_ids is {list(types.shape)} and input_ids {list(tokens.shape)}")
        pixels, size, available = inputs.get("pixel_values"), config.image_size, 0
        if pixels is not None:
            pixels = check_pixels(pixels, (None, 3, size, size), f"[pictures, 3 channels, {size}, {size}]")
            pixels = np.moveaxis(pixels, 1, -1)
            available = len(pixels) * self.vision.tokens
        picture = count_pictures(is_picture, available)
        position = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        return Prompt(np.where(is_picture, 0, tokens), valid, types == 0, position, picture, pixels)

    def see(self, pictures: Float[Array, "I height width 3"]) -> tuple[Float[Array, "S D"], None]:
        tokens = self.vision.read(pictures)
        return tokens.reshape(-1, tokens.shape[-1]), None
