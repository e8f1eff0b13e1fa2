"""Mistakes in a configuration are found at the start and named; everything else arrives as typed."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest
from ml_collections import ConfigDict

from vla_jax import config as C
from vla_jax.errors import UserError

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Trunk:
    width: int = 64
    layers: int = 2
    kind: Literal["causal", "full"] = "causal"


@dataclasses.dataclass(frozen=True)
class Model:
    trunk: Trunk = Trunk()
    views: tuple[str, ...] = ("front",)
    size: tuple[int, int] = (64, 64)
    expert: Trunk | None = None


@dataclasses.dataclass(frozen=True)
class Root:
    directory: str
    steps: int = 10
    rate: float = 1e-3
    decay: float | None = None
    fast: bool = False
    model: Model = Model()
    scales: dict[str, float] = dataclasses.field(default_factory=dict)
    arms: dict[str, Trunk] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError("steps must not be negative")


FILE = """
from ml_collections import ConfigDict

def get_config(arg="small"):
    config = ConfigDict(dict(directory="d", steps=5, rate=1, model=dict(trunk=dict(width=8))))
    if arg == "big":
        config.model.trunk.width = 512
    return config
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "root.py"
    path.write_text(FILE)
    return str(path)


def test_resolve_nested_and_converts_to_the_declared_types():
    mapping = ConfigDict(
        {"directory": "d", "rate": 1, "model": {"trunk": {"layers": 3}, "views": ["a", "b"], "expert": {"width": 1}}}
    )
    root = C.resolve(Root, {**mapping.to_dict(), "scales": {"vision": 1}})
    assert root.rate == 1.0 and isinstance(root.rate, float)
    assert root.model == Model(trunk=Trunk(layers=3), views=("a", "b"), expert=Trunk(width=1))
    assert root.scales == {"vision": 1.0}
    assert C.resolve(Root, root) is root


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"directory": "d", "model": {"trnk": {}}}, "unknown key 'model.trnk': did you mean 'model.trunk'?"),
        ({"directory": "d", "zzz": 1}, "unknown key 'zzz': known are 'directory', 'steps'"),
        ({"directory": "d", "steps": 1.5}, "'steps' must be a whole number, not 1.5"),
        ({"directory": "d", "steps": True}, "'steps' must be a whole number, not True"),
        ({"directory": "d", "steps": -1}, "steps must not be negative"),
        ({"directory": "d", "fast": 1}, "'fast' must be true or false, not 1"),
        ({"directory": "d", "rate": "fast"}, "'rate' must be a number, not 'fast'"),
        ({"directory": "d", "decay": "x"}, "'decay' must be a number, not 'x'"),
        ({"directory": "d", "model": {"trunk": {"kind": "casual"}}}, "did you mean 'causal'?"),
        ({"directory": "d", "model": {"views": "front"}}, "'model.views' must be a tuple, not 'front'"),
        ({"directory": "d", "model": {"views": [1]}}, "'model.views.0' must be a text, not 1"),
        ({"directory": "d", "model": {"size": [1, 2, 3]}}, "'model.size' must have 2 entries, not 3"),
        ({"directory": "d", "model": 3}, "'model' must be a group of settings (Model), not 3"),
        ({"directory": "d", "scales": {"a": "b"}}, "'scales.a' must be a number"),
        ({}, "missing setting 'directory'"),
    ],
)
def test_resolve_names_the_mistake(mapping, message):
    with pytest.raises(UserError) as error:
        C.resolve(Root, mapping)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_arguments_reach_the_dataclass(file):
    argv = [
        f"--config={file}:big",
        "--workdir",
        "runs/x",
        "--resume",
        "--config.rate=0.5",  # the file holds the int 1
        "--config.decay=1e-2",  # not in the file, but in the schema
        "--config.model.views=front,wrist",
        "--config.model.size=(32, 48)",
        "--config.directory=2026",  # a text that looks like a number
        "--config.fast=true",
        "--config.model.expert.width=7",
        "--config.scales={'trunk': 2}",
        "--split=swapped",
    ]
    arguments = C.parse_args(argv, schema=Root, flags=("resume", "quiet"), options=("split", "name"))
    root = C.resolve(Root, arguments.config)
    assert (root.rate, root.decay, root.directory, root.fast, root.steps) == (0.5, 0.01, "2026", True, 5)
    assert root.model == Model(Trunk(width=512), ("front", "wrist"), (32, 48), Trunk(width=7))
    assert root.scales == {"trunk": 2.0}
    assert arguments.workdir == "runs/x"
    assert arguments.flags == {"resume": True, "quiet": False, "split": "swapped", "name": None}


def test_without_a_schema_values_take_the_type_of_the_file(file):
    arguments = C.parse_args([f"--config={file}", "--config.steps=7", "--config.directory=5"])
    assert (arguments.config.steps, arguments.config.directory) == (7, "5")
    with pytest.raises(UserError, match="'steps' must be a whole number"):
        C.parse_args([f"--config={file}", "--config.steps=many"])


def test_a_setting_without_its_group_gets_the_groups_that_have_it(file):
    with pytest.raises(
        UserError, match="unknown key 'width': did you mean 'model.trunk.width' or 'model.expert.width'"
    ):
        C.parse_args([f"--config={file}", "--config.width=3"], schema=Root)


@pytest.mark.parametrize("schema", [Root, None])
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.model.trunk.widht=3", "unknown key 'model.trunk.widht': did you mean 'model.trunk.width'?"),
        ("--config.model.trnk.width=3", "unknown key 'model.trnk': did you mean 'model.trunk'?"),
        ("--resum", "unknown flag '--resum': did you mean '--resume'?"),
        ("--wokdir=x", "unknown flag '--wokdir': did you mean '--workdir'?"),
        ("--workdir", "--workdir needs a value"),
        ("--workdir=gs://bucket/runs", "is no directory: mount the bucket"),
        ("steps=3", "unexpected argument 'steps=3'"),
        ("--resume=maybe", "must be true or false"),
        ("--config.steps=3.5", "'steps' must be a whole number, not 3.5"),
    ],
)
def test_misspelt_arguments_get_a_suggestion(file, flag, message, schema):
    with pytest.raises(UserError) as error:
        C.parse_args([f"--config={file}", flag], schema=schema, flags=("resume",))
    assert message in str(error.value)


def test_entries_of_a_mapping_are_those_of_the_file(tmp_path):
    path = tmp_path / "arms.py"
    path.write_text("def get_config():\n    return {'directory': 'd', 'arms': {'small': {'width': 1}, 'big': {}}}\n")
    flags = ["--config.arms.small.layers=5", "--config.arms.big.width=9"]
    root = C.resolve(Root, C.parse_args([f"--config={path}", *flags], schema=Root).config)
    assert root.arms == {"small": Trunk(width=1, layers=5), "big": Trunk(width=9)}
    for flag, message in {
        "--config.arms.smal.layers=5": "unknown key 'arms.smal': did you mean 'arms.small'?",
        "--config.arms.small.layer=5": "unknown key 'arms.small.layer': did you mean 'arms.small.layers'?",
    }.items():
        with pytest.raises(UserError) as error:
            C.parse_args([f"--config={path}", flag], schema=Root)
        assert message in str(error.value)


def test_setting_below_a_plain_value_is_an_error(file):
    with pytest.raises(UserError, match="'steps' has no settings inside"):
        C.parse_args([f"--config={file}", "--config.steps.x=3"], schema=Root)


def test_missing_config_file_names_the_nearest(file, tmp_path):
    with pytest.raises(UserError, match="no config file .*did you mean '.*root.py'"):
        C.parse_args([f"--config={tmp_path}/rot.py"])
    with pytest.raises(UserError, match="no configuration"):
        C.parse_args([])
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="defines no get_config"):
        C.load_config(str(tmp_path / "empty.py"))
    (tmp_path / "plain.py").write_text("def get_config():\n    return {'steps': 1}\n")
    with pytest.raises(UserError, match="takes no argument"):
        C.load_config(str(tmp_path / "plain.py") + ":big")
    assert C.load_config(str(tmp_path / "plain.py")).steps == 1


def test_json_round_trip_and_diff():
    root = Root("d", decay=0.1, model=Model(expert=Trunk(3)), scales={"a": 2.0})
    assert C.from_json(Root, C.to_json(root)) == root
    assert C.diff(root, Root("d", decay=0.1, model=Model(expert=Trunk(3)), scales={"a": 2.0})) == {}
    other = dataclasses.replace(root, steps=3, model=Model())
    changed = C.diff(root, other)
    assert changed["steps"] == (10, 3)
    assert changed["model.expert.width"] == (3, None)
    assert set(changed) == {"steps", "model.expert", *(f"model.expert.{k}" for k in ("width", "layers", "kind"))}


ENTRY = """
import errno, sys, time
from vla_jax.config import run_entry
from vla_jax.errors import UserError

def main(argv):
    if argv[0] == "user":
        raise UserError("put it right")
    if argv[0] == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")
    if argv[0] == "wait":
        print("ready", flush=True)
        time.sleep(60)
    raise RuntimeError("a bug")

run_entry(main)
"""


@pytest.mark.parametrize(
    ("argument", "status", "message"),
    [("user", 2, "error: put it right\n"), ("full", 2, "error: no space left on the disk at 'runs/x/metrics.jsonl'")],
)
def test_entry_points_print_one_line(argument, status, message):
    done = subprocess.run([sys.executable, "-c", ENTRY, argument], capture_output=True, text=True, timeout=200)
    assert done.returncode == status
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback_and_an_interrupt_is_130():
    done = subprocess.run([sys.executable, "-c", ENTRY, "bug"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and "Traceback" in done.stderr and "a bug" in done.stderr
    process = subprocess.Popen(
        [sys.executable, "-c", ENTRY, "wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell that runs the tests in the background has its children ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=200)
    assert (process.returncode, errors) == (130, b"interrupted\n")


def test_importing_the_package_is_light():
    code = (
        "import sys, time; start = time.perf_counter(); import vla_jax; print(time.perf_counter() - start); "
        "print([name for name in ('jax', 'tensorflow', 'torch', 'flax') if name in sys.modules])"
    )
    seconds, heavy = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200
    ).stdout.splitlines()
    assert float(seconds) < 1.0
    assert heavy == "[]"


def test_help_says_what_can_be_given(capsys):
    with pytest.raises(SystemExit) as stop:
        C.parse_args(["--help"], default_config="configs/x.py", flags=("resume",), options=("split",))
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(
        "usage: --config=configs/x.py[:ARG] [--config.KEY=VALUE …] [--workdir=DIR] [--resume] [--split=…]\n"
    )
    command = [sys.executable, "-m", "experiments.evaluate", "--help"]
    said = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=120).stdout
    assert "--compare=runs/y" in said and "ema: averaged weights" in said, "the module's text and the schema's"


def test_entry_points_start_without_the_libraries_that_draw():
    hide = "import sys; sys.modules.update(dict.fromkeys(('matplotlib', 'PIL', 'av', 'tensorboardX')))"
    verbs = "collect, convert, inspect, train, evaluate, compare, study, balance, steer, dsrl, plan"
    command = [sys.executable, "-c", f"{hide}; from experiments import {verbs}"]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
