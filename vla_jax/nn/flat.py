"""Arrays of a module by path: {"trunk/norm/scale": array}."""

from flax import nnx
from jaxtyping import Array

FlatArrays = dict[str, Array]


def flatten(state: nnx.State) -> FlatArrays:
    """{"trunk/norm/scale": array}"""
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.pure(state))}


def unflatten(flat: FlatArrays) -> nnx.State:
    """The inverse of `flatten`; numbers in paths are places in lists."""
    paths = {tuple(int(part) if part.isdigit() else part for part in path.split("/")): path for path in flat}
    return nnx.from_flat_state([(path, flat[name]) for path, name in paths.items()])
