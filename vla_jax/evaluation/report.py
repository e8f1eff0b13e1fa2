"""One HTML file that shows what was trained and what it can do. It needs nothing beside itself.

Curves are inline SVG, videos are embedded MP4; there is no script and no address, so the page opens from a disk.
"""

import base64
import dataclasses
import datetime
import html
import importlib.util
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vla_jax.errors import UserError
from vla_jax.evaluation import charts, video
from vla_jax.evaluation.evaluate import Clip
from vla_jax.evaluation.records import Run
from vla_jax.evaluation.results import Results, compare
from vla_jax.evaluation.style import CSS
from vla_jax.files import write_atomically

STILL_SPLITS = ("in_distribution", "swapped")
STILL_FRAMES = 5
GOOD, BAD = (20, 120, 75), (185, 40, 50)
SPLIT_MEANING = {
    "in_distribution": "new scenes, the training law",
    "swapped": "same scenes, the words name an object that the look does not",
    "all_instructions": "every valid command of a scene; commands of one scene are alike, so intervals are too narrow",
    "new_backgrounds": "table colours never seen in training",
    "held_out_pairs": "colour-shape pairs never seen in training",
    "paraphrases": "same scenes and commands in wordings never seen in training",
    "blank": "same scenes and commands, no words",
}
DROP_MEANING = {
    "language_drop": "success lost when the words are taken away",
    "swap_drop": "success lost when the words contradict the look",
    "paraphrase_drop": "success lost when the same is said in other words",
}


def require_extra() -> None:
    """Raises UserError where the libraries that draw the report are not installed."""
    missing = [name for name in ("matplotlib", "PIL", "av") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the report needs {' and '.join(missing)}: install them by pip install 'vla_jax[report]'")


def write_report(path: str | Path, runs: Sequence[Run], clips: Mapping[Path, Sequence[Clip]] | None = None) -> Path:
    """Writes the report of one run or of several that are compared, at once.

    Args:
        path: the HTML file.
        runs: evaluated runs; the first is what the others are compared with.
        clips: run directory -> filmed scenes (`Evaluator.film`).

    Raises:
        UserError: a run has not been evaluated, or a drawing library is missing.
    """
    require_extra()
    for run in runs:
        if run.last is None:
            raise UserError(f"{run.directory} has no results: python -m experiments.evaluate --workdir={run.directory}")
    runs = _with_different_names(runs)
    results = [run.last for run in runs]
    sections = [
        ("Success", _success(results)),
        ("What the words are worth", _drops(results)),
        ("Comparison", _comparisons(results)),
        ("Videos", _videos(runs, clips or {})),
        ("Training", _training(runs)),
        ("Configuration", _configuration(runs)),
    ]
    body = "\n".join(f"<section><h2>{title}</h2>\n{content}</section>" for title, content in sections if content)
    title = html.escape(" vs ".join(run.name for run in runs))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{CSS}</style></head>
<body><header><h1>{title}</h1>{_lead(runs)}</header>
{body}
</body></html>
"""
    path = Path(path)
    write_atomically(path, page)
    return path


def _with_different_names(runs: Sequence[Run]) -> list[Run]:
    """Runs of one arm (two seeds, say) are told apart by their directories."""
    names = [run.name for run in runs]
    labels = [
        name if names.count(name) == 1 else f"{name} ({run.directory})" for name, run in zip(names, runs, strict=True)
    ]
    return [
        dataclasses.replace(run, name=label, results=[dataclasses.replace(result, arm=label) for result in run.results])
        for run, label in zip(runs, labels, strict=True)
    ]


def _lead(runs: Sequence[Run]) -> str:
    facts, config = runs[0].facts, runs[0].last.config
    env, bias = config["env"], config["bias"]
    parts = [f"task {env['task']}", f"{env['embodiment']} robot", f"{config['scenes']} scenes a split"]
    parts += [f"{bias['coupling']} coupling, rho {bias['rho']:g}"]
    if "entropy" in facts:
        parts.append(f"H(instruction | image) = {facts['entropy']:.3f} nats")
    written = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"<p>{html.escape(' · '.join(parts))}</p><p class='quiet'>written {written}</p>"


def _success(results: Sequence[Results]) -> str:
    rows = {(result.arm, row["split"]): row for result in results for row in result.rows}
    splits = list(dict.fromkeys(split for _, split in rows))
    head = "".join(f"<th>{html.escape(result.arm)}<small>step {result.step}</small></th>" for result in results)
    lines = []
    for split in splits:
        cells = "".join(_score(rows.get((result.arm, split))) for result in results)
        meaning = html.escape(SPLIT_MEANING.get(split, ""))
        lines.append(f"<tr><th>{_spaced(split)}<small>{meaning}</small></th>{cells}</tr>")
    table = f"<table><thead><tr><th>split</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    note = (
        "<p class='quiet'>Success with its 95 % Wilson interval. <i>Stick</i>: did what the look of the scene suggests "
        "and not what was said, among scenes in which the two differ.</p>"
    )
    return f"{table}{note}<figure>{charts.to_svg(charts.success_figure(results))}</figure>"


def _score(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "<td>–</td>"
    stick = "" if row["stick"] is None else f"<small>stick {_percent(row['stick'])} of {row['stick_trials']}</small>"
    interval = f"{100 * row['low']:.0f}–{100 * row['high']:.0f}"
    return f"<td><b>{_percent(row['rate'])}</b> <span class='quiet'>[{interval}]</span>{stick}</td>"


def _drops(results: Sequence[Results]) -> str:
    lines = [
        f"<tr><th>{html.escape(result.arm)}</th><td>{html.escape(DROP_MEANING[drop['name']])}</td>{_difference(drop)}</tr>"
        for result in results
        for drop in result.drops()
    ]
    return _paired_table(("arm", "what is lost, on the same scenes"), lines)


def _comparisons(results: Sequence[Results]) -> str:
    lines = []
    for first, second in itertools.combinations(results, 2):
        for split, comparison in compare(first, second).items():
            pair = html.escape(f"{second.arm} − {first.arm}")
            difference = _difference(vars(comparison))
            lines.append(f"<tr><th>{pair}</th><td>{_spaced(split)}</td>{difference}</tr>")
    return _paired_table(("difference", "split"), lines)


def _paired_table(heads: Sequence[str], lines: Sequence[str]) -> str:
    if not lines:
        return ""
    head = "".join(f"<th>{name}</th>" for name in (*heads, "points", "95 % interval", "p"))
    note = (
        "<p class='quiet'>Points of success rate on the same scenes with the same noise; paired bootstrap interval, "
        "p of McNemar's exact test.</p>"
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>{note}"


def _difference(paired: Mapping[str, Any]) -> str:
    sure = "sure" if paired["low"] > 0 or paired["high"] < 0 else "quiet"
    points, low, high = (100 * paired[name] for name in ("difference", "low", "high"))
    p = "&lt; 0.001" if paired["p"] < 0.001 else f"{paired['p']:.3f}"
    return f"<td class='{sure}'>{points:+.1f}</td><td>[{low:+.1f}, {high:+.1f}]</td><td>{p}</td>"


def _videos(runs: Sequence[Run], clips: Mapping[Path, Sequence[Clip]]) -> str:
    blocks = []
    for run in runs:
        filmed = clips.get(run.directory, ())
        for split in dict.fromkeys(clip.split for clip in filmed):
            chosen = [clip for clip in filmed if clip.split == split]
            panels = [video.titled(clip.frames, _subtitle(clip), GOOD if clip.success else BAD) for clip in chosen]
            data = base64.b64encode(video.encode_mp4(video.side_by_side(panels))).decode()
            blocks.append(
                f"<figure><figcaption><b>{html.escape(run.name)}</b> {_spaced(split)}</figcaption>"
                f"<video controls loop muted autoplay playsinline src='data:video/mp4;base64,{data}'></video></figure>"
            )
    return f"<div class='films'>{''.join(blocks)}</div>" if blocks else ""


def write_stills(path: str | Path, runs: Sequence[Run], clips: Mapping[Path, Sequence[Clip]]) -> Path | None:
    """One picture for papers and pages: a row of frames for each run and each of STILL_SPLITS, of a scene that went
    as most scenes of that split did.

    Returns its path, or None where nothing of these splits was filmed.
    """
    rows, titles = [], []
    for run in runs:
        usual = {row["split"]: row["rate"] >= 0.5 for row in run.last.rows}
        for split in STILL_SPLITS:
            filmed = [clip for clip in clips.get(run.directory, ()) if clip.split == split]
            if clip := next((clip for clip in filmed if clip.success == usual[split]), None):
                rows.append(video.strip(video.enlarge(clip.frames, 2), STILL_FRAMES))
                titles.append((f"{run.name}, {_subtitle(clip)}", GOOD if clip.success else BAD))
    if not rows:
        return None
    write_atomically(Path(path), video.encode_png(video.stacked(rows, titles)))
    return Path(path)


def _subtitle(clip: Clip) -> str:
    ending = "success" if clip.success else "did what the look suggests" if clip.stuck else "failure"
    return f"{ending}: {clip.text or '(no words)'}"


def _training(runs: Sequence[Run]) -> str:
    names = charts.default_curves(runs)
    return f"<figure>{charts.to_svg(charts.curves_figure(runs, names))}</figure>" if names else ""


def _configuration(runs: Sequence[Run]) -> str:
    blocks = []
    for run in runs:
        parts = {"data": run.facts, "evaluation": run.last.config if run.last else {}}
        parts |= {"training": run.config, "provenance": run.provenance}
        for title, values in parts.items():
            if values:
                text = html.escape(json.dumps(values, indent=2, ensure_ascii=False))
                name = html.escape(f"{run.name}: {title}")
                blocks.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    return "".join(blocks)


def _spaced(split: str) -> str:
    return html.escape(charts.spaced(split))


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"
