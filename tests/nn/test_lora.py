"""Low-rank adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vla_jax.errors import UserError
from vla_jax.nn.dense import Dense
from vla_jax.nn.flat import flatten
from vla_jax.nn.lora import LoraConfig, add_adapters, merge_adapters
from vla_jax.nn.mlp import GeluMLP
from vla_jax.nn.stack import Stack

CONFIG = LoraConfig(rank=2, strength=6.0, layers="up$|^single")
X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.mlp = GeluMLP(4, 6, rngs=rngs)

    def __call__(self, x, each):
        return x + self.mlp(x)


class Model(nnx.Module):
    def __init__(self, scan=False):
        rngs = nnx.Rngs(0)
        self.single = Dense(4, 4, rngs=rngs)
        self.stack = Stack(Layer, 3, scan=scan, remat="none", rngs=rngs)

    def __call__(self, x):
        return self.stack(self.single(x))


def adapted(scan=False):
    model = Model(scan)
    add_adapters(model, CONFIG, nnx.Rngs(1))
    return model


def filled(scan=False):
    model, random = adapted(scan), np.random.default_rng(2)
    for adapter in (model.single.adapter, model.stack.layers.mlp.up.adapter):
        adapter.up[...] = jnp.asarray(random.normal(scale=0.1, size=adapter.up.shape), jnp.float32)
    return model


def test_new_adapters_change_nothing_and_stand_where_they_should():
    model = adapted()
    np.testing.assert_array_equal(model(X), Model()(X))
    paths = [path for path in flatten(nnx.split(model)[1]) if "adapter" in path]
    assert sorted(paths) == [
        "single/adapter/down",
        "single/adapter/up",
        "stack/layers/mlp/up/adapter/down",
        "stack/layers/mlp/up/adapter/up",
    ]
    assert model.stack.layers.mlp.up.adapter.down.shape == (3, 4, 2)


def test_an_adapter_is_a_low_rank_change_of_its_matrix():
    model, plain = filled(), Model()
    change = 3.0 * np.asarray(model.single.adapter.down[...]) @ np.asarray(model.single.adapter.up[...])
    expected = plain.single(X) + X @ change
    np.testing.assert_allclose(model.single(X), expected, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_merged_adapters_compute_the_same(scan):
    model = filled(scan)
    before = model(X)
    merge_adapters(model)
    assert not any("adapter" in path for path in flatten(nnx.split(model)[1]))
    np.testing.assert_allclose(model(X), before, rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(before) - Model()(X)).max() > 0.1


def test_adapters_get_gradients():
    graph, state = nnx.split(filled())
    gradient = flatten(jax.grad(lambda state: (nnx.merge(graph, state)(X) ** 2).sum())(state))
    assert all(np.abs(leaf).max() > 0 for path, leaf in gradient.items() if "adapter" in path)


def test_patterns_that_match_nothing_are_named():
    with pytest.raises(UserError, match="'uo' matches no dense layer; there are single, stack/layers/mlp/down"):
        add_adapters(Model(), LoraConfig(rank=1, layers="uo"), nnx.Rngs(0))
    with pytest.raises(UserError, match="no regular expression"):
        add_adapters(Model(), LoraConfig(rank=1, layers="("), nnx.Rngs(0))
