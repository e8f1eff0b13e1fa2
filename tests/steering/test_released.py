"""Released vision models behind keypoints: tiny random checkpoints (they need PyTorch), and masks that overlap."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vla_jax.errors import UserError
from vla_jax.steering import released
from vla_jax.steering.keypoints import KeypointConfig, color_features, propose
from vla_jax.steering.released import MaskConfig, dino_features, number_masks, sam_masks

DOCS = Path(__file__).parents[2] / "docs"
SIDE = 64  # of the picture that the tiny SAM sees
CAMERA = {"depth": np.ones((32, 48)), "position": np.array([0, 0, 1.0]), "rotation": np.eye(3), "fovy": 0.8}


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A directory with the checkpoints that the documentation names."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    directory = tmp_path_factory.mktemp("user") / "checkpoints"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    dino = transformers.Dinov2Config(image_size=28, patch_size=14, mlp_ratio=2, **sizes)
    transformers.Dinov2Model(dino).save_pretrained(directory / "dinov2-small")
    picture = {"image_size": SIDE, "patch_size": 8}
    vision = {"output_channels": 16, "window_size": 4, "global_attn_indexes": [0], "num_pos_feats": 8, "mlp_dim": 32}
    sam = transformers.SamModel(
        transformers.SamConfig(
            vision_config={**sizes, **picture, **vision},
            prompt_encoder_config={"hidden_size": 16, **picture},
            mask_decoder_config={**sizes, "mlp_dim": 32, "iou_head_hidden_dim": 16},
        )
    )
    torch.manual_seed(3)
    for weight in (weight for weight in sam.parameters() if weight.ndim > 1):
        torch.nn.init.normal_(weight, std=0.5)  # those of transformers are so small that no picture makes a difference
    for head in sam.mask_decoder.output_hypernetworks_mlps:
        head.proj_out.weight.data *= 100  # some masks are sure
    sam.save_pretrained(directory / "sam-vit-base")
    padded, mask = {"height": SIDE, "width": SIDE}, {"height": SIDE // 4, "width": SIDE // 4}
    longest = {"size": {"longest_edge": SIDE}, "mask_size": {"longest_edge": SIDE // 4}}
    processor = transformers.SamImageProcessorPil(**longest, pad_size=padded, mask_pad_size=mask)
    processor.save_pretrained(directory / "sam-vit-base")
    return directory


def test_dino_features_come_from_a_checkpoint(checkpoints, image):
    features = dino_features(checkpoints / "dinov2-small", 28)(image)
    assert features.shape == (2, 2, 16) and np.ptp(features) > 0
    with pytest.raises(UserError, match="holds no DINO checkpoint"):
        dino_features(checkpoints / "nothing")


def test_sam_is_asked_as_its_own_processor_asks(checkpoints, image, monkeypatch):
    """Points in pixels of the picture, through transformers' SamProcessor; ours go in at the model's size."""
    import torch
    import transformers

    monkeypatch.setattr("vla_jax.steering.released.POINTS_AT_ONCE", 5)
    directory = checkpoints / "sam-vit-base"
    processor = transformers.SamProcessor(transformers.AutoImageProcessor.from_pretrained(directory))
    grid = [[[48 * (column + 0.5) / 4, 32 * (row + 0.5) / 4]] for row in range(4) for column in range(4)]
    inputs = processor(images=image, input_points=[grid], return_tensors="pt")
    sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
    with torch.no_grad():
        answer = transformers.SamModel.from_pretrained(directory).eval()(**inputs)
    logits = processor.image_processor.post_process_masks(answer.pred_masks, *sizes, binarize=False)[0].flatten(0, 1)
    scores = answer.iou_scores.flatten().numpy()
    config = MaskConfig(points=4)
    likely, sure = (logits > -1).sum((1, 2)).numpy(), (logits > 1).sum((1, 2)).numpy()
    high = scores > config.score
    good = high & (sure > config.stability * likely)
    assert 3 < good.sum() < high.sum() < len(scores), "both limits bind"
    expected = number_masks((logits > 0).numpy()[good], scores[good], config)
    found = sam_masks(directory, config)(image)
    assert len(np.unique(expected)) > 2
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(UserError, match="finds no thing in the picture: lower"):
        sam_masks(directory, MaskConfig(points=2, score=1e9))(image)


def test_the_snippets_of_the_documentation_run(checkpoints, image, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints.parent)
    monkeypatch.setattr(released, "sam_masks", lambda where, config=None: sam_masks(where, MaskConfig(points=4)))
    for page, needed in (("methods/vls.md", "found = propose"), ("pretrained.md", "masks = sam_masks")):
        (snippet,) = (
            part for part in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL) if needed in part
        )
        scope = {"image": image, **CAMERA}
        exec(snippet, scope)
        assert scope["masks"].shape == (32, 48) and scope["masks"].max() > 0
    printed = capsys.readouterr().out
    assert "thing 1" in printed or "thing 2" in printed


def test_what_is_no_sam_checkpoint_is_an_error(checkpoints, tmp_path):
    with pytest.raises(UserError, match="nothing is no checkpoint: it has no config.json"):
        sam_masks(checkpoints / "nothing")
    with pytest.raises(UserError, match="holds a model of type 'dinov2', not 'sam': give"):
        sam_masks(checkpoints / "dinov2-small")
    (tmp_path / "config.json").write_text((checkpoints / "sam-vit-base/config.json").read_text())
    with pytest.raises(UserError, match="holds no SAM checkpoint"):
        sam_masks(tmp_path)


@pytest.mark.parametrize("name, load", [("dinov2-small", dino_features), ("sam-vit-base", sam_masks)])
def test_a_checkpoint_that_lacks_a_weight_is_an_error(checkpoints, tmp_path, name, load):
    shutil.copytree(checkpoints / name, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in weights if "encoder" in key)
    save_file({key: value for key, value in weights.items() if key != lost}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 weights of its model, as \S+: fetch it again"):
        load(tmp_path)


def test_without_pytorch_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for make in (sam_masks, dino_features):
        with pytest.raises(UserError, match=r"need PyTorch and transformers: pip install 'vla_jax\[parity\]'"):
            make("anywhere")


def rectangle(top, bottom, left, right):
    mask = np.zeros((20, 40), bool)
    mask[top:bottom, left:right] = True
    return mask


TABLE, CUP, HANDLE, BALL = (
    rectangle(4, 20, 0, 40),
    rectangle(5, 15, 5, 20),
    rectangle(8, 12, 16, 20),
    rectangle(6, 10, 30, 36),
)
AGAIN = rectangle(5, 15, 5, 19)  # nearly the cup


@pytest.mark.parametrize("seed", range(3))
def test_of_masks_that_overlap_each_pixel_gets_one(seed):
    """In any order: the table goes, the cup stays once and keeps what is not its handle."""
    masks, scores = np.array([TABLE, CUP, HANDLE, BALL, AGAIN]), np.array([1.0, 0.99, 0.9, 0.95, 0.98])
    order = np.random.default_rng(seed).permutation(5)
    numbers = number_masks(masks[order], scores[order])
    expected = np.select([HANDLE, BALL, CUP], [3, 2, 1], 0)
    np.testing.assert_array_equal(numbers, expected)


def test_a_table_that_things_stand_on_is_no_thing():
    """Less the things on it, it covers under half of the picture, and the procedure would take it."""
    masks, scores = np.array([TABLE & rectangle(4, 15, 0, 40), CUP, BALL]), np.array([0.9, 1, 1])
    numbers = number_masks(masks, scores, MaskConfig(max_share=0.5))
    whole = number_masks(masks, scores, MaskConfig(max_share=0.6))
    assert numbers.max() == 2 and whole.max() == 3 and (whole == 1).mean() < 0.5
    image = np.zeros((20, 40, 3), np.uint8)
    image[CUP, 0], image[HANDLE, 2], image[BALL, 1] = 255, 255, 255
    column, row = np.meshgrid(np.arange(40) / 40, np.arange(20) / 40)
    seen = image, np.stack([column, row, np.zeros_like(row)], -1), np.ones((20, 40))
    names = {1: "cup", 2: "ball"}
    found = propose(*seen, numbers, names, color_features, KeypointConfig(per_mask=2))
    assert set(found.labels) == {"cup", "ball"}
    for position, label in zip(found.position, found.labels, strict=True):
        mask = {"cup": CUP, "ball": BALL}[label]
        assert mask[round(position[1] * 40), round(position[0] * 40)]
