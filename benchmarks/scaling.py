"""How the training step grows: with the model, with simulated devices, and what a second start saves.

    python -m benchmarks.scaling model [--sizes 5 20 80 300] [--rounds 3]
    python -m benchmarks.scaling model --sizes qwen3_vl_2b qwen3_vl_4b --mode lora --batch 16    # on a GPU
    python -m benchmarks.scaling devices [--counts 1 2 4 8]
    python -m benchmarks.scaling start

`model`: tokens a second and MFU (model FLOPs utilisation, arXiv 2204.02311) of whole updates, the peak being that of a
large matrix product in the same type that takes its turn in the same run, and the most memory that the device held,
where it tells. `devices`: the same global batch on simulated devices of one machine, which share its cores: what is
above the time of one device is the price of splitting. `start`: from the start of a process to the end of its first
update, without and with the compiled programs of an earlier one.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs.bayesianvla_qwen3vl_4b import MODES, OPENING, settings
from vla_jax.config import resolve
from vla_jax.losses.objective import LossConfig
from vla_jax.models.expert import ExpertConfig
from vla_jax.models.normalizer import DataFacts
from vla_jax.models.policy import PolicyConfig
from vla_jax.models.presets import PRESETS
from vla_jax.models.trunk import TrunkConfig
from vla_jax.models.vision import VisionConfig
from vla_jax.platform import keep_freed_memory, setup_compilation_cache
from vla_jax.training.costs import count_flops
from vla_jax.training.mesh import MeshConfig, make_mesh, place_batch
from vla_jax.training.program import batch_shapes, make_program
from vla_jax.training.train_config import TrainConfig

FACTS = DataFacts(1000, 16, 64, (-1.0,) * 7, (1.0,) * 7, (-1.0,) * 8, (1.0,) * 8)
# width and depth of the trunk by millions of parameters, all else in proportion
SIZES = {"1": (96, 3), "5": (192, 6), "20": (384, 8), "80": (640, 12), "300": (1024, 18)}
PEAK = {"float32": 2048, "bfloat16": 8192}  # sides of the product


def configuration(size: str, batch: int, mesh: MeshConfig, mode: str = "full") -> TrainConfig:
    """A BayesianVLA policy of about `size` million parameters, or on a released model with random weights, of which
    `mode` says what is trained (configs/bayesianvla_qwen3vl_4b.py)."""
    if size in PRESETS:
        opening = OPENING if size.startswith("qwen3") else ()
        released = resolve(TrainConfig, settings(size, f"bayesianvla,{mode}", {"opening": opening}))
        return dataclasses.replace(
            released, mesh=mesh, eval_every=0, data=dataclasses.replace(released.data, batch_size=batch)
        )
    width, depth = SIZES[size]
    heads = max(width // 64, 1)
    policy = PolicyConfig(
        vision=VisionConfig(width=width // 2, depth=max(depth // 2, 1), heads=heads, hidden=2 * width),
        trunk=TrunkConfig(
            width=width, depth=depth, heads=heads, kv_heads=heads, head_width=64, hidden=8 * width // 3, scan=True
        ),
        expert=ExpertConfig(
            width=width // 2, depth=2 * (depth // 2), heads=heads // 2 or 1, hidden=2 * width, scan=True
        ),
        queries=16,
        views=("front",),
    )
    base = TrainConfig(policy=policy, loss=LossConfig(noise_draws=2), mesh=mesh)
    return dataclasses.replace(base, data=dataclasses.replace(base.data, batch_size=batch))


class Step:
    """Updates of one configuration on random samples."""

    def __init__(self, config: TrainConfig, devices: int = 1, image_size: int = FACTS.image_size):
        self.mesh = make_mesh(config.mesh, jax.devices()[:devices])
        facts = dataclasses.replace(FACTS, image_size=image_size)
        program = make_program(config, facts, self.mesh)
        self.parameters = sum(leaf.size for leaf in program.shapes.params.values())
        shapes = batch_shapes(config, facts, self.mesh)
        traced = program.step.trace(program.shapes, shapes)
        self.flops, self._step = count_flops(traced.jaxpr), traced.lower().compile()
        self.state = program.first_state(0)
        self.batch = place_batch(jax.tree.map(random_array, shapes), self.mesh)
        tower = config.policy.qwen_vision if config.policy.encoder == "qwen3_vl" else config.policy.vision
        pictures = len(config.policy.views) * (image_size // (tower.patch * tower.merge)) ** 2
        self.tokens = config.data.batch_size * (pictures + 2 * (config.policy.queries + facts.max_tokens))

    def __call__(self) -> float:
        """Seconds of one update."""
        began = time.perf_counter()
        self.state, metrics = self._step(self.state, self.batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - began


def random_array(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    random = np.random.default_rng(0)
    if shape.dtype == np.bool_:
        return np.ones(shape.shape, bool)
    if np.issubdtype(shape.dtype, np.integer):
        return random.integers(1, 200, shape.shape).astype(shape.dtype)
    return random.normal(size=shape.shape).astype(shape.dtype)


def peak(dtype: str) -> float:
    """Operations a second of a large matrix product."""
    matrix = jnp.ones((PEAK[dtype], PEAK[dtype]), dtype)
    product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    product(matrix, matrix).block_until_ready()
    began = time.perf_counter()
    product(matrix, matrix).block_until_ready()
    return 2 * PEAK[dtype] ** 3 / (time.perf_counter() - began)


def grow_model(sizes: list[str], rounds: int, mode: str, batch: int) -> None:
    print("| parameters | batch | GFLOP | seconds (median) | tokens/s | MFU | GiB |")
    print("|---|---|---|---|---|---|---|")
    for size in sizes:
        samples = batch or (16 if size in PRESETS else max(2, min(32, 160 // int(size))))
        config = configuration(size, samples, MeshConfig(), mode)
        step = Step(config, image_size=224 if size in PRESETS else FACTS.image_size)
        step()
        times, peaks = zip(*((step(), peak(config.policy.dtype)) for _ in range(rounds)), strict=True)
        held = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        seconds, share = np.median(times), np.median([step.flops / t / p for t, p in zip(times, peaks, strict=True)])
        print(
            f"| {step.parameters / 1e6:.1f} M | {samples} | {step.flops / 1e9:.1f} | {seconds:.2f} "
            f"| {step.tokens / seconds:.0f} | {share:.2f} | {f'{held / 2**30:.1f}' if held else '–'} |",
            flush=True,
        )


def grow_devices(counts: list[int], rounds: int) -> None:
    """In another process, which simulates the devices."""
    flags = f"--xla_force_host_platform_device_count={max(counts)}"
    command = [sys.executable, "-m", "benchmarks.scaling", "simulated", "--rounds", str(rounds), "--counts"]
    subprocess.run([*command, *map(str, counts)], env={**os.environ, "XLA_FLAGS": flags}, check=True)


def simulated(counts: list[int], rounds: int) -> None:
    setup_compilation_cache()  # nearly all of the time is compiling: a second run, or one that was cut off, has it
    steps = {}
    for count in counts:
        for name, mesh in (("data", MeshConfig()), ("fsdp", MeshConfig(data=1, fsdp=0))):
            if count > 1 or name == "data":
                steps[f"{name}={count}"] = Step(configuration("1", 32, mesh), count)
    for step in steps.values():
        step()
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(step())
    print("| mesh | seconds (median) | x one device |\n|---|---|---|")
    one = np.array(times["data=1"])
    for name, each in times.items():
        print(f"| {name} | {np.median(each):.3f} | {np.median(np.array(each) / one):.2f} |")


def starts() -> None:
    print("| start | seconds to the end of the first update | CPU seconds |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        for name in ("first", "second"):
            before, began = os.times(), time.perf_counter()
            environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
            subprocess.run([sys.executable, "-m", "benchmarks.scaling", "once"], env=environment, check=True)
            after = os.times()
            used = after.children_user + after.children_system - before.children_user - before.children_system
            print(f"| {name} | {time.perf_counter() - began:.1f} | {used:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("model", "devices", "start", "simulated", "once"))
    parser.add_argument("--sizes", nargs="+", choices=(*SIZES, *PRESETS), default=["5", "20", "80", "300"])
    parser.add_argument("--mode", choices=MODES, default="full", help="what is trained of a released model")
    parser.add_argument("--batch", type=int, default=0, help="0: by the size")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    keep_freed_memory()
    if arguments.what == "model":
        grow_model(arguments.sizes, arguments.rounds, arguments.mode, arguments.batch)
    elif arguments.what == "devices":
        grow_devices(arguments.counts, arguments.rounds)
    elif arguments.what == "start":
        starts()
    elif arguments.what == "simulated":
        simulated(arguments.counts, arguments.rounds)
    else:
        setup_compilation_cache()
        Step(configuration("1", 32, MeshConfig()))()


if __name__ == "__main__":
    main()
