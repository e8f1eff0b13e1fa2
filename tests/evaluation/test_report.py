import io
import json
import re
from html.parser import HTMLParser

import av
import numpy as np
import pytest
from PIL import Image

from vla_jax.errors import UserError
from vla_jax.evaluation import video
from vla_jax.evaluation.evaluate import Clip
from vla_jax.evaluation.intervals import wilson
from vla_jax.evaluation.records import load_run, read_metrics
from vla_jax.evaluation.report import write_report, write_stills
from vla_jax.evaluation.results import Results, make_row, save_results

SPLITS = ("in_distribution", "swapped", "blank")


def make_results(arm, rates, step=100, count=50):
    scenes = {
        split: {
            "success": (np.arange(count) < rate * count).tolist(),
            "stuck": (np.arange(count) >= rate * count).tolist(),
            "conflict": [split == "swapped"] * count,
            "ticks": [9] * count,
            "distance": [0.05] * count,
            "nearest": [0] * count,
            "text": ["touch the red cube"] * count,
        }
        for split, rate in zip(SPLITS, rates, strict=True)
    }
    config = {"scenes": count, "seed": 0, "env": {"task": "reach", "embodiment": "floating"}}
    config["bias"] = {"coupling": "background", "rho": 0.1}
    rows = [make_row(arm, step, split, scenes[split]) for split in SPLITS]
    return Results(arm, step, config, rows, scenes, dict.fromkeys(SPLITS, "same"), 1.0)


def make_run_dir(path, arm, rates):
    save_results(path, make_results(arm, rates))
    lines = [{"kind": "train", "step": s, "time": 1.0, "loss": 1 / s, "terms/llr": -1 / s} for s in range(1, 40)]
    lines += [{"kind": "evaluation", "step": s, "time": 1.0, "split": "swapped", "rate": s / 40} for s in (10, 20)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.json").write_text(json.dumps({"steps": 100, "note": "<script>alert(1)</script>"}))
    (path / "provenance.json").write_text(json.dumps([{"commit": "c0ffee"}]))
    return path


def make_clip(success, split="swapped", ticks=7):
    frames = np.random.default_rng(0).integers(0, 255, (ticks, 16, 16, 3), dtype=np.uint8)
    return Clip(split, 0, "touch the red cube", success, not success, frames)


class Page(HTMLParser):
    """Collects what a page would fetch, and checks that its elements are closed in order."""

    VOID = {"meta", "use", "path", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def decode(data):
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        return stream.codec_context.name, [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]


def test_mp4_holds_the_frames():
    frames = np.zeros((5, 33, 40, 3), np.uint8)
    frames[:, :, :20] = (200, 40, 40)
    frames[:, :, 20:] = (40, 40, 200)
    codec, decoded = decode(video.encode_mp4(frames))
    assert codec == "h264" and len(decoded) == 5 and decoded[0].shape == (34, 40, 3)
    assert np.abs(decoded[2][:33, 4:16].astype(int) - (200, 40, 40)).mean() < 8
    assert np.abs(decoded[2][:33, 24:36].astype(int) - (40, 40, 200)).mean() < 8


def test_clips_stand_side_by_side_and_wait_for_the_longest():
    short, long = np.full((2, 4, 4, 3), 10, np.uint8), np.full((5, 4, 4, 3), 90, np.uint8)
    both = video.side_by_side([short, long], gap=2)
    assert both.shape == (5, 4, 10, 3)
    assert (both[4, :, :4] == 10).all() and (both[4, :, 6:] == 90).all() and (both[0, :, 4:6] == 255).all()


def test_caption_is_written_and_pictures_keep_their_pixels():
    frames = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    titled = video.titled(frames, "success: touch the red cube", (0, 100, 0), factor=4)
    strip = titled.shape[1] - 64
    assert titled.shape == (3, 64 + strip, 64, 3) and strip > 20
    np.testing.assert_array_equal(titled[:, strip::4, ::4], frames)
    assert (titled[0, :strip] < 128).any(axis=-1).sum() > 30
    wordless = video.titled(frames, "", (0, 100, 0), factor=4)
    assert (wordless[0, :strip] == 255).all()


def test_report_is_whole_and_needs_nothing_else(tmp_path):
    first = make_run_dir(tmp_path / "a", "baseline", (0.9, 0.2, 0.8))
    second = make_run_dir(tmp_path / "b", "full", (0.94, 0.7, 0.3))
    clips = {first: [make_clip(True), make_clip(False)], second: [make_clip(True)]}
    path = write_report(tmp_path / "report.html", [load_run(first), load_run(second)], clips)
    text = path.read_text()
    page = Page(text)
    assert not page.open
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    outside = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert all(address.startswith("http://www.w3.org/") for address in outside), outside  # names of formats
    assert "<script" not in text and "url(http" not in text
    words = " ".join(page.words)
    low, high = wilson(35, 50)
    assert "70.0 %" in words and f"[{100 * low:.0f}–{100 * high:.0f}]" in words
    assert "+50.0" in words and "full − baseline" in words and "c0ffee" in words
    videos = re.findall(r"data:video/mp4;base64,([A-Za-z0-9+/=]+)", text)
    assert len(videos) == 2 and text.count("<svg") == 2


def test_stills_show_the_filmed_frames_of_each_run(tmp_path):
    runs = [load_run(make_run_dir(tmp_path / name, name, (0.9, 0.2, 0.8))) for name in ("a", "b")]
    clips = {
        run.directory: [make_clip(True), make_clip(False, ticks=9), make_clip(True, "in_distribution")] for run in runs
    }
    path = write_stills(tmp_path / "stills.png", runs, clips)
    picture = np.asarray(Image.open(path))
    frames, side = clips[runs[0].directory][1].frames, 2 * 16  # most of the swapped scenes fail
    assert picture.shape[1] == 5 * side + 4 * 6 and picture.shape[0] % 4 == 0
    row = picture[-side:]  # the last row: swapped, of the second run
    np.testing.assert_array_equal(row[::2, :side:2], frames[0])
    np.testing.assert_array_equal(row[::2, -side::2], frames[-1])
    assert write_stills(tmp_path / "none.png", runs, {}) is None and not (tmp_path / "none.png").exists()


def test_runs_of_one_arm_are_told_apart(tmp_path):
    dirs = [make_run_dir(tmp_path / name, "full", (0.9, 0.2, 0.8)) for name in ("seed0", "seed1")]
    text = write_report(tmp_path / "r.html", [load_run(path) for path in dirs]).read_text()
    assert str(dirs[0]) in text and str(dirs[1]) in text


def test_report_of_a_run_without_results_says_what_to_do(tmp_path):
    run = make_run_dir(tmp_path / "a", "full", (0.9, 0.2, 0.8))
    (run / "evaluation" / "00000100.json").unlink()
    with pytest.raises(UserError, match="experiments.evaluate"):
        write_report(tmp_path / "r.html", [load_run(run)])
    assert not (tmp_path / "r.html").exists()


def test_metrics_are_columns_by_kind_and_split(tmp_path):
    run = load_run(make_run_dir(tmp_path / "a", "full", (0.9, 0.2, 0.8)))
    assert run.name == "full" and run.last.step == 100
    np.testing.assert_array_equal(run.metrics["evaluation/swapped/rate"].steps, [10, 20])
    np.testing.assert_allclose(run.metrics["terms/llr"].values[:2], [-1, -0.5])
    assert "time" not in run.metrics


def test_a_torn_last_line_is_left_out_and_a_torn_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"kind": "train", "step": 1, "loss": 2.0})
    path.write_text(f"{line}\n{line.replace('2.0', '3.0')}\n{line[:10]}")
    assert read_metrics(path)["loss"].values.tolist() == [3.0]
    path.write_text(f"{line}\n{line[:10]}\n{line}\n")
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)


def test_a_foreign_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="no run directory"):
        load_run(tmp_path / "missing")
