"""Typed settings: nested mappings become frozen dataclasses, and every mistake is named by its dotted key."""

import ast
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from ml_collections import ConfigDict

from vla_jax.errors import UserError

T = TypeVar("T")


def resolve(cls: type[T], mapping: Mapping[str, Any] | T, path: str = "") -> T:
    """Builds the frozen dataclass `cls` from a nested mapping, checking every key and every type.

    Args:
        cls: a dataclass of int, float, str, bool, None, tuples, dicts, Literals, unions and dataclasses.
        mapping: a dict, a ConfigDict, or an instance of `cls`. Keys that are left out take the field's default.
        path: dotted path of `mapping` in the whole configuration, for messages.

    Raises:
        UserError: "unknown key 'model.trnk': did you mean 'model.trunk'?", a wrong type, or a missing key.
    """
    if isinstance(mapping, cls):
        return mapping
    if isinstance(mapping, ConfigDict):
        mapping = mapping.to_dict()
    if not isinstance(mapping, Mapping):
        raise UserError(f"'{path}' must be a group of settings ({cls.__name__}), not {mapping!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    values = {}
    for key, value in mapping.items():
        if key not in fields:
            raise UserError(unknown_key(join(path, key), [join(path, name) for name in fields]))
        values[key] = _check(hints[key], value, join(path, key))
    for name, field in fields.items():
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in values and not has_default:
            raise UserError(f"missing setting '{join(path, name)}': give it by --config.{join(path, name)}=…")
    try:
        return cls(**values)
    except ValueError as error:  # raised by a __post_init__ that checks what types cannot say
        raise UserError(f"in '{path or cls.__name__}': {error}") from error


def _check(expected: Any, value: Any, path: str) -> Any:
    """Returns `value` as the type `expected` (a list becomes a tuple, an int a float), or raises UserError."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if dataclasses.is_dataclass(expected):
        return resolve(expected, value, path)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        hint = suggest(str(value), [str(choice) for choice in arguments])
        raise UserError(f"'{path}' must be one of {listing(arguments)}, not {value!r}{hint}")
    if origin in (Union, types.UnionType):
        return _check_union(arguments, value, path)
    if expected is tuple or origin is tuple:
        return _check_tuple(arguments, value, path)
    if expected is dict or origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"'{path}' must be a mapping, not {value!r}")
        item = arguments[1] if arguments else Any
        return {key: _check(item, entry, join(path, str(key))) for key, entry in value.items()}
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is a subclass of int, but True is not a number of steps.
    if isinstance(value, expected) and not (isinstance(value, bool) and expected is not bool):
        return value
    raise UserError(f"'{path}' must be {_type_name(expected)}, not {value!r}")


def _check_union(choices: tuple, value: Any, path: str) -> Any:
    if value is None and type(None) in choices:
        return None
    errors = []
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return _check(choice, value, path)
        except UserError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise UserError(f"'{path}' must be {' or '.join(_type_name(choice) for choice in choices)}, not {value!r}")


def _check_tuple(arguments: tuple, value: Any, path: str) -> tuple:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UserError(f"'{path}' must be a tuple, not {value!r}")
    if not arguments:
        return tuple(value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_check(arguments[0], item, f"{path}.{index}") for index, item in enumerate(value))
    if len(arguments) != len(value):
        raise UserError(f"'{path}' must have {len(arguments)} entries, not {len(value)}: {value!r}")
    pairs = zip(arguments, value, strict=True)
    return tuple(_check(expected, item, f"{path}.{index}") for index, (expected, item) in enumerate(pairs))


def to_json(config: Any) -> str:
    """The resolved dataclass as JSON text (indented, keys in the order of the fields)."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(cls: type[T], text: str) -> T:
    """The inverse of `to_json`."""
    return resolve(cls, json.loads(text))


def diff(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two configurations differ -> (value in a, value in b), with None where a key is absent."""
    flat_a, flat_b = _flatten(a), _flatten(b)
    absent = object()  # None is a value like any other
    return {
        key: (flat_a.get(key), flat_b.get(key))
        for key in {**flat_a, **flat_b}
        if flat_a.get(key, absent) != flat_b.get(key, absent)
    }


def parse_value(expected: Any, text: str, path: str) -> Any:
    """Reads the text of a flag as the type `expected`."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (Union, types.UnionType):
        if text.lower() == "none" and type(None) in arguments:
            return None
        choices = [choice for choice in arguments if choice is not type(None)]
        if len(choices) == 1:
            return parse_value(choices[0], text, path)
        return _check(expected, _literal(text), path)
    if expected is bool:
        return parse_bool(text, path)
    if expected is str:
        return text
    if origin is Literal and text in arguments:
        return text
    if expected in (tuple, list) or origin in (tuple, list):
        value = _literal(text if text.strip()[:1] in ("(", "[") else f"({text},)" if text else "()")
        # words need no quotes: --config.views=front,wrist
        if isinstance(value, str):
            value = [_literal(item.strip()) for item in text.strip("()[]").split(",") if item.strip()]
        return _check(tuple if expected is list else expected, value, path)
    return _check(expected, _literal(text), path)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def parse_bool(text: str, path: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise UserError(f"'{path}' must be true or false, not {text!r}")
    return text.lower() in ("true", "1")


def dataclass_in(expected: Any) -> type | None:
    """The dataclass that a field's type is or (Optional) may be."""
    union = typing.get_origin(expected) in (Union, types.UnionType)
    choices = typing.get_args(expected) if union else (expected,)
    return next((choice for choice in choices if dataclasses.is_dataclass(choice)), None)


def entries_of(expected: Any) -> Any:
    """The type of the entries where a field is a mapping, else None."""
    return typing.get_args(expected)[1] if typing.get_origin(expected) in (dict, Mapping) else None


def suggest(name: str, known: Sequence[str]) -> str:
    """ ": did you mean 'x'?" with the closest of `known`, or "" where none is close."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f": did you mean '{matches[0]}'?" if matches else ""


def nearest(name: str, known: Sequence[str]) -> str:
    """Like `suggest`, but lists what is known where nothing is close."""
    return suggest(name, known) or f": known are {listing(known)}"


def _flatten(config: Any, path: str = "") -> dict[str, Any]:
    if isinstance(config, ConfigDict):
        config = config.to_dict()
    if dataclasses.is_dataclass(config):
        config = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if not isinstance(config, Mapping):
        return {path: tuple(config) if isinstance(config, list) else config}
    return {k: v for name, value in config.items() for k, v in _flatten(value, join(path, str(name))).items()}


def keys_named(schema: Any, name: str) -> list[str]:
    """The dotted keys inside a dataclass's groups whose last part is `name`."""
    if (group := dataclass_in(schema)) is None:
        return []
    inside = {field.name: typing.get_type_hints(group)[field.name] for field in dataclasses.fields(group)}
    deeper = [join(field, key) for field, expected in inside.items() for key in keys_named(expected, name)]
    return [*(field for field in inside if field == name), *deeper]


def unknown_key(key: str, known: Sequence[str]) -> str:
    return f"unknown key '{key}'{nearest(key, known)}"


def listing(names: Sequence[Any]) -> str:
    return ", ".join(repr(name) for name in names)


def _type_name(expected: Any) -> str:
    if expected is type(None):
        return "none"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", tuple: "a tuple"}
    return names.get(expected, getattr(expected, "__name__", str(expected)))


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
