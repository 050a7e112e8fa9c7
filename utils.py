"""Distributed set-up, checkpoint files, meters and logging."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import math
import os
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

logger = logging.getLogger("deit")


class UserError(Exception):
    """A mistake that the user can mend: one line that names the flag or file and the mend; exit status 2."""


class RunError(Exception):
    """A fault during a run, such as a NaN or a broken image: one line; exit status 1."""


# ----------------------------------------------------------------------------------------------------------------------
# Distributed set-up
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The place of this process among all processes of the run, and the device it computes on."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def available_cpus() -> int:
    """CPUs that this process may use, which under SLURM or in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _launcher_environment() -> dict[str, str]:
    """RANK, WORLD_SIZE, ... as torchrun or submitit set them, or derived from the variables of a bare srun."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return {
            key: env[key]
            for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            if key in env
        }
    # Only a job step has SLURM_STEP_NUM_TASKS: `python main.py` inside an sbatch script stays a single process.
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        tasks, nodes = int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_STEP_NUM_NODES", "1"))
        job, step = int(env["SLURM_JOB_ID"]), int(env.get("SLURM_STEP_ID", "0"))
        return {
            "RANK": env["SLURM_PROCID"],
            "WORLD_SIZE": str(tasks),
            "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
            "LOCAL_WORLD_SIZE": str(math.ceil(tasks / nodes)),
            "MASTER_ADDR": env.get("MASTER_ADDR", _first_host(env["SLURM_STEP_NODELIST"])),
            "MASTER_PORT": env.get("MASTER_PORT", str(20000 + (job * 7 + step) % 40000)),
        }
    return {}


def _first_host(nodelist: str) -> str:
    """`gpu[07-09,12],login1` -> `gpu07`."""
    prefix, bracket, rest = nodelist.partition("[")
    if not bracket or "," in prefix:
        return nodelist.split(",")[0]
    return prefix + rest.replace("]", ",").replace("-", ",").split(",")[0]


def select_device(name: str, local_rank: int) -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:1` or `mps` into a device that exists.

    Raises:
        UserError: if the device is not there.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; use auto, cuda, mps or cpu") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: this PyTorch finds no CUDA GPU; use --device auto or --device cpu")
        device = torch.device("cuda", local_rank % torch.cuda.device_count() if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {name}: there are only {torch.cuda.device_count()} GPUs; use --device cuda")
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: this PyTorch finds no MPS device; use --device auto or --device cpu")
    elif device.type not in ("cpu", "mps"):
        raise UserError(f"--device {name}: not supported; use auto, cuda, mps or cpu")
    return device


def init_distributed(device_name: str) -> World:
    """Join the other processes of the run, if there are any, and divide the CPU's threads among the local ones.

    Raises:
        UserError: if the device is not there.
    """
    launched = _launcher_environment()
    rank, size = int(launched.get("RANK", 0)), int(launched.get("WORLD_SIZE", 1))
    local_rank = int(launched.get("LOCAL_RANK", rank))
    local_size = int(launched.get("LOCAL_WORLD_SIZE", size))
    world = World(rank, size, local_rank, local_size, select_device(device_name, local_rank))
    # torchrun sets OMP_NUM_THREADS=1 by itself; every other launcher would give each rank all the cores.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cpus() // local_size))
    if size > 1:
        os.environ.update(launched)
        store, _, _ = next(dist.rendezvous("env://", rank, size))
        # torchrun's restarts share one store; a prefix keeps a new attempt from reading the keys of the old one.
        store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        # gloo beside NCCL, for what stays on the CPU (log values, an average of the weights kept there)
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return world


def shut_down_distributed() -> None:
    """Leave the process group after a successful run."""
    if is_distributed():
        barrier()
        # A gloo thread that frees the last collective's tensors while Python finalises aborts a few per cent of
        # otherwise good runs; it needs a moment to let go of them.
        time.sleep(0.2)
        dist.destroy_process_group()
        time.sleep(0.2)


def set_up_kernels(deterministic: bool) -> None:
    """Let cuDNN pick its fastest kernels, or all of CUDA only those that give the same bits every time."""
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_lost_peer(error: Exception) -> bool:
    """Whether this is what a process sees when another one of the run has ended."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all processes, in place; with one process, nothing happens."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def main_process_first(local_rank: int = 0) -> Iterator[None]:
    """Let the first process of each machine through (to download, say), then the others."""
    if local_rank != 0:
        barrier()
    try:
        yield
    finally:
        if local_rank == 0:
            barrier()


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint files
# ----------------------------------------------------------------------------------------------------------------------


def _write_whole(path: Path, write: Any, previous: Path | None = None) -> None:
    """Write a file through `write(stream)` so that `path` is either the old file or the whole new one.

    Once the new file is whole, and not before, the old one becomes `previous`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        if previous is not None and path.exists():
            _link(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(checkpoint: Mapping[str, Any], folder: Path, is_best: bool) -> None:
    """Write `checkpoint.pth`, keep the one before as `checkpoint_previous.pth`, and `best.pth` if it is the best.

    Raises:
        RunError: if the disk takes no more; the earlier files are intact.
    """
    latest, previous = folder / "checkpoint.pth", folder / "checkpoint_previous.pth"
    try:
        _write_whole(latest, lambda stream: torch.save(dict(checkpoint), stream), previous)
        if is_best:
            _link(latest, folder / "best.pth")
    # torch.save turns a full disk into a RuntimeError of its zip writer.
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"cannot write a checkpoint to {folder}: {reason}; the earlier one is intact") from error


def _link(source: Path, target: Path) -> None:
    """Give the file a second name without ever leaving `target` half written."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    # A killed process of the same number may have left one, which is `source` under another name: never write to it.
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:  # a file system without hard links
        _write_whole(target, lambda stream: stream.write(source.read_bytes()))
    finally:
        temporary.unlink(missing_ok=True)  # it is still there if `target` was `source` already


def read_checkpoint(path: str, flag: str) -> dict[str, Any]:
    """Read a file (or https address) of tensors, numbers and strings; nothing in it is executed.

    Args:
        path: a `.pth` file written by `save_checkpoint` or the original code, a `.safetensors` file, or an https
            address of a `.pth` file.
        flag: the flag that named it, for the error message.

    Raises:
        UserError: if there is no such file, or it is not such a file.
    """
    if path.startswith(("https://", "http://")):
        path = _download(path, flag)
    if not Path(path).is_file():
        raise UserError(f"{flag} {path}: no such file; check the path")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return {"model": load_file(path)}
        # The original code put its flags into its checkpoints: a bag of values, which runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{flag} {path}: not a readable checkpoint (truncated, another format, or it holds code, which is never "
            f"run); give a file of plain tensors such as checkpoint.pth or best.pth"
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{flag} {path}: holds a {type(checkpoint).__name__}, not a checkpoint; give a checkpoint.pth")
    return checkpoint


def file_hash(path: str) -> str | None:
    """SHA-256 of a file; for a download, whose name holds a part of it, the address; None if there is no such file."""
    if path.startswith(("https://", "http://")):
        return path
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else None


def _download(address: str, flag: str) -> str:
    """Fetch a file into torch's cache, once; its path."""
    # The part before the name keeps two files called best.pth apart.
    name = f"{zlib.crc32(address.encode()):08x}-{address.partition('?')[0].rpartition('/')[2]}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(path), progress=False)
    except Exception as error:
        raise UserError(
            f"{flag} {address}: cannot be downloaded ({type(error).__name__}); give a local file"
        ) from error
    return str(path)


# ----------------------------------------------------------------------------------------------------------------------
# Meters and logging
# ----------------------------------------------------------------------------------------------------------------------


def set_up_logging(world: World) -> None:
    """Send this run's log lines to standard error; only rank 0 says anything below an error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if world.is_main else logging.ERROR)


def last_line(error: Exception) -> str:
    """The message without the traceback that a loader process wraps around it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")


def open_log(folder: Path, first_epoch: int) -> None:
    """Start `log.txt`, or for a resumed run drop its lines from `first_epoch` on: they will be written again."""

    def is_kept(line: str) -> bool:
        try:
            return json.loads(line)["epoch"] < first_epoch
        except (ValueError, LookupError, TypeError):  # half a line, of a run that ended while it wrote
            return False

    path = folder / "log.txt"
    lines = path.read_text().splitlines(keepends=True) if first_epoch and path.exists() else []
    kept = "".join(filter(is_kept, lines)).encode()
    _write_whole(path, lambda stream: stream.write(kept))


def append_log(folder: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as a line to `log.txt`.

    Raises:
        RunError: if the disk takes no more.
    """
    try:
        with open(folder / "log.txt", "a") as stream:
            stream.write(json.dumps(record) + "\n")
    except OSError as error:
        raise RunError(f"cannot write to {folder / 'log.txt'}: {error.strerror}; the checkpoint is intact") from error


class StepLog:
    """Collects what each step reports and says it every `interval` steps: the only place that waits for the device.

    Values stay on the device until then, so that the loop never waits for them. All ranks must call it alike.

    Args:
        epoch: for the progress line.
        num_steps: steps in this epoch.
        batch_images: images in a step over all ranks, for the rate.
        interval: steps between two lines; also how late a non-finite loss may be noticed.
        writer: a TensorBoard writer, or None.
        first_step: global number of the epoch's first step, for TensorBoard.
    """

    def __init__(
        self, epoch: int, num_steps: int, batch_images: int, interval: int, writer: Any = None, first_step: int = 0
    ) -> None:
        self.epoch, self.num_steps, self.batch_images = epoch, num_steps, batch_images
        self.interval, self.writer, self.first_step = interval, writer, first_step
        self.pending: list[dict[str, torch.Tensor | float]] = []
        self.totals: dict[str, float] = {}
        self.step = 0
        self.start = time.perf_counter()
        on_terminal = logger.isEnabledFor(logging.INFO) and sys.stderr.isatty()  # only rank 0 talks
        self.bar = tqdm(total=num_steps, desc=f"epoch {epoch}", unit="step", disable=not on_terminal, leave=False)

    def update(self, values: dict[str, torch.Tensor | float]) -> None:
        """Take one step's values: 0-d tensors on the device, or numbers.

        Raises:
            RunError: on all ranks together, if any rank has met a non-finite loss since the last report.
        """
        self.pending.append({k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in values.items()})
        self.step += 1
        if self.step % self.interval == 0 or self.step == self.num_steps:
            self._report()

    def _report(self) -> None:
        names = list(self.pending[0])
        table = torch.stack([_as_row(values) for values in self.pending])  # (steps, names)
        bad_steps = all_reduce_sum((~torch.isfinite(table[:, names.index("loss")])).sum())
        rows = table.tolist()
        if int(bad_steps) > 0:
            self.bar.close()
            raise RunError(
                f"the loss is not finite in epoch {self.epoch} between steps {self.step - len(rows)} and "
                f"{self.step - 1}; try a lower --lr, --clip-grad 1, or --amp off; the last checkpoint is intact"
            )
        for offset, row in enumerate(rows):
            for name, value in zip(names, row, strict=True):
                self.totals[name] = self.totals.get(name, 0.0) + value
                if self.writer is not None:
                    step = self.first_step + self.step - len(rows) + offset
                    self.writer.add_scalar(f"step/{name}", value, step)
        self._say(dict(zip(names, rows[-1], strict=True)), len(rows))
        self.pending.clear()

    def _say(self, latest: dict[str, float], steps: int) -> None:
        rate = f"{self.images_per_second:.0f} images/s"
        self.bar.set_postfix_str(f"loss {latest['loss']:.3f}, lr {latest['lr']:.1e}, {rate}", refresh=False)
        self.bar.update(steps)
        if self.bar.disable:
            seconds_left = (self.num_steps - self.step) * (time.perf_counter() - self.start) / self.step
            logger.info(
                "epoch %d  step %d/%d  loss %.4f  lr %.2e  %.0f images/s  %.0f s left in the epoch",
                *(self.epoch, self.step, self.num_steps, latest["loss"], latest["lr"]),
                *(self.images_per_second, seconds_left),
            )

    @property
    def images_per_second(self) -> float:
        return self.step * self.batch_images / (time.perf_counter() - self.start)

    def close(self) -> dict[str, float]:
        """Means over the epoch's steps and over all ranks, and the training rate in images/s over all ranks."""
        rate = self.images_per_second
        self.bar.close()
        means = torch.tensor([total / max(1, self.step) for total in self.totals.values()], dtype=torch.float64)
        if is_distributed():
            means = all_reduce_sum(means) / dist.get_world_size()
        return dict(zip(self.totals, means.tolist(), strict=True)) | {"images_per_second": rate}


def _as_row(values: dict[str, torch.Tensor | float]) -> torch.Tensor:
    device = next(value.device for value in values.values() if isinstance(value, torch.Tensor))
    numbers = [float(value) for value in values.values() if not isinstance(value, torch.Tensor)]
    others = iter(torch.tensor(numbers, dtype=torch.float32).to(device, non_blocking=True))
    return torch.stack([v.float() if isinstance(v, torch.Tensor) else next(others) for v in values.values()])
