"""Likelihood of actions under a policy whose flow is known in closed form; likelihood of instructions."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from vla_jax.analysis.likelihood import (
    action_log_likelihood,
    explain,
    first_chunks,
    guidance_curve,
    instruction_log_likelihood,
)

CHUNK, WIDTH, PRIOR, POSTERIOR = 2, 3, (0.0, 1.0), (0.8, 0.4)  # mean and deviation of every number of a chunk


class KnownPolicy(nnx.Module):
    """Actions are Gaussian: narrow and off the middle with the words, wide without. Units: 1 inside is 0.1 outside."""

    normalizer = SimpleNamespace(normalize_action=lambda action: action * 10)

    def conditions(self, observation, tokens, token_mask, guidance=None):
        return {"prior": PRIOR, "posterior": POSTERIOR}

    def field(self, condition):
        mean, deviation = condition

        def velocity(x, t):
            variance = (1 - t) ** 2 + (t * deviation) ** 2
            return mean + (t * deviation**2 - (1 - t)) / variance * (x - t * mean)

        return velocity


def make_batch(seed, count=4000):
    mean, deviation = POSTERIOR
    actions = np.random.default_rng(seed).normal(mean, deviation, (count, CHUNK, WIDTH)).astype(np.float32) / 10
    unused = dict.fromkeys(("images", "state", "tokens", "token_mask", "episode"))
    return {**unused, "actions": actions, "action_mask": np.ones_like(actions, bool)}


def gaussian(x, mean, deviation):
    return (-0.5 * ((x - mean) / deviation) ** 2 - np.log(deviation * np.sqrt(2 * np.pi))).sum((1, 2))


@pytest.mark.parametrize("guidance, law", [(None, POSTERIOR), (1.0, POSTERIOR), (0.0, PRIOR)])
def test_likelihood_is_exact(guidance, law):
    batch = make_batch(0, 50)
    found = jax.jit(lambda batch: action_log_likelihood(KnownPolicy(), batch, guidance, steps=32))(batch)
    np.testing.assert_allclose(found, gaussian(10 * batch["actions"], *law), atol=2e-2)


def test_the_difference_of_the_branches_is_the_information():
    """E[log pi(a | v, l) - log p(a | v)] is the Kullback-Leibler divergence of the two Gaussians."""
    batch = make_batch(1)
    with_words, without = (action_log_likelihood(KnownPolicy(), batch, w) for w in (1.0, 0.0))
    (m, s), (m0, s0) = POSTERIOR, PRIOR
    expected = CHUNK * WIDTH * (np.log(s0 / s) + (s**2 + (m - m0) ** 2) / (2 * s0**2) - 0.5)
    assert abs(float((with_words - without).mean()) - expected) < 0.1


def test_the_right_guidance_is_found_without_a_test_scene():
    best, curve = guidance_curve(KnownPolicy(), [make_batch(2, 500), make_batch(3, 500)], (0.0, 0.5, 1.0, 1.5, 2.0))
    assert best == 1.0 and curve.shape == (5,) and (np.diff(curve[:3]) > 0).all() and (np.diff(curve[2:]) < 0).all()


class TellingPolicy(KnownPolicy):
    """Told the word w, it acts around w / 2; the noise decides the rest."""

    def conditions(self, observation, tokens, token_mask, guidance=None):
        return {"posterior": (tokens[:, :1, None] / 2, 0.5)}

    def act(self, observation, tokens, token_mask, key):
        return (tokens[:, :1, None] / 2 + 0.5 * jax.random.normal(key, (1, CHUNK, WIDTH))) / 10


def test_an_instruction_explains_the_actions_that_follow_it():
    observation = {"images": {}, "state": np.zeros((1, 1), np.float32)}
    tokens = np.array([[0], [2], [4]], np.int32)
    policy, mask, key = TellingPolicy(), np.ones((3, 1), bool), jax.random.key(0)
    chunks = np.asarray(first_chunks(policy, observation, tokens, mask, key))
    assert chunks.shape == (3, CHUNK, WIDTH)
    np.testing.assert_allclose(chunks[1] - chunks[0], 0.1, atol=1e-5)  # the same noise
    values = np.asarray(explain(policy, observation, chunks[:2], tokens, mask, steps=32))
    expected = [[gaussian(10 * chunk[None], word / 2, 0.5)[0] for word in (0, 2, 4)] for chunk in chunks[:2]]
    np.testing.assert_allclose(values, expected, atol=5e-2)
    assert (values.argmax(1) == [0, 1]).all()


@pytest.mark.parametrize("branch", ["posterior", "prior"])
def test_the_instructions_of_one_length_have_probability_one(make_policy, observation, branch):
    words = np.array([[first, second] for first in range(5) for second in range(5)], np.int32)
    both = instruction_log_likelihood(make_policy(), observation, words, np.ones_like(words, bool), branch)
    first = instruction_log_likelihood(
        make_policy(), observation, words, np.array([[True, False]]).repeat(25, 0), branch
    )
    np.testing.assert_allclose(np.exp(both).sum(), 1, rtol=1e-4)
    # The second word is summed out.
    np.testing.assert_allclose(np.exp(both).reshape(5, 5).sum(1), np.exp(first[::5]), rtol=1e-4)
    assert np.ptp(first[::5]) > 1e-3
