"""What a command line, a config or a data set has wrong: exit code 2, one line, no traceback."""

import os
import random
import shutil
from pathlib import Path

from faults.bench import Bench, Broken, Done, Outcome, expect, newest, records, steps_done
from faults.restores import flip
from faults.size import Size
from moejax.config import ConfigError, DataConfig
from moejax.corpus import load_corpus


def refused(done: Done, *says: str, lines: int | None = 1) -> None:
    """Checks that a command was refused as input errors are."""
    expect(done.code == 2, f"it ended with {done.code}: {done.err[-400:] or done.out[-200:]}")
    expect("Traceback" not in done.err, f"a traceback: {done.err[-400:]}")
    error = [line for line in done.err.splitlines() if "error: " in line]
    expect(len(error) == (lines or len(error)), f"{len(error)} lines of errors: {done.err[-400:]}")
    for text in says:
        expect(text in done.err, f"it does not say {text!r}: {done.err[-400:]}")


def _refuses(bench: Bench, folder: str, cases: dict[str, str]) -> int:
    """Starts a training with each word, which has to be refused with a text; nothing is made."""
    for word, says in cases.items():
        workdir = bench.folder(f"{folder}/run")
        refused(bench.train(workdir, *word.split()), says)
        expect(not workdir.exists() or not steps_done(workdir), f"{word}: it trained")
    return len(cases)


UNKNOWN = {
    "optim.learning_rat=1": "did you mean optim.learning_rate?",
    "lr=0.1": "did you mean optim.learning_rate?",
    "mesh.exprt=2": "did you mean mesh.expert?",
    "moe.router.top_k=2": "unknown key",
}
WRONG = {
    "optim.learning_rate=-1": "optim.learning_rate=-1",
    "optim.learning_rate=nan": "optim.learning_rate",
    "train.steps=0": "train.steps=0",
    "train.steps=many": "train.steps='many'",
    "moe.top_k=9": "moe.top_k=9 is larger than moe.num_experts=4",
    "model.num_kv_heads=3": "num_kv_heads=3",
    "checkpoint.keep=0": "checkpoint.keep=0",
    "moe.capacity_factor=-2": "capacity_factor",
}
MESHES = {
    "mesh.expert=3": "mesh",
    "mesh.data=2 mesh.expert=2": "devices",
    "mesh.rows=2": "unknown key",
    "mesh.data=0": "mesh.data=0",
}


def unknown_keys(bench: Bench, _: Size) -> Outcome:
    number = _refuses(bench, "unknown", UNKNOWN)
    folder = bench.folder("unknown-file")
    folder.mkdir()
    file = folder / "config.py"
    file.write_text(
        "from moejax.config import default_config\n"
        "def get_config():\n    config = default_config()\n    config.moe.num_expert = 4\n"
        "    return config\n"
    )
    done = bench.moejax("train", str(file), "--workdir", str(folder / "run"))
    refused(done, "num_expert")
    return Outcome("exit code 2, one line, a suggestion where one is near", number + 1)


def wrong_values(bench: Bench, _: Size) -> Outcome:
    number = _refuses(bench, "wrong", WRONG)
    return Outcome("exit code 2, one line with key, value and rule", number)


def wrong_meshes(bench: Bench, _: Size) -> Outcome:
    number = _refuses(bench, "meshes", MESHES)
    return Outcome("exit code 2, one line, before anything is compiled", number)


def another_config(bench: Bench, _: Size) -> Outcome:
    """A resume with another model; and with the data's order changed (seed, batch, length)."""
    return _changed(
        bench,
        "another",
        ["moe.num_experts=8", "model.vocab_size=512", "model.num_layers=3", "optim.name=lion"],
    )


def another_order(bench: Bench, _: Size) -> Outcome:
    return _changed(bench, "order", ["seed=1", "train.batch_size=8", "data.sequence_length=16"])


def _changed(bench: Bench, folder: str, words: list[str]) -> Outcome:
    workdir = bench.folder(f"{folder}/run")
    shutil.copytree(bench.undisturbed(), workdir)
    for word in words:
        done = bench.train(workdir, word)
        key, _, value = word.partition("=")
        refused(done, key, "->", value, "give the stored values back to resume")
    expect(newest(workdir) == newest(bench.undisturbed()), "a checkpoint was touched")
    return Outcome(f"exit code 2, one line with both values: {', '.join(words)}", len(words))


def no_place(bench: Bench, _: Size) -> Outcome:
    """A workdir that is a file, that cannot be made, and whose checkpoints are a file."""
    folder = bench.folder("place")
    folder.mkdir()
    (folder / "file").write_text("")
    refused(bench.train(folder / "file"), "is a file; give a folder")
    refused(bench.moejax(*bench.train_words(Path("/proc/moejax"))), "cannot be written")
    (folder / "run").mkdir()
    (folder / "run" / "checkpoints").write_text("")
    refused(bench.train(folder / "run"), "checkpoints is not a folder")
    refused(
        bench.train(folder / "other", "checkpoint.local=/proc/x", "checkpoint.local_every=5"),
        "cannot be written to /proc/x",
    )
    return Outcome("exit code 2, one line with the path, before anything is compiled", 4)


# Data


def _copy_of_data(bench: Bench, name: str) -> Path:
    folder = bench.folder(f"data-{name}")
    shutil.copytree(bench.data, folder)
    return folder


def _tokens(data: Path) -> Path:
    return data / "train" / "tokens.bin"


def too_little(bench: Bench, _: Size) -> Outcome:
    """Less than a batch; a split of which nothing is left."""
    workdir = bench.folder("little/run")
    refused(bench.train(workdir, "train.batch_size=1000000"), "fewer than train.batch_size")
    data = _copy_of_data(bench, "little")
    os.truncate(_tokens(data), 0)
    refused(bench.train(workdir, f"data.path={data}"), "tokens.bin has 0 bytes")
    empty = bench.folder("empty-texts")
    empty.mkdir()
    (empty / "a.txt").write_text("")
    done = bench.moejax("prepare", str(empty), "--output", str(bench.folder("data-empty")))
    refused(done)
    expect(not steps_done(workdir), "it trained")
    return Outcome("exit code 2 at the start, with what there is and what is needed", 3)


def wrong_sizes(bench: Bench, _: Size) -> Outcome:
    """Odd bytes, half a file, another dtype, a file that is not there."""
    workdir = bench.folder("sizes/run")
    size = _tokens(bench.data).stat().st_size
    for length in (size - 1, size // 2):
        data = _copy_of_data(bench, "sizes")
        os.truncate(_tokens(data), length)
        says = f"tokens.bin has {length} bytes and meta.json says {size}"
        refused(bench.train(workdir, f"data.path={data}"), says)
    data = _copy_of_data(bench, "sizes")
    meta = data / "meta.json"
    meta.write_text(meta.read_text().replace('"<u2"', '"<u4"'))
    refused(bench.train(workdir, f"data.path={data}"), "dtype")
    data = _copy_of_data(bench, "sizes")
    _tokens(data).unlink()
    refused(bench.train(workdir, f"data.path={data}"), "tokens.bin is missing")
    return Outcome("exit code 2 when the file is opened, both sizes in the message", 4)


def flipped(bench: Bench, size: Size) -> Outcome:
    """A flipped bit in a copy of the data, many times, and a training with one of them."""
    rng = random.Random(f"{bench.seed} flipped")
    for index in range(size.flips):
        data = _copy_of_data(bench, "flipped")
        split, name = index // 2 % 2, index % 2
        what = flip(
            data / ("train", "validation")[split] / ("tokens.bin", "documents.npz")[name], rng
        )
        try:
            _read(data)
        except ConfigError as error:
            expect(data.name in str(error), f"{what}: it does not name the file: {error}")
        else:
            raise Broken(f"NOT FOUND: {what}")
    flip(_tokens(data), rng)
    workdir = bench.folder("flipped/run")
    refused(bench.train(workdir, f"data.path={data}"), "data-flipped")
    return Outcome(
        f"{size.flips} of {size.flips} refused, the file named; a training refused with exit code "
        "2 at the start",
        size.flips + 1,
    )


def _read(data: Path) -> None:
    """Reads all that a training reads of the data."""
    for split in ("train", "validation"):
        corpus = load_corpus(DataConfig(source="prepared", path=str(data)), split)
        _ = corpus.token_n[0 : corpus.num_tokens]


def cut_while_training(bench: Bench, _: Size) -> Outcome:
    """The tokens are cut off under a running training; then they are back, and it goes on."""
    data = _copy_of_data(bench, "cut")
    workdir = bench.folder("cut/run")
    whole = _tokens(data).read_bytes()
    process = bench.start(workdir, f"data.path={data}", "checkpoint.every=5")
    with bench.running(process):
        process.until(lambda: newest(workdir) >= 10, "a checkpoint")
        os.truncate(_tokens(data), 64)
        done = process.wait()
    refused(done, "tokens.bin ends at byte 64", "cut off while it was read")
    at = newest(workdir)
    _tokens(data).write_bytes(whole)
    losses = bench.resumes(workdir, at, f"data.path={data}")
    return Outcome(
        f"exit code 2 with file and byte, no SIGBUS; resumed after step {at} with the file back",
        *(1, losses),
    )


def another_text(bench: Bench, _: Size) -> Outcome:
    """One letter of the text is another one, prepared anew, and the run is resumed with it."""
    texts = bench.folder("other-texts")
    shutil.copytree(bench.root / "texts", texts)
    first = sorted(texts.iterdir())[0]
    first.write_text(first.read_text().replace("document 0", "document O"))
    data = bench.folder("data-other")
    prepared = bench.moejax("prepare", str(texts), "--output", str(data))
    expect(prepared.code == 0, f"it cannot be prepared: {prepared.err}")
    workdir = bench.folder("other/run")
    shutil.copytree(bench.undisturbed(), workdir)
    config = workdir / "config.json"  # the data lie elsewhere now; that alone is refused by name
    config.write_text(config.read_text().replace(str(bench.data), str(data)))
    done = bench.train(workdir, f"data.path={data}")
    refused(done, "fingerprint")
    return Outcome("exit code 2, with both fingerprints", 1)


def through_reshard(bench: Bench, _: Size) -> Outcome:
    """Half of a run goes on on 2 devices from the folder that it writes to."""
    source = bench.undisturbed()
    workdir = bench.folder("reshard/run")
    shutil.copytree(source, workdir)
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())
    for later in steps[1:]:
        shutil.rmtree(workdir / "checkpoints" / str(later))
    folder = workdir / "checkpoints" / str(steps[0])
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    done = bench.train(workdir, "mesh.expert=2", "checkpoint.keep=9", devices=2)
    expect(done.code == 0, f"it ended with {done.code}: {done.err[-300:]}")
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    expect(before == after, "the checkpoint that it went on from was changed")
    expected, found = records(source), records(workdir)
    expect(expected.keys() == found.keys(), "other steps")
    worst = max(
        abs(found[key]["loss"] / expected[key]["loss"] - 1) for key in expected if key[0] > steps[0]
    )
    expect(worst <= 1e-5, f"losses differ by {worst:.1e}")
    return Outcome(
        f"the source is as it was, byte for byte; losses differ by at most {worst:.0e}", 1
    )
