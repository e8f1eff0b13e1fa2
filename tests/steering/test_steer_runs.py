"""experiments.steer: what it takes from other runs, and which results it takes for its own."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import steer
from vla_jax.errors import UserError
from vla_jax.evaluation.evaluate import EvalConfig
from vla_jax.steering.steer import SteerConfig
from vla_jax.training.improve import ImproveConfig

LEARNED = ImproveConfig(policy="runs/base", policy_step=40, eval=EvalConfig(splits=("in_distribution",)))
LIKE_THEIRS = SteerConfig(steps=4)


def learned(monkeypatch, config=LIKE_THEIRS, path="runs/base", step=40, **changes):
    """What steering at a step of a policy takes from a DSRL run of these settings, or what it says against it."""
    improved = SimpleNamespace(noise="the learned noise"), None, dataclasses.replace(LEARNED, **changes)
    monkeypatch.setattr(steer, "load_improved", lambda run: improved)
    monkeypatch.setattr(steer, "newest_step", lambda run: 60)
    return steer._learned("runs/dsrl", Path(path), step, config)


def test_a_learned_noise_is_that_of_the_same_checkpoint(monkeypatch, capsys):
    assert learned(monkeypatch) == "the learned noise" and not capsys.readouterr().out
    assert learned(monkeypatch, step=60, policy_step=None) == "the learned noise", "of a run that wrote no number"
    for changes, message in (
        ({"arm": "cloning"}, "learned weights, no noise"),
        ({"path": "runs/other"}, "was learned for runs/base, not for runs/other"),
        ({"step": 60}, "learned for step 40 of runs/base, not for step 60: set --config.step=40"),
        ({"policy_step": None}, "learned for step 60 of runs/base, not for step 40"),
    ):
        with pytest.raises(UserError, match=message):
            learned(monkeypatch, **changes)


def test_a_noise_that_was_learned_for_another_sampler_is_said(monkeypatch, capsys):
    for config, said in (
        (SteerConfig(), "4 steps with guidance None, and is used in one of 10 with None"),
        (SteerConfig(steps=4, extrapolate=2.0), "4 steps with guidance None, and is used in one of 4 with 2.0"),
    ):
        assert learned(monkeypatch, config) == "the learned noise"
        assert said in capsys.readouterr().out
