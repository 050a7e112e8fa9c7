"""Measure all speeds that this repository claims: `python -m tools.bench`.

    augmentation  augmented images/s: ours, in batches on the device, vs. timm's
    step          training steps: our loop vs. a loop of timm's own parts
    evit          EViT vs. DeiT, training and inference
    distillation  no teacher, cached predictions, a live teacher
    end-to-end    whole runs of main.py, augmentation on the host and on the
                  device, vs. a bare training step
    start         seconds from `python main.py` to the end of its first step
    cpu           runs of a small model on the CPU: glibc's allocator, tcmalloc,
                  one run per core

All measurements are interleaved. `start` and `cpu` launch processes, the other
sections run in this one. A number is a median with minimum and maximum; a ratio
compares two rates of the same run. The results file is rewritten after each
section, so an interrupted run keeps the finished ones.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes.util
import gc
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import timm.data
import timm.loss
import timm.optim
import timm.utils
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import augment
import datasets
import engine
import loaders
import losses
import models
import sources
from flags import COUNT, Parser, fill, parse_args
from samplers import Batch
from tools import distillation_cost, speed_test
from tools.chaos import REPOSITORY
from tools.checkpoint_cost import until_step
from tools.command import one_line_errors, untrained_model
from tools.timing import compare, describe_environment, interleaved_rates, ratio_row, spread, write_results
from utils import RunError, StepLog, UserError, World, available_cpus, select_device, set_up_kernels

CLASSES = 1000
EPOCHS = 5  # of a run of main.py; the first one warms up
STARTS = 3  # maximum
SMALL_RUN = [  # flags of the runs in section cpu
    *("--data-set", "DIGITS", "--model", "deit_tiny_patch16_224", "--model-kwargs", "embed_dim=96", "depth=6"),
    *("--input-size", "32", "--patch-size", "4", "--batch-size", "64", "--epochs", "2", "--eval-interval", "2"),
    *("--warmup-epochs", "0", "--no-model-ema", "--augment", "device", "--num-workers", "0", "--device", "cpu"),
]
DISTINCT = 64  # number of different images to augment
PEAK_FLOPS = {  # dense 16-bit FLOP/s, as stated by the manufacturer
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}


# -- augmentation ------------------------------------------------------------------------------------------------------


def augmentation(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure views/s on the device, for stored images of 32 and 256 px.

    A GPU is compared with timm's pipeline on all CPU cores. On a CPU, both use one thread.
    """
    threads, alone = torch.get_num_threads(), device.type == "cpu"
    workers = 0 if alone else available_cpus()
    against = "timm's pipeline, one thread each" if alone else f"timm's pipeline in {workers} processes"
    if alone:
        torch.set_num_threads(1)
    rows = []
    for stored, size in ((32, args.input_size), (32, 32), (256, args.input_size)):
        fresh(args)
        ours, theirs = _readers(args, device, stored, size, workers)
        with contextlib.closing(ours), contextlib.closing(theirs):
            row = compare(_reading(ours), _reading(theirs), args.rounds, device, "timm")
        rows.append({"name": f"{stored} px to {size} px", "against": against} | row)
    torch.set_num_threads(threads)
    return rows


def _readers(
    args: argparse.Namespace, device: torch.device, stored: int, size: int, workers: int
) -> tuple[loaders.EpochLoader, loaders.EpochLoader]:
    """Build two loaders of the same images in memory: ours, then timm's pipeline."""
    images = np.random.default_rng(0).integers(0, 256, (DISTINCT, stored, stored, 3), np.uint8)
    batches = 2 * workers or 4 * args.steps  # enough to keep all workers busy to the end
    order = np.arange(batches * args.batch_size) % DISTINCT
    source = sources.Source(sources.MemoryImages(list(images)), np.zeros(DISTINCT, np.int64), CLASSES, order)
    normalization = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    views, mixup = augment.ViewOptions((size, size)), loaders.MixupOptions(mixup=0, cutmix=0)

    def reader(where: str) -> loaders.EpochLoader:
        options = loaders.LoaderOptions(args.batch_size, repeated_aug=False, num_workers=workers, augment=where)
        options = replace(options, compile_augment=bool(args.compile))
        return loaders.build_train_loader(source, views, normalization, mixup, options, World.alone(device))

    return reader("device"), reader("host")


def _reading(loader: loaders.EpochLoader) -> Callable[[], int]:
    """Return a function that reads one epoch, up to the views on the device, and returns the number of images."""
    epochs = itertools.count()  # new views each time, because some draws cost more than others

    def work() -> int:
        loader.set_epoch(next(epochs))
        return sum(len(batch.images) for batch in loader)

    return work


# -- training steps ----------------------------------------------------------------------------------------------------


def step(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure training steps on ready batches with Mixup and EMA weights, and the utilization of the device."""
    rows = []
    for name in args.models:
        fresh(args)
        run = parse_args(run_flags(args, "--model", name))
        size = args.input_size
        batches = [
            Batch(
                torch.randn(args.batch_size, 3, size, size, device=device),
                torch.randint(CLASSES, (args.batch_size,), device=device),
                torch.arange(args.batch_size),
            )
            for _ in range(args.steps)
        ]
        ours, theirs = _our_steps(run, batches, device), _timms_steps(run, batches, device)
        row = compare(ours, theirs, args.rounds, device, "timm")
        fact = speed_test.describe(speed_test.build(name, None, size, torch.device("cpu")), (size, size))
        flops = fact["macs"] and 3 * 2 * fact["macs"]  # the backward pass takes twice as many
        row |= {"precision": str(engine.select_amp("auto", device)), "flops_per_image": flops}
        rows.append({"name": f"{name}, a step", "against": "a loop of timm's parts"} | row | utilisation(row, device))
    return rows


def _our_steps(run: argparse.Namespace, batches: list[Batch], device: torch.device) -> Callable[[], int]:
    """Return a function that trains one epoch with the loop of main.py and returns the number of images."""
    model = models.place(models.build_model(fill(models.ModelOptions, run), CLASSES), device)
    options, amp = fill(engine.OptimizerOptions, run), engine.select_amp(run.amp, device)
    shape = batches[0].images.shape[1:]
    state = engine.build_state(model, model, options, run.batch_size, shape, amp, World.alone(device))
    schedules = engine.build_schedules(state, len(batches), fill(engine.ScheduleOptions, run))
    mixup = loaders.build_mixup(fill(loaders.MixupOptions, run), CLASSES, run.batch_size)
    counts = {"num_batches": len(batches), "images_per_batch": run.batch_size, "updates_per_epoch": len(batches)}
    loader = loaders.EpochLoader(loader=batches, device=device, counter=None, mixup_fn=mixup, **counts)
    criterion = losses.build_criterion(fill(losses.LossOptions, run))

    def work() -> int:
        log = StepLog(state.epoch, len(batches), run.batch_size, run.log_interval)
        engine.train_one_epoch(state, loader, criterion, schedules, log)
        return len(batches) * run.batch_size

    return work


def _timms_steps(run: argparse.Namespace, batches: list[Batch], device: torch.device) -> Callable[[], int]:
    """Return a function that does the same steps with timm's parts, at the same precision and memory format."""
    model = timm.create_model(run.model, num_classes=CLASSES, drop_path_rate=run.drop_path, img_size=run.input_size[0])
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = timm.optim.create_optimizer_v2(model, opt=run.opt, lr=1e-5, weight_decay=run.weight_decay)
    smoothing = {"label_smoothing": run.smoothing, "num_classes": CLASSES}
    mixup = timm.data.Mixup(mixup_alpha=run.mixup, cutmix_alpha=run.cutmix, **smoothing)
    criterion = timm.loss.SoftTargetCrossEntropy()
    ema = timm.utils.ModelEmaV3(model, decay=run.model_ema_decay)
    amp = engine.select_amp(run.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    if run.compile:
        model.compile()

    def work() -> int:
        for batch in batches:
            images, targets = mixup(batch.images, batch.targets)
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                loss = criterion(model(images), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            ema.update(model)
        return len(batches) * run.batch_size

    return work


def utilisation(row: dict[str, Any], device: torch.device) -> dict[str, float | None]:
    """Return the model's FLOP/s as a share of the device's peak, or None if that is unknown."""
    known = device.type == "cuda" and row["flops_per_image"] and row["precision"] in ("torch.bfloat16", "torch.float16")
    peak = PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if known else None
    return {
        f"utilisation{end}": row[f"images_per_second{end}"] * row["flops_per_image"] / peak if peak else None
        for end in ("", "_min", "_max")
    }


# -- models and teachers -----------------------------------------------------------------------------------------------


def evit(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure EViT-S at keep rates 0.7 and 0.5 against DeiT-S."""
    rows = []
    for mode in ("training", "inference"):
        fresh(args)
        flags = ["--models", "deit_small_patch16_224", "evit_small_patch16_224", "--keep-rates", "0.7", "0.5"]
        flags += ["--input-size", args.input_size, "--batch-sizes", args.batch_size, "--steps", args.steps]
        flags += ["--rounds", args.rounds, "--amp", "auto", *(["--train"] if mode == "training" else [])]
        own = speed_test.get_parser().parse_args([*map(str, flags), *(["--compile"] if args.compile else [])])
        for row in speed_test.measure(own, device):
            keep = "" if row["keep_rate"] is None else f" at {row['keep_rate']}"
            rows.append({"name": f"{row['model']}{keep}, {mode}", "against": own.models[0], "mode": mode} | row)
    return rows


def distillation(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure training steps of DeiT-Ti with and without a teacher."""
    flags = ["--teacher", args.teacher, "--input-size", args.input_size, "--batch-size", args.batch_size]
    flags += ["--steps", args.steps, "--rounds", args.rounds, *(["--compile"] if args.compile else [])]
    own = distillation_cost.get_parser().parse_args([str(flag) for flag in flags])
    with tempfile.TemporaryDirectory() as folder:
        rows = distillation_cost.measure(own, device, Path(folder))
    return [{"name": row["teacher"], "against": rows[0]["teacher"]} | row for row in rows]


# -- whole runs --------------------------------------------------------------------------------------------------------


def run_flags(args: argparse.Namespace, *more: Any) -> list[str]:
    """Return flags of main.py for a run of the first model."""
    flags = ["--model", args.models[0], "--input-size", args.input_size, "--batch-size", args.batch_size]
    prefix = "--" if args.compile else "--no-"
    flags += ["--device", args.device, "--warmup-epochs", 0, f"{prefix}compile", f"{prefix}compile-augment"]
    data = ["--data-set", "CIFAR10", "--data-path", args.data_path] if args.data_path else ["--data-set", "DIGITS"]
    return [str(flag) for flag in (*flags, *data, *more)]


def end_to_end(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure epochs of main.py after the first one, relative to a bare step of the same model timed between them."""
    run = parse_args(run_flags(args))
    train, _ = datasets.read_sources(fill(datasets.DataOptions, run))
    steps = args.steps * (20 if device.type == "cuda" else 3)  # per epoch, at most
    fraction = min(1.0, (steps + 0.5) * args.batch_size / len(train))
    model = models.place(models.build_model(fill(models.ModelOptions, run), train.num_classes), device)
    if args.compile:
        model.compile()
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=device)
    work = speed_test.training(model, images, engine.select_amp(run.amp, device), args.steps)
    rows = []
    for where in ("host", "device"):
        flags = run_flags(args, "--augment", where, "--train-fraction", fraction, "--epochs", EPOCHS)
        fresh(args)  # as in a new process
        rates, bare = _epochs_of_a_run(flags, lambda: interleaved_rates([work], 1, device)[0][0])
        row = ratio_row(rates, bare) | spread("images_per_second_bare", bare) | {"train_fraction": fraction}
        rows.append({"name": f"main.py --augment {where}", "against": "a bare step of its model"} | row)
    return rows


def _epochs_of_a_run(flags: list[str], between: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Return images/s of each epoch but the first (from log.txt), and the mean of `between` before and after each."""
    # Instead of the evaluation, which is not measured and on a CPU takes longer than the rest.
    found: list[float] = []

    def evaluate_all(*_: Any) -> list[dict[str, float]]:
        found.append(between())
        return []

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(engine, "evaluate_all", evaluate_all):
        command = ["main.py", *flags, "--output-dir", folder]
        with mock.patch.object(sys, "argv", command):  # run the command in this process
            runpy.run_path(str(REPOSITORY / "main.py"), run_name="__main__")
        lines = (Path(folder) / "log.txt").read_text().splitlines()
    rates = [json.loads(line)["images_per_second"] for line in lines[1:]]
    return rates, [(before + after) / 2 for before, after in itertools.pairwise(found)]


def start(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure seconds from launching `python main.py` until it logs its first step, without compilation.

    On CUDA, the second step logs the first one.
    """
    seconds = []
    for _ in range(min(STARTS, args.rounds)):
        with tempfile.TemporaryDirectory() as folder:
            flags = run_flags(args, "--no-compile", "--no-compile-augment", "--epochs", 1)
            seconds.append(until_step(flags, Path(folder))["seconds"])
    return [{"name": "from the command to its first step", "starts": len(seconds)} | spread("seconds", seconds)]


def cpu(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure epochs of main.py with a small model on the CPU, in separate processes; `device` is not used.

    tcmalloc is compared if it is installed. The images/s of parallel runs are added.
    """
    # Each way sets its own allocator and threads, whatever this process was started with.
    inherited = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "OMP_NUM_THREADS")}
    one_thread = {"OMP_NUM_THREADS": "1"}
    ways: dict[str, tuple[dict[str, str], int]] = {
        "glibc's allocator": ({}, 1),
        "glibc's allocator, one run per core": (one_thread, available_cpus()),
    }
    library = ctypes.util.find_library("tcmalloc_minimal")
    if library:
        preload = {"LD_PRELOAD": library}
        ways["tcmalloc"] = preload, 1
        ways["tcmalloc, one run per core"] = preload | one_thread, available_cpus()
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, (environment, runs) in ways.items():
            rates[name].append(_rate_of_runs(inherited | environment, runs))
    first = next(iter(ways))
    return [{"name": name, "against": first} | ratio_row(found, rates[first]) for name, found in rates.items()]


def _rate_of_runs(environment: Mapping[str, str], runs: int) -> float:
    """Return the sum of images/s of parallel runs in this environment, in their second epoch.

    Raises:
        RunError: if one of them fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / str(number) for number in range(runs)]
        started = [
            subprocess.Popen(
                [sys.executable, "main.py", *SMALL_RUN, "--output-dir", str(own)],
                cwd=REPOSITORY,
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for own in folders
        ]
        errors = [process.communicate()[1] for process in started]
        for process, error in zip(started, errors, strict=True):
            if process.returncode:
                raise RunError(f"main.py ended with status {process.returncode}: {error.strip().splitlines()[-1:]}")
        logs = [(own / "log.txt").read_text().splitlines() for own in folders]
    return sum(json.loads(log[-1])["images_per_second"] for log in logs)


# -- the command -------------------------------------------------------------------------------------------------------

SECTIONS = {
    "augmentation": augmentation,
    "step": step,
    "evit": evit,
    "distillation": distillation,
    "end-to-end": end_to_end,
    "start": start,
    "cpu": cpu,
}


def fresh(args: argparse.Namespace) -> None:
    """Reset torch.compile, which would otherwise generalize to variable sizes, and free memory."""
    if args.compile:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def line(row: dict[str, Any]) -> str:
    """Format a row for a terminal."""

    def figure(name: str, digits: int) -> str:
        median, low, high = (f"{row[name + end]:.{digits}f}" for end in ("", "_min", "_max"))
        return f"{median:>8s} {f'({low} to {high})':20s}"

    if "seconds" in row:
        return f"{row['name']:42s} {figure('seconds', 2)} s"
    used = f"  {100 * row['utilisation']:.1f} % of the device's peak" if row.get("utilisation") else ""
    rates, ratios = figure("images_per_second", 1), figure("ratio", 3)
    return f"{row['name']:42s} {rates} images/s {ratios} of {row['against']}{used}"


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """Measure each selected section; print and write its rows when it is done."""
    results: dict[str, list[dict[str, Any]]] = {}
    for name, section in SECTIONS.items():
        if name not in args.only:
            continue
        fresh(args)
        results[name] = section(args, device)
        print(f"{name}\n  " + "\n  ".join(map(line, results[name])), flush=True)
        write_results(args.output, device, vars(args), results)
    return results


def get_parser() -> Parser:
    """Build the parser; defaults of None depend on the device."""
    parser = Parser(prog="python -m tools.bench", description=__doc__)
    add = parser.add_argument
    add(
        "--only",
        nargs="+",
        default=list(SECTIONS),
        metavar="SECTION",
        help=f"sections to measure: {', '.join(SECTIONS)}; default: all",
    )
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--batch-size", type=COUNT, help="images per step; default: 256 on CUDA, else 32")
    add("--steps", type=COUNT, help="steps per round; default: 5 on CUDA, else 2")
    add("--rounds", type=COUNT, help="timed rounds of each; default: 7 on CUDA, else 3")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the models; default: on CUDA")
    add(
        "--models",
        nargs="+",
        help="models to time; the first is also trained end to end; default: DeiT-Ti, on CUDA also DeiT-S and DeiT-B",
    )
    add("--teacher", default="regnety_160", help="teacher, any timm model")
    add("--input-size", type=COUNT, default=224, help="side of the images in pixels")
    add("--data-path", metavar="PATH", help="folder of CIFAR-10, for whole runs; default: the bundled digits")
    add(
        "--output",
        type=Path,
        help="JSON file of the results; default: results/bench-DEVICE-DATE.json, or -2, ... if that exists",
    )
    return parser


def settle(args: argparse.Namespace, device: torch.device) -> argparse.Namespace:
    """Return the flags with defaults that depend on the device.

    Raises:
        UserError: for flags that would fail in the middle of the run.
    """
    for name in args.only:
        if name not in SECTIONS:
            raise UserError(f"--only {name}: no such section; use some of {', '.join(SECTIONS)}")
    if args.data_path and not os.path.isdir(args.data_path):
        raise UserError(f"--data-path {args.data_path}: no such folder; check the path, or drop the flag")
    on_cuda, about = device.type == "cuda", describe_environment(device)
    slug = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    sizes = ("tiny", "small", "base") if on_cuda else ("tiny",)
    defaults = {"batch_size": 256 if on_cuda else 32, "steps": 5 if on_cuda else 2, "rounds": 7 if on_cuda else 3}
    defaults |= {"compile": on_cuda, "models": [f"deit_{size}_patch16_224" for size in sizes]}
    first = Path(f"results/bench-{slug}-{about['date']}.json")
    names = itertools.chain([first], (first.with_stem(f"{first.stem}-{number}") for number in itertools.count(2)))
    defaults |= {"output": next(name for name in names if not name.exists())}  # keep an earlier one of the same day
    return argparse.Namespace(**{n: defaults.get(n) if value is None else value for n, value in vars(args).items()})


def check_models(args: argparse.Namespace) -> None:
    """Build the models that the sections need, so that a wrong name or size is found before anything is measured.

    Raises:
        UserError: naming the model.
    """
    needed = [("--models", name) for name in args.models] if {"step", "end-to-end", "start"} & {*args.only} else []
    needed += [("--teacher", args.teacher)] if "distillation" in args.only else []
    for flag, name in needed:
        untrained_model(name, flag, CLASSES, args.input_size)


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    torch.set_num_threads(available_cpus())
    with one_line_errors("bench"):
        device = select_device(args.device, 0)
        args = settle(args, device)
        check_models(args)
        set_up_kernels(deterministic=False)
        measure(args, device)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
