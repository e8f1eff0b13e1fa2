"""The full check of a reward program before it may steer anything.

The released VLS calls a generated function once and looks whether a tensor comes back; what has no gradient then steers
nothing, silently. Here every term has to prove itself on random paths around the keypoints.

Axes: K keypoints, T poses of a path, N random paths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from vla_jax.errors import UserError
from vla_jax.steering.program import Program, Stage, place
from vla_jax.steering.terms import Term, View

PATHS = 32  # of either kind
POSES = 9
SPREAD = 0.1  # metres from a keypoint, standard deviation
STRIDE = 0.03  # metres between poses, standard deviation
CLOSE = 0.01  # metres from a place that a path passes, standard deviation
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
    for number, stage in enumerate(program.stages, 1):
        for index, term in enumerate(stage.terms, 1):
            _prove(term, view, random_paths([term], view, key), place(number, stage.name, index, term.name))
        if len(stage.terms) > 1:
            bare = dataclasses.replace(stage, name="")  # compiled once for one structure, whatever its name
            _prove(bare, view, random_paths(stage.terms, view, key), place(number, stage.name))


def random_paths(terms: Sequence[Term], view: View, key: PRNGKeyArray) -> Float[Array, "N T 3"]:
    """Random walks: half of them begin near the keypoints, half pass close to the places that the terms name."""
    which, where, walk, passing = jax.random.split(key, 4)
    start = jax.random.choice(which, view.now, (PATHS, 1)) + SPREAD * jax.random.normal(where, (PATHS, 1, 3))
    steps = STRIDE * jnp.cumsum(jax.random.normal(walk, (PATHS, POSES, 3)), 1)
    # A small ball to keep out of is met by these alone. They are dealt out to the places one after another.
    named = [view.now[term.keypoint] + jnp.asarray(term.offset) for term in terms if "keypoint" in term.kinds]
    spot = jnp.resize(jnp.stack(named) if named else view.now, (PATHS, 3))[:, None]
    middle = spot + CLOSE * jax.random.normal(passing, (PATHS, 1, 3))
    return jnp.concatenate([start + steps, middle + steps - steps[:, POSES // 2 : POSES // 2 + 1]])


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
