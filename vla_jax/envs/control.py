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
from vla_jax.envs.physics import Bodies

ACTION_NAMES = ("dx", "dy", "dz", "dyaw", "opening")
ACTION_UNITS = ("m", "m", "m", "rad", "m")
STATE_NAMES = ("x", "y", "z", "sin_yaw", "cos_yaw", "opening")
STATE_UNITS = ("m", "m", "m", "1", "1", "m")

CONTROL_HZ = 10
SUBSTEPS = 10
RAMP_STEPS = 5  # physics steps in which a joint takes up its speed
MAX_STEP = 0.05  # metres per tick
MAX_TURN = 0.3  # radians per tick
WORKSPACE = np.array([(0.28, 0.72), (-0.32, 0.32), (0.012, 0.40)], np.float32)  # of the tcp, metres
YAW_LIMIT = 1.9  # radians either way
LEASH, LEASH_YAW = 0.02, 0.1  # metres and radians that the set point may lead the tcp: no wind-up against an obstacle


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pose:
    """The controller's set point: where the hand should be, and the arm's joints as commanded for it."""

    position: Float[Array, "*B 3"]  # metres
    yaw: Float[Array, "*B"]  # radians
    opening: Float[Array, "*B"]  # metres
    joints: Float[Array, "*B J"]  # radians (metres for a slide)
    speed: Float[Array, "*B J"]  # the same per second


def wrap(angle: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The same angle in [-pi, pi)."""
    return (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi


def clip_action(action: Float[Array, "*B 5"]) -> Float[Array, "*B 5"]:
    """The action that the controller will obey: the translation keeps its direction."""
    move, rest = action[..., :3], action[..., 3:]
    length = jnp.linalg.norm(move, axis=-1, keepdims=True)
    move = move * jnp.minimum(1.0, MAX_STEP / jnp.maximum(length, 1e-9))
    rest = jnp.clip(rest, np.array([-MAX_TURN, 0.0], np.float32), np.array([MAX_TURN, MAX_OPENING], np.float32))
    return jnp.concatenate([move, rest], -1)


def proprioception(bodies: Bodies) -> Float[Array, "*B 6"]:
    """What the robot feels of itself (see STATE_NAMES)."""
    yaw = yaw_of(bodies.tcp_rotation)
    rest = jnp.stack([jnp.sin(yaw), jnp.cos(yaw), bodies.opening], -1)
    return jnp.concatenate([bodies.tcp_position, rest], -1)


class Controller:
    """Turns a set point into one row of actuator commands per physics step."""

    def __init__(self, embodiment: str, model: mujoco.MjModel, kinematics: Kinematics):
        self.robot = EMBODIMENTS[embodiment]
        self._kinematics = kinematics
        # Servos kp (c - q) - (kv + damping) q' = M q'' hold the course q(t) if commanded c = q + lag q' + M q'' / kp.
        joints = self.robot.JOINTS
        self._gain = model.actuator_gainprm[:joints, 0].astype(np.float32)
        damping = model.dof_damping[:joints] - model.actuator_biasprm[:joints, 2]
        self._lag = (damping / self._gain).astype(np.float32)

    def start(self, position: Float[Array, "B 3"], yaw: Float[Array, "B"]) -> Pose:
        """The set point of an open hand at rest."""
        joints = self.robot.rest(self._kinematics, position, yaw)
        return Pose(position, yaw, jnp.full_like(yaw, MAX_OPENING), joints, jnp.zeros_like(joints))

    def advance(self, target: Pose, action: Float[Array, "B 5"], bodies: Bodies) -> tuple[Pose, Float[Array, "B T nu"]]:
        """The set point after an action, and the commands that bring the tcp there by the end of the tick."""
        action = clip_action(action)
        position, yaw = self._move(target, action, bodies)
        joints = self.robot.inverse(self._kinematics, target.joints, position, yaw)
        arm, speed = self._course(target.joints, target.speed, joints)
        finger = jnp.broadcast_to(action[:, None, 4:] / 2, arm.shape[:2] + (2,))
        return Pose(position, yaw, action[:, 4], joints, speed), jnp.concatenate([arm, finger], -1)

    def _move(self, target: Pose, action, bodies: Bodies):
        """The set point moved by an action: leashed to where the tcp is, and kept inside the workspace."""
        position, yaw = bodies.tcp_position, yaw_of(bodies.tcp_rotation)
        lead = jnp.clip(target.position - position, -LEASH, LEASH)
        lead_yaw = jnp.clip(wrap(target.yaw - yaw), -LEASH_YAW, LEASH_YAW)
        position = jnp.clip(position + lead + action[:, :3], WORKSPACE[:, 0], WORKSPACE[:, 1])
        return position, jnp.clip(yaw + lead_yaw + action[:, 3], -YAW_LIMIT, YAW_LIMIT)

    def _course(self, start, speed, goal):
        """Joint commands [B, T, J] from `start` to `goal` and the joints' speed at the end.

        Each joint's speed goes in a ramp from what it was to a constant that just covers the way; the command leads by
        the servo's lag and the arm's inertia (feed-forward), so that the arm is where the action asked it to be, and
        not a tick late. The course starts where the last one ended, not where the arm is: so it cannot make it ring.
        """
        start, speed, goal = start[:, None], speed[:, None], goal[:, None]
        dt = 1 / (CONTROL_HZ * SUBSTEPS)
        ramp = np.minimum((np.arange(SUBSTEPS) + 1) / RAMP_STEPS, 1.0).astype(np.float32)[:, None]
        cruise = ((goal - start) / dt - speed * (1 - ramp).sum()) / ramp.sum()
        acceleration = (cruise - speed) / (RAMP_STEPS * dt) * (np.arange(SUBSTEPS) < RAMP_STEPS)[:, None]
        velocity = speed + (cruise - speed) * ramp
        position = start + (jnp.cumsum(velocity, axis=1) - velocity) * dt  # at the beginning of each physics step
        push = jnp.einsum("btj,bjk->btk", acceleration, self._kinematics.mass_matrix(start[:, 0])) / self._gain
        return position + self._lag * velocity + push, cruise[:, 0]
