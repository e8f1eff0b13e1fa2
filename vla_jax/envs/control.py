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
RAMP_STEPS = 5  # physics steps in which a joint takes up its speed
MAX_STEP = 0.05  # metres per tick
MAX_TURN = 0.3  # radians per tick
WORKSPACE = np.array([(0.28, 0.72), (-0.32, 0.32), (0.012, 0.40)], np.float32)  # of the tcp, metres
EFFORT = 0.7  # share of the largest motor force that a motion may ask for; saturated servos chatter
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
        # Servos kp (c - q) - (kv + damping) q' = M q'' hold the course q(t) if c = q + lag q' + M q'' / kp is commanded.
        joints = self.robot.JOINTS
        self._gain = model.actuator_gainprm[:joints, 0].astype(np.float32)
        damping = model.dof_damping[:joints] - model.actuator_biasprm[:joints, 2]
        self._lag = (damping / self._gain).astype(np.float32)
        self._mass = _mass_matrix(model, self.robot.HOME)
        limited = model.actuator_forcelimited[:joints].astype(bool)
        self._effort = np.where(limited, EFFORT * model.actuator_forcerange[:joints, 1], np.inf).astype(np.float32)

    def path(self, physics: PhysicsState, target: Pose) -> Float[Array, "B T nu"]:
        """Joint commands that bring the tcp to the set point by the end of the tick.

        Each joint's speed goes in a ramp from what it is to a constant that just covers the way, so that the motors need not
        saturate; the command leads by the servo's lag (velocity feed-forward), so that the arm is where the action asked
        it to be, and not a tick late.
        """
        joints, dt = self.robot.JOINTS, 1 / (CONTROL_HZ * SUBSTEPS)
        start, speed = physics.qpos[:, None, :joints], physics.qvel[:, None, :joints]
        goal = self.robot.inverse(self._kinematics, start[:, 0], target.position, target.yaw)[:, None]
        ramp = np.minimum((np.arange(SUBSTEPS) + 1) / RAMP_STEPS, 1.0).astype(np.float32)[:, None]
        cruise = ((goal - start) / dt - speed * (1 - ramp).sum()) / ramp.sum()
        acceleration = (cruise - speed) / (RAMP_STEPS * dt)
        force = jnp.einsum("btj,kj->btk", acceleration, self._mass)
        share = jnp.min(self._effort / jnp.maximum(jnp.abs(force), 1e-6), axis=-1, keepdims=True)
        share = jnp.minimum(share, 1.0)
        velocity = speed + share * (cruise - speed) * ramp
        position = start + (jnp.cumsum(velocity, axis=1) - velocity) * dt  # at the beginning of each physics step
        push = share * force / self._gain * (np.arange(SUBSTEPS) < RAMP_STEPS)[:, None]
        arm = position + self._lag * velocity + push
        finger = jnp.broadcast_to(target.opening[:, None, None] / 2, arm.shape[:2] + (2,))
        return jnp.concatenate([arm, finger], -1)


def _mass_matrix(model: mujoco.MjModel, home: np.ndarray) -> np.ndarray:
    """Inertia of the arm's joints in the home posture."""
    data = mujoco.MjData(model)
    data.qpos[: len(home)] = home
    mujoco.mj_forward(model, data)
    matrix = np.zeros((model.nv, model.nv))
    mujoco.mj_fullM(model, data, matrix)
    return matrix[: len(home), : len(home)].astype(np.float32)
