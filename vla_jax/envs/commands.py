"""Which commands a scene admits.

A command is a target, and for some families a goal and a relation. The table of all combinations has a fixed length M
per family, with a mask, so that it can be built, sampled from and summed over inside a compiled program:

    reach, pick       M = N          every object
    push              M = N * 4      every object, pushed PUSH_DISTANCE along each relation
    place_on          M = N * Z      every object into each zone
    place_relative    M = N * N * 4  every object to RELATIVE_DISTANCE from each other object, along each relation

Axis legend: N object slots, Z zone slots, M combinations. A leading scene axis is mapped over.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vla_jax.envs.scene import (
    NUM_SLOTS,
    NUM_ZONES,
    PUSH_DISTANCE,
    RELATION_VECTORS,
    RELATIONS,
    RELATIVE_DISTANCE,
    TABLE_X,
    TABLE_Y,
    Command,
    Scene,
)
from vla_jax.envs.tasks import check_family

PUSH_RUN_UP = 0.05  # the gripper comes down this far behind the object that it pushes (metres)
PUSH_CLEARANCE = 0.06  # from the pushed object's path, run-up included, to any other object's centre (metres)
RELATIVE_CLEARANCE = 0.08  # from the spot asked for to any third object's centre, so that the open fingers fit (metres)
RELATIVE_TRAVEL = 0.065  # a target that already is this near the spot asked for has nothing to do (metres)


def has_zones(task_name: str) -> bool:
    """Whether the family's scenes hold the goal zones."""
    return task_name == "place_on"


def valid_commands(task_name: str, scene: Scene) -> tuple[Command, Bool[Array, "*B M"]]:
    """Every combination of target, goal and relation, and whether `scene` admits it.

    The commands have leading axes [*B, M] and the plainest wording (referent 0, template 0). An admitted command can be
    carried out on the table without touching a third object, and is not fulfilled already.

    Raises:
        UserError: the family is unknown.
    """
    check_family(task_name)
    if jnp.ndim(scene.background):
        return jax.vmap(functools.partial(valid_commands, task_name))(scene)
    commands = _combinations(task_name)
    valid = jnp.asarray(scene.present)[commands.target]
    if task_name == "push":
        valid &= _can_push(scene, commands)
    elif task_name == "place_on":
        valid &= jnp.asarray(scene.zone_present)[commands.goal]
    elif task_name == "place_relative":
        valid &= _can_place_relative(scene, commands)
    return commands, valid


def _combinations(task_name: str) -> Command:
    goals = {"place_on": NUM_ZONES, "place_relative": NUM_SLOTS}.get(task_name, 1)
    relations = len(RELATIONS) if task_name in ("push", "place_relative") else 1
    target, goal, relation = np.indices((NUM_SLOTS, goals, relations), dtype=np.int32).reshape(3, -1)
    plain = np.zeros_like(target)
    return Command(*(jnp.asarray(field) for field in (target, goal, relation, plain, plain)))


def _can_push(scene: Scene, commands: Command) -> Bool[Array, "M"]:
    start = jnp.asarray(scene.position)[commands.target]
    direction = jnp.asarray(RELATION_VECTORS)[commands.relation]
    to_others = jnp.asarray(scene.position)[None] - start[:, None]  # [M, N, 2]
    along = jnp.clip(jnp.einsum("mnd,md->mn", to_others, direction), -PUSH_RUN_UP, PUSH_DISTANCE)
    from_path = jnp.linalg.norm(to_others - along[..., None] * direction[:, None], axis=-1)
    others = jnp.asarray(scene.present) & (jnp.arange(NUM_SLOTS) != commands.target[:, None])
    clear = jnp.all((from_path >= PUSH_CLEARANCE) | ~others, axis=-1)
    return clear & _on_table(start + PUSH_DISTANCE * direction)


def _can_place_relative(scene: Scene, commands: Command) -> Bool[Array, "M"]:
    position, present = jnp.asarray(scene.position), jnp.asarray(scene.present)
    spot = position[commands.goal] + RELATIVE_DISTANCE * jnp.asarray(RELATION_VECTORS)[commands.relation]
    slots = jnp.arange(NUM_SLOTS)
    third = present & (slots != commands.target[:, None]) & (slots != commands.goal[:, None])
    from_spot = jnp.linalg.norm(position[None] - spot[:, None], axis=-1)  # [M, N]
    clear = jnp.all((from_spot >= RELATIVE_CLEARANCE) | ~third, axis=-1)
    away = jnp.linalg.norm(position[commands.target] - spot, axis=-1) >= RELATIVE_TRAVEL
    return present[commands.goal] & (commands.goal != commands.target) & clear & away & _on_table(spot)


def _on_table(point: Float[Array, "*M 2"]) -> Bool[Array, "*M"]:
    low = jnp.asarray((TABLE_X[0], TABLE_Y[0]))
    high = jnp.asarray((TABLE_X[1], TABLE_Y[1]))
    return jnp.all((point >= low) & (point <= high), axis=-1)
