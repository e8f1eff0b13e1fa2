"""A tiny untrained policy for the table, and its contract."""

import dataclasses

import jax
import pytest
from flax import nnx

from vla_jax.data.contract import Contract
from vla_jax.data.statistics import Statistics
from vla_jax.envs.collect import interface_of
from vla_jax.envs.env import EnvConfig
from vla_jax.envs.views import LOOK
from vla_jax.models.expert import ExpertConfig
from vla_jax.models.keypoints import KeypointConfig
from vla_jax.models.policy import Policy, PolicyConfig
from vla_jax.models.trunk import TrunkConfig
from vla_jax.training.checkpoints import policy_facts

POLICY = PolicyConfig(
    encoder="keypoints",
    keypoints=KeypointConfig(points=4),
    trunk=TrunkConfig(width=16, depth=1, heads=1, kv_heads=1, head_width=16, hidden=16),
    expert=ExpertConfig(width=16, depth=2, heads=1, hidden=16, head=16),
    views=("front",),
    queries=2,
    chunk=4,
)


@pytest.fixture(scope="session")
def contract():
    interface = interface_of(EnvConfig(task="reach", image_size=16))
    fields = {field.name: getattr(interface, field.name) for field in dataclasses.fields(interface)}

    def statistics(low, high):
        return Statistics(9, low, high, low, high, low, high)

    move, place = ((-0.05,) * 4 + (0.0,), (0.05,) * 4 + (0.08,)), ((-0.5,) * 6, (0.5,) * 6)
    facts = {"task": "reach", "coupling": "uniqueness", "rho": 0.1, "objects": 3, "look": LOOK}
    data = {"dataset": "toy", "fingerprint": "0", "facts": facts}
    return Contract(**fields, **data, action_statistics=statistics(*move), state_statistics=statistics(*place))


@pytest.fixture(scope="session")
def policy(contract):
    graph = nnx.split(nnx.eval_shape(lambda: Policy(POLICY, policy_facts(contract), nnx.Rngs(0))))[0]
    make = jax.jit(lambda: nnx.split(Policy(POLICY, policy_facts(contract), nnx.Rngs(0)))[1])
    return nnx.merge(graph, make())
