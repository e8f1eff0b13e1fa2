"""The options of the objective, its bookkeeping, and that it can be minimised."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from vla_jax.errors import UserError
from vla_jax.losses.llr import GateState, initial_gate, log_likelihood_ratio
from vla_jax.losses.objective import LossConfig, objective
from vla_jax.losses.term import Term, check_terms, term

KEY = jax.random.key(0)


def random_logits():
    random = np.random.default_rng(0)
    prior, posterior = (random.normal(size=(4, 6, 9)).astype(np.float32) for _ in range(2))
    mask = np.arange(6) < np.array([[6], [2], [0], [4]])
    return prior, posterior, random.integers(0, 9, (4, 6)).astype(np.int32), mask


def by_hand(logits, tokens):
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(log, tokens[..., None], -1)[..., 0]


def test_ratio_is_a_mean_over_tokens():
    prior, posterior, tokens, mask = random_logits()
    llr, _ = log_likelihood_ratio(prior, posterior, tokens, mask, initial_gate())
    difference = by_hand(prior, tokens) - by_hand(posterior, tokens)
    expected = [difference[b, :n].mean() if n else 0 for b, n in enumerate(mask.sum(1))]
    np.testing.assert_allclose(llr.ratio, expected, atol=1e-5)
    assert list(llr.carried) == [True, True, False, True]


def test_hard_tokens_are_those_that_the_posterior_order_finds_surprising():
    prior, posterior, tokens, mask = random_logits()
    llr, _ = log_likelihood_ratio(prior, posterior, tokens, mask, initial_gate(), hard_tokens=3)
    one, other = by_hand(prior, tokens), by_hand(posterior, tokens)
    for b, n in ((0, 6), (1, 2), (3, 4)):
        hard = sorted(range(n), key=lambda i: other[b, i])[:3]
        np.testing.assert_allclose(llr.ratio[b], (one - other)[b, hard].mean(), atol=1e-5)


def test_the_gate_follows_its_running_mean():
    prior, posterior, tokens, mask = random_logits()
    surprise = np.array([-by_hand(posterior, tokens)[b, :n].mean() for b, n in ((0, 6), (1, 2), (3, 4))])
    llr, state = log_likelihood_ratio(prior, posterior, tokens, mask, initial_gate(), gate=True)
    np.testing.assert_allclose(state.mean, surprise.mean(), rtol=1e-5)
    expected = 1 / (1 + np.exp(-(0.7 * surprise.mean() - surprise) / 0.5))
    np.testing.assert_allclose(np.asarray(llr.gate)[[0, 1, 3]], expected, rtol=1e-4)
    plain, _ = log_likelihood_ratio(prior, posterior, tokens, mask, initial_gate())
    np.testing.assert_allclose(llr.ratio, plain.ratio * llr.gate, rtol=1e-5)
    _, later = log_likelihood_ratio(prior, posterior, tokens, mask, GateState(jnp.float32(5.0), jnp.bool_(True)))
    np.testing.assert_allclose(later.mean, 0.99 * 5 + 0.01 * surprise.mean(), rtol=1e-5)
    _, same = log_likelihood_ratio(prior, posterior, tokens, np.zeros_like(mask), later)
    assert float(same.mean) == float(later.mean) and bool(same.started)
    _, empty = log_likelihood_ratio(prior, posterior, tokens, np.zeros_like(mask), initial_gate())
    assert not bool(empty.started)


def test_no_gradient_reaches_the_baseline_even_through_gate_and_hard_tokens():
    prior, posterior, tokens, mask = random_logits()

    def ratio(prior, posterior):
        return log_likelihood_ratio(prior, posterior, tokens, mask, initial_gate(), hard_tokens=3, gate=True)[
            0
        ].ratio.sum()

    by_prior, by_posterior = jax.grad(ratio, argnums=(0, 1))(prior, posterior)
    assert np.abs(by_prior).max() > 1e-3 and (np.asarray(by_posterior) == 0).all()


def test_a_term_is_a_mean_over_those_that_carry_it():
    values, carried = np.array([1.0, np.nan, 3.0, 5.0], np.float32), np.array([True, False, True, False])
    value, fraction, weight = term(values, carried, 0.5)
    assert float(value) == 2 and float(fraction) == 0.5 and weight == 0.5
    gradient = jax.grad(lambda x: term(x * x, carried).value)(values)
    np.testing.assert_allclose(np.asarray(gradient)[[0, 2, 3]], [1, 3, 0])


def test_only_terms_with_a_weight_can_fail():
    check_terms({"logged": Term(0.0, 0.0), "used": Term(1.0, 0.1, 0.3)})
    with pytest.raises(UserError, match="'used' has weight -0.3"):
        check_terms({"logged": Term(0.0, 1.0), "used": Term(1.0, 0.0, -0.3)})


@pytest.fixture(scope="module")
def run(make_policy):
    def run(batch, config, conditioning="queries", gate_state=None):
        graph, state = nnx.split(make_policy(conditioning))

        def loss(state, batch, gate_state):
            return objective(nnx.merge(graph, state), batch, KEY, config, gate_state)

        return jax.jit(loss)(state, batch, gate_state or initial_gate())

    return run


def test_every_option_at_once(run, batch):
    config = LossConfig(language_weight=0.2, hard_tokens=2, gate=True, detach_prior=False)
    loss, (terms, state) = run(batch, config)
    assert set(terms) == {"fm_posterior", "fm_prior", "llr", "llr_prior", "llr_posterior", "llr_gate", "language"}
    weights = {name: round(float(term.weight), 6) for name, term in terms.items() if float(term.weight)}
    assert weights == {"fm_posterior": 0.7, "fm_prior": 0.3, "llr": -0.1, "language": 0.2}
    assert np.isclose(float(loss), sum(float(term.weight * term.value) for term in terms.values()), atol=1e-5)
    assert bool(state.started) and float(state.mean) > 0
    _, (plain, _) = run(batch, LossConfig(language_weight=0.2))
    assert np.isclose(float(plain["language"].value), -float(plain["llr_posterior"].value), rtol=1e-4), (
        "without options both are the language loss on [v, l]"
    )


def test_branches_are_read_only_when_needed(batch):
    assert LossConfig(prior_weight=0.0, llr_weight=0.0, language_weight=1.0).branches == ("posterior",)
    assert LossConfig(prior_weight=0.3, llr_weight=0.0).branches == ("prior", "posterior")
    assert LossConfig(prior_weight=0.0, llr_weight=0.1).branches == ("prior", "posterior")
    assert LossConfig(prior_weight=0.0, llr_weight=0.0, contrastive_weight=0.1).branches == ("posterior", "negative")
    with pytest.raises(UserError, match="needs loss.flow"):
        LossConfig(flow=False, contrastive_weight=0.1)


def test_the_all_token_baseline_has_no_prior(run, batch):
    loss, (terms, _) = run(batch, LossConfig(prior_weight=0.0, llr_weight=0.0, language_weight=0.1), "tokens")
    assert np.isfinite(float(loss)) and set(terms) == {"fm_posterior", "language"}
    with pytest.raises(UserError, match="no prior branch"):
        run(batch, LossConfig(), "tokens")


def test_samples_without_valid_actions_or_words_are_left_out(run, batch):
    action_mask, token_mask = batch["action_mask"].copy(), batch["token_mask"].copy()
    action_mask[1], token_mask[2] = False, False
    changed = {**batch, "action_mask": action_mask, "token_mask": token_mask}
    loss, (terms, _) = run(changed, LossConfig(language_weight=0.1, gate=True))
    assert np.isfinite(float(loss))
    assert {name: round(float(term.valid_fraction), 3) for name, term in terms.items()} == {
        name: 0.667 for name in terms
    }


def test_wrong_settings_are_named():
    for wrong in (dict(prior_weight=1.5), dict(noise_draws=0), dict(hard_tokens=-1)):
        with pytest.raises(UserError, match=f"loss.{next(iter(wrong))}"):
            LossConfig(**wrong)


def test_the_whole_objective_goes_down(make_policy, batch):
    graph, parameters, rest = nnx.split(make_policy(), nnx.Param, ...)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def train(parameters):
        def step(carry, key):
            parameters, state = carry

            def loss(p):
                total, (terms, _) = objective(nnx.merge(graph, p, rest), batch, key, LossConfig(), initial_gate())
                return total, {name: term.value for name, term in terms.items()}

            (_, values), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
            updates, state = optimizer.update(gradients, state, parameters)
            return (optax.apply_updates(parameters, updates), state), values

        return jax.lax.scan(step, (parameters, optimizer.init(parameters)), jax.random.split(KEY, 200))[1]

    values = {name: np.asarray(value) for name, value in train(parameters).items()}
    first = {name: value[:20].mean() for name, value in values.items()}
    last = {name: value[-20:].mean() for name, value in values.items()}
    assert last["fm_posterior"] < 0.6 * first["fm_posterior"] and last["fm_prior"] < 0.6 * first["fm_prior"]
    assert last["llr_prior"] > first["llr_prior"] + 1.0, "the prior order learned the instructions"
