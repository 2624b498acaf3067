"""Malformed configs and inputs: always an error of ours with exit code 2, no traceback, no hang.

`MOEJAX_FUZZ_EXAMPLES=1000` (`make fuzz`) tries a thousand of each; here it is a few, always the
same. Nothing is compiled: a line that is in order gets to where that would begin, and ends there.
"""

import contextlib
import functools
import importlib
import itertools
import json
import os
import shutil
import tempfile
import typing
from pathlib import Path

import jax
import numpy as np
import pytest
from hostile import (
    NUMBERS,
    copied,
    guarded,
    run,
    settings,
    spoil,
    spoils,
    texts,
    values,
)
from hypothesis import given
from hypothesis import strategies as st

from moejax import evaluate, generate, loop
from moejax.checkpoint import Checkpoints
from moejax.config import Config
from moejax.errors import BAD_INPUT, CHECK_FAILED, DONE, EXIT_CODES
from moejax.history import COUNTERS
from moejax.manifest import Unsound, list_files, read_manifest, write_manifest
from moejax.mesh import make_mesh
from moejax.optim import make_optimizer
from moejax.overrides import apply_overrides, config_to_dict, keys
from moejax.prepare import prepare
from moejax.state import abstract_state
from moejax.workdir import MANIFEST, open_workdir

SMALL = [
    *("model.num_layers=1", "model.d_model=8", "model.num_heads=2", "model.num_kv_heads=1"),
    *("model.head_dim=4", "model.dense_hidden=8", "moe.num_experts=4", "moe.expert_hidden=8"),
    *("data.sequence_length=16", "train.batch_size=8", "train.steps=4", "data.source=prepared"),
]


class Reached(BaseException):
    """All that refuses a training has been passed; the next thing would be to compile."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to work in, with data, a run, and a folder that nobody may touch."""
    place = tmp_path_factory.mktemp("fuzz")
    before = os.getcwd()
    os.chdir(place)
    (place / "outside" / "folder").mkdir(parents=True)
    (place / "outside" / "secret").write_text("secret\n")
    texts = place / "texts"
    texts.mkdir()
    for i in range(30):
        (texts / f"{i:02}.txt").write_text(f"document {i} " + "x" * 20 * i)
    prepare([str(texts)], "bytes", str(place / "data"), workers=1, show_progress=False)
    yield place
    os.chdir(before)


@pytest.fixture(scope="module")
def workdir(place):
    """A run of one step, and a checkpoint of it."""
    config = apply_overrides(Config(), [*SMALL, f"data.path={place / 'data'}"])
    workdir = open_workdir(place / "run", config)
    mesh = make_mesh(config.mesh)
    abstract = abstract_state(config, mesh, make_optimizer(config.optim, config.train.steps))
    zeros = jax.tree.map(lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding), abstract)
    meta = json.loads((place / "data" / "meta.json").read_text())
    about = {
        "config": config_to_dict(config),
        "data": "0" * 64,
        "validation": meta["splits"]["validation"]["fingerprint"],
        "counters": dict.fromkeys(COUNTERS, 0),
        "watch": {"skip_batches": "", "streaks": {}},
        "environment": {"jax": jax.__version__},
    }
    with Checkpoints(workdir, config.checkpoint) as checkpoints:
        for step in (0, 1):
            state = jax.tree.map(lambda leaf: leaf, zeros)
            state = state.__class__(
                jax.device_put(np.int32(step), zeros.step.sharding),
                *(zeros.params, zeros.opt_state, zeros.router_state, zeros.rng, zeros.watch),
            )
            assert checkpoints.save(state, about, 1.5)
    record = {"step": 1, "split": "train", "loss": 1.5}
    (workdir / "metrics.jsonl").write_text(f"{json.dumps(record)}\n" * 2)
    (workdir / "events.jsonl").write_text('{"time": "2026", "step": 1, "kind": "epoch"}\n')
    return workdir


@pytest.fixture(scope="module", autouse=True)
def nothing_is_compiled():
    """Has what would compile return at once, and shapes of a config be traced once."""
    cached = functools.cache(lambda config, mesh: _abstract(config, mesh))

    def _abstract(config, mesh):
        return abstract_state(config, mesh, make_optimizer(config.optim, config.train.steps))

    def generated(config, mesh, max_tokens, *_):
        return lambda params, state, prompt_bt, length_b, key: np.zeros((len(prompt_bt), 4), int)

    def reached(*_, **__):
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "abstract_state", lambda config, mesh, _: cached(config, mesh))
        patch.setattr(evaluate.Evaluator, "compile", lambda *_: 0.0)
        patch.setattr(evaluate.Evaluator, "measure", lambda *_: {"loss": 1.0, "tokens": 1})
        patch.setattr(generate, "make_generate", generated)
        patch.setattr(loop, "make_train_step", reached)
        yield


@contextlib.contextmanager
def folder(place: Path):
    """A new folder."""
    path = Path(tempfile.mkdtemp(dir=place))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


# Configs


def _likely(annotation) -> st.SearchStrategy:
    """Values of the right type, so that combinations of keys are what is wrong."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return st.sampled_from(parts)
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.sampled_from([0, 1, 2, 3, 4, 6, 8, 16, 33, 264, 2**20, 2**31 - 1])
    if annotation is float:
        return st.sampled_from([0.0, 1e-8, 0.1, 0.5, 0.999, 1.0, 1.5, 4.0, 1e9])
    if annotation is str:
        return st.sampled_from(["bytes", "data", "missing", "0-3", "run"])
    if typing.get_origin(annotation) is tuple:
        return st.lists(_likely(parts[0]), max_size=5)
    return st.one_of(*(_likely(part) if part is not type(None) else st.none() for part in parts))


def _pair():
    names = st.one_of(
        st.sampled_from(list(keys())),
        st.builds("{}{}".format, st.sampled_from(list(keys())), texts()),
        texts(),
    )

    def value(name):
        key = keys().get(name)
        wrong = st.one_of(values(), st.sampled_from(NUMBERS))
        return st.tuples(st.just(name), st.one_of(_likely(key.annotation), wrong) if key else wrong)

    return names.flatmap(value)


def _likely_pair():
    return st.sampled_from(list(keys().values())).flatmap(
        lambda key: st.tuples(st.just(key.name), _likely(key.annotation))
    )


BROKEN = [
    *("def get_config(arg): return 1 / 0", "def get_config(arg): return None", "import no_such"),
    *("def get_config(arg):", "get_config = 3", "raise SystemExit(3)", "x = '\x1b[2J'; 1 / 0"),
    "\0",
    *("def get_config(a, b, c): return {}", "def get_config(): return {1: 2}", "(" * 5000),
    *("def get_config(arg): raise KeyError('\x1b[2J\\n\\x1b[1m')", "class get_config: pass"),
    *("def get_config(arg): return get_config(arg)", "def get_config(arg): return {'': {}}"),
    *("from moejax.config import default_config\ndef get_config(arg):\n c = default_config()\n"
      " c.model.d_modle = 3\n return c",),
    *("def get_config(arg): return {'model': {'d_model': {}}}", "-" * 20_000 + "1"),
    *("def get_config(arg):\n import numpy as np\n return {'seed': np.float32(1.5)}",),
    *("def get_config(arg):\n a = {}\n a['model'] = a\n return a",),
    *("def get_config(arg): raise BaseExceptionGroup('x', [ValueError()])",),
]  # fmt: skip


def _source(pairs) -> str:
    nested: dict = {}
    for name, value in pairs:
        section, _, inner = name.partition(".")
        if inner:
            nested[section] = nested.get(section, {})
            if isinstance(nested[section], dict):
                nested[section][inner] = value
        else:
            nested[section] = value
    head = "nan, inf = float('nan'), float('inf')\n"
    return f"{head}def get_config(arg):\n return {nested!r}\n"


def _sources():
    lists = st.one_of(st.lists(_pair(), max_size=3), st.lists(_likely_pair(), max_size=2))
    written = st.builds(_source, lists)
    return st.one_of(
        written, written, written, st.sampled_from(BROKEN), texts(), st.binary(max_size=50)
    )


def _word(pair) -> str:
    name, value = pair
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    return f"{name}={value}".replace("\0", "").encode("utf-8", "replace").decode()


def _words():
    wild, likely = (
        st.lists(_pair().map(_word), max_size=2),
        st.lists(_likely_pair().map(_word), max_size=2),
    )
    return st.one_of(wild, likely, st.lists(texts(), max_size=2))


@settings()
@given(_sources(), _words(), st.sampled_from(["", ":", ":x", ":\x1b[2J"]), st.booleans())
def test_malformed_configs(place, source, words, argument, trains):
    """A sound one gets through every check of `train`."""
    with folder(place) as path, guarded(place / "outside"):
        file = path / "x.py"
        data = source if isinstance(source, bytes) else source.encode("utf-8", "surrogatepass")
        file.write_bytes(data)
        if not trains:
            assert run(["config", f"{file}{argument}", *words])[0] in (DONE, BAD_INPUT)
            return
        given = {word.partition("=")[0] for word in words}
        base = [word for word in [*SMALL, f"data.path={place / 'data'}"] if _key(word) not in given]
        line = ["train", f"{file}{argument}", "--workdir", str(path / "run"), *base, *words]
        try:
            code, _, error = run(line)
        except Reached:
            return
        assert code == BAD_INPUT, error


def _key(word: str) -> str:
    return word.partition("=")[0]


def test_a_sound_config_reaches_the_end_of_checking(place):
    """What the examples are held against: without a fault nothing is refused."""
    with folder(place) as path:
        file = path / "x.py"
        file.write_text(_source([("seed", 3)]))
        line = [*SMALL, f"data.path={place / 'data'}"]
        with pytest.raises(Reached):
            run(["train", str(file), "--workdir", str(path / "run"), *line])


# prepare


@functools.cache
def _seeds() -> dict[str, bytes]:
    """Sound files of each kind, to be spoilt."""
    rows = "".join(json.dumps({"text": f"row {i}", "n": i}) + "\n" for i in range(20))
    found = {"a.txt": b"some text\n" * 20, "b.jsonl": rows.encode()}
    pyarrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    table = pyarrow.table({"text": [f"row {i}" for i in range(50)], "n": list(range(50))})
    for name, options in (("c", {}), ("d", {"row_group_size": 7, "compression": "zstd"})):
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(table, sink, **options)
        found[f"{name}.parquet"] = sink.getvalue().to_pybytes()
    tokenizers = importlib.import_module("tokenizers")
    model = tokenizers.models.WordLevel({"row": 0, "some": 1, "text": 2, "[UNK]": 3}, "[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    found["tokenizer.json"] = tokenizer.to_str().encode()
    return found


PREPARED = ["a.txt", "b.jsonl", "c.parquet", "d.parquet", "e.txt", "tokenizer.json", "sub/f.txt"]


INPUTS = st.sampled_from(["in", "in", "in/*", "en=in/*.txt", "in/b.jsonl", "in/c.parquet"])
OPTIONS = st.tuples(
    st.sampled_from(["--field", "--validation_fraction", "--output", "--tokenizer", "--json"]),
    st.one_of(texts(), st.sampled_from(["text", "n", "0.5", "in"])),
)
TOKENIZERS = st.sampled_from(["bytes", "bytes", "in/tokenizer.json", "in/a.txt"])
PREPARE_LINES = st.one_of(
    st.tuples(
        st.lists(INPUTS, min_size=1, max_size=2), TOKENIZERS.map(lambda t: [("--tokenizer", t)])
    ),
    st.tuples(st.lists(st.one_of(INPUTS, texts()), max_size=2), st.lists(OPTIONS, max_size=2)),
)


@settings()
@given(st.lists(spoils(PREPARED), max_size=3), PREPARE_LINES)
def test_malformed_inputs_of_prepare(place, changes, line):
    inputs, options = line
    with folder(place) as path, guarded(place / "outside"), contextlib.chdir(path):
        (path / "in").mkdir()
        for name, content in _seeds().items():
            (path / "in" / name).write_bytes(content)
        for name, *change in changes:
            spoil(path / "in" / name, place / "outside", *change)
        chosen = {"--output": str(path / "out"), **dict(options)}
        words = ["prepare", *inputs, "--workers", "1", *itertools.chain(*chosen.items())]
        assert run([_argument(word) for word in words])[0] in (DONE, BAD_INPUT)
        left = [p.name for p in path.iterdir() if ".partial" in p.name]
        assert not left, "half a data set stays"


def _argument(word: str) -> str:
    """As the kernel hands it on: no NUL, and what is no UTF-8 by surrogates of its bytes."""
    return (
        word.replace("\0", "")
        .encode("utf-8", "surrogateescape" if _escapes(word) else "replace")
        .decode("utf-8", "surrogateescape")
    )


def _escapes(word: str) -> bool:
    return all(not "\ud800" <= char <= "\udfff" or "\udc80" <= char <= "\udcff" for char in word)


# What reads a run


def _files(workdir: Path) -> list[str]:
    found = [str(p.relative_to(workdir)) for p in sorted(workdir.rglob("*")) if p.is_file()]
    few = [name for name in found if "/ocdbt.process_0/d/" not in name]
    others = [
        "checkpoints",
        "checkpoints/1",
        "checkpoints/.unfinished/1",
        "checkpoints/.unfinished",
    ]
    others += [
        "checkpoints/007",
        "checkpoints/1/model/extra.pkl",
        "checkpoints/2/commit_success.txt",
    ]
    return [*few, *others, "ledger.jsonl", "lock.json", "config.py", "metrics.jsonl"]


NAMES = [
    *("config.json", "run.json", "metrics.jsonl", "events.jsonl", "ledger.jsonl", "lock.json"),
    *("config.json", "config.json", "config.py", "checkpoints", "checkpoints/1", "checkpoints/0"),
    *("checkpoints/.unfinished", "checkpoints/.unfinished/1", "checkpoints/007", "checkpoints/3"),
    *("checkpoints/2/commit_success.txt", "checkpoints/1/commit_success.txt"),
    *(f"checkpoints/1/{name}" for name in (MANIFEST, MANIFEST, "_CHECKPOINT_METADATA", "x.pkl")),
    *(f"checkpoints/1/meta/{name}" for name in ("metadata", "metadata", "x")),
    *(f"checkpoints/1/model/{n}" for n in ("_METADATA", "_sharding", "manifest.ocdbt", "x/y/z")),
    *(f"checkpoints/0/{name}" for name in (MANIFEST, "meta/metadata", "model/manifest.ocdbt")),
    *("data/meta.json", "data/meta.json", "data/validation/tokens.bin", "data/validation"),
    *("data/validation/documents.npz", "data"),
]


@contextlib.contextmanager
def spoilt_run(place: Path, workdir: Path, changes, blesses: bool):
    """A copy of the run and its data, spoilt; `blesses` writes manifests that fit."""
    with folder(place) as path, guarded(place / "outside"):
        run_folder, data = copied(workdir, path / "run"), copied(place / "data", path / "data")
        config = (run_folder / "config.json").read_text()
        (run_folder / "config.json").write_text(config.replace(str(place / "data"), str(data)))
        for name, *change in changes:
            where = path if name.startswith("data") else run_folder
            with contextlib.suppress(OSError):  # a change before made a folder of a file
                spoil(where / name, place / "outside", *change)
        if blesses:
            for step in (0, 1):
                with contextlib.suppress(OSError, Unsound):
                    _bless(run_folder / "checkpoints" / str(step))
        yield run_folder


def _bless(checkpoint: Path) -> None:
    """Writes a manifest that fits what is there now, as somebody hostile would."""
    manifest = read_manifest(checkpoint)
    if sum(list_files(checkpoint).values()) < 1 << 22:
        (checkpoint / MANIFEST).unlink()
        write_manifest(checkpoint, manifest.run, manifest.step, manifest.tables, {}, manifest.about)


ODD = [
    *(("--step", "9" * 30), ("--step", "-1"), ("--json", "."), ("--json", "x/y")),
    *(("--json", "out.json"), ("--step", "7"), ("--cpu_devices", "0"), ("--step", "1")),
]
OVERRIDES = ["mesh.data=1", "mesh.tensor=3", "mesh.expert=2", "eval.batches=1"]
OVERRIDES += ["model.dtype=bfloat16", "moe.transport=gather", "moe.top_k=1", "eval.batches=0"]


def _reads():
    """Options of a verb that reads a run: mostly such that what is in the run decides."""
    sound = st.sampled_from([[], [], [("--step", "1")], [("--step", "0")], [("--json", "o.json")]])
    named = st.tuples(st.sampled_from(["--step", "--json", "--workdir"]), texts())
    odd = st.lists(st.one_of(st.sampled_from(ODD), named), max_size=2)
    wild = st.one_of(st.sampled_from(OVERRIDES), _pair().map(_word))
    quiet = st.tuples(sound, st.just([]))
    return st.one_of(quiet, quiet, quiet, st.tuples(odd, st.lists(wild, max_size=1)))


def _line(verb: str, workdir: Path, options, words) -> list[str]:
    chosen = {} if any(name == "--workdir" for name, _ in options) else {"--workdir": str(workdir)}
    pairs = [*chosen.items(), *options]
    return [_argument(word) for word in (verb, *(f"{n}={v}" for n, v in pairs), *words)]


# Where one read of a damaged array fails, TensorStore tells the ends of the others to an event loop
# that Orbax has closed.
LATE_READS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@LATE_READS
@settings(0.7)
@given(st.lists(spoils(NAMES), max_size=3), st.booleans(), _reads())
def test_malformed_inputs_of_eval(place, workdir, changes, blesses, line):
    with spoilt_run(place, workdir, changes, blesses) as folder, contextlib.chdir(folder.parent):
        assert run(_line("eval", folder, *line))[0] in (DONE, BAD_INPUT)


PROMPT = st.tuples(st.just("--prompt"), texts().map(lambda text: text or "x"))
PROMPTS = st.one_of(
    PROMPT,
    st.tuples(
        st.just("--prompt"), st.sampled_from(["x" * 100_000, "\udcff\udc80", "\ufeff", "\t"])
    ),
    st.tuples(
        st.just("--prompts"), st.sampled_from(["run/config.json", "missing", ".", "prompts"])
    ),
    st.tuples(st.just("--max_tokens"), st.sampled_from(["1", "5", "2147483647", "0", "1e3", "x"])),
    st.tuples(st.just("--temperature"), st.sampled_from(["0", "1", "nan", "inf", "-1", "1e999"])),
    st.tuples(st.just("--top_p"), st.sampled_from(["0", "1", "0.5", "nan", "2", "-0.0"])),
    st.tuples(
        st.just("--seed"), st.sampled_from(["0", "4294967295", "4294967296", "-1", "\u0663"])
    ),
)
PROMPT_LINES = st.tuples(
    st.builds(lambda a, b: [*a, *b[0]], st.lists(PROMPTS, max_size=3), _reads()), st.just([])
)


@LATE_READS
@settings(0.7)
@given(
    st.lists(spoils([*NAMES, "../prompts"]), max_size=2),
    st.booleans(),
    st.one_of(PROMPT.map(lambda pair: ([pair], [])), PROMPT_LINES),
    st.binary(max_size=30),
)
def test_malformed_inputs_of_generate(place, workdir, changes, blesses, line, prompts):
    with spoilt_run(place, workdir, changes, blesses) as folder, contextlib.chdir(folder.parent):
        file = folder.parent / "prompts"
        if not os.path.lexists(file):
            file.write_bytes(prompts)
        if not file.is_fifo():  # one that nobody writes to is waited for, as everywhere
            assert run(_line("generate", folder, *line))[0] in (DONE, BAD_INPUT)


@settings()
@given(
    st.lists(spoils(NAMES), max_size=4),
    st.booleans(),
    _reads().map(lambda line: (line[0], [])),
)
def test_malformed_inputs_of_fsck(place, workdir, changes, blesses, line):
    """A run that is damaged is exit code 1, what is no run 2."""
    with spoilt_run(place, workdir, changes, blesses) as folder, contextlib.chdir(folder.parent):
        code, out, _ = run(_line("fsck", folder, *line))
        assert code in (DONE, CHECK_FAILED, BAD_INPUT)
        assert code in {row.code for row in EXIT_CODES}
        assert (code == CHECK_FAILED) == ("BAD" in out)


def test_a_sound_run_is_read(place, workdir):
    with spoilt_run(place, workdir, [], False) as folder:
        at = ["--workdir", str(folder)]
        assert run(["fsck", *at])[0] == DONE
        assert run(["eval", *at])[0] == DONE
        assert run(["generate", *at, "--prompt", "x"])[0] == DONE
