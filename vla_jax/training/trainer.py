"""A training run: its directory, its data, its policy, and the loop."""

import contextlib
import dataclasses
import functools
import json
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

import vla_jax
from vla_jax.config import diff, to_json
from vla_jax.data.contract import Contract
from vla_jax.data.loader import data_contract, describe_data, make_loader, members
from vla_jax.data.tokenizer import from_json, with_limit
from vla_jax.envs.questions import Questioner, QuestionStream, check_places
from vla_jax.errors import UserError
from vla_jax.evaluation.evaluate import Evaluator, World, format_table
from vla_jax.evaluation.results import save_results
from vla_jax.files import write_atomically
from vla_jax.models.policy import LANGUAGE_MODEL
from vla_jax.nn.placement import put
from vla_jax.platform import any_process, is_first, wait_for_all
from vla_jax.pretrained.backbone import load_backbone, policy_on, tokenizer_of
from vla_jax.training.checkpoints import Checkpoints, contract_id, has_begun, load_config, load_policy, policy_facts
from vla_jax.training.loop import Loop, first, mean_losses
from vla_jax.training.mesh import describe, global_rows, local_weights, make_mesh, place_batch
from vla_jax.training.metrics import MetricsWriter, SilentWriter, disk_space
from vla_jax.training.program import Program, make_program
from vla_jax.training.state import FlatArrays, TrainState, flatten, trained_module
from vla_jax.training.train_config import TrainConfig, must_match_on_resume

SHARED = "give a --workdir on a file system that all machines share (NFS, a mounted bucket)"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "mujoco")


def train(config: TrainConfig, workdir: str | Path, resume: bool = False, resume_command: str | None = None) -> Path:
    """Trains a policy and returns its run directory.

    Args:
        config: the resolved settings.
        workdir: the run directory; it must be empty, or hold this run and `resume` be set.
        resume: go on after the newest checkpoint, exactly as if the run had not stopped.
        resume_command: what a stopped run tells the user to type; by default the command line of this process.

    Raises:
        UserError: anything that the user can put right; nothing that was there is overwritten.
        loop.Stopped: after Ctrl-C or SIGTERM, with the state saved.
    """
    run_dir = Path(workdir)
    mesh = make_mesh(config.mesh)
    contract = data_contract(config.data)
    config, contract = on_pretrained(config, contract)
    _check_run_dir(run_dir, config, contract, resume)
    program = make_program(config, policy_facts(contract, config.policy.views), mesh)
    data = _make_data(config, contract, "train")
    begun = Checkpoints.exist(run_dir)
    if any_process(begun) and any_process(not begun):
        raise UserError(f"some processes see checkpoints in {run_dir} and others do not: {SHARED}")
    going_on = resume and begun
    state = program.shapes if going_on else _first_state(program, config, contract, mesh)
    validate = _validation(config, contract, program, mesh)
    evaluate = _evaluation(config, contract, program, run_dir)
    _describe(config, contract, program, run_dir)
    wait_for_all("checked")
    if is_first():
        with disk_space(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            _write_run_files(run_dir, config, contract)
    wait_for_all("written")
    if any_process(not (run_dir / "contract.json").is_file()):
        raise UserError(f"not every process sees the files that the first one wrote to {run_dir}: {SHARED}")
    checkpoints = Checkpoints(run_dir, config.keep_checkpoints, write=True)
    state, meta = _restore(checkpoints, state, data) if going_on else (state, {})
    if resume:
        print(f"resumed at step {int(state.step)}" if going_on else "no checkpoint yet: starting at step 0")
    writer = MetricsWriter(run_dir, int(state.step)) if is_first() else SilentWriter()
    loop = Loop(
        config,
        state,
        program.step,
        data,
        checkpoints,
        writer,
        place=functools.partial(_place, mesh=mesh),
        validate=validate,
        evaluate=evaluate,
        meta={"contract": contract_id(contract)},
        evaluated=meta.get("evaluated", 0),
        resume_command=resume_command or command_to_resume(),
    )
    with contextlib.ExitStack() as closing:  # each closes, whatever becomes of the others
        for part in (checkpoints, writer, data):
            closing.callback(part.close)
        loop.run()
    return run_dir


def on_pretrained(config: TrainConfig, contract: Contract) -> tuple[TrainConfig, Contract]:
    """The run with the sizes and the tokenizer of its pretrained model, where it starts from one."""
    directory = config.pretrained.directory
    if not directory:
        return config, contract
    length = config.pretrained.max_tokens
    tokenizer = with_limit(tokenizer_of(directory), length, config.pretrained.truncate)
    words = dict(tokenizer=tokenizer, max_tokens=length)
    policy = policy_on(directory, config.policy)
    return dataclasses.replace(config, policy=policy), dataclasses.replace(contract, **words)


def _first_state(program: Program, config: TrainConfig, contract: Contract, mesh: Mesh) -> TrainState:
    """The state before the first step: random, with what a pretrained model or another run gives."""
    directory = config.pretrained.directory
    if config.policy.reasoning and not (config.init_from or directory or config.questions.batch_size):
        raise UserError(
            "with policy.reasoning a language model speaks, and nobody taught this one: start from a trained one by "
            "init_from=RUN (configs/grounding.py makes one) or pretrained.directory, or add questions"
        )
    given = load_backbone(directory, config.policy, program.shapes.weights, config.seed, mesh) if directory else {}
    if config.init_from:
        given |= language_model_of(config.init_from, program.shapes.weights, contract)
    return program.first_state(config.seed, given)


def command_to_resume() -> str:
    """The command line of this process, with --resume."""
    command = [argument for argument in sys.orig_argv if not argument.startswith("--resume")]
    return shlex.join([*command, "--resume"])


def check_run(run_dir: Path, config: TrainConfig) -> None:
    """Raises UserError where the run there has other settings or other data than this one: where it could not go on."""
    _check_run_dir(run_dir, *on_pretrained(config, data_contract(config.data)), resume=True)


def _check_run_dir(run_dir: Path, config: TrainConfig, contract: Contract, resume: bool) -> None:
    """Raises UserError unless the directory is free, or `resume` fits what it holds."""
    if not has_begun(run_dir):
        return
    if not resume:
        raise UserError(f"{run_dir} is not empty: add --resume to go on with that run, or choose another --workdir")
    begun_with = Contract.load(run_dir / "contract.json")
    try:
        begun_with.check(contract, f"the dataset at {config.data.directory or contract.dataset}")
    except UserError as error:
        raise UserError(f"{error}, or choose another --workdir than {run_dir}") from error
    check_settings(run_dir, config)


def check_settings(run_dir: Path, config: TrainConfig) -> None:
    """Raises UserError where the run there has other settings, of those that have to stay (`must_match_on_resume`)."""
    changed = {key: pair for key, pair in diff(load_config(run_dir), config).items() if must_match_on_resume(key)}
    if may_be_one_run(*changed.get("init_from", ("", ""))):
        del changed["init_from"]
    if changed:
        listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        raise UserError(f"{run_dir} is a run with other settings: {listed}. Choose another --workdir for a new run")


def may_be_one_run(old: str, new: str) -> bool:
    """Whether two paths can be of one run: they lead to one place, or what was at the old one has moved."""
    return bool(old and new) and (not Path(old).exists() or Path(old).resolve() == Path(new).resolve())


def _restore(checkpoints: Checkpoints, like: TrainState, data: Any) -> tuple[TrainState, dict[str, Any]]:
    """The newest checkpoint, placed as `like` says, and the data moved to its position."""
    state, meta = checkpoints.restore(like)
    data.set_state(meta["data"])
    return state, meta


def _place(batch: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """A host batch on the devices, its samples numbered through."""
    if "actions" in batch:
        batch = {**batch, "row": global_rows(len(batch["actions"]))}
    return place_batch(batch, mesh)


def _make_data(config: TrainConfig, contract: Contract, split: str):
    """The stream of batches that the objective needs: demonstrations, questions, or both."""
    process, data = (jax.process_index(), jax.process_count()), None
    if config.loss.demonstrations:
        settings = config.data if split == "train" else dataclasses.replace(config.data, split=split, workers=0)
        data = make_loader(settings, contract, *process, views=config.policy.views)
    if not config.questions.batch_size:
        return data
    if config.policy.reasoning:
        check_places(from_json(contract.tokenizer))
    world = World.of(contract, config.eval)
    asked, stream = config.questions, (config.questions.seed, split == "held_out")
    ask = Questioner(contract, world.env, world.bias, world.scene, *stream, config.policy.views, asked.kinds)
    return QuestionStream(ask, asked.batch_size, data, *process)


def language_model_of(run_dir: str | Path, shapes: FlatArrays, contract: Contract) -> FlatArrays:
    """The vision-language model of another run: its averaged weights, where it keeps them.

    Args:
        shapes: the weights of the policy that starts from it, each with its place.

    Raises:
        UserError: no such run, other words, or a model of another size.
    """
    policy, theirs, trained = load_policy(run_dir)
    if theirs.tokenizer != contract.tokenizer:
        raise UserError(f"the run {run_dir} speaks other words than the dataset: collect and train it again")
    given = flatten(nnx.state(policy, nnx.Param))
    taken = {path: leaf for path, leaf in shapes.items() if path.split("/")[0] in LANGUAGE_MODEL}
    for path, leaf in taken.items():
        if path not in given or given[path].shape != leaf.shape:
            there = given[path].shape if path in given else "not there"
            raise UserError(
                f"cannot start from {run_dir}: {path} is {leaf.shape} here and {there} in that run: give this run the "
                f"encoder ({trained.policy.encoder!r}) and the sizes of that one, see its config.json"
            )
    return {path: put(given[path], leaf.sharding) for path, leaf in taken.items()}


def _validation(config: TrainConfig, contract: Contract, program: Program, mesh: Mesh):
    """A function of the state that gives the mean losses on the same held-out batches with the same noise; or None.

    Of a mixture, those of each dataset alone as well, as "<dataset>/loss" and so on.
    """
    if not config.validate_every:
        return None
    held_out = dataclasses.replace(config.data, split="held_out", workers=0)
    batches, key = {}, jax.random.key(config.seed)
    for name, data in {"": held_out, **members(held_out)}.items():
        stream = _make_data(dataclasses.replace(config, data=data), contract, "held_out")
        batches[f"{name}/" if name else ""] = first(stream, config.validation_batches)
        stream.close()

    def losses(state: TrainState, batches: list[dict[str, Any]]) -> dict[str, float]:
        placed = (_place({k: v for k, v in b.items() if k not in ("episode", "step")}, mesh) for b in batches)
        return mean_losses(program.validate(state, batch, jax.random.fold_in(key, i)) for i, batch in enumerate(placed))

    def validate(state: TrainState) -> dict[str, float]:
        return {name + key: loss for name, own in batches.items() for key, loss in losses(state, own).items()}

    return validate


def _evaluation(config: TrainConfig, contract: Contract, program: Program, run_dir: Path):
    """A function of (state, step) that judges the policy in closed loop, saves and prints the rows; or None.

    Every process judges it, on its first device: the outcome is the same, and nobody has to wait for it.
    """
    if not config.eval_every:
        return None
    evaluator = Evaluator(contract, config.eval)

    def evaluate(state: TrainState, step: int) -> list[dict[str, Any]]:
        policy = trained_module(program.graphdef, state)
        graphdef, weights = nnx.split(policy)
        results = evaluator(nnx.merge(graphdef, local_weights(weights)), arm=config.arm, step=step)
        if is_first():
            with disk_space(run_dir):
                save_results(run_dir, results)
        tqdm.write(f"closed loop after {step} steps ({results.seconds:.0f} s)\n{format_table(results.rows)}")
        return results.rows

    return evaluate


def _describe(config: TrainConfig, contract: Contract, program: Program, run_dir: Path) -> None:
    parts = (program.shapes.weights, program.shapes.params)
    count, trained = (sum(leaf.size for leaf in part.values()) / 1e6 for part in parts)
    print(f"{config.arm}: {count:.2f} M parameters, {trained:.2f} M of them trained")
    print(f"{config.steps} steps of {config.samples} samples")
    print(describe(program.shapes, program.shardings))
    if config.loss.demonstrations:
        print(describe_data(config.data, contract, config.steps * config.data.batch_size))
    print(f"data: {contract.dataset} ({contract.fingerprint[:12]})   run: {run_dir}", flush=True)


def _write_run_files(run_dir: Path, config: TrainConfig, contract: Contract) -> None:
    write_atomically(run_dir / "tokenizer.json", contract.tokenizer)
    contract.save(run_dir / "contract.json")
    write_atomically(run_dir / "config.json", to_json(config) + "\n")
    path = run_dir / "provenance.json"
    starts = json.loads(path.read_text()) if path.is_file() else []
    write_atomically(path, json.dumps([*starts, provenance(contract)], indent=1) + "\n")


def provenance(contract: Contract) -> dict[str, Any]:
    """What this start of a run depended on: command, commit, versions, devices, data."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.orig_argv),
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": {"vla_jax": vla_jax.__version__, **{name: metadata.version(name) for name in PACKAGES}},
        "devices": [str(device.device_kind) for device in jax.devices()],
        "data": {"name": contract.dataset, "fingerprint": contract.fingerprint},
    }


def git_commit() -> str | None:
    """The commit of this source tree, with "+changes" where files differ from it; None outside a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
