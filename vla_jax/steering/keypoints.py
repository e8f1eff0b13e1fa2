"""From a picture with depth and masks to labelled 3-D keypoints: features per mask, PCA, k-means, merging.

The procedure of VLS (arXiv 2602.03973, section "perception", and its code), which is that of ReKep (arXiv 2409.01652):
within each mask the image features are reduced to three numbers (uncentred PCA), joined with the place of each pixel,
both scaled to [0, 1], and clustered; each cluster is stood for by its pixel of the most typical feature; near keypoints
are merged over all masks, and each mask keeps at least one. NumPy on the host: once an episode.

Axes: H x W picture, D features, M pixels of a mask, N points, K keypoints.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Int, UInt8

from vla_jax.errors import UserError

Features = Callable[[UInt8[np.ndarray, "H W 3"]], Float[np.ndarray, "h w D"]]
"""Dense features of a picture, on a grid that may be coarser than its pixels."""


@dataclasses.dataclass(frozen=True)
class KeypointConfig:
    """How keypoints are proposed.

    Attributes:
        per_mask: clusters of a mask.
        max_share: a mask that covers more of the picture than this is no object.
        merge: metres; keypoints nearer than this become one (bandwidth of the mean shift).
        low, high: corners of the workspace, metres; what lies outside is dropped, where its mask has others.
        max_depth: metres; farther pixels are invalid.
    """

    per_mask: int = 5
    max_share: float = 0.5
    merge: float = 0.05
    low: tuple[float, float, float] = (-1.0, -0.75, -0.1)
    high: tuple[float, float, float] = (1.0, 0.75, 1.2)
    max_depth: float = 10.0


DEFAULT = KeypointConfig()


@dataclasses.dataclass(frozen=True)
class Keypoints:
    """Keypoints in the order of their masks; labels[k] is the object that keypoint k lies on, masks[k] its mask."""

    position: Float[np.ndarray, "K 3"]
    masks: Int[np.ndarray, " K"]
    labels: tuple[str, ...]


def propose(
    image: UInt8[np.ndarray, "H W 3"],
    points: Float[np.ndarray, "H W 3"],
    depth: Float[np.ndarray, "H W"],
    masks: Int[np.ndarray, "H W"],
    names: Mapping[int, str],
    features: Features,
    config: KeypointConfig = DEFAULT,
    seed: int = 0,
) -> Keypoints:
    """Keypoints of one picture.

    Args:
        image: what the camera sees.
        points: where each pixel lies in the world, metres (`back_project`).
        depth: metres along the optical axis; valid in (0, max_depth).
        masks: number of the mask that each pixel belongs to, from a renderer or `released.sam_masks(DIR)`; numbers
            without a name are background.
        names: of the objects.
        features: of the picture; `color_features`, or `released.dino_features(DIR)`.

    Raises:
        UserError: no object is seen well enough.
    """
    random = np.random.default_rng(seed)
    dense = resize(np.asarray(features(image), np.float32), masks.shape)
    valid = (depth > 0) & (depth < config.max_depth)
    position, owner = [], []
    for number in sorted(names):
        mask = (masks == number) & valid
        if mask.sum() < config.per_mask or (masks == number).mean() > config.max_share:
            continue
        found = _of_mask(dense[mask], points[mask], config, random)
        position.append(found)
        owner.append(np.full(len(found), number))
    if not position:
        raise UserError(f"none of {', '.join(names.values())} is seen well enough to put a keypoint on it")
    position, owner = _merge(np.concatenate(position), np.concatenate(owner), config)
    return Keypoints(position.astype(np.float32), owner, tuple(names[int(number)] for number in owner))


def _of_mask(features: Float[np.ndarray, "M D"], points: Float[np.ndarray, "M 3"], config, random):
    """The keypoints of one mask that lie in the workspace; the one nearest to it where all lie outside."""
    reduced = unit_range(pca(features, 3))
    joined = np.concatenate([reduced, unit_range(points)], -1)
    centres, member = k_means(joined, config.per_mask, random)
    chosen = []
    for cluster, centre in enumerate(centres):
        pixels = np.flatnonzero(member == cluster)
        typical = pixels[np.argmin(np.square(reduced[pixels] - centre[: reduced.shape[1]]).sum(-1))]
        chosen.append(points[typical])
    chosen = np.array(chosen)
    outside = np.maximum(np.maximum(np.array(config.low) - chosen, chosen - np.array(config.high)), 0).sum(-1)
    return chosen[outside <= outside.min()] if outside.min() > 0 else chosen[outside == 0]


def _merge(position, owner, config):
    """Mean shift over all keypoints: the one nearest to each mode stays, and from each mask at least one."""
    modes = mean_shift(position, config.merge)
    keep = set()
    for mode in np.unique(np.round(modes, 6), axis=0):
        members = np.flatnonzero(np.linalg.norm(modes - mode, axis=-1) < 1e-5)
        keep.add(members[np.argmin(np.linalg.norm(position[members] - mode, axis=-1))])
    for number in np.unique(owner):
        own = np.flatnonzero(owner == number)
        if not keep.intersection(own):
            keep.add(own[0])
    index = np.array(sorted(keep))
    return position[index], owner[index]


def pca(features: Float[np.ndarray, "M D"], size: int) -> Float[np.ndarray, "M d"]:
    """The features along their `size` strongest directions (at most D); not centred, as in the source."""
    _, _, directions = np.linalg.svd(features, full_matrices=False)
    return features @ directions[:size].T


def unit_range(values: Float[np.ndarray, "M d"]) -> Float[np.ndarray, "M d"]:
    """Each column scaled to [0, 1]; a constant one becomes 0."""
    low, high = values.min(0), values.max(0)
    return (values - low) / np.where(high > low, high - low, 1.0)


def k_means(
    values: Float[np.ndarray, "M d"], count: int, random: np.random.Generator, rounds: int = 50
) -> tuple[Float[np.ndarray, "k d"], Int[np.ndarray, " M"]]:
    """Lloyd's algorithm from k-means++ seeds: centres, and the cluster of each value. At most `count` clusters, none of
    them empty."""
    centres = values[random.integers(len(values))][None]
    while len(centres) < count:
        square = np.square(values[:, None] - centres).sum(-1).min(1)
        if square.sum() == 0:
            break
        centres = np.concatenate([centres, values[random.choice(len(values), p=square / square.sum())][None]])
    for _ in range(rounds):
        member = np.square(values[:, None] - centres).sum(-1).argmin(1)
        moved = np.array([values[member == cluster].mean(0) for cluster in np.unique(member)])
        if moved.shape == centres.shape and np.allclose(moved, centres):
            break
        centres = moved
    return centres, np.square(values[:, None] - centres).sum(-1).argmin(1)


def mean_shift(points: Float[np.ndarray, "N 3"], bandwidth: float, rounds: int = 100) -> Float[np.ndarray, "N 3"]:
    """The mode that each point climbs to under a flat kernel of radius `bandwidth`; modes within it become the one
    with the most points."""
    modes = points.astype(float)
    for _ in range(rounds):
        near = np.linalg.norm(modes[:, None] - points, axis=-1) <= bandwidth
        moved = (near[..., None] * points).sum(1) / near.sum(1, keepdims=True)
        if np.allclose(moved, modes, atol=1e-9):
            break
        modes = moved
    crowd = (np.linalg.norm(modes[:, None] - points, axis=-1) <= bandwidth).sum(1)
    result, free = modes.copy(), np.ones(len(modes), bool)
    for index in np.argsort(-crowd, kind="stable"):
        joined = free & (np.linalg.norm(modes - modes[index], axis=-1) <= bandwidth)
        if free[index]:
            result[joined], free = modes[index], free & ~joined
    return result


def back_project(
    depth: Float[np.ndarray, "H W"], position: Float[np.ndarray, " 3"], rotation: Float[np.ndarray, "3 3"], fovy: float
) -> Float[np.ndarray, "H W 3"]:
    """Where each pixel lies in the world (metres): the inverse of `envs.camera.project`, same conventions."""
    height, width = depth.shape
    scale = 2 * np.tan(fovy / 2) / height
    x = scale * (np.arange(width) + 0.5 - width / 2)[None, :] * depth
    y = scale * (height / 2 - np.arange(height) - 0.5)[:, None] * depth
    return np.stack([x, y, -depth], -1) @ rotation.T + position


def resize(grid: Float[np.ndarray, "h w D"], shape: tuple[int, int]) -> Float[np.ndarray, "H W D"]:
    """Bilinear, as a picture is enlarged: the grid's cells share the area evenly."""
    for axis, size in enumerate(shape):
        have = grid.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * have / size - 0.5, 0, have - 1)
        low = np.floor(place).astype(int)
        share = (place - low).reshape([-1 if dim == axis else 1 for dim in range(3)])
        grid = np.take(grid, low, axis) * (1 - share) + np.take(grid, np.minimum(low + 1, have - 1), axis) * share
    return grid


def color_features(image: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W 3"]:
    """Colours in [0, 1]: features that need no weights."""
    return np.asarray(image, np.float32) / 255


def annotate(image: UInt8[np.ndarray, "H W 3"], pixels: Float[np.ndarray, "K 2"]) -> bytes:
    """The picture as PNG with its keypoints numbered, for the language model that writes the program."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(np.asarray(image))
    draw = ImageDraw.Draw(picture)
    for number, (column, row) in enumerate(np.asarray(pixels)):
        draw.ellipse((column - 2, row - 2, column + 2, row + 2), fill="white", outline="black")
        draw.text((column + 4, row - 6), str(number), fill="white", stroke_width=1, stroke_fill="black")
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()
