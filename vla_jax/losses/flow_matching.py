"""Chunked flow matching with several noise draws a sample.

Axes: B batch, R noise draws of one sample, C chunk length, A action width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Key

from vla_jax.flow.path import point, sample_time, squared_error, velocity

Field = Callable[[Float[Array, "B R C A"], Float[Array, "B R"]], Float[Array, "B R C A"]]
"""A velocity field under a fixed condition: (x_t, t) -> v."""


class Draw(NamedTuple):
    """Noise and flow times."""

    noise: Float[Array, "B R C A"]
    time: Float[Array, "B R"]


def draw(keys: Key[Array, " B"], shape: tuple[int, int, int]) -> Draw:
    """Noise, and times as training draws them: each sample by its own key. `shape` is (R, C, A)."""

    def one(key: Key[Array, ""]) -> Draw:
        noise_key, time_key = jax.random.split(key)
        return Draw(jax.random.normal(noise_key, shape), sample_time(time_key, shape[:1]))

    return jax.vmap(one)(keys)


def draw_errors(
    field: Field, actions: Float[Array, "B C A"], action_mask: Bool[Array, "B C A"], draws: Draw
) -> Float[Array, "B R"]:
    """|field(x_t, t) - (actions - noise)|^2 of every draw: the mean over what `action_mask` lets count, which is also
    the sample's weight (see `flow.path.squared_error`)."""
    data = actions[:, None]
    predicted = field(point(draws.noise, data, draws.time), draws.time)
    return squared_error(predicted, velocity(draws.noise, data), action_mask[:, None])


def flow_matching(
    field: Field, actions: Float[Array, "B C A"], action_mask: Bool[Array, "B C A"], draws: Draw
) -> Float[Array, " B"]:
    """BayesianVLA (arXiv 2601.15197), Eq. 8, for each sample: the mean of its draws' errors. Actions in model units."""
    return draw_errors(field, actions, action_mask, draws).mean(1)
