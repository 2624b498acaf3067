"""Hostile inputs: values, words, files and folders as no sound program writes them; for fuzzing."""

import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st

from moejax.cli import main

EXAMPLES = int(os.environ.get("MOEJAX_FUZZ_EXAMPLES", "60"))
SECONDS = 20  # that one example may take; it takes a fraction of one

# What steers a terminal, what rich takes for markup, what is no text, and what leads elsewhere.
TEXTS = [
    *(
        "",
        " ",
        "\x1b[2J\x1b[1;31m",
        "\x1b]0;title\x07",
        "a\rb\x08",
        "[red]x[/red]",
        "[/x]",
        "$\\frac$",
    ),
    *(
        "\u202egnp",
        "\U0001f600",
        "\udcff",
        "e\u0301",
        "None",
        "nan",
        "-1",
        "1e999",
        "0x10",
        "{}",
        "[]",
    ),
    *(
        "../../outside",
        "/dev/zero",
        "/proc/self/x",
        "~",
        "~no_such_user/x",
        "a/b",
        ".",
        "..",
        "x" * 300,
    ),
    *(
        "%s%n",
        "9" * 5000,
        "true",
        "'",
        '"',
        "\n",
        "a\nb",
        "__import__('os').system('touch hacked')",
    ),
]
NUMBERS = [
    *(
        0,
        1,
        -1,
        2,
        3,
        7,
        256,
        2**15,
        2**31 - 1,
        2**31,
        2**32,
        2**40,
        2**63 - 1,
        2**63,
        2**64,
        -(2**31),
    ),
    *(
        0.0,
        -0.0,
        0.5,
        1e-300,
        1e300,
        1e308,
        float("nan"),
        float("inf"),
        float("-inf"),
        1.5,
        10**400,
    ),
]


def texts() -> st.SearchStrategy[str]:
    drawn = st.text(st.characters(exclude_characters="\0"), max_size=20)
    return st.one_of(st.sampled_from(TEXTS), drawn)


def values() -> st.SearchStrategy[Any]:
    """What JSON or Python may hold where something else is asked for."""
    plain = st.one_of(
        st.sampled_from(NUMBERS),
        texts(),
        st.none(),
        st.booleans(),
        st.integers(-5, 40),
        st.floats(),
    )
    return st.recursive(
        plain,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(texts(), inner, max_size=3)
        ),
        max_leaves=4,
    )


class TookTooLongError(BaseException):
    """An example hangs."""


@contextlib.contextmanager
def time_limit(seconds: int = SECONDS) -> Iterator[None]:
    """Ends what takes longer, also while it waits for a file."""

    def ring(*_):
        raise TookTooLongError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def settings(share: float = 1.0) -> hypothesis.settings:
    """Examples of one property; `share` of them where an example is dear."""
    count = EXAMPLES if EXAMPLES >= 1000 else max(1, round(EXAMPLES * share))
    return hypothesis.settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,  # `time_limit` ends an example; how fast it is depends on the machine
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    )


def run(argv: list[str]) -> tuple[int, str, str]:
    """Runs a command line in this process; returns its code and what it printed.

    Raises:
        AssertionError: it ended otherwise than by its code, said what it must not, or hangs.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with time_limit(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except (Exception, SystemExit, TookTooLongError):
            said = traceback.format_exc()
            raise AssertionError(f"moejax {argv!r} ended with\n{said}") from None
    printed = [stream.buffer.getvalue().decode() for stream in (out, err)]
    for text in printed:
        found = re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]|Traceback", text)
        assert not found, f"moejax {argv!r} printed {found[0]!r}: {text!r}"
    if code == 2:
        lines = printed[1].splitlines()
        assert any(": error: " in line for line in lines), f"moejax {argv!r} said {printed[1]!r}"
    return code, *printed


# Files


@contextlib.contextmanager
def file_limit(size: int):
    """No file of this process may become larger: the disk is full for a while."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to, symlinks=True))


@contextlib.contextmanager
def guarded(outside: Path) -> Iterator[None]:
    """Checks that nothing in a folder was changed, added or removed."""

    def state():
        return {
            str(path.relative_to(outside)): path.read_bytes() if path.is_file() else None
            for path in sorted(outside.rglob("*"))
        }

    before = state()
    yield
    assert state() == before, "something outside was touched"


SPOILS = ("delete", "cut", "flip", "noise", "empty", "append", "json", "folder", "link", "fifo",
          "device", "loop", "huge", "name")  # fmt: skip


def spoils(names: list[str]) -> st.SearchStrategy[tuple]:
    """Draws (file, what is done to it, seed, a value) for `spoil`."""
    return st.tuples(
        st.sampled_from(names), st.sampled_from(SPOILS), st.integers(0, 2**32 - 1), values()
    )


def spoil(file: Path, outside: Path, kind: str, seed: int, value: Any) -> None:
    """Does one thing to a file that may be there."""
    chosen = random.Random(seed)
    if os.path.lexists(file) and kind in ("delete", "folder", "link", "fifo", "device", "loop"):
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
    file.parent.mkdir(parents=True, exist_ok=True)
    special = {
        "folder": lambda: file.mkdir(),
        "link": lambda: file.symlink_to(outside / chosen.choice(["secret", "missing", "folder"])),
        "fifo": lambda: os.mkfifo(file),
        "device": lambda: file.symlink_to(chosen.choice(["/dev/zero", "/dev/null", "/proc/self"])),
        "loop": lambda: file.symlink_to(file.name),
        "delete": lambda: None,
    }
    if kind in special:
        special[kind]()
        return
    if file.is_dir() or file.is_symlink() or (file.exists() and not file.is_file()):
        return
    if file.exists() and file.stat().st_size > 1 << 22:
        return
    content = bytearray(file.read_bytes() if file.exists() else b"")
    file.write_bytes(_spoilt(content, kind, chosen, value))
    if kind == "huge":
        os.truncate(file, 1 << chosen.randrange(31, 43))  # 1 GiB is text to read
    if kind == "name":
        name = chosen.choice(["\x1b[2J", "[red]", "x" * 200, "-", "\udcff", "a\nb", "0" * 50])
        file.rename(file.with_name(name + file.suffix))


def _spoilt(content: bytearray, kind: str, chosen: random.Random, value: Any) -> bytes:
    if kind == "cut":
        return bytes(content[: chosen.randrange(len(content) + 1)])
    if kind == "flip" and content:
        for _ in range(chosen.choice([1, 1, 3, 50])):
            content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
    if kind == "noise":
        return chosen.randbytes(chosen.choice([1, 10, 1000]))
    if kind == "empty":
        return b""
    if kind == "append":
        return bytes(content) + json.dumps(value).encode() + b"\n"
    if kind == "json":
        return spoilt_json(bytes(content), chosen, value)
    return bytes(content)


def spoilt_json(content: bytes, chosen: random.Random, value: Any) -> bytes:
    """Returns JSON with one value somewhere in it replaced, its key gone, or another one added."""
    lines = content.splitlines()
    whole = not (len(lines) > 1 and all(line[:1] == b"{" for line in lines))
    index = 0 if whole else chosen.randrange(len(lines))
    try:
        tree = json.loads(content if whole else lines[index])
    except (ValueError, RecursionError):
        tree = None
    deep = chosen.random() < 0.02
    text = b"[" * 100_000 if deep else json.dumps(_replaced(tree, chosen, value)).encode()
    if whole:
        return text
    lines[index] = text
    return b"\n".join(lines) + b"\n"


def _replaced(tree: Any, chosen: random.Random, value: Any) -> Any:
    if not isinstance(tree, dict | list) or not tree or chosen.random() < 0.1:
        return value
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = chosen.choice(keys)
    if chosen.random() < 0.1:
        del tree[key]
    elif isinstance(tree, dict) and chosen.random() < 0.05:
        tree[str(value)] = value
    else:
        tree[key] = _replaced(tree[key], chosen, value)
    return tree
