"""From one observation to one chunk of actions: what the pictures and words take, and what the flow takes.

    python -m benchmarks.latency                                  # a small policy
    python -m benchmarks.latency --model=qwen3_vl_4b --rounds=50  # the paper's size with random weights, on a GPU

The trunk reads the observation once a chunk; the expert then follows the flow, at each step from the keys and values
that it made of the trunk's states once. The programs take turns, so that whatever else the machine does falls on all of
them. A share is that of `act` in the same turn, printed as median [lower quartile, upper quartile].
"""

import argparse
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.packed_step import WIDE, spread
from benchmarks.vlm import measure
from configs.bayesianvla_qwen3vl_4b import OPENING, settings
from vla_jax.config import resolve
from vla_jax.models.normalizer import DataFacts
from vla_jax.models.policy import Policy, PolicyConfig
from vla_jax.models.presets import PRESETS
from vla_jax.platform import keep_freed_memory
from vla_jax.training.train_config import TrainConfig

SMALL = "small"
WORDS, ACTIONS, STATE = 24, 7, 8


def config_of(model: str) -> tuple[PolicyConfig, int]:
    """(policy, size of its pictures)."""
    if model == SMALL:
        return WIDE, 128
    opening = OPENING if model.startswith("qwen3") else ()
    return resolve(TrainConfig, settings(model, "bayesianvla", {"opening": opening})).policy, 224


def programs(model: str, steps: list[int]) -> dict[str, Callable[[], object]]:
    """name -> a call that runs it on one observation."""
    config, size = config_of(model)
    ends = (-1.0,) * ACTIONS, (1.0,) * ACTIONS, (-1.0,) * STATE, (1.0,) * STATE
    facts = DataFacts(60, WORDS, size, *ends)
    graph, state = nnx.split(nnx.eval_shape(lambda: Policy(config, facts, nnx.Rngs(0))))
    state = jax.jit(lambda: nnx.split(Policy(config, facts, nnx.Rngs(0)))[1])()
    random = np.random.default_rng(0)
    seen = {view: random.integers(0, 256, (1, size, size, 3), dtype=np.uint8) for view in config.views}
    observation = jax.device_put({"images": seen, "state": np.zeros((1, STATE), np.float32)})
    tokens, mask, key = jnp.ones((1, WORDS), jnp.int32), jnp.ones((1, WORDS), bool), jax.random.key(0)
    noise = jax.random.normal(key, (1, config.chunk, ACTIONS))

    def read(state, observation):
        policy: Policy = nnx.merge(graph, state)
        reading = policy.encode(observation["images"], tokens, mask)["posterior"]
        return policy.condition(reading, observation["state"])

    def follow(state, condition, steps):
        return nnx.merge(graph, state).sample(condition, noise, steps=steps)

    def act(state, observation, steps):
        return nnx.merge(graph, state).act(observation, tokens, mask, key, steps=steps)

    condition = jax.jit(read)(state, observation)
    made = {
        "pictures": functools.partial(
            jax.jit(lambda s, o: nnx.merge(graph, s).vision(o["images"])), state, observation
        ),
        "pictures and trunk": functools.partial(jax.jit(read), state, observation),
    }
    for count in steps:
        made[f"expert, {count} steps"] = functools.partial(
            jax.jit(functools.partial(follow, steps=count)), state, condition
        )
        made[f"act, {count} steps"] = functools.partial(
            jax.jit(functools.partial(act, steps=count)), state, observation
        )
    return {name: lambda run=run: jax.block_until_ready(run()) for name, run in made.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[SMALL, *PRESETS], default=SMALL)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 10])
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    keep_freed_memory()
    seconds = measure(programs(arguments.model, arguments.steps), arguments.rounds)
    whole = seconds[f"act, {arguments.steps[-1]} steps"]
    print(f"{arguments.model}, one observation, {jax.devices()[0].device_kind}")
    print(f"| program | milliseconds (median) | share of act, {arguments.steps[-1]} steps |\n|---|---|---|")
    for name, own in seconds.items():
        print(f"| {name} | {1000 * np.median(own):.2f} | {spread(own / whole)} |")


if __name__ == "__main__":
    main()
