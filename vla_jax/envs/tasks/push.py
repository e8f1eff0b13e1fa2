"""Push: slide the object that was named to the robot's left or right, towards the robot or away from it."""

import jax.numpy as jnp

from vla_jax.envs.kinematics import yaw_of
from vla_jax.envs.scene import PUSH_DISTANCE, RELATION_VECTORS
from vla_jax.envs.tasks.base import HOVER, LOW, Plan, Task, above, height, slot, square_yaw, stack, undisturbed, within

PUSHED = 0.06  # metres along the direction
ASIDE = 0.04  # metres off it
RUN_UP = 0.05  # metres behind the object where the hand comes down
PUSH_HEIGHT = 0.016
DRIFT = 0.01  # metres off its line that the object may be without the hand following it
PUSH_STEP = 0.025  # metres per tick
PUSH_OPENING = 0.03  # metres; two fingertips side by side keep the object from turning away


class Push(Task):
    """The target has moved `PUSHED` along the direction and less than `ASIDE` off it; nothing else has been moved."""

    name = "push"
    stages = ("approach", "descend", "push", "retreat")
    max_ticks = 40

    def success(self, scene, command, bodies, start):
        along, aside = _travel(command, bodies, start)
        low = slot(bodies.object_position, command.target)[:, 2] < LOW
        straight = jnp.linalg.norm(aside, axis=-1) < ASIDE
        return (along > PUSHED) & straight & low & undisturbed(scene, command, bodies, start)

    def plan(self, scene, command, bodies, start):
        direction = jnp.asarray(RELATION_VECTORS)[command.relation]
        ahead = jnp.pad(direction, ((0, 0), (0, 1)))
        target, tcp = slot(bodies.object_position, command.target), bodies.tcp_position
        along, aside = _travel(command, bodies, start)
        heading = yaw_of(bodies.tcp_rotation)
        yaw = square_yaw(jnp.arctan2(direction[:, 1], direction[:, 0]), heading, jnp.pi)
        behind = height(target - RUN_UP * ahead, PUSH_HEIGHT)
        # Keep the hand near the line on which the object set out: a sideways correction at the object drags it along.
        line = target - jnp.pad(jnp.clip(aside, -DRIFT, DRIFT), ((0, 0), (0, 1)))
        across = line - tcp - jnp.sum((line - tcp) * ahead, axis=-1, keepdims=True) * ahead
        step = jnp.clip(PUSH_DISTANCE - along + 0.01, 0.0, PUSH_STEP) * (jnp.linalg.norm(across[:, :2], axis=-1) < 0.01)
        push = height(tcp + across + step[:, None] * ahead, PUSH_HEIGHT)
        offset = (tcp - target)[:, :2]
        lead = jnp.sum(offset * direction, axis=-1)
        astray = (jnp.linalg.norm(offset - lead[:, None] * direction, axis=-1) > 0.025) | (lead > -0.015)
        aligned, no = jnp.abs(heading - yaw) < 0.15, jnp.zeros_like(astray)
        pushed = along > PUSH_DISTANCE - 0.01
        return Plan(
            position=stack(above(bodies, behind), behind, push, height(tcp, HOVER)),
            yaw=stack(yaw, yaw, yaw, yaw),
            opening=stack(jnp.full_like(yaw, PUSH_OPENING), PUSH_OPENING, PUSH_OPENING, PUSH_OPENING),
            done=stack(
                within(bodies, height(behind, HOVER), 0.015, 0.03) & aligned,
                within(bodies, behind, 0.015, 0.01),
                pushed,
                no,
            ),
            lost=stack(no, no, astray & ~pushed, (tcp[:, 2] > HOVER - 0.02) & (along < PUSHED)),
        )


def _travel(command, bodies, start):
    """How far the target has moved along the command's direction (metres), and the rest of its way as a vector."""
    direction = jnp.asarray(RELATION_VECTORS)[command.relation]
    moved = slot(bodies.object_position - start, command.target)[:, :2]
    along = jnp.sum(moved * direction, axis=-1)
    return along, moved - along[:, None] * direction
