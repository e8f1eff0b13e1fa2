"""A policy small enough to compile in a second, and one scene for it."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from vla_jax.models.expert import ExpertConfig
from vla_jax.models.normalizer import DataFacts
from vla_jax.models.policy import Policy, PolicyConfig
from vla_jax.models.trunk import TrunkConfig
from vla_jax.models.vision import VisionConfig

FACTS = DataFacts(
    vocabulary=5,
    max_tokens=4,
    image_size=16,
    action_low=(-0.1, -0.2, 0.0),
    action_high=(0.1, 0.3, 0.5),
    state_low=(-1.0, 0.0),
    state_high=(1.0, 4.0),
)
CONFIG = dict(
    vision=VisionConfig(patch=4, merge=2, width=8, depth=1, heads=2, hidden=16),
    trunk=TrunkConfig(width=16, depth=2, heads=4, kv_heads=2, head_width=8, hidden=24),
    expert=ExpertConfig(width=16, depth=4, heads=2, hidden=24, head=16),
    queries=3,
    chunk=4,
)


@pytest.fixture(scope="session")
def make_policy():
    @functools.cache
    def make(conditioning="queries", reasoning=0):
        config = PolicyConfig(conditioning=conditioning, reasoning=reasoning, **CONFIG)
        return jax.jit(lambda: Policy(config, FACTS, nnx.Rngs(0)))()

    return make


@pytest.fixture(scope="session")
def observation():
    random = np.random.default_rng(0)
    return {
        "images": {view: random.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8) for view in ("front", "wrist")},
        "state": random.uniform(-1, 1, (1, 2)).astype(np.float32),
    }
