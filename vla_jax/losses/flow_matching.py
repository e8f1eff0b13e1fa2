"""Chunked flow matching with several noise draws a sample.

Axes: B batch, R noise draws of one sample, C chunk length, A action width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vla_jax.flow.path import point, sample_time, squared_error, velocity
from vla_jax.models.expert import Condition
from vla_jax.models.policy import Policy


class Draw(NamedTuple):
    """Noise and flow times."""

    noise: Float[Array, "B R C A"]
    time: Float[Array, "B R"]


def draw(key: PRNGKeyArray, shape: tuple[int, int, int, int]) -> Draw:
    """`shape` is (B, R, C, A)."""
    noise_key, time_key = jax.random.split(key)
    return Draw(jax.random.normal(noise_key, shape), sample_time(time_key, shape[:2]))


def flow_matching(
    policy: Policy, condition: Condition, actions: Float[Array, "B C A"], action_mask: Bool[Array, "B C"], draws: Draw,
    key: PRNGKeyArray | None = None,
) -> Float[Array, " B"]:
    """E |v(x_t, t | condition) - (actions - noise)|^2 for each sample: mean over draws, valid actions and dimensions.

    BayesianVLA (arXiv 2601.15197), Eq. 8. actions in model units; key is for dropout.
    """
    data = actions[:, None]
    predicted = policy.velocity(point(draws.noise, data, draws.time), draws.time, condition, key)
    return squared_error(predicted, velocity(draws.noise, data), action_mask[:, None]).mean(1)
