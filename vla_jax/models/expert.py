"""The action expert: a diffusion transformer that gives the velocity of an action chunk.

BayesianVLA / LangForce (arXiv 2601.15197) takes this head from GR00T: blocks that cross-attend to the condition
alternate with blocks of self-attention, both steered by the flow time through scale and shift, without gates.

Axes: B batch, R noise draws of one sample, T query length, S key length, K key/value heads, H head width, D model
width, F proprioception width, C chunk length, A action width.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from vla_jax.errors import UserError
from vla_jax.nn.attention import Attention
from vla_jax.nn.dense import Dense
from vla_jax.nn.mlp import GeluMLP
from vla_jax.nn.norm import standardize
from vla_jax.nn.stack import Stack

BUCKETS = 1000  # flow time is rounded down to thousandths
SINUSOID = 256  # width of the sinusoid that the time embedding is made from


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """depth counts blocks, cross- and self-attention alternating, so it is even. head: width of the output layers."""

    width: int = 96
    depth: int = 4
    heads: int = 4
    hidden: int = 384
    head: int = 96
    future_tokens: int = 2
    state_token: bool = True
    dropout: float = 0.0
    scan: bool = False
    remat: str = "none"


class Condition(NamedTuple):
    """What the actions depend on: hidden states, which of them count (None: all), proprioception in model units, and
    which dimensions of an action the robot has (None: all)."""

    context: Float[Array, "B S D"]
    valid: Bool[Array, "B S"] | None
    state: Float[Array, "B F"]
    dimensions: Bool[Array, "B A"] | None = None


class Memory(NamedTuple):
    """A condition as the expert's blocks read it; the same for all noise draws and solver steps.

    keys, values: [cross-attention blocks, B, S, K, H].
    """

    keys: Float[Array, "depth B S K H"]
    values: Float[Array, "depth B S K H"]
    valid: Bool[Array, "B S"] | None
    state: Float[Array, "B 1 D"] | None
    dimensions: Bool[Array, "B A"] | None


def present(x: Float[Array, "B *R C A"], dimensions: Bool[Array, "B A"] | None) -> Float[Array, "B *R C A"]:
    """x, and 0 in the dimensions that the robot of a sample does not have; x itself for None."""
    if dimensions is None:
        return x
    return jnp.where(jnp.expand_dims(dimensions, tuple(range(1, x.ndim - 1))), x, 0.0)


class AdaptiveNorm(nnx.Module):
    """LN(x) (1 + scale) + shift, scale and shift from the time embedding; LN without parameters."""

    def __init__(self, width: int, *, dtype: str, rngs: nnx.Rngs):
        self.scale_shift = Dense(width, 2 * width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B R T D"], time: Float[Array, "B R D"]) -> Float[Array, "B R T D"]:
        scale, shift = jnp.split(self.scale_shift(jax.nn.silu(time)), 2, -1)
        y = standardize(x) * (1 + scale.astype(jnp.float32)[:, :, None]) + shift.astype(jnp.float32)[:, :, None]
        return y.astype(x.dtype)


class ExpertBlock(nnx.Module):
    """h += drop(attention(adaptive_norm(h), context)); h += drop(mlp(norm(h)))."""

    def __init__(self, config: ExpertConfig, context_width: int | None, *, dtype: str, rngs: nnx.Rngs):
        self.norm = AdaptiveNorm(config.width, dtype=dtype, rngs=rngs)
        self.attention = Attention(
            config.width,
            config.heads,
            config.width // config.heads,
            context_width=context_width,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp = GeluMLP(config.width, config.hidden, dtype=dtype, rngs=rngs)
        self.dropout = config.dropout

    def look(self, x: Float[Array, "B R T D"], time: Float[Array, "B R D"], keys, values, mask, chance):
        """The block, looking at given keys and values: the draws of a sample are looking side by side."""
        B, R, T, D = x.shape
        y = self.norm(x, time).reshape(B, R * T, D)
        return self._add(x, self.attention.look(y, keys, values, mask).reshape(x.shape), chance)

    def attend(self, x: Float[Array, "B R T D"], time: Float[Array, "B R D"], chance):
        """The block, the tokens of a draw looking at each other."""
        B, R, T, D = x.shape
        y = self.norm(x, time).reshape(B * R, T, D)
        return self._add(x, self.attention(y).reshape(x.shape), chance)

    def _add(self, x, seen, chance):
        first, second = split_each(chance, 2)
        x = x + drop(seen, self.dropout, first)
        return x + drop(self.mlp(standardize(x).astype(x.dtype)), self.dropout, second)


class ExpertPair(nnx.Module):
    """A cross-attention block followed by a self-attention block."""

    def __init__(self, config: ExpertConfig, context_width: int, *, dtype: str, rngs: nnx.Rngs):
        self.cross = ExpertBlock(config, context_width, dtype=dtype, rngs=rngs)
        self.own = ExpertBlock(config, None, dtype=dtype, rngs=rngs)

    def __call__(self, x, each, time, mask):
        keys, values, chance = each
        first, second = split_each(chance, 2)
        x = self.cross.look(x, time, keys, values, mask, first)
        return self.own.attend(x, time, second)


class ActionExpert(nnx.Module):
    """v(x_t, t | condition) for a chunk of C actions of width A, in model units.

    In dimensions that the robot of a sample does not have, it sees 0 whatever x_t holds there, and its velocity is 0.
    So noise in them tells nothing, nothing is learned there, and training and every sampler see the same.
    """

    def __init__(
        self,
        config: ExpertConfig,
        *,
        context_width: int,
        chunk: int,
        action_width: int,
        state_width: int,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        if config.depth % 2 or config.depth < 2:
            raise UserError(f"expert.depth = {config.depth} must be even: cross- and self-attention blocks alternate")
        if config.width % (2 * config.heads):
            raise UserError(f"expert.width = {config.width} is not a multiple of twice expert.heads = {config.heads}")
        D, options = config.width, dict(dtype=dtype, rngs=rngs)
        self.action_in = Dense(action_width, D, **options)
        self.action_time = Dense(2 * D, D, **options)
        self.action_out = Dense(D, D, **options)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (chunk, D)))
        self.future = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.future_tokens, D)))
        self.state_in = Dense(state_width, D, **options) if config.state_token else None
        self.state_out = Dense(D, D, **options) if config.state_token else None
        self.time_in = Dense(SINUSOID, D, **options)
        self.time_out = Dense(D, D, **options)
        self.pairs = Stack(
            lambda r: ExpertPair(config, context_width, dtype=dtype, rngs=r),
            config.depth // 2,
            scan=config.scan,
            remat=config.remat,
            rngs=rngs,
        )
        self.norm = AdaptiveNorm(D, **options)
        self.project = Dense(D, config.head, **options)
        self.head_hidden = Dense(config.head, config.head, **options)
        self.head_out = Dense(config.head, action_width, **options)
        self.dropout, self.dtype, self.chunk, self.depth = config.dropout, dtype, chunk, config.depth // 2

    def read(self, condition: Condition) -> Memory:
        """Everything that depends on the condition alone."""
        keys, values = self.pairs.map(lambda pair: pair.cross.attention.keys_values(condition.context))
        state = None
        if self.state_in is not None:
            state = self.state_out(jax.nn.relu(self.state_in(condition.state)))[:, None]
        return Memory(keys, values, condition.valid, state, condition.dimensions)

    def __call__(
        self,
        actions: Float[Array, "B R C A"],
        time: Float[Array, "B R"],
        memory: Memory,
        keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B R C A"]:
        """The velocity, float32. keys: for dropout in training, one a sample; None is none."""
        x, embedded = self.begin(actions, time, memory)
        mask = None if memory.valid is None else memory.valid[:, None, :]
        chance = None if keys is None or self.dropout == 0 else split_each(keys, self.depth)
        x = self.pairs(x, embedded, mask, each=(memory.keys, memory.values, chance))
        x = self.project(self.norm(x[:, :, -actions.shape[2] :], embedded))
        velocity = self.head_out(jax.nn.relu(self.head_hidden(x))).astype(jnp.float32)
        return present(velocity, memory.dimensions)

    def begin(
        self, actions: Float[Array, "B R C A"], time: Float[Array, "B R"], memory: Memory
    ) -> tuple[Float[Array, "B R T D"], Float[Array, "B R D"]]:
        """What the first block takes: the tokens [state | future | actions], and the embedded flow time."""
        bucket = jnp.floor(time * BUCKETS)
        embedded = self.time_out(jax.nn.silu(self.time_in(sinusoid(bucket, SINUSOID))))
        return self._tokens(present(actions, memory.dimensions), bucket, memory.state), embedded

    def _tokens(self, actions, bucket, state) -> Float[Array, "B R T D"]:
        """[state | future | actions]; each action is encoded together with the flow time: W3 swish(W2 [W1 a; tau])."""
        B, R, C, _ = actions.shape
        encoded = self.action_in(actions)
        D = encoded.shape[-1]
        tau = jnp.broadcast_to(sinusoid(bucket, D)[:, :, None], encoded.shape).astype(encoded.dtype)
        encoded = self.action_out(jax.nn.silu(self.action_time(jnp.concatenate([encoded, tau], -1))))
        encoded = encoded + self.position[...].astype(encoded.dtype)
        future = self.future[...].astype(encoded.dtype)
        parts = [jnp.broadcast_to(future, (B, R, *future.shape)), encoded]
        if state is not None:
            parts.insert(0, jnp.broadcast_to(state[:, None], (B, R, 1, D)))
        return jnp.concatenate(parts, 2)


def sinusoid(position: Float[Array, "*B"], width: int) -> Float[Array, "*B D"]:
    """sin and cos of position times frequencies from 1 down to 1 / 10 000."""
    half = width // 2
    frequency = np.exp(-np.log(10_000.0) * np.arange(half) / half).astype(np.float32)
    angle = position[..., None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


def drop(x: Float[Array, B * rest], rate: float, keys: Key[Array, " B"] | None) -> Float[Array, B * rest]:
    """Inverted dropout, each sample by its own key; nothing happens at rate 0 or without keys."""
    if rate == 0 or keys is None:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - rate), 0)


def split_each(keys: Key[Array, " B"] | None, count: int) -> Key[Array, "count B"] | tuple[None, ...]:
    """`count` new keys for each sample; Nones where there are none."""
    if keys is None:
        return (None,) * count
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)
