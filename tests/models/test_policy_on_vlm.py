"""The policy with the tower, trunk and words of the released models, at a tiny size."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from vla_jax.errors import UserError
from vla_jax.models.expert import ExpertConfig
from vla_jax.models.normalizer import DataFacts
from vla_jax.models.paligemma import PaliGemma, PaliGemmaConfig
from vla_jax.models.policy import Policy, PolicyConfig
from vla_jax.models.presets import PRESETS, on_vlm
from vla_jax.models.qwen3_vl import Qwen3VL, Qwen3VLConfig, positions
from vla_jax.models.qwen_vision import QwenVisionConfig, cut
from vla_jax.models.trunk import TrunkConfig
from vla_jax.models.vision import VisionConfig, patchify
from vla_jax.nn.flat import flatten, unflatten
from vla_jax.nn.lora import LoraConfig, merge_adapters

FACTS = DataFacts(11, 5, 32, (-1.0,) * 3, (1.0,) * 3, (-1.0,) * 2, (1.0,) * 2)
TRUNK = TrunkConfig(width=16, depth=3, heads=2, kv_heads=1, head_width=8, hidden=24)
VLMS = {
    "qwen": Qwen3VLConfig(
        QwenVisionConfig(patch=4, width=16, depth=3, heads=2, hidden=16, grid=6, taps=(0, 2), scan=False),
        dataclasses.replace(TRUNK, rope_sections=(2, 1, 1)),
        vocabulary=40,
        image_token=30,
        video_token=31,
        vision_start=32,
        vision_end=33,
    ),
    "paligemma": PaliGemmaConfig(
        VisionConfig(patch=8, merge=1, view_embedding=False, width=8, depth=1, heads=2, hidden=16),
        dataclasses.replace(TRUNK, activation="gelu", qk_norm=False, norm_offset=1.0),
        vocabulary=40,
        image_size=32,
        image_token=40,
    ),
}
EXPERT = ExpertConfig(width=16, depth=2, heads=2, hidden=24, head=16, future_tokens=2)
BASE = PolicyConfig(expert=EXPERT, queries=3, chunk=4, views=("front", "wrist"))
TOKENS = np.array([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]], np.int32)
MASK = TOKENS > 0


@functools.cache
def made(name, **changes):
    """(graph, parameters moved away from their first values) of a policy."""
    config = dataclasses.replace(on_vlm(BASE, VLMS[name]), **changes)
    graph = nnx.split(nnx.eval_shape(lambda: Policy(config, FACTS, nnx.Rngs(0))))[0]

    def make():
        state = nnx.split(Policy(config, FACTS, nnx.Rngs(0)))[1]
        keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(state))))
        return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), state)

    return graph, jax.jit(make)()


def run(function, name, *inputs, **changes):
    graph, state = made(name, **changes)

    def call(state, *inputs):
        return function(nnx.merge(graph, state), *inputs)

    return jax.jit(call)(state, *inputs)


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(0)
    return {view: random.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8) for view in ("front", "wrist")}


@pytest.mark.parametrize("name", VLMS)
def test_packed_branches_are_two_separate_passes(name, images):
    def both(policy, images):
        return policy.encode(images, TOKENS, MASK, ("prior", "posterior"))

    def apart(policy, images):
        return {branch: policy.encode(images, TOKENS, MASK, (branch,))[branch] for branch in ("prior", "posterior")}

    packed, separate = run(both, name, images), run(apart, name, images)
    for branch in ("prior", "posterior"):
        np.testing.assert_allclose(packed[branch].hidden, separate[branch].hidden, atol=1e-5)
        np.testing.assert_allclose(
            packed[branch].predictors[MASK], separate[branch].predictors[MASK], atol=1e-5, err_msg=branch
        )
    assert np.abs(packed["prior"].hidden - packed["posterior"].hidden).max() > 1e-3


@pytest.mark.parametrize("name", VLMS)
def test_every_image_token_has_its_place_in_the_picture(name, images):
    """A token is made of the patches of the square about its place, and of no others."""
    vision = nnx.merge(*made(name)).vision
    places, reach = np.asarray(vision.places(images)), vision.reach
    assert places.shape == (2, vision.tokens, 2) and vision.tokens == 2 * (32 // reach) ** 2
    front, wrist = np.split(places[0], 2)
    np.testing.assert_array_equal(front, wrist)
    assert len(np.unique(front, axis=0)) == len(front)
    for number, (column, row) in enumerate(front):
        top, left = int(row - reach / 2), int(column - reach / 2)
        picture = np.zeros((1, 32, 32, 3), np.float32)
        picture[:, top : top + reach, left : left + reach] = 1
        cells = patches_of(name, picture).reshape(len(front), -1)  # the patches of a token follow each other
        assert np.flatnonzero(cells.any(1)).tolist() == [number] and cells[number].all()


def patches_of(name, picture):
    """The patches of a picture, as the tower of that name takes them."""
    vision = VLMS[name].vision
    return np.asarray(cut(picture, vision) if name == "qwen" else patchify(picture, vision.patch))[0]


@pytest.mark.parametrize("name", VLMS)
def test_it_says_the_likeliest_words_after_an_instruction(name, images):
    def reason(policy, images):
        return policy.reason(images, TOKENS, MASK)

    def next_word(policy, images, tokens, mask):
        return policy.word_logits(policy.read(images, tokens, mask)["posterior"].predictors).argmax(-1)

    words, mask = run(reason, name, images, reasoning=2)
    tokens, told = np.pad(TOKENS, ((0, 0), (0, 2))), np.pad(MASK, ((0, 0), (0, 2)))
    for _ in range(2):
        place = told.sum(1)[:, None]
        best = np.asarray(run(next_word, name, images, tokens, told, reasoning=2))
        np.put_along_axis(tokens, place, np.take_along_axis(best, place, 1), 1)
        np.put_along_axis(told, place, True, 1)
    assert (np.asarray(mask) == told).all() and (np.asarray(words)[told] == tokens[told]).all()


def qwen_prompt(config, images):
    """The posterior branch without its queries, as the model's own processor would spell it."""
    picture = [config.vision_start, *[config.image_token] * 16, config.vision_end]
    rows = np.array([[*picture, *picture, *row] for row in TOKENS])
    mask = np.concatenate([np.ones((2, 36), int), MASK], 1)
    pixels = [np.asarray(images[view][row], np.float32) / 127.5 - 1 for row in range(2) for view in images]
    patches = [patch for image in pixels for patch in in_merging_order_by_hand(image)]
    return dict(
        input_ids=rows,
        attention_mask=mask,
        pixel_values=np.array(patches, np.float32),
        image_grid_thw=np.array([[1, 8, 8]] * 4),
    )


def in_merging_order_by_hand(image):
    for block_row in range(4):
        for block_column in range(4):
            for row in range(2):
                for column in range(2):
                    top, left = 8 * block_row + 4 * row, 8 * block_column + 4 * column
                    patch = image[top : top + 4, left : left + 4].transpose(2, 0, 1)
                    yield np.stack([patch, patch], 1).ravel()


def predictors(policy, images):
    return policy.encode(images, TOKENS, MASK)["posterior"].predictors


def same_weights(name, vlm_class):
    """The VLM with the policy's tower, trunk and words."""
    graph, state = nnx.split(nnx.eval_shape(lambda: vlm_class(VLMS[name], nnx.Rngs(0))))
    policy = flatten(made(name)[1])
    return nnx.merge(graph, unflatten({path: policy[path] for path in flatten(state)}))


def test_the_policy_reads_as_qwen_does(images):
    vlm = same_weights("qwen", Qwen3VL)
    prompt = vlm.prepare(**qwen_prompt(vlm.config, images))
    expected = jax.jit(Qwen3VL.hidden)(vlm, prompt)[:, 35:-1]
    actual = run(predictors, "qwen", images)
    np.testing.assert_allclose(actual[MASK], expected[MASK], atol=1e-4)


def test_the_policy_reads_as_paligemma_does(images):
    vlm = same_weights("paligemma", PaliGemma)
    rows = np.array([[*[40] * 32, 2, *row] for row in TOKENS])
    pixels = np.stack([images[view][row] for row in range(2) for view in images]).transpose(0, 3, 1, 2)
    types = np.concatenate([np.zeros((2, 33), int), np.ones_like(TOKENS)], 1)
    mask = np.concatenate([np.ones((2, 33), int), MASK], 1)
    inputs = dict(input_ids=rows, attention_mask=mask, token_type_ids=types)
    prompt = vlm.prepare(**inputs, pixel_values=pixels.astype(np.float32) / 127.5 - 1)
    expected = jax.jit(PaliGemma.hidden)(vlm, prompt)[:, 32:-1]
    np.testing.assert_allclose(run(predictors, "paligemma", images)[MASK], expected[MASK], atol=1e-4)


def test_places_are_those_of_the_model():
    policy = nnx.merge(*made("qwen"))
    places = policy.layout(5, ("prior", "posterior")).places
    picture = [True] * 16
    is_picture = np.array([[False, *picture, False, False, *picture, False, *[False] * 8]])
    expected = positions(is_picture, np.ones_like(is_picture), [(8, 8), (8, 8)], 2)[0]
    prefix, branch = np.arange(36), np.arange(36, 44)
    for ordering in (branch, branch + 8):  # prior: queries, then words; posterior: words, then queries
        np.testing.assert_array_equal(places[:, np.concatenate([prefix, ordering])], expected)


def test_merged_adapters_are_the_same_policy(images):
    def apart_and_merged(policy, images):
        before = predictors(policy, images)
        merge_adapters(policy)
        return before, predictors(policy, images)

    before, after = run(apart_and_merged, "qwen", images, lora=LoraConfig(rank=2))
    np.testing.assert_allclose(before, after, atol=1e-4)


@pytest.mark.parametrize(
    "preset, billions", [("qwen3_vl_2b", 2.13), ("qwen3_vl_4b", 4.44), ("qwen3_vl_8b", 8.77), ("paligemma_3b", 2.92)]
)
def test_presets_have_the_size_of_the_released_models(preset, billions):
    config = PRESETS[preset]
    model = PaliGemma if isinstance(config, PaliGemmaConfig) else Qwen3VL
    shapes = flatten(nnx.split(nnx.eval_shape(lambda: model(config, nnx.Rngs(0))))[1])
    assert abs(sum(leaf.size for leaf in shapes.values()) / 1e9 - billions) < 0.01


def test_impossible_settings_are_named():
    config = on_vlm(BASE, VLMS["qwen"])
    for changes, message in (
        (dict(brackets=(1, 2, 3)), "two word ids or none"),
        (dict(qwen_vision=dataclasses.replace(config.qwen_vision, patch=5)), "32 is not a multiple of qwen_vision"),
        (dict(qwen_vision=dataclasses.replace(config.qwen_vision, heads=3)), "four times vision.heads = 3"),
        (dict(qwen_vision=dataclasses.replace(config.qwen_vision, taps=(3,))), "vision.taps"),
        (dict(trunk=dataclasses.replace(config.trunk, rope_sections=(1, 1, 1))), "rope_sections"),
        (dict(trunk=dataclasses.replace(config.trunk, activation="relu")), "silu, gelu, got 'relu'"),
    ):
        with pytest.raises(UserError, match=message):
            nnx.eval_shape(lambda: Policy(dataclasses.replace(config, **changes), FACTS, nnx.Rngs(0)))  # noqa: B023
