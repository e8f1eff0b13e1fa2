"""Released vision models behind keypoints: features by DINO, masks by SAM.

Both load from a directory through transformers and run in PyTorch (extra `parity`), once an episode. Nothing is
downloaded.

Axes: H x W picture, N masks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from vla_jax.errors import UserError
from vla_jax.pretrained.configs import read_json
from vla_jax.steering.keypoints import Features, KeypointConfig, color_features, resize

Masks = Callable[[UInt8[np.ndarray, "H W 3"]], Int[np.ndarray, "H W"]]
"""The number of the thing at each pixel of a picture; 0 is none."""

POINTS_AT_ONCE = 64  # of SAM's grid; bounds the memory that their masks take


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """Which of SAM's masks are things. The defaults are those of its own automatic masks (arXiv 2304.02643).

    Attributes:
        points: along each side of the grid of points that SAM is asked about; each gives three masks.
        score: the intersection over union that SAM predicts for a mask has to be above it.
        stability: pixels of a mask at logit 1 over those at logit -1; it has to be above this.
        overlap: of two masks with more intersection over union than this, the one of the higher score stays.
        max_share: a mask that covers more of the picture than this is no object.
    """

    points: int = 32
    score: float = 0.88
    stability: float = 0.95
    overlap: float = 0.7
    max_share: float = KeypointConfig.max_share


DEFAULT = MaskConfig()


def dino_features(directory: str | Path, size: int = 224) -> Features:
    """Patch features of a DINOv2 or DINOv3 checkpoint in a directory.

    size: of the picture that the model sees, in pixels; a multiple of its patch.

    Raises:
        UserError: PyTorch or transformers is missing, or the directory holds no such checkpoint.
    """
    torch, transformers = _libraries("DINO features")
    try:
        model = _load(transformers.AutoModel, directory)
        side = size // model.config.patch_size
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{directory} holds no DINO checkpoint that transformers can read") from error
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

    def features(image):
        pixels = (resize(color_features(image), (size, size)) - mean) / deviation
        with torch.no_grad():
            hidden = model(pixel_values=torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32)))
        return hidden.last_hidden_state[0, -side * side :].numpy().reshape(side, side, -1)

    return features


def sam_masks(directory: str | Path, config: MaskConfig = DEFAULT) -> Masks:
    """Masks of everything in a picture by a SAM checkpoint in a directory, numbered by `number_masks`.

    SAM is asked about a grid of points. It names nothing: names are the caller's.

    Raises:
        UserError: PyTorch or transformers is missing, the directory holds no such checkpoint, or, from the masks' own
            call, nothing in the picture passes as a thing.
    """
    torch, transformers = _libraries("SAM masks")
    if (kind := read_json(directory).get("model_type")) != "sam":
        raise UserError(
            f"{directory} holds a model of type {kind!r}, not 'sam': give one such as facebook/sam-vit-base"
        )
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(directory, local_files_only=True)
        model = _load(transformers.SamModel, directory)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} holds no SAM checkpoint that transformers can read") from error

    def masks(image):
        inputs = processor(images=image, return_tensors="pt")
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        height, width = sizes[1][0].tolist()
        along = (np.arange(config.points, dtype=np.float32) + 0.5) / config.points
        grid = torch.from_numpy(np.stack(np.meshgrid(along * width, along * height), -1).reshape(1, -1, 1, 2))
        found, scores = [], []
        with torch.no_grad():
            embedding = model.get_image_embeddings(inputs["pixel_values"])
            for points in grid.split(POINTS_AT_ONCE, 1):
                answer = model(image_embeddings=embedding, input_points=points)
                logits = processor.post_process_masks(answer.pred_masks, *sizes, binarize=False)[0].flatten(0, 1)
                score = answer.iou_scores.flatten()
                sure, likely = ((logits > edge).sum((1, 2)) for edge in (1, -1))
                good = (score > config.score) & (sure > config.stability * likely)
                found.append((logits[good] > 0).numpy())
                scores.append(score[good].numpy())
        numbers = number_masks(np.concatenate(found), np.concatenate(scores), config)
        if not numbers.any():
            raise UserError("SAM finds no thing in the picture: lower MaskConfig's score or stability")
        return numbers

    return masks


def number_masks(
    masks: Bool[np.ndarray, "N H W"], scores: Float[np.ndarray, " N"], config: MaskConfig = DEFAULT
) -> Int[np.ndarray, "H W"]:
    """One number a pixel, as `keypoints.propose` takes it, from masks that overlap: a thing, its parts, the table.

    Masks that are too large go first, while they are whole: less the things that stand on it, a table might pass for
    one. Then go those that repeat one of a higher score. The others are numbered from 1, the largest first, and a pixel
    has the number of its smallest mask: neither a part nor what lies on a thing is lost in it. 0 is no mask.
    """
    area, packed = masks.sum((1, 2)), np.packbits(masks, axis=2)
    kept: list[int] = []
    for index in np.argsort(-scores, kind="stable"):
        both = np.bitwise_count(packed[kept] & packed[index]).sum((1, 2), dtype=np.int64)
        repeats = both > config.overlap * (area[kept] + area[index] - both)
        if 0 < area[index] <= config.max_share * masks[index].size and not repeats.any():
            kept.append(index)
    numbers = np.zeros(masks.shape[1:], np.int32)
    for number, index in enumerate(sorted(kept, key=lambda index: -area[index]), 1):
        numbers[masks[index]] = number
    return numbers


def _libraries(what: str):
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"{what} need PyTorch and transformers: pip install 'vla_jax[parity]'") from error
    return torch, transformers


def _load(kind, directory: str | Path):
    """The model with the weights of a directory; transformers only warns of those that are not there."""
    model, found = kind.from_pretrained(directory, local_files_only=True, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{directory} lacks {len(missing)} weights of its model, as {missing[0]}: fetch it again")
    return model.eval()
