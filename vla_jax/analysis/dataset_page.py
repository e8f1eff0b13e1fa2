"""One HTML page that shows what a dataset holds, to be read before anything is trained on it."""

import base64
import collections
import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from vla_jax.data.contract import Contract, compute_contract, normalize
from vla_jax.data.dataset import Dataset
from vla_jax.data.episode import decode_jpeg
from vla_jax.data.statistics import Rows
from vla_jax.errors import UserError
from vla_jax.evaluation import charts
from vla_jax.evaluation.report import require_extra
from vla_jax.evaluation.style import CSS
from vla_jax.files import write_atomically

SAMPLES, FRAMES = 4, 6  # episodes shown, and pictures of each view of an episode
INSTRUCTIONS = 25  # shown, most frequent first
FAR = 5.0  # normalised values beyond this are called outliers
DARK = 8.0  # mean of a picture's bytes below which it is called black
LONG, SHORT = 5.0, 0.2  # lengths, in medians, beyond which an episode is called out
PICTURE_CSS = "img { height: 96px; margin: 1px; } .warn { color: #a33; }"


@dataclasses.dataclass(frozen=True)
class Survey:
    """What is said of a dataset as a whole.

    Attributes:
        contract: statistics and names.
        instructions: how many episodes ask for each.
        rows: a uniform sample of (actions, states), in SI units.
        still: share of steps whose action repeats the one before exactly.
    """

    dataset: Dataset
    contract: Contract
    instructions: collections.Counter
    rows: dict[str, Float[np.ndarray, "N D"]]
    still: float


def survey(dataset: Dataset) -> Survey:
    """Reads all numbers and instructions; no picture is decoded."""
    contract = compute_contract(dataset)
    samples = {"action": Rows(len(contract.action_names), 20_000), "state": Rows(len(contract.state_names), 20_000)}
    repeated = 0
    for action, state in dataset.numbers():
        samples["action"].update(action)
        samples["state"].update(state)
        repeated += int((action[1:] == action[:-1]).all(axis=1).sum())
    asked = collections.Counter(dataset.read(index).instruction for index in range(len(dataset)))
    rows = {kind: sample.rows for kind, sample in samples.items()}
    return Survey(dataset, contract, asked, rows, repeated / max(1, int(dataset.lengths.sum())))


def warnings(found: Survey) -> list[str]:
    """What a reader should look at first."""
    dataset, contract = found.dataset, found.contract
    said = [f"{count} episodes were left out: {kind}" for kind, count in dataset.facts.get("skipped", {}).items()]
    said += [f"{name} is nearly constant" for name in contract.nearly_constant()]
    for kind in ("action", "state"):
        statistics, ends = getattr(contract, f"{kind}_statistics"), getattr(contract, f"{kind}_bounds")()
        farthest = np.abs(normalize(np.array([statistics.minimum, statistics.maximum]), *ends)).max(axis=0)
        for name, value in zip(getattr(contract, f"{kind}_names"), farthest, strict=True):
            if value > FAR:
                said.append(f"{kind} {name} reaches {value:.0f} times its usual range: outliers, or a wrong unit")
    if found.still > 0.2:
        said.append(
            f"{found.still:.0%} of the actions repeat the one before exactly: idle steps, or a slower controller"
        )
    median = np.median(dataset.lengths)
    for what, which in (("long", dataset.lengths > LONG * median), ("short", dataset.lengths < SHORT * median)):
        if which.any():
            first = dataset.episode_names[int(np.argmax(which))]
            said.append(f"{which.sum()} episodes are unusually {what} (median {median:.0f} steps): {first}, ...")
    if len(found.instructions) == 1:
        said.append("every episode has the same instruction: a policy cannot learn to listen from it")
    if repeats := len(dataset) - len(set(dataset.episode_names)):
        said.append(f"{repeats} episodes have a name that another one has: the data may hold copies")
    return said + _black(dataset)


def _black(dataset: Dataset) -> list[str]:
    black = collections.Counter()
    chosen = np.unique(np.linspace(0, len(dataset) - 1, 16).astype(int))
    for index in chosen:
        for view, column in dataset.read(int(index)).images.items():
            black[view] += bool(decode_jpeg(column[len(column) // 2]).mean() < DARK)
    return [f"view {view} is black in {count} of {len(chosen)} episodes" for view, count in black.items() if count]


def write_page(dataset: Dataset, path: str | Path) -> tuple[Path, list[str]]:
    """Writes the page at once; returns its path and its warnings.

    Raises:
        UserError: the drawing libraries are missing, or the dataset is damaged.
    """
    require_extra()
    found = survey(dataset)
    contract, said = found.contract, warnings(found)
    sections = [
        ("Warnings", _list(said)),
        ("Episodes", _pictures(dataset)),
        ("Instructions", _instructions(found.instructions)),
        ("Lengths", _figure([dataset.lengths], ["steps an episode"])),
        ("Actions", _numbers(found, "action")),
        ("State", _numbers(found, "state")),
        ("Statistics", f"<pre>{html.escape(contract.table())}</pre>"),
    ]
    body = "\n".join(f"<section><h2>{title}</h2>\n{content}</section>" for title, content in sections)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(dataset.name)}</title><style>{CSS}{PICTURE_CSS}</style></head>
<body><header><h1>{html.escape(dataset.name)}</h1>{_lead(dataset)}</header>
{body}
</body></html>
"""
    write_atomically(Path(path), page)
    return Path(path), said


def _lead(dataset: Dataset) -> str:
    interface, steps = dataset.interface, int(dataset.lengths.sum())
    hours = steps / interface.control_hz / 3600
    views = ", ".join(f"{view} {height} × {width}" for view, (height, width) in interface.images.items())
    facts = [
        f"{interface.embodiment} robot",
        f"{len(dataset):,} episodes, {steps:,} steps, {hours:.2g} hours at {interface.control_hz:g} steps a second",
        f"views: {views}",
        f"an action is {interface.action_representation}",
    ]
    return f"<p>{html.escape(' · '.join(facts))}</p><p class='quiet'>content {dataset.fingerprint[:12]}</p>"


def _list(said: Sequence[str]) -> str:
    if not said:
        return "<p>None.</p>"
    return f"<ul class='warn'>{''.join(f'<li>{html.escape(line)}</li>' for line in said)}</ul>"


def _pictures(dataset: Dataset) -> str:
    blocks = []
    for index in np.unique(np.linspace(0, len(dataset) - 1, SAMPLES).astype(int)):
        episode = dataset.read(int(index))
        rows = []
        for view, column in episode.images.items():
            steps = np.unique(np.linspace(0, len(column) - 1, FRAMES).astype(int))
            kind = "png" if column[0][:4] == b"\x89PNG" else "jpeg"
            data = [base64.b64encode(column[int(step)]).decode() for step in steps]
            pictures = "".join(f"<img alt='{view}' src='data:image/{kind};base64,{one}'>" for one in data)
            rows.append(f"<div>{pictures} <small>{html.escape(view)}</small></div>")
        name = html.escape(f"{dataset.episode_names[index]}: {episode.instruction} ({dataset.lengths[index]} steps)")
        blocks.append(f"<figure><figcaption>{name}</figcaption>{''.join(rows)}</figure>")
    return "".join(blocks)


def _instructions(asked: collections.Counter) -> str:
    lines = [
        f"<tr><td>{count:,}</td><td>{html.escape(text)}</td></tr>" for text, count in asked.most_common(INSTRUCTIONS)
    ]
    more = f"<p class='quiet'>and {len(asked) - INSTRUCTIONS:,} others</p>" if len(asked) > INSTRUCTIONS else ""
    head = f"<thead><tr><th>episodes</th><th>instruction ({len(asked):,} different)</th></tr></thead>"
    return f"<table>{head}<tbody>{''.join(lines)}</tbody></table>{more}"


def _numbers(found: Survey, kind: str) -> str:
    names, units = getattr(found.contract, f"{kind}_names"), getattr(found.contract, f"{kind}_units")
    titles = [f"{name} ({unit})" if unit != "1" else name for name, unit in zip(names, units, strict=True)]
    ends = np.stack(getattr(found.contract, f"{kind}_bounds")(), axis=1)
    note = "<p class='quiet'>A uniform sample of the steps; the lines are what becomes −1 and 1.</p>"
    return _figure(list(found.rows[kind].T), titles, ends) + note


def _figure(columns: Sequence[np.ndarray], titles: Sequence[str], ends: np.ndarray | None = None) -> str:
    figure, axes = charts.canvas(-(-len(columns) // 4), 4)
    for number, axis in enumerate(axes):
        if number >= len(columns):
            axis.set_axis_off()
            continue
        axis.hist(columns[number], bins=40, color=charts.PALETTE[0])
        axis.set_title(titles[number], fontsize=9, color=charts.INK, loc="left")
        for end in ends[number] if ends is not None else ():
            axis.axvline(end, color=charts.PALETTE[1], linewidth=1)
    return f"<figure>{charts.to_svg(figure)}</figure>"


def check_is_dataset(directory: Path) -> bool:
    """Whether `open_dataset` reads it. Raises UserError where it has to be converted first."""
    if (directory / "meta/info.json").is_file():
        raise UserError(
            f"{directory} is a LeRobot dataset: python -m experiments.convert makes one that can be inspected"
        )
    return (directory / "dataset.json").is_file() or (directory / "dataset_info.json").is_file()
