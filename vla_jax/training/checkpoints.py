"""Checkpoints: Orbax writes them in the background and a directory appears under its number only when it is complete.

run/config.json                     the resolved TrainConfig
run/contract.json, tokenizer.json   what the policy's arrays mean
run/checkpoints/<step>/             params (those that are trained), ema, constants: flat dictionaries of arrays
                                    training: optimiser, random key, the objective's own state
                                    meta: data position, last evaluation, hash of the contract (JSON)
"""

import hashlib
import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from vla_jax.config import resolve
from vla_jax.data import tokenizer as tokenizers
from vla_jax.data.contract import Contract
from vla_jax.errors import UserError
from vla_jax.models.normalizer import DataFacts
from vla_jax.models.policy import Policy
from vla_jax.training.metrics import disk_space
from vla_jax.training.optimizer import frozen_parameters
from vla_jax.training.state import TrainState, abstract, freeze, merge
from vla_jax.training.train_config import TrainConfig

WEIGHTS = ("params", "ema", "constants")
FIRST_FILES = {"tokenizer.json", "contract.json", "config.json"}

# Orbax logs every routine save, and every failure once a thread before it raises it; of the other arrays that it was
# reading then, asyncio tells each on its own afterwards.
for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)


class Checkpoints:
    """The checkpoints of one run: written by its training process, read by anybody."""

    def __init__(self, run_dir: str | Path, keep: int = 2, write: bool = False):
        """keep: newest checkpoints that are kept. write: also removes what a killed save left behind."""
        self.run_dir = Path(run_dir)
        self.directory = self.run_dir / "checkpoints"
        if not write and not self.directory.is_dir():
            raise UserError(f"no checkpoints/ in {self.run_dir}: give the directory of a training run")
        self._orbax = ocp.training.Checkpointer(
            self.directory.resolve(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=write,
        )

    @staticmethod
    def exist(run_dir: str | Path) -> bool:
        """Whether the run has a complete checkpoint."""
        return (Path(run_dir) / "checkpoints").is_dir() and bool(Checkpoints(run_dir).steps)

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Copies the state and writes it in the background; waits for an earlier save that is still being written."""
        self.save_parts(step, _parts(state), meta)

    def save_parts(self, step: int, parts: dict[str, Any], meta: dict[str, Any]) -> None:
        """As `save`, for named pytrees of arrays."""
        if step in self.steps:
            return
        with disk_space(self.run_dir):
            self._orbax.save_checkpointables_async(step, {**parts, "meta": meta}, force=True)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        with disk_space(self.run_dir):
            self._orbax.wait()

    def close(self) -> None:
        """Waits and releases the files."""
        with disk_space(self.run_dir):
            self._orbax.close()

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """The state at `step` (None: the newest) and the meta data saved with it.

        like: arrays or shapes with shardings, which say where to place it; the run may have had other devices.
        """
        loaded = self._load(step, {**_parts(like), "meta": None})
        return _from_parts(like, loaded), loaded["meta"]

    def restore_weights(self, step: int | None, parts: dict[str, Any]) -> dict[str, Any]:
        """Some of WEIGHTS, or of what `save_parts` wrote, at `step` (None: the newest), and "meta"."""
        return self._load(step, {**parts, "meta": None})

    def _load(self, step: int | None, wanted: dict[str, Any]) -> dict[str, Any]:
        steps = self.steps
        if not steps or step not in (None, *steps):
            there = f"; complete are {', '.join(map(str, steps))}" if steps else ": none is complete"
            raise UserError(f"no checkpoint {'' if step is None else f'{step} '}in {self.directory}{there}")
        step = steps[-1] if step is None else step
        path = self.directory / str(step)
        missing = [name for name in wanted if not (path / name).is_dir()]
        if missing:
            raise UserError(f"checkpoint {path} is incomplete: {', '.join(missing)} missing; {_instead(step, steps)}")
        if self._keeps_frozen_elsewhere(step, wanted):
            raise UserError(
                f"checkpoint {path} was written by an earlier version of vla_jax, which kept frozen parameters "
                "elsewhere: train it again, or load it with that version"
            )
        try:
            return self._orbax.load_checkpointables(step, wanted)
        except Exception as error:  # Orbax has as many types of error as a directory has files
            raise UserError(f"checkpoint {path} is damaged ({_short(error)}); {_instead(step, steps)}") from error

    def _keeps_frozen_elsewhere(self, step: int, wanted: dict[str, Any]) -> bool:
        """Whether constants that are wanted are stored among the trained parameters instead."""
        try:
            stored = self._orbax.checkpointables_metadata(step).metadata
            missing = set(wanted.get("constants", ())) - set(stored["constants"])
            return bool(missing & set(stored["params"]))
        except Exception:  # a file is damaged, which loading will say
            return False


def newest_step(run_dir: str | Path) -> int:
    """The step of a run's newest complete checkpoint.

    Raises:
        UserError: there is none.
    """
    steps = Checkpoints(run_dir).steps
    if not steps:
        raise UserError(f"no checkpoint in {run_dir} is complete yet: wait for one, or go on with that run")
    return steps[-1]


def load_policy(run_dir: str | Path, step: int | None = None, ema: bool = True) -> tuple[Policy, Contract, TrainConfig]:
    """The policy of a training run, ready to act.

    Args:
        run_dir: the --workdir of experiments.train.
        step: of the checkpoint; None is the newest.
        ema: the averaged weights, where the run keeps them (optimizer.ema_decay > 0).

    Raises:
        UserError: says which part of the run directory is missing or damaged.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"no run directory {run_dir}: train one with python -m experiments.train --workdir={run_dir}")
    config = load_config(run_dir)
    contract = Contract.load(run_dir / "contract.json")
    graphdef, params, constants = abstract(policy_maker(config, contract))
    params, constants = freeze(params, constants, frozen_parameters(config.optimizer, params))
    weights = "ema" if ema and config.optimizer.ema_decay else "params"
    checkpoints = Checkpoints(run_dir)
    loaded = checkpoints.restore_weights(
        step, jax.tree.map(_on_first_device, {weights: params, "constants": constants})
    )
    checkpoints.close()
    if loaded["meta"]["contract"] != contract_id(contract):
        raise UserError(f"{run_dir}/contract.json is not the contract of its checkpoints: restore the file of this run")
    return merge(graphdef, loaded[weights], loaded["constants"]), contract, config


def load_actor(run_dir: str | Path, step: int | None = None, ema: bool = True) -> tuple[Policy, Contract, TrainConfig]:
    """As `load_policy`, for who is to act. Raises UserError for a run that learned from questions alone, too."""
    policy, contract, config = load_policy(run_dir, step, ema)
    if not config.loss.demonstrations:
        raise UserError(
            f"{run_dir} never learned to act (configs/grounding.py): train a policy that starts from it, by "
            f"experiments.train … --config.init_from={run_dir}"
        )
    return policy, contract, config


def has_begun(run_dir: Path) -> bool:
    """Whether a run, or anything else, lies there. Of one that met a full disk before it began, only the files before
    provenance.json are left, and it may start anew."""
    return run_dir.is_dir() and not {path.name for path in run_dir.iterdir()} <= FIRST_FILES


def load_config(run_dir: str | Path) -> TrainConfig:
    """The resolved configuration of a run."""
    path = Path(run_dir) / "config.json"
    if not path.is_file():
        inside = sorted(str(config.parent) for config in path.parent.glob("*/config.json"))
        if inside:
            raise UserError(f"{run_dir} is no run, but there are runs in it: give one of {', '.join(inside)}")
        raise UserError(f"no config.json in {run_dir}: the run directory is incomplete")
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: restore it from the run that wrote it") from error
    try:
        return resolve(TrainConfig, _in_todays_words(saved))
    except UserError as error:
        raise UserError(f"{path} was written by another version of vla_jax: {error}") from error


def _in_todays_words(saved: Any) -> Any:
    """Settings of earlier versions: whether layers are computed again (`remat`) was yes or no."""
    if not isinstance(saved, dict):
        return saved
    yes_or_no = {True: "all", False: "none"}
    return {
        key: yes_or_no[value] if key == "remat" and isinstance(value, bool) else _in_todays_words(value)
        for key, value in saved.items()
    }


def policy_maker(config: TrainConfig, contract: Contract):
    """A function of `nnx.Rngs` that builds the run's policy."""
    facts = policy_facts(contract, config.policy.views)
    return lambda rngs: Policy(config.policy, facts, rngs)


def policy_facts(contract: Contract, views: Collection[str] = ()) -> DataFacts:
    """What a policy needs to know of its contract. views: those that it reads; empty: all."""
    images = {view: size for view, size in contract.images.items() if view in views} or dict(contract.images)
    sizes = set(images.values())
    if len(sizes) != 1 or len(set(next(iter(sizes)))) != 1:
        raise UserError(
            f"the policy reads square pictures of one size; the dataset has {images}: set data.image_size, and they "
            "are made so"
        )
    bounds = [tuple(map(float, bound)) for bound in (*contract.action_bounds(), *contract.state_bounds())]
    vocabulary = tokenizers.from_json(contract.tokenizer).get_vocab_size()
    return DataFacts(vocabulary, contract.max_tokens, next(iter(sizes))[0], *bounds)


def contract_id(contract: Contract) -> str:
    """A short hash of the whole contract."""
    return hashlib.sha256(contract.to_json().encode()).hexdigest()[:16]


def _parts(state: TrainState) -> dict[str, Any]:
    """The checkpointables of a state; empty groups are left out."""
    rest = {"step": state.step, "opt_state": state.opt_state, "gate_state": state.gate_state, "key": state.key}
    leaves = jax.tree_util.tree_leaves_with_path(rest)
    training = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    weights = {name: getattr(state, name) for name in WEIGHTS if getattr(state, name)}
    return {**weights, "training": training}


def _from_parts(like: TrainState, parts: dict[str, Any]) -> TrainState:
    rest = {"step": like.step, "opt_state": like.opt_state, "gate_state": like.gate_state, "key": like.key}
    paths, structure = jax.tree_util.tree_flatten_with_path(rest)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    rest = jax.tree_util.tree_unflatten(structure, [parts["training"][name] for name in names])
    return TrainState(**{name: parts.get(name, {}) for name in WEIGHTS}, **rest)


def _on_first_device(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Wherever the run had its arrays: a policy is loaded where the reader is."""
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=SingleDeviceSharding(jax.local_devices()[0]))


def _instead(step: int, steps: list[int]) -> str:
    others = [str(other) for other in steps if other != step]
    return f"use step {' or '.join(others)}" if others else "there is no other"


def _short(error: Exception) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0][:160]
