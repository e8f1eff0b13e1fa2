"""Everything that a training step changes, as one pytree, and its way in and out of an `nnx` module."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int, UInt32

from vla_jax.nn.flat import FlatArrays, flatten, unflatten


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """One training run between two steps. Parameters are flat: {"trunk/norm/scale": array}."""

    step: Int[Array, ""]  # updates done
    params: FlatArrays  # what is trained
    constants: FlatArrays  # every other variable of the module, frozen parameters among them
    ema: FlatArrays  # averaged params; {} where none are kept
    opt_state: Any
    gate_state: Any  # the objective's own state
    key: UInt32[Array, "2"]  # data of the run's random key; a step uses fold_in(key, step)

    @property
    def weights(self) -> FlatArrays:
        """Every variable of the module, trained or not."""
        return {**self.params, **self.constants}


def merge(graphdef: nnx.GraphDef, params: FlatArrays, constants: FlatArrays) -> nnx.Module:
    """The module with these arrays in it."""
    return nnx.merge(graphdef, unflatten({**params, **constants}))


def freeze(params: FlatArrays, constants: FlatArrays, frozen: Collection[str]) -> tuple[FlatArrays, FlatArrays]:
    """(params, constants), where the parameters whose paths are in `frozen` count as constants."""
    still = {path: leaf for path, leaf in params.items() if path in frozen}
    return {path: leaf for path, leaf in params.items() if path not in frozen}, {**constants, **still}


def abstract(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, FlatArrays, FlatArrays]:
    """(graphdef, params, constants) of the module that `make` builds, as shapes only: nothing is computed."""
    graphdef, params, constants = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)
    return graphdef, flatten(params), flatten(constants)


@dataclasses.dataclass(frozen=True, eq=False)
class Beginning:
    """How a run begins: its first state, as a function of its seed and of the parameters that are not random.

    make: builds the module. gate_state: the objective's own state. ema: keep averaged weights. frozen: paths of the
    parameters that are not trained.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    optimizer: optax.GradientTransformation
    gate_state: Any
    ema: bool
    frozen: frozenset[str] = frozenset()

    def __call__(self, key: Array, given: FlatArrays) -> TrainState:
        weights_key, run_key = jax.random.split(key)
        _, params, constants = nnx.split(self.make(nnx.Rngs(weights_key)), nnx.Param, ...)
        params = flatten(params) | {path: leaf.astype(jnp.float32) for path, leaf in given.items()}
        params, constants = freeze(params, flatten(constants), self.frozen)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            constants=constants,
            ema=jax.tree.map(jnp.copy, params) if self.ema else {},
            opt_state=self.optimizer.init(params),
            gate_state=self.gate_state,
            key=jax.random.key_data(run_key),
        )

    def shapes(self) -> TrainState:
        """The state as shapes: nothing is computed."""
        return jax.eval_shape(self, jax.random.key(0), {})

    def state(self, seed: int, given: FlatArrays | None = None, shardings: TrainState | None = None) -> TrainState:
        """The state before the first step, computed in one compiled program, each part of it where it will lie.

        given: parameters that are not random. shardings: None is the first device.
        """
        return jax.jit(self, out_shardings=shardings)(jax.random.key(seed), given or {})


def trained_module(graphdef: nnx.GraphDef, state: TrainState) -> nnx.Module:
    """The module with the state's weights: the averaged ones where they are kept.

    It shares the state's arrays, which the next training step takes over: use it before that, and keep nothing of it.
    """
    return merge(graphdef, state.ema or state.params, state.constants)
