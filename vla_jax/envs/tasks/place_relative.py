"""Place relative: put the object that was named left of, right of, in front of or behind another, as the robot sees."""

import jax.numpy as jnp

from vla_jax.envs.scene import RELATION_VECTORS, RELATIVE_DISTANCE
from vla_jax.envs.tasks.base import Task, join, released, slot, undisturbed
from vla_jax.envs.tasks.grasping import GRASP_STAGES, PLACE_STAGES, grasp_plan, place_plan

ALONG = (0.05, 0.14)  # metres from the other object along the relation's direction
ASIDE = 0.035  # metres off that direction


class PlaceRelative(Task):
    """The target lies beside the other object, on the side that was asked for, let go; nothing else has been moved."""

    name = "place_relative"
    stages = GRASP_STAGES + PLACE_STAGES
    max_ticks = 60

    def success(self, scene, command, bodies, start):
        target, other = (slot(bodies.object_position, index) for index in (command.target, command.goal))
        direction = jnp.asarray(RELATION_VECTORS)[command.relation]
        gap = (target - other)[:, :2]
        along = jnp.sum(gap * direction, axis=-1)
        aside = jnp.linalg.norm(gap - along[:, None] * direction, axis=-1)
        related = (along > ALONG[0]) & (along < ALONG[1]) & (aside < ASIDE)
        return related & released(bodies, target) & undisturbed(scene, command, bodies, start)

    def plan(self, scene, command, bodies, start):
        direction = jnp.asarray(RELATION_VECTORS)[command.relation]
        spot = slot(bodies.object_position, command.goal)[:, :2] + RELATIVE_DISTANCE * direction
        return join(grasp_plan(bodies, command.target), place_plan(bodies, command.target, spot))
