"""The command line: which verb it names, and how it ends. `commands/` has the verbs.

`errors.EXIT_CODES` has the exit codes; `moejax --help` lists them.
"""

import io
import os
import sys
from collections.abc import Sequence

import moejax
from moejax.command_line import Verb, checked_output, outliving_output, say
from moejax.commands import (
    claims,
    compare,
    config,
    describe,
    eval,
    fsck,
    generate,
    inspect,
    plan,
    prepare,
    report,
    supervise,
    sweep,
    sweep_worker,
    train,
    verify,
)
from moejax.errors import DONE, EXIT_CODES, INTERRUPTED, ConfigError
from moejax.foreign import printable
from moejax.overrides import suggest

OUTLIVING = ("train", "supervise")  # verbs that go on where nobody hears them any more


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # whoever started this process has closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the end
    if isinstance(sys.stdout, io.TextIOWrapper):  # for characters that its encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    verb = words[0] if words and not words[0].startswith("-") else None
    name = f"moejax {verb}" if verb in VERBS else "moejax"
    if verb in OUTLIVING:
        with outliving_output():
            return _main(name, verb, words)
    with checked_output(name) as ending:
        ending.code = _main(name, verb, words)
    return ending.code


def _main(name: str, verb: str | None, words: list[str]) -> int:
    try:
        return VERBS[verb].main(words[1:]) if verb in VERBS else _without_verb(words)
    except ConfigError as error:
        line = " ".join(str(error).splitlines())
        say(f"{name}: error: {printable(line)}")
        if error.details:
            say(printable(error.details))
        return error.code
    except KeyboardInterrupt:
        say(f"{name}: interrupted")
        return INTERRUPTED


def _without_verb(words: list[str]) -> int:
    verbs = ", ".join(VERBS)
    if not words:
        raise ConfigError(f"no verb; give one of {verbs}, or --help")
    if words[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name:12} {verb.summary}" for name, verb in VERBS.items())
        codes = "\n".join(f"  {row.code:>3}  {row.meaning}" for row in EXIT_CODES)
        print(f"{HELP}\nverbs:\n{rows}\n\nexit codes:\n{codes}")
        print("\nmoejax VERB --help tells more about each verb.")
    elif words[0] == "--version":
        print(f"moejax {moejax.__version__}")
    else:
        raise ConfigError(
            f"unknown verb {words[0]!r}{suggest(words[0], VERBS) or f'; give one of {verbs}'}"
        )
    return DONE


HELP = """moejax: train sparse mixture-of-experts models in JAX

  moejax train configs/quickstart.py --workdir runs/a --cpu_devices 8 train.steps=50
  moejax eval --workdir runs/a
"""


VERBS: dict[str, Verb] = {}
VERBS.update(
    {
        verb.name: verb
        for verb in (
            train.VERB,
            eval.VERB,
            generate.VERB,
            fsck.VERB,
            verify.VERB,
            claims.VERB,
            describe.VERB,
            inspect.VERB,
            plan.VERB,
            config.VERB,
            prepare.VERB,
            compare.VERB,
            report.VERB,
            supervise.verb(VERBS),
            sweep.VERB,
            sweep_worker.VERB,
        )
    }
)
