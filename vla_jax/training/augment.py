"""Random crops and colours of the training pictures, on the device and inside the compiled step.

The key of a step is a function of the run's seed and the step's number, so a resumed run sees the same pictures again.
Validation and evaluation see pictures as they are.

Axis legend: B batch, H height, W width.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from vla_jax.errors import UserError

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
STREAM = 7  # of the step's key; the losses draw from the key itself


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How much pictures change. The defaults change nothing.

    Attributes:
        crop: side of the random crop as a share of the picture's, stretched back to its size; 1 keeps the picture.
        brightness, contrast, saturation: each is multiplied by a factor between 1 - x and 1 + x.
    """

    crop: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self):
        if not 0.1 <= self.crop <= 1:
            raise UserError(f"augment.crop is {self.crop}: it must be between 0.1 and 1")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"augment.{name} is {getattr(self, name)}: it must be at least 0 and below 1")


def augmented(objective: Callable, config: AugmentConfig) -> Callable:
    """The objective (`training.step.Objective`) on changed pictures; itself where nothing is to change."""
    if config == AugmentConfig():
        return objective

    def changed(module, batch, key, own):
        rows = batch.get("row")
        images = augment(batch["images"], jax.random.fold_in(key, STREAM), config, rows)
        return objective(module, {**batch, "images": images}, key, own)

    return changed


def augment(
    images: Mapping[str, UInt8[Array, "B H W 3"]],
    key: Array,
    config: AugmentConfig,
    rows: Int[Array, " B"] | None = None,
) -> dict[str, UInt8[Array, "B H W 3"]]:
    """Changed pictures; each sample and each view has its own crop and colours.

    rows: places of the samples in a larger batch of which this is a part, so that cutting a batch changes nothing.
    """
    rows = jnp.arange(len(next(iter(images.values())))) if rows is None else rows
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    change = jax.vmap(
        lambda picture, key, number: _change(picture, jax.random.fold_in(key, number), config), (0, 0, None)
    )
    return {view: change(pictures, keys, number) for number, (view, pictures) in enumerate(sorted(images.items()))}


def _change(picture: UInt8[Array, "H W 3"], key: Array, config: AugmentConfig) -> UInt8[Array, "H W 3"]:
    crop_key, *colour_keys = jax.random.split(key, 4)
    changed = picture.astype(jnp.float32)
    if config.crop < 1:
        changed = _crop(changed, crop_key, config.crop)
    for name, colour_key in zip(("brightness", "contrast", "saturation"), colour_keys, strict=True):
        if spread := getattr(config, name):
            factor = jax.random.uniform(colour_key, minval=1 - spread, maxval=1 + spread)
            changed = _towards(_anchor(changed, name), changed, factor)
    return jnp.round(changed).astype(jnp.uint8)


def _crop(picture: Float[Array, "H W 3"], key: Array, share: float) -> Float[Array, "H W 3"]:
    size = jnp.array(picture.shape[:2], jnp.float32)
    corner = jax.random.uniform(key, (2,)) * (1 - share) * size
    scale = jnp.full(2, 1 / share)
    out = jax.image.scale_and_translate(picture, picture.shape, (0, 1), scale, -corner / share, "linear")
    return jnp.clip(out, 0, 255)


def _anchor(picture: Float[Array, "H W 3"], name: str) -> Float[Array, "h w c"]:
    """What a factor of 0 leaves: black, the mean grey, or the picture without colour."""
    grey = (picture * jnp.array(LUMA)).sum(axis=-1, keepdims=True)
    return {"brightness": 0 * grey, "contrast": grey.mean(axis=(0, 1), keepdims=True), "saturation": grey}[name]


def _towards(anchor: Array, picture: Float[Array, "H W 3"], factor: Array) -> Float[Array, "H W 3"]:
    return jnp.clip(anchor + factor * (picture - anchor), 0, 255)
