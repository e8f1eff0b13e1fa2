"""A hand that floats: three slides and a turn about the vertical carry it, without an arm. For fast tests."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.envs.kinematics import Kinematics

JOINTS = 4  # x, y, z (metres) and yaw (radians) of the tcp

DEFAULTS = """<default class="carriage"><joint armature="0.1" damping="0"/></default>"""

ACTUATORS = "".join(
    f'<position name="{name}" joint="{name}" kp="{kp}" kv="{kv}"/>'
    for name, kp, kv in (("x", 4000, 200), ("y", 4000, 200), ("z", 4000, 200), ("yaw", 200, 10))
)


def arm(hand) -> str:
    """MJCF of the carriage; `hand(pos, quat)` is the MJCF of the hand. Joint positions are the tcp's pose."""
    return f"""
    <body name="gantry" gravcomp="1" childclass="carriage">
      <inertial mass="0.25" pos="0 0 0.1" diaginertia="0.0005 0.0005 0.0005"/>
      <joint name="x" type="slide" axis="1 0 0"/>
      <joint name="y" type="slide" axis="0 1 0"/>
      <joint name="z" type="slide" axis="0 0 1"/>
      <body name="carriage" gravcomp="1">
        <inertial mass="0.25" pos="0 0 0.1" diaginertia="0.0005 0.0005 0.0005"/>
        <joint name="yaw" type="hinge" axis="0 0 1"/>
        {hand("0 0 0.1034", "0 1 0 0")}
      </body>
    </body>"""


def inverse(
    kinematics: Kinematics, start: Float[Array, "B 4"], position: Float[Array, "B 3"], yaw: Float[Array, "B"]
) -> Float[Array, "B 4"]:
    """Joint positions that bring the tcp to a pose; exact."""
    return jnp.concatenate([position, yaw[:, None]], -1)


def rest(kinematics: Kinematics, position: Float[Array, "B 3"], yaw: Float[Array, "B"]) -> Float[Array, "B 4"]:
    """Joint positions of an episode's start."""
    return jnp.concatenate([position, yaw[:, None]], -1)
