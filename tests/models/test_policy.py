"""The policy and its parts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.calling import call
from vla_jax.errors import UserError
from vla_jax.models.expert import ExpertConfig
from vla_jax.models.keypoints import KeypointConfig, KeypointEncoder, grid
from vla_jax.models.normalizer import DataFacts, Normalizer
from vla_jax.models.policy import Policy, PolicyConfig
from vla_jax.models.trunk import TrunkConfig
from vla_jax.models.vision import VisionConfig, merge_patches, patchify
from vla_jax.models.words import Words

FACTS = DataFacts(
    vocabulary=11,
    max_tokens=6,
    image_size=16,
    action_low=(-0.1, -0.2, 0.0),
    action_high=(0.1, 0.3, 0.5),
    state_low=(-1.0, 0.0),
    state_high=(1.0, 4.0),
)
VISION = VisionConfig(patch=4, merge=2, width=8, depth=1, heads=2, hidden=16)
TRUNK = TrunkConfig(width=16, depth=2, heads=2, kv_heads=1, head_width=8, hidden=24)
EXPERT = ExpertConfig(width=16, depth=2, heads=2, hidden=24, head=16, future_tokens=2)
CONFIG = PolicyConfig(vision=VISION, trunk=TRUNK, expert=EXPERT, queries=3, chunk=4)
KEY = jax.random.key(0)


@functools.cache
def parameters():
    return jax.jit(lambda: nnx.split(Policy(CONFIG, FACTS, nnx.Rngs(0)))[1])()


def make_policy(**changes):
    """A policy of another configuration whose parameters have the same shapes, with the same parameters."""
    policy = nnx.eval_shape(lambda: Policy(dataclasses.replace(CONFIG, **changes), FACTS, nnx.Rngs(0)))
    state = parameters()
    if policy.queries is None:
        state = nnx.State({name: part for name, part in state.items() if name != "queries"})
    return nnx.merge(nnx.split(policy)[0], state)


@pytest.fixture(scope="module", params=["queries", "tokens"])
def policy(request):
    return make_policy(conditioning=request.param)


@pytest.fixture(scope="module")
def observation():
    random = np.random.default_rng(0)
    return {
        "images": {view: random.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8) for view in ("front", "wrist")},
        "state": random.uniform(-1, 1, (3, 2)).astype(np.float32),
    }


TOKENS = np.array([[3, 4, 0, 0], [5, 6, 7, 0], [8, 9, 10, 1]], np.int32)


def act(policy, observation, tokens, mask, key=KEY):
    return np.asarray(call(policy, Policy.act, observation, tokens, mask, key))


def encode(policy, images, tokens):
    return policy.encode(images, tokens, tokens > 0)["posterior"]


def see(policy, images):
    return policy.vision(images)


def test_actions_are_in_si_units(policy, observation):
    actions = act(policy, observation, TOKENS, TOKENS > 0)
    assert actions.shape == (3, 4, 3) and actions.dtype == np.float32
    noise = jax.random.normal(KEY, actions.shape)

    def inside(policy, observation, tokens):
        reading = policy.encode(observation["images"], tokens, tokens > 0)["posterior"]
        return policy.sample(policy.condition(reading, observation["state"]), noise)

    low, high = np.array(FACTS.action_low), np.array(FACTS.action_high)
    expected = (np.asarray(call(policy, inside, observation, TOKENS)) + 1) / 2 * (high - low) + low
    np.testing.assert_allclose(actions, expected, atol=1e-5)


def test_actions_depend_on_everything_they_should(policy, observation):
    base = act(policy, observation, TOKENS, TOKENS > 0)
    other = {**observation, "state": observation["state"] + 0.5}
    dark = {**observation, "images": {**observation["images"], "wrist": 0 * observation["images"]["wrist"]}}
    swapped = np.where(TOKENS == 4, 5, TOKENS)
    assert np.abs(act(policy, other, TOKENS, TOKENS > 0) - base).max() > 1e-4
    assert np.abs(act(policy, dark, TOKENS, TOKENS > 0) - base).max() > 1e-4
    assert np.abs(act(policy, observation, swapped, TOKENS > 0) - base)[0].max() > 1e-6
    np.testing.assert_allclose(act(policy, observation, swapped, TOKENS > 0)[1:], base[1:], atol=1e-6)
    assert np.abs(act(policy, observation, TOKENS, TOKENS > 0, jax.random.key(1)) - base).max() > 1e-3


def act_guided(policy, observation, tokens, guidance, key):
    return policy.act(observation, tokens, tokens > 0, key, guidance=guidance)


def test_guidance_goes_from_the_prior_through_the_posterior_and_beyond(observation):
    policy = make_policy()

    def guided(weight, tokens=TOKENS):
        return np.asarray(call(policy, act_guided, observation, tokens, np.float32(weight), KEY))

    np.testing.assert_allclose(guided(1.0), act(policy, observation, TOKENS, TOKENS > 0), atol=1e-5)
    other_words = np.where(TOKENS == 4, 5, TOKENS)
    np.testing.assert_allclose(guided(0.0), guided(0.0, other_words), atol=1e-6)
    assert np.abs(guided(0.0) - guided(1.0)).max() > 1e-6
    assert np.abs(guided(3.0) - guided(3.0, other_words)).max() > np.abs(guided(1.0) - guided(1.0, other_words)).max()
    with pytest.raises(UserError, match="no prior branch"):
        make_policy(conditioning="tokens").act(observation, TOKENS, TOKENS > 0, KEY, guidance=2.0)


def test_padding_changes_no_action(policy, observation):
    base = act(policy, observation, TOKENS, TOKENS > 0)
    rubbish = np.where(TOKENS > 0, TOKENS, 7)
    longer = np.pad(rubbish, ((0, 0), (0, 2)), constant_values=9)
    np.testing.assert_allclose(act(policy, observation, rubbish, TOKENS > 0), base, atol=1e-5)
    np.testing.assert_allclose(act(policy, observation, longer, np.pad(TOKENS > 0, ((0, 0), (0, 2)))), base, atol=1e-5)


def test_an_empty_instruction_gives_finite_actions(policy, observation):
    assert np.isfinite(act(policy, observation, TOKENS, np.zeros_like(TOKENS, bool))).all()


def test_the_expert_sees_the_latent_queries_and_nothing_else(observation):
    policy = make_policy()
    reading = call(policy, encode, observation["images"], TOKENS)
    assert reading.hidden.shape == (3, CONFIG.queries, 16) and reading.valid is None
    baseline = make_policy(conditioning="tokens")
    reading = call(baseline, encode, observation["images"], TOKENS)
    assert reading.hidden.shape == (3, 8 + 4, 16)
    assert (np.asarray(reading.valid) == np.concatenate([np.ones((3, 8), bool), TOKENS > 0], 1)).all()


def reason(policy, images, tokens):
    return policy.reason(images, tokens, tokens > 0)


def next_words(policy, images, tokens):
    predictors = policy.read(images, tokens, tokens > 0)["posterior"].predictors
    return policy.word_logits(predictors).argmax(-1)


def taught_to_act(policy, images, tokens):
    """The gradient of some function of what conditions the actions."""
    graph, parameters, rest = nnx.split(policy, nnx.Param, ...)

    def total(parameters):
        return encode(nnx.merge(graph, parameters, rest), images, tokens).hidden.sum()

    return jax.grad(total)(parameters)


@pytest.mark.parametrize("conditioning", ["queries", "tokens"])
def test_a_policy_reads_on_from_its_own_words(observation, conditioning):
    """Two words, each the likeliest after those before it, behind an instruction of any length."""
    policy, images = make_policy(conditioning=conditioning, reasoning=2), observation["images"]
    words, mask = (np.asarray(part) for part in call(policy, reason, images, TOKENS))
    expected = np.pad(TOKENS, ((0, 0), (0, 2)))
    for _ in range(2):
        places = (expected > 0).sum(1)[:, None]
        said = np.take_along_axis(np.asarray(call(policy, next_words, images, expected)), places, 1)
        assert said.all()  # a word that is padding could not be told from none
        np.put_along_axis(expected, places, said, 1)
    assert (words == expected).all() and (mask == (expected > 0)).all()
    silent = make_policy(conditioning=conditioning)
    reading, as_told = call(policy, encode, images, TOKENS), call(silent, encode, images, words)
    # Queries stand further along the line where there is room for words.
    if conditioning == "tokens":
        np.testing.assert_allclose(reading.hidden, as_told.hidden, atol=1e-5)
    assert reading.predictors.shape == (3, TOKENS.shape[1], 16)
    np.testing.assert_allclose(reading.predictors[2], as_told.predictors[2, :4], atol=1e-5)
    act_words = act(policy, observation, TOKENS, TOKENS > 0)
    assert np.abs(act_words - act(silent, observation, TOKENS, TOKENS > 0)).max() > 1e-5


def test_the_expert_can_see_the_policys_own_words_alone(observation):
    policy, images = make_policy(conditioning="reasoning", reasoning=2), observation["images"]
    reading, (words, _) = call(policy, encode, images, TOKENS), call(policy, reason, images, TOKENS)
    said = np.stack([row[count : count + 2] for row, count in zip(words, (TOKENS > 0).sum(1), strict=True)])
    # Nothing of the picture or of the instruction is left but the two words.
    np.testing.assert_array_equal(reading.hidden, policy.embed_words(said))
    assert reading.hidden.shape == (3, 2, 16) and reading.valid is None
    assert np.isfinite(act(policy, observation, TOKENS, np.zeros_like(TOKENS, bool))).all()
    with pytest.raises(UserError, match="reasoning is 0 with conditioning = 'reasoning'"):
        make_policy(conditioning="reasoning")


def test_what_a_policy_says_to_itself_is_not_learned_from_actions(observation):
    policy = make_policy(conditioning="tokens", reasoning=2)
    learned = call(policy, taught_to_act, observation["images"], TOKENS)
    words, _ = call(policy, reason, observation["images"], TOKENS)
    told = call(make_policy(conditioning="tokens"), taught_to_act, observation["images"], np.asarray(words))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), learned, told)
    with pytest.raises(UserError, match="reasoning is -1"):
        make_policy(reasoning=-1)


def test_scan_remat_and_the_unrolled_loop_agree(observation):
    looped = [dataclasses.replace(part, scan=True, remat="all") for part in (VISION, TRUNK, EXPERT)]
    policy = make_policy(vision=looped[0], trunk=looped[1], expert=looped[2])
    np.testing.assert_allclose(
        act(policy, observation, TOKENS, TOKENS > 0), act(make_policy(), observation, TOKENS, TOKENS > 0), atol=1e-4
    )


def test_half_precision_computes_near_full_precision(observation):
    policy = make_policy(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(policy))} == {jnp.dtype("float32")}
    actions = act(policy, observation, TOKENS, TOKENS > 0)
    assert actions.dtype == np.float32
    np.testing.assert_allclose(actions, act(make_policy(), observation, TOKENS, TOKENS > 0), atol=0.1)


def test_gradients_of_a_frequent_word_add_up_in_full_precision():
    """4096 times 1.01: in bfloat16 a sum stops to grow at 256 times the summand."""
    words = Words(3, 2, tied=True, scale=1.0, dtype="bfloat16", rngs=nnx.Rngs(0))
    graph, state = nnx.split(words)

    def total(state):
        embedded = nnx.merge(graph, state).embed_words(jnp.ones(4096, int))
        assert embedded.dtype == jnp.bfloat16
        return 1.01 * embedded.astype(jnp.float32).sum()

    gradient = jax.grad(total)(state)["words"][...]
    np.testing.assert_allclose(gradient, [[0, 0], [4096 * 1.01] * 2, [0, 0]], rtol=0.01)


def test_bounds_are_not_trained():
    graph, parameters, rest = nnx.split(make_policy(), nnx.Param, ...)
    assert set(rest.keys()) == {"normalizer"} and "normalizer" not in parameters


def test_patches_are_cut_in_raster_order():
    image = np.arange(4 * 4 * 3).reshape(1, 4, 4, 3).astype(np.uint8)
    patches = np.asarray(patchify(image, 2))
    assert patches.shape == (1, 4, 12)
    assert (patches[0, 1] == image[0, :2, 2:].reshape(-1)).all()
    assert (patches[0, 2] == image[0, 2:, :2].reshape(-1)).all()
    grid = np.arange(16.0).reshape(1, 16, 1)
    merged = np.asarray(merge_patches(grid, 2))[0]
    assert (merged == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]).all()


def test_views_are_told_apart(observation):
    policy = make_policy()
    image = observation["images"]["front"]
    tokens = np.asarray(call(policy, see, {"front": image, "wrist": image}))
    assert tokens.shape == (3, 8, 16) and np.abs(tokens[:, :4] - tokens[:, 4:]).max() > 1e-3
    swapped = {"front": observation["images"]["wrist"], "wrist": image}
    changed = np.asarray(call(policy, see, swapped))
    np.testing.assert_allclose(changed[:, 4:], tokens[:, 4:], atol=1e-5)


def keypoint_encoder(patch=2):
    config = KeypointConfig(points=3, patch=patch, hidden=5)
    return KeypointEncoder(config, 16, ("front", "wrist"), 12, dtype="float32", rngs=nnx.Rngs(0))


def test_a_keypoint_is_where_its_map_is_bright():
    encoder = keypoint_encoder()
    encoder.patch.kernel[...] = jnp.full((12, 5), 0.3)
    encoder.patch.bias[...] = jnp.full(5, 2.0)
    kernel = np.zeros((3, 3, 5, 3), np.float32)
    kernel[1, 1] = [4.0, -4.0, 0.0]  # the first map likes bright patches, the second dark ones, the third does not care
    encoder.maps.kernel[...] = kernel
    image = np.zeros((1, 16, 16, 3), np.uint8)
    image[0, 4:6, 10:12] = 255  # row 2, column 5 of 8 x 8 patches
    place = np.asarray(call(encoder, KeypointEncoder.locate, image))[0]
    np.testing.assert_allclose(place[0, :2], grid(8)[2 * 8 + 5], atol=1e-4)
    np.testing.assert_allclose(place[2, :2], 0.0, atol=1e-5)
    assert abs(place[0, 2] - 4.0 * 5 * (2.0 + 0.3 * 12)) < 1e-2 and place[2, 2] == 0
    np.testing.assert_allclose(grid(64).std(0), 1.0, atol=0.02)


def test_keypoints_move_with_the_picture():
    encoder = keypoint_encoder()
    encoder.maps.kernel[...] *= 1000.0  # so sharp that the brightest pixel of a map is its keypoint
    image = np.zeros((2, 16, 16, 3), np.uint8)
    image[0, 4:10, 4:10] = image[1, 6:12, 8:14] = np.random.default_rng(0).integers(0, 256, (6, 6, 3))
    first, second = np.asarray(call(encoder, KeypointEncoder.locate, image))
    on_object = first[:, 2] > np.asarray(call(encoder, KeypointEncoder.locate, 0 * image[:1]))[0, :, 2] + 1.0
    assert on_object.any()
    step = 2 * 3**0.5 / 7
    np.testing.assert_allclose((second - first)[on_object, :2], [[2 * step, step]] * on_object.sum(), atol=2e-3)


def test_keypoint_tokens_tell_views_and_points_apart(observation):
    encoder, image = keypoint_encoder(), observation["images"]["front"]
    tokens = np.asarray(call(encoder, KeypointEncoder.__call__, {"front": image, "wrist": image}))
    assert tokens.shape == (3, encoder.tokens, 12) == (3, 6, 12)
    assert np.abs(tokens[:, :3] - tokens[:, 3:]).max() > 0.1
    other = {"front": observation["images"]["wrist"], "wrist": image}
    changed = np.abs(np.asarray(call(encoder, KeypointEncoder.__call__, other)) - tokens).max((0, 2))
    assert (changed[:3] > 1e-3).all() and (changed[3:] < 1e-6).all()


def test_units_are_inverted_exactly():
    normalizer = Normalizer(FACTS)
    action = np.array([[0.1, -0.2, 0.25]], np.float32)
    np.testing.assert_allclose(normalizer.normalize_action(action), [[1, -1, 0]], atol=1e-6)
    np.testing.assert_allclose(normalizer.denormalize_action(normalizer.normalize_action(action)), action, atol=1e-7)
    np.testing.assert_allclose(normalizer.normalize_state(np.array([0.0, 4.0])), [0, 1], atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(conditioning="everything"), "one of queries, tokens, reasoning"),
        (dict(encoder="vitt"), "one of vit, keypoints, qwen3_vl, got 'vitt'"),
        (dict(encoder="keypoints", keypoints=KeypointConfig(patch=5)), "16 is not a multiple of keypoints.patch = 5"),
        (dict(queries=0), "at least one latent query"),
        (
            dict(vision=dataclasses.replace(VISION, patch=5)),
            "16 is not a multiple of vision.patch x vision.merge = 5 x 2",
        ),
        (dict(vision=dataclasses.replace(VISION, heads=3)), "vision.heads = 3"),
        (dict(trunk=dataclasses.replace(TRUNK, kv_heads=3)), "trunk.kv_heads = 3"),
        (dict(trunk=dataclasses.replace(TRUNK, head_width=7)), "even"),
        (dict(expert=dataclasses.replace(EXPERT, depth=3)), "expert.depth = 3 must be even"),
        (dict(expert=dataclasses.replace(EXPERT, heads=3)), "expert.heads = 3"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        nnx.eval_shape(lambda: Policy(dataclasses.replace(CONFIG, **changes), FACTS, nnx.Rngs(0)))


def test_impossible_inputs_are_named(observation):
    policy, tokens = make_policy(), np.ones((3, 7), np.int32)
    with pytest.raises(UserError, match="7 tokens; this policy was made for at most 6"):
        policy.encode(observation["images"], tokens, tokens > 0)
    with pytest.raises(UserError, match="7 tokens; this policy was made for at most 6"):
        make_policy(reasoning=2).encode(observation["images"], tokens, tokens > 0)
    with pytest.raises(UserError, match="'wrist', got none"):
        policy.encode({"front": observation["images"]["front"]}, TOKENS, TOKENS > 0)
    with pytest.raises(UserError, match="no prior branch"):
        make_policy(conditioning="tokens").encode(observation["images"], TOKENS, TOKENS > 0, ("prior", "posterior"))
    with pytest.raises(UserError, match="low < high"):
        dataclasses.replace(FACTS, state_low=(1.0, 0.0))
