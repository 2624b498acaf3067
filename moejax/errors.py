"""What the user asked for cannot be: the error, the checks that raise it, exit codes. No JAX."""

import math

# Exit codes, which schedulers and scripts act on; the command line's help lists them.
DONE, CHECK_FAILED, BAD_INPUT, UNAVAILABLE, PREEMPTED, INTERRUPTED = 0, 1, 2, 69, 75, 130
DIVERGED = 17  # the training itself went wrong, by `watch.*`: the same command would again
NO_SPACE = 28  # as errno


class ConfigError(ValueError):
    """What the user asked for cannot be: the message is one line with values, rule and remedy."""

    code = BAD_INPUT  # with which a process ends for it
    details = ""  # lines to show below the message


class UnavailableError(ConfigError):
    """Another process did not come, or ended: the same command may do later."""

    code = UNAVAILABLE


class StorageError(ConfigError):
    """What had to be saved was not: the message says why. The same command may do later."""

    code = UNAVAILABLE


class NoSpaceError(StorageError):
    """There was no space for it."""

    code = NO_SPACE


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(section: str, config: object, *names: str) -> None:
    """Checks that each named field is None or at least 1."""
    for name in names:
        value = getattr(config, name)
        require(
            value is None or value >= 1,
            f"{section}.{name}={value} is below 1; use a whole number of at least 1",
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
