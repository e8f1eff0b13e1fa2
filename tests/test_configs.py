"""Every file in configs/ is complete: it resolves to the settings of the entry point that its text names."""

import dataclasses
import functools
import importlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.studies import language_following
from configs.studies.language_following import VARIANTS
from configs.train import ARMS
from experiments import __main__ as verbs
from experiments import compare
from experiments.compare import CompareConfig
from experiments.evaluate import EvaluateConfig
from experiments.steer import SteerRunConfig
from experiments.study import StudyConfig
from vla_jax.config import resolve
from vla_jax.envs.collect import CollectConfig
from vla_jax.errors import UserError
from vla_jax.evaluation.evaluate import EvalConfig
from vla_jax.models.normalizer import DataFacts
from vla_jax.models.policy import LANGUAGE_MODEL, Policy
from vla_jax.steering.study import TARGET
from vla_jax.steering.terms import View
from vla_jax.steering.writer import read_program
from vla_jax.training.optimizer import learning_rate_scales
from vla_jax.training.state import abstract
from vla_jax.training.train_config import TrainConfig

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "name, schema",
    [
        ("collect", CollectConfig),
        ("evaluate", EvaluateConfig),
        ("quickstart", CompareConfig),
        ("overnight", CompareConfig),
        ("steer", SteerRunConfig),
        ("studies.language_following", StudyConfig),
    ],
)
def test_configs_resolve(name, schema):
    assert isinstance(resolve(schema, importlib.import_module(f"configs.{name}").get_config()), schema)


def test_a_policy_acts_by_a_branch_that_learned_to():
    for arm, wrong, message in (("vision", None, "posterior branch never"), ("queries", 2.0, "prior branch, which")):
        config = resolve(TrainConfig, importlib.import_module("configs.train").get_config(arm))
        config.check_guidance(config.eval.guidance)
        with pytest.raises(UserError, match=message):
            dataclasses.replace(config, eval=dataclasses.replace(config.eval, guidance=wrong))
        with pytest.raises(UserError, match=message):
            CompareConfig(arms={"first": TrainConfig(eval=EvalConfig(guidance=wrong)), arm: config}, reference="first")


def test_the_composed_config_chains_transforms_before_the_steering():
    config = resolve(SteerRunConfig, importlib.import_module("configs.steer").get_config("composed"))
    assert config.study.steer.extrapolate == 2.0 and config.study.steer.continued
    with pytest.raises(UserError, match="unknown kind 'pointng'.*pointing"):
        importlib.import_module("configs.steer").get_config("pointng")


def test_the_pointing_config_asks_for_nothing_that_a_pointer_does_not_know():
    config = resolve(SteerRunConfig, importlib.import_module("configs.steer").get_config("pointing"))
    assert "wrong_target" not in config.study.arms and "in_distribution" in config.study.shifts


def test_the_picking_config_guides_down_until_the_gripper_has_closed():
    config = resolve(SteerRunConfig, importlib.import_module("configs.steer").get_config("picking"))
    text = (ROOT / config.writer.path).read_text().replace(TARGET, "cube")
    program = read_program(text, ("cube",), View(np.full((1, 3), 0.03), np.full((1, 3), 0.03)))
    assert [(stage.name, stage.until) for stage in program.stages] == [
        ("above", "reward"),
        ("down", "gripper"),
        ("lift", "reward"),
    ]


@pytest.mark.parametrize("arm", ARMS)
def test_arms_resolve(arm):
    config = resolve(TrainConfig, importlib.import_module("configs.train").get_config(arm))
    assert config.arm == arm


@pytest.mark.parametrize("name", ["bayesianvla_qwen3vl_4b", "bayesianvla_paligemma"])
@pytest.mark.parametrize("argument", ["bayesianvla", "qwen_groot", "bayesianvla,frozen", "bayesianvla,lora"])
def test_policies_on_released_models_are_complete(name, argument):
    config = resolve(TrainConfig, importlib.import_module(f"configs.{name}").get_config(argument))
    facts = DataFacts(100, 24, 224, (-1.0,) * 7, (1.0,) * 7, (-1.0,), (1.0,))
    _, shapes, _ = abstract(lambda rngs: Policy(config.policy, facts, rngs))
    assert (config.policy.queries, config.policy.chunk, config.policy.expert.depth) == (64, 16, 16)
    assert ("queries" in shapes) == (argument != "qwen_groot")
    scales = learning_rate_scales(config.optimizer, shapes)
    billions = {factor: sum(shapes[p].size for p in shapes if scales[p] == factor) / 1e9 for factor in (0.0, 0.1, 1.0)}
    expert = sum(leaf.size for path, leaf in shapes.items() if path.startswith("expert/")) / 1e9
    assert 0.13 < expert < 0.2
    if argument.endswith("lora"):
        assert 0.01 < billions[1.0] - expert < 0.05 and billions[0.0] > 2.8
    else:
        assert billions[1.0] == pytest.approx(expert) and billions[0.1] > 1.9
        assert (billions[0.0] > 0.4) == argument.endswith("frozen")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_the_study_differs_from_its_arm_as_it_says(name):
    arm, difference = VARIANTS[name]
    arms = resolve(StudyConfig, language_following.get_config(f"{name},{arm}")).arms
    for path, value in difference.items():
        assert functools.reduce(getattr, path.split("."), arms[name]) == value
        assert functools.reduce(getattr, path.split("."), arms[arm]) != value
    assert name not in resolve(StudyConfig, language_following.get_config()).arms


@pytest.mark.parametrize(
    "name, factor", [("slow_baseline", 0.1), ("slow_pointing", 0.1), ("frozen_queries", 0.0), ("pointing_only", 0.0)]
)
def test_a_slow_or_frozen_language_model_is_the_whole_of_it(name, factor):
    """Word embeddings too, whose path is one name without a slash; and nothing else."""
    config = resolve(StudyConfig, language_following.get_config(name)).arms[name]
    facts = DataFacts(100, 24, 64, (-1.0,) * 5, (1.0,) * 5, (-1.0,), (1.0,))
    _, shapes, _ = abstract(lambda rngs: Policy(config.policy, facts, rngs))
    scales = learning_rate_scales(config.optimizer, shapes)
    assert {path for path, scale in scales.items() if scale == factor} == {
        path for path in shapes if path.split("/")[0] in LANGUAGE_MODEL
    }
    assert set(scales.values()) == {factor, 1.0} and scales["expert/action_in/kernel"] == 1.0


def test_a_misspelt_arm_gets_a_suggestion():
    with pytest.raises(UserError, match="bayesianvla"):
        importlib.import_module("configs.train").get_config("bayesanvla")
    with pytest.raises(UserError, match="unknown mode 'lorra'.*lora"):
        importlib.import_module("configs.bayesianvla_paligemma").get_config("bayesianvla,lorra")


@pytest.mark.parametrize("name", ["quickstart", "overnight"])
def test_compared_arms_differ_in_the_objective_alone(name):
    config = resolve(CompareConfig, importlib.import_module(f"configs.{name}").get_config())
    assert config.names() == ["baseline", "bayesianvla"]
    arms = config.arms
    first, second = arms["baseline"], arms["bayesianvla"]
    assert (first.steps, first.data, first.optimizer, first.seed) == (
        second.steps,
        second.data,
        second.optimizer,
        second.seed,
    )
    assert (first.policy.conditioning, second.policy.conditioning) == ("tokens", "queries")
    assert first.policy.keypoints == second.policy.keypoints and first.policy.trunk == second.policy.trunk


def test_a_stopped_comparison_goes_on_by_the_same_command(tmp_path, monkeypatch):
    """experiments.compare continues by itself: it has no --resume to advise."""
    advised = []
    monkeypatch.setattr(
        compare, "train", lambda config, run_dir, resume, resume_command: advised.append(resume_command)
    )
    compare.train_once(TrainConfig(), tmp_path / "run")
    assert advised == [shlex.join(sys.orig_argv)] and "--resume" not in advised[0]


def test_every_entry_point_is_listed_with_what_it_does():
    lines = verbs.summary().splitlines()
    assert any(line.startswith("python -m experiments.train ") and "Trains a policy" in line for line in lines)
    assert all(line.endswith(".") for line in lines)


NOTES = (ROOT / "experiments/README.md").read_text()
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", NOTES, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command[2]} {command[-1]}")
def test_commands_of_the_lab_notes_have_settings_that_resolve(command, monkeypatch):
    class Resolved(Exception):
        pass

    def stop(*arguments):
        resolve(*arguments)
        raise Resolved

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("vla_jax.config.resolve", stop)
    python, option, module, *arguments = command
    assert (python, option) == ("python", "-m")
    with pytest.raises(Resolved):
        importlib.import_module(module).main(arguments)


def test_the_lab_notes_list_every_entry_point():
    listed = re.findall(r"^\| `(\w+)` \|", NOTES, re.MULTILINE)
    assert sorted(listed) == [line.split()[2].split(".")[1] for line in verbs.summary().splitlines()]
