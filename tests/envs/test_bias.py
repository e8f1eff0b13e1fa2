"""The law of commands given the scene, against counts, sums and the closed form."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vla_jax.envs import bias as bias_law
from vla_jax.envs.bias import BACKGROUND_PAIRS, COUPLINGS, HELD_OUT_PAIRS, BiasConfig, closed_form_entropy
from vla_jax.envs.commands import valid_commands
from vla_jax.envs.sampling import SceneConfig, sample_command, sample_episode
from vla_jax.envs.scene import COLORS, NUM_TRAIN_BACKGROUNDS, SHAPES
from vla_jax.errors import UserError

EPISODES = 3000


# Compiling is what takes time here: the tests share few programs.
valid_commands = jax.jit(valid_commands, static_argnums=0)


@functools.cache
def draw(coupling, objects=3):
    """Push episodes at rho = 0.1."""

    def episode(key):
        return sample_episode(key, "push", BiasConfig(coupling, 0.1), SceneConfig(objects))

    return jax.jit(jax.vmap(episode))(jax.random.split(jax.random.key(1), EPISODES))


@functools.partial(jax.jit, static_argnums=1)
def law(scene, bias):
    """Commands, their probabilities, the entropies of target and of command."""
    commands, probability = bias_law.command_distribution("push", scene, bias)
    entropies = bias_law.target_entropy("push", scene, bias), bias_law.entropy("push", scene, bias)
    return commands, probability, *entropies


def test_closed_form_has_the_published_values():
    known = {0: 0.0, 0.01: 0.045, 0.02: 0.080, 0.05: 0.169, 0.1: 0.291, 0.3: 0.639, 1: 1.099}
    for rho, value in known.items():
        assert closed_form_entropy(3, rho) == pytest.approx(value, abs=6e-4)
    assert closed_form_entropy(2, 1) == pytest.approx(math.log(2))


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("rho", [0.0, 0.1, 1.0])
def test_target_entropy_is_the_closed_form_in_every_scene(coupling, rho):
    scene, _, _ = draw(coupling)
    np.testing.assert_allclose(law(scene, BiasConfig(coupling, rho))[2], closed_form_entropy(3, rho), atol=1e-5)


def test_closed_form_holds_for_another_number_of_objects():
    scene, _, _ = draw("salience", objects=2)
    np.testing.assert_allclose(law(scene, BiasConfig("salience", 0.2))[2], closed_form_entropy(2, 0.2), atol=1e-5)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_the_law_is_that_of_the_text(coupling):
    """Computed again, scene by scene, in plain Python."""
    scene, _, cue = jax.tree.map(np.asarray, draw(coupling))
    commands, probability, _, _ = jax.tree.map(np.asarray, law(scene, BiasConfig(coupling, 0.3)))
    valid = np.asarray(valid_commands("push", scene)[1])
    np.testing.assert_allclose(probability.sum(-1), 1.0, atol=1e-5)
    for row in range(50):
        targets, ok = commands.target[row], valid[row]
        expected = np.zeros(len(ok))
        for index in np.flatnonzero(ok):
            named = targets[index] == cue.target[row]
            expected[index] = (0.7 * named + 0.3 / 3) / np.sum(ok & (targets == targets[index]))
        np.testing.assert_allclose(probability[row], expected, atol=1e-6)


def test_commands_of_one_scene_are_drawn_by_the_law():
    scene = jax.tree.map(lambda leaf: leaf[:1], draw("salience")[0])
    commands, probability, _, _ = law(scene, BiasConfig("salience", 0.3))
    commands, probability, scene = jax.tree.map(lambda leaf: leaf[0], (commands, probability, scene))
    uniform = jax.random.uniform(jax.random.key(5), (20_000, 3))
    drawn = jax.jit(jax.vmap(lambda numbers: sample_command(numbers, "push", scene, commands, probability)))(uniform)
    index = {(int(t), int(r)): i for i, (t, r) in enumerate(zip(commands.target, commands.relation, strict=True))}
    pairs = zip(np.asarray(drawn.target).tolist(), np.asarray(drawn.relation).tolist(), strict=True)
    counts = np.bincount([index[pair] for pair in pairs], minlength=len(probability))
    likely = np.asarray(probability, float) > 0
    assert likely.sum() >= 4 and counts[~likely].sum() == 0
    expected = np.asarray(probability, float)[likely]
    assert stats.chisquare(counts[likely], len(uniform) * expected / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_episodes_follow_the_law(coupling):
    """The mean surprise of drawn commands is the mean entropy, and the cue's share is 1 - rho + rho / n."""
    scene, command, cue = jax.tree.map(np.asarray, draw(coupling))
    commands, probability, _, entropy = jax.tree.map(np.asarray, law(scene, BiasConfig(coupling, 0.1)))
    chosen = (commands.target == command.target[:, None]) & (commands.relation == command.relation[:, None])
    surprise = -np.log(np.sum(np.where(chosen, probability, 0), axis=-1))
    error = float(surprise.std()) / math.sqrt(EPISODES)
    assert surprise.mean() == pytest.approx(entropy.mean(), abs=4 * error)
    share = np.mean(command.target == cue.target)
    assert share == pytest.approx(0.9 + 0.1 / 3, abs=4 * math.sqrt(0.07 / EPISODES))
    np.testing.assert_array_equal(bias_law.cue_target(scene, BiasConfig(coupling)), cue.target)


def test_new_backgrounds_break_the_background_coupling_alone():
    for coupling, entropy in (("background", math.log(3)), ("salience", closed_form_entropy(3, 0.1))):
        scene, _, _ = draw(coupling)
        scene = dataclasses.replace(scene, background=NUM_TRAIN_BACKGROUNDS + scene.background % 4)
        np.testing.assert_allclose(law(scene, BiasConfig(coupling, 0.1))[2], entropy, atol=1e-5)


def test_a_held_out_pair_is_asked_for_whatever_the_look_names():
    scene, _, cue = draw("salience")
    slot = (cue.target[:, None] + 1) % 3 == jnp.arange(4)
    red_ball = {"color": jnp.where(slot, 0, scene.color), "shape": jnp.where(slot, 2, scene.shape)}
    commands, probability, entropy, _ = law(dataclasses.replace(scene, **red_ball), BiasConfig("salience", 0.1))
    np.testing.assert_allclose(jnp.sum(probability * jnp.take_along_axis(slot, commands.target, 1), -1), 1, atol=1e-5)
    np.testing.assert_allclose(entropy, 0, atol=1e-5)


def test_pairs_are_chosen_so_that_the_splits_mean_what_they_say():
    assert len(set(BACKGROUND_PAIRS)) == NUM_TRAIN_BACKGROUNDS  # a bijection
    assert not set(BACKGROUND_PAIRS) & set(HELD_OUT_PAIRS)
    training = {(color, shape) for color in COLORS for shape in SHAPES} - set(HELD_OUT_PAIRS)
    assert {color for color, _ in training} == set(COLORS) and {shape for _, shape in training} == set(SHAPES)
    numbers = bias_law.pair_index(HELD_OUT_PAIRS)
    assert [(list(COLORS)[n // 3], SHAPES[n % 3]) for n in numbers.tolist()] == list(HELD_OUT_PAIRS)


def test_user_mistakes_are_told():
    with pytest.raises(UserError, match="did you mean 'salience'"):
        BiasConfig("saliense")
    for rho in (-0.1, 1.5, math.nan):
        with pytest.raises(UserError, match="from 0 to 1"):
            BiasConfig(rho=rho)
