"""Figures of whether a policy listens: which instruction explains an action, and where the policy reads.

Axes: I chunks, K instructions, T image tokens, O things.
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vla_jax.analysis.attention import Gaze, shown
from vla_jax.analysis.imagine import Start
from vla_jax.envs.questions import middle
from vla_jax.evaluation.charts import GRID, INK, PALETTE, colours
from vla_jax.models.policy import Policy

SHADES = LinearSegmentedColormap.from_list("shades", ["#ffffff", PALETTE[0]])
GLOW, REST = "#ffd23f", "#b8bec9"  # the first stands out on every table colour


def plot_explained(
    likelihoods: dict[str, Float[np.ndarray, "I K"]], did: dict[str, Sequence[str]], texts: Sequence[str]
) -> Figure:
    """A heat map for each actor: does the instruction that it was given explain its actions best?

    The numbers are log pi(a | v, l) in nats. The colour is the probability of each instruction, given the actions,
    where all are equally likely before; a frame marks the instruction that was given.

    Args:
        likelihoods: by actor, one row a chunk of actions; see `likelihood.explain`.
        did: by actor, the instruction behind each row.
        texts: the instruction of each column.
    """
    rows = max(map(len, did.values()))
    figure = Figure(figsize=(2.2 + 1.7 * len(texts) * len(likelihoods), 2.1 + 0.62 * rows), layout="constrained")
    axes = figure.subplots(1, len(likelihoods), squeeze=False)[0]
    for axis, (actor, values) in zip(axes, likelihoods.items(), strict=True):
        shades = axis.imshow(softmax(values), cmap=SHADES, vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(np.asarray(values)):
            dark = softmax(values)[row, column] > 0.6
            axis.text(column, row, f"{value:.1f}", ha="center", va="center", color="white" if dark else INK, fontsize=9)
            if did[actor][row] == texts[column]:
                axis.add_patch(Rectangle((column - 0.47, row - 0.45), 0.94, 0.9, fill=False, edgecolor=INK, lw=1.6))
        axis.set_xticks(range(len(texts)), map(_quoted, texts), rotation=20, ha="right", fontsize=8)
        axis.set_yticks(range(len(did[actor])), map(_quoted, did[actor]), fontsize=8)
        axis.set_title(f"{actor}, told …", fontsize=10, loc="left")
        axis.set_xlabel("explained by …", fontsize=9)
        _bare(axis)
    bar = figure.colorbar(shades, ax=axes, shrink=0.8)
    bar.set_label("p(instruction | actions, picture)", fontsize=8)
    bar.outline.set_visible(False)
    return figure


def plot_suggested(likelihoods: dict[str, Float[np.ndarray, "K"]], texts: Sequence[str], cue: str) -> Figure:
    """What the language head expects to be told: the probability of each instruction among these, by ordering read."""
    figure = Figure(figsize=(8.4, 0.9 + 0.5 * len(texts)), layout="constrained")
    axis = figure.subplots()
    offsets = 0.32 * (np.arange(len(likelihoods)) - (len(likelihoods) - 1) / 2)
    for offset, colour, (name, values) in zip(offsets, PALETTE, likelihoods.items(), strict=False):
        places = np.arange(len(texts)) + offset
        axis.barh(places, softmax(values), height=0.3, color=colour, label=name)
        for place, share, value in zip(places, softmax(values), values, strict=True):
            axis.text(share + 0.01, place, f"{value:.1f} nats", va="center", fontsize=8, color=INK)
    axis.axvline(1 / len(texts), color=INK, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(texts)), map(_quoted, texts), fontsize=9)
    axis.set(xlim=(0, 1.15), ylim=(len(texts) - 0.5, -0.5))
    axis.set_xlabel("p(instruction | picture) among these; dotted: no preference", fontsize=8)
    axis.set_title(f"the look suggests the {cue}", fontsize=10, loc="left")
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _bare(axis)
    return figure


def plot_said(start: Start, texts: Sequence[str], said: Sequence[str]) -> Figure:
    """Where in the front picture a policy says the thing of each instruction is.

    said: each instruction and what the policy says after it (`imagine.with_reasoning`).
    """
    picture = start.observation["images"]["front"][0]
    figure = Figure(figsize=(8.4, 3.0), layout="constrained")
    axis = figure.subplots()
    axis.imshow(picture, interpolation="nearest")
    for colour, text, spoken in zip(colours(len(texts)), texts, said, strict=True):
        answer = spoken.removeprefix(text).strip()
        place = middle(answer) * len(picture) - 0.5  # the middle of the first pixel is at 0
        label = f"{_quoted(text)}: {answer or 'says nothing'}"
        axis.plot(*place, "X", color=colour, markeredgecolor="white", markersize=12, linestyle="", label=label)
    axis.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
    axis.set_axis_off()
    return figure


def plot_gaze(policy: Policy, start: Start, gaze: Gaze, texts: Sequence[str], reader: int | None = None) -> Figure:
    """Where the attention goes under each instruction, one row an instruction.

    In the pictures, the brighter a token's square, the more it gets; beside them the sum by thing and by word. A tick
    is what a thing would get if all image tokens got the same.

    Args:
        gaze: of the policy at this start, under each of `texts`.
        reader: number of the query (or action) that is looked at; None is the mean of all.
    """
    places, views = np.asarray(policy.vision.places(start.observation["images"]))[0], policy.vision.views
    objects = shown(places, policy.vision.reach, views, start.things, len(start.names))
    image, words, queries = (part.mean(1) if reader is None else part[:, reader] for part in map(np.asarray, gaze))
    figure = Figure(figsize=(2.6 * len(views) + 4.4, 2.75 * len(texts)), layout="constrained")
    axes = figure.subplots(len(texts), len(views) + 1, squeeze=False, width_ratios=[1] * len(views) + [1.3])
    for row, text in enumerate(texts):
        # One scale for all rows, so that they can be compared.
        tokens = np.split(image[row] / image.max(), len(views))
        for view, axis, brightness, where in zip(views, axes[row], tokens, np.split(places, len(views)), strict=False):
            axis.imshow(start.observation["images"][view][0], interpolation="nearest")
            _draw_tokens(axis, brightness, where, policy.vision.reach)
            axis.set_title(_quoted(text) if axis is axes[row, 0] else view, fontsize=9, loc="left")
        seen, even = (_with_rest(weights, objects) for weights in (image[row], np.full(len(places), image[row].mean())))
        spoken = re.findall(r"\w+", text)
        names = [*start.names, "elsewhere in the pictures", *map(_quoted, spoken), "latent queries"]
        shares = [*seen, *words[row, : len(spoken)], queries[row].sum()]
        count = len(names) if queries.shape[1] else len(names) - 1
        _draw_shares(axes[row, -1], names[:count], shares[:count], even)
    for axis in axes[:, -1]:
        axis.set_xlim(0, max(other.get_xlim()[1] for other in axes[:, -1]))
    return figure


def _with_rest(weights: Float[np.ndarray, "T"], objects: Float[np.ndarray, "T O"]) -> list[float]:
    """What each thing gets of the image tokens' attention, and what is left."""
    each = weights @ objects
    return [*each, weights.sum() - each.sum()]


def _draw_tokens(axis, brightness, places, reach: int) -> None:
    """A square for each token, in the pixels of the picture; the most attended are drawn on top."""
    for token in np.argsort(brightness):
        corner = places[token] - reach / 2 - 0.5
        style = {"facecolor": GLOW, "edgecolor": "black", "linewidth": 0.4, "alpha": 0.75 * float(brightness[token])}
        axis.add_patch(Rectangle(corner, reach, reach, **style))
    axis.set_axis_off()


def _draw_shares(axis, names: Sequence[str], shares: Sequence[float], even: Sequence[float]) -> None:
    """Bars; the first `len(even)` are parts of the pictures, with a tick each."""
    pictured = len(even)
    fills = [PALETTE[0]] * (pictured - 1) + [REST] + [PALETTE[1]] * (len(names) - pictured)
    places = np.arange(len(names))
    axis.barh(places, shares, color=fills, height=0.7)
    axis.plot(even, places[:pictured], "|", color=INK, markersize=9)
    axis.set_yticks(places, names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("share of attention", fontsize=8)
    _bare(axis)


def _bare(axis) -> None:
    axis.spines[:].set_visible(False)
    axis.spines["left"].set(visible=True, color=GRID)
    axis.tick_params(length=0, colors=INK)
    axis.tick_params(axis="x", labelsize=8)


def softmax(values: Float[np.ndarray, "*I K"]) -> Float[np.ndarray, "*I K"]:
    """Probabilities from log-probabilities, over the last axis."""
    values = np.asarray(values, np.float64)
    exponentials = np.exp(values - values.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def _quoted(text: str) -> str:
    return f"“{text}”"
