"""Two processes of one training, of which one is killed, asked to stop, or not who it says."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

from faults.bench import CLI, Bench, Outcome, Process, expect, free_port, newest, steps_done
from faults.size import Size

LONG = ("train.steps=100000", "checkpoint.every=100000", "mesh.expert=2")
LEAVES = 2.0  # seconds in which the others have to end


def start(
    bench: Bench,
    workdir: Path,
    ids: tuple[int, ...] = (0, 1),
    *,
    code: str = CLI,
    processes: int = 2,
    seconds: int = 60,
) -> list[Process]:
    """Starts the processes of one training, with their launcher's variables."""
    port = free_port()
    return [
        bench.start(
            workdir,
            *LONG,
            code=code,
            environment={
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
                "MOEJAX_JOIN_SECONDS": str(seconds),
            },
        )
        for index in ids
    ]


def killed(index: int) -> Callable[[Bench, Size], Outcome]:
    """SIGKILL to process `index` in a step: the other one ends in 2 s."""

    def run(bench: Bench, _: Size) -> Outcome:
        workdir = bench.folder(f"peers/killed-{index}")
        both = start(bench, workdir)
        with bench.running(*both):
            both[1 - index].until(lambda: steps_done(workdir) >= 5, "step 5")
            both[index].kill()
            return _ends(both[1 - index], "in a step")

    return run


def _ends(survivor: Process, where: str) -> Outcome:
    done = survivor.wait(30)
    allowed = (69, -signal.SIGABRT)
    expect(done.code in allowed, f"it ended with {done.code}: {done.err[-400:]}")
    expect(done.seconds < LEAVES, f"it ended after {done.seconds:.1f} s")
    code = "69" if done.code == 69 else "134, an abort inside gloo"
    return Outcome(f"{where}: the other one ended in {done.seconds:.2f} s with {code}", 1)


IDLE = f"""
import os, time
from moejax import loop
plain = loop.Training._hooks
def hooks(self, step, late, preempted):
    if step == 5 and os.environ["JAX_PROCESS_ID"] == "0":
        print("idle", flush=True)
        time.sleep(600)
    plain(self, step, late, preempted)
loop.Training._hooks = hooks
{CLI}
"""


def killed_while_idle(bench: Bench, _: Size) -> Outcome:
    """SIGKILL to process 1 while process 0 is in no collective, as in an evaluation or a save."""
    workdir = bench.folder("peers/idle")
    both = start(bench, workdir, code=IDLE)
    with bench.running(*both):
        both[0].until(lambda: "idle" in both[0].out, "being idle")
        both[1].kill()
        return _ends(both[0], "outside of any collective")


def asked_one(bench: Bench, _: Size) -> Outcome:
    """SIGTERM to process 1 alone: both save the same step and end with 75."""
    workdir = bench.folder("peers/asked")
    both = start(bench, workdir)
    with bench.running(*both):
        both[0].until(lambda: steps_done(workdir) >= 5, "step 5")
        begun = time.monotonic()
        both[1].popen.terminate()
        codes = [process.wait(60).code for process in both]
        seconds = time.monotonic() - begun
    expect(codes == [75, 75], f"they ended with {codes}: {both[0].last()}")
    saved = newest(workdir)
    expect(f"saved at step {saved}" in both[0].err, "it did not say which step it saved")
    expect(steps_done(workdir) == saved, "steps after the saved one were recorded")
    return Outcome(f"both ended with 75 in {seconds:.1f} s, saved at step {saved}", 1, 0, seconds)


def wrong_ids(bench: Bench, _: Size) -> Outcome:
    """A process id beyond their number, and the same id twice."""
    workdir = bench.folder("peers/ids")
    (beyond,) = start(bench, workdir, (2,))
    with bench.running(beyond):
        done = beyond.wait(60)
    expect(done.code == 2, f"id 2 of 2 ended with {done.code}: {done.err[-400:]}")
    expect("Traceback" not in done.err, "id 2 of 2: a traceback")
    twice = start(bench, workdir, (0, 1, 1), seconds=15)
    with bench.running(*twice):
        ended = [process.wait(90) for process in twice]
    codes, seconds = [done.code for done in ended], sum(done.seconds for done in ended)
    expect(any(codes), f"nobody refuses an id that is there twice: {[p.last() for p in twice]}")
    expect(not steps_done(workdir), "it trained")
    return Outcome(
        f"id 2 of 2: exit code 2, one line; id 1 twice: none trained, all had ended in "
        f"{seconds:.0f} s with exit codes {codes}",
        2,
    )
