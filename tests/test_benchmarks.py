"""Every benchmark runs, at its smallest size, to its last line. What it measures here means nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# command, and a word of what it prints last
SMALLEST = {
    "camera --embodiments=floating --pixels=32 --batches=1 --seconds=0.1": "floating",
    "closed_loop --batch=2 --calls=1 --singles=1 --image-size=32": "batched is",
    "data --episodes=20 --size=32 --batches=5": "2 workers",
    "latency --rounds=1 --steps 1": "act, 1 steps",
    "packed_step --size=quickstart --rounds=1": "GFLOP/s",
    "physics --scenes 1 --embodiments floating --engines c": "floating | c | 1",
    "readers --episodes=4 --batches=4 --rounds=1": "mp4, 2 threads",
    "scaling model --sizes 5 --rounds 1": "4.2 M",
    "scaling devices --counts 1 2 --rounds 1": "data=2",
    "steering --rounds 1 --particles 1 --steps 2": "full",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", SMALLEST)
def test_it_runs_to_its_end(command):
    name, *flags = command.split()
    run = [sys.executable, "-m", f"benchmarks.{name}", *flags]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert SMALLEST[command] in done.stdout


def test_all_of_them_are_here():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    elsewhere = {"tf_reader", "vlm"}  # they need TensorFlow and PyTorch
    assert scripts - elsewhere == {command.split()[0] for command in SMALLEST}
