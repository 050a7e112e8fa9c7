"""main.py with a fault: `python tests/faults.py KIND RANK UPDATE FLAGS ...`; at that update, that rank meets the fault.

KIND is nan (a loss), exception, loader (SIGKILL to a loader process) or rank (SIGKILL to itself).
"""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine
import main


def meet(kind, loss):
    if kind == "exception":
        raise ZeroDivisionError("somebody's mistake")
    if kind == "rank":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "loader":
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    return loss * float("nan") if kind == "nan" else loss


if __name__ == "__main__":
    kind, rank, update, *flags = sys.argv[1:]
    step = engine.TrainState.step

    def faulty_step(state, loss):
        if os.environ.get("RANK", "0") == rank and state.num_updates == int(update):
            loss = meet(kind, loss)
        return step(state, loss)

    engine.TrainState.step = faulty_step
    main.cli(flags)
