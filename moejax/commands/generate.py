"""`moejax generate`: continues prompts."""

import argparse
from pathlib import Path

from moejax.command_line import (
    Line,
    Verb,
    add_cpu_devices,
    add_option,
    add_step,
    add_workdir,
    between,
    whole,
)
from moejax.commands.common import start_jax, stored_config
from moejax.config import ConfigError
from moejax.errors import DONE, require
from moejax.foreign import printable
from moejax.workdir import MAY_CHANGE_AFTER_TRAINING

_PROMPT_BYTES = 16 << 20


def _options(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser, "folder that `moejax train` wrote")
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to continue; repeatable"
    )
    add_option(parser, "--prompts", "file with one prompt per line", type=Path, metavar="FILE")
    add_step(parser)
    add_cpu_devices(parser)
    add_option(
        parser,
        "--max_tokens",
        "new tokens per prompt (default: 100)",
        type=whole(1, 2**30),
        default=100,
        metavar="N",
    )
    help = "0 always takes the most likely token (default: 0.8)"
    add_option(parser, "--temperature", help, type=between(0, 100), default=0.8, metavar="X")
    help = "sample from the most likely tokens with this total probability (default: 0.95)"
    add_option(
        parser, "--top_p", help, type=between(0, 1, open_low=True), default=0.95, metavar="X"
    )
    add_option(
        parser,
        "--seed",
        "seed of the sampling (default: 0)",
        type=whole(0, 2**32 - 1),
        default=0,
        metavar="N",
    )


def _run(line: Line) -> int:
    config, options = stored_config(line, "generate"), line.options
    prompts = [*options.prompt, *_read_prompts(options.prompts)]
    if not prompts:
        raise ConfigError('no prompt; give --prompt "In the beginning" or --prompts FILE')
    start_jax(options.cpu_devices)
    from moejax.generate import generate_workdir

    texts = generate_workdir(
        config,
        Path(options.workdir),
        options.step,
        prompts,
        options.max_tokens,
        options.temperature,
        options.top_p,
        options.seed,
    )
    shown = [printable(prompt + text) for prompt, text in zip(prompts, texts, strict=True)]
    print("\n\n".join(shown))
    return DONE


def _read_prompts(file: Path | None) -> list[str]:
    if file is None:
        return []
    too_large = f"--prompts={file} is larger than {_PROMPT_BYTES >> 20} MiB; cut it"
    try:
        with open(file, "rb") as stream:  # which may be a pipe
            content = stream.read(_PROMPT_BYTES + 1)
        require(len(content) <= _PROMPT_BYTES, too_large)
        lines = content.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts={file} cannot be read: {error}") from None
    prompts = [line.removesuffix("\r") for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts={file} is empty; write one prompt per line")
    return prompts


VERB = Verb(
    "generate",
    "continue prompts with a checkpoint's model",
    "moejax generate --workdir DIR --prompt TEXT [--prompt TEXT ...] [options] [key=value ...]",
    """
  moejax generate --workdir runs/a --prompt "In the beginning" --max_tokens 100 --temperature 0.8

The config comes from the workdir. A prompt that begins with a dash is written --prompt="- so".""",
    _options,
    _run,
    MAY_CHANGE_AFTER_TRAINING,
    config=False,
    required=("workdir",),
)
