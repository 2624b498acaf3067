"""Builds a `Config` from a config file and `key=value` words; writes and reads it as JSON.

The command line overrides the file, and the file overrides the defaults. In between, a config is a
flat dict of dotted keys, so that only final values are validated together. JAX is not imported.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import math
import numbers
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from moejax.config import Config, ConfigError
from moejax.errors import UnreadKeyError

JSON_FORMAT = 1  # of config_to_json; a new key with a neutral default does not change it


@dataclasses.dataclass(frozen=True)
class Key:
    """One dotted key of the config; `comment` says what it means."""

    name: str
    annotation: Any
    default: Any
    comment: str = ""


@functools.cache
def keys() -> dict[str, Key]:
    """Returns every key by its dotted name, in the order of the dataclasses."""
    found = {}
    for field in dataclasses.fields(Config):
        owner, prefix = type(field.default), field.name + "."
        if not dataclasses.is_dataclass(owner):
            owner, prefix = Config, ""
        hints, comments = typing.get_type_hints(owner), _comments(owner)
        for inner in dataclasses.fields(owner) if prefix else [field]:
            name, comment = prefix + inner.name, comments.get(inner.name, "")
            found[name] = Key(name, hints[inner.name], inner.default, comment)
    return found


_FIELD = re.compile(r"    (?P<name>\w+): [^#]*(?:# (?P<comment>.*))?")


def _comments(owner: type) -> dict[str, str]:
    """Returns the comment of each field in a dataclass's source: behind it, or right above it."""
    source = inspect.getsource(sys.modules[owner.__module__])
    body = source.partition(f"\nclass {owner.__name__}:\n")[2].partition("\n    def ")[0]
    found, above = {}, []
    for line in body.splitlines():
        if line.startswith("    # "):
            above.append(line.removeprefix("    # "))
            continue
        if match := _FIELD.fullmatch(line):
            found[match["name"]] = " ".join([*above, match["comment"] or ""]).strip()
        above = []
    return found


@functools.cache
def sections() -> dict[str, type]:
    """Returns the dataclass of each section."""
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    return {
        name: type(value) for name, value in defaults.items() if dataclasses.is_dataclass(value)
    }


# Loading


def load_config(file_with_arg: str, overrides: Sequence[str] = ()) -> Config:
    """Loads `configs/x.py` or `configs/x.py:arg` and applies `key=value` words on top.

    Raises:
        ConfigError: the file, a key, a value or their combination is wrong.
    """
    values = load_values(file_with_arg)
    values.update(read_overrides(overrides))
    return build_config(values)


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Returns `config` changed by `key=value` words.

    Raises:
        ConfigError: a key, a value or their combination is wrong.
    """
    return build_config({**config_values(config), **read_overrides(overrides)})


def load_values(file_with_arg: str) -> dict[str, Any]:
    """Returns a config file's flat dict over the defaults; combinations are not checked yet."""
    path, found = run_file(file_with_arg)
    defaults = {name: key.default for name, key in keys().items()}
    try:
        return defaults | _checked(_nested(found))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def run_file(file_with_arg: str, function: str = "get_config") -> tuple[Path, Any]:
    """Returns the file that `x.py` or `x.py:arg` names, and what its function returns for `arg`.

    Raises:
        ConfigError: there is no such file or function, or something went wrong in it.
    """
    match = re.fullmatch(r"(.+?\.py)(?::(.*))?", file_with_arg, flags=re.DOTALL)
    if match is None:
        raise ConfigError(
            f"{file_with_arg!r} is not a Python file; for example configs/quickstart.py"
        )
    path, arg = Path(match[1]), match[2]
    return path, _run_function(path, _read_source(path), arg, function)


def _read_source(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = suggest(str(path), [str(other) for other in sorted(path.parent.glob("*.py"))])
        raise ConfigError(f"config file {path} does not exist{near}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None


def _run_function(path: Path, source: str, arg: str | None, name: str) -> Any:
    """Runs the file like a script: its folder is importable, no bytecode is written next to it."""
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    folder = path.parent.resolve()
    sys.path.append(str(folder))
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)  # noqa: S102 - the user's
        if not callable(function := getattr(module, name, None)):
            raise ConfigError(f"{path} does not define {name}(arg)")
        if inspect.signature(function).parameters:
            return function(arg)
        if arg is not None:
            raise ConfigError(
                f"{name}() of {path} takes no argument, and {arg!r} was given; use {path} alone"
            )
        return function()
    except (Exception, SystemExit) as error:  # whatever goes wrong in the user's file is bad input
        raise _error_in_file(path, error) from error
    finally:
        sys.path.pop()
        _forget_modules_of(folder)


def _forget_modules_of(folder: Path) -> None:
    """Forgets what a config imported from its folder: another's may have the same name."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).parent == folder:
            sys.modules.pop(name, None)  # another thread may have run the same file


def _error_in_file(path: Path, error: BaseException) -> ConfigError:
    """Names file, line and cause; a key that the locked config refused gets a suggestion."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
    where = f"{path}, line {line}" if line else str(path)
    unknown = re.match(r'.*?[Kk]ey "(\w+)" does not exist', str(error), flags=re.DOTALL)
    if isinstance(error, AttributeError):
        unknown = unknown or re.fullmatch(
            r"""["']+(\w+)["']+""", str(error)
        )  # reading a key, not setting it
    if isinstance(error, ConfigError):
        return ConfigError(f"{where}: {error}" if line else str(error))
    if unknown:
        return ConfigError(f"{where}: unknown key {unknown[1]!r}{suggest(unknown[1], keys())}")
    reason = error.msg if isinstance(error, SyntaxError) else str(error)
    return ConfigError(f"{where}: {type(error).__name__}: {reason}")


def _nested(found: Any) -> Mapping[str, Any]:
    if isinstance(found, ConfigDict):
        return found.to_dict()
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        return dataclasses.asdict(found)
    if isinstance(found, Mapping):
        return found
    raise ConfigError(
        f"get_config returned {type(found).__name__}; return default_config() with your changes"
    )


def _checked(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens a nested config to dotted keys, with every value converted to its key's type."""
    values = {}
    for name, value in nested.items():
        if name in sections() and (isinstance(value, Mapping) or dataclasses.is_dataclass(value)):
            for inner, inner_value in _nested(value).items():
                key = find_key(f"{name}.{inner}")
                values[key.name] = convert(inner_value, key)
        else:
            key = find_key(str(name))
            values[key.name] = convert(value, key)
    return values


def build_config(values: Mapping[str, Any]) -> Config:
    """Returns the validated `Config` of a complete flat dict."""
    nested: dict[str, Any] = {name: {} for name in sections()}
    for name, value in values.items():
        section, _, inner = name.rpartition(".")
        (nested[section] if section else nested)[inner] = value
    built = {name: owner(**nested.pop(name)) for name, owner in sections().items()}
    return Config(**built, **nested)


# Keys


def find_key(name: str) -> Key:
    """Returns the key called `name`.

    Raises:
        ConfigError: there is none; the message says which was probably meant.
    """
    if name in keys():
        return keys()[name]
    if name in sections():
        inside = ", ".join(key for key in keys() if key.startswith(f"{name}."))
        raise ConfigError(f"{name} is a section; set one of its keys: {inside}")
    raise ConfigError(f"unknown key {name!r}{suggest(name, keys())}")


def suggest(word: str, names: Iterable[str]) -> str:
    """Returns `"; did you mean a or b?"` for the names nearest to `word`, or an empty string.

    A name is near when its last part is the word's last part or has it as initials (`lr` for
    `optim.learning_rate`), or when the two spell alike.
    """
    if len(word) > 100:  # comparing takes the product of the lengths
        return ""
    last = word.rpartition(".")[2]

    def parts(name: str) -> tuple[str, str]:
        end = name.rpartition(".")[2]
        return end, "".join(piece[:1] for piece in end.split("_"))

    def score(name: str) -> float:
        pairs = ((word, name), (last, parts(name)[0]))
        return max(difflib.SequenceMatcher(None, a, b).ratio() for a, b in pairs)

    names = list(names)
    near = [name for name in names if last in parts(name)]
    if not near and names:
        best = max(names, key=score)
        near = [best] if score(best) >= 0.6 else []
    return f"; did you mean {' or '.join(near)}?" if near else ""


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the converted value of each `key=value` word.

    Raises:
        ConfigError: a word is not `key=value`, a key is unknown or given twice, a value has the
            wrong type.
    """
    values, texts = {}, {}
    for word in overrides:
        name, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} is not key=value; for example train.steps=1000")
        key = find_key(name)
        if name in values:
            raise ConfigError(
                f"{name} is given twice, as {texts[name]} and as {text}; give it once"
            )
        values[name], texts[name] = parse_value(text, key), text
    return values


# Values


def parse_value(text: str, key: Key) -> Any:
    """Returns what `text` on the command line means as a value of `key`: `1e4` can be an int."""
    if not text:
        raise ConfigError(f"{key.name} has no value; {_example(key)}")
    return convert(_read(text, key.annotation), key)


def _read(text: str, annotation: Any) -> Any:
    """Returns the Python value that `text` spells, or `text` itself for `convert` to judge."""
    kind, optional = _without_none(annotation)
    if optional and text.lower() == "none":
        return None
    if typing.get_origin(kind) is tuple:
        literal = _literal(text)
        if isinstance(literal, (tuple, list)):
            return literal
        inner = text[1:-1] if text[0] + text[-1] in ("()", "[]") else text
        parts = inner.removesuffix(",").split(",")
        return [_read(part.strip(), typing.get_args(kind)[0]) for part in parts]
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in (int, float):
        return _number(text)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    literal = _literal(text) if quoted else None
    return literal if isinstance(literal, str) else text


def _number(text: str) -> int | float | str:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def convert(value: Any, key: Key) -> Any:
    """Returns a Python value as the type of `key`.

    Raises:
        ConfigError: it is not one; the message has key, value, what is asked and an example.
    """
    kind, optional = _without_none(key.annotation)
    if value is None and optional:
        return None
    try:
        return _as(kind, value)
    except (TypeError, ValueError, OverflowError):
        asked = describe_type(key.annotation)
        raise ConfigError(f"{key.name}={_short(value)} is not {asked}; {_example(key)}") from None


def _as(kind: Any, value: Any) -> Any:
    """Returns `value` as `kind`, or raises ValueError. Neither True nor "1" is a number."""
    if typing.get_origin(kind) is tuple and isinstance(value, (tuple, list)):
        return tuple(_as(typing.get_args(kind)[0], item) for item in value)
    if isinstance(value, str):
        allowed = (
            typing.get_args(kind)
            if typing.get_origin(kind) is Literal
            else [value]
            if kind is str
            else []
        )
        if value in allowed and value.isprintable():
            return value
    elif isinstance(value, bool):
        if kind is bool:
            return value
    elif isinstance(value, numbers.Real):
        return _as_number(kind, value)
    raise ValueError(value)


def _as_number(kind: Any, value: Any) -> int | float:
    if kind is int and value == int(value) and abs(value) < 2**63:
        return int(value)
    if kind is float and math.isfinite(value):
        return float(value)
    raise ValueError(value)


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """Splits `X | None` into `X` and True, and any other type into itself and False."""
    if isinstance(annotation, types.UnionType):
        (kind,) = (arg for arg in typing.get_args(annotation) if arg is not types.NoneType)
        return kind, True
    return annotation, False


def describe_type(annotation: Any) -> str:
    """Returns what a value of the type is called in messages and in `--help`."""
    kind, optional = _without_none(annotation)
    names = {
        int: "a whole number",
        float: "a finite number",
        bool: "true or false",
        str: "a string",
    }
    if typing.get_origin(kind) is Literal:
        name = "one of " + ", ".join(typing.get_args(kind))
    elif typing.get_origin(kind) is tuple:
        name = f"a list, each {describe_type(typing.get_args(kind)[0])}"
    else:
        name = names[kind]
    return name + (" or None" if optional else "")


def _example(key: Key) -> str:
    kind, _ = _without_none(key.annotation)
    value = key.default
    if value is None and typing.get_origin(kind) is tuple:
        value = "4,8" if typing.get_args(kind)[0] is int else "1.0,2.0"
    elif value is None:
        value = {int: 4, float: 0.1, bool: True}.get(kind, "data/mine")
    return f"for example {key.name}={value}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# Storing


def config_values(config: Config) -> dict[str, Any]:
    """Returns the config as a flat dict of dotted keys."""
    return {name: functools.reduce(getattr, name.split("."), config) for name in keys()}


def config_to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as nested dicts of plain values."""
    return dataclasses.asdict(config)


def config_difference(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """Returns `(dotted key, value in a, value in b)` for each key that differs."""
    return value_difference(config_values(a), config_values(b))


def value_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The same for flat dicts, which need not be a valid config."""
    return [(name, a[name], b[name]) for name in keys() if a[name] != b[name]]


def config_to_json(config: Config) -> str:
    """Returns the JSON that `config_from_json` reads back to an equal config."""
    return json.dumps(
        {"format": JSON_FORMAT, "config": config_to_dict(config)}, indent=1, allow_nan=False
    )


def config_from_json(text: str) -> Config:
    """Reads what `config_to_json` wrote. A missing key, from an older version, takes its default.

    So does a key that nothing reads: older versions took some of those, and trained without them.

    Raises:
        ConfigError: it is not JSON, has another format, an unknown key, or a wrong value.
    """
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}") from None
    found = stored.get("format") if isinstance(stored, dict) else None
    if found != JSON_FORMAT or not isinstance(stored.get("config"), dict):
        raise ConfigError(f"not a config of format {JSON_FORMAT} but of format {_short(found)}")
    defaults = {name: key.default for name, key in keys().items()}
    values = defaults | _checked(stored["config"])
    while True:
        try:
            return build_config(values)
        except UnreadKeyError as error:
            if values[error.key] == defaults[error.key]:
                raise  # which no default mends
            values[error.key] = defaults[error.key]
