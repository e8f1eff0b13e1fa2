"""What a vision-language model reads, as arrays of fixed shapes, and the checks on what a processor returns.

Axes: B batch, T sequence length, S key length, A axes of positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from vla_jax.errors import UserError
from vla_jax.schema import suggest
from vla_jax.sequence.spans import Layout, Span, sees


class Prompt(NamedTuple):
    """What a VLM reads.

    tokens: ids; what they are at image tokens does not matter. valid: False at padding.
    prefix: tokens that see each other both ways; the others see what comes before them.
    position: for the trunk's rotary embedding.
    picture: which of all pictures' tokens, counted through, stands in this place; -1 where a word stands.
    pictures: what the family's tower reads; None is none.
    """

    tokens: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    prefix: Bool[Array, "B T"]
    position: Int[Array, "B *A T"]
    picture: Int[Array, "B T"]
    pictures: Any = None


def mask_of(prompt: Prompt) -> Bool[Array, "B T S"]:
    """The rule of sight in a prompt whose prefix, different from sample to sample, is one segment seen both ways."""

    line = Layout((Span("token", prompt.tokens.shape[1], segment=0),)).sight

    def one(prefix: Bool[Array, " T"]) -> Bool[Array, "T S"]:
        sight = line._replace(segment=1 - prefix.astype(jnp.int32), bidirectional=prefix)
        return sees(sight, sight)

    return jax.vmap(one)(jnp.asarray(prompt.prefix)) & prompt.valid[:, None]


def check_tokens(inputs: dict[str, Any], known: tuple[str, ...], vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, attention_mask as booleans) of a processor's arrays.

    Raises UserError for an input of another name, ids outside of the vocabulary, and shapes that do not fit.
    """
    for name in inputs:
        if name not in known:
            raise UserError(f"this model takes no input {name!r}{suggest(name, known)}")
    if "input_ids" not in inputs:
        raise UserError("input_ids is missing: give what the checkpoint's processor returns")
    tokens = np.asarray(inputs["input_ids"])
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"input_ids must be integers [batch, length], got {tokens.dtype}{list(tokens.shape)}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocabulary:
        raise UserError(f"input_ids must lie in 0 … {vocabulary - 1}, got {tokens.min()} … {tokens.max()}")
    mask = inputs.get("attention_mask")
    mask = np.ones_like(tokens) if mask is None else np.asarray(mask)
    if mask.shape != tokens.shape:
        raise UserError(f"attention_mask is {list(mask.shape)} and input_ids {list(tokens.shape)}: they must be alike")
    return tokens.astype(np.int32), mask.astype(bool)


def check_pixels(pixels: Any, shape: tuple[int | None, ...], meaning: str) -> np.ndarray:
    """pixel_values as float32. shape: None is any size; meaning: says the shape in words.

    Raises UserError for another type or shape.
    """
    pixels = np.asarray(pixels)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise UserError(f"pixel_values must be floating point, as the image processor scales them; got {pixels.dtype}")
    fits = len(shape) == pixels.ndim and all(a in (None, b) for a, b in zip(shape, pixels.shape, strict=True))
    if not fits:
        raise UserError(f"pixel_values must be {meaning}, got {list(pixels.shape)}")
    return pixels.astype(np.float32)


def count_pictures(is_picture: Bool[np.ndarray, "B T"], available: int) -> Int[np.ndarray, "B T"]:
    """The pictures' tokens numbered through, -1 elsewhere. Raises UserError unless there are as many as places."""
    places = int(is_picture.sum())
    if places != available:
        raise UserError(
            f"the prompts have {places} image tokens and the pictures make {available}: give both of one call"
        )
    return np.where(is_picture, np.cumsum(is_picture.ravel()).reshape(is_picture.shape) - 1, -1).astype(np.int32)
