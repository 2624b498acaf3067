"""Starting again: which ends, how often, when it is a loop; with real processes that end so."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moejax import errors, supervisor
from moejax.cli import main
from moejax.config import Config
from moejax.errors import EXIT_CODES, FINAL
from moejax.events import read_events
from moejax.ledger import Ledger
from moejax.overrides import apply_overrides, config_to_json
from moejax.supervisor import Group, Retries, cause, supervise, workdir_of
from moejax.workdir import CHECKPOINTS, COMMITTED, CONFIG, MANIFEST, RUN, checkpoint_roots

ROOT = Path(__file__).parents[1]
QUICK = Retries(restarts=2, first_wait=0.01)


def ends_with(*codes: int):
    """Returns a start of processes that end with one code after the other."""
    left = list(codes)

    def start() -> Group:
        code = left.pop(0)
        ends = f"os._exit({code})" if code >= 0 else f"os.kill(os.getpid(), {-code})"
        words = [sys.executable, "-S", "-c", f"import os; {ends}"]
        return Group([subprocess.Popen(words)])

    start.left = left
    return start


def commit(workdir: Path, step: int) -> None:
    finish(workdir / CHECKPOINTS / str(step))


def finish(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in (COMMITTED, MANIFEST):
        (folder / name).touch()


# Exit codes


def _rows(text: str) -> dict[str, list[str]]:
    table = re.findall(r"^\| (\d+|other) \|(.*)\|$", text, re.M)
    return {code: [cell.strip() for cell in cells.split("|")] for code, cells in table}


def test_the_table_of_the_page_is_that_of_the_code():
    rows = _rows((ROOT / "docs/launching.md").read_text())
    assert [int(code) for code in rows if code != "other"] == [row.code for row in EXIT_CODES]
    for row in EXIT_CODES:
        meaning, again = rows[str(row.code)][:2]
        assert meaning == row.meaning
        assert again == ("yes" if row.again else "no"), row


def test_every_constant_is_in_the_table_and_codes_differ():
    constants = {
        value for name, value in vars(errors).items() if name.isupper() and isinstance(value, int)
    }
    codes = [row.code for row in EXIT_CODES]
    assert sorted(constants) == sorted(codes) == sorted(set(codes))


def test_the_help_lists_them(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"{row.code:>3}  {row.meaning}" in text for row in EXIT_CODES)


# One try after the other


@pytest.mark.parametrize("code", sorted(FINAL))
def test_what_another_try_cannot_mend_ends_at_once(tmp_path, code):
    start = ends_with(code, 0)
    assert supervise(start, tmp_path, QUICK) == code
    assert len(start.left) == 1
    assert not read_events(tmp_path)


@pytest.mark.parametrize("code", [1, 69, 75, 124, 3, -signal.SIGKILL, -signal.SIGABRT])
def test_what_may_do_better_is_started_again(tmp_path, code, capsys):
    assert supervise(ends_with(code, 0), tmp_path, QUICK) == 0
    (event,) = read_events(tmp_path)
    shown = code if code > 0 else 128 - code
    assert (event["kind"], event["code"], event["failures"]) == ("restart", shown, 1)
    assert f"ended with exit code {shown}; starting it again" in capsys.readouterr().err


def test_without_restarts_the_code_is_handed_back(tmp_path):
    """Off: the same crash is the end, and nobody starts it again."""
    start = ends_with(69, 0)
    assert supervise(start, tmp_path, Retries(restarts=0)) == 69
    assert len(start.left) == 1


def test_preemption_is_handed_back_where_a_scheduler_answers_it(tmp_path):
    retries = QUICK._replace(end_when_preempted=True)
    assert supervise(ends_with(75, 0), tmp_path, retries) == 75
    assert supervise(ends_with(124, 0), tmp_path, retries) == 0


def test_a_crash_loop_is_stopped_with_a_suggestion(tmp_path, capsys):
    Ledger(tmp_path, 41).close()
    commit(tmp_path, 36)
    start = ends_with(*[139] * 9)
    assert supervise(start, tmp_path, QUICK) == 70
    assert len(start.left) == 6, "two restarts"
    said = capsys.readouterr().err.splitlines()[-1]
    assert "3 times in a row it ended without a newer checkpoint than that of step 36" in said
    assert "exit codes 139, 139, 139, the last steps done 41, 41, 41" in said
    assert "watch.skip_batches" in said
    assert [event["kind"] for event in read_events(tmp_path)] == ["restart"] * 2 + ["crash_loop"]
    assert read_events(tmp_path)[-1]["codes"] == [139] * 3


def test_a_run_that_gets_on_is_restarted_for_ever(tmp_path):
    """Each try commits a checkpoint and crashes: no loop, however often."""
    plain, steps = ends_with(*[137] * 9, 0), iter(range(1, 99))

    def start() -> Group:
        commit(tmp_path, next(steps))
        return plain()

    assert supervise(start, tmp_path, QUICK) == 0
    waits = [event["wait_seconds"] for event in read_events(tmp_path)]
    assert waits == [0.01] * 9


def test_a_run_that_fell_back_gets_on_from_there(tmp_path):
    """Its newest checkpoint was unsound and is set aside: newer ones have lower numbers."""
    commit(tmp_path, 40)
    plain, steps = ends_with(*[137] * 9, 0), iter(range(10, 99))

    def start() -> Group:
        newest = tmp_path / CHECKPOINTS / "40"
        if newest.exists():
            newest.rename(newest.with_name("40.corrupt"))
        commit(tmp_path, next(steps))
        return plain()

    assert supervise(start, tmp_path, QUICK) == 0


def test_a_log_on_a_full_disk_stops_no_restart(tmp_path):
    """What it says is lost; the next try, its events and its exit code are not."""
    child = [sys.executable, "-S", "-c", "raise SystemExit(3)", "--workdir", str(tmp_path)]
    words = [sys.executable, "-m", "moejax", "supervise", "--restarts", "1", "--", *child]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=full, cwd=ROOT, timeout=60)
    assert done.returncode == 70
    assert [event["kind"] for event in read_events(tmp_path)] == ["restart", "crash_loop"]


def test_any_number_of_restarts_has_a_wait():
    class Failed(Group):
        def wait(self) -> int:
            return 1

    assert supervise(lambda: Failed([]), None, Retries(restarts=1100, first_wait=0.0)) == 70


def test_a_checkpoint_on_the_local_disk_is_progress_too(tmp_path):
    workdir, local = tmp_path / "run", tmp_path / "local"
    config = apply_overrides(Config(), [f"checkpoint.local={local}", "checkpoint.local_every=1"])
    workdir.mkdir()
    (workdir / CONFIG).write_text(config_to_json(config))
    (workdir / RUN).write_text('{"run": "0123456789abcdef"}')
    plain, steps = ends_with(*[137] * 5, 0), iter(range(1, 99))

    def start() -> Group:
        root = checkpoint_roots(workdir, str(local), "0123456789abcdef")[1]
        finish(root / str(next(steps)))
        return plain()

    assert supervise(start, workdir, QUICK) == 0


def test_the_wait_doubles_up_to_a_limit(tmp_path):
    retries = Retries(restarts=4, first_wait=0.01, longest_wait=0.03)
    assert supervise(ends_with(*[1] * 5), tmp_path, retries) == 70
    waits = [e["wait_seconds"] for e in read_events(tmp_path) if e["kind"] == "restart"]
    assert waits == [0.01, 0.02, 0.03, 0.03]


# Several processes


def test_the_cause_of_an_end_comes_first():
    assert cause([69, 28]) == 28, "no other try mends it"
    assert cause([69, -9]) == 137
    assert cause([75, 124]) == 124
    assert cause([69, 69]) == 69


def test_one_that_fails_ends_the_others(monkeypatch):
    monkeypatch.setattr(supervisor, "LEAVE_SECONDS", 0.2)
    sleeper = "import time; print(flush=True); time.sleep(60)"
    words = [[sys.executable, "-S", "-c", text] for text in (sleeper, "import os; os._exit(3)")]
    group = Group([subprocess.Popen(word, stdout=subprocess.DEVNULL) for word in words])
    begun = time.monotonic()
    assert group.wait() == 3
    assert time.monotonic() - begun < 5
    assert [process.returncode for process in group.started] == [-signal.SIGTERM, 3]


def test_others_may_end_by_themselves(monkeypatch):
    """They say then what they have to say, and a code that another try cannot mend is seen."""
    late = "import os, time; time.sleep(0.4); os._exit(28)"
    words = [[sys.executable, "-S", "-c", text] for text in (late, "import os; os._exit(69)")]
    assert Group([subprocess.Popen(word) for word in words]).wait() == 28


# Signals, to a supervisor that is a process

CHILD = """
import signal, sys, time
def ask(number, _):
    print("got", number, flush=True)
    if sys.argv[1] == "good": sys.exit({15: 75, 2: 130}[number])
for number in (2, 15): signal.signal(number, ask)
print("up", flush=True)
while True: time.sleep(0.1)
"""


def _supervised(tmp_path, kind: str) -> subprocess.Popen:
    child = [sys.executable, "-S", "-c", CHILD, kind, "--workdir", str(tmp_path)]
    return subprocess.Popen(
        [sys.executable, "-m", "moejax", "supervise", "--", *child],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_goes_on_to_the_command_and_ends_both(tmp_path, number, code):
    with _supervised(tmp_path, "good") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        said, _ = process.communicate(timeout=20)
    assert (process.returncode, said) == (code, f"got {int(number)}\n")
    assert not read_events(tmp_path), "nothing is started again"


def test_a_second_signal_kills_a_command_that_does_not_end(tmp_path):
    with _supervised(tmp_path, "deaf") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "got 15\n"
        process.send_signal(signal.SIGTERM)  # the same request, delivered twice
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.2)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=20)
    assert said == "", "the command is asked once"
    assert process.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_while_it_waits_starts_nothing(tmp_path, number, code):
    started = ends_with(1)

    def start() -> Group:
        group = started()
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), number))
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        return group

    before = signal.getsignal(signal.SIGTERM)
    begun = time.monotonic()
    assert supervise(start, tmp_path, Retries(restarts=3, first_wait=60)) == code
    assert time.monotonic() - begun < 30
    assert signal.getsignal(signal.SIGTERM) == before


# Words


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["train", "x.py", "--workdir", "runs/a"], Path("runs/a")),
        (["srun", "moejax", "train", "--workdir=runs/a"], Path("runs/a")),
        (["train", "x.py"], None),
        (["train", "--workdir"], None),
    ],
)
def test_the_workdir_is_among_the_words(words, folder):
    assert workdir_of(words) == folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command; give one after --"),
        (["--", "train", "configs/x.py"], "the command has no --workdir"),
        (["--", "/no/such/program", "--workdir", "W"], "/no/such/program cannot be started: No su"),
        (["--restarts", "0", "--", "train"], "not a whole number from 1"),
    ],
)
def test_a_wrong_line_is_refused(words, message, capsys):
    assert main(["supervise", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_bad_config_is_not_tried_twice(tmp_path, capfd):
    words = ["train", str(ROOT / "configs/quickstart.py"), "--workdir", str(tmp_path), "lr=3"]
    assert main(["supervise", "--", *words]) == 2
    assert "unknown key 'lr'" in capfd.readouterr().err


def test_a_run_is_not_looked_for_in_the_folder_that_supervise_is_started_in(tmp_path, monkeypatch):
    """-m looks there first, and a run's folder may hold a json.py; the script `moejax` does not."""
    (tmp_path / "json.py").write_text("print('code from data')")
    monkeypatch.chdir(tmp_path)
    code = "import sys; from moejax.command_line import safe_path; print(safe_path())"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def python(*words: str) -> str:
        line = [sys.executable, *words]
        return subprocess.run(line, capture_output=True, text=True, env=environment).stdout

    assert python("-P", "-c", code) == "['-P']\n"
    assert python("-P", "-m", "moejax", "--version").startswith("moejax ")
    assert "code from data" in python("-m", "moejax", "--version"), "the harm"
