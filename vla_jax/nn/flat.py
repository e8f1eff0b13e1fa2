"""A module's arrays: by path, as {"trunk/norm/scale": array}, and without their gradients."""

import jax
from flax import nnx
from jax import lax
from jaxtyping import Array

FlatArrays = dict[str, Array]


def flatten(state: nnx.State) -> FlatArrays:
    """{"trunk/norm/scale": array}"""
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.pure(state))}


def unflatten(flat: FlatArrays) -> nnx.State:
    """The inverse of `flatten`; numbers in paths are places in lists."""
    paths = {tuple(int(part) if part.isdigit() else part for part in path.split("/")): path for path in flat}
    return nnx.from_flat_state([(path, flat[name]) for path, name in paths.items()])


def frozen(module: nnx.Module) -> nnx.Module:
    """The same module, through which no gradient reaches its parameters."""
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lax.stop_gradient, state))
