"""Scenes and commands drawn from a key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.envs import sampling
from vla_jax.envs.bias import BACKGROUND_PAIRS, HELD_OUT_PAIRS, BiasConfig
from vla_jax.envs.commands import valid_commands
from vla_jax.envs.sampling import SceneConfig, sample_episode
from vla_jax.envs.scene import COLORS, NUM_BACKGROUNDS, NUM_TRAIN_BACKGROUNDS, SHAPES, TABLE_X, TABLE_Y
from vla_jax.envs.tasks import FAMILIES
from vla_jax.errors import UserError

EPISODES = 400
RHO = 0.5  # high, so that commands and cues often differ
KEYS = jax.random.split(jax.random.key(0), EPISODES)
NAMES = list(COLORS)


# Compiling is what takes time here: the tests share few programs. Pick scenes are drawn as reach scenes are.
valid_commands = jax.jit(valid_commands, static_argnums=0)
DRAWN_FAMILIES = tuple(family for family in FAMILIES if family != "pick")


def episode(key, task_name, coupling="background", objects=3, **kinds):
    return sample_episode(key, task_name, BiasConfig(coupling, RHO), SceneConfig(objects), **kinds)


@functools.cache
def program(*args, **kinds):
    return jax.jit(jax.vmap(lambda key: episode(key, *args, **kinds)))


@functools.cache
def draw(*args, **kinds):
    """(scene, command, cue) of EPISODES episodes as numpy arrays."""
    return jax.tree.map(np.asarray, program(*args, **kinds)(KEYS))


def pairs_of(scene, row):
    """(colour, shape) names of the objects of one scene, by slot."""
    here = np.flatnonzero(scene.present[row])
    return {slot: (NAMES[scene.color[row, slot]], SHAPES[scene.shape[row, slot]]) for slot in here}


def target_pair(scene, command, row):
    return pairs_of(scene, row)[int(command.target[row])]


def distances(first, second):
    return np.linalg.norm(first[:, :, None] - second[:, None], axis=-1)


@pytest.mark.parametrize("task_name", DRAWN_FAMILIES)
def test_things_lie_apart_on_the_table(task_name):
    scene, _, _ = draw(task_name)
    assert (scene.present.sum(1) == 3).all()
    objects, zones = scene.position[:, :3], scene.zone_position
    shown = [objects, zones] if task_name == "place_on" else [objects]
    for points in shown:
        assert (points[..., 0] >= TABLE_X[0]).all() and (points[..., 0] <= TABLE_X[1]).all()
        assert (points[..., 1] >= TABLE_Y[0]).all() and (points[..., 1] <= TABLE_Y[1]).all()
    assert (distances(objects, objects)[:, ~np.eye(3, dtype=bool)] > 0.0999).all()
    assert (scene.position[:, 3, 0] > 1.5).all()  # the empty slot is out of sight
    if task_name == "place_on":
        assert scene.zone_present.all()
        assert (distances(objects, zones) > 0.0999).all()
        assert (distances(zones, zones)[:, 0, 1] > 0.1299).all()
    else:
        assert not scene.zone_present.any()
        assert (zones[..., 0] > 1.5).all()


def test_four_objects_and_two_zones_find_room():
    scene, _, _ = draw("place_on", "salience", 4)
    assert scene.present.all()
    assert (distances(scene.position, scene.position)[:, ~np.eye(4, dtype=bool)] > 0.0999).all()
    assert (distances(scene.position, scene.zone_position) > 0.0999).all()


@pytest.mark.parametrize("task_name", DRAWN_FAMILIES)
def test_every_object_can_be_commanded(task_name):
    scene, command, cue = draw(task_name)
    commands, valid = (jax.tree.map(np.asarray, part) for part in valid_commands(task_name, scene))
    for row in range(EPISODES):
        assert set(commands.target[row][valid[row]]) == {0, 1, 2}
        admitted = {
            (t, g, r)
            for t, g, r, ok in zip(
                commands.target[row], commands.goal[row], commands.relation[row], valid[row], strict=True
            )
            if ok
        }
        assert (command.target[row], command.goal[row], command.relation[row]) in admitted
        assert (cue.target[row], cue.goal[row], cue.relation[row]) in admitted


def test_objects_differ_and_training_pairs_all_occur_but_held_out_ones_never():
    scene, _, _ = draw("reach", "salience")
    seen = set()
    for row in range(EPISODES):
        pairs = list(pairs_of(scene, row).values())
        assert len(set(pairs)) == 3
        seen.update(pairs)
    everything = {(color, shape) for color in COLORS for shape in SHAPES}
    assert seen == everything - set(HELD_OUT_PAIRS)


def test_start_and_look_vary_in_their_ranges():
    scene, _, _ = draw("reach")

    def covers(values, low, high):
        assert (values >= low - 1e-6).all() and (values <= high + 1e-6).all()
        assert values.min() < low + 0.1 * (high - low) and values.max() > high - 0.1 * (high - low)

    covers(scene.tcp[:, 0], *TABLE_X)
    covers(scene.tcp[:, 1], *TABLE_Y)
    covers(scene.tcp[:, 2], 0.12, 0.20)
    covers(scene.position[:, :3, 0], *TABLE_X)
    covers(scene.brightness, 0.85, 1.15)
    covers(scene.camera_shift[:, 0], -0.01, 0.01)
    np.testing.assert_allclose(np.linalg.norm(scene.light, axis=-1), 1.0, atol=1e-5)
    assert (scene.light[:, 2] > 0.5).all()
    cubes = scene.shape[:, :3] == SHAPES.index("cube")
    covers(scene.yaw[:, :3][cubes], -np.pi / 4, np.pi / 4)
    assert (scene.yaw[:, :3][~cubes] == 0).all()
    assert set(scene.background) == set(range(NUM_TRAIN_BACKGROUNDS))


def test_background_names_its_object():
    scene, _, cue = draw("reach", "background")
    for row in range(EPISODES):
        assert target_pair(scene, cue, row) == BACKGROUND_PAIRS[scene.background[row]]


def test_salience_names_the_nearest_object_by_a_margin():
    scene, _, cue = draw("reach", "salience")
    away = np.linalg.norm(scene.position[:, :3] - scene.tcp[:, None, :2], axis=-1)
    assert (away.argmin(1) == cue.target).all()
    nearest, second, _ = np.sort(away, axis=1).T
    assert (second - nearest >= 0.0399).all()


def test_uniqueness_names_the_one_object_in_full_colour():
    scene, _, cue = draw("reach", "uniqueness")
    assert (scene.movable.sum(1) == 1).all()
    assert scene.movable[np.arange(EPISODES), cue.target].all()
    assert draw("reach", "salience")[0].movable.all()


@pytest.mark.parametrize("coupling", ["background", "salience", "uniqueness"])
def test_slots_carry_no_meaning(coupling):
    _, command, cue = draw("reach", coupling)
    for chosen in (command, cue):
        share = np.bincount(chosen.target, minlength=3) / EPISODES
        assert np.abs(share - 1 / 3).max() < 4 * np.sqrt(2 / 9 / EPISODES)


@pytest.mark.parametrize("coupling", ["background", "salience", "uniqueness"])
def test_held_out_scenes_ask_for_a_held_out_pair_that_the_look_does_not_name(coupling):
    scene, command, cue = draw("reach", coupling, held_out=True)
    asked = set()
    for row in range(EPISODES):
        pairs = pairs_of(scene, row)
        assert sum(pair in HELD_OUT_PAIRS for pair in pairs.values()) == 1
        assert target_pair(scene, command, row) in HELD_OUT_PAIRS
        assert target_pair(scene, cue, row) not in HELD_OUT_PAIRS
        asked.add(target_pair(scene, command, row))
    assert asked == set(HELD_OUT_PAIRS)


def test_new_backgrounds_are_new_and_decouple_only_the_background():
    scene, command, cue = draw("reach", "background", new_background=True)
    assert set(scene.background) == set(range(NUM_TRAIN_BACKGROUNDS, NUM_BACKGROUNDS))
    for row in range(EPISODES):
        assert target_pair(scene, cue, row) == BACKGROUND_PAIRS[scene.background[row] % NUM_TRAIN_BACKGROUNDS]
    assert np.mean(command.target == cue.target) == pytest.approx(1 / 3, abs=0.1)
    _, command, cue = draw("reach", "background")
    assert np.mean(command.target == cue.target) == pytest.approx(1 - RHO + RHO / 3, abs=0.1)


def test_cue_asks_for_the_commanded_deed_done_to_the_object_that_the_look_names():
    _, command, cue = draw("place_on")
    assert 0.2 < np.mean(command.target != cue.target) < 0.5
    assert (command.goal == cue.goal).all()
    _, command, cue = draw("push")
    same = command.target == cue.target
    assert (command.relation == cue.relation)[same].all()
    assert 0.3 < np.mean((command.relation == cue.relation)[~same]) < 1
    assert (cue.referent == 0).all() and (cue.template == 0).all()


def test_same_key_same_episode_alone_in_a_batch_compiled_or_not():
    args = ("place_on", "salience", 4)
    batch = draw(*args)
    jax.tree.map(np.testing.assert_array_equal, batch, program(*args)(KEYS))
    row = jax.tree.map(lambda leaf: leaf[3], batch)
    for other in (jax.jit(lambda key: episode(key, *args))(KEYS[3]), episode(KEYS[3], *args)):
        # The compiler may round a last digit differently; nothing that is chosen may differ.
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), row, other)
    assert not np.array_equal(batch[0].position[2], batch[0].position[3])


def test_choose_follows_the_weights_and_never_takes_a_zero():
    weights = jnp.asarray([0.0, 3.0, 0.0, 1.0, 0.0])
    chosen = jax.vmap(sampling.choose, in_axes=(0, None))(jnp.linspace(0, 1, 1001)[:-1], weights)
    np.testing.assert_array_equal(np.bincount(np.asarray(chosen), minlength=5), [0, 750, 0, 250, 0])
    last = jnp.nextafter(jnp.float32(1), jnp.float32(0))
    assert int(sampling.choose(last, weights)) == 3 and int(sampling.choose(jnp.float32(0), weights)) == 1


def test_user_mistakes_are_told():
    with pytest.raises(UserError, match="2 to 4 objects, got 5"):
        SceneConfig(objects=5)
    with pytest.raises(UserError, match="did you mean 'push'"):
        sample_episode(jax.random.key(0), "pushh", BiasConfig())
