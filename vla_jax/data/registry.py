"""Layouts of datasets that many people have, by the name under which `experiments.convert` knows them.

Field names and meanings are those that the publishers give:

- bridge: BridgeData V2 (Walke et al., arXiv 2308.12952), the copy of rail.eecs.berkeley.edu/datasets/bridge_release/
  data/tfds (`bridge_dataset/1.0.0`): "3x XYZ delta, 3x roll-pitch-yaw delta, 1x gripper absolute". Episodes without
  language are common and are skipped or refused. The first action is all zero and is dropped, as OpenVLA does
  (prismatic/vla/datasets/rlds/oxe/transforms.py).
- bridge_oxe: the older copy in Open X-Embodiment (`bridge/0.1.0`, tensorflow/datasets docs/catalog/bridge.md).
- fractal: RT-1 (Brohan et al., arXiv 2212.06817), `fractal20220817_data/0.1.0`, features as in tensorflow/datasets
  docs/catalog/fractal20220817_data.md.
- droid: DROID (Khazatsky et al., arXiv 2403.12945), `droid/1.0.0` and later, features as in droid-dataset/droid
  docs/the-droid-dataset.md. The action is taken from `action_dict`: the commanded joint angles, in radians, and the
  commanded gripper, 1 closed; `steps/action` itself mixes velocities in DROID's own unit with that. 15 Hz.

Actions are the commands in the file. Octo and OpenVLA replace those of Bridge by the motion that was reached and round
its gripper to 0 or 1; nothing of the kind happens here.
"""

from pathlib import Path

from vla_jax.data.layouts import EpisodeFunction, Layout, Part, load_robot
from vla_jax.errors import UserError
from vla_jax.schema import suggest

XYZ, RPY = ("x", "y", "z"), ("roll", "pitch", "yaw")
DELTA_XYZ, DELTA_RPY = ("dx", "dy", "dz"), ("droll", "dpitch", "dyaw")
JOINTS = tuple(f"joint_{number}" for number in range(1, 8))

_BRIDGE_STATE = (
    Part("observation/state", XYZ, "m", (0, 1, 2)),
    Part("observation/state", RPY, "rad", (3, 4, 5)),
    Part("observation/state", ("gripper",), "1", (6,), gripper="1 open, 0 closed"),
)
_DELTA_POSE = (
    "change of the hand's position and Euler angles in the robot's base frame until the next step, and the gripper's "
    "opening, 1 open and 0 closed"
)

LAYOUTS = {
    "bridge": Layout(
        embodiment="widowx",
        control_hz=5.0,
        images={"front": "observation/image_0"},
        action=(
            Part("action", DELTA_XYZ, "m", (0, 1, 2)),
            Part("action", DELTA_RPY, "rad", (3, 4, 5)),
            Part("action", ("gripper",), "1", (6,), gripper="1 open, 0 closed"),
        ),
        state=_BRIDGE_STATE,
        action_representation=_DELTA_POSE,
        episode_id=("file_path", "episode_id"),
        drop_first=1,
    ),
    "bridge_oxe": Layout(
        embodiment="widowx",
        control_hz=5.0,
        images={"front": "observation/image"},
        action=(
            Part("action/world_vector", DELTA_XYZ, "m"),
            Part("action/rotation_delta", DELTA_RPY, "rad"),
            Part("action/open_gripper", ("gripper",), "1", gripper="1 open, 0 closed"),
        ),
        state=_BRIDGE_STATE,
        action_representation=_DELTA_POSE,
        instruction=("observation/natural_language_instruction",),
        drop_first=1,
    ),
    "fractal": Layout(
        embodiment="google_robot",
        control_hz=3.0,
        images={"front": "observation/image"},
        action=(
            Part("action/world_vector", DELTA_XYZ, "m"),
            Part("action/rotation_delta", DELTA_RPY, "rad"),
            Part("action/gripper_closedness_action", ("gripper",), "1", gripper="-1 opens, 1 closes, 0 holds"),
        ),
        state=(
            Part("observation/base_pose_tool_reached", XYZ, "m", (0, 1, 2)),
            Part("observation/base_pose_tool_reached", ("qx", "qy", "qz", "qw"), "1", (3, 4, 5, 6)),
            Part("observation/gripper_closed", ("gripper",), "1", gripper="0 open, 1 closed"),
        ),
        action_representation=_DELTA_POSE,
        instruction=("observation/natural_language_instruction",),
    ),
    "droid": Layout(
        embodiment="droid_franka",
        control_hz=15.0,
        images={"front": "observation/exterior_image_1_left", "wrist": "observation/wrist_image_left"},
        action=(
            Part("action_dict/joint_position", JOINTS, "rad"),
            Part("action_dict/gripper_position", ("gripper",), "1", gripper="0 open, 1 closed"),
        ),
        state=(
            Part("observation/joint_position", JOINTS, "rad"),
            Part("observation/gripper_position", ("gripper",), "1", gripper="0 open, 1 closed"),
        ),
        action_representation="commanded joint angles, and the commanded opening of the gripper, 1 open and 0 closed",
        instruction=("language_instruction", "language_instruction_2", "language_instruction_3"),
        episode_id=("recording_folderpath", "file_path"),
    ),
}


def find_layout(name: str) -> tuple[Layout, EpisodeFunction | None]:
    """(layout, `episodes` function or None) of a registry entry, or of the user's Python file of that path.

    Raises:
        UserError: neither.
    """
    if name in LAYOUTS:
        return LAYOUTS[name], None
    if name.endswith(".py"):
        return load_robot(Path(name))
    raise UserError(
        f"unknown layout {name!r}{suggest(name, LAYOUTS)}; give one of {', '.join(LAYOUTS)}, or a Python file"
    )
