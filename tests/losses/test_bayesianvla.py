"""Ten properties that make the BayesianVLA objective (arXiv 2601.15197) what it says it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.scipy.stats import multivariate_normal

from vla_jax.errors import UserError
from vla_jax.flow.density import relative_log_likelihood
from vla_jax.flow.path import sample_time
from vla_jax.flow.solve import solve
from vla_jax.losses.flow_matching import Draw, draw, draw_errors
from vla_jax.losses.llr import initial_gate, log_likelihood_ratio
from vla_jax.losses.objective import LossConfig, objective
from vla_jax.losses.term import check_terms

BOTH = ("prior", "posterior")
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def read(policy):
    """(state, batch) -> both branches' readings, the word logits, the LLR."""
    graph = nnx.split(policy)[0]

    @jax.jit
    def read(state, batch):
        policy = nnx.merge(graph, state)
        readings = policy.encode(batch["images"], batch["tokens"], batch["token_mask"], BOTH)
        logits = {name: policy.word_logits(reading.predictors) for name, reading in readings.items()}
        llr, _ = log_likelihood_ratio(
            logits["prior"], logits["posterior"], batch["tokens"], batch["token_mask"], initial_gate()
        )
        return {name: reading.hidden for name, reading in readings.items()}, logits, llr

    return read


def gradient(policy, loss):
    """The gradient of loss(policy) in all parameters, as a nested dictionary."""
    graph, parameters, rest = nnx.split(policy, nnx.Param, ...)
    return nnx.to_pure_dict(jax.jit(jax.grad(lambda p: loss(nnx.merge(graph, p, rest))))(parameters))


def largest(tree):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def assert_close(one, other, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=1e-3), one, other)


def test_01_prior_queries_do_not_know_the_instruction(read, policy, batch):
    state = nnx.split(policy)[1]
    hidden, _, _ = read(state, batch)
    other, _, _ = read(state, {**batch, "tokens": batch["tokens"] % 10 + 1})
    assert (np.asarray(hidden["prior"]) == np.asarray(other["prior"])).all()
    assert (np.abs(hidden["posterior"] - other["posterior"]).max((1, 2)) > 1e-4).all()


def test_02_instruction_given_image_does_not_depend_on_the_queries(read, make_policy, batch):
    policy = make_policy()
    _, logits, _ = read(nnx.split(policy)[1], batch)
    policy.queries[...] = policy.queries[...] + 1.0
    _, other, _ = read(nnx.split(policy)[1], batch)
    assert (np.asarray(logits["posterior"]) == np.asarray(other["posterior"])).all()
    assert np.abs(logits["prior"] - other["prior"]).max() > 1e-3


@pytest.mark.parametrize("detach", [True, False])
def test_03_prior_flow_matching_trains_the_expert_only(policy, batch, detach):
    config = LossConfig(prior_weight=1.0, llr_weight=0.0, detach_prior=detach)
    found = gradient(policy, lambda policy: objective(policy, batch, KEY, config, initial_gate())[0])
    assert largest(found["expert"]) > 1e-3
    for name in ("vision", "trunk", "queries"):
        assert largest(found[name]) == 0 if detach else largest(found[name]) > 1e-5, name
    assert largest(found["words"]) == 0, "the prior's queries cannot see a word, detached or not"


def test_04_llr_has_the_gradient_of_the_language_loss_in_prior_order(policy, batch):
    tokens, mask = batch["tokens"], batch["token_mask"]

    def ratio(policy):
        readings = policy.encode(batch["images"], tokens, mask, BOTH)
        prior, posterior = (policy.word_logits(readings[name].predictors) for name in BOTH)
        return -log_likelihood_ratio(prior, posterior, tokens, mask, initial_gate())[0].ratio.mean()

    def cross_entropy(policy):
        reading = policy.encode(batch["images"], tokens, mask, ("prior",))["prior"]
        chosen = jax.nn.log_softmax(policy.word_logits(reading.predictors))
        each = jnp.stack(
            [
                -jnp.mean(jnp.stack([chosen[b, i, tokens[b, i]] for i in range(mask[b].sum())]))
                for b in range(len(tokens))
            ]
        )
        return each.mean()

    one, other = (gradient(policy, loss) for loss in (ratio, cross_entropy))
    assert largest(one["queries"]) > 1e-4 and largest(one["expert"]) == 0
    assert_close(one, other)


def test_05_llr_is_live_and_fails_loudly_when_no_sample_carries_it(policy, batch):
    graph, state = nnx.split(policy)
    run = jax.jit(lambda state, batch: objective(nnx.merge(graph, state), batch, KEY, LossConfig(), initial_gate()))
    loss, (terms, _) = run(state, batch)
    llr = terms["llr"]
    assert np.isfinite(float(loss)) and abs(float(llr.value)) > 1e-4
    assert float(llr.valid_fraction) == 1.0 and np.isclose(float(llr.weight), -0.1)
    assert np.isclose(float(llr.value), float(terms["llr_prior"].value - terms["llr_posterior"].value), atol=1e-6)
    assert np.isclose(float(loss), sum(float(term.weight * term.value) for term in terms.values()), atol=1e-5)
    check_terms(terms)
    one_empty = batch["token_mask"].copy()
    one_empty[0] = False
    check_terms(run(state, {**batch, "token_mask": one_empty})[1][0])
    loss, (terms, _) = run(state, {**batch, "token_mask": np.zeros_like(one_empty)})
    assert np.isfinite(float(loss)) and float(terms["llr"].valid_fraction) == 0 == float(terms["llr"].value)
    with pytest.raises(UserError, match="'llr'"):
        check_terms(terms)


def test_06_the_packed_pass_equals_two_passes(policy, batch):
    graph, state = nnx.split(policy)

    @jax.jit
    def both(state):
        policy = nnx.merge(graph, state)
        inputs = batch["images"], batch["tokens"], batch["token_mask"]
        packed = policy.encode(*inputs, BOTH)
        return packed, {name: policy.encode(*inputs, (name,))[name] for name in BOTH}

    packed, apart = both(state)
    mask = batch["token_mask"]
    for name in BOTH:
        np.testing.assert_allclose(packed[name].hidden, apart[name].hidden, atol=1e-5)
        np.testing.assert_allclose(packed[name].predictors[mask], apart[name].predictors[mask], atol=1e-5)


def test_07_without_prior_and_llr_it_is_the_queries_only_arm(policy, batch, noise_keys):
    config = LossConfig(prior_weight=0.0, llr_weight=0.0, noise_draws=2)

    def queries_only(policy):
        """The plain loss, written out without the project's loss code."""
        reading = policy.encode(batch["images"], batch["tokens"], batch["token_mask"])["posterior"]
        actions = policy.normalizer.normalize_action(batch["actions"])
        drawn = draw(noise_keys(KEY, 3), (2, 4, 3))
        time = drawn.time[..., None, None]
        x = (1 - time) * drawn.noise + time * actions[:, None]
        velocity = policy.velocity(x, drawn.time, policy.condition(reading, batch["state"]))
        error = ((velocity - (actions[:, None] - drawn.noise)) ** 2).mean((1, 3))
        return sum(error[b, :n].mean() for b, n in enumerate(batch["action_mask"][..., 0].sum(1))) / 3

    def full(policy):
        return objective(policy, batch, KEY, config, initial_gate())[0]

    graph, state = nnx.split(policy)
    losses = jax.jit(lambda state: (full(nnx.merge(graph, state)), queries_only(nnx.merge(graph, state))))(state)
    assert np.isclose(*losses, rtol=1e-5)
    one, other = (gradient(policy, loss) for loss in (full, queries_only))
    assert largest(one["queries"]) > 1e-5
    assert_close(one, other)


def test_08_flow_matching_runs_from_noise_to_data():
    random = np.random.default_rng(0)
    data, noise = (random.normal(size=shape).astype(np.float32) for shape in ((2, 4, 3), (2, 5, 4, 3)))
    time = np.tile(np.array([0.0, 1.0, 0.2, 0.5, 0.9], np.float32), (2, 1))
    asked = {}

    def exact(x, t):
        asked.update(x=x, t=t)
        return data[:, None] - noise

    errors = draw_errors(exact, data, np.ones((2, 4, 3), bool), Draw(noise, time))
    np.testing.assert_allclose(errors, 0, atol=1e-10)
    np.testing.assert_allclose(asked["x"][:, 0], noise[:, 0])
    np.testing.assert_allclose(asked["x"][:, 1], data)
    np.testing.assert_allclose(solve(lambda x, t: data - noise[:, 0], noise[:, 0], steps=4), data, atol=1e-5)
    assert abs(float(sample_time(KEY, (100_000,)).mean()) - 0.4) < 0.005


def test_09_padding_and_batch_order_change_nothing(read, policy, batch):
    state = nnx.split(policy)[1]
    hidden, _, llr = read(state, batch)
    grown = {
        **batch,
        "tokens": np.pad(np.where(batch["token_mask"], batch["tokens"], 7), ((0, 0), (0, 1))),
        "token_mask": np.pad(batch["token_mask"], ((0, 0), (0, 1))),
    }
    order = np.array([2, 0, 1])
    for changed, index in ((grown, np.arange(3)), (jax.tree.map(lambda x: x[order], batch), order)):
        new_hidden, _, new_llr = read(state, changed)
        for name in BOTH:
            np.testing.assert_allclose(new_hidden[name], hidden[name][index], atol=1e-5)
        np.testing.assert_allclose(new_llr.ratio, llr.ratio[index], atol=1e-5)
    assert np.ptp(llr.ratio) > 1e-3, "the samples differ, so order is visible"


@dataclasses.dataclass
class Mixture:
    """pi(a | l) = N(mean_l, deviation^2) with p(l) = weights: actions of two dimensions, one a chunk."""

    means: np.ndarray
    weights: np.ndarray
    deviation: float

    def field(self, labels=None):
        """E[a - noise | x_t], given the label of each sample or not."""

        def velocity(x, t):
            x = x[..., None, :]
            away = x - t * self.means
            variance = (1 - t) ** 2 + (t * self.deviation) ** 2
            responsibility = jax.nn.softmax(jnp.log(self.weights) - (away**2).sum(-1) / (2 * variance), -1)
            if labels is not None:
                responsibility = jax.nn.one_hot(labels, len(self.means))[:, None]
            each = self.means + (t * self.deviation**2 - (1 - t)) / variance * away
            return (responsibility[..., None] * each).sum(-2)

        return velocity

    def information(self, actions, labels):
        """log pi(a | l) - log p(a), exactly."""
        log = multivariate_normal.logpdf(actions[:, None], self.means, self.deviation**2 * np.eye(2))
        return np.asarray(log[np.arange(len(labels)), labels] - jax.nn.logsumexp(log + np.log(self.weights), axis=1))


@pytest.mark.parametrize("spread", [0.0, 0.3, 2.0])
def test_10_action_information_of_a_known_mixture(spread):
    random = np.random.default_rng(0)
    mixture = Mixture(spread * np.array([[1.0, 0], [0, 1], [-1, -1]]), np.array([0.2, 0.3, 0.5]), 0.3)
    labels = random.choice(3, 200, p=mixture.weights)
    actions = (mixture.means[labels] + 0.3 * random.normal(size=(200, 2))).astype(np.float32)
    known = mixture.information(actions, labels)
    likelihood = jax.jit(
        lambda *labels: relative_log_likelihood(mixture.field(*labels), actions[:, None], KEY, draws=2000)
    )
    estimate = np.asarray(likelihood(labels) - likelihood())
    if spread == 0:
        np.testing.assert_allclose(estimate, 0, atol=1e-4)
    else:
        assert known.mean() > 0.2 and abs(estimate.mean() - known.mean()) < 0.03
        assert np.abs(estimate - known).mean() < 0.15
