"""Draws episodes: a scene, a command for it, and what its look suggests. Pure functions of a key.

A scene is drawn whole, checked, and drawn again until it holds: objects and zones keep their distances, every object
can be commanded (so the target's entropy has its closed form, and there are at least two valid commands), and under
the salience coupling one object is nearest to the gripper by a clear margin. Objects differ in colour or shape, so
"the red cube" is never ambiguous. All drawn numbers are uniform in the ranges given here.

Axis legend: N object slots, Z zone slots, M commands of `commands.valid_commands`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vla_jax.envs import bias as bias_law
from vla_jax.envs import language
from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.commands import check_family, has_zones, valid_commands
from vla_jax.envs.scene import (
    COLORS,
    NUM_BACKGROUNDS,
    NUM_SLOTS,
    NUM_TRAIN_BACKGROUNDS,
    NUM_VIEWS,
    NUM_ZONES,
    PARKED_X,
    SHAPES,
    TABLE_X,
    TABLE_Y,
    Command,
    Scene,
    take,
)
from vla_jax.errors import UserError

# Least distances between centres (metres). An open gripper needs 9 cm to go round an object beside another.
OBJECT_SPACING = 0.10
ZONE_OBJECT_SPACING = 0.10
ZONE_SPACING = 0.13
SALIENCE_MARGIN = 0.04  # the second nearest object is at least this much further from the gripper (metres)

TCP_HEIGHT = (0.12, 0.20)  # metres above the table
TCP_YAW = 0.3  # radians, either way
CUBE_YAW = math.pi / 4  # radians, either way; a cube looks the same after a quarter turn
LIGHT = (0.2, 0.3, 1.0)  # mean direction towards the light, before jitter and normalisation
LIGHT_JITTER = 0.3
BRIGHTNESS = (0.85, 1.15)
CAMERA_JITTER = (0.01, 0.003)  # metres either way, per view (front, wrist)

_SPOTS = 32  # spots tried for each thing before the whole scene is drawn again


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """What scenes hold.

    Raises:
        UserError: the number of objects is not 2 to NUM_SLOTS.
    """

    objects: int = 3  # visible objects, each of which can be commanded

    def __post_init__(self):
        if not 2 <= self.objects <= NUM_SLOTS:
            raise UserError(f"a scene holds 2 to {NUM_SLOTS} objects, got {self.objects}; change `objects`.")


DEFAULT_SCENE = SceneConfig()


def sample_episode(
    key: PRNGKeyArray,
    task_name: str,
    bias: BiasConfig,
    config: SceneConfig = DEFAULT_SCENE,
    *,
    held_out: bool = False,
    new_background: bool = False,
) -> tuple[Scene, Command, Command]:
    """Draws one episode. Pure and jittable in `key`; `jax.vmap` it for a batch.

    Args:
        held_out: put one object of `bias.HELD_OUT_PAIRS` into the scene and ask for it; the cue is another object.
        new_background: a table colour that training never shows; what that does to the law is told in `bias`.

    Returns:
        (scene, command, cue): the command follows `bias.command_distribution`; the cue is what the look suggests, see
        `cue_command`.

    Raises:
        UserError: the family is unknown.
    """
    check_family(task_name)
    scene_key, command_key, cue_key = jax.random.split(key, 3)
    scene = sample_scene(scene_key, task_name, bias, config, held_out=held_out, new_background=new_background)
    commands, probability = bias_law.command_distribution(task_name, scene, bias)
    command = sample_command(command_key, task_name, scene, commands, probability)
    return scene, command, cue_command(cue_key, task_name, scene, bias, command)


def sample_command(
    key: PRNGKeyArray, task_name: str, scene: Scene, commands: Command, weights: Float[Array, "M"]
) -> Command:
    """One of `commands`, drawn in proportion to `weights` (some positive), in a training wording."""
    choice_key, wording_key = jax.random.split(key)
    chosen = take(commands, jax.random.categorical(choice_key, jnp.log(weights)))
    return word(wording_key, task_name, scene, chosen)


def word(key: PRNGKeyArray, task_name: str, scene: Scene, command: Command) -> Command:
    """Draws how the command is said: a referent that fits the target, by weight, and a training template."""
    referent_key, template_key = jax.random.split(key)
    names = language.referent_distribution(scene)[command.target]
    referent = jax.random.categorical(referent_key, jnp.log(names)).astype(jnp.int32)
    template = jax.random.randint(template_key, (), *language.template_range(task_name))
    return dataclasses.replace(command, referent=referent, template=template)


def cue_command(key: PRNGKeyArray, task_name: str, scene: Scene, bias: BiasConfig, command: Command) -> Command:
    """What a policy would do that takes the target from the look, and goal and relation from the words.

    The target is the cue's. Goal and relation are the command's where the scene admits them for that target; else as
    much of them as it admits (the relation before the goal), the rest drawn evenly. Plain wording. If the command's
    target is the cue's, the cue asks for the same as the command.
    """
    commands, valid = valid_commands(task_name, scene)
    valid &= commands.target == bias_law.cue_target(scene, bias)
    likeness = 2 * (commands.relation == command.relation) + (commands.goal == command.goal)
    best = valid & (likeness == jnp.max(jnp.where(valid, likeness, -1)))
    return take(commands, jax.random.categorical(key, jnp.log(best)))


def sample_scene(
    key: PRNGKeyArray,
    task_name: str,
    bias: BiasConfig,
    config: SceneConfig = DEFAULT_SCENE,
    *,
    held_out: bool = False,
    new_background: bool = False,
) -> Scene:
    """Draws a scene in which every object can be commanded; see `sample_episode`."""
    check_family(task_name)

    def draw(attempt):
        attempt_key = jax.random.fold_in(key, attempt)
        return _draw_scene(attempt_key, task_name, bias, config, held_out=held_out, new_background=new_background)

    def again(carry):
        attempt, _ = carry
        return attempt + 1, draw(attempt + 1)

    return jax.lax.while_loop(lambda carry: ~_holds(task_name, carry[1], bias), again, (jnp.int32(0), draw(0)))[1]


def _draw_scene(key, task_name, bias, config, *, held_out, new_background) -> Scene:
    keys = dict(zip(("look", "place", "yaw", "tcp", "light", "camera"), jax.random.split(key, 6), strict=True))
    present = jnp.arange(NUM_SLOTS) < config.objects
    color, shape, movable, background = _draw_look(keys["look"], bias, config.objects, held_out, new_background)
    position, zone_position = _draw_places(keys["place"], config.objects, NUM_ZONES if has_zones(task_name) else 0)
    yaw = jax.random.uniform(keys["yaw"], (NUM_SLOTS,), minval=-CUBE_YAW, maxval=CUBE_YAW)
    tcp_key, tcp_yaw_key = jax.random.split(keys["tcp"])
    light_key, brightness_key = jax.random.split(keys["light"])
    light = jnp.asarray(LIGHT) + LIGHT_JITTER * jax.random.uniform(light_key, (3,), minval=-1.0)
    shift = jax.random.uniform(keys["camera"], (NUM_VIEWS, 3), minval=-1.0)
    scene = Scene(
        color=color,
        shape=shape,
        present=present,
        movable=movable,
        position=position,
        # The turn of a round object cannot be seen, so it must not matter to the hand either.
        yaw=jnp.where(shape == SHAPES.index("cube"), yaw, 0.0),
        zone_present=jnp.full(NUM_ZONES, has_zones(task_name)),
        zone_position=zone_position,
        tcp=jnp.zeros(3),
        tcp_yaw=jax.random.uniform(tcp_yaw_key, (), minval=-TCP_YAW, maxval=TCP_YAW),
        background=background,
        light=light / jnp.linalg.norm(light),
        brightness=jax.random.uniform(brightness_key, (), minval=BRIGHTNESS[0], maxval=BRIGHTNESS[1]),
        camera_shift=jnp.asarray(CAMERA_JITTER)[:, None] * shift,
    )
    return dataclasses.replace(scene, tcp=_draw_tcp(tcp_key, scene, bias))


def _draw_look(key, bias, objects, held_out, new_background):
    """Colours, shapes, marks and table colour: [N], [N], [N], []."""
    background_key, rank_key, held_key, order_key, mark_key = jax.random.split(key, 5)
    first, end = (NUM_TRAIN_BACKGROUNDS, NUM_BACKGROUNDS) if new_background else (0, NUM_TRAIN_BACKGROUNDS)
    background = jax.random.randint(background_key, (), first, end)

    pairs = jnp.arange(len(COLORS) * len(SHAPES))
    rank = jax.random.uniform(rank_key, pairs.shape)
    unseen = bias_law.pair_index(bias_law.HELD_OUT_PAIRS)
    rank = rank.at[unseen].set(-1.0)
    if bias.coupling == "background":
        rank = rank.at[bias_law.pair_index(bias_law.BACKGROUND_PAIRS)[background % NUM_TRAIN_BACKGROUNDS]].set(2.0)
    if held_out:
        rank = rank.at[jax.random.choice(held_key, unseen)].set(3.0)
    chosen = jnp.argsort(-rank)[:objects]

    # Which slot holds what carries no meaning: shuffle, so that nothing can come to depend on it.
    order = jax.random.permutation(order_key, objects)
    chosen = jnp.zeros(NUM_SLOTS, jnp.int32).at[:objects].set(chosen[order])
    movable = jnp.ones(NUM_SLOTS, bool)
    if bias.coupling == "uniqueness":
        eligible = (jnp.arange(NUM_SLOTS) < objects) & ~jnp.isin(chosen, unseen)
        movable = jnp.arange(NUM_SLOTS) == jax.random.categorical(mark_key, jnp.log(eligible))
    return chosen // len(SHAPES), chosen % len(SHAPES), movable, background


def _draw_places(key, objects, zones) -> tuple[Float[Array, "N 2"], Float[Array, "Z 2"]]:
    """Spots on the table, one thing after the other, each at its distance from those before where a spot is found."""
    spots = jax.vmap(_table_point)(jax.random.split(key, (zones + objects) * _SPOTS)).reshape(-1, _SPOTS, 2)
    placed = []
    for index in range(zones + objects):
        is_zone = index < zones
        room = jnp.full(_SPOTS, jnp.inf)
        for other, point in enumerate(placed):
            spacing = (ZONE_SPACING if is_zone else ZONE_OBJECT_SPACING) if other < zones else OBJECT_SPACING
            room = jnp.minimum(room, jnp.linalg.norm(spots[index] - point, axis=-1) - spacing)
        placed.append(spots[index, jnp.argmax(room >= 0)])
    position = _parked(NUM_SLOTS).at[:objects].set(jnp.stack(placed[zones:]))
    zone_position = _parked(NUM_ZONES)
    return position, zone_position.at[:zones].set(jnp.stack(placed[:zones])) if zones else zone_position


def _parked(count) -> Float[Array, "count 2"]:
    """Spots out of sight, apart from each other."""
    return jnp.stack([jnp.full(count, PARKED_X), 0.3 * jnp.arange(count)], axis=-1)


def _table_point(key) -> Float[Array, "2"]:
    low, high = jnp.asarray((TABLE_X[0], TABLE_Y[0])), jnp.asarray((TABLE_X[1], TABLE_Y[1]))
    return jax.random.uniform(key, (2,), minval=low, maxval=high)


def _draw_tcp(key, scene, bias) -> Float[Array, "3"]:
    height_key, *point_keys = jax.random.split(key, 1 + (_SPOTS if bias.coupling == "salience" else 1))
    points = jax.vmap(_table_point)(jnp.stack(point_keys))
    tcp = jnp.concatenate([points, jnp.zeros((len(points), 1))], axis=-1)
    good = jax.vmap(lambda point: _cue_is_clear(dataclasses.replace(scene, tcp=point), bias))(tcp)
    height = jax.random.uniform(height_key, (), minval=TCP_HEIGHT[0], maxval=TCP_HEIGHT[1])
    return tcp[jnp.argmax(good)].at[2].set(height)


def _cue_is_clear(scene, bias) -> Bool[Array, ""]:
    """The look names one object, and not one of a held-out pair."""
    clear = ~bias_law.held_out_objects(scene)[bias_law.cue_target(scene, bias)]
    if bias.coupling == "salience":
        nearest, second = jnp.sort(bias_law.gripper_distance(scene))[:2]
        clear &= second - nearest >= SALIENCE_MARGIN
    return clear


def _holds(task_name, scene, bias) -> Bool[Array, ""]:
    """Everything keeps its distance, the cue is clear, and every object can be commanded."""
    commands, valid = valid_commands(task_name, scene)
    commandable = jnp.zeros(NUM_SLOTS, bool).at[commands.target].max(valid)
    return _spaced(scene) & _cue_is_clear(scene, bias) & jnp.all(commandable == scene.present)


def _spaced(scene) -> Bool[Array, ""]:
    points = jnp.concatenate([scene.position, scene.zone_position])
    here = jnp.concatenate([scene.present, scene.zone_present])
    zone = jnp.arange(len(points)) >= NUM_SLOTS
    least = jnp.where(zone[:, None] & zone[None, :], ZONE_SPACING, OBJECT_SPACING)
    least = jnp.where(zone[:, None] ^ zone[None, :], ZONE_OBJECT_SPACING, least)
    apart = jnp.linalg.norm(points[:, None] - points[None, :], axis=-1) >= least - 1e-6
    matters = here[:, None] & here[None, :] & ~jnp.eye(len(points), dtype=bool)
    return jnp.all(apart | ~matters)
