"""Robots of a mixture that have fewer action dimensions than the policy: what is missing counts, tells and learns
nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vla_jax.losses.flow_matching import Draw, draw, flow_matching
from vla_jax.losses.llr import initial_gate
from vla_jax.losses.objective import LossConfig, objective
from vla_jax.models.policy import Policy

KEY, WIDTHS = jax.random.key(0), (3, 1, 2)
EXISTS = np.arange(3) < np.array(WIDTHS)[:, None]
CONFIG = LossConfig(
    noise_draws=2, language_weight=0.2, reader_weight=0.3, reader_noise=True, pmi_weight=0.4, contrastive_weight=0.5
)


@pytest.fixture(scope="module")
def policy(make_policy):
    plain = make_policy()
    return Policy(dataclasses.replace(plain.config, read_actions=True), plain.facts, nnx.Rngs(0))


@pytest.fixture(scope="module")
def mixed(batch):
    """A sample of each robot."""
    return {**batch, "action_mask": batch["action_mask"] & EXISTS[:, None]}


def narrowed(policy, width):
    """The same policy for a robot of `width` dimensions, without padding."""
    cut = {name: getattr(policy.facts, name)[:width] for name in ("action_low", "action_high")}
    narrow = Policy(policy.config, dataclasses.replace(policy.facts, **cut), nnx.Rngs(0))
    corner = lambda mine, theirs: theirs[tuple(slice(size) for size in mine.shape)]  # noqa: E731
    nnx.update(narrow, jax.tree.map(corner, nnx.state(narrow), nnx.state(policy)))
    return narrow


@pytest.fixture(scope="module")
def run(policy):
    """batch -> (loss, terms), gradient."""
    graph, params, rest = nnx.split(policy, nnx.Param, ...)

    @jax.jit
    def run(params, batch):
        def loss(params):
            total, (terms, _) = objective(nnx.merge(graph, params, rest), batch, KEY, CONFIG, initial_gate())
            return total, terms

        return jax.value_and_grad(loss, has_aux=True)(params)

    return lambda batch: run(params, batch)


def test_what_is_missing_learns_nothing_and_tells_nothing(run, mixed):
    without = {**mixed, "action_mask": mixed["action_mask"] & (np.arange(3) < 2)}  # no robot has the third
    (loss, terms), gradient = run(without)
    expert, reader = (nnx.to_pure_dict(gradient)[name] for name in ("expert", "reader"))
    for found in (
        expert["head_out"]["kernel"].T, expert["head_out"]["bias"], expert["action_in"]["kernel"],
        reader["action"]["kernel"],
    ):  # fmt: skip
        assert (np.asarray(found[2]) == 0).all() and np.abs(found[:2]).max() > 1e-6
    other = {**without, "actions": np.where(without["action_mask"].any(1)[:, None], without["actions"], 7.0)}
    (same, same_terms), same_gradient = run(other)
    jax.tree.map(np.testing.assert_array_equal, (loss, terms, gradient), (same, same_terms, same_gradient))


def test_outputs_in_missing_dimensions_have_no_gradient(mixed):
    draws = draw(jax.random.split(KEY, 3), (2, 4, 3))

    def loss(outputs):
        return flow_matching(lambda x, t: outputs, mixed["actions"], mixed["action_mask"], draws).mean()

    counts = np.broadcast_to(mixed["action_mask"][:, None], (3, 2, 4, 3))
    gradient = np.asarray(jax.grad(loss)(jnp.ones((3, 2, 4, 3))))
    assert (gradient[~counts] == 0).all() and (gradient[counts] != 0).all()


def test_a_mixed_batch_has_the_mean_of_its_robots_own_losses(run, policy, mixed):
    """Both branches, each robot by a policy as narrow as it is, with the same noise in the dimensions that it has."""
    rows = jax.vmap(lambda row: jax.random.split(jax.random.fold_in(KEY, row), 5))(np.arange(3))
    losses = {"prior": [], "posterior": []}
    for row, width in enumerate(WIDTHS):
        graph, state = nnx.split(narrowed(policy, width))
        own = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], mixed)
        actions, mask = own["actions"][..., :width], own["action_mask"][..., :width]
        draws = [draw(rows[row : row + 1, index], (2, 4, 3)) for index in range(2)]

        @jax.jit
        def alone(state, own=own, actions=actions, mask=mask, draws=draws, graph=graph, width=width):
            narrow, found = nnx.merge(graph, state), {}
            readings = narrow.encode(own["images"], own["tokens"], own["token_mask"], ("prior", "posterior"))
            for name, drawn in zip(("posterior", "prior"), draws, strict=True):
                condition = narrow.condition(readings[name], own["state"])
                found[name] = flow_matching(
                    lambda x, t, condition=condition: narrow.velocity(x, t, condition),
                    narrow.normalizer.normalize_action(actions), mask, Draw(drawn.noise[..., :width], drawn.time),
                )[0]  # fmt: skip
            return found

        for name, value in alone(state).items():
            losses[name].append(float(value))
    (_, terms), _ = run(mixed)
    for name, own in losses.items():
        np.testing.assert_allclose(float(terms[f"fm_{name}"].value), np.mean(own), rtol=1e-5)
        assert np.ptp(own) > 1e-3


def test_the_policy_acts_as_one_without_padding(policy, mixed):
    """Whatever the noise holds in missing dimensions, it is the narrow policy's chunk, and 0 there (model units)."""
    noise = np.random.default_rng(0).normal(size=(3, 4, 3)).astype(np.float32)

    @jax.jit
    def sampled(policy, noise, dimensions):
        reading = policy.encode(mixed["images"], mixed["tokens"], mixed["token_mask"])["posterior"]
        return policy.sample(policy.condition(reading, mixed["state"], dimensions), noise, steps=3)

    found = sampled(policy, noise, EXISTS)
    assert (np.asarray(found)[np.broadcast_to(~EXISTS[:, None], found.shape)] == 0).all()
    for row, width in enumerate(WIDTHS):
        narrow = sampled(narrowed(policy, width), noise[..., :width], None)
        np.testing.assert_allclose(found[row, :, :width], narrow[row], atol=1e-5)
    np.testing.assert_array_equal(sampled(policy, np.where(EXISTS[:, None], noise, 9.0), EXISTS), found)
    assert np.abs(sampled(policy, noise, None) - found)[1, :, :1].max() > 1e-3, "else what is missing would be seen"
    seen = {"images": mixed["images"], "state": mixed["state"]}
    act = jax.jit(lambda policy, seen: policy.act(seen, mixed["tokens"], mixed["token_mask"], KEY))
    plain, told = (np.asarray(act(policy, part)) for part in (seen, {**seen, "dimensions": EXISTS}))
    np.testing.assert_allclose(plain[0], told[0], atol=1e-5)
    assert np.abs(plain - told)[1, :, :1].max() > 1e-4
