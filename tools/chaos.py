"""Kill a run at random times, resume it, and compare it with an uninterrupted run.

    python -m tools.chaos --kills 20
    python -m tools.chaos --kills 20 --processes 2
    python -m tools.chaos --kills 20 --processes 2 --restarts
    python -m tools.chaos --kills 3 -- --data-set CIFAR --deterministic

The run is killed (SIGKILL) while it starts, trains, or writes a checkpoint,
which it does every 0.3 seconds. The comparison is bitwise. With --processes 2,
the run uses torchrun and is launched again after a kill; with --restarts, one
rank is killed and torchrun restarts all ranks. Flags of main.py go after --.
Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import torch

from checkpoints import BEST, LATEST
from flags import COUNT, Parser, in_range
from tools.command import one_line_errors
from tools.timing import write_results
from utils import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
# All sources of randomness: workers, Mixup, CutMix, dropout, stochastic depth, repeated augmentation.
RUN = ["--model", "deit_tiny_distilled_patch16_224", "--input-size", "32", "--patch-size", "8", "--data-set", "DIGITS"]
RUN += ["--model-kwargs", "embed_dim=48", "depth=2", "num_heads=3", "--drop", "0.1", "--model-ema-decay", "0.99"]
RUN += ["--num-workers", "1", "--batch-size", "32", "--accum-steps", "2", "--clip-grad", "1", "--warmup-epochs", "1"]
TIMES = ("images_per_second",)  # values of log.txt that differ in every run


def processes_with(*variables: str) -> list[int]:
    """Return the processes that have all of these NAME=value pairs in their environment."""
    wanted, found = [variable.encode() for variable in variables], []
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:  # it has just ended, or belongs to another user
            continue
        if all(each in environment for each in wanted):
            found.append(int(entry.name))
    return sorted(found)


def kill(pids: list[int], number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to the processes that still exist."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class Run:
    """One start of main.py, with all its processes."""

    def __init__(self, folder: Path, flags: list[str], processes: int, restarts: int) -> None:
        self.folder, self.token = folder, uuid.uuid4().hex
        command = [sys.executable]
        if processes > 1:
            launcher = ["--standalone", "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
            command += ["-m", "torch.distributed.run", *launcher]
        command += ["main.py", *flags, "--resume", "auto", "--output-dir", str(folder)]
        environment = os.environ | {"CHAOS_RUN": self.token, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        with open(folder.with_suffix(".out"), "a") as output:
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def living(self, rank: int | None = None) -> list[int]:
        """Return the processes of this start (of one rank), including orphans."""
        return processes_with(f"CHAOS_RUN={self.token}", *([f"RANK={rank}"] if rank is not None else []))

    def wait(self, seconds: float) -> int:
        """Return the exit status; if the run takes longer than `seconds`, print stack traces and end it."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            kill(self.living(), signal.SIGABRT)  # the fault handler prints stack traces
            self.process.wait()
            raise RuntimeError(f"not done in {seconds:g} s: {self.folder.with_suffix('.out').read_text()}") from None

    def is_writing(self) -> bool:
        """Return True if a checkpoint is half written."""
        return any(self.folder.glob(f".{LATEST}.*.tmp"))

    def saves(self) -> int:
        """Return a number that changes with every checkpoint."""
        latest = self.folder / LATEST
        return latest.stat().st_mtime_ns if latest.exists() else 0

    def victims(self, rank: int | None) -> list[int]:
        """Return all processes, or the training process of one rank."""
        return self.living() if rank is None else self.living(rank)[:1]


def wait_and_kill(run: Run, moment: str, seconds: float, rank: int | None) -> bool:
    """Kill a run (or one rank) `seconds` after a moment of MOMENTS; return False if the run ends first.

    A kill after the start comes at the first checkpoint at the latest.
    """
    saves, end, pids = run.saves(), time.monotonic() + seconds if moment == "start" else None, []
    while run.process.poll() is None:
        if not pids and run.saves() != saves:  # it trains again
            end = time.monotonic() + (0 if moment == "start" else seconds)
            pids = run.victims(rank)  # looked up in advance: a small file is written in milliseconds
        if end is not None and time.monotonic() >= end and (moment != "write" or run.is_writing()):
            pids = pids or run.victims(rank)
            if pids:  # torchrun may not have started that rank yet
                kill(pids)
                return True
        time.sleep(0 if moment == "write" else 0.005)
    return False


MOMENTS = ("start", "write", "training", "write")


def kill_and_resume(
    folder: Path, flags: list[str], args: argparse.Namespace, start: float, seconds: float
) -> dict[str, Any]:
    """Kill and resume a run until it is done; count all kills and those inside a write.

    Args:
        start, seconds: how long a run takes until its first checkpoint, and from then on.
    """
    draw, report = random.Random(args.seed), {"kills": 0, "inside_a_write": 0}
    run = Run(folder, flags, args.processes, args.kills if args.restarts else 0)
    while report["kills"] < args.kills:
        moment, earlier = MOMENTS[report["kills"] % len(MOMENTS)], set(folder.glob(".*.tmp"))
        after = draw.uniform(0, start if moment == "start" else seconds / args.kills)
        if not wait_and_kill(run, moment, after, draw.randrange(args.processes) if args.restarts else None):
            break
        if not args.restarts:
            kill(run.living())
            run.process.wait()
        half_written = bool(set(folder.glob(".*.tmp")) - earlier)
        report["kills"] += 1
        report["inside_a_write"] += half_written
        print(f"kill {report['kills']:3d}  {moment} + {after:.1f} s{', half written' * half_written}", flush=True)
        if not args.restarts:
            run = Run(folder, flags, args.processes, 0)
    report["last_status"] = run.process.wait()
    kill(run.living())
    return report


def differences(first: Any, second: Any, name: str = "") -> list[str]:
    """List the names of all values that are not bitwise identical in two nested dictionaries."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if first.dtype == second.dtype and torch.equal(first, second) else [name]
    if isinstance(first, dict) and isinstance(second, dict):
        if first.keys() != second.keys():
            return [f"{name} (names)"]
        return [each for key in first for each in differences(first[key], second[key], f"{name}.{key}")]
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        return differences(dict(enumerate(first)), dict(enumerate(second)), name)
    return [] if first == second else [name]


def compare(one: Path, other: Path) -> list[str]:
    """List the differences between two runs in their last and best checkpoints and in log.txt."""
    found = []
    for file in (LATEST, BEST):
        pair = [torch.load(folder / file, weights_only=True, map_location="cpu") for folder in (one, other)]
        for checkpoint in pair:
            del checkpoint["args"]  # the flags contain the folder
        found += differences(*pair, file)
    logs = [[json.loads(line) for line in (folder / "log.txt").read_text().splitlines()] for folder in (one, other)]
    for record in (*logs[0], *logs[1]):
        for name in TIMES:
            record.pop(name)
    return found + differences(*logs, "log.txt") + [str(path) for path in other.glob(".*.tmp")]


def compare_with_killed(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run once without and once with kills, and list the differences of the results."""
    flags = [*RUN, "--epochs", str(args.epochs), *args.flags]
    if not any(flag.startswith("--checkpoint-minutes") for flag in flags):
        flags += ["--checkpoint-minutes", "0.005"]
    begin = time.monotonic()
    whole = Run(folder / "whole", flags, args.processes, 0)
    while not whole.saves() and whole.process.poll() is None:
        time.sleep(0.01)
    start = time.monotonic() - begin
    if whole.process.wait():
        raise UserError(f"the run failed by itself:\n{(folder / 'whole.out').read_text()[-2000:]}")
    seconds = time.monotonic() - begin
    print(f"never killed: {args.epochs} epochs in {seconds:.0f} s", flush=True)
    report = kill_and_resume(folder / "killed", flags, args, start, seconds - start)
    if report["last_status"]:
        raise UserError(f"the killed and resumed run failed:\n{(folder / 'killed.out').read_text()[-2000:]}")
    return report | {"seconds": time.monotonic() - begin, "differences": compare(folder / "whole", folder / "killed")}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m tools.chaos", description=__doc__)
    add = parser.add_argument
    add("--kills", type=in_range(int, 0), default=20, help="number of kills")
    add("--processes", type=COUNT, default=1, help="processes of the run; above 1 under torchrun")
    add("--restarts", action="store_true", help="kill one rank; torchrun --max-restarts restarts all ranks")
    add("--epochs", type=COUNT, default=40, help="epochs of the run")
    add("--seed", type=in_range(int, 0), default=0, help="seed of the random moments")
    add("--output", type=Path, help="write the report to this JSON file as well")
    add("flags", nargs="*", help="flags of main.py, after --")
    args = parser.parse_args(argv)
    with one_line_errors("chaos"), tempfile.TemporaryDirectory() as folder:
        if args.restarts and args.processes < 2:
            raise UserError("--restarts: torchrun restarts runs of several processes; add --processes 2")
        report = compare_with_killed(args, Path(folder))
        equal = "no difference" if not report["differences"] else ", ".join(report["differences"])
        print(f"{report['kills']} kills, {report['inside_a_write']} inside a write, {report['seconds']:.0f} s: {equal}")
        if args.output:
            write_results(args.output, torch.device("cpu"), vars(args), report)
    if report["differences"] or report["kills"] < args.kills:
        sys.exit(1)


if __name__ == "__main__":
    main()
