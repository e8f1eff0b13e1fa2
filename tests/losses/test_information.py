"""What the action tells about the instruction: the branch that reads actions, and the estimates made with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vla_jax.errors import UserError
from vla_jax.losses.information import predicted_chunk, read_back, recorded_chunk
from vla_jax.losses.llr import initial_gate
from vla_jax.losses.objective import LossConfig, objective
from vla_jax.models.policy import Chunk, Policy

ALL = ("prior", "posterior", "action")
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def policy(make_policy):
    plain = make_policy()
    return Policy(dataclasses.replace(plain.config, read_actions=True), plain.facts, nnx.Rngs(0))


@pytest.fixture(scope="module")
def chunk():
    random = np.random.default_rng(2)
    return Chunk(random.normal(size=(3, 4, 3)).astype(np.float32), np.array([1.0, 0.3, 0.6], np.float32))


@pytest.fixture(scope="module")
def read(policy):
    """(batch, chunk) -> word logits of all branches, packed."""
    graph, state = nnx.split(policy)

    @jax.jit
    def packed(state, batch, chunk):
        policy = nnx.merge(graph, state)
        readings = policy.encode(batch["images"], batch["tokens"], batch["token_mask"], ALL, chunk)
        return {name: policy.word_logits(reading.predictors) for name, reading in readings.items()}

    return lambda batch, chunk: packed(state, batch, chunk)


def test_the_branches_packed_are_the_branches_alone(policy, read, batch, chunk):
    packed, valid = read(batch, chunk), batch["token_mask"]
    graph, state = nnx.split(policy)
    for name in ALL:

        @jax.jit
        def alone(state, name=name):
            policy = nnx.merge(graph, state)
            reading = policy.encode(
                batch["images"], batch["tokens"], valid, (name,), chunk if name == "action" else None
            )
            return policy.word_logits(reading[name].predictors)

        np.testing.assert_allclose(alone(state)[valid], packed[name][valid], atol=1e-5)


def test_only_the_action_branch_knows_the_actions(read, batch, chunk):
    base = read(batch, chunk)
    for other in (chunk._replace(actions=chunk.actions + 1.0), chunk._replace(time=chunk.time / 2)):
        moved = read(batch, other)
        change = {name: np.abs(moved[name] - base[name])[batch["token_mask"]].max() for name in ALL}
        assert change["prior"] == change["posterior"] == 0 and change["action"] > 1e-4
    # the first word is predicted from an action, so it sees the last action and the first
    late = chunk._replace(actions=chunk.actions + np.eye(4, dtype=np.float32)[3][:, None])
    assert np.abs(read(batch, late)["action"] - base["action"])[:, 0].max() > 1e-5


def test_a_recorded_chunk_is_clean_or_on_the_path():
    actions = np.random.default_rng(0).normal(size=(500, 4, 3)).astype(np.float32)
    everything, keys = np.ones((500, 3), bool), jax.random.split(KEY, 500)
    clean, noised = (recorded_chunk(actions, everything, keys, noised) for noised in (False, True))
    np.testing.assert_array_equal(clean.actions, actions)
    assert (np.asarray(clean.time) == 1).all() and abs(float(noised.time.mean()) - 0.4) < 0.05
    noise = (noised.actions - noised.time[:, None, None] * actions) / (1 - noised.time)[:, None, None]
    assert abs(float(noise.std()) - 1) < 0.1


def test_the_policy_is_judged_by_a_reader_that_does_not_learn_from_it(policy, batch):
    graph, params, rest = nnx.split(policy, nnx.Param, ...)

    def aimed(params):
        policy = nnx.merge(graph, params, rest)
        reading = policy.encode(batch["images"], batch["tokens"], batch["token_mask"])["posterior"]
        condition = policy.condition(reading, batch["state"])
        actions = policy.normalizer.normalize_action(batch["actions"])
        chunk = predicted_chunk(policy, condition, actions, jax.random.split(KEY, len(actions)))
        return read_back(policy, chunk, batch, batch["token_mask"]).sum()

    gradient = nnx.to_pure_dict(jax.jit(jax.grad(aimed))(params))
    largest = {name: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(part)) for name, part in gradient.items()}
    assert largest["reader"] == 0
    assert all(largest[name] > 1e-6 for name in ("expert", "trunk", "queries", "vision"))


@pytest.mark.parametrize("keep", [0.9, 0.5])
def test_the_estimate_converges_to_the_information(policy, fit, synthetic, keep):
    """I(l; a | v) = ln 2 - H(keep) for two equally likely words; 0 when the action says nothing."""
    config = LossConfig(prior_weight=0.0, llr_weight=0.0, language_weight=1.0, reader_weight=1.0, noise_draws=1)
    random = np.random.default_rng(0)
    _, history = fit(policy, config, ((synthetic(random, 64, keep), KEY) for _ in range(300)))
    found = [float(terms["information"].value) for terms in history]
    expected = np.log(2) + keep * np.log(keep) + (1 - keep) * np.log(1 - keep)
    assert abs(np.mean(found[-100:]) - expected) < 0.06, (np.mean(found[-100:]), expected)


def test_every_term_is_there_and_has_its_weight(policy, batch):
    config = LossConfig(language_weight=0.2, reader_weight=0.3, reader_noise=True, pmi_weight=0.4)
    graph, state = nnx.split(policy)
    loss, (terms, _) = jax.jit(lambda s: objective(nnx.merge(graph, s), batch, KEY, config, initial_gate()))(state)
    weights = {name: round(float(term.weight), 6) for name, term in terms.items()}
    assert (weights["language"], weights["reader"], weights["pmi"], weights["information"]) == (0.2, 0.3, -0.4, 0.0)
    assert np.isclose(float(loss), sum(float(term.weight * term.value) for term in terms.values()), atol=1e-5)
    assert all(float(term.valid_fraction) == 1 for term in terms.values())


def test_what_cannot_be_learned_is_refused(make_policy, batch):
    with pytest.raises(UserError, match="reader_weight needs loss.language_weight"):
        LossConfig(reader_weight=0.1)
    with pytest.raises(UserError, match="pmi_weight needs loss.reader_weight"):
        LossConfig(language_weight=0.1, pmi_weight=0.1)
    config = LossConfig(language_weight=0.1, reader_weight=0.1)
    with pytest.raises(UserError, match="set policy.read_actions = true"):
        objective(make_policy(), batch, KEY, config, initial_gate())
