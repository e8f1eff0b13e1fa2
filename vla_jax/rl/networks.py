"""The small networks that learn: an ensemble of critics, and the actor that chooses a noise.

Axes: B batch, M members, F features of an observation, D numbers of one noise (of a critic: or of a chunk).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from vla_jax.nn.dense import Dense
from vla_jax.nn.flat import FlatArrays, flatten, unflatten
from vla_jax.nn.norm import LayerNorm

LOG_STD = (-5.0, 2.0)  # the range that the actor's log standard deviation is clipped to
SMALL = 1e-2  # of the actor's first outputs: it begins at the prior


class Body(nnx.Module):
    """Dense, LayerNorm, SiLU, `layers` times. The first layer reads the observation and, where there is one, a choice:
    many choices for one observation cost its (wide) part of that layer once."""

    def __init__(self, features: int, choice: int, width: int, layers: int, rngs: nnx.Rngs):
        self.observed = Dense(features, width, rngs=rngs)
        self.chosen = Dense(choice, width, bias=False, rngs=rngs) if choice else None
        self.norms = nnx.List([LayerNorm(width) for _ in range(layers)])
        self.layers = nnx.List([Dense(width, width, rngs=rngs) for _ in range(layers - 1)])

    def __call__(self, features: Float[Array, "B F"], choice: Float[Array, "B *N D"] | None = None) -> Array:
        h = self.observed(features)
        if choice is not None:
            h = h.reshape(len(h), *(1,) * (choice.ndim - 2), -1) + self.chosen(choice)
        h = jax.nn.silu(self.norms[0](h))
        for layer, norm in zip(self.layers, self.norms[1:], strict=True):
            h = jax.nn.silu(norm(layer(h)))
        return h


class Critic(nnx.Module):
    """Q(observation, choice): a noise, or an action chunk."""

    def __init__(self, features: int, choice: int, width: int, layers: int, rngs: nnx.Rngs):
        self.body = Body(features, choice, width, layers, rngs)
        self.value = Dense(width, 1, rngs=rngs)

    def __call__(self, features: Float[Array, "B F"], choice: Float[Array, "B *N D"]) -> Float[Array, " B *N"]:
        return self.value(self.body(features, choice))[..., 0]


class Critics(nnx.Module):
    """M critics with first weights of their own."""

    def __init__(self, members: int, features: int, choice: int, width: int, layers: int, rngs: nnx.Rngs):
        self.members = nnx.vmap(lambda r: Critic(features, choice, width, layers, r))(rngs.split(members))

    def __call__(self, features: Float[Array, "B F"], choice: Float[Array, "B *N D"]) -> Float[Array, "M B *N"]:
        return jax.vmap(lambda critic: critic(features, choice))(self.members)


class NoiseActor(nnx.Module):
    """pi(w | observation): bound * tanh(u), u Gaussian. It begins near the prior N(0, I), as far as the box allows."""

    def __init__(self, features: int, noise: int, width: int, layers: int, bound: float, rngs: nnx.Rngs):
        self.body = Body(features, 0, width, layers, rngs)
        self.head = Dense(width, 2 * noise, rngs=rngs)
        self.head.kernel[...] = SMALL * self.head.kernel[...]
        self.bound = bound

    def gaussian(self, features: Float[Array, "B F"]) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
        """Mean and log standard deviation of u."""
        mean, log_std = jnp.split(self.head(self.body(features)), 2, -1)
        return mean, jnp.clip(log_std, *LOG_STD)

    def __call__(
        self, features: Float[Array, "B F"], key: PRNGKeyArray
    ) -> tuple[Float[Array, "B D"], Float[Array, " B"]]:
        """A noise, and the log of its density over the box: that of u, less log |dw/du| (the bound counts)."""
        mean, log_std = self.gaussian(features)
        standard = jax.random.normal(key, mean.shape)
        u = mean + jnp.exp(log_std) * standard
        density = -0.5 * (standard**2 + jnp.log(2 * jnp.pi)) - log_std
        # log(1 - tanh(u)^2), without the loss of digits far out
        stretch = 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u)) + jnp.log(self.bound)
        return self.bound * jnp.tanh(u), (density - stretch).sum(-1)

    def mode(self, features: Float[Array, "B F"]) -> Float[Array, "B D"]:
        """The noise without chance."""
        return self.bound * jnp.tanh(self.gaussian(features)[0])


def split(module: nnx.Module) -> tuple[nnx.GraphDef, FlatArrays]:
    """(graphdef, {"body/observed/kernel": array, ...})."""
    graphdef, state = nnx.split(module)
    return graphdef, flatten(state)


def merge(graphdef: nnx.GraphDef, params: FlatArrays) -> nnx.Module:
    """The module with these arrays in it."""
    return nnx.merge(graphdef, unflatten(params))
