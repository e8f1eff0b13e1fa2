"""The branch that reads the instruction without the picture, and what the two likelihoods say of biased data."""

import jax
import numpy as np
from flax import nnx

from vla_jax.losses.information import likelihoods
from vla_jax.losses.objective import LossConfig

KEY = jax.random.key(0)


def test_the_words_branch_does_not_see_the_picture(policy, batch):
    graph, state = nnx.split(policy)

    @jax.jit
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


def biased(random, size, share):
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
        "action_mask": np.ones((size, 4, 3), bool),
    }, bright == word


def test_the_two_likelihoods_tell_what_the_picture_gives_away(policy, fit):
    """p(l | v) = .9 or .1 and p(l) = .5: the picture tells ln 1.8 nats of the usual words, ln .2 of the unusual."""
    config = LossConfig(flow=False, prior_weight=0.0, llr_weight=0.0, language_weight=1.0, words_weight=1.0)
    random = np.random.default_rng(0)
    trained, history = fit(policy, config, ((biased(random, 64, 0.9)[0], KEY) for _ in range(300)))
    assert set(history[-1]) == {"language", "words"}, "no actions are learned"

    batch, usual = biased(random, 256, 0.9)
    readings = trained.encode(batch["images"], batch["tokens"], batch["token_mask"], ("posterior", "words"))
    seen, alone = (likelihoods(trained, readings[name], batch["tokens"]) for name in ("posterior", "words"))
    information = np.asarray((seen - alone).sum(-1))
    assert abs(information[usual].mean() - np.log(1.8)) < 0.15
    assert abs(information[~usual].mean() - np.log(0.2)) < 0.4
