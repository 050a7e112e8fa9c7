"""Runs small enough for a test: a DeiT of two narrow blocks on the bundled digits, as commands."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from PIL import Image
from torch._subclasses import FakeTensorMode

from tools.chaos import kill, processes_with
from utils import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = ["--input-size", "32", "--patch-size", "8", "--model-kwargs", "embed_dim=48", "depth=2", "num_heads=3"]
DATA = ["--data-set", "DIGITS", "--num-workers", "0"]
TINY = ["--model", "deit_tiny_distilled_patch16_224", *MODEL, *DATA, "--epochs", "1", "--warmup-epochs", "0"]
# without what is drawn per process: Mixup pairs, stochastic depth
PLAIN = [*TINY, "--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--amp", "off"]
RESNET = ["--model", "test_resnet", *DATA, "--input-size", "32", "--drop-path", "0"]
HEAD = [*RESNET, "--train-scope", "head", "--cache-features"]
ONE_VIEW = ["--aa", "none", "--color-jitter", "0", "--hflip", "0", "--reprob", "0", "--mixup", "0", "--cutmix", "0"]
ONE_VIEW += ["--drop-path", "0", "--no-repeated-aug"]  # of each image
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def traces_cuda():
    """Return True if this torch can move fake tensors to a GPU that does not exist."""
    try:
        with FakeTensorMode():
            torch.empty(1).to("cuda")
    except RuntimeError:
        return False
    return True


NEEDS_FAKE_GPU = pytest.mark.skipif(not traces_cuda(), reason="this torch traces no GPU without one")


def environment(**changes):
    """Return the environment without launcher variables, one thread per process; None removes a variable."""
    kept = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and not k.startswith("SLURM_")}
    changed = {**kept, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "TINY_RUN": uuid.uuid4().hex, **changes}
    return {key: str(value) for key, value in changed.items() if value is not None}


class Process(warm.Popen):
    """A running command of this repository with its output; its processes share a marker in the environment."""

    def __init__(self, command, cold=False, **changes):
        self.variables = environment(**changes)
        options = {"cwd": REPOSITORY, "env": self.variables, "cold": cold}
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        super().__init__([sys.executable, *map(str, command)], **options, **out)

    def output(self, seconds=240):
        """Wait for the end and return the output; after a timeout, end all processes with stack traces."""
        try:
            return self.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            kill(processes_with(f"TINY_RUN={self.variables['TINY_RUN']}"), signal.SIGABRT)  # the fault handler's
            pytest.fail(f"not done in {seconds} s: {self.communicate()[0]}")


def run(*command, status=0, **changes):
    """Run to the end, check the exit status, and return the output."""
    process = Process(command, **changes)
    output = process.output()
    assert process.returncode == status, output
    return output


def torchrun(processes, *command, **options):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return run(*launcher, *command, **options)


def write_folders(root, names, per_class=12, parts=("train", "val")):
    """Write PART/NAME/NUMBER.png: noise around one color per class, which a few updates can learn."""
    for part in parts:
        generator = np.random.default_rng(len(part))
        for label, name in enumerate(names):
            folder = Path(root, part, name)
            folder.mkdir(parents=True)
            color = np.array([label % 3, label // 3 % 3, label // 9 % 3]) * 90 + 30
            for number in range(per_class):
                pixels = color + generator.integers(-20, 20, (32, 32, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return Path(root)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]


@contextlib.contextmanager
def user_error(*words):
    """Expect a one-line UserError that contains all these words."""
    with pytest.raises(UserError) as info:
        yield info
    message = str(info.value)
    assert "\n" not in message
    assert all(str(word) in message for word in words), message
