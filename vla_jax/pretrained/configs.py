"""config.json of a checkpoint to the settings of a model, and back.

A field that changes what a model computes, and that this code does not have, is an error and not ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla_jax.errors import UserError
from vla_jax.models.paligemma import PaliGemmaConfig
from vla_jax.models.qwen3_vl import Qwen3VLConfig
from vla_jax.models.qwen_vision import QwenVisionConfig
from vla_jax.models.trunk import TrunkConfig
from vla_jax.models.vision import VisionConfig
from vla_jax.schema import listing

GELU, SIGLIP_EPSILON = "gelu_pytorch_tanh", 1e-6


def read_json(directory: str | Path) -> dict[str, Any]:
    """The config.json of a checkpoint directory."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} is no checkpoint: it has no config.json")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no JSON file: copy it again") from error


def from_json(source: Mapping[str, Any], dtype: str | None = None, scan: bool = True):
    """The settings of the model that config.json describes. dtype: of the computation; None is the checkpoint's."""
    kind = source.get("model_type")
    if kind not in READERS:
        raise UserError(f"the checkpoint's model_type is {kind!r}; supported are {listing(list(READERS))}")
    # Released Qwen3-VL names its type beside the sizes of the language model alone.
    groups = (source, source.get("text_config") or {})
    named = (group.get(name) for group in groups for name in ("dtype", "torch_dtype"))
    dtype = dtype or next(filter(None, named), "float32")
    return READERS[kind](_Fields(source), dtype, scan)


def to_json(config: Qwen3VLConfig | PaliGemmaConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model whose weights have the type `dtype`."""
    write = _write_qwen3_vl if isinstance(config, Qwen3VLConfig) else _write_paligemma
    return {**write(config), "dtype": dtype, "torch_dtype": dtype}


class _Fields:
    """A group of settings in a config.json, by its dotted path in messages."""

    def __init__(self, values: Mapping[str, Any], path: str = ""):
        self.values, self.path = values, path

    def group(self, name: str) -> _Fields:
        return _Fields(self.values.get(name) or {}, f"{self.path}{name}.")

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise UserError(f"config.json has no {self.path}{name}")
        return value

    def expect(self, **expected: Any) -> None:
        """Raises UserError where a field is there and has another value."""
        for name, value in expected.items():
            if self.values.get(name, value) not in (value, None):
                raise UserError(
                    f"config.json: {self.path}{name} = {self.values[name]!r} is not supported, only {value!r}"
                )


def _rope(text: _Fields, theta: float) -> tuple[float, _Fields]:
    """Base of the rotary angles, and the rest of their settings: transformers 5 keeps both in rope_parameters."""
    name = next((name for name in ("rope_parameters", "rope_scaling") if text.values.get(name)), "rope_parameters")
    rope = text.group(name)
    rope.expect(rope_type="default", type="default", partial_rotary_factor=1.0)
    return float(rope.get("rope_theta", text.get("rope_theta", theta))), rope


def _read_qwen3_vl(source: _Fields, dtype: str, scan: bool) -> Qwen3VLConfig:
    text, vision = source.group("text_config"), source.group("vision_config")
    text.expect(hidden_act="silu", attention_bias=False, use_sliding_window=False)
    vision.expect(hidden_act=GELU, in_channels=3)
    theta, rope = _rope(text, 5e6)
    rope.expect(mrope_interleaved=True)
    grid = round(vision.get("num_position_embeddings") ** 0.5)
    vision.expect(num_position_embeddings=grid**2, out_hidden_size=text.get("hidden_size"))
    tower = QwenVisionConfig(
        patch=vision.get("patch_size"),
        frames=vision.get("temporal_patch_size"),
        merge=vision.get("spatial_merge_size"),
        width=vision.get("hidden_size"),
        depth=vision.get("depth"),
        heads=vision.get("num_heads"),
        hidden=vision.get("intermediate_size"),
        grid=grid,
        taps=tuple(vision.get("deepstack_visual_indexes")),
        scan=scan,
    )
    trunk = _trunk(text, theta, scan, rope_sections=tuple(rope.get("mrope_section", [24, 20, 20])))
    return Qwen3VLConfig(
        tower,
        trunk,
        vocabulary=text.get("vocab_size"),
        tied=bool(source.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        image_token=source.get("image_token_id"),
        video_token=source.get("video_token_id"),
        vision_start=source.get("vision_start_token_id"),
        vision_end=source.get("vision_end_token_id"),
        dtype=dtype,
    )


def _trunk(text: _Fields, theta: float, scan: bool, head_width: int | None = None, **more: Any) -> TrunkConfig:
    """What Qwen3 and Gemma say alike. head_width: where the file leaves it out."""
    heads = text.get("num_attention_heads")
    return TrunkConfig(
        width=text.get("hidden_size"),
        depth=text.get("num_hidden_layers"),
        heads=heads,
        kv_heads=text.get("num_key_value_heads", heads),
        head_width=text.get("head_dim", head_width),
        hidden=text.get("intermediate_size"),
        rope_theta=theta,
        epsilon=text.get("rms_norm_eps", 1e-6),
        scan=scan,
        **more,
    )


def _read_paligemma(source: _Fields, dtype: str, scan: bool) -> PaliGemmaConfig:
    text, vision = source.group("text_config"), source.group("vision_config")
    source.expect(tie_word_embeddings=True)
    text.expect(model_type="gemma", hidden_act=GELU, attention_bias=False, final_logit_softcapping=None)
    text.expect(hidden_activation=GELU, use_bidirectional_attention=True)
    vision.expect(model_type="siglip_vision_model", hidden_act=GELU, num_channels=3, vision_use_head=False)
    vision.expect(layer_norm_eps=SIGLIP_EPSILON)
    theta, _ = _rope(text, 10_000.0)
    tower = VisionConfig(
        patch=vision.get("patch_size"),
        merge=1,
        view_embedding=False,
        width=vision.get("hidden_size"),
        depth=vision.get("num_hidden_layers"),
        heads=vision.get("num_attention_heads"),
        hidden=vision.get("intermediate_size"),
        scan=scan,
    )
    return PaliGemmaConfig(
        tower,
        _trunk(text, theta, scan, head_width=256, activation="gelu", norm_offset=1.0, qk_norm=False),
        vocabulary=text.get("vocab_size"),
        tied=True,
        image_size=vision.get("image_size", 224),
        image_token=source.get("image_token_index", source.values.get("image_token_id")),
        dtype=dtype,
    )


READERS = {"qwen3_vl": _read_qwen3_vl, "paligemma": _read_paligemma}


def _write_trunk(trunk: TrunkConfig, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": trunk.width,
        "num_hidden_layers": trunk.depth,
        "num_attention_heads": trunk.heads,
        "num_key_value_heads": trunk.kv_heads,
        "head_dim": trunk.head_width,
        "intermediate_size": trunk.hidden,
        "rms_norm_eps": trunk.epsilon,
        "rope_theta": trunk.rope_theta,
        "vocab_size": vocabulary,
    }


def _write_qwen3_vl(config: Qwen3VLConfig) -> dict[str, Any]:
    vision, sections = config.vision, list(config.trunk.rope_sections)
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": config.image_token,
        "video_token_id": config.video_token,
        "vision_start_token_id": config.vision_start,
        "vision_end_token_id": config.vision_end,
        "tie_word_embeddings": config.tied,
        "text_config": {
            **_write_trunk(config.trunk, config.vocabulary),
            "model_type": "qwen3_vl_text",
            "hidden_act": "silu",
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": sections},
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "patch_size": vision.patch,
            "temporal_patch_size": vision.frames,
            "spatial_merge_size": vision.merge,
            "hidden_size": vision.width,
            "depth": vision.depth,
            "num_heads": vision.heads,
            "intermediate_size": vision.hidden,
            "out_hidden_size": config.trunk.width,
            "num_position_embeddings": vision.grid**2,
            "deepstack_visual_indexes": list(vision.taps),
            "hidden_act": GELU,
        },
    }


def _write_paligemma(config: PaliGemmaConfig) -> dict[str, Any]:
    vision, width = config.vision, config.trunk.width
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "image_token_index": config.image_token,
        "tie_word_embeddings": config.tied,
        "hidden_size": width,
        "projection_dim": width,
        "text_config": {
            **_write_trunk(config.trunk, config.vocabulary),
            "model_type": "gemma",
            "hidden_act": GELU,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "patch_size": vision.patch,
            "hidden_size": vision.width,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.hidden,
            "image_size": config.image_size,
            "projection_dim": width,
            "hidden_act": GELU,
            "layer_norm_eps": SIGLIP_EPSILON,
            "vision_use_head": False,
        },
    }
