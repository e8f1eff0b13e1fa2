"""AdamW with warm-up and cosine decay, a learning-rate scale for each module, clipping, and averaged weights.

Parameters are flat dictionaries {"trunk/norm/scale": array}, so a module is a regular expression on paths.
"""

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from vla_jax.errors import UserError

Params = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101).

    Attributes:
        learning_rate: the peak, reached after `warmup_steps`.
        min_learning_rate: where the cosine ends, at `decay_steps` (0: at the run's last step).
        weight_decay: of matrices only (parameters named "kernel"): no bias, norm, embedding or query decays.
        clip_norm: the largest global norm of a gradient; 0 switches clipping off.
        scales: pairs (regular expression on parameter paths, factor on the learning rate); the first match counts, what
            none matches has factor 1, and factor 0 freezes (no gradient, no moments, no average).
        ema_decay: of the averaged weights, which are evaluated; 0 keeps none.
    """

    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-5
    warmup_steps: int = 100
    decay_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    scales: tuple[tuple[str, float], ...] = ()
    ema_decay: float = 0.999

    def __post_init__(self):
        for name in ("learning_rate", "min_learning_rate", "warmup_steps", "decay_steps", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}: it must not be negative")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"optimizer.ema_decay is {self.ema_decay}: it must be at least 0 and below 1")
        for pattern, scale in self.scales:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"optimizer.scales: {pattern!r} is no regular expression: {error}") from error
            if scale < 0:
                raise UserError(f"optimizer.scales: the scale {scale} of {pattern!r} must not be negative")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: 0 -> `learning_rate` in `warmup_steps`, then half a cosine to `min_learning_rate`."""
    decay_steps = config.decay_steps or steps
    if config.warmup_steps >= decay_steps:
        raise UserError(
            f"optimizer.warmup_steps ({config.warmup_steps}) must be below the {decay_steps} steps of the schedule: "
            "lower it or train for longer"
        )
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, decay_steps, config.min_learning_rate
    )


def learning_rate_scales(config: OptimizerConfig, params: Params) -> dict[str, float]:
    """The factor on the learning rate of every parameter. Raises UserError for a pattern that matches none."""
    for pattern, _ in config.scales:
        if not any(re.search(pattern, path) for path in params):
            modules = sorted({path.split("/")[0] for path in params})
            raise UserError(f"optimizer.scales: {pattern!r} matches no parameter; modules are {', '.join(modules)}")
    return {path: next((scale for pattern, scale in config.scales if re.search(pattern, path)), 1.0) for path in params}


def frozen_parameters(config: OptimizerConfig, params: Params) -> frozenset[str]:
    """The paths of the parameters with factor 0."""
    return frozenset(path for path, scale in learning_rate_scales(config, params).items() if scale == 0)


def make_optimizer(config: OptimizerConfig, steps: int, params: Params) -> optax.GradientTransformation:
    """The optimiser of those flat parameters that are not frozen. params: all of them, or their shapes."""
    schedule = make_schedule(config, steps)
    scales = {path: scale for path, scale in learning_rate_scales(config, params).items() if scale > 0}
    if not scales:
        raise UserError("optimizer.scales freezes every parameter: leave some to train")
    decayed = {path: path.rsplit("/", 1)[-1] == "kernel" for path in scales}

    def adamw(scale: float) -> optax.GradientTransformation:
        return optax.adamw(
            lambda count: scale * schedule(count),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=lambda tree: {path: decayed[path] for path in tree},
        )

    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    by_scale = optax.partition(
        {str(scale): adamw(scale) for scale in set(scales.values())},
        {path: str(scale) for path, scale in scales.items()},
    )
    return optax.chain(clip, by_scale)


def update_average(
    average: Params, params: Params, step: Int[Array, ""], decay: float
) -> dict[str, Float[Array, "..."]]:
    """Exponential moving average of the weights after update number `step` (from 1).

    The decay is min(decay, (1 + step) / (10 + step)), so that the random first weights are forgotten quickly.
    """
    rate = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: rate * old + (1 - rate) * new, dict(average), dict(params))
