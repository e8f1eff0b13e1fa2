"""Tiny random checkpoints written by transformers, and its models to compare with."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

IMAGE, VIDEO, START, END = 300, 301, 302, 303
QWEN = dict(
    vision_config=dict(
        depth=4,
        hidden_size=32,
        num_heads=4,
        intermediate_size=64,
        patch_size=8,
        out_hidden_size=64,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1, 3],
    ),
    text_config=dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=320,
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0, mrope_section=[4, 2, 2], mrope_interleaved=True),
    ),
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=START,
    vision_end_token_id=END,
    tie_word_embeddings=True,
)
PALIGEMMA = dict(
    vision_config=dict(
        model_type="siglip_vision_model",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        vision_use_head=False,
    ),
    text_config=dict(
        model_type="gemma",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=300,
    ),
    image_token_index=IMAGE,  # beyond the vocabulary, as in the released models
    projection_dim=64,
    hidden_size=64,
)


@dataclasses.dataclass
class Pair:
    """The same checkpoint, read by transformers and by this project."""

    directory: Path
    theirs: Any
    ours: Any

    def compare_logits(self, inputs: dict[str, np.ndarray]) -> float:
        """The largest difference of logits at places that are no padding."""
        with torch.no_grad():
            expected = self.theirs(**to_torch(inputs)).logits.numpy()
        real = inputs["attention_mask"].astype(bool)
        return np.abs(np.asarray(self.ours.logits(**inputs)) - expected)[real].max()


def to_torch(inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: torch.tensor(value) for name, value in inputs.items()}


def write_checkpoint(directory: Path, model_class: type, config: Any, **save: Any) -> Any:
    """A model with random weights, far from their initial values: biases are not zero, norms not one."""
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory, **save)
    return model


def qwen_inputs(rows: list[list[int | tuple[int, int]]], left: bool = True) -> dict[str, np.ndarray]:
    """What the processor returns for prompts of word ids and pictures, each (rows, columns) in patches."""
    random = np.random.default_rng(0)
    grids = [item for row in rows for item in row if isinstance(item, tuple)]
    spelled = []
    for row in rows:
        tokens = []
        for item in row:
            tokens += [START, *[IMAGE] * (item[0] * item[1] // 4), END] if isinstance(item, tuple) else [item]
        spelled.append(tokens)
    inputs = padded(spelled, left)
    if grids:
        patches = sum(rows * columns for rows, columns in grids)
        inputs["pixel_values"] = random.normal(size=(patches, 3 * 2 * 8 * 8)).astype(np.float32)
        inputs["image_grid_thw"] = np.array([(1, *grid) for grid in grids])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).astype(int)
    return inputs


def paligemma_inputs(rows: list[tuple[list[int], list[int]]], pictures: int = 1, left: bool = True):
    """What the processor returns for prompts (prefix, suffix) with one picture of four tokens each, or without."""
    inputs = padded([[IMAGE] * 4 * pictures + prefix + suffix for prefix, suffix in rows], left)
    types = padded([[0] * (4 * pictures + len(prefix)) + [1] * len(suffix) for prefix, suffix in rows], left)
    inputs["token_type_ids"] = types["input_ids"]
    if pictures:
        random = np.random.default_rng(0)
        inputs["pixel_values"] = random.normal(size=(len(rows) * pictures, 3, 28, 28)).astype(np.float32)
    return inputs


def padded(rows: list[list[int]], left: bool) -> dict[str, np.ndarray]:
    longest = max(map(len, rows))
    gaps = [[0] * (longest - len(row)) for row in rows]
    join = (lambda gap, row: gap + row) if left else (lambda gap, row: row + gap)
    return {
        "input_ids": np.array([join(gap, row) for gap, row in zip(gaps, rows, strict=True)]),
        "attention_mask": np.array([join(gap, [1] * len(row)) for gap, row in zip(gaps, rows, strict=True)]),
    }
