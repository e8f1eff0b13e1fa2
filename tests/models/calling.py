"""Modules run compiled."""

import functools

import jax
from flax import nnx


@functools.partial(jax.jit, static_argnums=(0, 1))
def compiled(method, graph, state, *inputs):
    return method(nnx.merge(graph, state), *inputs)


def call(module, method, *inputs):
    """method(module, *inputs), compiled once for each method and kind of module."""
    graph, state = nnx.split(module)
    return compiled(method, graph, state, *inputs)
