"""Forward kinematics, Jacobian and inertia of a MuJoCo model, in plain JAX.

Both physics engines return joint positions only; everything that a task, a camera or a controller wants to know about
the bodies follows from them here, so it is the same for both engines. A body moves on a free joint, on slides, on one
hinge, or not at all.

Axis legend: B scenes, N object slots, Z zones, J arm joints.
"""

import dataclasses

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Float

from vla_jax.envs.physics import Bodies
from vla_jax.envs.scene import NUM_SLOTS, NUM_ZONES

HINGE, SLIDE, FREE = (int(getattr(mujoco.mjtJoint, f"mjJNT_{name}")) for name in ("HINGE", "SLIDE", "FREE"))


def quaternion_matrix(quaternion: Float[Array, "*B 4"]) -> Float[Array, "*B 3 3"]:
    """Rotation matrix of a unit quaternion (w, x, y, z)."""
    w, x, y, z = (quaternion[..., i] for i in range(4))
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return jnp.stack([jnp.stack(row, -1) for row in rows], -2)


def axis_rotation(axis: np.ndarray, angle: Float[Array, "*B"]) -> Float[Array, "*B 3 3"]:
    """Rotation by an angle (radians) about a fixed unit axis (Rodrigues' formula)."""
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]], np.float32)
    sin, cos = jnp.sin(angle)[..., None, None], jnp.cos(angle)[..., None, None]
    return np.eye(3, dtype=np.float32) + sin * cross + (1 - cos) * (cross @ cross)


def yaw_of(rotation: Float[Array, "*B 3 3"]) -> Float[Array, "*B"]:
    """Heading of a frame's x axis in the horizontal plane, radians."""
    return jnp.arctan2(rotation[..., 1, 0], rotation[..., 0, 0])


def constant_rotation(quaternion: np.ndarray) -> Float[np.ndarray, "3 3"]:
    """The matrix of a unit quaternion (w, x, y, z), on the host."""
    matrix = np.zeros(9)
    mujoco.mju_quat2Mat(matrix, np.asarray(quaternion, np.float64))
    return matrix.reshape(3, 3).astype(np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chain:
    """The tcp and, for every joint of the arm, a point on its axis and the axis' direction (world frame)."""

    tcp_position: Float[Array, "*B 3"]
    tcp_rotation: Float[Array, "*B 3 3"]
    anchor: Float[Array, "*B J 3"]
    axis: Float[Array, "*B J 3"]
    frames: list[tuple[Float[Array, "*B 3"], Float[Array, "*B 3 3"]]]  # of the links, base to hand


class Kinematics:
    """Forward kinematics of one model; the model's constants are read once."""

    def __init__(self, model: mujoco.MjModel):
        self._model = model
        self._tcp = model.site("tcp").id
        self._objects = [model.body(f"object{n}").id for n in range(NUM_SLOTS)]
        self._zones = {model.body(f"zone{z}").id: z for z in range(NUM_ZONES)}
        self._fingers = [int(model.joint(name).qposadr[0]) for name in ("finger_left", "finger_right")]
        self._hand_chain = self._ancestors(int(model.site_bodyid[self._tcp]))
        self._arm = [joint for body in self._hand_chain for joint in self._joints(body)]

    def _ancestors(self, body: int) -> list[int]:
        chain = [body]
        while chain[0] != 0:
            chain.insert(0, int(self._model.body_parentid[chain[0]]))
        return chain

    def _joints(self, body: int) -> range:
        first = int(self._model.body_jntadr[body])
        return range(first, first + int(self._model.body_jntnum[body]))

    def _frame(self, body: int, parent, qpos, zone_position):
        """World position and rotation of a body, given its parent's."""
        model, (position, rotation), joints = self._model, parent, self._joints(body)
        if body in self._zones:
            xy = zone_position[..., self._zones[body], :]
            height = jnp.broadcast_to(jnp.float32(model.body_pos[body][2]), xy.shape[:-1] + (1,))
            return jnp.concatenate([xy, height], -1), jnp.broadcast_to(jnp.eye(3), xy.shape[:-1] + (3, 3))
        if joints and model.jnt_type[joints[0]] == FREE:
            at = int(model.jnt_qposadr[joints[0]])
            return qpos[..., at : at + 3], quaternion_matrix(qpos[..., at + 3 : at + 7])
        position = position + rotation @ model.body_pos[body].astype(np.float32)
        rotation = rotation @ constant_rotation(model.body_quat[body])
        for index in joints:
            axis, value = model.jnt_axis[index].astype(np.float32), qpos[..., int(model.jnt_qposadr[index])]
            if model.jnt_type[index] == SLIDE:
                position = position + (rotation @ axis) * value[..., None]
            else:
                rotation = rotation @ axis_rotation(axis, value)
        # Without a barrier, XLA's CPU compiler recomputes the whole chain in every child of this body.
        return jax.lax.optimization_barrier((position, rotation))

    def _frames(self, chain, qpos, zone_position):
        batch = qpos.shape[:-1]
        frames = {0: (jnp.zeros(batch + (3,)), jnp.broadcast_to(jnp.eye(3), batch + (3, 3)))}
        for body in chain:
            if body:
                parent = frames[int(self._model.body_parentid[body])]
                frames[body] = self._frame(body, parent, qpos, zone_position)
        return frames

    def _site(self, frames):
        position, rotation = frames[int(self._model.site_bodyid[self._tcp])]
        offset = self._model.site_pos[self._tcp].astype(np.float32)
        return position + rotation @ offset, rotation @ constant_rotation(self._model.site_quat[self._tcp])

    def bodies(self, qpos: Float[Array, "*B nq"], zone_position: Float[Array, "*B Z 2"]) -> Bodies:
        """Poses of all geoms, of the tcp and of the objects."""
        model = self._model
        frames = self._frames(range(model.nbody), qpos, zone_position)
        geom_body = [frames[int(body)] for body in model.geom_bodyid]
        geom_rotation = [rotation @ constant_rotation(model.geom_quat[g]) for g, (_, rotation) in enumerate(geom_body)]
        geom_position = [
            position + rotation @ model.geom_pos[g].astype(np.float32)
            for g, (position, rotation) in enumerate(geom_body)
        ]
        tcp_position, tcp_rotation = self._site(frames)
        return Bodies(
            geom_position=jnp.stack(geom_position, -2),
            geom_rotation=jnp.stack(geom_rotation, -3),
            tcp_position=tcp_position,
            tcp_rotation=tcp_rotation,
            object_position=jnp.stack([frames[body][0] for body in self._objects], -2),
            object_rotation=jnp.stack([frames[body][1] for body in self._objects], -3),
            opening=sum(qpos[..., finger] for finger in self._fingers),
        )

    def chain(self, arm: Float[Array, "*B J"]) -> Chain:
        """The tcp and the joint axes of the arm, given its joint positions."""
        frames = self._frames(self._hand_chain, arm, None)
        tcp_position, tcp_rotation = self._site(frames)
        placed = [frames[int(self._model.jnt_bodyid[joint])] for joint in self._arm]
        axes = [
            rotation @ self._model.jnt_axis[j].astype(np.float32)
            for j, (_, rotation) in zip(self._arm, placed, strict=True)
        ]
        return Chain(
            tcp_position=tcp_position,
            tcp_rotation=tcp_rotation,
            anchor=jnp.stack([position for position, _ in placed], -2),
            axis=jnp.stack(axes, -2),
            frames=[frames[body] for body in self._hand_chain[1:]],
        )

    def mass_matrix(self, arm: Float[Array, "*B J"]) -> Float[Array, "*B J J"]:
        """Inertia of the arm's joints, motor inertia included; what the hand carries counts as part of it.

        M = sum over links of m Jv' Jv + Jw' I Jw, with the Jacobians of each link's centre of mass.
        """
        model, chain, links = self._model, self.chain(arm), self._hand_chain[1:]
        turns = (model.jnt_type[self._arm] == HINGE)[:, None]
        total = jnp.asarray(np.diag(model.dof_armature[: len(self._arm)]).astype(np.float32))
        for link, (position, rotation) in zip(links, chain.frames, strict=True):
            mass = model.body_subtreemass[link] if link == links[-1] else model.body_mass[link]
            principal = rotation @ constant_rotation(model.body_iquat[link])
            inertia = (principal * model.body_inertia[link].astype(np.float32)) @ jnp.swapaxes(principal, -1, -2)
            centre = (position + rotation @ model.body_ipos[link].astype(np.float32))[..., None, :]
            moves = (model.jnt_bodyid[self._arm] <= link)[:, None]
            linear = jnp.where(turns, jnp.cross(chain.axis, centre - chain.anchor), chain.axis) * moves
            angular = chain.axis * (turns & moves)
            total = total + mass * linear @ jnp.swapaxes(linear, -1, -2)
            total = total + angular @ inertia @ jnp.swapaxes(angular, -1, -2)
        return total


def jacobian(chain: Chain) -> Float[Array, "*B 6 J"]:
    """Geometric Jacobian at the tcp of an arm of hinges: rows are linear (m/rad) then angular velocity, world frame."""
    linear = jnp.cross(chain.axis, chain.tcp_position[..., None, :] - chain.anchor)
    return jnp.swapaxes(jnp.concatenate([linear, chain.axis], -1), -1, -2)
