"""Keypoints of simulated scenes: masks and depth come from the ray caster, poses from the simulator.

That is privileged, as in the released VLS, whose CALVIN and LIBERO adapters read segmentation and object poses from
their simulators; `noise` says how far the poses are off. A place that a language model points at is not: it takes a
picture, and the camera's depth.

Axes: B scenes, K keypoints, N object slots, Z zones, M = N + Z + 1 bodies, the last of which is the world.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vla_jax.envs.camera import project
from vla_jax.envs.env import EnvState, Tabletop
from vla_jax.envs.language import object_phrase
from vla_jax.envs.questions import BINS
from vla_jax.envs.scene import NUM_SLOTS, NUM_ZONES, ZONES, Scene, take
from vla_jax.envs.views import cameras_of, observe_pictures
from vla_jax.steering.keypoints import (
    DEFAULT,
    Features,
    KeypointConfig,
    Keypoints,
    annotate,
    back_project,
    color_features,
    propose,
)

WORLD = NUM_SLOTS + NUM_ZONES  # the body that stands still
POINTED = "the place pointed at"  # label of its keypoint


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attached:
    """Keypoints fixed to bodies: body m < N is the object in slot m, N + z is zone z, N + Z the world. Lists of
    fewer than K keypoints are filled up with their last."""

    body: Int[Array, "*B K"]
    local: Float[Array, "*B K 3"]  # metres, in the axes of the body


@dataclasses.dataclass(frozen=True)
class Perceived:
    """What was found in one scene."""

    keypoints: Keypoints
    attached: Attached  # K of this scene
    picture: bytes  # PNG with numbered keypoints


def perceive(
    env: Tabletop,
    state: EnvState,
    config: KeypointConfig = DEFAULT,
    features: Features = color_features,
    size: int = 128,
    seed: int = 0,
    places: Float[np.ndarray, "B 2"] | None = None,
    count: int | None = None,
) -> list[Perceived]:
    """Looks at every scene from the front, `size` pixels wide.

    count: scenes from the first on for which keypoints are sought, where others only fill up a batch; None: all.
    places: of something in each front picture, (column, row) from 0 to 1, by whoever can point (`pointing.Pointer`); it
    becomes one more keypoint, POINTED, that stands still. Not a number: none.

    Raises:
        UserError: a scene in which no object is seen.
    """
    seen, camera, origin, rotation = jax.device_get(_look(env, state, size))
    scene = jax.device_get(state.scene)
    found = []
    for row in range(len(seen.rgb))[:count]:
        names = _names(env, take(scene, row))
        own = take(camera, row)
        points = back_project(seen.depth[row], *(np.asarray(leaf) for leaf in (own.position, own.rotation, own.fovy)))
        labels = {geom: name for geom, (_, name) in names.items()}
        keypoints = propose(seen.rgb[row], points, seen.depth[row], seen.segment[row], labels, features, config, seed)
        body = np.array([names[int(geom)][0] for geom in keypoints.masks], np.int32)
        offset = keypoints.position - origin[row, body]
        local = np.einsum("kij,ki->kj", rotation[row, body], offset).astype(np.float32)
        if places is not None and np.isfinite(places[row]).all():
            here = _highest_near(points, places[row])[None]
            keypoints = Keypoints(
                np.concatenate([keypoints.position, here]),
                np.append(keypoints.masks, -1),
                (*keypoints.labels, POINTED),
            )
            body, local = np.append(body, np.int32(WORLD)), np.concatenate([local, here])
        pixels, _ = project(own, jnp.asarray(keypoints.position), height=size, width=size)
        found.append(Perceived(keypoints, Attached(body, local), annotate(seen.rgb[row], np.asarray(pixels))))
    return found


def _highest_near(points: Float[np.ndarray, "H W 3"], place: Float[np.ndarray, " 2"]) -> Float[np.ndarray, " 3"]:
    """The highest of the points that are seen within half a cell of `envs.questions` of a place: things stand on a
    table, and who points at one in cells may hit the table beside it."""
    size = len(points)
    corner, end = (np.clip(np.round(size * (place + side * 0.5 / BINS)).astype(int), 0, size) for side in (-1, 1))
    window = points[corner[1] : max(end[1], corner[1] + 1), corner[0] : max(end[0], corner[0] + 1)].reshape(-1, 3)
    return window[window[:, 2].argmax()].astype(np.float32)


def join(found: list[Perceived]) -> Attached:
    """The keypoints of all scenes in one array."""
    most = max(len(one.attached.body) for one in found)

    def fill(leaf):
        return np.concatenate([leaf, np.repeat(leaf[-1:], most - len(leaf), 0)])

    return jax.tree.map(lambda *leaves: np.stack([fill(leaf) for leaf in leaves]), *[one.attached for one in found])


Frames = tuple[Float[Array, "*B M 3"], Float[Array, "*B M 3 3"]]
"""Origin and rotation of every body; rotations map the body's axes to the world's."""


def frames(state: EnvState) -> Frames:
    """Of the objects, then of the zones, then of the world."""
    fixed = jnp.pad(state.scene.zone_position, ((0, 0), (0, 1), (0, 1)))
    still = jnp.broadcast_to(jnp.eye(3), (*fixed.shape, 3))
    origin = jnp.concatenate([state.bodies.object_position, fixed], 1)
    return origin, jnp.concatenate([state.bodies.object_rotation, still], 1)


def track(attached: Attached, where: Frames) -> Float[Array, "B K 3"]:
    """Where the keypoints are now (metres)."""
    origin, rotation = where
    pick = jax.vmap(lambda leaf, index: leaf[index])
    return pick(origin, attached.body) + jnp.einsum("bkij,bkj->bki", pick(rotation, attached.body), attached.local)


class Watched:
    """A table that also tells where its bodies are: `observe` has "frames"."""

    def __init__(self, env: Tabletop):
        self.reset, self.step, self._env = env.reset, env.step, env

    def observe(self, state: EnvState) -> dict[str, Any]:
        """The observation, and the frames of all bodies."""
        return {**self._env.observe(state), "frames": frames(state)}


def disturb(attached: Attached, deviation: float, key: PRNGKeyArray) -> Attached:
    """Keypoints that are off by a normal error (metres a coordinate), the same one throughout an episode."""
    return dataclasses.replace(
        attached, local=attached.local + deviation * jax.random.normal(key, np.shape(attached.local))
    )


@functools.partial(jax.jit, static_argnums=(0, 2))
def _look(env: Tabletop, state: EnvState, size: int):
    """The front picture, its camera, and the frames of all bodies."""
    camera = jax.tree.map(lambda leaf: leaf[:, 0], cameras_of(env.model, state.bodies, state.scene))
    return observe_pictures(env.model, state.bodies, state.scene, size)["front"], camera, *frames(state)


def _names(env: Tabletop, scene: Scene) -> dict[int, tuple[int, str]]:
    """Geom number -> (body, name) of what is present in one scene."""
    names = {}
    for slot in range(NUM_SLOTS):
        if scene.present[slot]:
            names[env.model.geom(f"object{slot}").id] = slot, body_label(scene, slot)
    for zone in range(NUM_ZONES):
        if scene.zone_present[zone]:
            names[env.model.geom(f"zone{zone}").id] = NUM_SLOTS + zone, ZONES[zone]
    return names


def body_label(scene: Scene, body: int) -> str:
    """The name of an object of one scene, as keypoints are labelled."""
    return object_phrase(int(scene.color[body]), int(scene.shape[body])).removeprefix("the ")
