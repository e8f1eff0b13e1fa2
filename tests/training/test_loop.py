"""The loop on a dummy model: order, guards, stops. The data is a real Grain iterator."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vla_jax.errors import UserError
from vla_jax.losses.term import term
from vla_jax.training.checkpoints import Checkpoints
from vla_jax.training.loop import Loop, Stopped, name_samples
from vla_jax.training.metrics import MetricsWriter, metric_lines
from vla_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from vla_jax.training.state import Beginning, abstract
from vla_jax.training.step import make_step
from vla_jax.training.train_config import TrainConfig


class Line(nnx.Module):
    """y = w x + b, with a constant beside it."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(3, 1, rngs=rngs)])
        self.offset = nnx.Variable(jnp.float32(0.5))


def objective(model, batch, key, count):
    noise = 0.01 * jax.random.normal(key, ())
    error = (model.layers[0](batch["x"])[:, 0] + model.offset[...] + noise - batch["y"]) ** 2
    terms = {"fit": term(error, batch["carried"], 1.0), "noise": term(noise + 0 * error, batch["carried"])}
    return terms["fit"].value, (terms, count + 1)


def make_data(bad_index: int | None = None, carried: bool = True, batch_size: int = 4) -> grain.DatasetIterator:
    """An endless shuffled stream in which sample number `bad_index` is not a number."""

    def sample(index: Any) -> dict[str, Any]:
        x = np.random.default_rng(int(index)).normal(size=3).astype(np.float32)
        y = np.float32(np.nan if index == bad_index else x.sum())
        return {
            "x": x,
            "y": y,
            "carried": np.bool_(carried),
            "episode": np.int32(index // 10),
            "step": np.int32(index % 10),
        }

    steps = grain.MapDataset.range(40).seed(3).shuffle().repeat().map(sample).batch(batch_size)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def make_loop(run_dir, steps=10, data=None, **changes) -> Loop:
    run_dir.mkdir(exist_ok=True)
    settings = dict(steps=steps, log_every=2, validate_every=0, eval_every=0, checkpoint_every=5)
    hooks = {name: changes.pop(name) for name in ("evaluate", "validate", "resume_command") if name in changes}
    config = TrainConfig(
        optimizer=OptimizerConfig(warmup_steps=2, decay_steps=20, ema_decay=0.9), **(settings | changes)
    )
    graphdef, shapes, _ = abstract(Line)
    optimizer = make_optimizer(config.optimizer, config.steps, shapes)
    state = Beginning(Line, optimizer, jnp.int32(0), ema=True).state(config.seed)
    checkpoints = Checkpoints(run_dir, keep=2, write=True)
    data = make_data() if data is None else data
    meta = {}
    if checkpoints.steps:
        state, meta = checkpoints.restore(state)
        data.set_state(meta["data"])
    step_fn = make_step(graphdef, objective, optimizer, make_schedule(config.optimizer, config.steps), 0.9)
    writer = MetricsWriter(run_dir, int(state.step))
    return Loop(config, state, step_fn, data, checkpoints, writer, evaluated=meta.get("evaluated", 0), **hooks)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_resuming_is_bit_exact(tmp_path):
    whole = make_loop(tmp_path / "whole").run()
    make_loop(tmp_path / "parts", steps=5).run()
    loop = make_loop(tmp_path / "parts")
    assert loop.step == 5
    assert_same(whole, loop.run())
    assert float(whole.params["layers/0/kernel"].sum()) != 0 and int(whole.gate_state) == 10
    keys = ("step", "loss", "grad_norm", "learning_rate", "terms/fit")
    lines = [
        [{key: line[key] for key in keys} for line in metric_lines(tmp_path / name)] for name in ("whole", "parts")
    ]
    assert [line["step"] for line in lines[0]] == [1, 2, 4, 6, 8, 10]
    assert [line for line in lines[1] if line["step"] >= 8] == [line for line in lines[0] if line["step"] >= 8]


def test_every_step_and_every_seed_has_its_own_noise(tmp_path):
    make_loop(tmp_path / "one", log_every=1, steps=4).run()
    make_loop(tmp_path / "two", log_every=1, steps=4, seed=1).run()
    noise = [line["terms/noise"] for name in ("one", "two") for line in metric_lines(tmp_path / name)]
    assert len(noise) == len(set(noise)) == 8


def test_constants_are_not_trained_and_the_average_moves_behind(tmp_path):
    loop = make_loop(tmp_path / "run")
    before = jax.device_get(loop.state.params)
    after = jax.device_get(loop.run())
    assert after.constants["offset"] == np.float32(0.5)
    moved = after.params["layers/0/kernel"] - before["layers/0/kernel"]
    averaged = after.ema["layers/0/kernel"] - before["layers/0/kernel"]
    assert (np.abs(averaged) < np.abs(moved)).all() and (averaged * moved > 0).all()


def test_a_loss_that_is_not_finite_names_the_batch_and_keeps_good_checkpoints(tmp_path):
    order = [name for batch, _ in zip(make_data(), range(10), strict=False) for name in name_samples(batch).split(", ")]
    bad = order[6 * 4 + 1]  # the second sample of the seventh batch
    episode, step = map(int, bad.split(":"))
    loop = make_loop(tmp_path / "run", data=make_data(bad_index=10 * episode + step))
    said = rf"at step 7: loss.*\(episode:step\) {bad} \(numbers.*last good.*step 5.*another --workdir"
    with pytest.raises(UserError, match=said):
        loop.run()
    with pytest.raises(UserError, match=rf"at step 7: .*{bad}"):  # resuming meets the same batch
        make_loop(tmp_path / "run", data=make_data(bad_index=10 * episode + step)).run()
    assert Checkpoints(tmp_path / "run").steps == [5]
    assert all(np.isfinite(line["loss"]) for line in metric_lines(tmp_path / "run"))


def test_a_batch_without_visible_fault_is_named_whole():
    batch = {"x": np.ones((3, 2)), "episode": np.array([4, 5, 6]), "step": np.array([0, 1, 2])}
    assert name_samples(batch) == "4:0, 5:1, 6:2"
    assert name_samples(batch, most=2) == "4:0, 5:1 and 1 more"


def test_a_term_that_nothing_carries_stops_at_the_first_step(tmp_path):
    loop = make_loop(tmp_path / "run", data=make_data(carried=False), log_every=100)
    with pytest.raises(UserError, match="'fit' has weight 1, but"):
        loop.run()
    assert loop.step == 1


def test_compiling_does_not_count_as_the_pace(tmp_path, capsys):
    loop, seconds = make_loop(tmp_path / "run", steps=3, log_every=1), [1.0]
    step_fn = loop._step_fn

    def compiles(state, batch):
        time.sleep(seconds.pop() if seconds else 0.0)
        return step_fn(state, batch)

    loop._step_fn = compiles
    loop.run()
    first, second, _ = metric_lines(tmp_path / "run")
    assert first["time/compile"] > 0.5 and "time/compile" not in second
    assert first["samples_per_second"] > loop.config.samples / 1.0
    assert "compile" in capsys.readouterr().out.splitlines()[0]


def test_validation_and_evaluation_come_in_order_and_are_logged(tmp_path):
    calls = []

    def evaluate(state, step):
        calls.append(("evaluate", step))
        return [{"split": "swapped", "successes": 1, "trials": 2, "stick": None}]

    def validate(state):
        calls.append(("validate", int(state.step)))
        return {"loss": 0.5}

    make_loop(tmp_path / "run", evaluate=evaluate, validate=validate, validate_every=5, eval_every=4).run()
    assert calls == [
        ("evaluate", 4), ("validate", 5), ("evaluate", 8), ("validate", 10), ("evaluate", 10)
    ]  # fmt: skip
    lines = metric_lines(tmp_path / "run")
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [4, 8, 10]
    assert [(line["step"], line["loss"]) for line in lines if line["kind"] == "validation"] == [(5, 0.5), (10, 0.5)]
    shares = [{k: v for k, v in line.items() if k.startswith("time/")} for line in lines if line["kind"] == "train"]
    assert all(set(share) >= {"time/data", "time/step"} and 0 < sum(share.values()) <= 1.0 for share in shares)
    assert any(share.get("time/eval", 0) > 0 for share in shares)
    assert any((tmp_path / "run" / "tensorboard").iterdir())


class Stopping:
    """Sends the signal while the third batch is waited for."""

    def __init__(self, data, number=signal.SIGTERM):
        self.data, self.number, self.taken = data, number, 0

    def __next__(self):
        self.taken += 1
        if self.taken == 3:
            os.kill(os.getpid(), self.number)
        return next(self.data)

    def get_state(self):
        return self.data.get_state()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_saved_and_says_how_to_go_on(tmp_path, number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    loop = make_loop(tmp_path / "run", data=Stopping(make_data(), number), resume_command="train --resume")
    with pytest.raises(Stopped, match="saved step 3 of 10; go on with: train --resume"):
        loop.run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert_same(make_loop(tmp_path / "run").run(), make_loop(tmp_path / "whole").run())


def test_no_process_begins_what_needs_all_when_one_is_asked_to_stop(tmp_path, monkeypatch):
    answers, begun = [], []

    def any_process(flag):
        """Another process is asked to stop during the fifth step."""
        answers.append(flag or len(answers) == 5)
        return answers[-1]

    monkeypatch.setattr("vla_jax.training.loop.any_process", any_process)
    hooks = dict(evaluate=lambda *_: begun.append("evaluation"), validate=lambda _: begun.append("validation"))
    with pytest.raises(Stopped, match="saved step 5 of 10"):
        make_loop(tmp_path / "run", **hooks, validate_every=5, eval_every=5).run()
    assert begun == [] and answers == [False] * 5 + [True]


def test_several_processes_ask_each_other_every_few_steps(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("vla_jax.training.loop.any_process", lambda flag: asked.append(flag) or flag)
    loop = make_loop(tmp_path / "run", data=Stopping(make_data()))  # asked to stop during the third step
    loop._stop_every = 4
    with pytest.raises(Stopped, match="saved step 4 of 10"):
        loop.run()
    assert asked == [False, True]


def test_a_stop_that_comes_while_the_processes_talk_is_not_forgotten(tmp_path, monkeypatch):
    asked = []

    def any_process(flag):
        asked.append(flag)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return flag  # as it was when it was asked for

    monkeypatch.setattr("vla_jax.training.loop.any_process", any_process)
    with pytest.raises(Stopped, match="saved step 3 of 10"):
        make_loop(tmp_path / "run").run()


def test_a_stop_during_the_evaluation_repeats_it_on_resumption(tmp_path):
    steps = []

    def stopped(state, step):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the evaluation went on")

    def evaluate(state, step):
        steps.append(step)
        return []

    with pytest.raises(Stopped):
        make_loop(tmp_path / "run", evaluate=stopped, eval_every=5).run()
    make_loop(tmp_path / "run", evaluate=evaluate, eval_every=5).run()
    assert steps == [5, 10]
    with pytest.raises(Stopped):
        make_loop(tmp_path / "last", evaluate=stopped, eval_every=10).run()
    make_loop(tmp_path / "last", evaluate=evaluate, eval_every=10).run()
    assert steps == [5, 10, 10]
    for _ in range(2):  # the second time, nothing is left to do
        make_loop(tmp_path / "done", evaluate=evaluate, eval_every=10).run()
    assert steps == [5, 10, 10, 10]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    make_loop(tmp_path / "run", checkpoint_every=3).run()
    assert Checkpoints(tmp_path / "run").steps == [9, 10]


def test_metrics_after_the_restored_step_are_dropped_and_torn_lines_too(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write("train", step, {"loss": 1.0 / step, "odd": float("nan")})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    writer = MetricsWriter(tmp_path, 2)
    writer.write("train", 3, {"loss": 7.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 7.0)]
    assert lines[0]["odd"] is None


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    make_loop(tmp_path / "run", steps=5).run()
    loop = make_loop(tmp_path / "run")
    loop._writer._file = open("/dev/full", "w")  # every write fails with "no space left on device"
    with pytest.raises(UserError, match=f"no space left for {tmp_path}/run: free some .* --resume"):
        loop.run()
    assert make_loop(tmp_path / "run").step == 5


def train_until_full(directory):
    """Trains where there is room for one checkpoint and half of the next, makes room, and goes on."""
    run_dir, ballast = directory / "run", directory / "ballast"
    make_loop(run_dir, steps=5).run()
    needed = sum(os.stat(path).st_blocks * 512 for path in (run_dir / "checkpoints" / "5").rglob("*"))
    room = os.statvfs(directory)
    ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - needed // 2))
    for attempt in ("told", "told again"):
        try:
            make_loop(run_dir).run()
        except UserError as error:
            print(f"{attempt}: {error}; complete: {Checkpoints(run_dir).steps}")
    ballast.unlink()
    make_loop(run_dir).run()
    print(f"went on; complete: {Checkpoints(run_dir).steps}")


# A file system of 4 MB that only this command sees and that ends with it.
SMALL_DISK = ("unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=4M tmpfs "$0" && exec "$@"')


def test_a_disk_that_fills_up_during_a_save_loses_nothing(tmp_path):
    try:
        subprocess.run([*SMALL_DISK, str(tmp_path), "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the system lets nobody mount a file system of his own: {error}")
    code = f"import pathlib, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_loop\n"
    code += f"test_loop.train_until_full(pathlib.Path({str(tmp_path)!r}))"
    command = [*SMALL_DISK, str(tmp_path), sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("step ")]
    full = f"no space left for {tmp_path}/run: free some and run the same command with --resume; .* complete: \\[5\\]"
    assert len(lines) == 3 and re.fullmatch(f"told: {full}", lines[0]), done.stdout + done.stderr
    assert re.fullmatch(f"told again: {full}", lines[1]) and lines[2] == "went on; complete: [5, 10]", lines
