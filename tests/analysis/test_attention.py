"""The weights that are read out are those with which the policy attends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vla_jax.analysis.attention import expert_attention, gaze, shown, trunk_attention
from vla_jax.analysis.likelihood import repeat_scene
from vla_jax.errors import UserError
from vla_jax.models.keypoints import KeypointConfig, KeypointEncoder
from vla_jax.models.vision import VisionConfig, VisionEncoder
from vla_jax.nn.norm import standardize
from vla_jax.nn.rotary import rotation
from vla_jax.sequence.spans import sees

TOKENS = np.array([[3, 4, 0], [2, 1, 4]], np.int32)
KEY = jax.random.key(0)


def weigh(attention, weights, values):
    """What an attention layer returns, from read-out weights [B, N, T, S] and its values."""
    values = jnp.repeat(values, weights.shape[1] // values.shape[2], 2)
    seen = jnp.einsum("BNTS,BSNH->BTNH", weights, values)
    return attention.output(seen.reshape(*seen.shape[:2], -1))


@pytest.fixture(scope="module")
def packed(make_policy, observation):
    """The trunk, its inputs for both branches, what it returns and what is read out."""
    trunk = make_policy().trunk

    @jax.jit
    def run(policy, images):
        packed = policy.pack(images, TOKENS, TOKENS > 0, ("prior", "posterior"))
        return packed.sequence, packed.valid, policy.trunk(*packed), trunk_attention(policy.trunk, packed)

    layout = make_policy().layout(3, ("prior", "posterior"))
    return trunk, layout, *run(make_policy(), repeat_scene(observation, 2)["images"])


def test_the_weights_rebuild_what_the_trunk_returns(packed):
    """Layer by layer, weights @ values in the place of attention gives the hidden states of the trunk's own way, which
    computes block by block of the layout."""
    trunk, layout, x, valid, hidden, weights = packed
    config = trunk.config
    assert weights.shape == (config.depth, 2, config.heads, layout.length, layout.length)
    rotary = rotation(layout.sight.position, config.head_width, config.rope_theta)

    def layer(block, x, weights):
        _, values = block.attention.keys_values(block.attention_norm(x), rotary)
        x = x + weigh(block.attention, weights, values)
        return x + block.mlp(block.mlp_norm(x)), None

    rebuilt = jax.jit(lambda: trunk.norm(trunk.blocks.run(layer, x, weights)[0]))()
    np.testing.assert_allclose(np.asarray(rebuilt)[valid], np.asarray(hidden)[valid], atol=1e-5)


def test_the_weights_are_shares_and_keep_to_the_rule_of_sight(packed):
    _, layout, _, valid, _, weights = packed
    weights = np.asarray(weights)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert (weights[..., ~sees(layout.sight, layout.sight)] == 0).all()
    assert (np.moveaxis(weights, -1, 2)[:, ~np.asarray(valid)] == 0).all(), "nobody sees padding"
    prior = weights[..., layout["prior/query"], :]
    for text in ("prior/text", "posterior/text"):
        assert (prior[..., layout[text]] == 0).all(), "the prior has not read the words"
    assert (weights[..., layout["posterior/query"], layout["posterior/text"]].sum(-1) > 0).all()


def test_the_weights_rebuild_what_the_expert_returns(make_policy, observation):
    policy, draws = make_policy("tokens"), 3
    expert, random = policy.expert, np.random.default_rng(1)
    actions = random.normal(size=(2, draws, 4, 3)).astype(np.float32)
    time = random.random((2, draws)).astype(np.float32)

    @jax.jit
    def run(policy):
        scene = repeat_scene(observation, 2)
        reading = policy.encode(scene["images"], TOKENS, TOKENS > 0)["posterior"]
        memory = policy.expert.read(policy.condition(reading, scene["state"]))
        return memory, policy.expert(actions, time, memory), expert_attention(policy.expert, actions, time, memory)

    memory, velocity, weights = run(policy)
    np.testing.assert_allclose(np.asarray(weights).sum(-1), 1, atol=1e-5)
    assert (np.moveaxis(np.asarray(weights), -1, 2)[:, ~np.asarray(memory.valid)] == 0).all()

    @jax.jit
    def rebuild():
        x, embedded = expert.begin(actions, time, memory)

        def layer(pair, x, each):
            weights, values = each
            seen = [weigh(pair.cross.attention, weights[:, r], values) for r in range(draws)]
            x = x + jnp.stack(seen, 1)
            x = x + pair.cross.mlp(standardize(x))
            return pair.own.attend(x, embedded, None), None

        x, _ = expert.pairs.run(layer, x, (weights, memory.values))
        x = expert.project(expert.norm(x[:, :, -4:], embedded))
        return expert.head_out(jax.nn.relu(expert.head_hidden(x)))

    np.testing.assert_allclose(rebuild(), velocity, atol=1e-5)


@pytest.mark.parametrize("conditioning, readers", [("queries", 3), ("tokens", 4)])
def test_a_gaze_is_shared_out_among_picture_words_and_queries(make_policy, observation, conditioning, readers):
    policy = make_policy(conditioning)
    seen = gaze(policy, observation, TOKENS, TOKENS > 0, KEY)
    assert seen.image.shape == (2, readers, 8) and seen.text.shape == (2, readers, 3)
    assert seen.query.shape == (2, readers, 3 if conditioning == "queries" else 0)
    np.testing.assert_allclose(sum(part.sum(-1) for part in seen), 1, atol=1e-5)
    assert (seen.text[0, :, 2] == 0).all() and (seen.text[1] > 0).all(), "padding gets nothing"
    other = gaze(policy, observation, np.where(TOKENS == 3, 2, TOKENS), TOKENS > 0, KEY)
    assert np.abs(other.text[0] - seen.text[0]).max() > 1e-6
    np.testing.assert_allclose(other.text[1], seen.text[1], atol=1e-6)


@pytest.mark.parametrize("conditioning, readers", [("queries", 3), ("tokens", 4), ("reasoning", 2)])
def test_what_a_policy_said_to_itself_is_looked_at_too(make_policy, observation, conditioning, readers):
    seen = gaze(make_policy(conditioning, reasoning=2), observation, TOKENS, TOKENS > 0, KEY)
    assert seen.text.shape == (2, readers, 3 + 2)
    np.testing.assert_allclose(sum(part.sum(-1) for part in seen), 1, atol=1e-5)
    if conditioning == "reasoning":  # what it looked at when it said each word: what was told, and the word before
        assert (seen.text[0] > 0).tolist() == [[True] * 2 + [False] * 3, [True] * 3 + [False] * 2]
        assert (seen.text[1] > 0).tolist() == [[True] * 3 + [False] * 2, [True] * 4 + [False]]
    else:
        assert (seen.text[0, -1, :4] > 0).all() and (seen.text[0, :, 4] == 0).all(), "two words told, two said"
        assert (seen.text[1] > 0).all()


def test_the_gaze_of_the_prior_does_not_depend_on_the_words(make_policy, observation):
    seen = gaze(make_policy(), observation, TOKENS, TOKENS > 0, KEY, "prior")
    assert (np.asarray(seen.text) == 0).all()
    np.testing.assert_allclose(seen.image[0], seen.image[1], atol=1e-6)
    with pytest.raises(UserError, match="no prior branch"):
        gaze(make_policy("tokens"), observation, TOKENS, TOKENS > 0, KEY, "prior")


def test_patches_are_where_they_were_cut():
    encoder = VisionEncoder(
        VisionConfig(patch=4, merge=2, width=8, depth=1, heads=2, hidden=16),
        16, ("front", "wrist"), 8, dtype="float32", rngs=nnx.Rngs(0),
    )  # fmt: skip
    picture = np.zeros((3, 16, 16, 3), np.uint8)
    places = np.asarray(encoder.places({"front": picture, "wrist": picture}))
    assert encoder.reach == 8 and places.shape == (3, 8, 2)
    np.testing.assert_array_equal(places[0], [[4, 4], [12, 4], [4, 12], [12, 12]] * 2)


def test_keypoints_are_where_their_maps_are_bright():
    encoder = KeypointEncoder(
        KeypointConfig(points=1, patch=2, hidden=1), 16, ("front", "wrist"), 8, dtype="float32", rngs=nnx.Rngs(0)
    )
    encoder.patch.kernel[...] = jnp.full((12, 1), 1.0)
    encoder.patch.bias[...] = jnp.full(1, 12.0)
    encoder.maps.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    dark = np.zeros((1, 16, 16, 3), np.uint8)
    bright = dark.copy()
    bright[0, 4:6, 10:12] = 255
    places = np.asarray(encoder.places({"front": bright, "wrist": dark}))[0]
    np.testing.assert_allclose(places, [[11, 5], [8, 8]], atol=1e-3)
    assert encoder.reach == 2


def test_a_square_shows_the_things_in_it():
    front, wrist = np.full((8, 8), -1), np.full((8, 8), -1)
    front[0:4, 4:8] = 0  # fills one square
    front[4:8, 6:8] = 1  # half of another
    wrist[0, 0] = 1
    places = np.array([[2, 2], [6, 2], [2, 6], [6, 6], [2.3, 1.6], [5, 5], [4, 4], [6, 6]])
    shares = shown(places, 4, ("front", "wrist"), {"front": front, "wrist": wrist}, 2)
    np.testing.assert_allclose(shares[:4], [[0, 0], [1, 0], [0, 0], [0, 0.5]])
    np.testing.assert_allclose(shares[4:], [[0, 1 / 16], [0, 0], [0, 0], [0, 0]])  # the second view
