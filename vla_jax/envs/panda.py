"""The Franka Panda in primitive shapes, and its inverse kinematics.

Kinematic chain, inertias, joint limits and actuator gains are those of the `franka_emika_panda` model of MuJoCo
Menagerie (https://github.com/google-deepmind/mujoco_menagerie), which is licensed under the Apache License, Version
2.0; it derives from Franka's public robot description (Copyright Franka Emika GmbH, Apache License, Version 2.0).
Changes made here: meshes are replaced by capsules, cylinders and boxes that are drawn but do not collide, gravity is
compensated on the links, and each finger has its own actuator, with more damping, in place of one for both.
You may obtain a copy of the licence at http://www.apache.org/licenses/LICENSE-2.0.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vla_jax.envs.kinematics import Kinematics, axis_rotation, jacobian

JOINTS = 7
HOME = np.array([0.0, 0.0, 0.0, -2.1, 0.0, 2.1, -0.7853], np.float32)
WIDE, ELBOW, WRIST = 2.8973, (-3.0718, -0.0698), (-0.0175, 3.7525)
LIMITS = np.array(
    [(-WIDE, WIDE), (-1.7628, 1.7628), (-WIDE, WIDE), ELBOW, (-WIDE, WIDE), WRIST, (-WIDE, WIDE)], np.float32
)
# Servo stiffness (N m/rad), servo damping, joint damping (N m s/rad) and largest torque (N m): Menagerie's MJX variant.
# The stiffer servos of its other variant chatter at this time step whenever they reach their torque limit.
GAINS = ((1000, 20, 40, 87),) * 2 + ((750, 4, 40, 87),) * 2 + ((300, 2, 2, 12),) * 3
DAMPING = 0.05  # of the least squares, metres and radians alike
REACH_ITERATIONS, REST_ITERATIONS = 3, 40

DEFAULTS = """<default class="panda"><joint armature="0.1" axis="0 0 1"/></default>"""

ACTUATORS = "".join(
    f'<position name="joint{i + 1}" joint="joint{i + 1}" kp="{kp}" kv="{kv}" forcerange="-{force} {force}" '
    f'ctrlrange="{low} {high}"/>'
    for i, ((kp, kv, _, force), (low, high)) in enumerate(zip(GAINS, LIMITS.tolist(), strict=True))
)

# Links 1 to 7: pos, quat, mass, centre of mass, inertia (xx yy zz xy xz yz), drawn capsule (from, to), its radius.
LINKS = (
    ("0 0 0.333", "1 0 0 0", 4.970684, "0.003875 0.002081 -0.04762",
     "0.70337 0.70661 0.0091170 -0.00013900 0.0067720 0.019169", "0 0 -0.20 0 0 0", 0.065),
    ("0 0 0", "1 -1 0 0", 0.646926, "-0.003141 -0.02872 0.003495",
     "0.0079620 2.8110e-2 2.5995e-2 -3.925e-3 1.0254e-2 7.04e-4", "0 -0.02 0 0 -0.20 0", 0.062),
    ("0 -0.316 0", "1 1 0 0", 3.228604, "2.7518e-2 3.9252e-2 -6.6502e-2",
     "3.7242e-2 3.6155e-2 1.083e-2 -4.761e-3 -1.1396e-2 -1.2805e-2", "0 0 -0.07 0.0825 0 0", 0.055),
    ("0.0825 0 0", "1 1 0 0", 3.587895, "-5.317e-2 1.04419e-1 2.7454e-2",
     "2.5853e-2 1.9552e-2 2.8323e-2 7.796e-3 -1.332e-3 8.641e-3", "0 0 0 -0.0825 0.10 0", 0.055),
    ("-0.0825 0.384 0", "1 -1 0 0", 1.225946, "-1.1953e-2 4.1065e-2 -3.8437e-2",
     "3.5549e-2 2.9474e-2 8.627e-3 -2.117e-3 -4.037e-3 2.29e-4", "0 0 -0.27 0 0.03 -0.06", 0.052),
    ("0 0 0", "1 1 0 0", 1.666555, "6.0149e-2 -1.4117e-2 -1.0517e-2",
     "1.964e-3 4.354e-3 5.433e-3 1.09e-4 -1.158e-3 3.41e-4", "0 0 0 0.088 0 0", 0.048),
    ("0.088 0 0", "1 1 0 0", 0.735522, "1.0517e-2 -4.252e-3 6.1597e-2",
     "1.2516e-2 1.0027e-2 4.815e-3 -4.28e-4 -1.196e-3 -7.41e-4", "0 0 0.01 0 0 0.095", 0.042),
)  # fmt: skip


def arm(hand) -> str:
    """MJCF of the arm, base at the origin; `hand(pos, quat)` is the MJCF of the hand."""
    inner = hand("0 0 0.107", "0.9238795 0 0 -0.3826834")
    for i, (pos, quat, mass, com, inertia, ends, radius) in reversed(list(enumerate(LINKS, 1))):
        low, high = LIMITS[i - 1].tolist()
        shade = "0.90 0.92 0.93 1" if i % 2 else "0.78 0.80 0.82 1"
        inner = f"""
    <body name="link{i}" pos="{pos}" quat="{quat}" gravcomp="1" childclass="panda">
      <inertial mass="{mass}" pos="{com}" fullinertia="{inertia}"/>
      <joint name="joint{i}" range="{low} {high}" damping="{GAINS[i - 1][2]}"/>
      <geom name="robot{i}" type="capsule" fromto="{ends}" size="{radius}" rgba="{shade}" class="drawn"/>
      {inner}
    </body>"""
    return f"""
    <body name="link0">
      <geom name="robot0" type="cylinder" size="0.09 0.07" pos="-0.02 0 0.07" rgba="0.90 0.92 0.93 1" class="drawn"/>
      {inner}
    </body>"""


def inverse(
    kinematics: Kinematics,
    start: Float[Array, "B 7"],
    position: Float[Array, "B 3"],
    yaw: Float[Array, "B"],
    iterations: int = REACH_ITERATIONS,
) -> Float[Array, "B 7"]:
    """Joint positions near `start` that bring the tcp to a pose, pointing down, within the joint limits.

    Damped least squares: dq = J'(J J' + d^2 I)^-1 (e - J h) + h, where e is the pose error and h a small pull towards
    the home posture that acts only within the arm's null space.
    """
    turn = axis_rotation(np.array([0.0, 0.0, 1.0]), yaw) * np.array([1.0, -1.0, -1.0], np.float32)

    def iterate(_, arm_position):
        chain = kinematics.chain(arm_position)
        twist = 0.5 * jnp.cross(chain.tcp_rotation, turn, axis=-2).sum(-1)
        error = jnp.concatenate([position - chain.tcp_position, twist], -1)
        rows = jacobian(chain)
        pull = 0.05 * (HOME - arm_position).at[:, 6].set(0.0)  # the last joint belongs to the yaw
        residual = error - jnp.einsum("bij,bj->bi", rows, pull)
        gram = jnp.einsum("bij,bkj->bik", rows, rows) + DAMPING**2 * jnp.eye(6)
        step = jnp.einsum("bij,bi->bj", rows, _solve(gram, residual)) + pull
        return jnp.clip(arm_position + step, LIMITS[:, 0], LIMITS[:, 1])

    return jax.lax.fori_loop(0, iterations, iterate, start)


def rest(kinematics: Kinematics, position: Float[Array, "B 3"], yaw: Float[Array, "B"]) -> Float[Array, "B 7"]:
    """Joint positions of an episode's start: the same for the same pose."""
    home = jnp.broadcast_to(jnp.asarray(HOME), position.shape[:1] + (JOINTS,))
    return inverse(kinematics, home, position, yaw, REST_ITERATIONS)


def _solve(matrix: Float[Array, "B n n"], vector: Float[Array, "B n"]) -> Float[Array, "B n"]:
    """Solves a small positive definite system by Gauss-Jordan elimination (no pivoting, no LAPACK).

    Batched LAPACK calls can block for ever inside XLA's CPU thread pool; see vla_jax/__init__.py.
    """
    table = jnp.concatenate([matrix, vector[..., None]], -1)
    size = matrix.shape[-1]
    for k in range(size):
        row = table[..., k, :] / table[..., k, k, None]
        others = table - table[..., :, k, None] * row[..., None, :]
        table = jnp.where((jnp.arange(size) == k)[:, None], row[..., None, :], others)
        table = jax.lax.optimization_barrier(table)  # the elimination steps must not be fused: it would square the work
    return table[..., -1]
