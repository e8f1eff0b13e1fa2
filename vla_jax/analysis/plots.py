"""Figures for notebooks: runs, demonstrations and where the gripper went."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from vla_jax.analysis.imagine import Imagined
from vla_jax.data.dataset import Dataset
from vla_jax.data.episode import decode_jpeg
from vla_jax.evaluation.charts import PALETTE, curves_figure, success_figure
from vla_jax.evaluation.records import Run


def plot_curves(*runs: Run, names: Sequence[str] | None = None) -> Figure:
    """Losses and success over training: one panel a metric, one line a run."""
    return curves_figure(runs, names)


def plot_success(*runs: Run) -> Figure:
    """Newest success rates with intervals, by split."""
    return success_figure([run.last for run in runs if run.last])


def plot_episodes(dataset: Dataset, indices: Sequence[int], view: str = "front", frames: int = 5) -> Figure:
    """Some pictures of each episode, evenly spaced from its first to its last, under its instruction."""
    figure = Figure(figsize=(1.7 * frames, 1.95 * len(indices)), layout="constrained")
    axes = figure.subplots(len(indices), frames, squeeze=False)
    for row, index in zip(axes, indices, strict=True):
        episode = dataset.read(index)
        pictures = episode.images[view]
        for axis, step in zip(row, np.linspace(0, len(pictures) - 1, frames).round().astype(int), strict=True):
            axis.imshow(decode_jpeg(pictures[step]))
            axis.set_axis_off()
        row[0].set_title(f"{index}: {episode.instruction}", fontsize=9, loc="left")
    return figure


def plot_imagined(imagined: Imagined) -> Figure:
    """The gripper's way under each instruction, drawn into the front picture; the dot is where it ended."""
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axis = figure.subplots()
    _draw_paths(axis, imagined)
    axis.set_title(f"the look suggests the {imagined.cue}", fontsize=10, loc="left")
    axis.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5), labelspacing=1.2)
    return figure


def plot_branches(imagined: dict[str, Imagined]) -> Figure:
    """The same scene under the same instructions, one picture for each way to act (see `imagine.guidances`)."""
    texts = max(len(one.texts) for one in imagined.values())
    figure = Figure(figsize=(4.2 * len(imagined), 4.4 + 0.5 * texts), layout="constrained")
    for axis, (name, one) in zip(figure.subplots(1, len(imagined), squeeze=False)[0], imagined.items(), strict=True):
        _draw_paths(axis, one)
        axis.set_title(f"{name}\nthe look suggests the {one.cue}", fontsize=10, loc="left")
        axis.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(0, 0), labelspacing=0.8)
    return figure


def _draw_paths(axis, imagined: Imagined) -> None:
    axis.imshow(imagined.picture)
    size = imagined.picture.shape
    for index, (text, end, pixels) in enumerate(zip(imagined.texts, imagined.ended_at, imagined.pixels, strict=True)):
        colour = PALETTE[index % len(PALETTE)]
        # Pixel coordinates have the corner of the picture at 0; imshow has it at -0.5.
        columns, rows = pixels.T - 0.5
        # Each on top of a broader one, so that ways that coincide all show.
        width = 2.2 + 3.0 * (len(imagined.texts) - 1 - index)
        axis.plot(columns, rows, color="white", linewidth=width + 1.4)
        axis.plot(columns, rows, color=colour, linewidth=width, label=f"“{text}”\nended at the {end}")
        axis.plot(columns[-1], rows[-1], "o", color=colour, markeredgecolor="white", markersize=width + 6.8)
    axis.set(xlim=(-0.5, size[1] - 0.5), ylim=(size[0] - 0.5, -0.5))
    axis.set_axis_off()
