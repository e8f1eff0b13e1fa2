"""A policy's tower, trunk and words from a checkpoint of a vision-language model, and back into one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from vla_jax.errors import UserError
from vla_jax.models.policy import Policy, PolicyConfig
from vla_jax.models.presets import on_vlm
from vla_jax.nn.flat import FlatArrays, flatten, unflatten
from vla_jax.nn.lora import merge_adapters
from vla_jax.pretrained.checkpoint import load_params, save_vlm
from vla_jax.pretrained.configs import from_json, read_json
from vla_jax.pretrained.tables import FAMILIES

QUERY_NOISE = 0.02  # standard deviation of new queries about the mean word, as the released code has it


@dataclasses.dataclass(frozen=True)
class PretrainedConfig:
    """directory: of a checkpoint that `vla_jax.load_vlm` reads; "" starts from random weights. Its tower, trunk, words
    and tokenizer become the policy's. max_tokens: the longest instruction; a longer one is an error, or, with truncate,
    cut, which the loader counts and says."""

    directory: str = ""
    max_tokens: int = 24
    truncate: bool = False


def policy_on(directory: str | Path, policy: PolicyConfig) -> PolicyConfig:
    """The policy's settings with the sizes of the checkpoint's model."""
    return on_vlm(policy, from_json(read_json(directory)))


def tokenizer_of(directory: str | Path) -> str:
    """The text of the checkpoint's tokenizer.json."""
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{directory} has no tokenizer.json: copy it from where the checkpoint came from")
    return path.read_text()


def load_backbone(
    directory: str | Path, policy: PolicyConfig, shapes: FlatArrays, seed: int, mesh: Mesh | None = None
) -> FlatArrays:
    """The parameters of the policy that a checkpoint gives. shapes: those of all its parameters. mesh: spreads them
    over devices as `nn.placement` says; None is the first device.

    New queries start near the mean word, like the words that the released code adds for them.
    """
    params = load_params(directory, flatten(_model(directory)[1]), mesh)
    for path, leaf in params.items():
        if path not in shapes or shapes[path].shape != leaf.shape:
            expected = list(shapes[path].shape) if path in shapes else "nothing"
            raise UserError(
                f"{path} is {list(leaf.shape)} in {directory} and {expected} in the policy: "
                "the pictures of the data have another size than those of the checkpoint"
            )
    if "queries" in shapes:
        params["queries"] = policy.word_scale * new_queries(params["words"], policy.queries, seed)
    return params


def new_queries(words: Float[Array, "V D"], count: int, seed: int) -> Float[Array, "Q D"]:
    """Queries about the mean word."""
    mean = jnp.mean(words.astype(jnp.float32), 0)
    return mean + QUERY_NOISE * jax.random.normal(jax.random.key(seed), (count, words.shape[1]))


def save_backbone(policy: Policy, source: str | Path, directory: str | Path) -> None:
    """Writes the policy's vision-language model, adapters merged, as a checkpoint that transformers loads.

    source: the checkpoint that it came from, for its settings, tokenizer and image processor.
    """
    policy = nnx.clone(policy)
    merge_adapters(policy)
    graphdef, state = _model(source)
    params = flatten(nnx.split(policy, nnx.Param, ...)[1])
    save_vlm(
        nnx.merge(graphdef, unflatten({path: params[path] for path in flatten(state)})), directory, processor=source
    )


def _model(directory: str | Path) -> tuple[nnx.GraphDef, nnx.State]:
    """The model of a checkpoint, as shapes only."""
    source = read_json(directory)
    config = from_json(source)
    return nnx.split(nnx.eval_shape(lambda: FAMILIES[source["model_type"]].model(config, nnx.Rngs(0))))
