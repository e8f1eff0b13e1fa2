"""A policy small enough to compile in a second, and a batch for it."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from vla_jax.losses.llr import initial_gate
from vla_jax.losses.objective import objective
from vla_jax.models.expert import ExpertConfig
from vla_jax.models.normalizer import DataFacts
from vla_jax.models.policy import Policy, PolicyConfig
from vla_jax.models.trunk import TrunkConfig
from vla_jax.models.vision import VisionConfig

FACTS = DataFacts(
    vocabulary=11,
    max_tokens=6,
    image_size=16,
    action_low=(-0.1, -0.2, 0.0),
    action_high=(0.1, 0.3, 0.5),
    state_low=(-1.0, 0.0),
    state_high=(1.0, 4.0),
)
CONFIG = PolicyConfig(
    vision=VisionConfig(patch=4, merge=2, width=8, depth=1, heads=2, hidden=16),
    trunk=TrunkConfig(width=16, depth=2, heads=2, kv_heads=1, head_width=8, hidden=24),
    expert=ExpertConfig(width=16, depth=2, heads=2, hidden=24, head=16, future_tokens=2),
    queries=3,
    chunk=4,
)


@functools.cache
def made(conditioning):
    config = dataclasses.replace(CONFIG, conditioning=conditioning)
    graph = nnx.split(nnx.eval_shape(lambda: Policy(config, FACTS, nnx.Rngs(0))))[0]
    return graph, jax.jit(lambda: nnx.split(Policy(config, FACTS, nnx.Rngs(0)))[1])()


@pytest.fixture(scope="session")
def noise_keys():
    """(key, samples) -> the keys of the posterior's noise and times, as the objective makes them."""
    return lambda key, samples: jax.vmap(lambda row: jax.random.split(jax.random.fold_in(key, row), 5)[0])(
        np.arange(samples)
    )


@pytest.fixture(scope="session")
def make_policy():
    """A new policy with the same parameters at each call."""

    # Copies: a test may set the variables of its policy.
    return lambda conditioning="queries": nnx.merge(*made(conditioning), copy=True)


@pytest.fixture(scope="session")
def policy(make_policy):
    return make_policy()


@pytest.fixture(scope="session")
def batch():
    size, text, random = 3, 5, np.random.default_rng(0)
    mask = np.arange(text) < np.array([[2], [5], [4]])
    return {
        "images": {view: random.integers(0, 256, (size, 16, 16, 3), dtype=np.uint8) for view in ("front", "wrist")},
        "state": random.uniform(-1, 1, (size, 2)).astype(np.float32),
        "tokens": np.where(mask, random.integers(1, 11, (size, text)), 0).astype(np.int32),
        "token_mask": mask,
        "actions": random.uniform(-0.1, 0.3, (size, 4, 3)).astype(np.float32),
        "action_mask": np.repeat((np.arange(4) < np.array([[4], [1], [3]]))[..., None], 3, -1),
    }


def word_and_action(random, size, keep):
    """One dark scene, one of two words, and an action that says which with probability `keep` (1/2: nothing)."""
    word = random.integers(0, 2, size)
    told = np.where(random.random(size) < keep, word, 1 - word)
    low, high = np.array(FACTS.action_low), np.array(FACTS.action_high)
    inside = np.broadcast_to((2.0 * told - 1)[:, None, None], (size, 4, 3))
    return {
        "images": {view: np.zeros((size, 16, 16, 3), np.uint8) for view in ("front", "wrist")},
        "state": np.zeros((size, 2), np.float32),
        "tokens": np.stack([word + 4, np.full(size, 3)], 1).astype(np.int32),
        "token_mask": np.ones((size, 2), bool),
        "actions": ((inside + 1) / 2 * (high - low) + low).astype(np.float32),
        "action_mask": np.ones((size, 4, 3), bool),
    }


@pytest.fixture(scope="session")
def synthetic():
    """(random, size, keep) -> a batch whose information between word and action is known."""
    return word_and_action


@pytest.fixture(scope="session")
def fit():
    """(policy, config, [(batch, key), ...]) -> the policy after an Adam step on each, and the terms of every step."""

    def fit(policy, config, steps):
        graph, params, rest = nnx.split(policy, nnx.Param, ...)
        optimizer = optax.adam(3e-3)

        def loss(params, batch, key):
            return objective(nnx.merge(graph, params, rest), batch, key, config, initial_gate())

        @jax.jit
        def step(params, opt_state, batch, key):
            (_, (terms, _)), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
            updates, opt_state = optimizer.update(gradient, opt_state)
            return optax.apply_updates(params, updates), opt_state, terms

        opt_state, history = optimizer.init(params), []
        for batch, key in steps:
            params, opt_state, terms = step(params, opt_state, batch, key)
            history.append(terms)
        return nnx.merge(graph, params, rest), history

    return fit
