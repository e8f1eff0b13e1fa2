"""What every task family shares: the family itself, and the pieces of a closed-loop expert.

An expert is a phase machine written with arrays: the phase of each scene selects a row from the family's way-points,
the action heads for it from where the tcp *is*, and the phase advances when it has been reached. Nothing is remembered
but the phase, so the expert recovers from noise, and a slipped object sends it back to the start.

Axis legend: B scenes, P phases, N object slots.
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.envs.control import clip_action, wrap
from vla_jax.envs.kinematics import yaw_of
from vla_jax.envs.physics import Bodies
from vla_jax.envs.scene import OBJECT_HALF, Command, Scene

DISTURBED = 0.03  # metres that an object which was not asked for may have moved
LOW = OBJECT_HALF + 0.015  # metres: an object's centre below this lies on the table
CLEAR = 0.05  # metres between the tcp and an object that has been let go
HOVER = 0.10  # metres: the tcp's height when it travels above the objects
CARRY = 0.12
GRASP_HEIGHT = 0.02


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """An expert's phases, one row each, for the present state."""

    position: Float[Array, "P B 3"]  # way-points of the tcp
    yaw: Float[Array, "P B"]
    opening: Float[Array, "P B"]
    done: Bool[Array, "P B"]  # the phase has done its work
    lost: Bool[Array, "P B"]  # start again


class Task(abc.ABC):
    """A task family: when a command is fulfilled, and how an expert fulfils it."""

    name: str
    stages: tuple[str, ...]  # what each phase of the expert is called
    max_ticks: int  # an episode's length in control ticks

    @abc.abstractmethod
    def success(self, scene: Scene, command: Command, bodies: Bodies, start: Float[Array, "B N 3"]) -> Bool[Array, "B"]:
        """Whether the command is fulfilled now; `start` holds the objects' first positions."""

    @abc.abstractmethod
    def plan(self, scene: Scene, command: Command, bodies: Bodies, start: Float[Array, "B N 3"]) -> Plan:
        """The expert's phases."""

    def expert(
        self,
        scene: Scene,
        command: Command,
        bodies: Bodies,
        start: Float[Array, "B N 3"],
        phase: Int[Array, "B"],
    ) -> tuple[Float[Array, "B 5"], Int[Array, "B"]]:
        """The expert's action (SI units, within the controller's limits) and the phase it belongs to."""
        plan = self.plan(scene, command, bodies, start)
        last = len(self.stages) - 1
        phase = jnp.where(_row(plan.lost, phase), 0, jnp.minimum(phase + _row(plan.done, phase), last))
        move = _row(plan.position, phase) - bodies.tcp_position
        turn = wrap(_row(plan.yaw, phase) - yaw_of(bodies.tcp_rotation))
        action = jnp.concatenate([move, turn[:, None], _row(plan.opening, phase)[:, None]], -1)
        return clip_action(action), phase


def _row(table: Array, phase: Int[Array, "B"]) -> Array:
    """Row phase[b] of table[:, b]."""
    return table[phase, jnp.arange(phase.shape[0])]


def slot(values: Array, index: Int[Array, "B"]) -> Array:
    """values[b, index[b]]."""
    return values[jnp.arange(index.shape[0]), index]


def height(position: Float[Array, "*B 3"], z) -> Float[Array, "*B 3"]:
    """The point above or below `position` at height z (metres)."""
    return position.at[..., 2].set(z)


def undisturbed(scene: Scene, command: Command, bodies: Bodies, start: Float[Array, "B N 3"]) -> Bool[Array, "B"]:
    """No present object but the target has moved by `DISTURBED`."""
    moved = jnp.linalg.norm(bodies.object_position - start, axis=-1) > DISTURBED
    other = jnp.arange(moved.shape[-1]) != command.target[:, None]
    return ~(moved & other & scene.present).any(-1)


def released(bodies: Bodies, target: Float[Array, "B 3"]) -> Bool[Array, "B"]:
    """The object lies low, the fingers are open and away from it."""
    away = jnp.linalg.norm(bodies.tcp_position - target, axis=-1) > CLEAR
    return (target[:, 2] < LOW) & (bodies.opening > 0.05) & away


def within(bodies: Bodies, point: Float[Array, "B 3"], flat: float, vertical: float) -> Bool[Array, "B"]:
    """The tcp is near a point, sideways and in height (metres)."""
    gap = bodies.tcp_position - point
    return (jnp.linalg.norm(gap[:, :2], axis=-1) < flat) & (jnp.abs(gap[:, 2]) < vertical)


def square_yaw(yaw: Float[Array, "B"], near: Float[Array, "B"], period: float = jnp.pi / 2) -> Float[Array, "B"]:
    """The heading equivalent to `yaw` under the symmetry of a cube (or of the hand) that is nearest to `near`."""
    return near + (yaw - near + period / 2) % period - period / 2


def grasp_yaw(bodies: Bodies, target: Int[Array, "B"]) -> Float[Array, "B"]:
    """Heading of the hand that grips the object by two of its faces, within 45 degrees of straight ahead."""
    yaw = yaw_of(slot(bodies.object_rotation, target))
    return square_yaw(yaw, jnp.zeros_like(yaw))


def above(bodies: Bodies, point: Float[Array, "B 3"]) -> Float[Array, "B 3"]:
    """`point` at travelling height; reached by rising first when the hand is low and has some way to go."""
    low = bodies.tcp_position[:, 2] < HOVER - 0.03
    far = jnp.linalg.norm(bodies.tcp_position[:, :2] - point[:, :2], axis=-1) > 0.03
    return height(jnp.where((low & far)[:, None], bodies.tcp_position, point), HOVER)


def stack(*rows) -> Array:
    """Phase rows as one table; scalars are broadcast."""
    shape = jnp.broadcast_shapes(*(jnp.shape(row) for row in rows))
    return jnp.stack([jnp.broadcast_to(row, shape) for row in rows])


def join(first: Plan, second: Plan) -> Plan:
    """The phases of two plans, one after the other."""
    return jax.tree.map(lambda *tables: jnp.concatenate(tables), first, second)
