"""What a measurement was made on: written into every file of results/."""

from __future__ import annotations

import datetime
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from utils import available_cpus


def describe_environment(device: torch.device) -> dict[str, str | int]:
    """Device, processors, versions and date, as JSON values."""
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
    """Wait for the device, so that a clock tells when the work was done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
