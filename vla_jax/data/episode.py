"""One demonstration, before it is written and after it is read, and its pictures as JPEG."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Bool, Float, UInt8

from vla_jax.data.interface import Interface
from vla_jax.errors import UserError

JPEG_QUALITY = 95
DAMAGED = "a picture of the dataset is damaged: collect, convert or copy the dataset again"


@dataclasses.dataclass(frozen=True)
class Episode:
    """One demonstration of T steps: what was seen, and what was done about it.

    Attributes:
        images: RGB pictures of each view, one a step.
        state: proprioception, in the units of the Interface.
        actions: the action taken in each step, in the units of the Interface.
        instruction: what was asked for.
        success: whether the last step reached it.
        metadata: facts about this episode (int, float, bool or str); all episodes of a dataset have the same keys.
    """

    images: Mapping[str, UInt8[np.ndarray, "T H W 3"]]
    state: Float[np.ndarray, "T S"]
    actions: Float[np.ndarray, "T A"]
    instruction: str
    success: bool
    metadata: Mapping[str, int | float | bool | str]


@dataclasses.dataclass(frozen=True)
class StoredEpisode:
    """An episode as read back: like Episode, with the pictures still JPEG, one `bytes` a step and view.

    dimensions: those of an action that the robot has (True: all); in a mixture some robots have fewer than others.
    """

    images: dict[str, list[bytes]]
    state: Float[np.ndarray, "T S"]
    actions: Float[np.ndarray, "T A"]
    instruction: str
    metadata: dict[str, Any]
    dimensions: Bool[np.ndarray, "A"] | bool = True

    @property
    def nbytes(self) -> int:
        """Memory held by the pictures and arrays, in bytes."""
        pictures = sum(len(jpeg) for column in self.images.values() for jpeg in column)
        return pictures + self.state.nbytes + self.actions.nbytes


def validate(episode: Episode, index: int, interface: Interface) -> None:
    """Raises UserError, naming the episode by `index`, if it does not fit the interface or holds no valid numbers."""
    length = len(episode.actions)
    if length == 0:
        raise UserError(f"episode {index} has no steps")
    if not episode.instruction.strip():
        raise UserError(f"episode {index} has no instruction: every demonstration needs one")
    shapes = {
        "actions": (episode.actions, len(interface.action_names)),
        "state": (episode.state, len(interface.state_names)),
    }
    for what, (array, width) in shapes.items():
        if array.shape != (length, width):
            raise UserError(f"episode {index}: {what} have shape {array.shape}, expected {(length, width)}")
        if not np.isfinite(array).all():
            step = int(np.argmin(np.isfinite(array).all(axis=1)))
            raise UserError(f"episode {index}: {what} of step {step} are not finite numbers")
    if set(episode.images) != set(interface.images):
        raise UserError(f"episode {index} has views {sorted(episode.images)}, expected {sorted(interface.images)}")
    for view, size in interface.images.items():
        shape, dtype = episode.images[view].shape, episode.images[view].dtype
        if shape != (length, *size, 3) or dtype != np.uint8:
            raise UserError(f"episode {index}: view {view} is {dtype}{shape}, expected uint8{(length, *size, 3)}")


def encode_jpeg(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """RGB picture to JPEG at quality 95 without chroma subsampling, since colour words name what is to be grasped."""
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        JPEG_QUALITY,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    return encoded.tobytes()


def decode_jpeg(jpeg: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """JPEG, or what else OpenCV reads, to RGB picture. Raises UserError if the bytes are not a whole picture."""
    try:
        if simplejpeg.is_jpeg(jpeg):
            return simplejpeg.decode_jpeg(jpeg, "RGB")
    except ValueError as error:
        raise UserError(DAMAGED) from error
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise UserError(DAMAGED)
    return image


def decode_into(place: UInt8[np.ndarray, "h w 3"], jpeg: bytes) -> None:
    """`decode_jpeg` into an array; a picture of another size is made to fit (`fit_picture`)."""
    try:
        if simplejpeg.is_jpeg(jpeg) and simplejpeg.decode_jpeg_header(jpeg)[:2] == place.shape[:2]:
            simplejpeg.decode_jpeg(jpeg, "RGB", buffer=place)  # no copy
            return
    except ValueError as error:
        raise UserError(DAMAGED) from error
    picture = decode_jpeg(jpeg)
    place[...] = picture if picture.shape == place.shape else fit_picture(picture, place.shape[:2])


def fit_picture(image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """The picture at another size: shrunk or stretched without changing its shape, black where it does not reach."""
    height, width = image.shape[:2]
    scale = min(size[0] / height, size[1] / width)
    inner = max(1, round(height * scale)), max(1, round(width * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    resized = cv2.resize(image, inner[::-1], interpolation=method)
    if inner == tuple(size):
        return resized
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    fitted = np.zeros((*size, 3), np.uint8)
    fitted[top : top + inner[0], left : left + inner[1]] = resized
    return fitted
