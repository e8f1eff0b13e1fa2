"""PaliGemma against transformers: whole, and block by block."""

import jax
import numpy as np
import pytest

from vla_jax.errors import UserError
from vla_jax.models.paligemma import PaliGemma

torch = pytest.importorskip("torch")

from tests.parity.tiny import paligemma_inputs  # noqa: E402

ROWS = [([2, 5, 6, 7, 108], [8, 9, 1]), ([2, 5, 108], [9, 10, 11, 12, 13, 1]), ([2, 9, 9, 108], [])]


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("pictures", [0, 1, 2])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["one", "batch"])
def test_logits(paligemma, rows, pictures, left):
    assert paligemma.compare_logits(paligemma_inputs(rows, pictures, left)) < 2e-4


def test_without_types_all_is_prefix(paligemma):
    inputs = paligemma_inputs(ROWS[:1])
    del inputs["token_type_ids"]
    assert paligemma.compare_logits(inputs) < 2e-4


def test_the_prefix_is_seen_both_ways_and_the_suffix_is_not(paligemma):
    inputs = paligemma_inputs(ROWS[:1])
    last_prefix, last = 4 + len(ROWS[0][0]) - 1, inputs["input_ids"].shape[1] - 1
    base = np.asarray(paligemma.ours.logits(**inputs))[0]
    for place, earlier_sees in ((last_prefix, True), (last, False)):
        changed = {**inputs, "input_ids": inputs["input_ids"].copy()}
        changed["input_ids"][0, place] = 77
        moved = np.abs(np.asarray(paligemma.ours.logits(**changed))[0] - base).max(-1) > 1e-5
        assert moved[:place].any() == earlier_sees and moved[place:].all()


def layer_of(stack, index):
    return jax.tree.map(lambda leaf: leaf[index], stack.layers)


def test_vision_block(paligemma):
    x = np.random.default_rng(0).normal(size=(2, 4, 32)).astype(np.float32)
    with torch.no_grad():
        expected = paligemma.theirs.model.vision_tower.encoder.layers[1](torch.tensor(x), None).numpy()
    np.testing.assert_allclose(layer_of(paligemma.ours.vision.blocks, 1)(x, None), expected, atol=2e-4)


def test_vision_tower_and_projector(paligemma):
    pixels = np.random.default_rng(1).normal(size=(2, 3, 28, 28)).astype(np.float32)
    with torch.no_grad():
        expected = paligemma.theirs.model.get_image_features(torch.tensor(pixels)).pooler_output.numpy()
    ours, taps = jax.jit(PaliGemma.see)(paligemma.ours, np.moveaxis(pixels, 1, -1))
    np.testing.assert_allclose(ours, expected.reshape(8, 64), atol=2e-4)
    assert taps is None


def test_decoder_layer(paligemma):
    x = np.random.default_rng(5).normal(size=(2, 7, 64)).astype(np.float32)
    text, trunk = paligemma.theirs.model.language_model, paligemma.ours.trunk
    position = np.broadcast_to(np.arange(7), (2, 7))
    causal = np.tril(np.ones((7, 7), bool))
    with torch.no_grad():
        turned = text.rotary_emb(torch.tensor(x), torch.tensor(position.copy()))
        mask = torch.tensor(np.where(causal, 0.0, -1e30)[None, None]).float()
        expected = text.layers[2](torch.tensor(x), attention_mask=mask, position_embeddings=turned).numpy()
    ours = layer_of(trunk.blocks, 2)(x, causal[None], trunk.rotary(position))
    np.testing.assert_allclose(np.asarray(ours), expected, atol=2e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(pixel_values=np.zeros((1, 3, 28, 28), np.uint8)), "floating point.*uint8"),
        (dict(pixel_values=np.zeros((1, 1, 28, 28), np.float32)), "3 channels"),
        (dict(pixel_values=np.zeros((2, 3, 28, 28), np.float32)), "4 image tokens and the pictures make 8"),
        (dict(token_type_ids=np.zeros((1, 3))), "token_type_ids is"),
    ],
)
def test_wrong_inputs_are_named(paligemma, change, message):
    with pytest.raises(UserError, match=message):
        paligemma.ours.prepare(**{**paligemma_inputs(ROWS[:1]), **change})
