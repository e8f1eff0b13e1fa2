"""What the parameters of a model are called in a checkpoint, and how they lie there.

A table is a list of rows. `{}` in a key stands for a layer; its parameters are stacked on a leading axis here. Where
one tensor holds several parameters (queries, keys and values), they follow one another on its first axis.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Array

from vla_jax.models.paligemma import PaliGemma, PaliGemmaConfig
from vla_jax.models.qwen3_vl import Qwen3VL, Qwen3VLConfig


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a checkpoint, or, with `{}` in its key, one of every layer.

    paths: the parameters in it. form: "same" (as here), "matrix" (transposed: [outputs, inputs]), "pixels" (a
    convolution over pictures, [outputs, channels, rows, columns], whose inputs are [rows, columns, channels] here).
    inputs: the shape of a matrix's second axis in the checkpoint, where that is several axes.
    """

    key: str
    paths: tuple[str, ...]
    form: str = "same"
    inputs: tuple[int, ...] = ()

    @property
    def stacked(self) -> bool:
        """Whether there is one tensor a layer."""
        return "{}" in self.key

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Of the tensor in the checkpoint, given the parameters' shapes here."""
        own = [shapes[path][1:] if self.stacked else shapes[path] for path in self.paths]
        if self.form == "same":
            return (sum(shape[0] for shape in own), *own[0][1:])
        return (sum(shape[1] for shape in own), *(self.inputs or own[0][:1]))


def to_ours(tensor: Array, form: str) -> Array:
    """A tensor (or its part for one parameter) as it lies here."""
    if form == "same":
        return tensor
    if form == "pixels":
        tensor = tensor.transpose(0, 2, 3, 1)
    return tensor.reshape(len(tensor), -1).T


def to_theirs(parameter: np.ndarray, form: str, inputs: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_ours`."""
    if form == "same":
        return parameter
    if form == "pixels":
        channels, rows, columns = inputs
        return parameter.T.reshape(-1, rows, columns, channels).transpose(0, 3, 1, 2)
    return parameter.T.reshape(-1, *inputs) if inputs else parameter.T


def _weights(key: str, *paths: str, form: str = "matrix", inputs: tuple[int, ...] = ()) -> list[Row]:
    """A dense layer with a bias."""
    kernels, biases = tuple(f"{path}/kernel" for path in paths), tuple(f"{path}/bias" for path in paths)
    return [Row(f"{key}.weight", kernels, form, inputs), Row(f"{key}.bias", biases)]


def _norm(key: str, path: str) -> list[Row]:
    """A layer norm."""
    return [Row(f"{key}.weight", (f"{path}/scale",)), Row(f"{key}.bias", (f"{path}/bias",))]


def _decoder(prefix: str, qk_norm: bool) -> list[Row]:
    """The trunk and the word embeddings, which Qwen3 and Gemma name alike."""
    layer, ours = f"{prefix}.layers.{{}}", "trunk/blocks/layers"
    matrices = {f"self_attn.{name[0]}_proj": f"attention/{name}" for name in ("query", "key", "value", "output")}
    matrices |= {f"mlp.{name}_proj": f"mlp/{name}" for name in ("gate", "up", "down")}
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    if qk_norm:
        norms |= {"self_attn.q_norm": "attention/query_norm", "self_attn.k_norm": "attention/key_norm"}
    rows = [Row(f"{layer}.{key}.weight", (f"{ours}/{path}/kernel",), "matrix") for key, path in matrices.items()]
    rows += [Row(f"{layer}.{key}.weight", (f"{ours}/{path}/scale",)) for key, path in norms.items()]
    rows.append(Row(f"{prefix}.norm.weight", ("trunk/norm/scale",)))
    rows.append(Row(f"{prefix}.embed_tokens.weight", ("words",)))
    return rows


def qwen3_vl(config: Qwen3VLConfig) -> list[Row]:
    """Qwen3-VL, dense."""
    vision, block = config.vision, "model.visual.blocks.{}"
    ours = "vision/blocks/layers"
    patch = (3, vision.frames, vision.patch, vision.patch)
    rows = _weights("model.visual.patch_embed.proj", "vision/patch", inputs=patch)
    rows.append(Row("model.visual.pos_embed.weight", ("vision/position",)))
    rows += _norm(f"{block}.norm1", f"{ours}/attention_norm") + _norm(f"{block}.norm2", f"{ours}/mlp_norm")
    rows += _weights(f"{block}.attn.qkv", *(f"{ours}/attention/{name}" for name in ("query", "key", "value")))
    rows += _weights(f"{block}.attn.proj", f"{ours}/attention/output")
    mergers = {
        "model.visual.merger": "vision/merger",
        "model.visual.deepstack_merger_list.{}": "vision/tap_mergers/layers",
    }
    for key, path in {f"{block}.mlp": f"{ours}/mlp", **{k: f"{path}/mlp" for k, path in mergers.items()}}.items():
        rows += _weights(f"{key}.linear_fc1", f"{path}/up") + _weights(f"{key}.linear_fc2", f"{path}/down")
    for key, path in mergers.items():
        rows += _norm(f"{key}.norm", f"{path}/norm")
    rows += _decoder("model.language_model", qk_norm=True)
    return rows if config.tied else [*rows, Row("lm_head.weight", ("head/kernel",), "matrix")]


def paligemma(config: PaliGemmaConfig) -> list[Row]:
    """PaliGemma: SigLIP and Gemma."""
    tower = "vision_tower.vision_model"
    layer, ours = f"{tower}.encoder.layers.{{}}", "vision/blocks/layers"
    patch = (3, config.vision.patch, config.vision.patch)
    rows = _weights(f"{tower}.embeddings.patch_embedding", "vision/patch", form="pixels", inputs=patch)
    rows.append(Row(f"{tower}.embeddings.position_embedding.weight", ("vision/position",)))
    rows += _norm(f"{layer}.layer_norm1", f"{ours}/attention_norm") + _norm(f"{layer}.layer_norm2", f"{ours}/mlp_norm")
    for key, name in {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}.items():
        rows += _weights(f"{layer}.self_attn.{key}", f"{ours}/attention/{name}")
    rows += _weights(f"{layer}.mlp.fc1", f"{ours}/mlp/up") + _weights(f"{layer}.mlp.fc2", f"{ours}/mlp/down")
    rows += _norm(f"{tower}.post_layernorm", "vision/norm")
    rows += _weights("multi_modal_projector.linear", "vision/project")
    return rows + _decoder("language_model.model", qk_norm=False)


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of checkpoint. renames: what other writers of the same model call the beginnings of keys."""

    model: type
    table: Callable[..., list[Row]]
    renames: tuple[tuple[str, str], ...] = ()

    def canonical(self, key: str) -> str:
        """The key as the table has it."""
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key


FAMILIES = {
    "qwen3_vl": Family(Qwen3VL, qwen3_vl),
    "paligemma": Family(
        PaliGemma,
        paligemma,
        (
            (r"^model\.language_model\.", "language_model.model."),
            (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
            (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
            (r"^language_model\.lm_head\.", "lm_head."),
        ),
    ),
}
