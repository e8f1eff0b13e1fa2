"""A small synthetic dataset that the data tests share."""

import cv2
import numpy as np
import pytest

from vla_jax.data import tokenizer as tokenizers
from vla_jax.data.contract import compute_contract
from vla_jax.data.episode import Episode
from vla_jax.data.interface import Interface
from vla_jax.data.rlds import write_rlds

INSTRUCTIONS = ("reach the red cube", "touch the blue ball", "go to the green cylinder and touch it")
SIZE = (32, 24)  # height and width differ, so that a transposed picture is noticed
LENGTHS = (3, 9)


def make_interface(**changes) -> Interface:
    fields = dict(
        embodiment="floating",
        control_hz=10.0,
        images={"front": SIZE, "wrist": SIZE},
        action_names=("dx", "dyaw", "opening"),
        action_units=("m", "rad", "m"),
        action_representation="delta",
        state_names=("x", "cos_yaw"),
        state_units=("m", "1"),
        max_tokens=10,
        tokenizer=tokenizers.to_json(tokenizers.train_tokenizer(INSTRUCTIONS)),
    )
    return Interface(**(fields | changes))


def make_episode(number: int, length: int | None = None) -> Episode:
    random = np.random.default_rng(number)
    length = length or int(random.integers(*LENGTHS))

    def picture():
        coarse = random.integers(0, 256, (4, 3, 3), dtype=np.uint8)
        return cv2.resize(coarse, SIZE[::-1], interpolation=cv2.INTER_CUBIC)

    actions = random.normal(scale=0.02, size=(length, 3)).astype(np.float32)
    actions[:, 2] = 0.08
    return Episode(
        images={view: np.stack([picture() for _ in range(length)]) for view in ("front", "wrist")},
        state=random.normal(size=(length, 2)).astype(np.float32),
        actions=actions,
        instruction=INSTRUCTIONS[number % 3],
        success=number % 2 == 0,
        metadata={"seed": number, "task": "reach", "weight": 0.5, "rare": number == 3},
    )


FACTS = {"task": "reach", "coupling": "background", "rho": 0.1, "entropy": 1.25}
EPISODES = 40


@pytest.fixture(scope="session")
def episodes():
    return [make_episode(number) for number in range(EPISODES)]


@pytest.fixture(scope="session")
def dataset_path(tmp_path_factory, episodes):
    directory = tmp_path_factory.mktemp("rlds")
    return write_rlds(directory, "synthetic", iter(episodes), make_interface(), FACTS, episodes_per_shard=16)


@pytest.fixture(scope="session")
def contract(dataset_path):
    return compute_contract(dataset_path)


@pytest.fixture
def interface():
    return make_interface


@pytest.fixture
def episode():
    return make_episode
