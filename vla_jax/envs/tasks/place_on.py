"""Place on: put the object that was named on the plate or into the bowl."""

import jax.numpy as jnp

from vla_jax.envs.scene import ZONE_RADIUS
from vla_jax.envs.tasks.base import Task, join, released, slot, undisturbed
from vla_jax.envs.tasks.grasping import GRASP_STAGES, PLACE_STAGES, grasp_plan, place_plan

NEAR = ZONE_RADIUS - 0.01  # metres from the zone's centre to the object's


class PlaceOn(Task):
    """The target lies within `NEAR` of the zone's centre, let go; nothing else has been moved."""

    name = "place_on"
    stages = GRASP_STAGES + PLACE_STAGES
    max_ticks = 60

    def success(self, scene, command, bodies, start):
        target = slot(bodies.object_position, command.target)
        gap = jnp.linalg.norm(target[:, :2] - slot(scene.zone_position, command.goal), axis=-1)
        return (gap < NEAR) & released(bodies, target) & undisturbed(scene, command, bodies, start)

    def plan(self, scene, command, bodies, start):
        spot = slot(scene.zone_position, command.goal)
        return join(grasp_plan(bodies, command.target), place_plan(bodies, command.target, spot))
