"""Which commands a scene admits, on scenes laid out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.envs.commands import valid_commands
from vla_jax.envs.scene import RELATIONS, Scene
from vla_jax.envs.tasks import FAMILIES
from vla_jax.errors import UserError

MIDDLE = (0.5, 0.0)
LEFT, RIGHT, FRONT, BEHIND = range(4)


def lay(*points, zones=False):
    """A scene with objects at the given (x, y)."""
    count = len(points)
    position = jnp.asarray(list(points) + [(2.0, 0.3 * slot) for slot in range(count, 4)])
    return Scene(
        color=jnp.arange(4),
        shape=jnp.zeros(4, int),
        present=jnp.arange(4) < count,
        movable=jnp.ones(4, bool),
        position=position,
        yaw=jnp.zeros(4),
        zone_present=jnp.full(2, zones),
        zone_position=jnp.asarray([(0.4, 0.15), (0.4, -0.15)]),
        tcp=jnp.asarray([0.5, 0.0, 0.15]),
        tcp_yaw=jnp.zeros(()),
        background=jnp.zeros((), int),
        light=jnp.asarray([0.0, 0.0, 1.0]),
        brightness=jnp.ones(()),
        camera_shift=jnp.zeros((2, 3)),
    )


def admitted(task_name, scene):
    """The set of (target, goal, relation)."""
    commands, valid = valid_commands(task_name, scene)
    table = np.stack([commands.target, commands.goal, commands.relation], axis=-1)
    return {tuple(int(value) for value in row) for row in table[np.asarray(valid)]}


def pushes(scene, target=0):
    return {relation for slot, _, relation in admitted("push", scene) if slot == target}


def test_an_object_in_the_open_can_be_pushed_every_way():
    assert pushes(lay(MIDDLE)) == {LEFT, RIGHT, FRONT, BEHIND}


def test_nothing_is_pushed_off_the_table():
    assert pushes(lay((0.60, 0.18))) == {RIGHT, FRONT}
    assert pushes(lay((0.40, -0.18))) == {LEFT, BEHIND}


def test_nothing_is_pushed_into_another_object():
    assert pushes(lay(MIDDLE, (0.5, 0.13))) == {FRONT, BEHIND, RIGHT}  # it would end 5 cm from the other
    assert pushes(lay(MIDDLE, (0.5, 0.15))) == {FRONT, BEHIND, RIGHT, LEFT}
    assert pushes(lay(MIDDLE, (0.6, 0.0))) == {LEFT, RIGHT}  # no way behind, and no room there for the hand's run-up
    assert pushes(lay(MIDDLE, (0.6, 0.07))) == {LEFT, RIGHT, FRONT, BEHIND}


def test_the_hand_needs_room_behind_what_it_pushes():
    assert LEFT not in pushes(lay(MIDDLE, (0.5, -0.10)))
    assert LEFT in pushes(lay(MIDDLE, (0.5, -0.12)))


def test_place_relative_needs_a_free_spot_on_the_table():
    alone = admitted("place_relative", lay(MIDDLE, (0.42, -0.15)))
    assert {relation for target, goal, relation in alone if (target, goal) == (1, 0)} == {LEFT, RIGHT, FRONT, BEHIND}
    assert {relation for target, goal, relation in alone if (target, goal) == (0, 1)} == {LEFT, BEHIND}
    third = admitted("place_relative", lay(MIDDLE, (0.42, -0.15), (0.5, 0.12)))  # on the spot left of the middle
    assert {relation for target, goal, relation in third if (target, goal) == (1, 0)} == {RIGHT, FRONT, BEHIND}
    assert (2, 0, RIGHT) in third  # what lies there itself may go elsewhere
    assert not any(target == goal for target, goal, _ in third)


def test_place_relative_never_asks_for_what_is_already_so():
    so = admitted("place_relative", lay(MIDDLE, (0.5, 0.10)))
    assert (1, 0, LEFT) not in so and (1, 0, RIGHT) in so
    assert (0, 1, RIGHT) not in so and (0, 1, LEFT) in so
    assert (1, 0, LEFT) in admitted("place_relative", lay(MIDDLE, (0.5, 0.16)))


def test_other_families_take_every_object_and_zone():
    scene = lay(MIDDLE, (0.6, 0.1), zones=True)
    assert admitted("reach", scene) == admitted("pick", scene) == {(0, 0, 0), (1, 0, 0)}
    assert admitted("place_on", scene) == {(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)}
    assert admitted("place_on", lay(MIDDLE)) == set()


@pytest.mark.parametrize("task_name", FAMILIES)
def test_a_batch_is_its_scenes(task_name):
    scenes = [lay(MIDDLE, (0.6, 0.1), zones=True), lay((0.4, 0.1), (0.55, 0.12), (0.5, -0.1), zones=True)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *scenes)
    commands, valid = valid_commands(task_name, batch)
    for row, scene in enumerate(scenes):
        one, ok = valid_commands(task_name, scene)
        np.testing.assert_array_equal(valid[row], ok)
        jax.tree.map(lambda many, single, row=row: np.testing.assert_array_equal(many[row], single), commands, one)
    assert len(RELATIONS) == 4 and commands.target.shape == valid.shape


def test_an_unknown_family_is_told():
    with pytest.raises(UserError, match="did you mean 'place_on'"):
        valid_commands("placeon", lay(MIDDLE))
