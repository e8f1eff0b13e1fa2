"""Reach: bring the open hand above the object that was named, nearer to it than to any other."""

import jax.numpy as jnp

from vla_jax.envs.mjcf import MAX_OPENING
from vla_jax.envs.tasks.base import Plan, Task, height, slot, stack, within

ABOVE = 0.065  # metres: height of the tcp over the table; the fingertips just clear an object
RADIUS = 0.035  # metres to that point


class Reach(Task):
    """The tcp is within `RADIUS` of the point above the target, and no other object is nearer."""

    name = "reach"
    stages = ("reach",)
    max_ticks = 16

    def success(self, scene, command, bodies, start):
        points = height(bodies.object_position, ABOVE)
        distance = jnp.linalg.norm(points - bodies.tcp_position[:, None], axis=-1)
        nearest = jnp.argmin(jnp.where(scene.present, distance, jnp.inf), -1)
        return (slot(distance, command.target) < RADIUS) & (nearest == command.target)

    def plan(self, scene, command, bodies, start):
        point = height(slot(bodies.object_position, command.target), ABOVE)
        away = jnp.linalg.norm((bodies.tcp_position - point)[:, :2], axis=-1)
        slope = jnp.clip(0.5 * (away - 0.03), 0.0, 0.05)  # come down on the object, over the others
        still = jnp.zeros_like(bodies.opening)
        return Plan(
            position=stack(point.at[:, 2].add(slope)),
            yaw=stack(still),
            opening=stack(still + MAX_OPENING),
            done=stack(within(bodies, point, RADIUS, RADIUS)),
            lost=stack(still > 0),
        )
