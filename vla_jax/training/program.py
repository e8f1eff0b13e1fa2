"""What a run compiles, from its settings alone: no data is read, and nothing is computed before it is asked for.

Training runs it (`training.trainer`), planning only compiles it (`training.plan`): they cannot differ.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vla_jax.losses.llr import initial_gate
from vla_jax.losses.objective import objective
from vla_jax.models.normalizer import DataFacts
from vla_jax.models.policy import Policy
from vla_jax.nn.flat import FlatArrays
from vla_jax.nn.placement import batch_sharding
from vla_jax.training.augment import augmented
from vla_jax.training.mesh import check_batch_size, state_shardings, with_shardings
from vla_jax.training.optimizer import frozen_parameters, make_optimizer, make_schedule
from vla_jax.training.state import Beginning, TrainState, abstract
from vla_jax.training.step import Objective, make_step, make_validation
from vla_jax.training.train_config import TrainConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """graphdef: of the policy. beginning: makes the first state. shapes: the state as shapes, each with its place."""

    graphdef: nnx.GraphDef
    beginning: Beginning
    shapes: TrainState
    loss: Objective
    step: Callable[[TrainState, dict[str, Any]], tuple[TrainState, dict[str, Any]]]
    validate: Callable[[TrainState, dict[str, Any], Any], dict[str, Any]]

    @property
    def shardings(self) -> TrainState:
        """Where the state lies."""
        return jax.tree.map(lambda shape: shape.sharding, self.shapes)

    def first_state(self, seed: int, given: FlatArrays | None = None) -> TrainState:
        """The state before the first step. given: parameters that are not random."""
        return self.beginning.state(seed, given, self.shardings)


def make_program(config: TrainConfig, facts: DataFacts, mesh: Mesh) -> Program:
    """The program of a run on a mesh; the mesh's devices need not be there.

    Raises:
        UserError: settings that do not fit one another, or a batch that the mesh cannot divide.
    """
    for name, size in (
        ("data.batch_size", config.data.batch_size * config.loss.demonstrations),
        ("questions.batch_size", config.questions.batch_size),
    ):
        check_batch_size(name, size, mesh, config.accumulate)
    make = functools.partial(_policy, config, facts)
    graphdef, params, _ = abstract(make)
    optimizer = make_optimizer(config.optimizer, config.steps, params)
    frozen = frozen_parameters(config.optimizer, params)
    beginning = Beginning(make, optimizer, initial_gate(), ema=config.optimizer.ema_decay > 0, frozen=frozen)
    shapes = beginning.shapes()
    shardings = state_shardings(shapes, mesh)
    loss = functools.partial(_objective, config=config.loss)
    step = make_step(
        graphdef,
        augmented(loss, config.augment),
        optimizer,
        make_schedule(config.optimizer, config.steps),
        config.optimizer.ema_decay,
        accumulate=config.accumulate,
        shardings=shardings,
    )
    validate = make_validation(graphdef, loss, shardings)
    return Program(graphdef, beginning, with_shardings(shapes, shardings), loss, step, validate)


def batch_shapes(config: TrainConfig, facts: DataFacts, mesh: Mesh | None = None, share: int = 1) -> dict[str, Any]:
    """The shapes of a batch, each with its place where there is a mesh. share: of a batch that is cut in so many."""
    place = None if mesh is None else batch_sharding(mesh)

    def shapes(size: int, parts: dict[str, tuple[tuple[int, ...], type]]) -> dict[str, Any]:
        rows = size // share
        return {
            name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=place) for name, (shape, dtype) in parts.items()
        }

    def seen(size: int) -> dict[str, Any]:
        words = ((facts.max_tokens,), np.int32), ((facts.max_tokens,), np.bool_)
        picture = ((facts.image_size, facts.image_size, 3), np.uint8)
        images = shapes(size, dict.fromkeys(config.policy.views, picture))
        return {"images": images, **shapes(size, dict(zip(("tokens", "token_mask"), words, strict=True)))}

    batch: dict[str, Any] = {}
    if config.loss.demonstrations:
        chunk, size = (config.policy.chunk, len(facts.action_low)), config.data.batch_size
        parts = {
            "state": ((len(facts.state_low),), np.float32),
            "actions": (chunk, np.float32),
            "action_mask": (chunk, np.bool_),
            "row": ((), np.int32),
        }
        batch = {**seen(size), **shapes(size, parts)}
    if size := config.questions.batch_size:
        batch["questions"] = {**seen(size), **shapes(size, {"answer_mask": ((facts.max_tokens,), np.bool_)})}
    return batch


def _policy(config: TrainConfig, facts: DataFacts, rngs: nnx.Rngs) -> Policy:
    return Policy(config.policy, facts, rngs)


def _objective(policy, batch, key, gate_state, *, config):
    return objective(policy, batch, key, config, gate_state)
