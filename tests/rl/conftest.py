"""A flow whose every chunk can be worked out by hand: two modes, and the noise decides."""

import jax.numpy as jnp
import pytest

from vla_jax.rl.frozen import Flow

GOOD = 1.0  # the first noise must be above this: 16 % of the prior's


def two_modes(weights, observation, noise):
    """Chunk +1 where the first noise is above GOOD, else -1, a little of the noise added."""
    mode = jnp.where(noise[:, :1, :1] > GOOD, 1.0, -1.0)
    return mode + 0.05 * noise


@pytest.fixture
def flow() -> Flow:
    """Observations are their own features; chunks of two actions of two numbers."""
    return Flow(lambda *a: a[1], lambda observation: observation, two_modes, lambda weights, chunk: chunk, (2, 2))
