"""The full check of a reward program before it may steer anything.

The released VLS calls a generated function once and looks whether a tensor comes back; what has no gradient then steers
nothing, silently. Here every term has to prove itself on random paths around the keypoints.

Axes: K keypoints, T poses of a path, N random paths.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from vla_jax.errors import UserError
from vla_jax.steering.program import Program, Stage, place
from vla_jax.steering.terms import Term, View

PATHS = 32
POSES = 9
SPREAD = 0.1  # metres from a keypoint, standard deviation
STRIDE = 0.03  # metres between poses, standard deviation
CLIMBS, CLIMB = 10, 2e-3  # steps of gradient ascent, metres that the path moves in one
RISING = 0.75  # share of the paths that must have risen after them


def check(program: Program, view: View, key: PRNGKeyArray) -> None:
    """Raises UserError, which names the stage and the term, unless each term and each stage

    - is one finite number on every path,
    - is not the same on all paths,
    - has a finite gradient everywhere, and one that is not zero somewhere,
    - rises in ten small steps along its gradient.

    (Field types, term names and keypoint numbers have been checked by `program.parse`.)
    """
    if not np.isfinite(np.asarray(view.now)).all() or not np.isfinite(np.asarray(view.start)).all():
        raise UserError("the keypoints are not finite: perception failed, so no reward can be measured")
    paths = random_paths(view, key)
    for number, stage in enumerate(program.stages, 1):
        for index, term in enumerate(stage.terms, 1):
            _prove(term, view, paths, place(number, stage.name, index, term.name))
        if len(stage.terms) > 1:
            bare = dataclasses.replace(
                stage, name=""
            )  # stages of one structure are compiled once, whatever their names
            _prove(bare, view, paths, place(number, stage.name))


def random_paths(view: View, key: PRNGKeyArray) -> Float[Array, "N T 3"]:
    """Random walks that begin near the keypoints."""
    which, where, walk = jax.random.split(key, 3)
    keypoint = jax.random.choice(which, view.now, (PATHS, 1))
    start = keypoint + SPREAD * jax.random.normal(where, (PATHS, 1, 3))
    return start + STRIDE * jnp.cumsum(jax.random.normal(walk, (PATHS, POSES, 3)), 1)


def _prove(part: Term | Stage, view: View, paths: Float[Array, "N T 3"], where: str) -> None:
    shape = jax.eval_shape(part, view, paths[0]).shape
    if shape:
        raise UserError(f"{where} is not one number a path but has shape {shape}")
    value, gradient, risen = jax.device_get(_climb(part, view, paths))
    if not np.isfinite(value).all():
        raise UserError(f"{where} is not finite on every path")
    if np.ptp(value) <= 1e-6 * max(np.abs(value).max(), 1e-6):
        raise UserError(f"{where} is the same on every path: it cannot steer anything")
    if not np.isfinite(gradient).all():
        raise UserError(f"{where} has a gradient that is not finite")
    moved = np.abs(gradient).max((1, 2)) > 1e-9
    if not moved.any():
        raise UserError(f"{where} has a zero gradient on every path: it cannot steer anything")
    if (risen > value)[moved].mean() < RISING:
        raise UserError(f"{where} does not rise along its own gradient")


@jax.jit
def _climb(part, view, paths):
    """The reward of each path, its gradient, and the reward after CLIMBS steps along it."""

    def one(path):
        value, gradient = jax.value_and_grad(lambda path: part(view, path))(path)

        def step(path, _):
            slope = jax.grad(lambda path: part(view, path))(path)
            return path + CLIMB * slope / (jnp.abs(slope).max() + 1e-12), None

        return value, gradient, part(view, jax.lax.scan(step, path, None, CLIMBS)[0])

    return jax.vmap(one)(paths)
