"""Frames per second from disk to batch at 224 x 224, against tf.data on the same RLDS files and against mp4 decoding.

    python -m benchmarks.readers --tensorflow=PYTHON      # a Python that can import tensorflow, of another environment
    python -m benchmarks.readers --memory=20000           # resident memory over so many batches of 16, no comparison

Writes a synthetic RLDS dataset in TFRecord shards, converts it, and takes turns between the readers for some rounds; a
ratio is of two readers in the same round, so that other programs on the machine disturb both alike.
"""

import argparse
import contextlib
import itertools
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from benchmarks.data import resident_mib
from tests.data.published import BRIDGE, example, write_tfrecord_rlds, write_video
from vla_jax.data.convert import ConvertConfig, convert
from vla_jax.data.episode import decode_jpeg, encode_jpeg
from vla_jax.data.lerobot import read_frames
from vla_jax.data.loader import DataConfig, data_contract, make_loader

SIZE, STEPS, RATE = 224, 40, 30
BATCH, CHUNK = 32, 8


def picture(random: np.random.Generator) -> np.ndarray:
    """A picture that takes about as many bytes as a recorded one."""
    coarse = random.integers(0, 256, (28, 28, 3), dtype=np.uint8)
    return cv2.resize(coarse, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)


def write_rlds_and_videos(directory: Path, episodes: int) -> tuple[Path, list[Path]]:
    """The same episodes as TFRecord RLDS and as one mp4 each, in the way of LeRobot v2.1."""
    random, videos, examples = np.random.default_rng(0), [], []
    for number in range(episodes):
        frames = np.stack([picture(random) for _ in range(STEPS)])
        one = example("bridge", number, STEPS, "put the cup away")
        for step, frame in zip(one["steps"], frames, strict=True):
            step["observation"] = {"image_0": encode_jpeg(frame), "state": step["observation"]["state"]}
        examples.append({"steps": one["steps"]})
        videos.append(directory / "videos" / f"episode_{number:06d}.mp4")
        write_video(videos[-1], frames)
    steps = dict(BRIDGE["steps"].feature)
    steps["observation"] = {name: feature for name, feature in steps["observation"].items() if name in KEPT}
    spec = {"steps": type(BRIDGE["steps"])(steps)}
    shards = [examples[start::4] for start in range(4)]
    return write_tfrecord_rlds(directory, "bridge_dataset", "1.0.0", spec, shards), videos


KEPT = ("image_0", "state")


Speed = tuple[float, float]  # frames a second, and CPU microseconds a frame over all threads of the reading process


def timed(stream: Iterator, batches: int, frames: int) -> Speed:
    """The speed over `batches`, after a quarter as many."""
    for _ in itertools.islice(stream, max(batches // 4, 2)):
        pass
    start, cpu = time.perf_counter(), time.process_time()
    for _ in itertools.islice(stream, batches):
        pass
    count = batches * frames
    return count / (time.perf_counter() - start), 1e6 * (time.process_time() - cpu) / count


def ours(path: Path, batches: int, **settings: int) -> Speed:
    """This library's loader. CPU time spent in worker processes is not seen."""
    config = DataConfig(directory=str(path), batch_size=BATCH, chunk=CHUNK, held_out_fraction=0.0, **settings)
    with contextlib.closing(make_loader(config, data_contract(config))) as loader:
        return timed(loader, batches, BATCH)


def tf_data(python: str, path: Path, batches: int, threads: int) -> Speed:
    """The tf.data pipeline, in a process of its own."""
    script = Path(__file__).with_name("tf_reader.py")
    numbers = [str(number) for number in (threads, BATCH, batches, CHUNK)]
    command = [python, str(script), f"{path}/*.tfrecord*", *numbers]
    speed, cpu = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:]
    return float(speed), float(cpu)


def mp4(videos: list[Path], batches: int, threads: int) -> Speed:
    """Random frames out of mp4 files: seek to the key frame before, decode up to it."""
    random = np.random.default_rng(0)

    def frame(_):
        begin = random.integers(1, STEPS) / RATE
        return next(read_frames(videos[random.integers(len(videos))], begin, RATE, 1))

    with ThreadPoolExecutor(threads) as pool:
        stream = (np.stack(list(pool.map(frame, range(BATCH)))) for _ in itertools.count())
        return timed(stream, batches, BATCH)


def decode_alone(path: Path, seconds: float = 2.0) -> float:
    """Frames per second of JPEG decoding on one thread: what no reader can exceed on one core."""
    config = DataConfig(directory=str(path), batch_size=1, held_out_fraction=0.0)
    with contextlib.closing(make_loader(config, data_contract(config))) as loader:
        jpeg = encode_jpeg(next(loader)["images"]["front"][0])
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        decode_jpeg(jpeg)
        count += 1
    return count / (time.perf_counter() - start)


def compare(readers: dict[str, Callable[[], Speed]], rounds: int) -> None:
    """Prints medians of each reader, and of its ratio of speeds to the first one with quartiles."""
    found = {name: [] for name in readers}
    for _ in range(rounds):
        for name, read in readers.items():
            found[name].append(read())
    first = [speed for speed, _ in found[next(iter(readers))]]
    for name, measured in found.items():
        speeds, cpu = zip(*measured, strict=True)
        low, middle, high = np.quantile(
            [one / other for one, other in zip(speeds, first, strict=True)], (0.25, 0.5, 0.75)
        )
        print(
            f"{name:<24}{statistics.median(speeds):>8,.0f} frames/s   x {middle:.2f} [{low:.2f}, {high:.2f}]"
            f"{statistics.median(cpu):>8,.0f} us CPU",
            flush=True,
        )


def memory(path: Path, batches: int) -> None:
    """Prints resident memory at ten points of a long read."""
    config = DataConfig(directory=str(path), batch_size=16, chunk=CHUNK, held_out_fraction=0.0)
    with contextlib.closing(make_loader(config, data_contract(config))) as loader:
        for number, _ in zip(range(1, batches + 1), loader, strict=False):
            if number % max(batches // 10, 1) == 0:
                print(f"{number:>8} batches {resident_mib():8.0f} MiB", flush=True)


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensorflow", help="a Python that can import tensorflow; without it tf.data is left out")
    parser.add_argument("--memory", type=int, default=0, help="only memory, over so many batches")
    parser.add_argument("--episodes", type=int, default=120)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source, videos = write_rlds_and_videos(Path(temporary), arguments.episodes)
        start = time.perf_counter()
        dataset = convert(ConvertConfig(str(source), "bridge"), Path(temporary) / "out").dataset
        steps, path = int(dataset.lengths.sum()), dataset.directory
        print(f"converted {steps / (time.perf_counter() - start):,.0f} frames/s; {steps} frames of {SIZE} pixels")
        if arguments.memory:
            memory(path, arguments.memory)
            return
        print(f"JPEG decoding alone, one thread: {decode_alone(path):,.0f} frames/s")
        batches = arguments.batches
        readers = {
            "vla_jax, 1 thread": lambda: ours(path, batches, threads=1),
            "vla_jax, 2 threads": lambda: ours(path, batches, threads=2),
            "vla_jax, 1 worker": lambda: ours(path, batches, workers=1),
            "vla_jax, 2 workers": lambda: ours(path, batches, workers=2),
            "mp4, 1 thread": lambda: mp4(videos, max(batches // 4, 1), 1),
            "mp4, 2 threads": lambda: mp4(videos, max(batches // 4, 1), 2),
        }
        if arguments.tensorflow:
            for threads in (1, 2):
                name = f"tf.data, {threads} thread{'s' if threads > 1 else ''}"
                readers[name] = lambda threads=threads: tf_data(arguments.tensorflow, source, batches, threads)
        compare(readers, arguments.rounds)


if __name__ == "__main__":
    main()
