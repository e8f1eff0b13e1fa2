"""Runs of DSRL from the first to the last file, on a point instead of a table."""

import dataclasses
import functools
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.evaluation.conftest import make_contract  # noqa: F401, a fixture
from tests.evaluation.test_rollout import PointEnv
from vla_jax.errors import UserError
from vla_jax.evaluation.evaluate import EvalConfig
from vla_jax.models.expert import Condition
from vla_jax.models.normalizer import DataFacts, Normalizer
from vla_jax.models.policy import Policy, PolicyConfig
from vla_jax.rl.agent import AgentConfig
from vla_jax.rl.collect import Collector
from vla_jax.rl.loop import LoopConfig
from vla_jax.training.checkpoints import Checkpoints
from vla_jax.training.improve import ImproveConfig, Run, improve, load_improved
from vla_jax.training.loop import Stopped
from vla_jax.training.metrics import metric_lines
from vla_jax.training.train_config import TrainConfig


class Point(PointEnv):
    """Four ticks of a point that is pushed about, seen as a table is."""

    max_ticks = 4

    def __init__(self, config):
        pass

    def observe(self, state):
        seen = super().observe(state)
        picture = jnp.repeat(jnp.repeat(seen["images"]["front"], 2, 1), 2, 2)
        return {"images": {"front": picture}, "state": jnp.tile(seen["state"], 2)}


class Pushing(nnx.Module):
    """A policy of one number, the gain: its chunk is the noise times it."""

    def __init__(self, gain):
        self.gain, self.config = nnx.Param(jnp.float32(gain)), PolicyConfig(chunk=2)
        self.facts = DataFacts(9, 4, 16, (-0.1,) * 5, (0.1,) * 5, (0.0,) * 6, (1.0,) * 6)
        self.normalizer = Normalizer(self.facts)

    def encode(self, images, tokens, token_mask, branches):
        return dict.fromkeys(branches, images["front"].astype(jnp.float32).mean((1, 2))[:, None] / 255)

    def condition(self, reading, state, dimensions=None):
        return Condition(reading, None, state)

    conditions = Policy.conditions

    def sample(self, condition, noise, *, steps, transform):
        return self.gain[...] * noise


@pytest.fixture(scope="module")
def world(make_contract):  # noqa: F811
    """The point's world, and the policies by name of their run directories."""
    patch = pytest.MonkeyPatch()
    policies = {"pushes": (Pushing(1.0), make_contract()), "broken": (Pushing(np.nan), make_contract())}
    policies["fast"] = policies["pushes"][0], dataclasses.replace(make_contract(), control_hz=20.0)
    policies["foreign"] = policies["pushes"][0], dataclasses.replace(make_contract(), facts={})
    patch.setattr("vla_jax.evaluation.evaluate.Tabletop", Point)
    patch.setattr("vla_jax.training.improve.load_actor", lambda run_dir, step: (*policies[run_dir], TrainConfig()))
    patch.setattr("vla_jax.training.improve.newest_step", lambda run_dir: 7)
    yield policies
    patch.undo()


@pytest.fixture(scope="module")
def settings():
    return ImproveConfig(
        policy="pushes",
        arm="na",
        agent=AgentConfig(width=8, layers=1, batch_size=8),
        loop=LoopConfig(scenes=4, capacity=64, warmup=16, updates=0.5),
        eval=EvalConfig(splits=("in_distribution",), scenes=4, batch=4, execute=2, sampler_steps=1, videos=1),
        pool=4,
        steps=64,
        log_every=16,
        eval_every=32,
        checkpoint_every=32,
    )


@pytest.fixture(scope="module")
def finished(world, settings, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    improve(settings, run_dir)
    return run_dir


def arrays(run_dir) -> dict:
    loaded = Checkpoints(run_dir)._orbax.load_checkpointables(None)
    return {name: jax.device_get(part) for name, part in loaded.items()}


def lines(run_dir, kind):
    clocks = ("time", "seconds", "steps_per_second")
    return [
        {name: value for name, value in line.items() if name not in clocks}
        for line in metric_lines(run_dir)
        if line["kind"] == kind
    ]


def test_a_run_leaves_curves_films_and_an_untouched_policy(finished, world):
    seed = finished / "seed0"
    assert [line["step"] for line in lines(seed, "train")] == [16, 32, 48, 64]
    assert [line["step"] for line in lines(seed, "evaluation")] == [0, 32, 64]
    assert {"critic_loss", "distillation_loss", "entropy", "success", "value"} <= set(lines(seed, "train")[-1])
    assert (seed / "curve.png").stat().st_size > 1000 and (seed / "after.mp4").stat().st_size > 500
    outcome = json.loads((seed / "before_after.json").read_text())
    assert [outcome[name][0]["trials"] for name in ("before", "after", "greedy")] == [4, 4, 4]
    (start,) = json.loads((finished / "provenance.json").read_text())
    assert start["data"]["name"] == "toy"
    assert float(world["pushes"][0].gain[...]) == 1.0


def test_a_finished_run_loads_as_the_policy_that_it_became(finished, world):
    improved, contract, config = load_improved(finished)
    assert contract == world["pushes"][1] and config.arm == "na"
    saved = arrays(finished / "seed0")["run"]
    actor = [leaf for name, leaf in saved.items() if "/actor/" in name and "adam" not in name and "opt" not in name]
    ours = jax.tree.leaves(nnx.state(improved.source, nnx.Param))
    assert sorted(leaf.shape for leaf in ours) and all(any(np.array_equal(a, b) for b in actor) for a in ours)
    condition = Condition(jnp.ones((2, 3)), None, jnp.ones((2, 6)))
    assert improved.noise(condition, jax.random.key(0)).shape == (2, 2, 5)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(finished, settings, tmp_path, monkeypatch):
    log = Run._log

    def interrupted(run, *arguments):
        log(run, *arguments)
        os.kill(os.getpid(), signal.SIGINT)

    stopped = pytest.raises(Stopped, match="saved control step 16 of 64; go on with: ")
    with monkeypatch.context() as patch, stopped as stop:
        patch.setattr(Run, "_log", interrupted)
        improve(settings, tmp_path / "run")
    assert stop.value.status == 130
    improve(settings, tmp_path / "run", resume=True)
    ours, whole = arrays(tmp_path / "run" / "seed0"), arrays(finished / "seed0")
    jax.tree.map(np.testing.assert_array_equal, ours["run"], whole["run"])
    for kind in ("train", "evaluation"):
        assert lines(tmp_path / "run" / "seed0", kind) == lines(finished / "seed0", kind)


def test_numbers_that_are_not_finite_stop_the_run_and_leave_the_data(world, settings, tmp_path):
    bad = dataclasses.replace(settings, policy="broken", arm="fixed")
    with pytest.raises(UserError, match="not finite after control step 0: .*chunk.*nothing was saved yet"):
        improve(bad, tmp_path / "run")
    assert lines(tmp_path / "run" / "seed0", "evaluation")[0]["step"] == 0


def test_a_later_fault_names_the_checkpoint_that_is_kept(finished, settings, tmp_path, monkeypatch):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    broken = functools.partial(Collector, reward=lambda state, success: jnp.full(success.shape, jnp.nan))
    monkeypatch.setattr("vla_jax.training.improve.Collector", broken)
    with pytest.raises(UserError, match="not finite after control step 64: .*reward.*checkpoint of step 64, with its"):
        improve(dataclasses.replace(settings, steps=96), run_dir, resume=True)
    assert int(arrays(run_dir / "seed0")["run"]["replay/size"]) == 32


def test_a_policy_of_another_contract_is_refused(world, settings, tmp_path):
    with pytest.raises(UserError, match="control_hz: expected 20"):
        improve(dataclasses.replace(settings, policy="fast"), tmp_path / "run")
    with pytest.raises(UserError, match="does not say its task"):
        improve(dataclasses.replace(settings, policy="foreign"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_its_own_policy(finished, settings, tmp_path, monkeypatch):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for name in ("pushes", "broken"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="policy was 'pushes', is 'broken'"):
        improve(dataclasses.replace(settings, policy="broken"), run_dir, resume=True)


def test_a_used_directory_is_not_overwritten(finished, settings):
    with pytest.raises(UserError, match="is not empty: add --resume"):
        improve(settings, finished)
    other = dataclasses.replace(settings, agent=dataclasses.replace(settings.agent, discount=0.5))
    with pytest.raises(UserError, match="agent.discount was 0.95, is 0.5"):
        improve(other, finished, resume=True)


def test_a_run_keeps_the_checkpoint_that_was_the_newest_when_it_began(finished, settings, tmp_path, monkeypatch):
    run_dir, loaded = shutil.copytree(finished, tmp_path / "run"), []
    assert json.loads((run_dir / "config.json").read_text())["policy_step"] == 7
    load = improve.__globals__["load_actor"]

    def noted(policy, step):
        loaded.append(step)
        return load(policy, step)

    monkeypatch.setattr("vla_jax.training.improve.load_actor", noted)
    monkeypatch.setattr("vla_jax.training.improve.newest_step", lambda run_dir: 9)
    improve(settings, run_dir, resume=True)
    load_improved(run_dir)
    with pytest.raises(UserError, match="policy_step was 7, is 9"):
        improve(dataclasses.replace(settings, policy_step=9), run_dir, resume=True)
    assert loaded == [7, 7, 9]
    earlier = json.loads((run_dir / "config.json").read_text()) | {"policy_step": None}
    (run_dir / "config.json").write_text(json.dumps(earlier))
    improve(settings, run_dir, resume=True)
    assert json.loads((run_dir / "config.json").read_text())["policy_step"] == 9


def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(UserError, match="other scenes than those judged"):
        dataclasses.replace(settings, pool_seed=settings.eval.seed)
    with pytest.raises(UserError, match="arm must be one of sac, na"):
        dataclasses.replace(settings, arm="dsrl")
    with pytest.raises(UserError, match="no policy: give"):
        improve(dataclasses.replace(settings, policy=""), "unused")
