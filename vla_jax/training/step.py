"""One update: loss, gradient, optimiser, averaged weights, in one compiled program that reuses the state's memory."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from vla_jax.training.optimizer import update_average
from vla_jax.training.state import FlatArrays, TrainState, merge

# (module, batch, key, own state) -> (loss, ({name: Term(value, valid_fraction, weight)}, new own state))
Objective = Callable[[nnx.Module, dict[str, Any], Array, Any], tuple[Array, tuple[dict[str, Any], Any]]]


def make_step(
    graphdef: nnx.GraphDef,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    ema_decay: float,
) -> Callable[[TrainState, dict[str, Any]], tuple[TrainState, dict[str, Any]]]:
    """The compiled training step: (state, batch) -> (state, metrics). The given state's memory is taken over.

    Metrics: loss, grad_norm (before clipping), learning_rate (before the modules' scales), and terms {name: Term}.
    """

    def step(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def loss_of(params: FlatArrays):
            return objective(merge(graphdef, params, state.constants), batch, key, state.gate_state)

        (loss, (terms, gate_state)), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        count = state.step + 1
        new = dataclasses.replace(
            state,
            step=count,
            params=params,
            ema=update_average(state.ema, params, count, ema_decay) if state.ema else {},
            opt_state=opt_state,
            gate_state=gate_state,
        )
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradient),
            "learning_rate": jnp.asarray(schedule(state.step)),
            "terms": terms,
        }
        return new, metrics

    return jax.jit(step, donate_argnums=0)


def make_validation(
    graphdef: nnx.GraphDef, objective: Objective
) -> Callable[[TrainState, dict[str, Any], Array], dict]:
    """The compiled loss without an update: (state, batch, key) -> {"loss", "terms"}, with the averaged weights."""

    def validate(state: TrainState, batch: dict[str, Any], key: Array) -> dict[str, Any]:
        module = merge(graphdef, state.ema or state.params, state.constants)
        loss, (terms, _) = objective(module, batch, key, state.gate_state)
        return {"loss": loss, "terms": terms}

    return jax.jit(validate)
