"""Scenes on which a trained policy fails, and steering may help: test cases, shifted.

    swapped    the instruction names an object that the look does not (`envs.splits`)
    moved      the target lies 3 cm outside the patch of table that demonstrations cover
    unseen     the same, 8 cm outside
    obstacle   a tall post stands half way between the hand and the target (`envs.env.Tabletop` with a post)

Moved scenes are those of in_distribution whose target can be moved over the nearest edge (left, right or far) without
coming near another object, and is still named by its sentence. Scenes with an obstacle are those of in_distribution in
which the hand has room on both sides of the post, at its start and above the target.

Axes: B scenes, N object slots.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from vla_jax.envs.bias import BiasConfig
from vla_jax.envs.language import fitting_referents
from vla_jax.envs.sampling import SceneConfig
from vla_jax.envs.scene import COLORS, POST_SLOT, SHAPES, TABLE_X, TABLE_Y, Command, Scene, take
from vla_jax.envs.splits import Cases, make_cases
from vla_jax.errors import UserError

DISTANCE = {"moved": 0.03, "unseen": 0.08}  # metres outside
SHIFTS = ("in_distribution", "swapped", *DISTANCE, "obstacle")
CLEARANCE = 0.08  # metres between the moved target and any other object
ROOM = 0.13  # metres from the post to the hand's start and to the target; the palm reaches 8 cm to its sides
BESIDE = 0.06  # metres from the post to any other object: the hand passes above those
POOL = 12  # scenes looked at for each that is wanted


def make_shift(name: str, task: str, bias: BiasConfig, seed: int, n: int, config: SceneConfig) -> Cases:
    """The first n cases of a shift; the same arguments give the same cases.

    Raises:
        UserError: unknown shift, too few scenes that can be shifted, or no slot that is free for a post.
    """
    if name not in SHIFTS:
        raise UserError(f"unknown shift {name!r}: choose among {', '.join(SHIFTS)}")
    if name in ("in_distribution", "swapped"):
        return make_cases(name, task, bias, seed, n, config)
    if name == "obstacle" and config.objects > POST_SLOT:
        raise UserError(f"the post takes an object's place: 'obstacle' needs scenes of at most {POST_SLOT} objects")
    cases = make_cases("in_distribution", task, bias, seed, POOL * n, config)
    if name == "obstacle":
        scene, fits = stand_in_the_way(cases.scene, cases.command)
    else:
        scene, fits = move_targets(cases.scene, cases.command, DISTANCE[name])
    rows = np.flatnonzero(fits)[:n]
    if len(rows) < n:
        raise UserError(f"only {len(rows)} of {POOL * n} scenes can be {name}: ask for fewer than {n}")
    parts = (take(part, rows) for part in (scene, cases.command, cases.cue))
    return Cases(*parts, [cases.text[row] for row in rows])


def move_targets(scene: Scene, command: Command, distance: float) -> tuple[Scene, Bool[np.ndarray, " B"]]:
    """The scenes with each target `distance` metres beyond the patch's nearest edge, and which of them hold up."""
    rows, target = np.arange(len(scene.background)), np.asarray(command.target)
    position = np.array(scene.position)
    position[rows, target] = beyond_edge(position[rows, target], distance)
    gap = np.linalg.norm(position - position[rows, target][:, None], axis=-1)
    other = np.asarray(scene.present) & (np.arange(position.shape[1]) != target[:, None])
    clear = np.where(other, gap, np.inf).min(-1) > CLEARANCE
    moved = dataclasses.replace(scene, position=jnp.asarray(position))
    return moved, clear & _named(moved, command)


def stand_in_the_way(scene: Scene, command: Command) -> tuple[Scene, Bool[np.ndarray, " B"]]:
    """The scenes with a post midway between hand and target, and which of them have room for it.

    It is a fixture, a cylinder of the first colour that no object has.
    """
    rows, target = np.arange(len(scene.background)), np.asarray(command.target)
    position, present, start = np.array(scene.position), np.array(scene.present), np.asarray(scene.tcp)[:, :2]
    post = (start + position[rows, target]) / 2
    gap = np.linalg.norm(position - post[:, None], axis=-1)
    room = (gap[rows, target] > ROOM) & (np.where(present, gap, np.inf).min(-1) > BESIDE)
    taken = (np.arange(len(COLORS)) == np.asarray(scene.color)[..., None]) & present[..., None]
    shifted = dataclasses.replace(
        scene,
        color=jnp.asarray(scene.color).at[:, POST_SLOT].set(taken.any(1).argmin(-1)),
        shape=jnp.asarray(scene.shape).at[:, POST_SLOT].set(SHAPES.index("cylinder")),
        movable=jnp.asarray(scene.movable).at[:, POST_SLOT].set(False),
        present=jnp.asarray(present).at[:, POST_SLOT].set(True),
        position=jnp.asarray(position).at[:, POST_SLOT].set(post),
        yaw=jnp.asarray(scene.yaw).at[:, POST_SLOT].set(0.0),
    )
    return shifted, room & _named(shifted, command)


def _named(scene: Scene, command: Command) -> Bool[np.ndarray, " B"]:
    """Whether each command's sentence still names its target alone."""
    fits = np.asarray(jax.jit(fitting_referents)(scene))
    return fits[np.arange(len(fits)), np.asarray(command.target), np.asarray(command.referent)]


def beyond_edge(place: Float[np.ndarray, "B 2"], distance: float) -> Float[np.ndarray, "B 2"]:
    """Each point moved straight over the nearest of the left, right and far edge of the patch."""
    x, y = place.T
    edges = np.stack([TABLE_Y[1] - y, y - TABLE_Y[0], TABLE_X[1] - x])
    nearest = edges.argmin(0)
    new_x = np.where(nearest == 2, TABLE_X[1] + distance, x)
    new_y = np.select([nearest == 0, nearest == 1], [TABLE_Y[1] + distance, TABLE_Y[0] - distance], y)
    return np.stack([new_x, new_y], -1).astype(np.float32)
