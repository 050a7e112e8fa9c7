"""Interleaved timing, and result files that name the machine they were measured on."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from utils import available_cpus


def describe_environment(device: torch.device) -> dict[str, str | int]:
    """Return device, CPU, versions and date, as JSON values."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return {
        "device": name,
        "cpus": available_cpus(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "timm": version("timm"),
        "date": datetime.date.today().isoformat(),
    }


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished, so that a clock measures completed work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def interleaved_rates(works: Sequence[Callable[[], int]], rounds: int, device: torch.device) -> list[list[float]]:
    """Time all works, interleaved, in `rounds` rounds after a warm-up; return images/s of each work and round.

    A work is a function that returns how many images it handled. Interleaving cancels drift of the machine. Every other
    round runs in reverse order, which cancels drift within a round.
    """
    rates: list[list[float]] = [[] for _ in works]
    for number in range(rounds + 1):
        turns = range(len(works)) if number % 2 else reversed(range(len(works)))
        for which in turns:
            synchronize(device)
            start = time.perf_counter()
            images = works[which]()
            synchronize(device)
            if number:
                rates[which].append(images / (time.perf_counter() - start))
    return rates


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum as `name`, `name_min` and `name_max`."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def ratio_row(rates: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum of the rates, and of their ratios to the reference, round by round."""
    ratios = [rate / other for rate, other in zip(rates, reference, strict=True)]
    return spread("images_per_second", rates) | spread("ratio", ratios)


def compare(
    first: Callable[[], int], second: Callable[[], int], rounds: int, device: torch.device, second_name: str = "bare"
) -> dict[str, float]:
    """Measure images/s of both works, interleaved, and the ratio of the first to the second.

    Args:
        first, second: works, see `interleaved_rates`.
        rounds: counted rounds of each.
        second_name: the second rate is called `images_per_second_NAME`.
    """
    rates = interleaved_rates([first, second], rounds, device)
    return ratio_row(rates[0], rates[1]) | spread(f"images_per_second_{second_name}", rates[1])


def write_results(file: Path, device: torch.device, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Write a results file: environment, flags and measurements."""
    written = {"environment": describe_environment(device), "settings": settings} | results
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(written, indent=1, default=str) + "\n")
