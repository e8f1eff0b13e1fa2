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
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vla_jax.envs import bias as bias_law
from vla_jax.envs import language
from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.commands import has_zones, valid_commands
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
from vla_jax.envs.tasks import check_family
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
    uniform, scene = _sample_scene(key, task_name, bias, config, held_out, new_background)
    commands, probability = bias_law.command_distribution(task_name, scene, bias)
    command = sample_command(uniform["command"], task_name, scene, commands, probability)
    return scene, command, cue_command(uniform["cue"], task_name, scene, bias, command)


def choose(uniform: Float[Array, ""], weights: Float[Array, "K"]) -> Int[Array, ""]:
    """Turns a uniform number in [0, 1) into an index drawn in proportion to `weights` (some positive)."""
    edges = jnp.cumsum(weights)
    return jnp.argmax(edges > uniform * edges[-1]).astype(jnp.int32)


def sample_command(
    uniform: Float[Array, "3"], task_name: str, scene: Scene, commands: Command, weights: Float[Array, "M"]
) -> Command:
    """One of `commands`, in proportion to `weights` (some positive), in a training wording."""
    return word(uniform[1:], task_name, scene, take(commands, choose(uniform[0], weights)))


def word(uniform: Float[Array, "2"], task_name: str, scene: Scene, command: Command, held_out: bool = False) -> Command:
    """Says the command by two uniform numbers: a referent that fits the target, by weight, and one of the training
    templates or, with `held_out`, of the paraphrases."""
    referent = choose(uniform[0], language.referent_distribution(scene)[command.target])
    template = _integer(uniform[1], *language.template_range(task_name, held_out))
    return dataclasses.replace(command, referent=referent, template=template)


def cue_command(uniform: Float[Array, ""], task_name: str, scene: Scene, bias: BiasConfig, command: Command) -> Command:
    """What a policy would do that takes the target from the look, and goal and relation from the words.

    The target is the cue's. Goal and relation are the command's where the scene admits them for that target; else as
    much of them as it admits (the relation before the goal), the rest drawn evenly. Plain wording. If the command's
    target is the cue's, the cue asks for the same as the command.
    """
    commands, valid = valid_commands(task_name, scene)
    valid &= commands.target == bias_law.cue_target(scene, bias)
    likeness = 2 * (commands.relation == command.relation) + (commands.goal == command.goal)
    best = valid & (likeness == jnp.max(jnp.where(valid, likeness, -1)))
    return take(commands, choose(uniform, best))


def _sample_scene(key, task_name, bias, config, held_out, new_background) -> tuple[dict, Scene]:
    """Draws until a scene holds; returns the numbers of the last draw, the command's and cue's not used yet, and it."""

    def draw(attempt):
        uniform = _uniform_numbers(jax.random.fold_in(key, attempt))
        return uniform, _draw_scene(uniform, task_name, bias, config, held_out=held_out, new_background=new_background)

    def try_again(carry):
        attempt, _, _ = carry
        drawn = draw(attempt)
        return attempt + 1, _holds(task_name, drawn[1], bias), drawn

    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(draw, 0))
    start = (jnp.int32(0), jnp.asarray(False), nothing)
    return jax.lax.while_loop(lambda carry: ~carry[1], try_again, start)[2]


def _uniform_numbers(key) -> dict[str, Float[Array, "..."]]:
    """All the random numbers of an episode, uniform in [0, 1), by name.

    One call of the generator makes them, because each call takes the compiler half a second on a CPU.
    """
    shapes = {
        "background": (),
        "pairs": (len(COLORS) * len(SHAPES),),
        "order": (NUM_SLOTS,),
        "mark": (NUM_SLOTS,),
        "spots": (NUM_ZONES + NUM_SLOTS, _SPOTS, 2),
        "yaw": (NUM_SLOTS,),
        "tcp": (_SPOTS, 2),
        "height": (),
        "tcp_yaw": (),
        "light": (3,),
        "brightness": (),
        "camera": (NUM_VIEWS, 3),
        "command": (3,),
        "cue": (),
    }
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    pieces = jnp.split(jax.random.uniform(key, (int(ends[-1]),)), ends[:-1])
    return {name: piece.reshape(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def _between(uniform, low, high):
    return low + (high - low) * uniform


def _integer(uniform, first, end):
    """An integer from `first` to `end` - 1."""
    return jnp.minimum(first + jnp.floor(uniform * (end - first)), end - 1).astype(jnp.int32)


def _table_point(uniform: Float[Array, "*B 2"]) -> Float[Array, "*B 2"]:
    low, high = jnp.asarray((TABLE_X[0], TABLE_Y[0])), jnp.asarray((TABLE_X[1], TABLE_Y[1]))
    return _between(uniform, low, high)


def _draw_scene(uniform, task_name, bias, config, *, held_out, new_background) -> Scene:
    color, shape, movable, background = _draw_look(uniform, bias, config.objects, held_out, new_background)
    zones = NUM_ZONES if has_zones(task_name) else 0
    position, zone_position = _draw_places(uniform["spots"], config.objects, zones)
    light = jnp.asarray(LIGHT) + _between(uniform["light"], -LIGHT_JITTER, LIGHT_JITTER)
    # The turn of a round object cannot be seen, so it must not matter to the hand either.
    yaw = jnp.where(shape == SHAPES.index("cube"), _between(uniform["yaw"], -CUBE_YAW, CUBE_YAW), 0.0)
    scene = Scene(
        color=color,
        shape=shape,
        present=jnp.arange(NUM_SLOTS) < config.objects,
        movable=movable,
        position=position,
        yaw=yaw,
        zone_present=jnp.arange(NUM_ZONES) < zones,
        zone_position=zone_position,
        tcp=jnp.zeros(3),
        tcp_yaw=_between(uniform["tcp_yaw"], -TCP_YAW, TCP_YAW),
        background=background,
        light=light / jnp.linalg.norm(light),
        brightness=_between(uniform["brightness"], *BRIGHTNESS),
        camera_shift=jnp.asarray(CAMERA_JITTER)[:, None] * _between(uniform["camera"], -1.0, 1.0),
    )
    return dataclasses.replace(scene, tcp=_draw_tcp(uniform, scene, bias))


def _draw_look(uniform, bias, objects, held_out, new_background):
    """Colours, shapes, marks and table colour: [N], [N], [N], []."""
    kinds = (NUM_TRAIN_BACKGROUNDS, NUM_BACKGROUNDS) if new_background else (0, NUM_TRAIN_BACKGROUNDS)
    background = _integer(uniform["background"], *kinds)

    # The pairs of the highest rank go into the scene: those that must, then others of the training pairs.
    unseen = bias_law.pair_index(bias_law.HELD_OUT_PAIRS)
    held_rank = jnp.where(uniform["pairs"][unseen] == jnp.max(uniform["pairs"][unseen]), 3.0, -1.0)
    rank = uniform["pairs"].at[unseen].set(held_rank if held_out else -1.0)
    if bias.coupling == "background":
        rank = rank.at[bias_law.pair_index(bias_law.BACKGROUND_PAIRS)[background % NUM_TRAIN_BACKGROUNDS]].set(2.0)
    chosen = jnp.argsort(-rank)[:objects]

    # Which slot holds what carries no meaning: shuffle, so that nothing can come to depend on it.
    order = jnp.argsort(uniform["order"][:objects])
    chosen = jnp.zeros(NUM_SLOTS, jnp.int32).at[:objects].set(chosen[order])
    movable = jnp.ones(NUM_SLOTS, bool)
    if bias.coupling == "uniqueness":
        movable = jnp.arange(NUM_SLOTS) == jnp.argmax(uniform["mark"][:objects])
    return chosen // len(SHAPES), chosen % len(SHAPES), movable, background


def _draw_places(uniform, objects, zones) -> tuple[Float[Array, "N 2"], Float[Array, "Z 2"]]:
    """Spots on the table, zones first, each the first of its _SPOTS that keeps its distance (if none: the first)."""
    spots = _table_point(uniform)
    placed = []
    for index in range(zones + objects):
        is_zone = index < zones
        room = jnp.full(_SPOTS, jnp.inf)
        for other, point in enumerate(placed):
            spacing = OBJECT_SPACING if other >= zones else ZONE_SPACING if is_zone else ZONE_OBJECT_SPACING
            room = jnp.minimum(room, jnp.linalg.norm(spots[index] - point, axis=-1) - spacing)
        placed.append(spots[index, jnp.argmax(room >= 0)])
    return _parked(placed[zones:], NUM_SLOTS), _parked(placed[:zones], NUM_ZONES)


def _parked(placed, count) -> Float[Array, "count 2"]:
    """The placed points, then spots out of sight, apart from each other, up to `count`."""
    absent = [jnp.asarray((PARKED_X, 0.3 * index)) for index in range(len(placed), count)]
    return jnp.stack([*placed, *absent])


def _draw_tcp(uniform, scene, bias) -> Float[Array, "3"]:
    """A spot above the table from which the look is clear, if there is one among _SPOTS."""
    height = _between(uniform["height"], *TCP_HEIGHT)
    points = _table_point(uniform["tcp"])
    tcp = jnp.concatenate([points, jnp.full((_SPOTS, 1), height)], axis=-1)
    clear = jax.vmap(lambda point: _cue_is_clear(dataclasses.replace(scene, tcp=point), bias))(tcp)
    return tcp[jnp.argmax(clear)]


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
