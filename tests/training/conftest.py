"""A dataset and a policy that are just big enough to train on."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vla_jax.data import tokenizer as tokenizers
from vla_jax.data.episode import Episode
from vla_jax.data.interface import Interface
from vla_jax.data.loader import DataConfig
from vla_jax.data.rlds import write_rlds
from vla_jax.losses.objective import LossConfig
from vla_jax.models.expert import ExpertConfig
from vla_jax.models.policy import PolicyConfig
from vla_jax.models.trunk import TrunkConfig
from vla_jax.models.vision import VisionConfig
from vla_jax.training.optimizer import OptimizerConfig
from vla_jax.training.train_config import TrainConfig

ROOT = Path(__file__).parents[2]
WORDS = ("reach the red cube", "reach the blue ball")
SIZE = 16


def make_dataset(directory: Path, seed: int) -> Path:
    interface = Interface(
        embodiment="floating",
        control_hz=10.0,
        images={"front": (SIZE, SIZE)},
        action_names=("dx", "opening"),
        action_units=("m", "m"),
        action_representation="delta",
        state_names=("x", "y"),
        state_units=("m", "m"),
        max_tokens=6,
        tokenizer=tokenizers.to_json(tokenizers.train_tokenizer(WORDS)),
    )
    random = np.random.default_rng(seed)

    def episode(number: int) -> Episode:
        length = int(random.integers(4, 9))
        return Episode(
            images={"front": random.integers(0, 256, (length, SIZE, SIZE, 3), dtype=np.uint8)},
            state=random.normal(size=(length, 2)).astype(np.float32),
            actions=random.normal(scale=0.02, size=(length, 2)).astype(np.float32),
            instruction=WORDS[number % 2],
            success=True,
            metadata={"seed": number},
        )

    return write_rlds(directory, "tiny", (episode(number) for number in range(20)), interface, {"task": "reach"})


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), seed=0)


@pytest.fixture(scope="session")
def other_dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def config(dataset) -> TrainConfig:
    return tiny_config(dataset)


def tiny_config(dataset: Path) -> TrainConfig:
    """Ten steps of a very small BayesianVLA policy."""
    return TrainConfig(
        data=DataConfig(directory=str(dataset), batch_size=4, chunk=2, held_out_fraction=0.3, threads=1, prefetch=1),
        policy=PolicyConfig(
            vision=VisionConfig(width=8, depth=1, heads=1, hidden=8),
            trunk=TrunkConfig(width=8, depth=1, heads=1, kv_heads=1, head_width=8, hidden=8),
            expert=ExpertConfig(width=8, depth=2, heads=1, hidden=8, head=8),
            views=("front",),
            queries=2,
            chunk=2,
        ),
        loss=LossConfig(noise_draws=1, gate=True),
        optimizer=OptimizerConfig(warmup_steps=2, ema_decay=0.9),
        steps=10,
        log_every=2,
        validate_every=5,
        validation_batches=1,
        eval_every=0,
        checkpoint_every=5,
    )


CONFIG_FILE = """
import json
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(json.loads({text!r}))
"""


@pytest.fixture
def start(tmp_path):
    """Starts `python -m experiments.train` on a configuration in another process."""
    processes = []

    def start(config: TrainConfig, *arguments: str) -> subprocess.Popen:
        from vla_jax.config import to_json

        path = tmp_path / "config.py"
        path.write_text(CONFIG_FILE.format(text=to_json(config)))
        command = [sys.executable, "-m", "experiments.train", f"--config={path}", *arguments]
        # A process group of its own, so that a signal meant for it meets nothing else.
        process = subprocess.Popen(
            command, cwd=ROOT, env=dict(os.environ), text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()
