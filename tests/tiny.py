"""Runs small enough for a test: a DeiT of two narrow blocks on the bundled digits, as commands."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from utils import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = ["--input-size", "32", "--patch-size", "8", "--model-kwargs", "embed_dim=48", "depth=2", "num_heads=3"]
DATA = ["--data-set", "DIGITS", "--num-workers", "0"]
TINY = ["--model", "deit_tiny_distilled_patch16_224", *MODEL, *DATA, "--epochs", "1", "--warmup-epochs", "0"]
# without what is drawn per process: Mixup pairs, stochastic depth
PLAIN = [*TINY, "--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--amp", "off"]
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**changes):
    """This environment without any launcher's variables, one thread per process; a change to None leaves one out."""
    kept = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and not k.startswith("SLURM_")}
    changed = {**kept, "OMP_NUM_THREADS": "1", **changes}
    return {key: str(value) for key, value in changed.items() if value is not None}


def start(command, **changes):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=REPOSITORY,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*command, status=0, **changes):
    """Run to the end; the output, which must come with that exit status."""
    process = start(command, **changes)
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == status, output
    return output


def torchrun(processes, *command, **options):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return run(*launcher, *command, **options)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]


@contextlib.contextmanager
def user_error(*words):
    """Wants a UserError of one line which holds all these words."""
    with pytest.raises(UserError) as info:
        yield
    message = str(info.value)
    assert "\n" not in message
    assert all(str(word) in message for word in words), message
