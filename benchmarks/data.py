"""How fast batches come from disk, and whether memory stays flat.

    python -m benchmarks.data                      # writes synthetic episodes to a temporary directory
    python -m benchmarks.data --dataset=PATH       # measures an existing dataset

Prints one line a setting: samples per second, CPU time a sample (which other programs disturb less; of this process
alone) and the resident memory of this process.
"""

import argparse
import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from vla_jax.data import tokenizer as tokenizers
from vla_jax.data.contract import compute_contract
from vla_jax.data.episode import Episode
from vla_jax.data.interface import Interface
from vla_jax.data.loader import DataConfig, make_loader
from vla_jax.data.rlds import open_rlds, write_rlds

INSTRUCTION = "reach the red cube"
STEPS = 40  # of a synthetic episode


def synthetic_interface(size: int) -> Interface:
    """The interface of a tabletop with two views of `size` pixels."""
    return Interface(
        embodiment="synthetic",
        control_hz=10.0,
        images={"front": (size, size), "wrist": (size, size)},
        action_names=("dx", "dy", "dz", "dyaw", "opening"),
        action_units=("m", "m", "m", "rad", "m"),
        action_representation="delta",
        state_names=("x", "y", "z", "sin_yaw", "cos_yaw", "opening"),
        state_units=("m", "m", "m", "1", "1", "m"),
        max_tokens=14,
        tokenizer=tokenizers.to_json(tokenizers.train_tokenizer([INSTRUCTION])),
    )


def synthetic_episodes(count: int, size: int) -> Iterator[Episode]:
    """Episodes of smooth random pictures, about as large in JPEG as rendered ones."""
    random = np.random.default_rng(0)

    def picture():
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR)

    for number in range(count):
        yield Episode(
            images={view: np.stack([picture() for _ in range(STEPS)]) for view in ("front", "wrist")},
            state=random.normal(size=(STEPS, 6)).astype(np.float32),
            actions=random.normal(size=(STEPS, 5)).astype(np.float32),
            instruction=INSTRUCTION,
            success=True,
            metadata={"seed": number},
        )


def resident_mib() -> float:
    """Resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def measure(config: DataConfig, batches: int) -> tuple[float, float, list[float]]:
    """Samples per second over `batches`, CPU microseconds a sample in this process, and resident MiB at five points."""
    loader = make_loader(config, compute_contract(config.directory))
    with contextlib.closing(loader):
        for _ in range(max(batches // 2, 2)):  # fills the cache
            next(loader)
        memory, start, cpu = [], time.perf_counter(), time.process_time()
        for number in range(batches):
            next(loader)
            if (number + 1) % max(batches // 5, 1) == 0:
                memory.append(resident_mib())
        samples = batches * config.batch_size
        return samples / (time.perf_counter() - start), (time.process_time() - cpu) / samples * 1e6, memory


def report(path: Path, batches: int) -> None:
    """Prints the table for the dataset at `path`."""
    dataset = open_rlds(path)
    start = time.perf_counter()
    contract = compute_contract(dataset)
    seconds = time.perf_counter() - start
    disk = sum(file.stat().st_size for file in path.iterdir()) / 2**20
    steps, views = dataset.lengths.sum(), dataset.interface.images
    print(f"{len(dataset)} episodes, {steps} steps, views {views}, {disk:.0f} MiB on disk")
    print(f"contract: {contract.action_statistics.count / seconds:,.0f} steps/s ({seconds:.2f} s)")
    base = DataConfig(directory=str(path), batch_size=64, chunk=8)
    settings = {
        "1 thread": {"threads": 1},
        "2 threads": {},
        "2 threads, no cache": {"cache_mb": 0},
        "1 worker": {"workers": 1},
        "2 workers": {"workers": 2},
    }
    for name, changes in settings.items():
        speed, cpu, memory = measure(dataclasses.replace(base, **changes), batches)
        resident = " ".join(f"{value:.0f}" for value in memory)
        print(f"{name:<22}{speed:>8,.0f} samples/s {cpu:>6.0f} us CPU   resident MiB {resident}")


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, help="an RLDS dataset; without it, a synthetic one is written")
    parser.add_argument("--episodes", type=int, default=1000, help="synthetic episodes")
    parser.add_argument("--size", type=int, default=64, help="pixels of a synthetic picture")
    parser.add_argument("--batches", type=int, default=500)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = arguments.dataset
        if path is None:
            start = time.perf_counter()
            episodes = synthetic_episodes(arguments.episodes, arguments.size)
            path = write_rlds(directory, "synthetic", episodes, synthetic_interface(arguments.size), {})
            print(f"written: {arguments.episodes * STEPS / (time.perf_counter() - start):,.0f} steps/s")
        report(path, arguments.batches)


if __name__ == "__main__":
    main()
