"""What lies on the table and what is asked for: two plain pytrees, `Scene` and `Command`.

Everything that differs between scenes is an array, so that one compiled program serves every scene: objects sit in
`NUM_SLOTS` slots, goal zones in `NUM_ZONES` slots, and an absent one is parked off the table. World frame: metres, x
away from the robot base, y to the robot's left, z up, the table top at z = 0, the robot base at the origin.

Axis legend: N object slots, Z zone slots, V camera views. Arrays are written without the leading scene axis B;
`jax.vmap` and plain indexing add it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NUM_SLOTS = 4
NUM_ZONES = 2
NUM_VIEWS = 2
VIEWS = ("front", "wrist")

COLORS = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.13, 0.65, 0.20),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.93, 0.82, 0.12),
    "purple": (0.58, 0.16, 0.68),
    "cyan": (0.10, 0.75, 0.80),
}
SHAPES = ("cube", "cylinder", "ball")
ZONES = ("plate", "bowl")
RELATIONS = ("left of", "right of", "in front of", "behind")  # seen from the robot: +y, -y, -x (towards the robot), +x
RELATION_VECTORS = ((0.0, 1.0), (0.0, -1.0), (-1.0, 0.0), (1.0, 0.0))  # unit vectors (x, y) of RELATIONS
PUSH_DISTANCE = 0.08  # how far "push ... to the left" moves the target along its relation (metres)
RELATIVE_DISTANCE = 0.09  # from the reference object to the spot that "put ... left of ..." asks for (metres)

# Backgrounds (table colours): the first NUM_TRAIN_BACKGROUNDS occur in demonstrations, the rest only in tests.
NUM_TRAIN_BACKGROUNDS = 8
NUM_BACKGROUNDS = 12

# The reachable patch of table in which objects and zones are placed (metres).
TABLE_X = (0.38, 0.62)
TABLE_Y = (-0.20, 0.20)
OBJECT_HALF = 0.02  # half the edge of an object (metres); every object collides as a cube of this size
POST_HALF = (0.01, 0.01, 0.12)  # half the edges of a post (metres)
POST_SLOT = NUM_SLOTS - 1  # holds the post on a table that has one (`env.Tabletop`)
ZONE_RADIUS = 0.055
PARKED_X = 2.0  # absent objects and zones wait here, out of every camera's sight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scene:
    """How a table looks and how an episode starts. One leaf per property; see the module's axis legend."""

    color: Int[Array, "*B N"]  # index into COLORS
    shape: Int[Array, "*B N"]  # index into SHAPES
    present: Bool[Array, "*B N"]
    movable: Bool[Array, "*B N"]  # a visual mark only: fixtures (False) are drawn darker
    position: Float[Array, "*B N 2"]  # metres, on the table
    yaw: Float[Array, "*B N"]  # radians
    zone_present: Bool[Array, "*B Z"]  # slot z holds ZONES[z]
    zone_position: Float[Array, "*B Z 2"]  # metres
    tcp: Float[Array, "*B 3"]  # where the gripper starts, metres
    tcp_yaw: Float[Array, "*B"]  # radians
    background: Int[Array, "*B"]  # table colour
    light: Float[Array, "*B 3"]  # direction towards the light, unit length
    brightness: Float[Array, "*B"]  # multiplies the light, around 1
    camera_shift: Float[Array, "*B V 3"]  # metres, added to each camera's position


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Command:
    """What is asked for. `target`, `goal` and `relation` say what to do; `referent` and `template` how it is said."""

    target: Int[Array, "*B"]  # object slot
    goal: Int[Array, "*B"]  # zone slot (place-on) or object slot (place-relative); 0 where the family has no goal
    relation: Int[Array, "*B"]  # index into RELATIONS (place-relative, push); 0 where unused
    referent: Int[Array, "*B"]  # how the target is named: index into language.REFERENTS
    template: Int[Array, "*B"]  # sentence template of the family


def take(tree, index):
    """Indexes the leading axis of every leaf."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], tree)
