"""From a Cartesian action to actuator commands: one action a control tick, the same for both embodiments.

Action (A = 5), SI units: [dx, dy, dz] metres in the world frame, dyaw radians, gripper opening target in metres.
State (S = 6): tcp x, y, z in metres, sin(yaw), cos(yaw), opening in metres.

Axis legend: B scenes, T physics steps of a tick, J arm joints, A action width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Float

from vla_jax.envs.kinematics import Kinematics, yaw_of
from vla_jax.envs.mjcf import EMBODIMENTS, MAX_OPENING
from vla_jax.envs.physics import Bodies, PhysicsState

ACTION_NAMES = ("dx", "dy", "dz", "dyaw", "opening")
ACTION_UNITS = ("m", "m", "m", "rad", "m")
STATE_NAMES = ("x", "y", "z", "sin_yaw", "cos_yaw", "opening")
STATE_UNITS = ("m", "m", "m", "1", "1", "m")

CONTROL_HZ = 10
SUBSTEPS = 10
MAX_STEP = 0.05  # metres per tick and axis
MAX_TURN = 0.3  # radians per tick
WORKSPACE = np.array([(0.28, 0.72), (-0.32, 0.32), (0.012, 0.40)], np.float32)  # of the tcp, metres
YAW_LIMIT = 1.9  # radians either way
LEASH = 0.02  # metres (and radians / 5) that the set point may lead the tcp: no wind-up against an obstacle


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pose:
    """The controller's set point."""

    position: Float[Array, "*B 3"]  # metres
    yaw: Float[Array, "*B"]  # radians
    opening: Float[Array, "*B"]  # metres


def wrap(angle: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The same angle in [-pi, pi)."""
    return (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi


def clip_action(action: Float[Array, "*B 5"]) -> Float[Array, "*B 5"]:
    """The action that the controller will obey."""
    low = np.array([-MAX_STEP] * 3 + [-MAX_TURN, 0.0], np.float32)
    high = np.array([MAX_STEP] * 3 + [MAX_TURN, MAX_OPENING], np.float32)
    return jnp.clip(action, low, high)


def proprioception(bodies: Bodies) -> Float[Array, "*B 6"]:
    """What the robot feels of itself (see STATE_NAMES)."""
    yaw = yaw_of(bodies.tcp_rotation)
    rest = jnp.stack([jnp.sin(yaw), jnp.cos(yaw), bodies.opening], -1)
    return jnp.concatenate([bodies.tcp_position, rest], -1)


def advance_target(target: Pose, action: Float[Array, "B 5"], bodies: Bodies) -> Pose:
    """The set point after an action: clipped, leashed to where the tcp is, kept inside the workspace."""
    action = clip_action(action)
    position, yaw = bodies.tcp_position, yaw_of(bodies.tcp_rotation)
    lead = jnp.clip(target.position - position, -LEASH, LEASH)
    lead_yaw = jnp.clip(wrap(target.yaw - yaw), -5 * LEASH, 5 * LEASH)
    return Pose(
        position=jnp.clip(position + lead + action[:, :3], WORKSPACE[:, 0], WORKSPACE[:, 1]),
        yaw=jnp.clip(yaw + lead_yaw + action[:, 3], -YAW_LIMIT, YAW_LIMIT),
        opening=action[:, 4],
    )


class Controller:
    """Turns a set point into one row of actuator commands per physics step."""

    def __init__(self, embodiment: str, model: mujoco.MjModel, kinematics: Kinematics):
        self.robot = EMBODIMENTS[embodiment]
        self._kinematics = kinematics
        # A servo kp (c - q) - kv q' trails a moving command by kv / kp seconds.
        gain, bias = model.actuator_gainprm[: self.robot.JOINTS], model.actuator_biasprm[: self.robot.JOINTS]
        self._lag = (-bias[:, 2] / gain[:, 0]).astype(np.float32)

    def path(self, physics: PhysicsState, target: Pose) -> Float[Array, "B T nu"]:
        """Joint commands that bring the tcp to the set point by the end of the tick.

        The joints move at constant speed; the command leads by the servo's lag (velocity feed-forward), so that the arm
        is where the action asked it to be, and not a tick late.
        """
        start = physics.qpos[:, : self.robot.JOINTS]
        goal = self.robot.inverse(self._kinematics, start, target.position, target.yaw)
        fraction = (jnp.arange(SUBSTEPS) + 1.0)[:, None] / SUBSTEPS
        lead = self._lag * CONTROL_HZ
        arm = start[:, None] + (goal - start)[:, None] * (fraction + lead)
        finger = jnp.broadcast_to(target.opening[:, None, None] / 2, arm.shape[:2] + (2,))
        return jnp.concatenate([arm, finger], -1)
