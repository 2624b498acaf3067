"""`moejax fsck`: reads every checkpoint of a run."""

import argparse
import json
from pathlib import Path

from moejax.command_line import Line, Verb, add_json, add_workdir
from moejax.errors import CHECK_FAILED, DONE
from moejax.foreign import write_json


def _options(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser, "folder that `moejax train` wrote")
    add_json(parser)


def _run(line: Line) -> int:
    from moejax.fsck import fsck, show_findings

    findings = fsck(Path(line.options.workdir))
    show_findings(findings)
    if line.options.json:
        rows = [finding._asdict() for finding in findings]
        write_json(line.options.json, json.dumps(rows, indent=1))
    return CHECK_FAILED if any(finding.bad for finding in findings) else DONE


VERB = Verb(
    "fsck",
    "read every checkpoint of a run and say which are sound",
    "moejax fsck --workdir DIR [--json FILE]",
    """
  moejax fsck --workdir runs/a

Compares every file's size and SHA-256 with the checkpoint's manifest, and reads config.json,
metrics.jsonl and events.jsonl. Changes nothing and needs no accelerator. Exit code 1 means that
something is damaged.""",
    _options,
    _run,
    config=False,
    required=("workdir",),
)
