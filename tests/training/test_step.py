"""A batch in parts: the gradient, the loss and the terms are those of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from vla_jax.errors import UserError
from vla_jax.losses.objective import LossConfig
from vla_jax.losses.term import term
from vla_jax.training.state import Beginning, abstract
from vla_jax.training.step import make_step
from vla_jax.training.train_config import TrainConfig


class Line(nnx.Module):
    """y = w x + b"""

    def __init__(self, rngs: nnx.Rngs):
        self.layer = nnx.Linear(3, 1, rngs=rngs)


def objective(model, batch, key, own):
    """Two terms that different samples carry, with noise by the place of the sample in the whole batch."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch.get("row", jnp.arange(len(batch["actions"]))))
    noise = jax.vmap(jax.random.normal)(keys)
    error = (model.layer(batch["x"])[:, 0] + noise - batch["actions"]) ** 2
    terms = {
        "fit": term(error, batch["carried"], 1.0),
        "other": term(jnp.abs(error), ~batch["carried"], -0.3),
        "logged": term(noise, batch["carried"]),
        "nothing": term(error, jnp.zeros_like(batch["carried"])),
    }
    return sum(part.weight * part.value for part in terms.values()), (terms, own)


def one_step(accumulate: int, frozen: tuple[str, ...] = ()):
    """The state after a step of plain gradient descent, and the metrics."""
    graphdef, _, _ = abstract(Line)
    optimizer = optax.sgd(1.0)
    state = Beginning(Line, optimizer, jnp.int32(0), ema=True, frozen=frozenset(frozen)).state(0)
    random = np.random.default_rng(0)
    batch = {
        "x": random.normal(size=(12, 3)).astype(np.float32),
        "actions": random.normal(size=12).astype(np.float32),
        "carried": np.arange(12) % 3 != 0,  # parts of four differ in how many they hold
    }
    batch["carried"][8:] = False
    step = make_step(graphdef, objective, optimizer, lambda count: 1.0, 0.9, accumulate=accumulate)
    return step(state, batch)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_parts_of_a_batch_are_the_whole_batch(parts):
    (whole, expected), (state, metrics) = one_step(1), one_step(parts)
    np.testing.assert_allclose(state.params["layer/kernel"], whole.params["layer/kernel"], rtol=1e-5)
    assert metrics["loss"] == pytest.approx(float(expected["loss"]), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(expected["grad_norm"]), rel=1e-5)
    for name, part in expected["terms"].items():
        np.testing.assert_allclose(metrics["terms"][name], part, rtol=1e-4, atol=1e-6, err_msg=name)
    assert expected["terms"]["nothing"].valid_fraction == 0 != expected["terms"]["fit"].value


@pytest.mark.parametrize("parts", [1, 3])
def test_frozen_parameters_stay_and_the_others_learn_as_before(parts):
    (whole, expected), (state, metrics) = one_step(parts), one_step(parts, ("layer/bias",))
    assert set(state.params) == set(state.ema) == {"layer/kernel"}
    assert state.constants["layer/bias"] == 0 != whole.params["layer/bias"]
    np.testing.assert_allclose(state.params["layer/kernel"], whole.params["layer/kernel"], rtol=1e-6)
    assert metrics["loss"] == expected["loss"]
    # Plain descent at rate 1: the bias went as far as its gradient is long.
    rest = expected["grad_norm"] ** 2 - whole.params["layer/bias"] ** 2
    assert metrics["grad_norm"] ** 2 == pytest.approx(float(rest[0]), rel=1e-5)


def test_a_gate_needs_the_whole_batch():
    with pytest.raises(UserError, match="loss.gate .* needs accumulate = 1"):
        TrainConfig(loss=LossConfig(gate=True), accumulate=2)
