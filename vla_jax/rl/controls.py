"""What latent-noise RL has to beat: a fixed noise, and more behaviour cloning on the policy's own successes.

Axes: B batch, N capacity of the replay, C chunk length, A action width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from vla_jax.losses.flow_matching import draw, flow_matching
from vla_jax.nn.flat import FlatArrays
from vla_jax.rl.agent import AgentConfig
from vla_jax.rl.frozen import Fixed, Flow, Prior
from vla_jax.rl.networks import merge
from vla_jax.rl.replay import Replay

TUNED = "expert/"  # the part of the policy that is cloned further: the one that makes actions of a condition
DRAWS = 2  # noises and flow times of each chunk


class FixedNoise:
    """One noise, drawn from the prior once, for every chunk. Learns nothing."""

    def __init__(self, config: AgentConfig, flow: Flow):
        self.width = flow.noise_width(config.repeat)

    def init(self, key: PRNGKeyArray, weights: Any = None) -> Float[Array, " D"]:
        """The noise."""
        return jax.random.normal(key, (self.width,))

    def source(self, state: Float[Array, " D"], greedy: bool = False) -> nnx.Module:
        """What chooses the noise."""
        return Fixed(state)

    def weights(self, state: Float[Array, " D"], weights: Any) -> Any:
        """The policy's weights: frozen."""
        return weights

    def update(self, state, weights: Any, replay: Replay, key: PRNGKeyArray, updates: int):
        """Nothing."""
        return state, {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CloningState:
    """The action expert as it is by now, and its optimiser."""

    expert: FlatArrays
    optimizer: Any


class Cloning:
    """Flow matching of the action expert on the chunks of the policy's own successful episodes.

    It collects them itself, with the prior's noise. The trunk stays as it is, as it does under the other agents; this
    one changes a copy of the expert's weights.
    """

    def __init__(self, config: AgentConfig, flow: Flow, graphdef: nnx.GraphDef):
        """graphdef: of the policy."""
        self.config, self.flow, self.graphdef = config, flow, graphdef
        self.width = flow.noise_width(config.repeat)
        self._optimizer = optax.adam(config.learning_rate)

    def init(self, key: PRNGKeyArray, weights: FlatArrays) -> CloningState:
        """The expert as it was trained."""
        expert = {path: jnp.copy(leaf) for path, leaf in weights.items() if path.startswith(TUNED)}
        return CloningState(expert, self._optimizer.init(expert))

    def source(self, state: CloningState, greedy: bool = False) -> nnx.Module:
        """The prior."""
        return Prior(self.width)

    def weights(self, state: CloningState, weights: FlatArrays) -> FlatArrays:
        """The policy's weights, the expert's from the state."""
        return {**weights, **state.expert}

    def update(self, state: CloningState, weights: FlatArrays, replay: Replay, key: PRNGKeyArray, updates: int):
        """Steps of gradient descent on chunks drawn evenly from successful episodes; none while there are none."""
        edges = jnp.cumsum(replay.succeeded())

        def step(state, key):
            rows_key, draw_key = jax.random.split(key)
            wanted = jax.random.randint(rows_key, (self.config.batch_size,), 0, jnp.maximum(edges[-1], 1))
            batch = replay.take(jnp.searchsorted(edges, wanted, side="right"))
            loss, gradients = jax.value_and_grad(self._loss)(state.expert, weights, batch, draw_key)
            changes, optimizer = self._optimizer.update(gradients, state.optimizer, state.expert)
            moved = CloningState(optax.apply_updates(state.expert, changes), optimizer)
            return jax.tree.map(lambda new, old: jnp.where(edges[-1] > 0, new, old), moved, state), loss

        state, losses = jax.lax.scan(step, state, jax.random.split(key, updates))
        return state, {"cloning_loss": jnp.where(edges[-1] > 0, losses.mean(), 0.0), "chunks": edges[-1] * 1.0}

    def _loss(self, expert: FlatArrays, weights: FlatArrays, batch, key) -> Float[Array, ""]:
        policy, condition = merge(self.graphdef, {**weights, **expert}), batch.observation["posterior"]
        B, C, A = batch.chunk.shape
        everything = jnp.ones((B, C, A), bool)
        errors = flow_matching(
            lambda x, t: policy.velocity(x, t, condition),
            batch.chunk,
            everything,
            draw(jax.random.split(key, B), (DRAWS, C, A)),
        )
        return errors.mean()
