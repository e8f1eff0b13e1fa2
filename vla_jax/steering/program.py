"""Reward programs: stages of terms, read from JSON and compiled to JAX. Nothing that a model wrote is ever executed.

    {"stages": [{"name": "reach", "terms": [{"term": "distance", "keypoint": "red cube", "offset": [0, 0, 0.03]}]}]}

A keypoint is a number, or the name of the object on which it lies (its first keypoint). A stage may say what it lasts
"until": "reward", its reward having risen; "gripper", the gripper having changed; "either", if nothing is said.

Axes: K keypoints, T poses of a path.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vla_jax.errors import UserError
from vla_jax.schema import nearest
from vla_jax.steering.terms import TERMS, Term, View

MAX_STAGES, MAX_TERMS = 8, 8
EITHER, REWARD, GRIPPER = UNTIL = ("either", "reward", "gripper")  # what ends a stage


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stage:
    """Terms that are added up while this stage lasts. until: what ends it, one of UNTIL."""

    name: str = dataclasses.field(metadata={"static": True})
    terms: tuple[Term, ...]
    until: str = dataclasses.field(default=EITHER, metadata={"static": True})

    def __call__(self, view: View, path: Float[Array, "T 3"]) -> Float[Array, ""]:
        """The sum of the terms."""
        return jnp.stack([term(view, path) for term in self.terms]).sum()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Program:
    """What a task asks of an end-effector path, stage by stage. A pytree of its numbers."""

    stages: tuple[Stage, ...]

    def reward(self, view: View, path: Float[Array, "T 3"], stage: Int[Array, ""]) -> Float[Array, ""]:
        """The reward of a path in a stage: metres squared, negative, 0 where all terms are satisfied."""
        return jnp.stack([part(view, path) for part in self.stages])[stage]

    def ends(self, stage: Int[Array, ""], by: str) -> Bool[Array, ""]:
        """Whether a stage can end by its reward, or by the gripper."""
        return jnp.array([part.until in (EITHER, by) for part in self.stages])[stage]

    def to_json(self) -> str:
        """Inverse of `parse`."""

        def plain(value):
            return np.asarray(value).tolist()

        stages = [
            {
                "name": part.name,
                "until": part.until,
                "terms": [{"term": term.name, **_numbers(term, plain)} for term in part.terms],
            }
            for part in self.stages
        ]
        return json.dumps({"stages": stages}, indent=1)


def _numbers(term: Term, convert: Callable) -> dict[str, Any]:
    return {field.name: convert(getattr(term, field.name)) for field in dataclasses.fields(term)}


def parse(text: str, labels: Sequence[str]) -> Program:
    """Reads a program for a scene whose keypoint k lies on the object labels[k].

    Raises:
        UserError: the text is not JSON or not a program; the message names the stage and the term at fault.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the reward program is not JSON ({error}): {_shorten(text)}") from error
    _check_keys(value, {"stages"}, {"stages"}, "the reward program")
    stages = value["stages"]
    if not isinstance(stages, list) or not 1 <= len(stages) <= MAX_STAGES:
        raise UserError(f"the reward program needs a list of 1 to {MAX_STAGES} stages")
    return Program(tuple(_stage(part, number, labels) for number, part in enumerate(stages, 1)))


def unnamed(program: Program) -> Program:
    """The program without the names of its stages. A model words them anew for every scene, and as part of a program's
    structure they would keep apart what compiles alike."""
    return dataclasses.replace(program, stages=tuple(dataclasses.replace(part, name="") for part in program.stages))


def stack(programs: Sequence[Program]) -> Program:
    """Programs of one structure, their numbers along a new leading axis; the names of their stages are left out.

    Raises:
        UserError: they differ in their stages or terms.
    """
    programs = [unnamed(program) for program in programs]
    structures = {jax.tree.structure(program) for program in programs}
    if len(structures) != 1:
        raise UserError("reward programs of different stages or terms cannot be run in one batch: split it")
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *programs)


def place(number: int, stage: str, index: int | None = None, term: str = "") -> str:
    """How a part of a program is called in messages."""
    where = f"stage {number} ({stage!r})"
    return where if index is None else f"{where}, term {index} ({term!r})"


def _stage(value: Any, number: int, labels: Sequence[str]) -> Stage:
    _check_keys(value, {"name", "terms"}, {"name", "terms", "until"}, f"stage {number}")
    name, terms, until = value["name"], value["terms"], value.get("until", EITHER)
    if not isinstance(name, str):
        raise UserError(f"stage {number}: its name is {name!r}, not a text")
    if not isinstance(terms, list) or not 1 <= len(terms) <= MAX_TERMS:
        raise UserError(f"{place(number, name)} needs a list of 1 to {MAX_TERMS} terms")
    if until not in UNTIL:
        raise UserError(f"{place(number, name)}: 'until' must be one of {', '.join(UNTIL)}, got {until!r}")
    return Stage(name, tuple(_term(term, number, name, index, labels) for index, term in enumerate(terms, 1)), until)


def _term(value: Any, number: int, stage: str, index: int, labels: Sequence[str]) -> Term:
    if not isinstance(value, dict) or not isinstance(value.get("term"), str):
        raise UserError(f"{place(number, stage)}: term {index} must be an object with a 'term', got {value!r}")
    where = place(number, stage, index, value["term"])
    if value["term"] not in TERMS:
        raise UserError(f"{where}: no such term{nearest(value['term'], TERMS)}")
    term = TERMS[value["term"]]
    defaults = {f.name: f.default for f in dataclasses.fields(term) if f.default is not dataclasses.MISSING}
    _check_keys(value, {"term", *set(term.kinds).difference(defaults)}, {"term", *term.kinds}, where)
    given = defaults | value
    return term(**{name: FIELDS[kind](given[name], f"{where}: {name}", labels) for name, kind in term.kinds.items()})


def _check_keys(value: Any, needed: set[str], known: set[str], where: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a JSON object, got {_shorten(repr(value))}")
    if missing := sorted(needed - set(value)):
        raise UserError(f"{where} lacks {missing[0]!r}")
    if unknown := sorted(set(value) - known):
        raise UserError(f"{where} has an unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}")


def _keypoint(value: Any, where: str, labels: Sequence[str]) -> np.ndarray:
    if isinstance(value, str):
        if value not in labels:
            raise UserError(f"{where} is {value!r}, but the keypoints lie on {', '.join(dict.fromkeys(labels))}")
        return np.int32(list(labels).index(value))
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where} must be the number of a keypoint or the name of an object, got {value!r}")
    if not 0 <= value < len(labels):
        raise UserError(f"{where} is {value}, but there are {len(labels)} keypoints: take 0 to {len(labels) - 1}")
    return np.int32(value)


def _number(value: Any, where: str, labels=()) -> np.float32:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise UserError(f"{where} must be a finite number, got {repr(value)[:40]}")
    return np.float32(value)


def _positive(value: Any, where: str, labels=()) -> np.float32:
    if (number := _number(value, where)) <= 0:
        raise UserError(f"{where} must be above 0, got {value!r}")
    return number


def _fraction(value: Any, where: str, labels=()) -> np.float32:
    if not 0 < (number := _number(value, where)) <= 1:
        raise UserError(f"{where} must be in (0, 1], got {value!r}")
    return number


def _vector(value: Any, where: str, labels=()) -> Float[np.ndarray, " 3"]:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise UserError(f"{where} must be three numbers, got {value!r}")
    return np.array([_number(part, where) for part in value])


def _direction(value: Any, where: str, labels=()) -> Float[np.ndarray, " 3"]:
    vector = _vector(value, where)
    if (length := np.linalg.norm(vector)) < 1e-6:
        raise UserError(f"{where} must point somewhere, got {value!r}")
    return vector / length


def _axes(value: Any, where: str, labels=()) -> Float[np.ndarray, " 3"]:
    vector = _vector(value, where)
    if vector.min() < 0 or not vector.any():
        raise UserError(f"{where} must be three weights, none below 0 and not all 0, got {value!r}")
    return vector


LARGEST = float(np.finfo(np.float32).max)
FIELDS = {
    "keypoint": _keypoint,
    "number": _number,
    "positive": _positive,
    "fraction": _fraction,
    "vector": _vector,
    "direction": _direction,
    "axes": _axes,
}


def _shorten(text: str, length: int = 80) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
