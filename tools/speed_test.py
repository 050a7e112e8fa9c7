"""Measure the speed of models, interleaved in one process.

    python -m tools.speed_test --models deit_small_patch16_224 resnet50

Ratios are relative to the first model (an EViT: at its first keep rate).
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

import engine
import models_evit
from flags import COUNT, Parser, in_range
from models import count_macs, unfuse_attention
from tools.command import one_line_errors, untrained_model
from tools.timing import interleaved_rates, ratio_row, write_results
from utils import available_cpus, select_device


def models_to_time(names: list[str], keep_rates: list[float]) -> list[tuple[str, float | None]]:
    """List (model, keep rate) pairs: an EViT once per rate, other models once."""
    pairs = []
    for name in names:
        pairs += [(name, rate) for rate in keep_rates] if models_evit.is_evit(name) else [(name, None)]
    return pairs


def build(name: str, keep_rate: float | None, input_size: int, device: torch.device) -> nn.Module:
    """Build a model with random weights on the device."""
    options = {} if keep_rate is None else {"keep_rate": keep_rate}
    model = untrained_model(name, "--models", 1000, input_size, **options)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    return model.to(device, memory_format=torch.channels_last)


@torch.no_grad()
def describe(model: nn.Module, input_size: tuple[int, int]) -> dict[str, Any]:
    """Return parameters, multiply-accumulates of one (height, width) image, and tokens after each block.

    The multiply-accumulates are None if torch cannot count them, the tokens [] for a convolutional network.
    """
    tokens: list[int] = []
    blocks = getattr(model, "blocks", None) or []

    def count(_module: nn.Module, _inputs: Any, out: Any) -> None:
        if isinstance(out, torch.Tensor) and out.ndim == 3:  # [B, N, D]
            tokens.append(out.shape[1])

    hooks = [block.register_forward_hook(count) for block in blocks]
    macs = count_macs(model, input_size)
    for hook in hooks:
        hook.remove()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "macs": macs, "tokens": tokens}


def inference(model: nn.Module, images: torch.Tensor, amp: torch.dtype | None, steps: int) -> Callable[[], int]:
    """Return a function that makes `steps` forward passes without gradients and returns the number of images."""

    def work() -> int:
        model.eval()
        with torch.no_grad(), engine.autocast(model, amp):
            for _ in range(steps):
                model(images)
        return steps * len(images)

    return work


def training(model: nn.Module, images: torch.Tensor, amp: torch.dtype | None, steps: int) -> Callable[[], int]:
    """Return a function that makes `steps` training steps with AdamW and returns the number of images."""
    optimizer = engine.build_optimizer(model, "adamw", lr=1e-5, weight_decay=0.05)
    targets = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def work() -> int:
        model.train()
        for _ in range(steps):
            with engine.autocast(model, amp):
                outputs = model(images)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                loss = sum(F.cross_entropy(logits, targets) for logits in outputs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return steps * len(images)

    return work


def peak_memory(work: Callable[[], int], device: torch.device) -> int | None:
    """Return the peak bytes that torch's allocator held during the work, beyond those before; None on MPS."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # negative when memory is freed
        peak = max(peak, held)
    return peak


def measure(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for each batch size and model."""
    pairs, amp = models_to_time(args.models, args.keep_rates), engine.select_amp(args.amp, device)
    built = [build(name, rate, args.input_size, device) for name, rate in pairs]
    if args.train and 1 in args.batch_sizes:
        for model in built:
            engine.check_one_image(model, torch.zeros(1, 3, *2 * (args.input_size,), device=device), "--batch-sizes")
    if args.attention == "math":
        for model in built:
            unfuse_attention(model)
    facts = [describe(model, (args.input_size, args.input_size)) for model in built]
    if args.compile:
        for model in built:
            model.compile()
    rows = []
    for batch_size in args.batch_sizes:
        images = torch.randn(batch_size, 3, args.input_size, args.input_size, device=device)
        make = training if args.train else inference
        works = [make(model, images, amp, args.steps) for model in built]
        rates = interleaved_rates(works, args.rounds, device)
        peaks = [peak_memory(work, device) for work in works]
        for (name, rate), fact, peak, own in zip(pairs, facts, peaks, rates, strict=True):
            row = {"model": name, "keep_rate": rate, "batch_size": batch_size} | ratio_row(own, rates[0]) | fact
            rows.append(row | {"peak_memory_bytes": peak})
        gc.collect()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows for a terminal."""
    lines = [
        f"{'model':34s} {'keep':>5s} {'batch':>5s} {'images/s':>9s} {'ratio':>6s} {'Mparam':>7s} {'GMACs':>6s} "
        f"{'peak MiB':>8s}  tokens after each block"
    ]
    for row in rows:
        keep = "" if row["keep_rate"] is None else f"{row['keep_rate']:.2f}"
        macs = "-" if row["macs"] is None else f"{row['macs'] / 1e9:.2f}"
        peak = "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**20:.0f}"
        lines.append(
            f"{row['model']:34s} {keep:>5s} {row['batch_size']:5d} {row['images_per_second']:9.1f} {row['ratio']:6.2f} "
            f"{row['parameters'] / 1e6:7.1f} {macs:>6s} {peak:>8s}  {' '.join(map(str, row['tokens']))}"
        )
    return "\n".join(lines)


def get_parser() -> Parser:
    """Build the parser."""
    parser = Parser(prog="python -m tools.speed_test", description=__doc__)
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        default=["deit_small_patch16_224", "evit_small_patch16_224"],
        help="model names of timm or of this repository",
    )
    add("--batch-sizes", nargs="+", type=COUNT, default=[32], help="batch sizes to time")
    add(
        "--keep-rates",
        nargs="+",
        type=in_range(float, 0, 1, open_low=True),
        default=[0.7],
        help="keep rates of every EViT model",
    )
    add("--input-size", type=COUNT, default=224, help="side of the images in pixels")
    add("--train", action="store_true", help="time forward, backward and update instead of inference")
    add("--compile", action="store_true", help="torch.compile the models")
    add(
        "--attention",
        choices=("auto", "math"),
        default="auto",
        help="auto: as main.py; math: store the attention matrix, like the original implementation",
    )
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="off", help="precision; off: float32")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--steps", type=COUNT, default=2, help="passes per round")
    add("--rounds", type=COUNT, default=9, help="timed rounds of each")
    add("--output", type=Path, help="write the rows to this JSON file as well")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    torch.set_num_threads(available_cpus())
    with one_line_errors("speed_test"):
        device = select_device(args.device, 0)
        rows = measure(args, device)
        print(table(rows))
        if args.output:
            write_results(args.output, device, vars(args), {"rows": rows})


if __name__ == "__main__":
    main()
