"""One update: loss, gradient, optimiser, averaged weights, in one compiled program that reuses the state's memory."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array

from vla_jax.losses.term import Term
from vla_jax.nn.placement import split_samples, whole
from vla_jax.training.optimizer import update_average
from vla_jax.training.state import FlatArrays, TrainState, merge

Batch = dict[str, Any]
# (module, batch, key, own state) -> (loss, ({name: Term(value, valid_fraction, weight)}, new own state)); the loss is
# the sum of weight x value over the terms, and which samples carry a term depends on the batch alone
Objective = Callable[[nnx.Module, Batch, Array, Any], tuple[Array, tuple[dict[str, Term], Any]]]


def make_step(
    graphdef: nnx.GraphDef,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    ema_decay: float,
    *,
    accumulate: int = 1,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """The compiled training step: (state, batch) -> (state, metrics). The given state's memory is taken over.

    Metrics: loss, grad_norm (before clipping), learning_rate (before the modules' scales), and terms {name: Term}.

    Args:
        accumulate: parts into which the batch is cut, one after the other, to save memory: the gradient is that of the
            whole batch (see `accumulated`).
        shardings: where the state lies; None leaves it where it is.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def loss_of(params: FlatArrays, batch: Batch, own: Any):
            return objective(merge(graphdef, params, state.constants), batch, key, own)

        if accumulate == 1:
            evaluate = jax.value_and_grad(loss_of, has_aux=True)
            (loss, (terms, gate_state)), gradient = evaluate(state.params, batch, state.gate_state)
        else:
            loss, terms, gate_state, gradient = accumulated(
                loss_of, state.params, parts_of(batch, accumulate), state.gate_state
            )
        if shardings is not None:  # summed to where the parameters lie, not to every device
            gradient = lax.with_sharding_constraint(gradient, shardings.params)
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

    return jax.jit(
        on_mesh(step, shardings),
        donate_argnums=0,
        out_shardings=None if shardings is None else (shardings, whole(shardings.step.mesh)),
    )


def parts_of(batch: Batch, count: int) -> Batch:
    """Cuts the leading axis B of every array into [count, B / count]; every part has samples of every device.

    "row" tells the objective the place of each sample in the whole batch.
    """

    def cut(array: Array) -> Array:
        return split_samples(array.reshape(-1, count, *array.shape[1:])).swapaxes(0, 1)

    if "row" not in batch and "actions" in batch:
        batch = {**batch, "row": jnp.arange(len(batch["actions"]), dtype=jnp.int32)}
    return jax.tree.map(cut, batch)


def accumulated(
    loss_of: Callable[[FlatArrays, Batch, Any], tuple[Array, tuple[dict[str, Term], Any]]],
    params: FlatArrays,
    parts: Batch,
    own: Any,
) -> tuple[Array, dict[str, Term], Any, FlatArrays]:
    """Loss, terms, the objective's own state and the gradient of a batch that comes in parts, one after the other.

    A term is a mean over the samples that carry it, and a part may hold more of them than another. So each part's
    value counts by its share of them, and the result is that of the whole batch, but for `own`, which every part
    moves, and for terms that compare neighbours.
    """

    # Of this, only the shares are used. They depend on the batch alone, so the compiler drops everything else.
    def shares_of(part: Batch) -> dict[str, Array]:
        terms = loss_of(params, part, own)[1][0]
        return {name: term.valid_fraction for name, term in terms.items()}

    shares = lax.map(shares_of, parts)
    count = len(jax.tree.leaves(parts)[0])
    carried = {name: share.mean() for name, share in shares.items()}

    def loss_of_part(params: FlatArrays, part: Batch, own: Any):
        _, (terms, own) = loss_of(params, part, own)
        scale = {name: term.valid_fraction / jnp.maximum(carried[name], 1e-9) / count for name, term in terms.items()}
        values = {name: term.value * scale[name] for name, term in terms.items()}
        weights = {name: jnp.float32(term.weight) for name, term in terms.items()}
        return sum(weights[name] * values[name] for name in values), (values, weights, own)

    def add(sums: tuple, part: Batch) -> tuple[tuple, Any]:
        gradient, own = sums
        found, (values, weights, own) = jax.grad(loss_of_part, has_aux=True)(params, part, own)
        return (jax.tree.map(jnp.add, gradient, found), own), (values, weights)

    (gradient, own), (values, weights) = lax.scan(add, (jax.tree.map(jnp.zeros_like, params), own), parts)
    terms = {name: Term(values[name].sum(), carried[name], weights[name][0]) for name in values}
    return sum(term.weight * term.value for term in terms.values()), terms, own, gradient


def make_validation(
    graphdef: nnx.GraphDef, objective: Objective, shardings: TrainState | None = None
) -> Callable[[TrainState, Batch, Array], dict]:
    """The compiled loss without an update: (state, batch, key) -> {"loss", "terms"}, with the averaged weights."""

    def validate(state: TrainState, batch: Batch, key: Array) -> dict[str, Any]:
        module = merge(graphdef, state.ema or state.params, state.constants)
        loss, (terms, _) = objective(module, batch, key, state.gate_state)
        return {"loss": loss, "terms": terms}

    places = None if shardings is None else whole(shardings.step.mesh)
    return jax.jit(on_mesh(validate, shardings), out_shardings=places)


def on_mesh(function: Callable, shardings: TrainState | None) -> Callable:
    """The function, traced with the mesh of these shardings set, so that models can say how activations are split."""
    if shardings is None:
        return function

    def call(*arguments):
        with jax.sharding.use_abstract_mesh(shardings.step.mesh.abstract_mesh):
            return function(*arguments)

    return call
