"""Measures of listening: on policies whose law is known in closed form, and on the real table."""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vla_jax.data import tokenizer as tokenizers
from vla_jax.envs.bias import BiasConfig, closed_form_entropy
from vla_jax.envs.env import EnvConfig, Tabletop
from vla_jax.envs.sampling import SceneConfig
from vla_jax.envs.splits import make_alternatives
from vla_jax.errors import UserError
from vla_jax.evaluation import listening
from vla_jax.evaluation.evaluate import EvalConfig, World
from vla_jax.evaluation.listening import Candidates, ask, make_candidates, measure, summarize
from vla_jax.models.expert import ExpertConfig
from vla_jax.models.keypoints import KeypointConfig
from vla_jax.models.policy import Instruction, Policy, PolicyConfig, Reading
from vla_jax.models.trunk import TrunkConfig
from vla_jax.training.checkpoints import policy_facts

SCENES, TARGETS, CHUNK, SCALE = 40, 3, 4, 10.0  # 1 in model units is 0.1 m
CONFIG = EvalConfig(seed=1)
LAW = np.array([0.9, 0.07, 0.03])


@functools.cache
def candidates():
    """Targets on a small table, and an expert that goes straight there; word 1 + number names a scene's target."""
    random = np.random.default_rng(0)
    position = random.uniform(-0.08, 0.08, (SCENES, TARGETS, 2)).astype(np.float32)
    chunks = np.zeros((SCENES, TARGETS, CHUNK, 5), np.float32)
    chunks[..., :2] = position[:, :, None] / CHUNK
    words = 1 + np.arange(SCENES * TARGETS, dtype=np.int32).reshape(SCENES, TARGETS, 1)
    law = random.permuted(np.tile(LAW, (SCENES, 1)), axis=1)
    return Candidates(
        images={"front": np.zeros((SCENES, 2, 2, 3), np.uint8)},
        state=np.zeros((SCENES, 6), np.float32),
        tokens=np.concatenate([words, words * 0], -1),
        token_mask=np.tile([True, False], (SCENES, TARGETS, 1)),
        chunks=chunks,
        target_law=law,
        log_probability=np.log(law),
        position=position,
    )


class Known(nnx.Module):
    """Under word w, actions are Gaussian around chunk w of a table; words are drawn by a table of logits.

    The prior branch, where there is one, goes to the middle of the scene's targets.
    """

    normalizer = SimpleNamespace(
        normalize_action=lambda action: action * SCALE, denormalize_action=lambda action: action / SCALE
    )

    def __init__(self, chunks, deviation, logits=None, queries=None):
        means = SCALE * np.asarray(chunks).reshape(-1, CHUNK, 5)
        middle = np.repeat(means.reshape(-1, TARGETS, CHUNK, 5).mean(1), TARGETS, 0)
        logits = np.zeros((len(means), len(means))) if logits is None else logits
        for name, value in {"means": means, "middle": middle, "logits": logits, "deviation": deviation}.items():
            setattr(self, name, nnx.Param(jnp.asarray(value, jnp.float32)))
        self.queries = queries

    config = SimpleNamespace(reasoning=0)

    def encode(self, images, tokens, token_mask, branches):
        row = tokens[:, 0] - 1
        predictors = jnp.broadcast_to(self.logits[...][row, None], (*tokens.shape, self.logits.shape[1]))
        tables = {"prior": self.middle, "posterior": self.means}
        return {name: Reading(tables[name][...][row], None, predictors) for name in branches}

    def condition(self, reading, state, dimensions=None):
        return reading.hidden

    def word_logits(self, predictors):
        padding = jnp.full((*predictors.shape[:-1], 1), -jnp.inf)
        return jnp.concatenate([padding, predictors], -1)

    def field(self, mean):
        deviation = self.deviation[...]

        def velocity(x, t):
            variance = (1 - t) ** 2 + (t * deviation) ** 2
            return mean + (t * deviation**2 - (1 - t)) / variance * (x - t * mean)

        return velocity


def found(policy, config=CONFIG, exact=False):
    return summarize(candidates(), ask(policy, candidates(), config, exact=exact))


def closed_form_pmi(chunks, deviation):
    """The expert's chunks are the means of the policy's Gaussians when the policy is told the same."""
    data, means = (SCALE * np.asarray(part).reshape(SCENES, TARGETS, -1) for part in (candidates().chunks, chunks))
    gaps = np.square(data[:, :, None] - means[:, None]).sum(-1) / (2 * deviation**2)  # [B, chunk, instruction]
    likelihood, law = np.exp(-gaps), candidates().target_law
    true = np.diagonal(likelihood, axis1=1, axis2=2)
    return float((law * np.log(true / (likelihood * law[:, None]).sum(2))).sum(1).mean())


def test_a_policy_that_listens():
    measures = found(Known(candidates().chunks, 0.02))
    entropy = -(LAW * np.log(LAW)).sum()
    assert measures["identification"] == 1 and measures["identification_se"] == 0
    assert measures["target_entropy"] == pytest.approx(entropy) and measures["target_entropy_se"] < 1e-6
    assert measures["pmi"] == pytest.approx(entropy, abs=0.02) and measures["pmi"] <= entropy + 1e-6
    assert measures["sensitivity"] == pytest.approx(1, abs=1e-3)
    assert "pmi_prior" not in measures


def test_a_deaf_policy():
    one = np.repeat(candidates().chunks[:, :1], TARGETS, 1)
    measures = found(Known(one, 0.02))
    assert measures["identification"] == pytest.approx(1 / TARGETS)
    assert measures["pmi"] == pytest.approx(0, abs=1e-4)
    assert measures["sensitivity"] == 0


class Muttering(Known):
    """Says the word that it was told to itself, and acts on what it was told, or on what it says."""

    config = SimpleNamespace(reasoning=1)

    def __init__(self, *arguments, heeds):
        super().__init__(*arguments)
        self.acts_on = -1 if heeds else 0

    def reason(self, images, tokens, token_mask):
        return Instruction(tokens[:, [0, 0]], token_mask[:, [0, 0]])

    def read(self, images, tokens, token_mask, branches):
        return super().encode(images, tokens[:, [self.acts_on]], token_mask, branches)


@pytest.mark.parametrize("heeds", [True, False])
def test_a_policy_that_talks_to_itself(heeds):
    measures = found(Muttering(candidates().chunks, 0.02, heeds=heeds))
    assert measures["sensitivity"] == pytest.approx(1, abs=1e-3)
    assert measures["heeding"] == pytest.approx(float(heeds), abs=1e-3)
    assert "heeding" not in found(Known(candidates().chunks, 0.02))


def test_a_policy_that_takes_every_word_for_another():
    wrong = np.roll(candidates().chunks, 1, axis=1)
    measures, expected = found(Known(wrong, 0.2)), closed_form_pmi(wrong, 0.2)
    assert expected < -1 and measures["pmi"] == pytest.approx(expected, abs=0.05)
    assert measures["identification"] < 0.05
    assert measures["sensitivity"] > 0.5, "it is moved by the words all the same"


@pytest.mark.parametrize("deviation", [0.2, 0.5, 1.0])
def test_the_estimate_is_the_exact_density_and_the_closed_form(deviation):
    policy, expected = Known(candidates().chunks, deviation), closed_form_pmi(candidates().chunks, deviation)
    assert 0.01 < expected < 0.4
    exact, cheap = found(policy, exact=True), found(policy)
    assert exact["pmi"] == pytest.approx(expected, abs=2e-3)
    assert cheap["pmi"] == pytest.approx(expected, abs=0.05)
    assert exact["identification"] == 1 and cheap["identification"] > 0.9
    assert cheap["pmi_se"] == pytest.approx(exact["pmi_se"], rel=0.5)


def test_guidance_decides_by_which_field_it_is_measured():
    policy = Known(candidates().chunks, 0.02, queries=8)
    listens = found(policy)
    deaf, more = (found(policy, dataclasses.replace(CONFIG, guidance=w)) for w in (0.0, 2.0))
    assert listens["identification"] == 1 and deaf["identification"] == pytest.approx(1 / TARGETS)
    assert deaf["pmi"] == pytest.approx(0, abs=1e-4) and deaf["pmi_prior"] == pytest.approx(0, abs=1e-4)
    assert deaf["sensitivity"] == 0 and more["sensitivity"] == pytest.approx(2 * listens["sensitivity"], rel=1e-3)
    # The prior branch goes to the middle: the words tell the more, the further the targets lie from it.
    data = SCALE * np.asarray(candidates().chunks)
    gaps = np.square(data - data.mean(1, keepdims=True)).sum((2, 3)) / (2 * 0.02**2)
    assert listens["pmi_prior"] == pytest.approx((candidates().target_law * gaps).sum(1).mean(), rel=0.1)


def test_the_calibration_gap_is_the_divergence_of_the_language_head():
    chunks, law = candidates().chunks, candidates().target_law
    knows = np.full((SCENES, TARGETS, SCENES, TARGETS), -np.inf)
    knows[np.arange(SCENES), :, np.arange(SCENES)] = np.log(law)[:, None]
    size = SCENES * TARGETS
    assert found(Known(chunks, 0.1, knows.reshape(size, size)))["calibration_gap"] == pytest.approx(0, abs=1e-5)
    guesses = found(Known(chunks, 0.1))["calibration_gap"]
    assert guesses == pytest.approx(np.log(size) + (LAW * np.log(LAW)).sum(), rel=1e-5)


def test_targets_that_are_never_asked_for_do_not_count():
    law = np.tile([1.0, 0.0, 0.0], (SCENES, 1))
    with np.errstate(divide="ignore"):
        sure = dataclasses.replace(candidates(), target_law=law, log_probability=np.log(law))
    measures = summarize(sure, ask(Known(sure.chunks, 0.02), sure, CONFIG))
    assert measures["pmi"] == measures["target_entropy"] == 0
    assert measures["calibration_gap"] == pytest.approx(np.log(SCENES * TARGETS), rel=1e-5)


def test_checkpoints_of_one_architecture_share_a_program():
    policies = [Known(candidates().chunks * speed, 0.3) for speed in (1.0, 0.5)]
    found(policies[0])
    compiled = listening._ask._cache_size()
    assert found(policies[1])["sensitivity"] == pytest.approx(0.5, abs=1e-3)
    assert listening._ask._cache_size() == compiled


@pytest.fixture(scope="module")
def table(make_contract):
    contract = make_contract(coupling="uniqueness")
    return contract, jax.device_get(make_candidates(contract, CONFIG, 8, 20))


def test_candidates_are_what_may_be_asked_of_each_scene(table):
    contract, cases = table
    bias = BiasConfig("uniqueness", 0.1)
    scene, commands = jax.device_get(make_alternatives("reach", bias, CONFIG.seed, 20, SceneConfig(3)))
    env = Tabletop(EnvConfig(task="reach", image_size=16))
    first = jax.tree.map(lambda leaf: leaf[:, 0], commands)
    seen = jax.device_get(jax.jit(lambda: env.observe(env.reset(scene, first, first)))())
    jax.tree.map(np.testing.assert_array_equal, seen["images"], cases.images)
    np.testing.assert_allclose(seen["state"], cases.state, atol=1e-6)
    marked = np.take_along_axis(cases.target_law, scene.movable[:, :3].argmax(1)[:, None], 1)
    np.testing.assert_allclose(cases.target_law.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(marked, 0.9 + 0.1 / 3, rtol=1e-5)
    tokenizer = tokenizers.from_json(contract.tokenizer)
    said = {tuple(tokenizer.decode(row).split()) for row in cases.tokens.reshape(60, -1)}
    assert len(said) > 30 and all(sentence[0] in ("reach", "touch", "move", "go") for sentence in said)
    assert (cases.log_probability < np.log(cases.target_law / 4) + 1e-5).all(), "one of four templates and a name"


def test_the_expert_goes_to_its_target(table):
    _, cases = table
    ends = cases.chunks[..., :2].sum(2)
    goals = cases.position - cases.state[:, None, :2]
    assert np.linalg.norm(ends - goals, axis=-1).mean() < 0.03
    assert 0.8 < listening._sensitivity(cases, ends).mean() < 1.2


def make_policy(contract, conditioning):
    config = PolicyConfig(
        encoder="keypoints",
        keypoints=KeypointConfig(points=2, patch=8, hidden=4),
        trunk=TrunkConfig(width=16, depth=1, heads=2, kv_heads=1, head_width=8, hidden=24),
        expert=ExpertConfig(width=16, depth=2, heads=2, hidden=24, head=16),
        queries=2,
        conditioning=conditioning,
    )
    return Policy(config, policy_facts(contract), nnx.Rngs(0))


def test_one_call_measures_a_policy(table):
    contract, _ = table
    measures = measure(make_policy(contract, "queries"), contract, CONFIG, scenes=20)
    names = ("identification", "pmi", "pmi_prior", "target_entropy", "calibration_gap", "sensitivity")
    assert set(measures) == {name + end for name, end in itertools.product(names, ("", "_se"))}
    assert all(np.isfinite(value) for value in measures.values())
    assert measures["target_entropy"] == pytest.approx(closed_form_entropy(3, 0.1), rel=1e-4)
    world = World.of(contract, CONFIG)  # as for a policy that learned from unbiased data and is judged on biased ones
    world = dataclasses.replace(world, bias=dataclasses.replace(world.bias, rho=0.5))
    law = make_candidates(contract, CONFIG, 8, 20, world).target_law
    assert -(law * np.log(law)).sum(1).mean() == pytest.approx(closed_form_entropy(3, 0.5), rel=1e-4)
    assert measures["calibration_gap"] > 5, "it has not learned to speak"


def test_the_baseline_has_no_prior_branch(table):
    contract, cases = table
    policy = make_policy(contract, "tokens")
    measures = summarize(cases, ask(policy, cases, CONFIG))
    assert "pmi_prior" not in measures and all(np.isfinite(value) for value in measures.values())
    with pytest.raises(UserError, match="no prior branch"):
        ask(policy, cases, dataclasses.replace(CONFIG, guidance=1.5))
