"""`moejax plan`: compiles the step for a pod that is not there."""

import argparse

from moejax.command_line import Line, Verb, add_json, add_option
from moejax.errors import CHECK_FAILED, DONE


def _options(parser: argparse.ArgumentParser) -> None:
    help = (
        "pod to compile for: v5p:4x4x8 (the chips of a TPU slice), v5p:4x4x8:2 (two slices), "
        "h100:16x8 (hosts x GPUs)"
    )
    add_option(parser, "--topology", help, metavar="CHIP:SIZES")
    help = "try many meshes, remat policies, microbatches and transports; compile and rank the best"
    parser.add_argument("--search", action="store_true", help=help)
    add_json(parser)


def _run(line: Line) -> int:
    config = line.load()
    from moejax.topology import parse_topology, start_compiler

    topology = parse_topology(line.options.topology)
    start_compiler(topology)
    if line.options.search:
        from moejax.search import search_plan

        assert line.config is not None
        given = [line.config, *line.overrides]
        fits = search_plan(config, topology, given, line.options.json)
    else:
        from moejax.plan_report import plan

        fits = plan(config, topology, line.options.json)
    return DONE if fits else CHECK_FAILED


VERB = Verb(
    "plan",
    "compile the train step for a pod that you do not have: memory, traffic, time",
    "moejax plan CONFIG[:ARG] --topology CHIP:SIZES [--search] [--json FILE] [key=value ...]",
    """
  moejax plan configs/models/mixtral_8x7b.py --topology v5p:4x4x4

Needs no accelerator, only the compiler for its chips: pip install 'moejax[plan-tpu]' or
'moejax[plan-gpu]'. Takes minutes for a large model. `--search` also tries other meshes, remat
policies, microbatches and transports. Exit code 1 means that the step does not fit into the memory
of a device.""",
    _options,
    _run,
    ("*",),
    required=("topology",),
)
