"""Pick: lift the object that was named, and hold it."""

import jax.numpy as jnp

from vla_jax.envs.kinematics import yaw_of
from vla_jax.envs.tasks.base import CARRY, Plan, Task, height, join, slot, stack, undisturbed
from vla_jax.envs.tasks.grasping import GRASP_STAGES, grasp_plan, holding

LIFTED = 0.06  # metres above where it lay


class Pick(Task):
    """The target is `LIFTED` higher than it was, between the fingers; nothing else has been moved."""

    name = "pick"
    stages = (*GRASP_STAGES, "lift")
    max_ticks = 40

    def success(self, scene, command, bodies, start):
        rise = slot(bodies.object_position - start, command.target)[:, 2]
        held = holding(bodies, command.target)
        return (rise > LIFTED) & held & undisturbed(scene, command, bodies, start)

    def plan(self, scene, command, bodies, start):
        yaw, held = yaw_of(bodies.tcp_rotation), holding(bodies, command.target)
        lift = Plan(
            position=stack(height(bodies.tcp_position, CARRY)),
            yaw=stack(yaw),
            opening=stack(jnp.zeros_like(yaw)),
            done=stack(jnp.zeros_like(held)),
            lost=stack(~held),
        )
        return join(grasp_plan(bodies, command.target), lift)
