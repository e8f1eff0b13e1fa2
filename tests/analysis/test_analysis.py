import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from vla_jax.analysis.imagine import Imagined, hold_at_end, object_name
from vla_jax.analysis.plots import plot_curves, plot_imagined, plot_success
from vla_jax.analysis.runs import compare_runs, load_run, sibling_runs, success_table
from vla_jax.envs.scene import COLORS, SHAPES
from vla_jax.errors import UserError
from vla_jax.evaluation.results import Results, make_row, save_results


def make_run(directory, arm, success, mark="same"):
    count = len(success)
    columns = {
        "success": list(map(bool, success)),
        "stuck": [False] * count,
        "conflict": [True] * count,
        "ticks": [5] * count,
        "distance": [0.1] * count,
        "nearest": [0] * count,
        "text": ["touch it"] * count,
    }
    scenes, rows = {"swapped": columns}, [make_row(arm, 7, "swapped", columns)]
    directory.mkdir()
    save_results(directory, Results(arm, 7, {}, rows, scenes, {"swapped": mark}, 1.0))
    lines = [{"kind": "train", "step": step, "loss": 1.0 / step, "terms/llr": 0.1} for step in (1, 2, 3)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_run(directory)


def test_runs_beside_a_run_are_found_and_compared(tmp_path, capsys):
    first, second = make_run(tmp_path / "a", "baseline", [1, 0, 0, 0]), make_run(tmp_path / "b", "full", [1, 1, 0, 1])
    (tmp_path / "data").mkdir()
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "results.json").write_text("{}")  # of a comparison: no run
    make_run(tmp_path / "c", "elsewhere", [1, 1, 1, 1], mark="other")
    assert [run.name for run in sibling_runs(second)] == ["baseline"]
    assert "without" in (said := capsys.readouterr().out) and "other scenes" in said
    (row,) = compare_runs(first, second)
    assert row["split"] == "swapped" and row["difference"] == 0.5 and row["only_second"] == 2
    assert "1/4" in success_table(first, second) and "3/4" in success_table(first, second)


def test_runs_judged_on_other_scenes_are_not_compared(tmp_path):
    first = make_run(tmp_path / "a", "baseline", [1, 0])
    with pytest.raises(UserError, match="other scenes"):
        compare_runs(first, make_run(tmp_path / "b", "full", [1, 1], mark="other"))
    with pytest.raises(UserError, match="has no results: python -m experiments.evaluate"):
        success_table(dataclasses.replace(first, results=[]))


def test_curves_show_every_run(tmp_path):
    runs = make_run(tmp_path / "a", "baseline", [1, 0]), make_run(tmp_path / "b", "full", [1, 1])
    figure = plot_curves(*runs)
    assert [axis.get_title(loc="left") for axis in figure.axes[:2]] == ["loss", "terms/llr"]
    line = figure.axes[0].lines[1]
    np.testing.assert_allclose(line.get_ydata(), [1, 0.5, 1 / 3])
    assert len(plot_curves(*runs, names=["loss"]).axes[0].lines) == 2


def test_success_is_drawn_at_its_rate(tmp_path):
    figure = plot_success(make_run(tmp_path / "a", "baseline", [1, 0, 0, 0]))
    assert figure.axes[0].lines[0].get_xdata() == [0.25]


def test_paths_are_drawn_where_the_camera_sees_them():
    pixels = np.array([[[10.5, 20.5], [30.5, 40.5]], [[10.5, 20.5], [50.5, 5.5]]])
    picture = np.zeros((64, 64, 3), np.uint8)
    figure = plot_imagined(
        Imagined(picture, ["a", "b"], ["red cube", "blue ball"], "red cube", pixels[..., :1], pixels)
    )
    lines = figure.axes[0].lines
    # A white outline, the line and its end for each instruction; the centre of pixel (10, 20) is drawn at (10, 20).
    np.testing.assert_allclose(lines[1].get_xydata(), [[10, 20], [30, 40]])
    np.testing.assert_allclose(lines[5].get_xydata(), [[50, 5]])
    assert "“b”" in lines[4].get_label() and "blue ball" in lines[4].get_label()


def test_a_finished_path_stays_where_it_ended():
    path = np.arange(10, dtype=np.float32).reshape(1, 10, 1).repeat(3, axis=2).repeat(2, axis=0)
    held = hold_at_end(path, np.array([4, 10]))
    np.testing.assert_array_equal(held[0, :, 0], [0, 1, 2, 3, 3, 3, 3, 3, 3, 3])
    np.testing.assert_array_equal(held[1], path[1])


def test_objects_are_named_by_colour_and_shape():
    color, shape = list(COLORS).index("green"), SHAPES.index("ball")
    scene = SimpleNamespace(color=np.array([[0, color]]), shape=np.array([[0, shape]]))
    assert object_name(scene, 1) == "green ball"
