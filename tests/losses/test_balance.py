"""Weights that break the tie between picture and instruction, and the branch that reads the words alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from vla_jax.errors import UserError
from vla_jax.losses.balance import LIMIT, balance_weights, effective_share
from vla_jax.losses.llr import initial_gate
from vla_jax.losses.objective import LossConfig, objective

KEY = jax.random.key(0)


def test_weights_are_the_ratio_of_the_margins():
    seen, alone = np.log([[0.9, 0.5], [0.1, 0.5], [0.3, 0.1]]), np.log([[0.5, 0.5], [0.5, 0.5], [0.6, 0.9]])
    mask = np.array([[True, True], [True, True], [True, False]])
    weights = balance_weights(seen, alone, mask, 1.0)
    np.testing.assert_allclose(weights / weights[0], np.array([5 / 9, 5, 2]) / (5 / 9), rtol=1e-5)
    assert np.isclose(weights.mean(), 1.0)
    root = balance_weights(seen, alone, mask, 0.5)
    np.testing.assert_allclose(root[1] / root[0], 3.0, rtol=1e-5)
    np.testing.assert_array_equal(balance_weights(seen, alone, mask, 0.0), np.ones(3))


def test_no_sample_counts_too_much_and_an_empty_instruction_counts_once():
    seen, alone = np.array([[-50.0], [0.0], [0.0]]), np.array([[0.0], [-50.0], [7.0]])
    weights = balance_weights(seen, alone, np.array([[True], [True], [False]]), 1.0)
    np.testing.assert_allclose(weights / weights[2], [np.exp(LIMIT), np.exp(-LIMIT), 1.0], rtol=1e-5)


def test_no_gradient_passes_through_the_weights():
    def total(values):
        return jnp.square(balance_weights(values, 2 * values, jnp.ones((3, 2), bool), 1.0)).sum()

    assert (jax.grad(total)(jnp.arange(6.0).reshape(3, 2)) == 0).all()


def test_the_effective_share_of_a_batch():
    assert float(effective_share(jnp.ones(7))) == 1.0
    assert np.isclose(float(effective_share(jnp.array([3.0, 0.0, 0.0, 0.0]))), 0.25)


def test_the_words_branch_does_not_see_the_picture(policy, batch, compile):
    graph, state = nnx.split(policy)

    @compile
    def read(state, batch):
        policy = nnx.merge(graph, state)
        readings = policy.encode(batch["images"], batch["tokens"], batch["token_mask"], ("prior", "posterior", "words"))
        return {name: policy.word_logits(reading.predictors) for name, reading in readings.items()}

    valid = batch["token_mask"]
    base = read(state, batch)
    dark = read(state, {**batch, "images": jax.tree.map(np.zeros_like, batch["images"])})
    change = {name: np.abs(dark[name] - base[name])[valid].max() for name in base}
    assert change["words"] == 0 and min(change["prior"], change["posterior"]) > 1e-4
    # and it reads the words: what is said first changes what is expected later, never the other way
    tokens = batch["tokens"].copy()
    tokens[1, 0] = tokens[1, 0] % 10 + 1
    said = np.abs(read(state, {**batch, "tokens": tokens})["words"] - base["words"]).max(-1)[1]
    assert said[0] == 0 and (said[1:5] > 1e-6).all()


def biased(facts, random, size, share):
    """A dark or a bright scene, one of two words, which the scene gives away with probability `share`."""
    bright = random.integers(0, 2, size)
    word = np.where(random.random(size) < share, bright, 1 - bright)
    pixels = np.broadcast_to((255 * bright)[:, None, None, None], (size, 16, 16, 3)).astype(np.uint8)
    return {
        "images": {view: pixels for view in ("front", "wrist")},
        "state": np.zeros((size, 2), np.float32),
        "tokens": np.stack([word + 4, np.full(size, 3)], 1).astype(np.int32),
        "token_mask": np.ones((size, 2), bool),
        "actions": np.zeros((size, 4, 3), np.float32),
        "action_mask": np.ones((size, 4), bool),
    }, bright == word


def test_the_policys_own_language_head_balances_biased_data(policy):
    """p(l | v) = .9 or .1 and p(l) = .5: the weights of the two kinds of sample become 5/9 and 5, 9 times apart."""
    config = LossConfig(prior_weight=0.0, llr_weight=0.0, language_weight=1.0, balance=1.0, noise_draws=1)
    graph, params, rest = nnx.split(policy, nnx.Param, ...)
    optimizer = optax.adam(3e-3)

    def loss(params, batch):
        return objective(nnx.merge(graph, params, rest), batch, KEY, config, initial_gate())

    @jax.jit
    def step(params, opt_state, batch):
        (_, (terms, _)), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, terms["effective_share"].value

    random, opt_state, shares = np.random.default_rng(0), optimizer.init(params), []
    for _ in range(300):
        params, opt_state, share = step(params, opt_state, biased(policy.facts, random, 64, 0.9)[0])
        shares.append(float(share))
    # E[w]^2 / E[w^2] with w = 5/9 nine times in ten and 5 else
    assert abs(np.mean(shares[-100:]) - 1 / (0.9 * (5 / 9) ** 2 + 0.1 * 25)) < 0.06


def test_flow_matching_is_weighted_and_the_rest_is_not(policy, batch, compile):
    config = LossConfig(llr_weight=0.1, language_weight=0.1, noise_draws=1)
    graph, state = nnx.split(policy)

    def terms_of(balance):
        balanced = LossConfig(**{**vars(config), "balance": balance})
        return compile(lambda s: objective(nnx.merge(graph, s), batch, KEY, balanced, initial_gate())[1][0])(state)

    plain, same, other = (terms_of(balance) for balance in (0.0, 1e-9, 1.0))
    for name in plain:
        assert np.isclose(plain[name].value, same[name].value, atol=1e-6), name
        changed = not np.isclose(plain[name].value, other[name].value, atol=1e-6)
        assert changed == name.startswith("fm_"), name
    assert float(other["words"].weight) == np.float32(0.1) and "words" not in plain


def test_balance_needs_a_language_head_that_learns():
    with pytest.raises(UserError, match="loss.balance needs loss.language_weight"):
        LossConfig(balance=1.0)
