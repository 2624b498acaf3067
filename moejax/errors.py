"""Errors that a user can cause, the checks that raise them, and exit codes. No JAX."""

import errno
import math
from typing import NamedTuple

# Exit codes, which supervisors and schedulers act on. Codes that others use for the same thing are
# taken from them: Python (1), argparse (2), Megatron-LM (17, a step whose result cannot be), errno
# (28), sysexits.h (69, 70, 75), timeout (124), the shell (130).
DONE, CHECK_FAILED, BAD_INPUT, DIVERGED, NO_SPACE = 0, 1, 2, 17, 28
UNAVAILABLE, CRASH_LOOP, PREEMPTED, STUCK, INTERRUPTED = 69, 70, 75, 124, 130
# Two signals within this time are one request, which SLURM or a launcher and a terminal sent twice.
SAME_SECONDS = 1.0


class ExitCode(NamedTuple):
    """An exit code, whether starting the same command again may help, and what the code means."""

    code: int
    again: bool
    meaning: str


EXIT_CODES = (
    ExitCode(DONE, False, "done"),
    ExitCode(
        CHECK_FAILED,
        True,
        "a check failed (`verify`, `fsck`, a claim), or an error with a traceback",
    ),
    ExitCode(
        BAD_INPUT, False, "bad input: one line on stderr says what is wrong and how to mend it"
    ),
    ExitCode(
        DIVERGED,
        False,
        "`watch.*` stopped the training: not finite, a spike, a collapse, or a device that errs",
    ),
    ExitCode(NO_SPACE, False, "no space left, for the last checkpoint, another file or output"),
    ExitCode(
        UNAVAILABLE,
        True,
        "another process of the run never came or was lost, the last checkpoint was not saved, or "
        "a disk, a file server or a sweep's storage fails",
    ),
    ExitCode(CRASH_LOOP, False, "every restart failed before it saved a newer checkpoint"),
    ExitCode(PREEMPTED, True, "stopped and saved by SIGTERM; the same command resumes"),
    ExitCode(STUCK, True, "no progress within `watchdog.*`; stack traces are on stderr"),
    ExitCode(
        INTERRUPTED,
        False,
        "stopped by Ctrl-C; a training was saved, if it had begun and Ctrl-C came once",
    ),
)
FINAL = frozenset(row.code for row in EXIT_CODES if not row.again)


class ConfigError(ValueError):
    """The user asked for something impossible; the message is one line: values, rule and remedy."""

    code = BAD_INPUT  # with which a process ends for it
    details = ""  # lines to show below the message


class UnreadKeyError(ConfigError):
    """A key was set that nothing would read. Runs of an older version may have such values."""

    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key = key


class UnavailableError(ConfigError):
    """Another process did not start, or ended: the same command may succeed later."""

    code = UNAVAILABLE


class StorageError(ConfigError):
    """What had to be written or read was not; the message says why. A retry may succeed."""

    code = UNAVAILABLE


class NoSpaceError(StorageError):
    """There was no space for a checkpoint, output, or a file that a command cannot do without."""

    code = NO_SPACE


# What a disk or a file server says that fails; what else the system says lasts until it is mended.
_FAILING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENOTCONN)
_FAILING += (errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH)


# Of these none is of the file itself: a bad sector is EIO.
SERVER_FAILS = tuple(code for code in _FAILING if code != errno.EIO)


# A disk, a quota or a limit on the size of a file that has no room.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def file_error(message: str, error: OSError) -> ConfigError:
    """Returns what to raise for a file: its class has the exit code for full and failing disks."""
    if error.errno in FULL:
        return NoSpaceError(message)
    return StorageError(message) if error.errno in _FAILING else ConfigError(message)


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_read(condition: bool, key: str, message: str) -> None:
    """Raises UnreadKeyError of a dotted key with `message` unless `condition` holds."""
    if not condition:
        raise UnreadKeyError(key, message)


def require_positive(section: str, config: object, *names: str) -> None:
    """Checks that each named field is None or from 1 to 2**31 - 1."""
    for name in names:
        value = getattr(config, name)
        require(
            value is None or value >= 1,
            f"{section}.{name}={value} is below 1; use a whole number of at least 1",
        )
        require(
            value is None or value < 2**31,
            f"{section}.{name}={value} is above 2**31 - 1, the largest count on a device; use less",
        )


def require_finite(section: str, config: object, *names: str) -> None:
    """Checks that each named field is None or a finite number of at least 0."""
    for name in names:
        value = getattr(config, name)
        require(
            value is None or (math.isfinite(value) and value >= 0),
            f"{section}.{name}={value} is not a finite number of at least 0; give one, for "
            "example 0.1",
        )


def require_above_zero(section: str, config: object, *names: str) -> None:
    """Checks that each named field is None or a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        require(
            value is None or (math.isfinite(value) and value > 0),
            f"{section}.{name}={value} must be a finite number above 0",
        )


def require_fraction(section: str, config: object, *names: str) -> None:
    """Checks that each named field is in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        require(
            0 <= value < 1, f"{section}.{name}={value} is outside [0, 1); use a fraction below 1"
        )
