"""Measure the overhead of the training loop and of per-image seeding.

    python -m tools.loop_overhead

Two ratios, both sides interleaved in one process so that drift cancels:
  loop    images/s of `engine.train_one_epoch` on batches in memory, relative to
          a bare forward, backward and step of the same model
  loader  images/s of a loader that seeds each image's augmentation by epoch and
          position, relative to a plain loader with the same transform
And, on a CPU, the time of an update with a model that computes nothing:
  update  batches of images in memory, Mixup, schedules, seeds, EMA bookkeeping
          and log
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler

import datasets
import engine
import loaders
import sources
from augment import ViewOptions
from flags import COUNT, Parser, in_range
from losses import SupervisedLoss, build_base_criterion
from models import set_train_mode
from samplers import Batch, KeyedSampler
from tools.command import one_line_errors
from tools.timing import compare, interleaved_rates, spread, write_results
from utils import StepLog, World, available_cpus, select_device


def measure_loop(args: argparse.Namespace, device: torch.device) -> dict:
    """Measure our loop against a bare one on the same ready batches."""
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10).to(device)
    optimizer = engine.build_optimizer(model, "adamw", lr=1e-4, weight_decay=0.05)
    amp_dtype = engine.select_amp("auto", device)
    batches = [
        Batch(
            torch.randn(args.batch_size, 3, 32, 32, device=device),
            torch.randint(10, (args.batch_size,), device=device),
            torch.arange(args.batch_size),
        )
        for _ in range(args.steps)
    ]
    state = engine.TrainState(model, model, optimizer, amp_dtype=amp_dtype)
    schedules = [engine.build_lr_schedule(optimizer, args.steps, 10, 1, sched="cosine")]
    criterion = SupervisedLoss(build_base_criterion(False, 0.1))

    def ours() -> int:
        log = StepLog(state.epoch, len(batches), args.batch_size, 50)
        engine.train_one_epoch(state, batches, criterion, schedules, log)
        return len(batches) * args.batch_size

    def bare() -> int:
        set_train_mode(model)
        for images, targets, *_ in batches:
            with engine.autocast(model, amp_dtype):
                loss = F.cross_entropy(model(images), targets, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return len(batches) * args.batch_size

    return compare(ours, bare, args.rounds, device)


class StoredImages(torch.nn.Module):
    """An augmentation that returns the stored images unchanged."""

    def forward(self, images: torch.Tensor, sizes: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return images.float()


def free_model() -> torch.nn.Module:
    """Build a model with as many (tiny) tensors as an EViT of 12 layers, whose forward uses a single one."""
    model = timm.create_model("evit_tiny_patch16_224", img_size=32, embed_dim=8, num_heads=1, num_classes=10)
    model.forward = lambda images: model.head.bias.expand(len(images), -1)
    return model


def measure_update(args: argparse.Namespace) -> dict[str, float]:
    """Measure microseconds per update in `engine.train_one_epoch`, without model, optimizer and EMA kernels."""
    device, model, steps = torch.device("cpu"), free_model(), 10 * args.steps
    count = args.batch_size * steps
    images = sources.MemoryImages([np.zeros((8, 8, 3), np.uint8)] * count)
    source = sources.whole_source(images, np.arange(count) % 10, range(10))
    options = loaders.LoaderOptions(args.batch_size)
    loader = loaders.build_epoch_loader(source, StoredImages(), loaders.MixupOptions(), options, World.alone(device))
    settings = engine.OptimizerOptions(lr_scaling="none")
    state = engine.build_state(model, model, settings, args.batch_size, (3, 8, 8), None, World.alone(device))
    schedules = engine.build_schedules(state, steps, engine.ScheduleOptions(shrink_epochs=100))
    criterion = SupervisedLoss(build_base_criterion(False, 0.1))
    averages = [list(module.parameters()) for module in (state.ema.module, model)]
    ready = Batch(torch.zeros(args.batch_size, 3, 8, 8), torch.full((args.batch_size, 10), 0.1), torch.zeros(1))

    def ours() -> int:
        loader.set_epoch(0)
        engine.train_one_epoch(state, loader, criterion, schedules, StepLog(0, steps, args.batch_size, 50))
        return steps

    def bare() -> int:
        set_train_mode(model)
        for _ in range(steps):
            loss, _ = criterion(model(ready.images), ready)
            loss.backward()
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(*averages, weight=1e-4)
        return steps

    pairs = zip(*interleaved_rates([ours, bare], args.rounds, device), strict=True)
    return spread("microseconds", [1e6 / own - 1e6 / other for own, other in pairs])


class UnkeyedImages(Dataset):
    """Data set of the same views without keys; random generators continue from image to image."""

    def __init__(self, source: sources.Source, transform: Callable) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Batch:
        image, target = self.source[index]
        return Batch(self.transform(image), target, index)


def measure_loader(input_size: int, views: int, rounds: int) -> dict:
    """Measure keyed against unkeyed reading of the bundled digits, with DeiT's augmentation, in this process."""
    source, _ = datasets.read_sources(datasets.DataOptions("DIGITS"))
    source = sources.take_fraction(source, min(1.0, views / len(source)))
    transform = datasets.build_train_transform(ViewOptions((input_size, input_size)), ((0.5,) * 3, (0.25,) * 3))
    sampler = KeyedSampler(len(source))
    options = {"batch_size": 32, "collate_fn": loaders.collate}
    keyed = DataLoader(loaders.KeyedImages(source, transform), sampler=sampler, **options)
    unkeyed_images = UnkeyedImages(source, transform)
    unkeyed = DataLoader(unkeyed_images, sampler=RandomSampler(unkeyed_images), **options)

    def read(loader: DataLoader) -> int:
        sampler.set_epoch(sampler.epoch + 1)  # new views each time, because some draws cost more than others
        return sum(len(batch.targets) for batch in loader)

    return compare(lambda: read(keyed), lambda: read(unkeyed), rounds, torch.device("cpu"))


def get_parser() -> Parser:
    """Build the parser."""
    parser = Parser(prog="python -m tools.loop_overhead", description=__doc__)
    add = parser.add_argument
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--batch-size", type=COUNT, default=64, help="images per step")
    add("--steps", type=COUNT, default=20, help="steps per round")
    add(
        "--views",
        type=in_range(int, 5),
        default=1000,
        help="images per round of the loaders at 32 px; a fifth of that at 224 px",
    )
    add("--rounds", type=COUNT, default=9, help="timed rounds of each")
    add("--output", type=Path, help="write the figures to this JSON file as well")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    torch.set_num_threads(available_cpus())
    with one_line_errors("loop_overhead"):
        device = select_device(args.device, 0)
        results = {
            "loop": measure_loop(args, device),
            "loader_32px": measure_loader(32, args.views, args.rounds),
            "loader_224px": measure_loader(224, args.views // 5, args.rounds),
        }
        update = measure_update(args)
        for name, row in results.items():
            print(
                f"{name:13s} {row['images_per_second']:8.0f} images/s, bare {row['images_per_second_bare']:8.0f}, "
                f"ratio {row['ratio']:.3f} (from {row['ratio_min']:.3f} to {row['ratio_max']:.3f})"
            )
        print(
            f"{'update':13s} {update['microseconds']:8.0f} us of the loop's own (from {update['microseconds_min']:.0f} "
            f"to {update['microseconds_max']:.0f})"
        )
        if args.output:
            write_results(args.output, device, vars(args), results | {"update": update})


if __name__ == "__main__":
    main()
