"""Configurations: ml_collections files for people, frozen dataclasses for the code.

    configs/x.py               get_config(arg="") -> ConfigDict: written by people, changed by `--config.key=value`
    TrainConfig, DataConfig …  frozen dataclasses that live beside the code that reads them

`resolve` turns the one into the other once, at the entry point. Every mistake (an unknown key, a wrong type, a missing
file, a misspelt flag) is a `UserError` that names the dotted key and the nearest thing that exists.

Usage of an entry point:

    def main(argv):
        arguments = parse_args(argv, schema=TrainConfig, flags=("resume",))
        config = resolve(TrainConfig, arguments.config)
        train(config, arguments.workdir, resume=arguments.flags["resume"])

    if __name__ == "__main__":
        run_entry(main)
"""

import dataclasses
import errno
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vla_jax.errors import UserError
from vla_jax.platform import keep_freed_memory
from vla_jax.schema import (
    dataclass_in,
    diff,
    entries_of,
    from_json,
    join,
    keys_named,
    listing,
    nearest,
    parse_bool,
    parse_value,
    resolve,
    suggest,
    to_json,
    unknown_key,
)

__all__ = [
    "Arguments",
    "diff",
    "from_json",
    "load_config",
    "nearest",
    "override",
    "parse_args",
    "resolve",
    "run_entry",
    "to_json",
]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What an entry point was told: the configuration (not resolved yet), the run directory, and the other flags."""

    config: ConfigDict
    workdir: str | None
    flags: dict[str, Any]  # boolean flags are False and flags with a value are None where they were not given


def parse_args(
    argv: Sequence[str],
    schema: type | None = None,
    default_config: str | None = None,
    flags: Sequence[str] = (),
    options: Sequence[str] = (),
) -> Arguments:
    """Parses `--config=configs/x.py[:arg] --config.key=value --workdir=DIR` and further flags.

    Args:
        argv: the arguments without the program's name.
        schema: the dataclass that the configuration will be resolved to. With it, keys that the file leaves at their
            defaults can be set too, and values are read as the field's type; without it, only keys of the file can be
            set, and values are read as the type of the present one.
        default_config: the file that is used where `--config` is not given.
        flags: names of further boolean flags (`--resume`).
        options: names of further flags that take a string (`--split=swapped`).

    Raises:
        UserError: an unknown flag or key, a missing file or value, a value that does not parse.
    """
    file, workdir, overrides = default_config, None, []
    values: dict[str, Any] = {**dict.fromkeys(flags, False), **dict.fromkeys(options)}
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        if argument in ("-h", "--help"):
            print(_help(schema, default_config, flags, options))
            raise SystemExit(0)
        if not argument.startswith("--"):
            raise UserError(f"unexpected argument {argument!r}: settings are written --config.key=value")
        name, equals, value = argument[2:].partition("=")
        if name in flags:
            values[name] = parse_bool(value, f"--{name}") if equals else True
            continue
        known = ["config", "workdir", *flags, *options]
        if name not in known and not name.startswith("config."):
            raise UserError(f"unknown flag '--{name}'{suggest(f'--{name}', ['--' + k for k in known])}")
        if not equals:
            if not arguments or arguments[0].startswith("--"):
                raise UserError(f"--{name} needs a value: --{name}=…")
            value = arguments.pop(0)
        if name == "config":
            file = value
        elif name == "workdir":
            if "://" in value:
                raise UserError(f"--workdir={value} is no directory: mount the bucket, and give the path where it is")
            workdir = value
        elif name in options:
            values[name] = value
        else:
            overrides.append((name.removeprefix("config."), value))
    if file is None:
        raise UserError("no configuration: give one by --config=configs/….py")
    config = load_config(file)
    for key, value in overrides:
        override(config, key, value, schema)
    return Arguments(config, workdir, values)


def load_config(spec: str) -> ConfigDict:
    """Runs `get_config(arg)` of a config file; `spec` is "path.py" or "path.py:arg"."""
    name, _, argument = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        present = [str(file) for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"no config file '{name}'{suggest(name, present)}")
    module_spec = importlib.util.spec_from_file_location(f"vla_jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"'{name}' is not a config file: it defines no get_config()")
    takes_argument = bool(inspect.signature(module.get_config).parameters)
    if argument and not takes_argument:
        raise UserError(f"'{name}' takes no argument, but ':{argument}' was given")
    config = module.get_config(argument) if argument else module.get_config()
    return config if isinstance(config, ConfigDict) else ConfigDict(config)


def override(config: ConfigDict, key: str, text: str, schema: type | None = None) -> None:
    """Sets `config[key]` (a dotted key) from the text of `--config.key=text`, in place."""
    value = _parse_by_schema(schema, config, key, text) if schema else _parse_by_value(config, key, text)
    *parents, leaf = key.split(".")
    with config.unlocked(), config.ignore_type():  # a file may say 1 where the field is a float
        node = config
        for name in parents:
            if not isinstance(node.get(name), ConfigDict):
                node[name] = ConfigDict()
            node = node[name]
        node[leaf] = value


def run_entry(main: Callable[[Sequence[str]], Any]) -> None:
    """Runs an entry point: a UserError is one line and status 2, Ctrl-C is 130 (or the status that the interrupt
    carries); bugs keep their traceback."""
    keep_freed_memory()
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        raise SystemExit(getattr(stop, "status", 130)) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" at '{error.filename}'" if error.filename else ""
        print(f"error: no space left on the disk{where}: free some and run the command again", file=sys.stderr)
        raise SystemExit(2) from None


def _parse_by_schema(schema: type, config: ConfigDict, key: str, text: str) -> Any:
    expected, path, present = schema, "", config
    for name in key.split("."):
        group, entries = dataclass_in(expected), entries_of(expected)
        if group is None and entries is None:
            raise UserError(f"'{path}' has no settings inside it, so '{key}' cannot be set")
        # A mapping has the entries that the file gives it: a misspelt name must not become a new one.
        known = [field.name for field in dataclasses.fields(group)] if group else list(present or ())
        if name not in known:
            if inside := keys_named(expected, name):
                meant = " or ".join(f"'{join(path, key)}'" for key in inside)
                raise UserError(f"unknown key '{join(path, name)}': did you mean {meant}?")
            raise UserError(unknown_key(join(path, name), [join(path, field) for field in known]))
        expected, path = typing.get_type_hints(group)[name] if group else entries, join(path, name)
        present = present.get(name) if isinstance(present, ConfigDict) else None
    return parse_value(expected, text, key)


def _parse_by_value(config: ConfigDict, key: str, text: str) -> Any:
    present, path = config, ""
    for name in key.split("."):
        path = join(path, name)
        if not isinstance(present, ConfigDict) or name not in present:
            raise UserError(unknown_key(path, _keys(config)))
        present = present[name]
    if isinstance(present, ConfigDict):
        raise UserError(f"'{key}' is a group of settings: set one of {listing(_keys(present, key))}")
    return parse_value(Any if present is None else type(present), text, key)


def _keys(config: ConfigDict, path: str = "") -> list[str]:
    """Every dotted key of a configuration, groups included."""
    keys = []
    for key, value in config.items():
        keys.append(join(path, key))
        if isinstance(value, ConfigDict):
            keys += _keys(value, join(path, key))
    return keys


def _usage(default_config: str | None, flags: Sequence[str], options: Sequence[str]) -> str:
    config = f"--config={default_config or 'FILE.py'}[:ARG]"
    extra = [f"[--{name}]" for name in flags] + [f"[--{name}=…]" for name in options]
    return " ".join(["usage:", config, "[--config.KEY=VALUE …]", "[--workdir=DIR]", *extra])


def _help(schema: type | None, default_config: str | None, flags: Sequence[str], options: Sequence[str]) -> str:
    """How the entry point is called, what it says of itself, and the settings that --config.KEY may name."""
    parts = [_usage(default_config, flags, options), inspect.getdoc(sys.modules["__main__"])]
    if schema:
        parts += [f"Settings (KEY; a group's are group.KEY): {inspect.getdoc(schema)}"]
    parts += ["ARG: what a configuration may be varied by stands at the head of its file."]
    return "\n\n".join(part for part in parts if part)
