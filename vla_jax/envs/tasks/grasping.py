"""The expert's phases that pick and place share: take an object, bring it somewhere, let go."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.envs.kinematics import yaw_of
from vla_jax.envs.mjcf import MAX_OPENING
from vla_jax.envs.physics import Bodies
from vla_jax.envs.tasks.base import CARRY, GRASP_HEIGHT, HOVER, Plan, above, grasp_yaw, height, slot, stack, within

GRASP_STAGES = ("approach", "descend", "grasp")
PLACE_STAGES = ("lift", "carry", "lower", "release", "retreat")
RELEASE_OPENING = 0.06  # metres; opened wider, the fingers could strike a neighbour


def holding(bodies: Bodies, target: Int[Array, "B"]) -> Bool[Array, "B"]:
    """The object is between the fingers, and they have closed on it."""
    near = jnp.linalg.norm(slot(bodies.object_position, target) - bodies.tcp_position, axis=-1) < 0.025
    return near & (bodies.opening > 0.03) & (bodies.opening < 0.05)


def grasp_plan(bodies: Bodies, target: Int[Array, "B"]) -> Plan:
    """Come from above with open fingers that face two sides of the cube, go down, close."""
    position = slot(bodies.object_position, target)
    yaw, point = grasp_yaw(bodies, target), height(position, GRASP_HEIGHT)
    aligned = jnp.abs(yaw_of(bodies.tcp_rotation) - yaw) < 0.1
    slipped = ~within(bodies, point, 0.03, 1.0)
    return Plan(
        position=stack(above(bodies, position), point, point),
        yaw=stack(yaw, yaw, yaw),
        opening=stack(jnp.full_like(yaw, MAX_OPENING), MAX_OPENING, 0.0),
        done=stack(
            within(bodies, height(position, HOVER), 0.015, 0.03) & aligned,
            within(bodies, point, 0.01, 0.008) & aligned,
            holding(bodies, target),
        ),
        lost=stack(jnp.zeros_like(aligned), slipped, slipped | (bodies.opening < 0.03)),
    )


def place_plan(bodies: Bodies, target: Int[Array, "B"], spot: Float[Array, "B 2"]) -> Plan:
    """Lift the object, carry it over a spot on the table, set it down there, let go and rise."""
    tcp, held = bodies.tcp_position, slot(bodies.object_position, target)
    grip = tcp - held  # the object need not sit in the middle of the hand
    goal = jnp.concatenate([spot, jnp.full_like(spot[:, :1], GRASP_HEIGHT)], -1) + grip.at[:, 2].set(0.0)
    down = goal.at[:, 2].set(tcp[:, 2] - held[:, 2] + GRASP_HEIGHT)
    missed = jnp.linalg.norm(held[:, :2] - spot, axis=-1)
    yaw, hold = yaw_of(bodies.tcp_rotation), holding(bodies, target)
    away = tcp[:, 2] > 0.09
    return Plan(
        position=stack(height(tcp, CARRY), height(goal, CARRY), down, tcp, height(tcp, CARRY)),
        yaw=stack(yaw, yaw, yaw, yaw, yaw),
        opening=stack(jnp.zeros_like(yaw), 0.0, 0.0, RELEASE_OPENING, RELEASE_OPENING),
        done=stack(
            tcp[:, 2] > CARRY - 0.03,
            missed < 0.012,
            (held[:, 2] < GRASP_HEIGHT + 0.004) & (missed < 0.02),
            bodies.opening > RELEASE_OPENING - 0.01,
            jnp.zeros_like(hold),
        ),
        lost=stack(~hold, ~hold, ~hold, jnp.zeros_like(hold), away & (missed > 0.03)),
    )
