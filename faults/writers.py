"""Two trainings on one workdir: the second is refused, however it comes, and nothing is mixed."""

import json
import signal
import socket
import time

from faults.bench import LIMIT, Bench, Outcome, Process, expect, newest, steps_done
from faults.size import Size
from faults.storms import STORM_STEPS
from moejax.workdir import CHECKPOINTS, checkpoint_steps


def mixed(bench: Bench, size: Size) -> Outcome:
    """Challengers come while an owner trains, is stopped, and at the same moment as the owner.

    The last of them comes when the owner was killed: it takes over.
    """
    workdir = bench.folder("writers/run")
    link = bench.root / "writers" / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(workdir)
    words = [f"train.steps={STORM_STEPS}", "checkpoint.every=10"]
    # both at once: the lock decides
    pair = [bench.start(workdir, *words) for _ in range(2)]
    attempts, refused = 1, 0
    with bench.running(*pair):
        _until_one_ends(pair)
        owner, loser = sorted(pair, key=lambda process: not process.runs)
        expect(owner.runs, f"both ended: {owner.last()} and {loser.last()}")
        refused += _refused(loser, owner)
        owner.until(lambda: newest(workdir) >= 10, "a checkpoint")
        owner.popen.send_signal(signal.SIGSTOP)  # it lives and does nothing: still the owner
        try:
            while attempts < size.writers - 1:
                few = range(min(2, size.writers - 1 - attempts))
                paths = [link if (attempts + i) % 2 else workdir for i in few]
                others = [bench.start(path, *words) for path in paths]
                with bench.running(*others):
                    for other in others:
                        refused += _refused(other, owner)
                attempts += len(others)
        finally:
            owner.popen.send_signal(signal.SIGCONT)
        at = steps_done(workdir)
        owner.until(lambda: steps_done(workdir) > at or newest(workdir) > 20, "another step")
        if owner.runs:
            owner.popen.kill()
        owner.popen.wait()
    heir = bench.start(link, *words)
    with bench.running(heir):
        done = heir.wait()
    attempts += 1
    expect(done.code == 0, f"after the owner's death: {done.code}: {done.err[-400:]}")
    expect(f"process {owner.popen.pid} on" in done.err, "the dead owner was not named")
    runs = set()
    for step in checkpoint_steps(workdir):
        manifest = workdir / CHECKPOINTS / str(step) / "MANIFEST.json"
        runs.add(json.loads(manifest.read_text())["run"])
    expect(len(runs) == 1, f"checkpoints of {len(runs)} runs")
    expect(bench.moejax("fsck", "--workdir", str(workdir)).code == 0, "fsck finds damage")
    losses = bench.same(workdir, STORM_STEPS)
    return Outcome(
        f"{refused} of {attempts - 1} refused with exit code 2 and the owner's host, pid and "
        "start, by its path and by a link, two started at once among them; the last, after the "
        "owner's death, took over; no mixed checkpoint",
        *(attempts, losses),
    )


def _until_one_ends(pair: list[Process]) -> None:
    deadline = time.monotonic() + LIMIT
    while all(process.runs for process in pair):
        expect(time.monotonic() < deadline, "both train on one workdir")
        time.sleep(0.01)


def _refused(process: Process, owner: Process) -> int:
    done = process.wait()
    expect(done.code == 2, f"a second training ended with {done.code}: {done.err[-400:]}")
    says = f"in use by process {owner.popen.pid} on {socket.gethostname()} since "
    expect(says in done.err, f"it does not name the owner: {done.err[-300:]}")
    return 1
