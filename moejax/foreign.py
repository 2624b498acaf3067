"""Files and text that somebody else may have written. No JAX.

In a folder that was downloaded any name can stand for a pipe, which is waited for, a device, which
has no end, or a link, which leads elsewhere; and any text can hold what steers a terminal.
"""

import contextlib
import errno
import os
import stat
import unicodedata
from io import BufferedReader
from pathlib import Path

from moejax.errors import file_error

MIB = 1 << 20


def open_file(path: str | os.PathLike, *, links: bool = False) -> BufferedReader:
    """Opens a file for reading.

    Args:
        links: whether `path` may be a link to one.

    Raises:
        OSError: it cannot be opened, or is a link, a folder, a device or a pipe.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return os.fdopen(descriptor, "rb")


def read_file(path: str | os.PathLike, most: int, *, links: bool = False) -> bytes:
    """Returns the content of a file.

    Args:
        most: bytes that it may have.

    Raises:
        OSError: as `open_file`, or it is larger.
    """
    with open_file(path, links=links) as file:
        content = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)
    if len(content) > most:
        raise OSError(errno.EINVAL, f"it is larger than {most / MIB:g} MiB", str(path))
    return content


def no_links(path: str, flags: int) -> int:
    """The `opener` of files that are written: not through a link, nor into a pipe, of that name."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)  # nobody reads the pipe


def write_atomically(file: Path, text: str) -> None:
    """Writes and syncs a file: a reader sees the old one or the new one, also after a crash."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8", opener=no_links) as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(file: Path, text: str) -> None:
    """Writes what `--json` asks for.

    Raises:
        ConfigError: the file cannot be written.
        NoSpaceError: it has no room.
    """
    try:
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        message = f"--json={file} cannot be written: {error.strerror}; give another file"
        raise file_error(message, error) from None


def require_path(path: str) -> None:
    """Checks that the system takes `path` for a name, whether or not something is there.

    Raises:
        OSError: it is too long, or leads in a circle, or into a folder that is closed to us.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.stat(path)


def has_link(folder: Path, names: tuple[str, ...], *, folders: bool = False) -> str | None:
    """Returns which of `names` in a folder is there and is not a file (a folder): a link, say."""
    kind = stat.S_ISDIR if folders else stat.S_ISREG
    for name in names:
        try:
            mode = os.lstat(folder / name).st_mode
        except OSError:
            continue
        if not kind(mode):
            return name
    return None


def printable(text: str) -> str:
    """Returns `text` with everything that could steer a terminal spelled out, such as `\\x1b`.

    Newlines stay, tabs and odd spaces become spaces. Generated text is any bytes that a model comes
    up with.
    """

    def safe(char: str) -> str:
        if char == "\n" or char.isprintable():
            return char
        if char == "\t":
            return "    "
        if unicodedata.category(char) == "Zs":
            return " "
        return char.encode("unicode_escape").decode("ascii")

    return "".join(safe(char) for char in text)
