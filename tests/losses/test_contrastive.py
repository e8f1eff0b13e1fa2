"""The preference of a recorded action for its own instruction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vla_jax.errors import UserError
from vla_jax.losses.contrastive import TEMPERATURE, contrast, negatives
from vla_jax.losses.flow_matching import draw, flow_matching
from vla_jax.losses.llr import initial_gate
from vla_jax.losses.objective import LossConfig, objective
from vla_jax.losses.term import check_terms
from vla_jax.models.policy import Instruction

ALL = ("prior", "posterior", "negative")
KEY = jax.random.key(0)
CONFIG = LossConfig(prior_weight=0.0, llr_weight=0.0, contrastive_weight=0.5)


@pytest.fixture(scope="module")
def run(make_policy):
    """(policy, batch) -> the objective's terms."""
    graph = nnx.split(make_policy())[0]

    @jax.jit
    def run(state, batch):
        return objective(nnx.merge(graph, state), batch, KEY, CONFIG, initial_gate())[1][0]

    return lambda policy, batch: run(nnx.split(policy)[1], batch)


def test_the_value_is_that_of_the_formula():
    own, other = np.array([0.3, 0.3, 0.1], np.float32), np.array([0.3, 0.5, 0.05], np.float32)
    np.testing.assert_allclose(contrast(own, other), np.log(1 + np.exp((own - other) / TEMPERATURE)), rtol=1e-5)
    by_own, by_other = jax.grad(lambda a, b: contrast(a, b).sum(), argnums=(0, 1))(own, other)
    assert (np.asarray(by_own) > 0).all() and (np.asarray(by_other) < 0).all()
    assert np.isfinite(contrast(np.float32([1e4]), np.float32([0.0]))).all()


def test_a_sample_whose_neighbour_says_the_same_is_left_out():
    tokens = np.array([[4, 5, 0], [4, 5, 9], [4, 6, 0], [4, 6, 1], [0, 0, 0]], np.int32)
    mask = np.array([[1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
    other, differs = negatives(tokens, mask)
    # 1 differs from 0 in padding alone; 3 says more than 2; 4 says nothing
    assert list(differs) == [True, False, True, True, False]
    np.testing.assert_array_equal(other.tokens[1:], tokens[:-1])
    np.testing.assert_array_equal(other.mask[1:], mask[:-1])


def test_the_term_counts_those_that_carry_it(run, policy, batch):
    assert float(run(policy, batch)["contrastive"].valid_fraction) == 1
    tokens, mask = batch["tokens"].copy(), batch["token_mask"].copy()
    tokens[1], mask[1] = tokens[0], mask[0]
    assert np.isclose(
        float(run(policy, {**batch, "tokens": tokens, "token_mask": mask})["contrastive"].valid_fraction), 2 / 3
    )
    acts = batch["action_mask"].copy()
    acts[2] = False
    assert np.isclose(float(run(policy, {**batch, "action_mask": acts})["contrastive"].valid_fraction), 2 / 3)
    same = {name: np.repeat(batch[name][:1], 3, 0) for name in ("tokens", "token_mask")}
    terms = run(policy, {**batch, **same})
    assert float(terms["contrastive"].value) == float(terms["contrastive"].valid_fraction) == 0
    with pytest.raises(UserError, match="'contrastive' has weight 0.5, but no sample"):
        check_terms(terms)


def test_a_policy_that_ignores_the_words_is_at_log_2(run, make_policy, batch):
    policy, batch = make_policy(), {**batch, "token_mask": np.ones_like(batch["token_mask"])}
    assert abs(float(run(policy, batch)["contrastive"].value) - np.log(2)) > 1e-5
    policy.words[...] = jnp.broadcast_to(policy.words[...][:1], policy.words.shape)
    term = run(policy, batch)["contrastive"]
    assert np.isclose(float(term.value), np.log(2), atol=1e-6) and float(term.valid_fraction) == 1


@pytest.mark.parametrize("conditioning", ["queries", "tokens"])
def test_the_packed_negative_is_the_posterior_of_the_other_instruction(make_policy, batch, conditioning):
    branches = ALL if conditioning == "queries" else ALL[1:]
    graph, state = nnx.split(make_policy(conditioning))

    @jax.jit
    def both(state):
        policy, other = nnx.merge(graph, state), negatives(batch["tokens"], batch["token_mask"])[0]
        own = batch["images"], batch["tokens"], batch["token_mask"]
        packed = policy.encode(*own, branches, other=other)
        apart = {name: policy.encode(*own, (name,))[name] for name in branches[:-1]}
        return packed, {**apart, "negative": policy.encode(batch["images"], *other)["posterior"]}

    packed, apart = both(state)
    for name in branches:
        valid = np.ones(packed[name].hidden.shape[:2], bool) if packed[name].valid is None else packed[name].valid
        np.testing.assert_allclose(packed[name].hidden[valid], apart[name].hidden[valid], atol=1e-5)
        np.testing.assert_array_equal(valid, True if apart[name].valid is None else apart[name].valid)


def test_only_the_words_differ_between_the_two_errors(run, policy, batch, noise_keys):
    graph, state = nnx.split(policy)

    @jax.jit
    def written_out(state):
        """Two separate passes, with the same noise and times."""
        policy, actions = nnx.merge(graph, state), batch["actions"]
        actions = policy.normalizer.normalize_action(actions)
        draws = draw(noise_keys(KEY, 3), (CONFIG.noise_draws, 4, 3))
        own = Instruction(batch["tokens"], batch["token_mask"])

        def error(words):
            reading = policy.encode(batch["images"], *words)["posterior"]
            condition = policy.condition(reading, batch["state"])
            return flow_matching(lambda x, t: policy.velocity(x, t, condition), actions, batch["action_mask"], draws)

        return contrast(error(own), error(negatives(*own)[0])).mean()

    assert np.isclose(float(run(policy, batch)["contrastive"].value), float(written_out(state)), atol=1e-5)


def test_turning_the_batch_changes_nothing(policy, batch):
    """Every sample keeps its neighbour; with its noise it keeps its value."""
    graph, state = nnx.split(policy)

    @jax.jit
    def values(state, batch, draws):
        policy = nnx.merge(graph, state)
        other, _ = negatives(batch["tokens"], batch["token_mask"])
        readings = policy.encode(
            batch["images"], batch["tokens"], batch["token_mask"], ("posterior", "negative"), other=other
        )
        actions = policy.normalizer.normalize_action(batch["actions"])

        def error(name):
            condition = policy.condition(readings[name], batch["state"])
            return flow_matching(lambda x, t: policy.velocity(x, t, condition), actions, batch["action_mask"], draws)

        return contrast(error("posterior"), error("negative"))

    draws = draw(jax.random.split(KEY, 3), (2, 4, 3))
    turned = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, 0), (batch, draws))
    plain = values(state, batch, draws)
    np.testing.assert_allclose(values(state, *turned), jnp.roll(plain, 1), atol=1e-5)
    assert np.ptp(plain) > 1e-4, "the samples differ, so order is visible"


@pytest.mark.parametrize("keep", [0.9, pytest.param(0.5, marks=pytest.mark.slow)])
def test_training_separates_the_instructions_as_far_as_the_actions_do(make_policy, fit, synthetic, keep):
    """From a policy to which all words are one, valid_fraction (log 2 - value) grows from 0, but not beyond
    I(l; a | v) = ln 2 - H(keep)."""
    policy = make_policy()
    policy.words[...] = jnp.broadcast_to(policy.words[...][:1], policy.words.shape)
    random = np.random.default_rng(0)
    _, history = fit(policy, CONFIG, ((synthetic(random, 64, keep), key) for key in jax.random.split(KEY, 300)))
    found = [terms["contrastive"] for terms in history]
    bounds = [float(term.valid_fraction * (np.log(2) - term.value)) for term in found]
    information, reached = np.log(2) + keep * np.log(keep) + (1 - keep) * np.log(1 - keep), np.mean(bounds[-100:])
    assert abs(np.mean(bounds[:5])) < 0.01
    assert information / 3 - 0.02 < reached < information + 0.02, (reached, information)
