"""The schedule, the modules' scales, decay, clipping and averaging do what they say, by numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vla_jax.errors import UserError
from vla_jax.training.optimizer import (
    OptimizerConfig,
    frozen_parameters,
    make_optimizer,
    make_schedule,
    update_average,
)
from vla_jax.training.state import freeze

PARAMS = {
    "vision/patch/kernel": jnp.full((2, 2), 2.0),
    "vision/patch/bias": jnp.full((2,), 2.0),
    "trunk/norm/scale": jnp.full((2,), 2.0),
    "trunk/mlp/kernel": jnp.full((3, 2, 2), 2.0),
    "words": jnp.full((4, 2), 2.0),
}


def updates(config: OptimizerConfig, gradient: float, steps: int = 1):
    """Every parameter's total change after `steps` equal gradients."""
    optimizer = make_optimizer(config, 100, PARAMS)
    first, _ = freeze(PARAMS, {}, frozen_parameters(config, PARAMS))
    params, state = first, optimizer.init(first)
    for _ in range(steps):
        change, state = optimizer.update(jax.tree.map(lambda p: jnp.full_like(p, gradient), params), state, params)
        params = optax.apply_updates(params, change)
    return {path: np.asarray(params[path] - first[path]).ravel()[0] for path in params}


def test_schedule_warms_up_and_ends_at_the_minimum():
    rate = make_schedule(OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10), steps=110)
    assert [float(rate(step)) for step in (0, 5, 10)] == pytest.approx([0.0, 0.5, 1.0])
    assert float(rate(60)) == pytest.approx(0.55)  # half way down the cosine
    assert [float(rate(step)) for step in (110, 500)] == pytest.approx([0.1, 0.1])
    with pytest.raises(UserError, match="warmup_steps .10. must be below the 10 steps"):
        make_schedule(OptimizerConfig(warmup_steps=10), steps=10)


def test_scales_change_the_learning_rate_of_modules_only():
    base = dict(learning_rate=0.1, warmup_steps=0, weight_decay=0.0, clip_norm=0.0)
    plain = updates(OptimizerConfig(**base), 1.0)
    scaled = updates(
        OptimizerConfig(**base, scales=(("^vision/patch/bias", 1.0), ("^vision/", 0.1), ("words", 0.5))), 1.0
    )
    assert plain["trunk/mlp/kernel"] == pytest.approx(-0.1, rel=1e-4)  # Adam's first step is the learning rate
    factors = {path: float(scaled[path] / plain[path]) for path in PARAMS}
    expected = {"vision/patch/kernel": 0.1, "vision/patch/bias": 1.0, "words": 0.5}
    assert factors == pytest.approx({path: expected.get(path, 1.0) for path in PARAMS}, rel=1e-4)


def test_only_kernels_decay():
    base = dict(learning_rate=0.1, warmup_steps=0)
    with_decay, without = (updates(OptimizerConfig(**base, weight_decay=decay), 1.0) for decay in (0.5, 0.0))
    extra = {path: float(with_decay[path] - without[path]) for path in PARAMS}
    # decoupled: - learning rate x decay x weight
    expected = {path: -0.1 * 0.5 * 2.0 if path.endswith("kernel") else 0.0 for path in PARAMS}
    assert extra == pytest.approx(expected, abs=1e-5)


def test_clipping_bounds_the_global_norm_without_frozen_modules():
    # Adam forgets the size of a gradient, except against epsilon: the update is rate x g / (|g| + epsilon).
    base = dict(learning_rate=1e6, warmup_steps=0, weight_decay=0.0, epsilon=1e6)
    norm = np.sqrt(sum(p.size for p in PARAMS.values()))
    clipped = updates(OptimizerConfig(**base, clip_norm=1.0), 5.0)
    assert clipped["words"] == pytest.approx(-1.0 / norm, rel=1e-3)
    frozen = updates(OptimizerConfig(**base, clip_norm=1.0, scales=(("words", 0.0),)), 5.0)
    assert frozen["trunk/mlp/kernel"] == pytest.approx(-1.0 / np.sqrt(norm**2 - 8), rel=1e-3)
    assert "words" not in frozen


def test_mistakes_in_scales_are_named():
    with pytest.raises(
        UserError, match="'^visoin' matches no parameter; modules are trunk, vision, words".replace("^", r"\^")
    ):
        make_optimizer(OptimizerConfig(scales=(("^visoin", 0.1),)), 1000, PARAMS)
    with pytest.raises(UserError, match="freezes every parameter"):
        make_optimizer(OptimizerConfig(scales=((".", 0.0),)), 1000, PARAMS)
    with pytest.raises(UserError, match="no regular expression"):
        OptimizerConfig(scales=(("(", 0.1),))
    with pytest.raises(UserError, match="must not be negative"):
        OptimizerConfig(scales=(("a", -1.0),))


def test_average_follows_its_formula():
    average, params = {"w": jnp.array([1.0])}, {"w": jnp.array([3.0])}
    early = update_average(average, params, jnp.int32(1), 0.99)  # decay (1 + 1) / (10 + 1)
    assert float(early["w"][0]) == pytest.approx(2 / 11 * 1.0 + 9 / 11 * 3.0)
    late = update_average(average, params, jnp.int32(10_000), 0.99)
    assert float(late["w"][0]) == pytest.approx(0.99 * 1.0 + 0.01 * 3.0)
