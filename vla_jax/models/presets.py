"""Sizes of released vision-language models, and a policy's settings on one of them.

Sizes are those of the released config.json files; `vla_jax.load_vlm` reads them from the checkpoint itself.
"""

from __future__ import annotations

import dataclasses

from vla_jax.models.paligemma import PaliGemmaConfig
from vla_jax.models.policy import PolicyConfig
from vla_jax.models.qwen3_vl import Qwen3VLConfig
from vla_jax.models.qwen_vision import QwenVisionConfig
from vla_jax.models.trunk import TrunkConfig
from vla_jax.models.vision import VisionConfig

BOS = 2  # Gemma's id of what stands between pictures and text


def _qwen(width: int, depth: int, heads: int, hidden: int, vision: QwenVisionConfig, tied: bool) -> Qwen3VLConfig:
    trunk = TrunkConfig(
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=8,
        head_width=128,
        hidden=hidden,
        rope_theta=5e6,
        rope_sections=(24, 20, 20),
        scan=True,
    )
    return Qwen3VLConfig(vision, trunk, tied=tied, dtype="bfloat16")


SMALL_TOWER = QwenVisionConfig()
LARGE_TOWER = QwenVisionConfig(width=1152, depth=27, heads=16, hidden=4304, taps=(8, 16, 24))
PRESETS = {
    "qwen3_vl_2b": _qwen(2048, 28, 16, 6144, SMALL_TOWER, tied=True),
    "qwen3_vl_4b": _qwen(2560, 36, 32, 9728, SMALL_TOWER, tied=True),
    "qwen3_vl_8b": _qwen(4096, 36, 32, 12288, LARGE_TOWER, tied=False),
    "paligemma_3b": PaliGemmaConfig(
        VisionConfig(14, 1, False, width=1152, depth=27, heads=16, hidden=4304, scan=True),
        TrunkConfig(
            width=2048,
            depth=18,
            heads=8,
            kv_heads=1,
            head_width=256,
            hidden=16_384,
            activation="gelu",
            qk_norm=False,
            norm_offset=1.0,
            scan=True,
        ),
        dtype="bfloat16",
    ),
}


def on_vlm(policy: PolicyConfig, vlm: Qwen3VLConfig | PaliGemmaConfig) -> PolicyConfig:
    """The policy with this model's tower, trunk and words. How layers are run, the expert and all else stay."""
    trunk = dataclasses.replace(vlm.trunk, scan=policy.trunk.scan, remat=policy.trunk.remat)
    policy = dataclasses.replace(policy, trunk=trunk, vocabulary=vlm.vocabulary, tied=vlm.tied)
    if isinstance(vlm, PaliGemmaConfig):
        return dataclasses.replace(
            policy,
            encoder="vit",
            vision=dataclasses.replace(vlm.vision, scan=policy.vision.scan, remat=policy.vision.remat),
            word_scale=trunk.width**0.5,
            image_bidirectional=True,
            brackets=(),
            closing=(BOS,),
        )
    tower = policy.qwen_vision
    return dataclasses.replace(
        policy,
        encoder="qwen3_vl",
        qwen_vision=dataclasses.replace(vlm.vision, scan=tower.scan, remat=tower.remat),
        word_scale=1.0,
        image_bidirectional=False,
        brackets=(vlm.vision_start, vlm.vision_end),
        closing=(),
    )
