"""Measure the cost of saving a run and of resuming it.

    python -m tools.checkpoint_cost -- --data-set CIFAR --data-path data

Saving: training steps with and without one checkpoint, interleaved in one
process. Resuming: time from launch to the end of the first step, at the start
and in the middle of an epoch, and the bytes that all processes read. It runs
main.py with the flags after --. Linux only.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3

import engine
from checkpoints import LATEST
from flags import COUNT, Parser
from losses import SupervisedLoss, build_base_criterion
from samplers import Batch
from tools.chaos import REPOSITORY
from tools.command import one_line_errors, untrained_model
from tools.timing import interleaved_rates, ratio_row, write_results
from utils import RunError, StepLog, StopSignals, UserError, World, available_cpus, select_device


def saving(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """Measure images/s of steps with and without one checkpoint, and the seconds of a checkpoint."""
    size = args.input_size
    model = untrained_model(args.model, "--model", 10, size).to(device).train()
    if args.batch_size == 1:
        engine.check_one_image(model, torch.zeros(1, 3, size, size, device=device))
    optimizer = engine.build_optimizer(model, "adamw", lr=1e-5, weight_decay=0.05)
    amp = engine.select_amp(args.amp, device)
    state = engine.TrainState(model, model, optimizer, amp_dtype=amp, ema=ModelEmaV3(model))
    criterion = SupervisedLoss(build_base_criterion(False, 0.1))
    images = torch.randn(args.batch_size, 3, size, size, device=device)
    targets = torch.randn(args.batch_size, 10, device=device).softmax(dim=1)
    batch = Batch(images, targets, torch.arange(args.batch_size))
    saver = engine.Saver(state, [], World.alone(device), StopSignals(), engine.Output(folder))
    seconds = []

    def work(saves: bool) -> Callable[[], int]:
        def steps() -> int:
            if saves:
                begin = time.perf_counter()
                saver.save()
                seconds.append(time.perf_counter() - begin)
            log = StepLog(0, args.steps + 1, args.batch_size, args.steps)
            engine.train_one_epoch(state, [batch] * args.steps, criterion, [_Still()], log)
            saver.finish()  # within these steps, so that no later ones share their time with the write
            return args.steps * args.batch_size

        return steps

    without, with_one = interleaved_rates([work(False), work(True)], args.rounds, device)
    saver.close()
    return ratio_row(with_one, without) | {
        "steps": args.steps,
        "seconds_of_steps": args.steps * args.batch_size / statistics.median(without),
        "seconds_of_saving": statistics.median(seconds),
        "mebibytes": (folder / LATEST).stat().st_size / 2**20,
    }


class _Still:
    """A constant learning rate."""

    name, value, is_comparable = "lr", 1e-5, True

    def step_update(self, num_updates: int) -> None:
        pass


def _bytes_read(process: subprocess.Popen) -> int:
    """Return the bytes that a process and its children read, from disk or from the page cache."""
    total = 0
    for entry in Path("/proc").iterdir():
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1] if entry.name.isdigit() else ""
            if str(process.pid) in (entry.name, parent):
                total += int((entry / "io").read_text().split("rchar: ")[1].split()[0])
        except OSError:  # the process has just ended
            continue
    return total


def until_step(flags: list[str], folder: Path, step: int | None = None) -> dict[str, float]:
    """Run main.py until it logs this step of an epoch, by default the first step that it makes, then end it.

    By then it has saved.

    Raises:
        UserError: if an epoch has fewer steps.
        RunError: if it ends before that step.
    """
    command = [sys.executable, "main.py", *flags, "--output-dir", str(folder), "--resume", "auto"]
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--log-interval", "1"], cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if not (progress := re.search(r"step (\d+)/(\d+)", line)):
            continue
        now, total = map(int, progress.groups())
        if step in (None, now) or step > total:
            found = {"seconds": time.perf_counter() - begin, "mebibytes_read": _bytes_read(process) / 2**20}
            process.terminate()
            process.communicate()
            if step is not None and step > total:
                raise UserError(f"--middle {step}: an epoch has {total} steps; pass at most {total}")
            return found
    raise RunError(f"main.py ended before {f'step {step}' if step else 'its first step'}: {''.join(said[-3:])}")


def resuming(flags: list[str], folder: Path, middle: int, rounds: int) -> dict[str, Any]:
    """Measure a fresh start and a resume at step `middle` of the first epoch, interleaved; return the medians."""
    until_step(flags, folder / "run", middle)
    starts: dict[str, list[dict[str, float]]] = {"fresh": [], "resumed": []}
    for number in range(rounds):
        starts["fresh"].append(until_step(flags, folder / f"fresh{number}"))
        saved = torch.load(folder / "run" / LATEST, weights_only=True)  # each resumed run has trained further
        starts["resumed"].append(until_step(flags, folder / "run"))
    medians = {
        kind: {name: statistics.median(start[name] for start in each) for name in each[0]}
        for kind, each in starts.items()
    }
    return {"images_skipped": saved["progress"]["images"]} | medians


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m tools.checkpoint_cost", description=__doc__)
    add = parser.add_argument
    add("--model", default="deit_tiny_patch16_224", help="model to save")
    add("--input-size", type=COUNT, default=224, help="side of the images in pixels")
    add("--batch-size", type=COUNT, default=32, help="images per step")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="precision; off: float32")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--steps", type=COUNT, default=4, help="training steps per checkpoint")
    add("--rounds", type=COUNT, default=5, help="timed rounds of each")
    add(
        "--middle",
        type=COUNT,
        default=300,
        help="step of the first epoch at which the run is stopped and resumed",
    )
    add("--output", type=Path, help="write the report to this JSON file as well")
    add("flags", nargs="*", help="flags of main.py for the resumed runs, after --")
    args = parser.parse_args(argv)
    torch.set_num_threads(available_cpus())
    with one_line_errors("checkpoint_cost"), tempfile.TemporaryDirectory() as folder:
        device = select_device(args.device, 0)
        report = {"saving": saving(args, device, Path(folder))}
        saved = report["saving"]
        print(
            f"a checkpoint of {saved['mebibytes']:.0f} MiB stops training for {saved['seconds_of_saving']:.2f} s; one "
            f"in {saved['seconds_of_steps']:.1f} s of training: {saved['ratio']:.3f} of the images/s without "
            f"(from {saved['ratio_min']:.3f} to {saved['ratio_max']:.3f})"
        )
        if args.flags:
            report["resuming"] = resuming(args.flags, Path(folder), args.middle, args.rounds)
            for kind in ("fresh", "resumed"):
                row = report["resuming"][kind]
                print(f"{kind:8s} {row['seconds']:6.1f} s to the first step, {row['mebibytes_read']:7.1f} MiB read")
            print(f"{report['resuming']['images_skipped']} images skipped")
        if args.output:
            write_results(args.output, device, vars(args), report)


if __name__ == "__main__":
    main()
