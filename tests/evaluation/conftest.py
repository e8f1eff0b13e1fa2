"""A contract for policies that are judged on the table."""

import dataclasses

import pytest

from vla_jax.data.contract import Contract
from vla_jax.data.statistics import Statistics
from vla_jax.envs.collect import interface_of
from vla_jax.envs.env import EnvConfig
from vla_jax.envs.views import LOOK


@pytest.fixture(scope="session")
def make_contract():
    """A function of facts about the data that makes the contract of a small reaching table."""
    interface = interface_of(EnvConfig(task="reach", image_size=16))
    fields = {field.name: getattr(interface, field.name) for field in dataclasses.fields(interface)}
    low, high = (-0.05,) * 6, (0.05,) * 6

    def statistics(width):
        return Statistics(9, low[:width], high[:width], low[:width], high[:width], low[:width], high[:width])

    def make(**facts):
        facts = {"task": "reach", "coupling": "background", "rho": 0.1, "objects": 3, "look": LOOK, **facts}
        data = {"dataset": "toy", "fingerprint": "0", "facts": facts}
        return Contract(**fields, **data, action_statistics=statistics(5), state_statistics=statistics(6))

    return make
