"""What the second branch costs: a packed training step against a single branch and against two complete passes.

    python -m benchmarks.packed_step                     # all sizes
    python -m benchmarks.packed_step --size=quickstart --rounds=30
    python -m benchmarks.packed_step --memory=returned   # without what every entry point does (platform.py)

A step is the loss and its gradient. `single` is the queries-only arm (posterior branch, no prior, no LLR); `packed` is
the full objective with [v | Q | l | l' | Q'] in one pass; `two passes` is the full objective with [v | Q | l] and
[v | l | Q] run one after the other, images included, as published implementations do; `all tokens` is the baseline arm
without queries. The programs take turns, so that whatever else the machine does falls on all of them; ratios are taken
within a turn and printed as median [lower quartile, upper quartile]. The peak is that of a large float32 matrix
product, taking its turn too.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import quickstart
from experiments.compare import CompareConfig
from vla_jax.config import resolve
from vla_jax.losses.llr import initial_gate
from vla_jax.losses.objective import LossConfig, objective
from vla_jax.models.expert import ExpertConfig
from vla_jax.models.normalizer import DataFacts
from vla_jax.models.policy import Policy, PolicyConfig
from vla_jax.models.trunk import TrunkConfig
from vla_jax.models.vision import VisionConfig
from vla_jax.platform import keep_freed_memory

PEAK_SIZE = 2048
QUICKSTART = resolve(CompareConfig, quickstart.get_config()).arms["bayesianvla"]
WIDE = PolicyConfig(
    vision=VisionConfig(patch=8, merge=1, width=128, depth=4, heads=4, hidden=512),
    trunk=TrunkConfig(width=128, depth=4, heads=4, kv_heads=4, head_width=32, hidden=344),
    expert=ExpertConfig(width=128, depth=4, heads=4, hidden=512, head=128),
    views=("front",),
    queries=64,
)
SIZES = {  # policy, image size, text tokens, batch, noise draws
    "quickstart": (QUICKSTART.policy, 64, 14, 64, QUICKSTART.loss.noise_draws),
    "256 image tokens": (WIDE, 128, 24, 16, 4),
    "2 x 256 image tokens": (dataclasses.replace(WIDE, views=("front", "wrist")), 128, 24, 8, 4),
}


class TwoPasses(Policy):
    """The branches one after the other, each with its own image tokens."""

    def encode(self, images, tokens, token_mask, branches=("posterior",), *read):
        readings = {}
        for branch in branches:
            images = jax.lax.optimization_barrier(images)  # or XLA would notice that the images are the same
            readings |= super().encode(images, tokens, token_mask, (branch,), *read)
        return readings


def random_batch(config: PolicyConfig, image_size: int, text: int, size: int) -> dict:
    random = np.random.default_rng(0)
    shape = (size, image_size, image_size, 3)
    return jax.device_put(
        {
            "images": {view: random.integers(0, 256, shape, dtype=np.uint8) for view in config.views},
            "state": random.normal(size=(size, 6)).astype(np.float32),
            "tokens": random.integers(1, 60, (size, text)).astype(np.int32),
            "token_mask": np.arange(text) < random.integers(text // 2, text + 1, (size, 1)),
            "actions": random.normal(size=(size, config.chunk, 5)).astype(np.float32),
            "action_mask": np.ones((size, config.chunk, 5), bool),
        }
    )


def programs(size: str) -> dict[str, tuple[Callable[[], object], float]]:
    """name -> (a call that runs one step, its floating-point operations)."""
    config, image_size, text, batch_size, draws = SIZES[size]
    full = LossConfig(noise_draws=draws)
    single = dataclasses.replace(full, prior_weight=0.0, llr_weight=0.0)
    facts = DataFacts(60, text, image_size, (-1.0,) * 5, (1.0,) * 5, (-1.0,) * 6, (1.0,) * 6)
    batch = random_batch(config, image_size, text, batch_size)
    tokens = dataclasses.replace(config, conditioning="tokens")
    made = {}
    for name, kind, settings, loss_config in (
        ("single", Policy, config, single),
        ("packed", Policy, config, full),
        ("two passes", TwoPasses, config, full),
        ("all tokens", Policy, tokens, single),
    ):
        graph, params, rest = nnx.split(kind(settings, facts, nnx.Rngs(0)), nnx.Param, ...)

        def loss(params, rest, batch, key, graph=graph, loss_config=loss_config):
            return objective(nnx.merge(graph, params, rest), batch, key, loss_config, initial_gate())[0]

        inputs = params, rest, batch, jax.random.key(0)
        step = jax.jit(jax.value_and_grad(loss)).lower(*inputs).compile()
        made[name] = (functools.partial(step, *inputs), step.cost_analysis()["flops"])
    matrix = jnp.ones((PEAK_SIZE, PEAK_SIZE))
    product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    made["peak"] = (functools.partial(product, matrix, matrix), 2.0 * PEAK_SIZE**3)
    return made


def measure(made: dict[str, tuple[Callable[[], object], float]], rounds: int) -> dict[str, np.ndarray]:
    """name -> [rounds, 2] seconds of wall clock and of CPU. The order of the programs changes from round to round."""
    for run, _ in made.values():
        jax.block_until_ready(run())
    names = list(made)
    times = {name: np.zeros((rounds, 2)) for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(made[name][0]())
            times[name][turn] = time.perf_counter() - wall, time.process_time() - cpu
    return times


def spread(values: np.ndarray) -> str:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def report(size: str, rounds: int) -> None:
    made = programs(size)
    times = measure(made, rounds)
    config, image_size, text, batch_size, draws = SIZES[size]
    print(
        f"\n{size}: batch {batch_size}, {len(config.views)} x {image_size} px, {text} text tokens, "
        f"{config.queries} queries, {draws} noise draws, {rounds} rounds"
    )
    print("| step | GFLOP | seconds (median) | CPU seconds | x single | x single, CPU time | share of peak |")
    print("|---|---|---|---|---|---|---|")
    peak = made["peak"][1] / times["peak"][:, 0]
    for name in ("single", "packed", "two passes", "all tokens"):
        wall, cpu = times[name].T
        share = made[name][1] / wall / peak
        print(
            f"| {name} | {made[name][1] / 1e9:.1f} | {np.median(wall):.3f} | {np.median(cpu):.3f} "
            f"| {spread(wall / times['single'][:, 0])} | {spread(cpu / times['single'][:, 1])} | {spread(share)} |"
        )
    print(f"peak: {spread(peak / 1e9)} GFLOP/s (float32 product of {PEAK_SIZE} x {PEAK_SIZE} matrices)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory", choices=("kept", "returned"), default="kept")
    arguments = parser.parse_args()
    if arguments.memory == "kept":
        keep_freed_memory()
    for size in arguments.size or SIZES:
        report(size, arguments.rounds)


if __name__ == "__main__":
    main()
