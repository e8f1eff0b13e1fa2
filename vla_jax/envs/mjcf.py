"""The table as a MuJoCo model (MJCF): plane, objects, zones, cameras, the hand, and around it one of two robots.

Every object collides as a cube of 4 cm and 50 g; its drawn shape and colour belong to the scene. So one compiled
program serves every scene, and MJX needs one collision routine only. The solver settings are the fastest that lose no
grasp: fewer Newton iterations, a larger time step, an elliptic cone or another integrator drop objects silently.

A table may have a post: the object in the last slot is then 2 cm thin, 24 cm high and as dense as the others. It stands
free, and falls when the fingers, or here also the palm, run into it.

Geoms are named by their role: "table", "object0".., "zone0".., "finger_left", "finger_right", "hand", "robot0"...
"""

import functools

import mujoco
import numpy as np

from vla_jax.envs import floating, panda
from vla_jax.envs.scene import NUM_SLOTS, NUM_ZONES, OBJECT_HALF, PARKED_X, POST_HALF, POST_SLOT, ZONE_RADIUS
from vla_jax.errors import UserError

EMBODIMENTS = {"floating": floating, "panda": panda}

TIMESTEP = 0.01  # seconds
MAX_OPENING = 0.08  # metres between the fingers
OBJECT_MASS = 0.05  # kilograms

# (position, look-at point, vertical field of view in degrees) of the camera that faces the robot over the table.
FRONT_CAMERA = ((1.26, 0.0, 0.74), (0.445, 0.0, 0.03), 24.5)


def _camera_axes(position, target, right) -> str:
    """MJCF `xyaxes` of a camera at `position` that looks at `target` and whose picture's right is near `right`."""
    forward = np.subtract(target, position)
    forward = forward / np.linalg.norm(forward)
    right = np.asarray(right, float) - np.dot(right, forward) * forward
    right = right / np.linalg.norm(right)
    up = np.cross(right, forward)
    return " ".join(f"{value:.6f}" for value in (*right, *up))


def _front_camera() -> str:
    position, target, fovy = FRONT_CAMERA
    axes = _camera_axes(position, target, right=(0, 1, 0))
    return f'<camera name="front" pos="{position[0]} {position[1]} {position[2]}" xyaxes="{axes}" fovy="{fovy}"/>'


def hand(pos: str, quat: str) -> str:
    """The Franka hand as a body: palm, two fingers that slide along y, the wrist camera and the tcp site.

    Masses, inertias and travel follow MuJoCo Menagerie's panda (see panda.py). Only the fingers collide, with objects.
    """
    eye, target = (0.09, 0.0, 0.035), (0.02, 0.0, 0.115)
    axes = _camera_axes(eye, target, right=(0, 1, 0))

    def finger(name: str, turn: str) -> str:
        return f"""
        <body name="{name}" pos="0 0 0.0584" quat="{turn}" gravcomp="1">
          <inertial mass="0.015" pos="0 0 0" diaginertia="2.375e-6 2.375e-6 7.5e-7"/>
          <joint name="{name}" type="slide" axis="0 1 0" range="0 0.04" damping="10" armature="0.1"/>
          <geom name="{name}" type="box" size="0.01 0.008 0.0235" pos="0 0.008 0.03" contype="0" conaffinity="2"
            rgba="0.30 0.30 0.32 1" mass="0"/>
        </body>"""

    return f"""
      <body name="hand" pos="{pos}" quat="{quat}" gravcomp="1">
        <inertial mass="0.73" pos="-0.01 0 0.03" diaginertia="0.001 0.0025 0.0017"/>
        <geom name="hand" type="box" size="0.028 0.08 0.028" pos="0 0 0.033" rgba="0.88 0.89 0.90 1" class="drawn"/>
        <camera name="wrist" pos="{eye[0]} {eye[1]} {eye[2]}" xyaxes="{axes}" fovy="75"/>
        <site name="tcp" pos="0 0 0.1034" size="0.004" rgba="0 0 0 0"/>
        {finger("finger_left", "1 0 0 0")}
        {finger("finger_right", "0 0 0 1")}
      </body>"""


def _objects() -> str:
    inertia = OBJECT_MASS * (2 * OBJECT_HALF) ** 2 / 6
    half = f"{OBJECT_HALF} {OBJECT_HALF} {OBJECT_HALF}"
    return "".join(
        f"""
    <body name="object{n}" pos="{PARKED_X} {0.2 * n} {OBJECT_HALF}">
      <freejoint name="object{n}"/>
      <inertial mass="{OBJECT_MASS}" pos="0 0 0" diaginertia="{inertia} {inertia} {inertia}"/>
      <geom name="object{n}" type="box" size="{half}" contype="7" conaffinity="4" rgba="0.85 0.12 0.12 1"/>
    </body>"""
        for n in range(NUM_SLOTS)
    )


def _zones() -> str:
    return "".join(
        f"""
    <body name="zone{z}" mocap="true" pos="{PARKED_X} {-0.3 - 0.2 * z} 0.002">
      <geom name="zone{z}" type="cylinder" size="{ZONE_RADIUS} 0.002" rgba="{rgba}" class="drawn"/>
    </body>"""
        for z, rgba in zip(range(NUM_ZONES), ("0.93 0.93 0.90 1", "0.45 0.30 0.20 1"), strict=True)
    )


def mjcf(embodiment: str) -> str:
    """The whole model as an MJCF document. UserError for an unknown embodiment."""
    if embodiment not in EMBODIMENTS:
        raise UserError(f"unknown embodiment {embodiment!r}: choose one of {', '.join(EMBODIMENTS)}")
    robot = EMBODIMENTS[embodiment]
    return f"""
<mujoco model="{embodiment}">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{TIMESTEP}" solver="Newton" iterations="4" ls_iterations="8" integrator="implicitfast"
    cone="pyramidal"><flag eulerdamp="disable"/></option>
  <custom><numeric name="max_contact_points" data="24"/><numeric name="max_geom_pairs" data="6"/></custom>
  <default>
    <geom friction="1 0.005 0.0001" solref="0.01 1" condim="3"/>
    <default class="drawn"><geom contype="0" conaffinity="0" mass="0"/></default>
    {robot.DEFAULTS}
  </default>
  <worldbody>
    <light name="sun" directional="true" pos="0 0 3" dir="-0.3 0.2 -1" castshadow="true"/>
    {_front_camera()}
    <geom name="table" type="plane" size="3 3 0.1" contype="0" conaffinity="1" rgba="0.60 0.50 0.40 1"/>
    {robot.arm(hand)}
    {_objects()}
    {_zones()}
  </worldbody>
  <actuator>
    {robot.ACTUATORS}
    <position name="finger_left" joint="finger_left" kp="350" kv="40" ctrlrange="0 0.04" forcerange="-100 100"/>
    <position name="finger_right" joint="finger_right" kp="350" kv="40" ctrlrange="0 0.04" forcerange="-100 100"/>
  </actuator>
</mujoco>"""


@functools.cache
def build_model(embodiment: str, post: bool = False) -> mujoco.MjModel:
    """The compiled model of an embodiment, with or without a post (cached; treat it as read-only)."""
    spec = mujoco.MjSpec.from_string(mjcf(embodiment))
    if post:
        body = spec.body(f"object{POST_SLOT}")
        square = np.square(POST_HALF)
        body.mass = OBJECT_MASS * np.prod(POST_HALF) / OBJECT_HALF**3
        body.inertia = body.mass * (square.sum() - square) / 3
        spec.geom(f"object{POST_SLOT}").size = POST_HALF
        spec.geom("hand").conaffinity = spec.geom("finger_left").conaffinity
    return spec.compile()
