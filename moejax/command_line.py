"""Parses a command line: a verb, options in any place, and `key=value` words."""

import argparse
import contextlib
import dataclasses
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moejax.config import Config, ConfigError
from moejax.errors import DONE, FULL, NoSpaceError, file_error
from moejax.foreign import require_path
from moejax.overrides import describe_type, keys, load_config, sections, suggest
from moejax.workdir import matches


@dataclasses.dataclass(frozen=True)
class Line:
    """A parsed command line: options, a config file, `key=value` overrides, other words."""

    options: argparse.Namespace
    config: str | None
    words: list[str]
    overrides: list[str]

    def load(self) -> Config:
        """Returns the config of a line that has a config file; raises ConfigError as it does."""
        assert self.config is not None
        return load_config(self.config, self.overrides)


class _Output:
    """A stream whose disk may fill up, and whose reader may end: what cannot be said is lost."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def outliving_output() -> Iterator[None]:
    """Has what is done inside go on when stdout or stderr cannot be written any more.

    A training has its records in files, and is worth more than the log that it was started with.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Output, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            try:
                stream.flush()
            except OSError:  # Python would try again at its end, and end with 120 for it
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Checked:
    """A stream that keeps the last error of writing it."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, function: Callable, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@dataclasses.dataclass
class Ending:
    """How a line ends; a code other than DONE stands, whatever becomes of the output."""

    code: int = DONE


@contextlib.contextmanager
def checked_output(name: str) -> Iterator[Ending]:
    """Has a line whose stdout or stderr cannot be written say so on the other, and end with a code.

    A reader that has ended (`| head`) has what it wanted: that is no error.

    Args:
        name: of the program, with which the message begins.
    """
    before = sys.stdout, sys.stderr
    outputs = sys.stdout, sys.stderr = _Checked(before[0]), _Checked(before[1])
    ending = Ending()
    try:
        try:
            yield ending
        finally:
            sys.stdout, sys.stderr = before
            for output in outputs:
                if output.error is None:
                    with contextlib.suppress(OSError):
                        output.flush()
    except (OSError, SystemExit) as error:  # argparse and rich end the process where they cannot
        lost = [output.error for output in outputs if output.error is not None]
        if error not in lost and not (lost and isinstance(error, SystemExit)):
            raise
    _say_what_was_lost(name, outputs, before, ending)


def _say_what_was_lost(name: str, outputs: Any, streams: Any, ending: Ending) -> None:
    for label, output, other in zip(("stdout", "stderr"), outputs, outputs[::-1], strict=True):
        if output.error is None or isinstance(output.error, BrokenPipeError):
            continue
        error = _lost_output(label, output.error)
        ending.code = ending.code or error.code
        with contextlib.suppress(OSError):  # the other one may be lost too
            print(f"{name}: error: {error}", file=other, flush=True)
    for output, stream in zip(outputs, streams, strict=True):
        if output.error is not None:  # Python would try again at its end, and end with 120 for it
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _lost_output(name: str, error: OSError) -> ConfigError:
    full = error.errno in FULL
    remedy = "make room, or send it to another disk" if full else "send it to another file"
    message = f"{name} cannot be written ({error.strerror}); {remedy}, and start this again"
    return NoSpaceError(message) if full else file_error(message, error)


def say(line: str) -> None:
    """Prints a line on stderr, or on stdout where that cannot be written."""
    for stream in (sys.stderr, sys.stdout):
        with contextlib.suppress(OSError):
            print(line, file=stream, flush=True)
            return


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing a usage and exiting."""

    def error(self, message: str):
        raise ConfigError(message.removeprefix("argument "))


class _Once(argparse.Action):
    """Stores a value, and refuses a second one."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = vars(namespace).setdefault("given", set())
        if self.dest in given:
            raise ConfigError(f"{option_string} is given twice; give it once")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb: its help, its options, and the function that runs a line."""

    name: str
    summary: str
    usage: str
    details: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Line], int]
    keys: tuple[str, ...] = ()  # patterns of the keys that `key=value` may set; () takes none
    config: bool = True  # whether it takes a config file
    required: tuple[str, ...] = ()  # options that must be given; the rest have defaults
    takes_words: bool = False  # other words than config files and `key=value`

    def main(self, argv: list[str]) -> int:
        return self.run(self.read(argv))

    def read(self, argv: list[str]) -> Line:
        """Sorts the words of a line into options, config file, overrides and other words."""
        options, rest = self.parser().parse_known_args(_plain_forms(argv) if self.keys else argv)
        configs, words, overrides = [], [], []
        for word in rest:
            if word.startswith("-"):
                raise self._unknown_option(word)
            if self.keys and re.match(r"[\w.]+=", word):
                overrides.append(word)
            elif self.config and re.search(r"\.py(:|$)", word):
                configs.append(word)
            elif self.keys and "=" in word:
                overrides.append(word)
            else:
                words.append(word)
        self._check(options, configs, words)
        return Line(options, configs[0] if configs else None, words, overrides)

    def _check(self, options: argparse.Namespace, configs: list[str], words: list[str]) -> None:
        if words and not self.takes_words:
            forms = "configs/NAME.py or key=value" if self.config else "key=value"
            if not self.keys:
                forms = f"only options; see moejax {self.name} --help"
            near = suggest(words[0], keys()) if self.keys else ""
            raise ConfigError(f"stray word {words[0]!r}; expected {forms}{near}")
        if len(configs) > 1:
            given = f"as {configs[0]} and as {configs[1]}"
            raise ConfigError(f"the config is given twice, {given}; give it once")
        for name in self.required:
            if getattr(options, name) is None:
                raise ConfigError(f"--{name} is missing; see moejax {self.name} --help")
        if self.keys and self.config and not configs:
            example = f"moejax {self.name} configs/quickstart.py"
            raise ConfigError(f"no config; give a file, for example {example}")

    def parser(self) -> argparse.ArgumentParser:
        epilog = f"{self.details}\n{_keys_help(self.keys)}" if self.keys else self.details
        parser = _Parser(
            prog=f"moejax {self.name}",
            usage=self.usage,
            description=f"{self.summary[0].upper()}{self.summary[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_options(parser)
        return parser

    def _unknown_option(self, word: str) -> ConfigError:
        name = word.partition("=")[0]
        known = [option for action in self.parser()._actions for option in action.option_strings]
        return ConfigError(
            f"unknown option {name}{suggest(name, known) or f'; see moejax {self.name} --help'}"
        )


def _plain_forms(argv: list[str]) -> list[str]:
    """Turns `--config=X` and `--config.key=value`, also with a space for `=`, into plain words."""
    plain = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config" and not name.startswith("--config."):
            plain.append(word)
            continue
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise ConfigError(f"{name} has no value; write {name}=VALUE")
        key = name.removeprefix("--config").removeprefix(".")
        plain.append(f"{key}={value}" if name != "--config" else _config_word(value))
    return plain


def _config_word(value: str) -> str:
    if not re.search(r"\.py(:|$)", value):
        raise ConfigError(
            f"--config={value} is not a Python file; for example --config=configs/quickstart.py"
        )
    return value


def _keys_help(patterns: tuple[str, ...]) -> str:
    lines = []
    for section in [*sections(), ""]:
        inside = [key for key in keys().values() if key.name.rpartition(".")[0] == section]
        inside = [key for key in inside if matches(key.name, patterns)]
        if inside:
            title = sections()[section].__doc__ if section else "Outside any section."
            lines.append(f"\n  {(title or '').splitlines()[0]}")
        for key in inside:
            head = f"    {f'{key.name}={key.default}':36} "
            text = f"{head}{key.comment} ({describe_type(key.annotation)})"
            lines += textwrap.wrap(text, 100, subsequent_indent=" " * 41, drop_whitespace=True)
    return "\nkeys, with their defaults:\n" + "\n".join(lines)


# Options


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Returns the type of an option that is a whole number in a range, both ends included."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,18}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {least} to {most}"
            )
        return int(text)

    return read


def between(low: float, high: float, *, open_low: bool = False) -> Callable[[str], float]:
    """Returns the type of an option that is a number in a range; `open_low` excludes `low`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or (open_low and value == low):
            asked = f"above {low:g} and" if open_low else f"from {low:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {asked} up to {high:g}")
        return value

    return read


def add_option(parser: argparse.ArgumentParser, name: str, help: str, **arguments: Any) -> None:
    """Adds an option with a value, which a line may give once."""
    parser.add_argument(name, action=_Once, help=help, **arguments)


def add_cpu_devices(parser: argparse.ArgumentParser) -> None:
    help = "use this many virtual CPU devices (default: the devices that JAX finds); CPU only"
    add_option(parser, "--cpu_devices", help, type=whole(1), metavar="N")


def add_workdir(parser: argparse.ArgumentParser, help: str) -> None:
    add_option(parser, "--workdir", help, type=readable_path, metavar="DIR")


def readable_path(text: str) -> str:
    """The type of an option that is a path: refuses what no file system takes."""
    try:
        require_path(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{text[:100]} cannot be used ({error.strerror}); give another path"
        ) from None
    return text


def add_json(parser: argparse.ArgumentParser) -> None:
    add_option(
        parser, "--json", "also write the result to FILE as JSON", type=output_file, metavar="FILE"
    )


def output_file(text: str) -> Path:
    """The type of an output file: refuses one that cannot be written before work is spent on it."""
    path = Path(readable_path(text))
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"{text} cannot be written; give a file in an existing folder"
        )
    return path


def plain_text(text: str) -> str:
    """Refuses bytes of the command line that are no UTF-8, and with it no text."""
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not UTF-8; convert it")
    return text


def add_step(parser: argparse.ArgumentParser) -> None:
    add_option(
        parser, "--step", "checkpoint to read (default: the last)", type=whole(0), metavar="N"
    )


# Other processes


def safe_path() -> list[str]:
    """Returns the Python option that keeps -m from importing modules of the current folder.

    Empty if this process imports from there itself: it was told to, or moejax is not installed.
    """
    return [] if {"", os.getcwd()} & {*sys.path} else ["-P"]
