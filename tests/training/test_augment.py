"""Changed pictures: what changes, by how much, and that it depends on the step alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.errors import UserError
from vla_jax.training import augment as module
from vla_jax.training.augment import AugmentConfig, augmented

augment = jax.jit(module.augment, static_argnums=2)
KEY = jax.random.key(3)
RANDOM = np.random.default_rng(0)
COARSE = RANDOM.integers(60, 200, (4, 4, 4, 3), dtype=np.uint8)
PICTURES = jnp.asarray(COARSE.repeat(6, axis=1).repeat(8, axis=2))  # 24 x 32 pixels, far from black and white


def changed(**settings):
    return np.asarray(augment({"front": PICTURES}, KEY, AugmentConfig(**settings))["front"]).astype(float)


def test_brightness_is_one_factor_a_sample():
    ratio = changed(brightness=0.2) / np.asarray(PICTURES)
    factors = ratio.mean(axis=(1, 2, 3))
    assert np.ptp(ratio, axis=(1, 2, 3)).max() < 0.02  # rounding
    assert (np.abs(factors - 1) < 0.2).all() and np.ptp(factors) > 0.02


def test_contrast_keeps_the_mean_grey_and_saturation_the_grey():
    luma = np.array([0.299, 0.587, 0.114])
    grey = np.asarray(PICTURES) @ luma
    np.testing.assert_allclose((changed(contrast=0.2) @ luma).mean((1, 2)), grey.mean((1, 2)), atol=1)
    assert np.abs(changed(contrast=0.2) @ luma - grey).max() > 2
    np.testing.assert_allclose(changed(saturation=0.2) @ luma, grey, atol=1)
    assert np.abs(changed(saturation=0.2) - np.asarray(PICTURES)).max() > 2


def test_crop_is_a_window_of_the_picture():
    """On a ramp, the crop's slope is the share and its start the corner."""
    ramp = jnp.broadcast_to(4.0 * jnp.arange(32)[None, None, :, None], (8, 24, 32, 3)).astype(jnp.uint8)
    out = np.asarray(augment({"front": ramp}, KEY, AugmentConfig(crop=0.75))["front"]).astype(float)
    slopes = (out[:, 12, 28, 0] - out[:, 12, 4, 0]) / 24
    np.testing.assert_allclose(slopes, 4 * 0.75, atol=0.1)
    corners = out[:, 12, 4, 0] / 4 - 4.5 * 0.75
    assert corners.min() > -0.8 and corners.max() < 32 * 0.25 and np.ptp(corners) > 2


def test_views_and_samples_differ():
    same = jnp.broadcast_to(PICTURES[:1], PICTURES.shape)
    out = augment({"front": same, "wrist": same}, KEY, AugmentConfig(brightness=0.3))
    assert len({float(picture.mean()) for view in out.values() for picture in view}) == 8


def test_the_step_alone_decides():
    config = AugmentConfig(crop=0.9, brightness=0.1, contrast=0.1, saturation=0.1)
    keys = [jax.random.fold_in(KEY, step) for step in (5, 5, 6)]
    one, again, other = (np.asarray(augment({"front": PICTURES}, key, config)["front"]) for key in keys)
    np.testing.assert_array_equal(one, again)
    assert (one != other).any() and one.dtype == np.uint8 and one.shape == PICTURES.shape


def test_only_pictures_change_and_nothing_without_settings():
    def objective(module, batch, key, own):
        return batch, key, own

    assert augmented(objective, AugmentConfig()) is objective
    batch = {"images": {"front": PICTURES}, "state": "untouched"}
    out, key, own = augmented(objective, AugmentConfig(brightness=0.5))(None, batch, KEY, "own")
    assert out["state"] == "untouched" and key is KEY and own == "own"
    assert (out["images"]["front"] != PICTURES).any() and batch["images"]["front"] is PICTURES


@pytest.mark.parametrize("setting", [{"crop": 0.0}, {"crop": 1.1}, {"contrast": 1.0}, {"saturation": -0.1}])
def test_wrong_setting_is_named(setting):
    with pytest.raises(UserError, match=f"augment.{next(iter(setting))}"):
        dataclasses.replace(AugmentConfig(), **setting)
