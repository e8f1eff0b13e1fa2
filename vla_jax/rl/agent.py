"""Latent-noise reinforcement learning: DSRL-SAC and DSRL-NA (arXiv 2506.15799), and a search without an actor.

The action of the learner is the noise w that a frozen policy starts from; one step of its time is one chunk. Agents are
pure functions over an `AgentState`; `rl.loop` calls `update` inside the compiled loop, `source` gives what acts.

Axes: B batch, M critics, F features, D numbers of one noise, N candidates, U updates.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from vla_jax.errors import UserError
from vla_jax.nn.flat import FlatArrays
from vla_jax.rl.frozen import Acted, BestOf, Flow
from vla_jax.rl.networks import Critics, NoiseActor, merge, split
from vla_jax.rl.replay import Replay, Transition


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """How the noise is learned.

    Attributes:
        repeat: one action's noise, repeated over the chunk, as for pi0 in the released code. Many policies break under
            it: judge the policy with it before.
        bound: b; the actor's noise lies in [-b, b]. N(0, 1) leaves [-1.5, 1.5] one time in seven.
        discount: of the next value, once a chunk (not once a control step).
        summary: what the networks see of an observation, see `frozen.summarize`.
        width, layers, critics: of the networks; the least of the critics counts.
        learning_rate, batch_size, polyak: Adam's, transitions an update, share of the new in the target critics.
        temperature, tune: weight of the actor's entropy at first, and whether it is moved towards
        target_entropy: nats a number of the noise (0: a Gaussian of standard deviation 0.24).
        backup_entropy: entropy in the value of what comes next, as in the paper's equations. With success as the end of
            an episode it pays to fail slowly, since every further chunk earns entropy; off by default.
        candidates: N of the search without an actor.
    """

    repeat: bool = False
    bound: float = 1.5
    discount: float = 0.95
    summary: str = "flat"
    width: int = 128
    layers: int = 2
    critics: int = 2
    learning_rate: float = 1e-3
    batch_size: int = 256
    polyak: float = 0.01
    temperature: float = 0.1
    tune: bool = True
    target_entropy: float = 0.0
    backup_entropy: bool = False
    candidates: int = 16

    def __post_init__(self):
        for name in ("width", "layers", "critics", "batch_size", "candidates"):
            if getattr(self, name) < 1:
                raise UserError(f"agent.{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("bound", "learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"agent.{name} is {getattr(self, name)}: it must be above 0")
        for name in ("discount", "polyak"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"agent.{name} is {getattr(self, name)}: it must be above 0 and at most 1")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AgentState:
    """What an agent has learned. Networks are flat dictionaries of arrays."""

    params: dict[str, FlatArrays]  # "critic", and where there are any "actor", "noise_critic", "temperature"
    target: FlatArrays  # slow copy of the critic
    optimizer: Any


class Agent(ABC):
    """What the three have in common: critics learned by temporal differences, in batches from the replay."""

    def __init__(self, config: AgentConfig, flow: Flow, features: int):
        """features: F, numbers of `flow.features`."""
        self.config, self.flow, self.features = config, flow, features
        self.width = flow.noise_width(config.repeat)
        self._optimizer = optax.adam(config.learning_rate)
        self._graphs = {}

    @property
    def choice_width(self) -> int:
        """Numbers of what the critic judges: a noise."""
        return self.width

    def init(self, key: PRNGKeyArray, weights: Any = None) -> AgentState:
        """The state before the first update."""
        params = {}
        for number, (name, module) in enumerate(self.modules().items()):
            self._graphs[name], params[name] = split(module(nnx.Rngs(jax.random.fold_in(key, number))))
        params |= self.scalars()
        target = jax.tree.map(jnp.copy, params["critic"])
        return AgentState(params, target, self._optimizer.init(params))

    def modules(self) -> dict[str, Any]:
        """The networks, as functions of `nnx.Rngs`."""
        return {"critic": self._critics(self.choice_width)}

    def scalars(self) -> dict[str, FlatArrays]:
        """What is learned beside networks."""
        return {}

    def _critics(self, choice: int):
        config = self.config
        sizes = config.critics, self.features, choice, config.width, config.layers
        return lambda rngs: Critics(*sizes, rngs)

    def network(self, name: str, params: FlatArrays) -> nnx.Module:
        """A network with these parameters."""
        return merge(self._graphs[name], params)

    @abstractmethod
    def source(self, state: AgentState, greedy: bool = False) -> nnx.Module:
        """What chooses the noise."""

    def weights(self, state: AgentState, weights: Any) -> Any:
        """The policy's weights: frozen."""
        return weights

    @abstractmethod
    def loss(
        self, params: dict[str, FlatArrays], target: FlatArrays, weights: Any, batch: Transition, key: PRNGKeyArray
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The sum of all losses, each of which reaches the network that it is for, and what is logged."""

    def update(
        self, state: AgentState, weights: Any, replay: Replay, key: PRNGKeyArray, updates: int
    ) -> tuple[AgentState, dict[str, Float[Array, ""]]]:
        """U steps of gradient descent on batches from the replay; also the means of what is logged."""

        def step(state, key):
            rows, noise = jax.random.split(key)
            batch = replay.sample(rows, self.config.batch_size)
            return self.step(state, weights, batch, noise)

        state, logs = jax.lax.scan(step, state, jax.random.split(key, updates))
        return state, jax.tree.map(jnp.mean, logs)

    def step(
        self, state: AgentState, weights: Any, batch: Transition, key: PRNGKeyArray
    ) -> tuple[AgentState, dict[str, Float[Array, ""]]]:
        """One update on one batch. All networks move at once, by gradients at where they were."""
        gradients, logs = jax.grad(self.loss, has_aux=True)(state.params, state.target, weights, batch, key)
        changes, optimizer = self._optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, changes)
        target = jax.tree.map(lambda old, new: old + self.config.polyak * (new - old), state.target, params["critic"])
        return AgentState(params, target, optimizer), logs


def td_target(
    reward: Float[Array, " B"], discount: Float[Array, " B"], next_values: Float[Array, "M B"]
) -> Float[Array, " B"]:
    """y = r + discount * min over critics of the next value. `discount` holds the whole rule of ends (`rl.collect`): 0
    after success, and the discount of one chunk otherwise, the time limit included."""
    return jax.lax.stop_gradient(reward + discount * next_values.min(0))


def td_loss(values: Float[Array, "M B"], target: Float[Array, "*M B"]) -> Float[Array, ""]:
    """Half the squared error, mean over the batch, sum over the critics. target: for all of them, or each its own."""
    return 0.5 * jnp.square(values - target).mean(-1).sum()


class Sac(Agent):
    """DSRL-SAC: soft actor-critic whose action is the noise.

    y = r + gamma min Q'(s', w'),  w' ~ pi(s');  pi maximises  min Q(s, w) - alpha log pi(w | s).
    """

    def modules(self) -> dict[str, Any]:
        config = self.config
        sizes = self.features, self.width, config.width, config.layers, config.bound
        return {**super().modules(), "actor": lambda rngs: NoiseActor(*sizes, rngs)}

    def scalars(self) -> dict[str, FlatArrays]:
        return {"temperature": {"log": jnp.log(jnp.float32(self.config.temperature))}}

    def source(self, state: AgentState, greedy: bool = False) -> nnx.Module:
        return Acted(self.network("actor", state.params["actor"]), greedy)

    def loss(self, params, target, weights, batch, key):
        next_key, now_key = jax.random.split(key)
        value, logs = self._critic_loss(params, target, weights, batch, next_key)
        actor_value, actor_logs, _ = self._actor_loss(params, "critic", batch, now_key)
        return value + actor_value, {**logs, **actor_logs}

    def judged(self, weights: Any, observation: Any, noise: Float[Array, "B D"]) -> Float[Array, "B _"]:
        """What the critic is asked about, for a noise: the noise itself."""
        return noise

    def executed(self, batch: Transition) -> Float[Array, "B _"]:
        """What the critic is asked about, for what was done."""
        return batch.noise

    def _critic_loss(self, params, target, weights, batch, key):
        features, after = self.flow.features(batch.observation), self.flow.features(batch.next_observation)
        noise, log_density = self.network("actor", params["actor"])(after, key)
        choice = self.judged(weights, batch.next_observation, noise)
        next_values = self.network("critic", target)(after, choice)
        if self.config.backup_entropy:
            next_values = next_values - jnp.exp(params["temperature"]["log"]) * log_density
        y = td_target(batch.reward, batch.discount, next_values)
        values = self.network("critic", params["critic"])(features, self.executed(batch))
        loss = td_loss(values, y)
        return loss, {"critic_loss": loss, "value": values.mean(), "td_target": y.mean()}

    def _actor_loss(self, params, critic: str, batch, key):
        """The actor's and the temperature's losses, by the critics over noises called `critic`; and the noise drawn."""
        features = self.flow.features(batch.observation)
        noise, log_density = self.network("actor", params["actor"])(features, key)
        still = jax.lax.stop_gradient
        alpha = jnp.exp(params["temperature"]["log"])
        values = self.network(critic, still(params[critic]))(features, noise).min(0)
        loss = (still(alpha) * log_density - values).mean()
        entropy = -still(log_density).mean()
        if self.config.tune:
            loss = loss + params["temperature"]["log"] * (entropy - self.config.target_entropy * self.width)
        logs = {"entropy": entropy / self.width, "temperature": alpha, "actor_value": values.mean()}
        return loss, logs, still(noise)


class NoiseAliased(Sac):
    """DSRL-NA: the critic judges action chunks, one for noises is distilled from it, and the actor follows that.

    y = r + gamma min Q'(s', a(s', w'));  Q_w(s, w) -> Q(s, a(s, w));  pi maximises  min Q_w(s, w) - alpha log pi.
    Many noises make the same chunk: one transition teaches about all of them. Half of the noises of the distillation
    are the prior's, cut to the box, half are the actor's own, so that Q_w is right where it is maximised.
    """

    @property
    def choice_width(self) -> int:
        return self.flow.shape[0] * self.flow.shape[1]

    def modules(self) -> dict[str, Any]:
        return {**super().modules(), "noise_critic": self._critics(self.width)}

    def judged(self, weights, observation, noise):
        """The chunk that the policy makes of the noise."""
        chunk = self.flow.decode(weights, observation, self.flow.spread(noise))
        return jax.lax.stop_gradient(chunk.reshape(len(chunk), -1))

    def executed(self, batch):
        return batch.chunk.reshape(len(batch.chunk), -1)

    def loss(self, params, target, weights, batch, key):
        next_key, now_key, prior_key = jax.random.split(key, 3)
        value, logs = self._critic_loss(params, target, weights, batch, next_key)
        actor_value, actor_logs, noise = self._actor_loss(params, "noise_critic", batch, now_key)
        bound = self.config.bound
        prior = jnp.clip(jax.random.normal(prior_key, noise.shape), -bound, bound)
        from_prior = jnp.arange(len(noise)) < len(noise) // 2
        distilled = self.distillation(params, weights, batch, jnp.where(from_prior[:, None], prior, noise))
        logs = {**logs, **actor_logs, "distillation_loss": distilled}
        return value + actor_value + distilled, logs

    def distillation(self, params, weights, batch, noise: Float[Array, "B D"]) -> Float[Array, ""]:
        """Half the squared error of Q_w(s, w) against Q(s, a(s, w)), critic by critic."""
        features = self.flow.features(batch.observation)
        chunk = self.judged(weights, batch.observation, noise)
        wanted = jax.lax.stop_gradient(self.network("critic", params["critic"])(features, chunk))
        values = self.network("noise_critic", params["noise_critic"])(features, noise)
        return td_loss(values, wanted)


class Search(Agent):
    """Best of N by the critic: noises are drawn from the prior and the critic chooses among them; there is no actor.

    y = r + gamma min Q'(s', w*),  w* the best of N draws by the present critic.
    """

    def source(self, state: AgentState, greedy: bool = False) -> nnx.Module:
        return self._search(state.params["critic"])

    def _search(self, critic: FlatArrays) -> BestOf:
        return BestOf(self.network("critic", critic), self.config.candidates, self.width)

    def loss(self, params, target, weights, batch, key):
        features, after = self.flow.features(batch.observation), self.flow.features(batch.next_observation)
        noise = self._search(jax.lax.stop_gradient(params["critic"]))(after, key)
        y = td_target(batch.reward, batch.discount, self.network("critic", target)(after, noise))
        values = self.network("critic", params["critic"])(features, batch.noise)
        loss = td_loss(values, y)
        return loss, {"critic_loss": loss, "value": values.mean(), "td_target": y.mean()}
