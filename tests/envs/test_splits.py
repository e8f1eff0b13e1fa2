"""The splits: what differs from in_distribution, and what does not."""

import functools

import jax
import numpy as np
import pytest

from vla_jax.envs import collect, language, questions, splits
from vla_jax.envs.bias import BACKGROUND_PAIRS, HELD_OUT_PAIRS, BiasConfig
from vla_jax.envs.commands import valid_commands
from vla_jax.envs.sampling import sample_episode
from vla_jax.envs.scene import COLORS, NUM_TRAIN_BACKGROUNDS, SHAPES, take
from vla_jax.envs.splits import SPLITS, make_alternatives, make_cases
from vla_jax.errors import UserError

BIAS = BiasConfig("background", 0.1)
CASES = 150


@functools.cache
def cases(split, seed=3, n=CASES):
    made = make_cases(split, "place_relative", BIAS, seed, n)
    parts = jax.tree.map(np.asarray, (made.scene, made.command, made.cue))
    assert all(leaf.shape[0] == n for leaf in jax.tree.leaves(parts)) and len(made.text) == n
    return *parts, made.text


valid_commands = jax.jit(valid_commands, static_argnums=0)


def pair(scene, row, slot):
    return list(COLORS)[scene.color[row, slot]], SHAPES[scene.shape[row, slot]]


def deeds(command):
    return list(zip(command.target.tolist(), command.goal.tolist(), command.relation.tolist(), strict=True))


def admitted(task_name, scene):
    commands, valid = (jax.tree.map(np.asarray, part) for part in valid_commands(task_name, scene))
    return [
        {deed for deed, ok in zip(deeds(take_row(commands, r)), valid[r], strict=True) if ok} for r in range(len(valid))
    ]


def take_row(command, row):
    return jax.tree.map(lambda leaf: leaf[row], command)


@pytest.mark.parametrize("split", SPLITS)
def test_every_case_is_a_valid_deed_said_in_its_words(split):
    scene, command, cue, text = cases(split)
    for row, valid in enumerate(admitted("place_relative", scene)):
        assert deeds(command)[row] in valid and deeds(cue)[row] in valid
    words = [""] * CASES if split == "blank" else language.instructions("place_relative", scene, command)
    assert text == words
    new_wording = command.template >= len(language.TRAIN_TEMPLATES["place_relative"])
    assert new_wording.all() if split == "paraphrases" else not new_wording.any()
    assert (scene.background >= NUM_TRAIN_BACKGROUNDS).all() == (split == "new_backgrounds")
    held_out = [pair(scene, row, slot) in HELD_OUT_PAIRS for row in range(CASES) for slot in range(3)]
    assert sum(held_out) == (CASES if split == "held_out_pairs" else 0)


@pytest.mark.parametrize("split", ["swapped", "paraphrases", "blank"])
def test_paired_splits_share_their_scenes(split):
    jax.tree.map(np.testing.assert_array_equal, cases(split)[0], cases("in_distribution")[0])


def test_in_distribution_mostly_asks_for_what_the_look_names():
    scene, command, cue, _ = cases("in_distribution")
    assert 0.85 < np.mean(command.target == cue.target) < 1
    for row in range(CASES):
        assert pair(scene, row, cue.target[row]) == BACKGROUND_PAIRS[scene.background[row]]


def test_swapped_never_asks_for_what_the_look_names():
    scene, command, cue, text = cases("swapped")
    assert (command.target != cue.target).all()
    for row in range(CASES):
        assert pair(scene, row, cue.target[row]) == BACKGROUND_PAIRS[scene.background[row]]
    # Following the look instead of the words is one definite deed: the same goal and relation.
    assert np.mean((command.goal == cue.goal) & (command.relation == cue.relation)) > 0.95
    assert len(set(text)) > 0.9 * CASES


def test_paraphrases_and_blank_keep_the_deed():
    for split in ("paraphrases", "blank"):
        assert deeds(cases(split)[1]) == deeds(cases("in_distribution")[1])
        assert deeds(cases(split)[2]) == deeds(cases("in_distribution")[2])
    assert not set(cases("paraphrases")[3]) & set(cases("in_distribution")[3])


def test_all_instructions_are_all_valid_deeds_scene_by_scene():
    scene, command, _, _ = cases("all_instructions")
    valid = admitted("place_relative", cases("in_distribution")[0])
    row = 0
    for number, expected in enumerate(valid):
        block = slice(row, min(row + len(expected), CASES))
        asked = set(deeds(command)[block])
        assert asked == expected if block.stop < CASES else asked <= expected
        assert len(asked) == block.stop - block.start
        np.testing.assert_array_equal(
            scene.position[block], np.broadcast_to(cases("in_distribution")[0].position[number], (len(asked), 4, 2))
        )
        row = block.stop
        if row == CASES:
            break
    assert row == CASES


def test_held_out_pairs_are_asked_for():
    scene, command, cue, _ = cases("held_out_pairs")
    asked = [pair(scene, row, command.target[row]) for row in range(CASES)]
    assert set(asked) == set(HELD_OUT_PAIRS)
    assert (command.target != cue.target).all()


def test_new_backgrounds_ask_for_any_object():
    _, command, cue, _ = cases("new_backgrounds")
    assert np.mean(command.target == cue.target) == pytest.approx(1 / 3, abs=0.16)


def test_cases_are_reproducible_and_start_alike_whatever_their_number():
    again = make_cases("swapped", "place_relative", BIAS, 3, CASES)
    scene, command, cue, text = cases("swapped")
    jax.tree.map(np.testing.assert_array_equal, (scene, command, cue), (again.scene, again.command, again.cue))
    assert text == again.text
    fewer = cases("swapped", n=20)
    jax.tree.map(np.testing.assert_array_equal, fewer[:3], take((scene, command, cue), slice(20)))
    assert fewer[3] == text[:20]
    assert not np.array_equal(cases("swapped", seed=4)[0].position, scene.position)


def test_cases_do_not_meet_the_training_episodes_of_the_same_seed():
    assert len({collect._DOMAIN, splits._DOMAIN, questions._DOMAIN}) == 3
    keys = collect._keys(3, np.arange(CASES))
    draw = jax.vmap(lambda key: sample_episode(key, "place_relative", BIAS))
    trained, _, _ = jax.jit(draw)(keys)
    tested = cases("swapped")[0]
    both = np.concatenate([np.asarray(trained.tcp), tested.tcp])
    assert len(np.unique(both, axis=0)) == 2 * CASES


def test_user_mistakes_are_told():
    with pytest.raises(UserError, match="did you mean 'swapped'"):
        make_cases("swaped", "push", BIAS, 0, 4)
    with pytest.raises(UserError, match="did you mean 'push'"):
        make_cases("swapped", "pushing", BIAS, 0, 4)
    with pytest.raises(UserError, match="n = 0"):
        make_cases("swapped", "push", BIAS, 0, 0)


def test_alternatives_are_one_command_for_every_target_of_the_scenes():
    """Drawn over all goals and relations, in the training wordings."""
    scene, commands = jax.tree.map(np.asarray, make_alternatives("place_relative", BIAS, 3, CASES))
    jax.tree.map(np.testing.assert_array_equal, scene, cases("in_distribution")[0])
    assert (commands.target == np.arange(3)).all()
    for row, valid in enumerate(admitted("place_relative", scene)):
        assert set(deeds(take_row(commands, row))) <= valid
    assert set(commands.goal.ravel()) == {0, 1, 2} and set(commands.relation.ravel()) == {0, 1, 2, 3}
    each = take(scene, np.repeat(np.arange(CASES), 3))
    texts = language.instructions("place_relative", each, jax.tree.map(np.ravel, commands))
    assert len(set(texts)) > 100 and commands.template.max() < len(language.TRAIN_TEMPLATES["place_relative"])
