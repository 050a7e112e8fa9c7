"""Measure how much a teacher slows a training step: none, cached, or live.

    python -m tools.distillation_cost --device auto --batch-size 32

All three are interleaved in one process. Weights are random, because speed does
not depend on them. Batches are already in memory, so only the step is timed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import engine
import models
from flags import COUNT, Parser
from losses import DistillationLoss, LossOptions, SupervisedLoss, build_base_criterion
from samplers import Batch
from teachers import CachedTeacher, FrozenTeacher, Labels, LogProbabilities, TeacherCache
from tools.command import one_line_errors, untrained_model
from tools.timing import interleaved_rates, ratio_row, write_results
from utils import available_cpus, select_device

CLASSES = 1000


def student(args: argparse.Namespace, flag: str, device: torch.device) -> engine.TrainState:
    """Build the model that a flag names, with its optimizer; `--distilled` also trains its distillation head."""
    name, side = getattr(args, flag.removeprefix("--")), args.input_size
    model = untrained_model(name, flag, CLASSES, side)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(flag == "--distilled")
    model = models.place(model, device).train()
    if args.batch_size == 1:
        engine.check_one_image(model, torch.zeros(1, 3, side, side, device=device))
    if args.compile:
        model.compile()
    optimizer = engine.build_optimizer(model, "adamw", lr=1e-5, weight_decay=0.05)
    return engine.TrainState(model, model, optimizer, amp_dtype=engine.select_amp(args.amp, device))


def steps(state: engine.TrainState, criterion: Callable, batches: list[Batch], number: int) -> Callable[[], int]:
    """Return a function that makes `number` training steps and returns the number of images."""

    def work() -> int:
        for step in range(number):
            batch = batches[step % len(batches)]
            with state.forward():
                loss, _ = criterion(state.model(batch.images), batch)
            state.step(loss)
        return number * len(batch.positions)

    return work


def measure(args: argparse.Namespace, device: torch.device, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each kind of teacher, with ratios to training without one."""
    size = args.input_size
    batches = []
    for number in range(4):
        images = torch.randn(args.batch_size, 3, size, size, device=device)
        targets = torch.randn(args.batch_size, CLASSES, device=device).softmax(dim=1)  # as Mixup returns them
        batches.append(Batch(images, targets, torch.arange(number * args.batch_size, (number + 1) * args.batch_size)))
    model = untrained_model(args.teacher, "--teacher", CLASSES, size)
    same = ((0.5,) * 3, (0.25,) * 3)
    live = FrozenTeacher(models.place(model, device), same, same)
    base = build_base_criterion(False, 0.1)

    def cached(codec: Labels | LogProbabilities, name: str, kind: str) -> DistillationLoss:
        (folder / name).mkdir()
        cache = TeacherCache(folder / name, codec, 4 * args.batch_size, 0, 1)
        teacher = CachedTeacher(cache, lambda: 0, lambda batch: torch.randn(len(batch.positions), CLASSES))
        for batch in batches:
            teacher(batch)
        cache.close()
        return DistillationLoss(base, teacher, LossOptions(distillation_type=kind))

    ways: dict[str, tuple[str, Any]] = {
        "no teacher": ("--student", SupervisedLoss(base)),
        "cached labels (hard)": ("--distilled", cached(Labels(CLASSES), "hard", "hard")),
        "50 cached probabilities (soft)": ("--distilled", cached(LogProbabilities(CLASSES, 50), "soft", "soft")),
        f"live {args.teacher} (hard)": (
            "--distilled",
            DistillationLoss(base, live, LossOptions(distillation_type="hard")),
        ),
    }
    works = [steps(student(args, flag, device), criterion, batches, args.steps) for flag, criterion in ways.values()]
    rates = interleaved_rates(works, args.rounds, device)
    return [{"teacher": way} | ratio_row(own, rates[0]) for way, own in zip(ways, rates, strict=True)]


def get_parser() -> Parser:
    """Build the parser."""
    parser = Parser(prog="python -m tools.distillation_cost", description=__doc__)
    add = parser.add_argument
    add("--student", default="deit_tiny_patch16_224", help="model trained without a teacher")
    add("--distilled", default="deit_tiny_distilled_patch16_224", help="model trained with the teacher")
    add("--teacher", default="regnety_160", help="teacher, any timm model")
    add("--input-size", type=COUNT, default=224, help="side of the images in pixels")
    add("--batch-size", type=COUNT, default=32, help="images per step")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="precision; off: float32")
    add("--compile", action="store_true", help="torch.compile the students")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--steps", type=COUNT, default=2, help="steps per round")
    add("--rounds", type=COUNT, default=7, help="timed rounds of each")
    add("--output", type=Path, help="write the rows to this JSON file as well")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    torch.set_num_threads(available_cpus())
    with one_line_errors("distillation_cost"), tempfile.TemporaryDirectory() as folder:
        device = select_device(args.device, 0)
        rows = measure(args, device, Path(folder))
        for row in rows:
            spread = f"(from {row['ratio_min']:.3f} to {row['ratio_max']:.3f})"
            print(f"{row['teacher']:32s} {row['images_per_second']:9.1f} images/s  ratio {row['ratio']:.3f} {spread}")
        if args.output:
            write_results(args.output, device, vars(args), {"rows": rows})


if __name__ == "__main__":
    main()
