"""Figures of steered policies: where the hand goes, over the field of the reward that steers it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from matplotlib.figure import Figure

from vla_jax.envs.control import WORKSPACE
from vla_jax.envs.scene import COLORS, TABLE_X, TABLE_Y
from vla_jax.evaluation import video
from vla_jax.evaluation.charts import colours
from vla_jax.evaluation.report import BAD, GOOD
from vla_jax.evaluation.rollout import take_rows
from vla_jax.steering.program import Program
from vla_jax.steering.study import SteerStudy
from vla_jax.steering.terms import View

GRID = 41  # points of the field along each side


def reward_field(
    program: Program, view: View, height: float, stage: int = 0
) -> tuple[Float[np.ndarray, " X"], Float[np.ndarray, " Y"], Float[np.ndarray, "Y X"]]:
    """The reward of standing still at `height` (metres) over the workspace: y to the left, x away from the robot.

    Returns:
        (y, x, reward): the grid's coordinates (metres) and the reward at [x, y] (square metres).
    """
    x, y = (np.linspace(low, high, GRID, dtype=np.float32) for low, high in WORKSPACE[:2])
    places = jnp.stack([*jnp.meshgrid(x, y, indexing="ij"), jnp.full((GRID, GRID), height)], -1)

    def standing(place: Float[Array, " 3"]):
        return program.reward(view, jnp.broadcast_to(place, (2, 3)), stage)

    return y, x, np.asarray(jax.jit(jax.vmap(jax.vmap(standing)))(places))


def plot_steered(study: SteerStudy, shift: str, scene: int, arms: Sequence[str], height: float = 0.065) -> Figure:
    """One scene from above: the reward's field, the objects, and the hand's way in every arm.

    Left without the steering (the first arm), right with it (the others). The frame is the patch that demonstrations
    cover; the star is the commanded object.
    """
    prepared = study.prepare(shift)
    program = prepared.target.complete()[scene]
    points = prepared.found[scene].keypoints.position
    y, x, reward = reward_field(program, View(points, points), height)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, shown in zip(panels, (arms[:1], arms[1:]), strict=True):
        field = axis.contourf(y, x, -np.sqrt(-reward), levels=20, cmap="Greys_r")
        _draw_table(axis, study, shift, scene)
        for color, arm in zip(colours(len(shown)), shown, strict=True):
            path = study.watch(shift, arm, scene)[0].path
            axis.plot(path[:, 1], path[:, 0], color=color, lw=2, label=arm)
            axis.plot(*path[-1, 1::-1], "o", color=color)
        axis.legend(fontsize=8, loc="lower left")
        axis.set_xlabel("y (m), left of the robot")
    panels[0].set_ylabel("x (m), away from the robot")
    panels[0].invert_xaxis()
    figure.colorbar(field, ax=panels, label="− √−reward (m)")
    figure.suptitle(prepared.texts[scene], fontsize=10)
    return figure


def film_strip(
    study: SteerStudy, shift: str, scene: int, arms: Sequence[str], frames: int = 6
) -> UInt8[np.ndarray, "H W 3"]:
    """What the front camera saw of one scene: a row of frames an arm, from the first to the last tick."""
    text, rows, titles = study.prepare(shift).texts[scene], [], []
    for arm in arms:
        seen, success = study.watch(shift, arm, scene)
        rows.append(video.strip(video.enlarge(seen.pictures, 2), frames))
        titles.append((f"{arm}, {'success' if success else 'failure'}: {text}", GOOD if success else BAD))
    return video.stacked(rows, titles)


def _draw_table(axis, study: SteerStudy, shift: str, scene: int) -> None:
    trials = take_rows(study.prepare(shift).trials, scene)
    (low_x, high_x), (low_y, high_y) = TABLE_X, TABLE_Y
    axis.plot([low_y, high_y, high_y, low_y, low_y], [low_x, low_x, high_x, high_x, low_x], "k:", lw=1)
    for slot in np.flatnonzero(trials.scene.present):
        color = list(COLORS.values())[trials.scene.color[slot]]
        marker, size = ("*", 18) if slot == trials.command.target else ("s", 9)
        axis.plot(*trials.scene.position[slot, ::-1], marker, color=color, ms=size, mec="k")
