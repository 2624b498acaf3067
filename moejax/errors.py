"""What the user asked for cannot be: the error, the checks that raise it, exit codes. No JAX."""

import errno
import math
from typing import NamedTuple

# Exit codes, which supervisors and schedulers act on. Where somebody had a code for the same thing,
# it is theirs: Python (1), argparse (2), Megatron-LM (17, a step whose result cannot be), errno
# (28), sysexits.h (69, 70, 75), timeout (124), the shell (130).
DONE, CHECK_FAILED, BAD_INPUT, DIVERGED, NO_SPACE = 0, 1, 2, 17, 28
UNAVAILABLE, CRASH_LOOP, PREEMPTED, STUCK, INTERRUPTED = 69, 70, 75, 124, 130
# in which two signals are one request: a launcher and a terminal, or SLURM, may deliver it twice
SAME_SECONDS = 1.0


class ExitCode(NamedTuple):
    """What an exit code says, and whether the same command may do better when started again."""

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
    ExitCode(BAD_INPUT, False, "bad input: one line on stderr says what, and what to do"),
    ExitCode(
        DIVERGED,
        False,
        "`watch.*` stopped the training: not finite, a spike, a collapse, a device that computes "
        "wrong",
    ),
    ExitCode(NO_SPACE, False, "no space left: the last checkpoint was not saved"),
    ExitCode(
        UNAVAILABLE,
        True,
        "another process of the run did not come, or was lost; the last checkpoint could not be "
        "saved; a disk, a file server or a sweep's storage fails",
    ),
    ExitCode(CRASH_LOOP, False, "it failed again and again without a newer checkpoint"),
    ExitCode(PREEMPTED, True, "SIGTERM: saved; the same command goes on from there"),
    ExitCode(STUCK, True, "no progress within `watchdog.*`: stacks are on stderr"),
    ExitCode(
        INTERRUPTED, False, "Ctrl-C; a training has saved, if it had begun; not at a second Ctrl-C"
    ),
)
FINAL = frozenset(row.code for row in EXIT_CODES if not row.again)


class ConfigError(ValueError):
    """What the user asked for cannot be: the message is one line with values, rule and remedy."""

    code = BAD_INPUT  # with which a process ends for it
    details = ""  # lines to show below the message


class UnavailableError(ConfigError):
    """Another process did not come, or ended: the same command may do later."""

    code = UNAVAILABLE


class StorageError(ConfigError):
    """What had to be written or read was not: the message says why. The same may do later."""

    code = UNAVAILABLE


class NoSpaceError(StorageError):
    """There was no space for it."""

    code = NO_SPACE


# What a disk or a file server says that fails; what else the system says lasts until it is mended.
_FAILING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENOTCONN)
_FAILING += (errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH)


# Of these none is of the file itself: a bad sector is EIO.
SERVER_FAILS = tuple(code for code in _FAILING if code != errno.EIO)


def file_error(message: str, error: OSError) -> ConfigError:
    """Returns what to raise for a file: a StorageError where another try may do better."""
    return StorageError(message) if error.errno in _FAILING else ConfigError(message)


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


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
            f"{section}.{name}={value} is above 2**31 - 1, which devices count with; use less",
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
