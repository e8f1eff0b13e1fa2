"""BayesianVLA at the size of the paper: Qwen3-VL-4B, 64 latent queries, a DiT-B of 16 blocks.

python -m experiments.train --config=configs/bayesianvla_qwen3vl_4b.py[:ARM[,MODE]] \
    --config.pretrained.directory=CHECKPOINT --config.data.directory=DATA --workdir=runs/x

CHECKPOINT is a directory with config.json, safetensors files and tokenizer.json; without one the weights are random.
Its model sets the sizes, so the 2B and 8B models work too. ARM is one of configs/train.py, or qwen_groot: the expert
attends to every trunk token. MODE is what is trained: full, frozen (no vision tower, no words) or lora. Pictures of 224
pixels make 49 tokens a view.

Before a launch, `python -m experiments.plan --config=… --topology=v5e:16x16` says whether it fits (docs/scaling.md).

Settings are those of arXiv 2601.15197 and, where it is silent, of the code it was made with: AdamW with 1e-5 for the
model and its queries and 1e-4 for the expert, 50 000 steps of 128 samples, four noise draws a sample.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import train
from vla_jax.config import nearest
from vla_jax.errors import UserError
from vla_jax.models.expert import ExpertConfig
from vla_jax.models.policy import PolicyConfig
from vla_jax.models.presets import PRESETS, on_vlm

OPENING = (151_644, 872, 198)  # "<|im_start|>user\n" in Qwen's words
ADAPTERS = {"rank": 16, "strength": 32.0, "layers": r"^trunk/.*/(query|key|value|output|gate|up|down)$"}
SLOW = (r"^(vision|trunk|words|head|queries)(/|$)", 0.1)
MODES = {
    "full": {"scales": (SLOW,)},
    "frozen": {"scales": ((r"^(vision|words)(/|$)", 0.0), SLOW)},
    # adapters learn ten times as fast as full fine-tuning does
    "lora": {"scales": (("/adapter/", 1.0), (r"^queries$", 0.1), (r"^(vision|trunk|words|head)(/|$)", 0.0))},
}
DIT_B = ExpertConfig(
    width=768, depth=16, heads=12, hidden=3072, head=1024, future_tokens=32, state_token=False, dropout=0.2, scan=True
)


def get_config(argument: str = "bayesianvla") -> ConfigDict:
    """Settings of experiments.train."""
    return settings("qwen3_vl_4b", argument, {"opening": OPENING})


def settings(model: str, argument: str, more: dict) -> ConfigDict:
    """A policy on a released model. argument: "ARM" or "ARM,MODE"; more: further settings of the policy."""
    arm, _, mode = argument.partition(",")
    mode = mode or "full"
    if mode not in MODES:
        raise UserError(f"unknown mode '{mode}'{nearest(mode, list(MODES))}")
    config = train.get_config("baseline" if arm == "qwen_groot" else arm)
    policy = on_vlm(PolicyConfig(expert=DIT_B), PRESETS[model])
    large = {"scan": True, "remat": "all"}
    config.policy = {
        **dataclasses.asdict(policy),
        **config.policy.to_dict(),
        **more,
        "trunk": {**dataclasses.asdict(policy.trunk), **large},
        "views": ("front",),
        "queries": 64,
        "chunk": 16,
        "dtype": "bfloat16",
        "lora": ADAPTERS if mode == "lora" else {},
    }
    config.arm = arm
    config.steps = 50_000
    config.data = {"chunk": 16, "batch_size": 128}
    config.optimizer = {
        "learning_rate": 1e-4,
        "min_learning_rate": 5e-6,
        "warmup_steps": 5000,
        "weight_decay": 1e-8,
        "ema_decay": 0.0,
        **MODES[mode],
    }
    config.update({"eval_every": 5000, "checkpoint_every": 2500})
    config.mesh = {"data": 1, "fsdp": 0}  # weights and optimiser split over all devices
    return config
