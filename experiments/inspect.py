"""What is in a directory.

python -m experiments.inspect DIR

A dataset (of `experiments.convert` or `experiments.collect`): writes one HTML page beside it with its episodes,
instructions, lengths, histograms of actions in physical units, sample pictures and warnings, and prints the warnings.
A checkpoint of a vision-language model: prints its parameters by module, types, bytes, and whether it would fit.
A run of `experiments.train`: prints how far it is, on what data, and its policy's parameters by module.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import jax

from vla_jax.analysis.dataset_page import check_is_dataset, write_page
from vla_jax.config import run_entry
from vla_jax.data.contract import Contract
from vla_jax.data.dataset import open_dataset
from vla_jax.errors import UserError
from vla_jax.pretrained.checkpoint import find_tensors
from vla_jax.pretrained.configs import from_json, read_json
from vla_jax.pretrained.tables import FAMILIES, Row
from vla_jax.training.checkpoints import Checkpoints, load_config, policy_maker
from vla_jax.training.state import abstract

GIB = 2**30
# bytes a parameter: weights, gradient and two Adam moments in float32, and a bfloat16 copy to compute with
TRAINING_BYTES = 4 * 4 + 2


def main(argv: Sequence[str]) -> None:
    """Looks at one directory; see the module's text."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("give one directory, a dataset, a checkpoint or a run: python -m experiments.inspect DIR")
    directory = Path(argv[0])
    if not directory.is_dir():
        raise UserError(f"no directory {directory}")
    if check_is_dataset(directory):
        print(describe_dataset(argv[0]))
    else:
        print(describe_run(directory) if (directory / "contract.json").is_file() else describe(argv[0]))


def describe_dataset(directory: str) -> str:
    """The warnings as text. The page is written beside the dataset."""
    dataset = open_dataset(directory)
    path, said = write_page(dataset, Path(directory).resolve().parent / f"{dataset.name}.html")
    lines = [f"{len(dataset)} episodes, {dataset.lengths.sum()} steps"]
    return "\n".join([*lines, *(f"warning: {line}" for line in said), str(path)])


def describe_run(directory: Path) -> str:
    """A training run as text. No weights are read."""
    config, contract = load_config(directory), Contract.load(directory / "contract.json")
    _, params, _ = abstract(policy_maker(config, contract))
    modules: dict[str, int] = defaultdict(int)
    for path, leaf in params.items():
        modules[path.partition("/")[0]] += leaf.size
    steps = Checkpoints(directory).steps
    return "\n".join(
        [
            f"{config.arm}: checkpoints at step {', '.join(map(str, steps)) or '(none)'}, of {config.steps}",
            f"data: {contract.dataset} ({contract.fingerprint[:12]}), {contract.embodiment}, "
            f"{contract.control_hz:g} Hz, actions: {', '.join(contract.action_names)}",
            *(f"{module:<16}{count:>14,} parameters" for module, count in sorted(modules.items())),
            f"{'all':<16}{sum(modules.values()):>14,} parameters",
        ]
    )


def describe(directory: str) -> str:
    """The table as text. Only headers are read."""
    source = read_json(directory)
    config = from_json(source)
    family = FAMILIES[source["model_type"]]
    rows = family.table(config)
    modules = defaultdict(list)
    for key, tensor in find_tensors(directory).items():
        modules[_module(family.canonical(key), rows)].append(tensor)
    lines = [
        f"{source['model_type']}: computes in {config.dtype}",
        "",
        "| module | parameters | type | MiB |",
        "|---|---|---|---|",
    ]
    for module, tensors in sorted(modules.items()):
        lines.append(f"| {module} | {_line(tensors)} |")
    every = [tensor for tensors in modules.values() for tensor in tensors]
    lines += [f"| all | {_line(every)} |", "", *_fits(every)]
    return "\n".join(lines)


def _module(key: str, rows: list[Row]) -> str:
    """The module, two levels deep, that the tensor belongs to."""
    for row in rows:
        before, _, after = row.key.partition("{}")
        if key == row.key or (row.stacked and key.startswith(before) and key.endswith(after)):
            return "/".join(row.paths[0].split("/")[:2]) if "/" in row.paths[0] else row.paths[0]
    return "(unknown)"


def _line(tensors: list) -> str:
    count = sum(math.prod(tensor.shape) for tensor in tensors)
    types = ", ".join(sorted({str(tensor.dtype) for tensor in tensors}))
    return f"{count:,} | {types} | {sum(tensor.size for tensor in tensors) / 2**20:,.1f}"


def _fits(tensors: list) -> list[str]:
    """Weights, and full fine-tuning, against the memory of the devices here, where they tell it."""
    weights = sum(tensor.size for tensor in tensors)
    training = TRAINING_BYTES * sum(math.prod(tensor.shape) for tensor in tensors)
    devices = jax.local_devices()
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    lines = [f"weights {weights / GIB:.2f} GiB; full fine-tuning {training / GIB:.2f} GiB and activations"]
    if limit is None:
        return [*lines, f"{len(devices)} x {devices[0].device_kind}: the device does not tell its memory"]
    for what, need in (("the weights", weights), ("full fine-tuning without activations", training)):
        count = math.ceil(need / limit)
        verdict = "fits one device" if count == 1 else f"needs {count} devices"
        lines.append(f"{devices[0].device_kind} ({limit / GIB:.1f} GiB, {len(devices)} here): {what} {verdict}")
    return lines


if __name__ == "__main__":
    run_entry(main)
