"""main.py with fault injection: `python tests/faults.py KIND RANK UPDATE FLAGS ...`; that rank fails at that update.

KIND is nan or inf (a loss; with inf, its gradient is finite), exception, loader (SIGKILL to a data-loader worker), rank
(SIGKILL to itself), signal (SIGUSR1 to itself) or stuck (the loader gives no further batch, in a worker or in the
process itself).
"""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine
import loaders
import main


def meet(kind, loss):
    if kind == "exception":
        raise ZeroDivisionError("somebody's mistake")
    if kind == "rank":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "signal":
        os.kill(os.getpid(), signal.SIGUSR1)
    if kind == "loader":
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    if kind == "inf":
        return loss + float("inf")
    return loss * float("nan") if kind == "nan" else loss


def get_stuck_after(batches):
    """Let `collate` return this many batches and then hang (in the worker, if there is one)."""
    collate, done = loaders.collate, []

    def slow(samples):
        if len(done) == batches:
            time.sleep(1000)
        done.append(None)
        return collate(samples)

    loaders.collate = slow


if __name__ == "__main__":
    kind, rank, update, *flags = sys.argv[1:]
    if kind == "stuck":
        get_stuck_after(int(update))
    step = engine.TrainState.step

    def faulty_step(state, loss):
        if os.environ.get("RANK", "0") == rank and state.num_updates == int(update):
            loss = meet(kind, loss)
        return step(state, loss)

    engine.TrainState.step = faulty_step
    main.cli(flags)
