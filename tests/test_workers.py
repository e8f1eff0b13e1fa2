"""Processes that share a job: claims, places, signals."""

import os
import signal
import subprocess
import sys
import time

import pytest

from vla_jax import workers
from vla_jax.errors import UserError
from vla_jax.workers import ONE_CHIP, Place, Workers, claim, places

HOLD = """
import sys, time
from pathlib import Path
from vla_jax.workers import claim
with claim(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""
RACE = """
import sys, time
from pathlib import Path
from vla_jax.workers import claim
place = Path(sys.argv[1])
while not (place / "go").exists():
    time.sleep(0.001)
for number in range(40):
    with claim(place / "claims" / str(number)) as mine:
        if mine and not (place / f"{number}.done").exists():
            time.sleep(0.002)
            print(number, flush=True)
            (place / f"{number}.done").touch()
"""


def python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_that_race_share_the_work(tmp_path):
    racers = [python(RACE, tmp_path) for _ in range(2)]
    (tmp_path / "go").touch()
    shares = [list(map(int, racer.communicate(timeout=120)[0].split())) for racer in racers]
    assert sorted(shares[0] + shares[1]) == list(range(40)), "each number once"


def test_a_claim_ends_with_its_process_however_that_ends(tmp_path):
    holder = python(HOLD, tmp_path / "cell")
    assert holder.stdout.readline() == "True\n"
    with claim(tmp_path / "cell") as mine:
        assert not mine
    with claim(tmp_path / "other") as mine:
        assert mine
    holder.kill()
    with claim(tmp_path / "cell", wait=True) as mine:
        assert mine
    holder.communicate()


def test_a_claim_is_given_back(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), claim(tmp_path / "cell") as mine:
            assert mine
            raise KeyError


def test_an_accelerator_for_each_worker(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(workers, "_devices", lambda: ("gpu", 3))
    assert places(0) == [Place({"CUDA_VISIBLE_DEVICES": name}) for name in "012"]
    assert places(2) == places(0)[:2]
    with pytest.raises(UserError, match="workers is 4, but there is room for 3 here: one for each GPU"):
        places(4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,2,5")
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in places(0)] == ["7", "2", "5"]
    monkeypatch.setattr(workers, "_devices", lambda: ("tpu", 4))
    assert places(0)[3] == Place({"TPU_VISIBLE_CHIPS": "3", **ONE_CHIP})


def test_the_cores_are_divided(monkeypatch):
    monkeypatch.setattr(workers, "_devices", lambda: ("cpu", 1))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 5, 6, 7})
    assert places(0) == places(1) == [Place()]
    assert [place.cores for place in places(2)] == [{1, 2}, {5, 6, 7}]
    assert [place.cores for place in places(5)] == [{1}, {2}, {5}, {6}, {7}]
    with pytest.raises(UserError, match="workers is 6, but there is room for 5 here: one for each core"):
        places(6)


def test_the_devices_are_counted_elsewhere(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert workers._devices()[0] == "cpu"


def test_a_worker_runs_in_its_place(tmp_path):
    core, before = max(os.sched_getaffinity(0)), os.sched_getaffinity(0)
    code = "import os; print(os.environ['SEEN'], os.sched_getaffinity(0)); raise SystemExit(3)"
    with Workers([Place({"SEEN": "yes"}, frozenset({core}))]) as pool:
        pool.start("cell", [sys.executable, "-c", code], tmp_path / "logs" / "cell.log")
        assert not pool.free and pool.running == ["cell"] and os.sched_getaffinity(0) == before
        assert pool.wait() == [("cell", 3)]
        assert pool.free and not pool.running and not pool.stopped
    assert (tmp_path / "logs" / "cell.log").read_text() == f"yes {{{core}}}\n"


SAVES = """
import os, signal, time
def save(number, frame):
    print("saved after", signal.Signals(number).name, flush=True)
    raise SystemExit(130)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
print("leads its group:", os.getpgrp() == os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_worker_once(tmp_path, number):
    logs = [tmp_path / f"{name}.log" for name in "ab"]
    handler = signal.getsignal(number)
    with Workers([Place(), Place()]) as pool:
        for log in logs:
            pool.start(log.stem, [sys.executable, "-c", SAVES], log)
        while not all("group" in log.read_text() for log in logs):
            time.sleep(0.02)
        os.kill(os.getpid(), number)
        ended = []
        while pool.running:
            ended += pool.wait()
    assert sorted(ended) == [("a", 130), ("b", 130)] and pool.stopped
    # in a group of its own, it gets Ctrl-C from us alone
    assert all(log.read_text() == f"leads its group: True\nsaved after {number.name}\n" for log in logs)
    assert signal.getsignal(number) == handler


def test_an_error_here_stops_the_workers(tmp_path):
    with pytest.raises(KeyError), Workers([Place()]) as pool:
        pool.start("cell", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
        raise KeyError
    assert pool.free and not pool.running
