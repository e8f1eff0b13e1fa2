"""The words of a reward program: terms that measure an end-effector path against keypoints.

Every term is negative and nears 0 where it is satisfied (VLS, arXiv 2602.03973, asks its language model for that form),
in metres squared times its weight, and smooth enough to be climbed. A term is a pytree of its numbers, so that programs
of one structure can be stacked and run over a batch of scenes in one compiled program.

Axes: K keypoints, T poses of a path: the present one first, then one after each action of the chunk.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class View(NamedTuple):
    """What a program is told of the scene: keypoints now, and where they were when the episode began (metres)."""

    now: Float[Array, "K 3"]
    start: Float[Array, "K 3"]


Vector3 = tuple[float, float, float]


def kind(name: str, kinds: dict[str, str]):
    """Registers a term. kinds: what each of its fields is, see `program.FIELDS`."""

    def register(term):
        term = dataclasses.dataclass(frozen=True)(term)
        term.name, term.kinds = name, {**kinds, "weight": "positive"}
        TERMS[name] = term
        return jax.tree_util.register_dataclass(term)

    return register


TERMS: dict[str, type[Term]] = {}


class Term(abc.ABC):
    """One summand of a stage's reward."""

    name = ""
    kinds: dict[str, str] = {}
    weight: Any = 1.0

    @abc.abstractmethod
    def cost(self, view: View, path: Float[Array, "T 3"]) -> Float[Array, ""]:
        """What is to be made small, metres squared."""

    def __call__(self, view: View, path: Float[Array, "T 3"]) -> Float[Array, ""]:
        """The reward: - weight * cost."""
        return -jnp.asarray(self.weight, jnp.float32) * self.cost(view, path)


@kind(
    "distance",
    {"keypoint": "keypoint", "offset": "vector", "axes": "axes", "tail": "fraction", "tail_weight": "positive"},
)
class Distance(Term):
    """Come to a keypoint plus an offset: mean squared distance, the last `tail` of the path counting `tail_weight`
    times as much; `axes` weighs x, y and z."""

    keypoint: Any
    offset: Any = (0.0, 0.0, 0.0)
    axes: Any = (1.0, 1.0, 1.0)
    tail: Any = 0.3
    tail_weight: Any = 3.0
    weight: Any = 1.0

    def cost(self, view, path):
        gap = (path[1:] - _point(view.now, self.keypoint, self.offset)) * jnp.asarray(self.axes)
        return _weighted(jnp.square(gap).sum(-1), self.tail, self.tail_weight)


@kind("height", {"height": "number", "tail": "fraction", "tail_weight": "positive"})
class Height(Term):
    """Travel at a height over the table (metres)."""

    height: Any
    tail: Any = 0.3
    tail_weight: Any = 3.0
    weight: Any = 1.0

    def cost(self, view, path):
        return _weighted(jnp.square(path[1:, 2] - self.height), self.tail, self.tail_weight)


@kind(
    "progress",
    {
        "keypoint": "keypoint",
        "offset": "vector",
        "axis": "direction",
        "distance": "number",
        "tail": "fraction",
        "tail_weight": "positive",
    },
)
class Progress(Term):
    """Get `distance` metres along `axis` beyond where the keypoint (plus offset) was at the start, or more."""

    keypoint: Any
    axis: Any
    distance: Any
    offset: Any = (0.0, 0.0, 0.0)
    tail: Any = 0.3
    tail_weight: Any = 3.0
    weight: Any = 1.0

    def cost(self, view, path):
        along = (path[1:] - _point(view.start, self.keypoint, self.offset)) @ jnp.asarray(self.axis)
        return _weighted(jnp.square(jax.nn.relu(self.distance - along)), self.tail, self.tail_weight)


@kind("perpendicular", {"keypoint": "keypoint", "offset": "vector", "axis": "direction"})
class Perpendicular(Term):
    """Stay on the line along `axis` through where the keypoint (plus offset) was at the start."""

    keypoint: Any
    axis: Any
    offset: Any = (0.0, 0.0, 0.0)
    weight: Any = 1.0

    def cost(self, view, path):
        gap, axis = path[1:] - _point(view.start, self.keypoint, self.offset), jnp.asarray(self.axis)
        return jnp.square(gap - (gap @ axis)[:, None] * axis).sum(-1).mean()


@kind("contact", {"keypoint": "keypoint", "offset": "vector", "head": "fraction"})
class Contact(Term):
    """Be at the keypoint (plus offset) in the first `head` of the path: the anchor of a pull or a push."""

    keypoint: Any
    offset: Any = (0.0, 0.0, 0.0)
    head: Any = 0.2
    weight: Any = 1.0

    def cost(self, view, path):
        square = jnp.square(path[1:] - _point(view.now, self.keypoint, self.offset)).sum(-1)
        # At least the first pose after the present one.
        early = jnp.arange(len(square)) < jnp.maximum(self.head * len(square), 1.0)
        return jnp.where(early, square, 0.0).sum() / early.sum()


@kind("avoid", {"keypoint": "keypoint", "offset": "vector", "axes": "axes", "radius": "positive"})
class Avoid(Term):
    """Keep `radius` metres away from a keypoint (plus offset); `axes` (1, 1, 0) makes the ball a pillar."""

    keypoint: Any
    radius: Any
    offset: Any = (0.0, 0.0, 0.0)
    axes: Any = (1.0, 1.0, 1.0)
    weight: Any = 1.0

    def cost(self, view, path):
        gap = (path[1:] - _point(view.now, self.keypoint, self.offset)) * jnp.asarray(self.axes)
        distance = jnp.sqrt(jnp.square(gap).sum(-1) + 1e-12)
        return jnp.square(jax.nn.relu(self.radius - distance)).mean()


@kind("backtrack", {"axis": "direction"})
class Backtrack(Term):
    """Never turn back along `axis`: the squared fall below the farthest point so far."""

    axis: Any
    weight: Any = 1.0

    def cost(self, view, path):
        along = path @ jnp.asarray(self.axis)
        return jnp.square(jax.lax.cummax(along) - along).mean()


def _point(keypoints, index, offset) -> Float[Array, " 3"]:
    return keypoints[index] + jnp.asarray(offset)


def _weighted(values: Float[Array, " T"], tail, tail_weight) -> Float[Array, ""]:
    """Their mean, the last `tail` of them counting `tail_weight` times as much."""
    late = jnp.arange(len(values)) >= (1 - tail) * len(values)
    weight = jnp.where(late, tail_weight, 1.0)
    return (weight * values).sum() / weight.sum()
