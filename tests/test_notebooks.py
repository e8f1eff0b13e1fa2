"""From demonstrations to the notebooks: a tiny run is collected, trained, judged, reported and looked at."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from experiments import evaluate
from experiments.compare import CompareConfig, run
from experiments.evaluate import main
from experiments.steer import SteerRunConfig, WriterConfig
from experiments.steer import run as steer
from experiments.study import StudyConfig
from experiments.study import run as study
from vla_jax.analysis.imagine import Imagination, guidances, with_reasoning
from vla_jax.analysis.plots import plot_branches, plot_imagined
from vla_jax.analysis.runs import compare_runs, load_run, sibling_runs, success_table
from vla_jax.config import to_json
from vla_jax.data.contract import Contract
from vla_jax.data.loader import DataConfig, make_loader
from vla_jax.data.rlds import dataset_path
from vla_jax.envs.camera import project
from vla_jax.envs.collect import CollectConfig
from vla_jax.envs.env import EnvConfig
from vla_jax.errors import UserError
from vla_jax.evaluation.evaluate import EvalConfig
from vla_jax.evaluation.study import load_cells
from vla_jax.losses.objective import LossConfig
from vla_jax.models.expert import ExpertConfig
from vla_jax.models.policy import PolicyConfig
from vla_jax.models.trunk import TrunkConfig
from vla_jax.models.vision import VisionConfig
from vla_jax.steering.steer import SteerConfig
from vla_jax.steering.study import SteerStudyConfig
from vla_jax.training.checkpoints import load_policy
from vla_jax.training.optimizer import OptimizerConfig
from vla_jax.training.train_config import TrainConfig
from vla_jax.training.trainer import train

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SPLITS = ("in_distribution", "swapped", "blank")


def tiny_comparison() -> CompareConfig:
    """Two arms that differ by name alone, so that nothing is compiled twice."""
    small = {"width": 8, "heads": 1, "hidden": 8}
    arm = TrainConfig(
        data=DataConfig(batch_size=4, chunk=4, threads=1, held_out_fraction=0.2),
        policy=PolicyConfig(
            vision=VisionConfig(depth=1, **small),
            trunk=TrunkConfig(depth=1, kv_heads=1, head_width=8, **small),
            expert=ExpertConfig(depth=2, head=8, **small),
            queries=2,
            chunk=4,
        ),
        loss=LossConfig(noise_draws=1),
        optimizer=OptimizerConfig(warmup_steps=2),
        eval=EvalConfig(splits=SPLITS, scenes=4, batch=6, execute=2, sampler_steps=1, videos=1),
        steps=4,
        log_every=1,
        validate_every=0,
        eval_every=0,
        checkpoint_every=4,
    )
    demonstrations = CollectConfig(env=EnvConfig(task="reach", image_size=16), episodes=8, batch=8)
    return CompareConfig(demonstrations, {"baseline": arm, "full": arm})


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """A whole comparison at the smallest size."""
    place = tmp_path_factory.mktemp("runs")
    run(tiny_comparison(), place)
    return [place / "baseline", place / "full"]


@pytest.fixture(scope="module")
def token_run(runs, tmp_path_factory) -> Path:
    """A run of the all-token baseline. Its results are another's: judging it would compile one more program."""
    full, place = tiny_comparison(), tmp_path_factory.mktemp("other") / "tokens"
    arm, demonstrations = full.arms["full"], dataset_path(runs[0].parent / "data", full.collect.dataset_name)
    arm = dataclasses.replace(
        arm,
        data=dataclasses.replace(arm.data, directory=str(demonstrations)),
        policy=dataclasses.replace(arm.policy, conditioning="tokens"),
        loss=LossConfig(prior_weight=0, llr_weight=0, noise_draws=1),
    )
    train(arm, place)
    shutil.copytree(runs[0] / "evaluation", place / "evaluation")
    return place


def test_a_comparison_goes_on_where_it_stopped(runs, monkeypatch, capsys):
    place = runs[0].parent
    before = json.loads((place / "results.json").read_text())
    assert {(row["arm"], row["split"]) for row in before["rows"]} == {
        (arm, split) for arm in ("baseline", "full") for split in SPLITS
    }
    same = {row["split"]: (row["difference"], row["arm"], row["against"]) for row in before["comparisons"]}
    assert same == dict.fromkeys(SPLITS, (0.0, "full", "baseline"))
    monkeypatch.delattr("experiments.compare.train")
    monkeypatch.delattr("experiments.compare.collect")
    assert run(tiny_comparison(), place) == place / "report.html"
    assert json.loads((place / "results.json").read_text()) == before
    out = capsys.readouterr().out
    assert "is there already" in out and out.count("is trained already") == 2


@pytest.mark.slow
def test_a_study_grows_cell_by_cell(runs, tmp_path, monkeypatch):
    arm = dataclasses.replace(tiny_comparison().arms["full"], steps=3, checkpoint_every=3)
    config = StudyConfig(tiny_comparison().collect, {"a": arm, "b": arm}, unbiased=("b",), rhos=(0.5,), seeds=1)
    study(config, tmp_path)
    first = json.loads((tmp_path / "study.json").read_text())
    assert {(row["arm"], row["split"], row["seeds"]) for row in first["rows"]} == {
        (arm, split, 1) for arm in "ab" for split in SPLITS
    }
    assert [row["arm"] for row in first["comparisons"]] == ["b"] * len(SPLITS)
    for rho, arm_name in ((0.5, "a"), (1.0, "b")):
        run_dir = tmp_path / "runs" / f"uniqueness-rho{rho:g}-{arm_name}-seed0"
        assert Contract.load(run_dir / "contract.json").facts["rho"] == rho
    marks = {result.cell.arm: result.fingerprints for result in load_cells(tmp_path / "results")}
    assert marks["a"] == marks["b"], "both met the scenes of rho = 0.5"
    assert load_run(tmp_path / "runs" / "uniqueness-rho0.5-a-seed0").last.step == 3, "a run opens by itself"
    assert (tmp_path / "study.png").is_file() and "### uniqueness, ρ = 0.5" in (tmp_path / "study.md").read_text()
    with monkeypatch.context() as context:
        context.delattr("experiments.study.train_once")
        study(config, tmp_path)
    assert json.loads((tmp_path / "study.json").read_text()) == first
    monkeypatch.delattr("experiments.compare.train")  # unbiased data are the same for every rho, and so is the training
    study(dataclasses.replace(config, arms={"b": arm}, rhos=(0.2,)), tmp_path)
    assert {row["rho"] for row in json.loads((tmp_path / "study.json").read_text())["rows"]} == {0.2, 0.5}


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a worker needs a core")
def test_a_study_is_spread_over_workers(tmp_path):
    arm = dataclasses.replace(tiny_comparison().arms["full"], steps=3, checkpoint_every=3)
    fails = dataclasses.replace(arm, data=dataclasses.replace(arm.data, held_out_fraction=0.999))
    config = StudyConfig(tiny_comparison().collect, {"a": arm, "fails": fails, "b": arm}, rhos=(0.3,), seeds=1)
    file = tmp_path / "config.py"
    file.write_text(f"import json\n\n\ndef get_config():\n    return json.loads({to_json(config)!r})\n")
    place, command = tmp_path / "study", [sys.executable, "-m", "experiments.study", f"--config={file}"]
    command += [f"--workdir={tmp_path / 'study'}", "--config.rhos=(0.5,)", f"--config.workers={2}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "3 of 3 cells" not in done.stdout, done.stdout + done.stderr
    assert f"1 of 3 cells failed: uniqueness-rho0.5-fails-seed0 (see {place}/logs/" in done.stderr
    assert {row["arm"] for row in json.loads((place / "study.json").read_text())["rows"]} == {"a", "b"}
    logs = {name: (place / "logs" / f"uniqueness-rho0.5-{name}-seed0.log").read_text() for name in config.arms}
    assert "in the split 'train'" in logs["fails"]
    assert sum("is there already" in log for log in logs.values()) == 2, "one worker collected for all"


def test_evaluation_leaves_numbers_and_a_page(runs):
    for run_dir, arm in zip(runs, ("baseline", "full"), strict=True):
        rows = json.loads((run_dir / "results.json").read_text())["rows"]
        assert [(row["arm"], row["split"], row["step"], row["trials"]) for row in rows] == [
            (arm, split, 4, 4) for split in SPLITS
        ]
    page = (runs[0].parent / "report.html").read_text()
    assert "full − baseline" in page and "data:video/mp4;base64," in page
    assert not any((run_dir / "report.html").exists() for run_dir in runs)
    assert (runs[0].parent / "report.png").is_file()


def test_settings_change_one_evaluation(runs, tmp_path, capsys):
    run_dir = shutil.copytree(runs[1], tmp_path / "run")
    before = load_run(run_dir).last
    command = [f"--workdir={run_dir}", f"--config={ROOT}/configs/evaluate.py", f"--report={tmp_path}/page.html"]
    with pytest.raises(UserError, match="did you mean 'eval.scenes'"):
        main([*command, "--config.eval.scnes=3"])
    changes = ["--config.eval.scenes=3", "--config.eval.splits=('swapped',)", "--config.eval.guidance=2.0"]
    main([*command, *changes, "--config.eval.videos=0"])
    assert (tmp_path / "page.html").is_file() and not (run_dir / "report.html").exists()
    (row,) = json.loads((run_dir / "results.json").read_text())["rows"]
    assert row["split"] == "swapped" and row["trials"] == 3
    name = f"{before.step:08d}-guidance=2.0,scenes=3,splits=swapped.json"
    assert (run_dir / "evaluation" / name).is_file() and load_run(run_dir).last == before
    assert "full guidance=2.0<small>step 4<" in (tmp_path / "page.html").read_text()
    assert f"report: {tmp_path}/page.html" in capsys.readouterr().out


@pytest.mark.parametrize("asked", ["eval.guidance=2.0", "choose_guidance=(0.5,2)"])
def test_guidance_needs_a_prior_branch_that_learned(token_run, asked):
    command = [f"--workdir={token_run}", f"--config={ROOT}/configs/evaluate.py", f"--config.{asked}"]
    with pytest.raises(UserError, match="loss.prior_weight above 0 alone"):
        evaluate.main(command)


def test_held_out_demonstrations_choose_the_guidance(runs, tmp_path, capsys, monkeypatch):
    run_dir, asked = shutil.copytree(runs[1], tmp_path / "run"), []

    def curve(policy, batches, weights):
        asked.append((batches, weights))
        return weights[1], np.array([1.0, 3.0, 2.0])

    monkeypatch.setattr(evaluate, "guidance_curve", curve)
    command = [f"--workdir={run_dir}", "--config.choose_guidance=(0.5,2,3)", "--config.eval.splits=('swapped',)"]
    evaluate.main([*command, f"--config={ROOT}/configs/evaluate.py", "--config.eval.videos=0"])
    ((batches, weights),) = asked
    assert weights == (0.5, 2.0, 3.0) and len(batches) == TrainConfig().validation_batches
    _, contract, trained = load_policy(run_dir)
    with contextlib.closing(make_loader(trained.data, contract)) as loader:
        learned = {int(number) for batch in islice(loader, 20) for number in batch["episode"]}
    assert learned.isdisjoint(int(number) for batch in batches for number in batch["episode"])
    out = capsys.readouterr().out
    assert "w = 0.5: 1.00   w = 2: 3.00   w = 3: 2.00" in out and "guidance: 2\n" in out
    (row,) = json.loads((run_dir / "results.json").read_text())["rows"]
    assert row["arm"] == "full guidance=2.0"


def test_runs_are_compared_in_pairs(runs):
    baseline, full = (load_run(run_dir) for run_dir in runs)
    assert [run.name for run in sibling_runs(full)] == ["baseline"]
    assert {row["split"] for row in compare_runs(baseline, full)} == set(SPLITS)
    assert success_table(baseline, full).count("swapped") == 2
    assert list(full.metrics["loss"].steps) == [1, 2, 3, 4]


def test_another_instruction_is_imagined_in_the_same_scene(runs):
    policy, contract, config = load_policy(runs[1])
    imagination = Imagination(contract, config.eval)
    texts = imagination.instructions(0)
    assert len(set(texts)) == len(texts) == 3  # one for each object
    seen = imagination(policy, 0, size=64)
    assert seen.texts == texts and seen.picture.shape == (64, 64, 3) and seen.picture.std() > 10
    assert np.isfinite(seen.pixels).all()
    # The same scene: all paths begin at one point, which the front camera sees.
    assert np.ptp(seen.path[:, 0], axis=0).max() < 1e-6
    assert (0 < seen.pixels[:, 0]).all() and (seen.pixels[:, 0] < 64).all()
    words = {f"{color} {shape}" for color in ("red", "green", "blue", "yellow", "purple", "cyan")
             for shape in ("cube", "cylinder", "ball")}  # fmt: skip
    assert set(seen.ended_at) <= words and seen.cue in words
    assert len(plot_imagined(seen).axes[0].lines) == 9
    with pytest.raises(UserError, match="unknown word 'banana'"):
        imagination(policy, 0, ["touch the banana"])


def test_the_first_moment_of_a_case_is_what_the_policy_sees(runs):
    policy, contract, config = load_policy(runs[1])
    imagination = Imagination(contract, config.eval)
    start, case = imagination.start(0), imagination.case(0)
    texts = imagination.instructions(0)
    assert all(any(name in text for text in texts) for name in start.names) and start.cue in start.names
    assert {view: picture.shape for view, picture in start.observation["images"].items()} == dict.fromkeys(
        policy.config.views, (1, 16, 16, 3)
    )
    # A thing is where the camera sees its place.
    _, camera = imagination._look(case.scene, case.command, case.cue, 16)
    position = np.asarray(case.scene.position)[0][np.asarray(case.scene.present)[0]]
    pixels, _ = project(camera, np.pad(position, ((0, 0), (0, 1)), constant_values=0.02), height=16, width=16)
    for thing, (column, row) in enumerate(np.asarray(pixels)):
        rows, columns = np.nonzero(start.things["front"] == thing)
        assert np.hypot(columns.mean() + 0.5 - column, rows.mean() + 0.5 - row) < 1.5
    assert with_reasoning(policy, contract, start, texts) == texts
    policy.config = dataclasses.replace(policy.config, reasoning=2)
    for text, said in zip(texts, with_reasoning(policy, contract, start, texts), strict=True):
        assert said.startswith(f"{text} ") and len(said.split()) <= len(text.split()) + 2  # padding is no word
    chunks = imagination.demonstrated(0, 4)
    assert chunks.shape == (3, 4, 5)
    way = position - np.asarray(case.scene.tcp)[0, :2]
    assert ((chunks[..., :2].sum(1) * way).sum(-1) > 0).all(), "the expert goes to what each instruction names"


def test_the_branches_are_imagined_apart(runs, token_run):
    policy, contract, config = load_policy(runs[1])
    imagination = Imagination(contract, config.eval)
    ways = guidances(policy, 3.0)
    assert list(ways.values()) == [1.0, 0.0, 3.0] and guidances(load_policy(token_run)[0], 3.0) == {"the policy": None}
    posterior, prior, guided = (imagination(policy, 0, size=64, guidance=w).path for w in ways.values())
    judged = imagination(policy, 0, size=64)
    np.testing.assert_allclose(posterior, judged.path, atol=1e-4)
    np.testing.assert_allclose(prior, prior[:1].repeat(3, 0), atol=1e-6)  # it has not read the words
    apart = [np.abs(path - path[:1]).max() for path in (prior, posterior, guided)]
    assert apart[0] < apart[1] < apart[2]
    assert [len(axis.lines) for axis in plot_branches({"a": judged, "b": judged}).axes] == [9, 9]


def execute(name: str, run_dir: Path, monkeypatch, variable: str = "VLA_JAX_RUN") -> tuple[int, str]:
    """Runs a notebook on a run: how many pictures it shows, and all that it prints."""
    monkeypatch.setenv(variable, str(run_dir))
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return pictures, "".join(output.get("text", "") for output in outputs)


def test_first_look_runs(runs, monkeypatch):
    pictures, text = execute("first_look.ipynb", runs[1], monkeypatch)
    assert pictures == 6 and "full minus baseline" in text


@pytest.mark.parametrize("kind", ["queries", pytest.param("tokens", marks=pytest.mark.slow)])
def test_language_following_runs(kind, runs, token_run, monkeypatch):
    pictures, text = execute("language_following.ipynb", runs[1] if kind == "queries" else token_run, monkeypatch)
    assert pictures == 7 and "swapped" in text and "the look suggests" in text


def test_steering_runs(runs, monkeypatch):
    pictures, text = execute("steering.ipynb", runs[1], monkeypatch)
    assert pictures == 2 and "keypoint on the" in text and '"term": "distance"' in text


@pytest.mark.parametrize("place", ["stage0_32000", pytest.param("", marks=pytest.mark.slow)])
def test_study_runs(place, tmp_path, monkeypatch):
    cells = ROOT / "docs/results/language_following" / place
    (tmp_path / "results").symlink_to(cells)
    pictures, text = execute("study.ipynb", tmp_path if place else cells, monkeypatch, "VLA_JAX_STUDY")
    assert pictures == 5 and "against baseline" in text and "minus " in text
    with pytest.raises(CellExecutionError, match="set VLA_JAX_STUDY to its --workdir"):
        execute("study.ipynb", tmp_path / "nothing", monkeypatch, "VLA_JAX_STUDY")


def test_steering_arms_are_kept_and_compared(runs, tmp_path, monkeypatch, capsys):
    config = SteerRunConfig(
        study=SteerStudyConfig(
            shifts=("swapped",),
            arms=("best_of_n", "full"),
            scenes=3,
            batch=2,
            execute=2,
            steer=SteerConfig(particles=2, steps=2),
        ),
        writer=WriterConfig(path=str(ROOT / "configs/steering/reach.json")),
    )
    rows = steer(config, [runs[1]], tmp_path)
    assert [(row["arm"], row["trials"], row["without_program"]) for row in rows] == [
        ("best_of_n", 3, 0),
        ("full", 3, 0),
    ]
    assert set(rows[1]["against"]) == {"best_of_n"}
    kept = json.loads((tmp_path / "results" / "full" / "swapped-full.json").read_text())
    assert len(kept["success"]) == len(kept["at_other"]) == 3
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows
    assert "| full | " in (tmp_path / "results.md").read_text() and "full swapped full: " in capsys.readouterr().out
    with pytest.raises(UserError, match="learned no questions, so it cannot point"):
        steer(config, [runs[1]], tmp_path / "pointed", pointer=str(runs[1]))
    monkeypatch.delattr("experiments.steer.SteerStudy")
    assert steer(config, [runs[1]], tmp_path) == rows, "what is finished is not run again"
    other = dataclasses.replace(config, study=dataclasses.replace(config.study, guide=1.0))
    with pytest.raises(UserError, match="other settings"):
        steer(other, [runs[1]], tmp_path)
    with pytest.raises(UserError, match="same directory name"):
        steer(config, [runs[1], runs[1]], tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_kept_without_outputs(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert cells and all(not cell.outputs and cell.execution_count is None for cell in cells)
