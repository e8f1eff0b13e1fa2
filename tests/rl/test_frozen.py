"""A small policy behind the black box: the same chunk as the policy's own, noise by noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vla_jax.errors import UserError
from vla_jax.models.expert import Condition, ExpertConfig
from vla_jax.models.normalizer import DataFacts
from vla_jax.models.policy import Policy, PolicyConfig
from vla_jax.models.trunk import TrunkConfig
from vla_jax.models.vision import VisionConfig
from vla_jax.rl.frozen import Acted, BestOf, Fixed, Prior, SteeredPolicy, flow_of, summarize
from vla_jax.rl.networks import Critics, NoiseActor, split

CONFIG = PolicyConfig(
    vision=VisionConfig(width=8, depth=1, heads=1, hidden=8),
    trunk=TrunkConfig(width=8, depth=1, heads=1, kv_heads=1, head_width=8, hidden=8),
    expert=ExpertConfig(width=8, depth=2, heads=1, hidden=8, head=8),
    views=("front",),
    queries=2,
    chunk=3,
)
FACTS = DataFacts(5, 4, 16, (-1.0, -2.0), (1.0, 2.0), (0.0,), (1.0,))
OBSERVATION = {
    "images": {"front": np.full((2, 16, 16, 3), 90, np.uint8)},
    "state": np.array([[0.2], [0.7]], np.float32),
}
TOKENS = np.array([[2, 3, 0, 0], [4, 0, 0, 0]])
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def policy():
    return Policy(CONFIG, FACTS, nnx.Rngs(0))


@pytest.mark.parametrize("guidance", [None, 1.7])
def test_the_black_box_makes_the_policys_own_chunk(policy, guidance):
    graphdef, weights = split(policy)
    flow = flow_of(graphdef, (3, 2), 2, guidance, "flat")

    @jax.jit
    def both():
        read = flow.read(weights, OBSERVATION, TOKENS, TOKENS > 0)
        chunk = flow.decode(weights, read, jax.random.normal(KEY, (2, 3, 2)))
        actions = policy.act(OBSERVATION, TOKENS, TOKENS > 0, KEY, 2, guidance)
        return flow.to_robot(weights, chunk), actions, flow.features(read)

    ours, expected, features = both()
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert features.shape == (2, 2 * 8 + 1)


def test_a_steered_policy_starts_from_the_chosen_noise_or_is_the_policy(policy):
    noise = jnp.arange(6.0) / 6

    @jax.jit
    def act(steered):
        return SteeredPolicy(policy, Fixed(noise), "flat", steered).act(OBSERVATION, TOKENS, TOKENS > 0, KEY, 2)

    @jax.jit
    def plain(noise):
        condition = policy.condition(
            policy.encode(OBSERVATION["images"], TOKENS, TOKENS > 0)["posterior"], OBSERVATION["state"]
        )
        return policy.normalizer.denormalize_action(policy.sample(condition, noise, steps=2))

    np.testing.assert_allclose(act(True), plain(jnp.broadcast_to(noise.reshape(1, 3, 2), (2, 3, 2))), atol=1e-5)
    np.testing.assert_allclose(act(False), plain(jax.random.normal(KEY, (2, 3, 2))), atol=1e-5)
    assert np.abs(act(True) - act(False)).max() > 1e-3


def test_pooled_features_leave_padding_out():
    context = jax.random.normal(KEY, (1, 4, 3))
    condition = Condition(context, jnp.array([[True, True, False, False]]), jnp.ones((1, 1)))
    features = summarize(condition, "pooled")
    np.testing.assert_allclose(
        features[0], jnp.concatenate([context[0, :2].mean(0), context[0, 1], jnp.ones(1)]), rtol=1e-6
    )
    everything = summarize(condition._replace(valid=None), "pooled")
    np.testing.assert_allclose(everything[0, 3:6], context[0, 3])
    with pytest.raises(UserError, match="set summary = 'pooled'"):
        summarize(condition, "flat")
    with pytest.raises(UserError, match="summary must be one of flat, pooled"):
        summarize(condition, "full")


def test_the_search_takes_what_the_most_doubtful_critic_likes():
    critics = Critics(2, 3, 4, 8, 1, nnx.Rngs(0))
    features = jax.random.normal(KEY, (5, 3))
    chosen = BestOf(critics, 64, 4)(features, KEY)
    drawn = jax.random.normal(KEY, (5, 64, 4))
    best = critics(features, drawn).min(0).max(-1)
    np.testing.assert_allclose(critics(features, chosen).min(0), best, rtol=1e-5)
    # many candidates at once are the same as one after another
    np.testing.assert_allclose(critics(features, drawn)[:, :, 7], critics(features, drawn[:, 7]), rtol=1e-4, atol=1e-5)


def test_an_untrained_actor_is_near_the_prior_and_its_mode_has_no_chance():
    actor = NoiseActor(3, 4, 16, 2, 1.5, nnx.Rngs(0))
    features = jax.random.normal(KEY, (2000, 3))
    drawn = Acted(actor)(features, KEY)
    assert abs(float(drawn.mean())) < 0.1 and float(drawn.std()) == pytest.approx(0.94, abs=0.1)
    greedy = Acted(actor, greedy=True)
    np.testing.assert_array_equal(greedy(features, KEY), greedy(features, jax.random.key(8)))
    assert Prior(4)(features, KEY).shape == (2000, 4)
