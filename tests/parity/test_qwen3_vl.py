"""Qwen3-VL against transformers: whole, and block by block, so that a break names its place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.errors import UserError
from vla_jax.models.qwen_vision import QwenVision, lay_out
from vla_jax.models.trunk import tap
from vla_jax.nn.rotary import plane_rotation

torch = pytest.importorskip("torch")

from tests.parity.tiny import IMAGE, qwen_inputs  # noqa: E402

WORDS, MORE = [5, 6, 7, 8, 9], [10, 11]
PROMPTS = {
    "text only": [WORDS],
    "one picture": [[5, (4, 6), 7, 8]],
    "several pictures of different sizes": [[5, (4, 6), 7, (2, 4), (6, 2), 8]],
    "a batch of all of these": [WORDS + MORE, [5, (4, 6), 7], [(2, 2), 9, (4, 4), 6, 5]],
}


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_logits(qwen, kind, left):
    assert qwen.compare_logits(qwen_inputs(PROMPTS[kind], left)) < 2e-4


def test_padding_changes_nothing(qwen):
    short, long = [5, (4, 6), 7], [*WORDS, *MORE, *WORDS, *MORE]
    alone = np.asarray(qwen.ours.logits(**qwen_inputs([short])))[0]
    for left in (True, False):
        batch = qwen_inputs([short, long], left)
        together = np.asarray(qwen.ours.logits(**batch))[0][batch["attention_mask"][0].astype(bool)]
        np.testing.assert_allclose(together, alone, atol=1e-4)


@pytest.fixture(scope="module")
def grid():
    return [(4, 6), (2, 4)]


@pytest.fixture(scope="module")
def patches(grid):
    total = sum(rows * columns for rows, columns in grid)
    return np.random.default_rng(1).normal(size=(total, 384)).astype(np.float32)


def thw(grid):
    return torch.tensor([(1, *size) for size in grid])


def layer_of(stack, index):
    return jax.tree.map(lambda leaf: leaf[index], stack.layers)


def unpadded(rows, sizes):
    return np.concatenate([np.asarray(row)[:size] for row, size in zip(rows, sizes, strict=True)])


def test_interpolated_positions(qwen, grid):
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    index, weight = get_vision_interpolation_indices_and_weights(thw(grid), 8, "bilinear", True, 2)
    expected = (qwen.theirs.model.visual.pos_embed(index) * weight[..., None]).sum(1).detach().numpy()
    pictures = lay_out(qwen.ours.config.vision, np.zeros((32, 384), np.float32), grid)
    table = np.asarray(qwen.ours.vision.position[...])
    ours = np.einsum("ipcd,ipc->ipd", table[pictures.corner], pictures.weight)
    np.testing.assert_allclose(unpadded(ours, (24, 8)), expected, atol=1e-5)


def test_vision_block(qwen, grid):
    theirs, ours = qwen.theirs.model.visual, qwen.ours.vision
    x = np.random.default_rng(2).normal(size=(1, 24, 32)).astype(np.float32)
    pictures = lay_out(ours.config, np.zeros((24, 384), np.float32), grid[:1])
    rotary = plane_rotation(pictures.place, 8)
    place = torch.tensor(pictures.place[0].T.copy())
    turned = theirs.rotary_pos_emb(torch.tensor(x[0]), place)
    np.testing.assert_allclose(np.asarray(rotary.cos)[0], turned[0].numpy()[:, :4], atol=1e-5)
    with torch.no_grad():
        expected = theirs.blocks[1](torch.tensor(x[0]), torch.tensor([0, 24]), position_embeddings=turned).numpy()
    block = layer_of(ours.blocks, 1)
    np.testing.assert_allclose(np.asarray(block(x, None, None, rotary))[0], expected, atol=2e-4)


def test_patch_mergers(qwen):
    theirs, ours = qwen.theirs.model.visual, qwen.ours.vision
    x = np.random.default_rng(3).normal(size=(1, 24, 32)).astype(np.float32)
    with torch.no_grad():
        merged = theirs.merger(torch.tensor(x[0])).numpy()
        tapped = theirs.deepstack_merger_list[1](torch.tensor(x[0])).numpy()
    np.testing.assert_allclose(np.asarray(ours.merger(x))[0], merged, atol=2e-4)
    np.testing.assert_allclose(np.asarray(layer_of(ours.tap_mergers, 1)(x))[0], tapped, atol=2e-4)


def test_vision_tower(qwen, grid, patches):
    with torch.no_grad():
        expected = qwen.theirs.model.visual(torch.tensor(patches), thw(grid))
    tokens, taps = jax.jit(QwenVision.__call__)(qwen.ours.vision, lay_out(qwen.ours.config.vision, patches, grid))
    np.testing.assert_allclose(unpadded(tokens, (6, 2)), expected.pooler_output.numpy(), atol=2e-4)
    for mine, feature in zip(taps, expected.deepstack_features, strict=True):
        np.testing.assert_allclose(unpadded(mine, (6, 2)), feature.numpy(), atol=2e-4)


def test_deepstack_injection(qwen):
    random = np.random.default_rng(4)
    hidden, features = random.normal(size=(2, 5, 8)), random.normal(size=(3, 4, 8))
    here = np.array([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]], bool)
    taps = np.zeros((3, 2, 5, 8))
    taps[:, here] = features
    for layer in range(5):
        expected = torch.tensor(hidden)
        if layer < 3:
            process = qwen.theirs.model.language_model._deepstack_process
            expected = process(expected, torch.tensor(here), torch.tensor(features[layer]))
        mine = tap(jnp.asarray(hidden), jnp.int32(layer), jnp.asarray(taps))
        np.testing.assert_allclose(mine, expected.numpy(), atol=1e-5)


def test_positions_in_time_height_and_width(qwen):
    inputs = qwen_inputs(PROMPTS["a batch of all of these"])
    given = {name: torch.tensor(value) for name, value in inputs.items() if name != "pixel_values"}
    expected, _ = qwen.theirs.model.get_rope_index(**given)
    prompt = qwen.ours.prepare(**inputs)
    real = inputs["attention_mask"].astype(bool)
    ours = prompt.position.swapaxes(0, 1)
    np.testing.assert_array_equal(ours[:, real], expected.numpy()[:, real])
    rotary = qwen.ours.trunk.rotary(prompt.position)
    cos, sin = qwen.theirs.model.language_model.rotary_emb(torch.zeros(()), torch.tensor(ours))
    np.testing.assert_allclose(np.asarray(rotary.cos), cos.numpy()[..., :8], atol=1e-5)
    np.testing.assert_allclose(np.asarray(rotary.sin), sin.numpy()[..., :8], atol=1e-5)


def test_decoder_layer(qwen):
    x = np.random.default_rng(5).normal(size=(2, 7, 64)).astype(np.float32)
    position = np.broadcast_to(np.random.default_rng(6).integers(0, 9, (2, 3, 7)), (2, 3, 7))
    text, trunk = qwen.theirs.model.language_model, qwen.ours.trunk
    causal = np.tril(np.ones((7, 7), bool))
    with torch.no_grad():
        turned = text.rotary_emb(torch.tensor(x), torch.tensor(position.swapaxes(0, 1).copy()))
        mask = torch.tensor(np.where(causal, 0.0, -1e30)[None, None]).float()
        expected = text.layers[2](torch.tensor(x), attention_mask=mask, position_embeddings=turned).numpy()
    ours = layer_of(trunk.blocks, 2)(x, causal[None], trunk.rotary(position))
    np.testing.assert_allclose(np.asarray(ours), expected, atol=2e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(pixel_values=np.zeros((24, 384), np.uint8)), "floating point.*uint8"),
        (dict(pixel_values=np.zeros((24, 128), np.float32)), r"\[24 patches, 384 numbers\], got \[24, 128\]"),
        (dict(image_grid_thw=np.array([[1, 4, 4]])), "6 image tokens and the pictures make 4"),
        (dict(image_grid_thw=np.array([[1, 3, 8]])), "multiples of 2"),
        (dict(pixel_value=np.zeros(3)), "no input 'pixel_value': did you mean 'pixel_values'"),
        (dict(input_ids=np.full((1, 11), 320)), "0 … 319"),
        (dict(attention_mask=np.ones((1, 3))), "attention_mask is"),
    ],
)
def test_wrong_inputs_are_named(qwen, change, message):
    inputs = {**qwen_inputs([[5, (4, 6), 7, 8]]), **change}
    assert (inputs["input_ids"] == IMAGE).sum() in (0, 6)
    with pytest.raises(UserError, match=message):
        qwen.ours.prepare(**inputs)
