"""Utilities: distributed set-up, signals, files, logging and progress."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import stat
import struct
import sys
import tempfile
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

logger = logging.getLogger("deit")
LAUNCHERS = "torchrun, srun and run_with_submitit.py"  # they set RANK, WORLD_SIZE, ...
PATIENCE = datetime.timedelta(days=7)  # timeout of barriers that one process may reach hours before another
JOIN_TIMEOUT = datetime.timedelta(minutes=30)  # for all processes of a run to start; torch's default


_groups: dict[str, dist.ProcessGroup] = {}


class UserError(Exception):
    """A mistake of the user. The message is one line that names the flag or file and the remedy; exit status 2."""


class RunError(Exception):
    """An error during a run, such as a NaN or a broken image. The message is one line; exit status 1."""


class Preempted(Exception):
    """Raised if a signal stops the run; exit status 75 (EX_TEMPFAIL: try again later).

    Attributes:
        signal: number of that signal.
    """

    def __init__(self, number: int, what_is_kept: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {what_is_kept}")
        self.signal = number


class Interrupted(KeyboardInterrupt):
    """Raised if a signal stops the run when there is nothing to save; no `Exception`, which other code might catch.

    Attributes:
        signal: number of that signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; run the same command again")
        self.signal = number


# ----------------------------------------------------------------------------------------------------------------------
# Distributed set-up
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Rank and size of the process group, and what this process has: a number of CPUs for itself, and a device."""

    rank: int
    size: int
    local_rank: int
    cpus: int
    device: torch.device

    @classmethod
    def alone(cls, device: torch.device) -> World:
        """Return the world of a single process on this device."""
        return cls(rank=0, size=1, local_rank=0, cpus=available_cpus(), device=device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0


CGROUP = Path("/sys/fs/cgroup")  # a container's own limits, in the files of version 2 or 1


def available_cpus() -> int:
    """Return the number of CPUs that this process may use, which SLURM and containers may restrict."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):  # no limit: "max" in version 2, -1 in version 1
            quota, period = map(int, " ".join((CGROUP / name).read_text() for name in files).split())
            if quota > 0 and period > 0:
                return min(cpus, math.ceil(quota / period))
    return cpus


def _own_cpus(local_size: int) -> int:
    """Return the number of CPUs for this process alone; `local_size` is the number of processes of its machine.

    Processes that may use the same CPUs share them. SLURM usually binds each one to CPUs of its own instead.
    """
    bound = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    own = float(zlib.crc32(f"{socket.gethostname()} {bound}".encode()))
    sharing = min(local_size, gather([own]).count([own]))  # machines may have equal names
    return max(1, available_cpus() // sharing)


def _launcher_environment() -> dict[str, str]:
    """Return RANK, WORLD_SIZE, ... as set by torchrun or submitit, or derived from the variables of a plain srun.

    Raises:
        UserError: if variables are missing.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return {
            key: env[key]
            for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            if key in env
        }
    # Only a job step sets SLURM_STEP_NUM_TASKS, so `python main.py` in an sbatch script stays a single process.
    tasks = _whole_number(env, "SLURM_STEP_NUM_TASKS", 1, low=1)
    if tasks > 1:
        local_rank, nodes = _whole_number(env, "SLURM_LOCALID", 0), _whole_number(env, "SLURM_STEP_NUM_NODES", 1, low=1)
        job, step = _whole_number(env, "SLURM_JOB_ID", 0), _whole_number(env, "SLURM_STEP_ID", 0)
        return {
            "RANK": _needed(env, "SLURM_PROCID"),
            "WORLD_SIZE": str(tasks),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(max(math.ceil(tasks / nodes), local_rank + 1)),  # tasks may be unevenly spread
            "MASTER_ADDR": env.get("MASTER_ADDR") or _first_host(_needed(env, "SLURM_STEP_NODELIST")),
            "MASTER_PORT": env.get("MASTER_PORT") or str(20000 + (job * 7 + step) % 40000),
        }
    if "RANK" in env or env.get("WORLD_SIZE", "1") != "1":
        _needed(env, "RANK"), _needed(env, "WORLD_SIZE")
    return {}


def _needed(variables: Mapping[str, str], name: str) -> str:
    """Return a variable that the launcher must set.

    Raises:
        UserError: if it is missing or empty.
    """
    if not variables.get(name):
        raise UserError(f"{name}: is not set; {LAUNCHERS} set it, or unset RANK and WORLD_SIZE for a single process")
    return variables[name]


def _whole_number(
    variables: Mapping[str, str], name: str, default: int, low: int = 0, high: int = 2**63, bound: str = ""
) -> int:
    """Return a launcher's variable as an integer from `low` to `high`; `bound` explains the limit in the error.

    Raises:
        UserError: if it is not such an integer.
    """
    text = variables.get(name, str(default))
    try:
        value = int(text)
    except ValueError:
        raise UserError(f"{name}={text}: is not a whole number; {LAUNCHERS} set it correctly") from None
    if not low <= value <= high:
        raise UserError(f"{name}={text}: is not from {low} to {high}{bound}; {LAUNCHERS} set it correctly")
    return value


def _first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list: `gpu[07-09,12],login1` -> `gpu07`."""
    prefix, bracket, rest = nodelist.partition("[")
    if not bracket or "," in prefix:
        return nodelist.split(",")[0]
    return prefix + rest.replace("]", ",").replace("-", ",").split(",")[0]


def select_device(name: str, local_rank: int) -> torch.device:
    """Convert `auto`, `cpu`, `cuda`, `cuda:1` or `mps` to an existing device.

    Raises:
        UserError: if there is no such device.
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
    """Connect to the other processes of the run, if any, and share the CPU threads among the local ones.

    Raises:
        UserError: if the device is missing, the launcher's variables are wrong, or other processes do not connect.
    """
    launched = _launcher_environment()
    size = _whole_number(launched, "WORLD_SIZE", 1, low=1)
    rank = _whole_number(launched, "RANK", 0, high=size - 1, bound=f" (WORLD_SIZE={size})")
    local_size = _whole_number(launched, "LOCAL_WORLD_SIZE", size, low=1, high=size, bound=f" (WORLD_SIZE={size})")
    bound = f" (LOCAL_WORLD_SIZE={local_size})"
    local_rank = _whole_number(launched, "LOCAL_RANK", rank % local_size, high=local_size - 1, bound=bound)
    if size > 1:
        _needed(launched, "MASTER_ADDR"), _needed(launched, "MASTER_PORT")
        _whole_number(launched, "MASTER_PORT", 0, low=1, high=65535)
    world = World(rank, size, local_rank, 1, select_device(device_name, local_rank))
    _check_gpus(world)
    if size > 1:
        os.environ.update(launched)
        _join(world, launched["MASTER_ADDR"], int(launched["MASTER_PORT"]))
    world = replace(world, cpus=_own_cpus(local_size))
    # torchrun sets OMP_NUM_THREADS=1. With other launchers, each rank would use all cores.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(world.cpus)
    return world


def _check_gpus(world: World) -> None:
    """Check that this machine has a GPU for each of its processes, as far as this process can see.

    Raises:
        UserError: if there are fewer GPUs than processes.
    """
    count = torch.cuda.device_count() if world.device.type == "cuda" else 1
    # A launcher may make one GPU visible per process. `_join` compares the GPUs of all processes.
    chosen = any(os.environ.get(f"{vendor}_VISIBLE_DEVICES") for vendor in ("CUDA", "HIP", "ROCR"))
    if world.device.type != "cpu" and world.local_rank >= count and not chosen:
        raise UserError(
            f"LOCAL_RANK={world.local_rank}: there is no GPU for it, this machine has {count}; start at most {count} "
            f"processes per machine (torchrun --nproc-per-node {count}), set LOCAL_RANK and LOCAL_WORLD_SIZE if the "
            f"others run on other machines, or add --device cpu"
        )


def _join(world: World, address: str, port: int) -> None:
    """Set up the process group.

    Raises:
        UserError: if the port is in use, a process does not connect, or two share a GPU.
    """
    if world.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _check_port(port)
    try:
        store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=JOIN_TIMEOUT))
        # torchrun's restarts share one store. A prefix keeps a restarted run from reading old keys.
        store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        is_gpu = world.device.type == "cuda"
        _compare_gpus(store, world, torch.cuda.get_device_properties(world.device) if is_gpu else None)
        interface = _interface_towards(address, port)
        if interface:  # by default gloo resolves the host name, which other machines may not reach
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        # gloo for CPU tensors (log values, EMA weights on the CPU)
        backend = "cpu:gloo,cuda:nccl" if is_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)
        _groups["patient"] = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"MASTER_ADDR={address} MASTER_PORT={port}: rank {world.rank} cannot connect to the others of WORLD_SIZE="
            f"{world.size} ({reason(error)}); start all ranks, with the same address and a free port"
        ) from error


_SIOCGIFADDR = 0x8915  # ioctl(2) on Linux: get the IPv4 address of an interface
ELSEWHERE = "192.0.2.1"  # an address that no machine has (RFC 5737), so that the default route leads to it


def _interface_towards(address: str, port: int) -> str:
    """Return the network interface that leads to an address; '' if unknown."""
    with contextlib.suppress(OSError):
        own = _own_address(address, port)
        if own[0] == 127 and not re.fullmatch(r"localhost|127\..*", address):
            # Many systems give their own name the address 127.0.1.1, which other machines cannot reach.
            with contextlib.suppress(OSError):  # without a default route, there are no other machines
                own = _own_address(ELSEWHERE, port)
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError), socket.socket() as any_socket:  # an interface without an IPv4 address
                request = struct.pack("256s", name.encode())
                if fcntl.ioctl(any_socket, _SIOCGIFADDR, request)[20:24] == own:
                    return name
    return ""


def _own_address(address: str, port: int) -> bytes:
    """Return the IPv4 address of this machine from which packets to an address are sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))  # sends nothing
        return socket.inet_aton(probe.getsockname()[0])


def _check_port(port: int) -> None:
    """Check that rank 0 can listen on the port; torch's own error has many lines.

    Raises:
        UserError: if it cannot.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(f"MASTER_PORT={port}: cannot listen there ({error.strerror}); pass another port") from None


def _compare_gpus(store: dist.Store, world: World, gpu: Any) -> None:
    """Check by UUID that no two processes use the same GPU, and that either all use one or none does.

    Args:
        gpu: properties of the GPU of this process; None if it uses another device.

    Raises:
        UserError: on all ranks, if two share a GPU or some have none.
    """
    store.set(f"gpu{world.rank}", str(gpu.uuid) if gpu else "")
    found = [store.get(f"gpu{rank}") for rank in range(world.size)]
    without = [rank for rank in range(world.size) if not found[rank]]
    if len(without) == world.size:
        return
    if without:
        raise UserError(
            f"--device: ranks {', '.join(map(str, without))} find no GPU and the others do; check the driver there "
            f"(nvidia-smi), or pass --device cpu"
        )
    shared = [rank for rank in range(world.size) if found.count(found[rank]) > 1]
    if shared:
        raise UserError(
            f"--device: ranks {', '.join(map(str, shared))} would share a GPU ({gpu.name}); start as many processes "
            f"per machine as it has GPUs in CUDA_VISIBLE_DEVICES, or pass --device cuda without a number"
        )


def shut_down_distributed() -> None:
    """Leave the process group after a successful run."""
    if is_distributed():
        barrier(is_long=True)  # ranks may finish their teacher predictions hours apart
        _groups.clear()
        # At exit, a gloo thread may still free tensors of the last collective, which aborts a few percent of successful
        # runs. Give it a moment.
        time.sleep(0.2)
        dist.destroy_process_group()
        time.sleep(0.2)


def set_up_kernels(deterministic: bool) -> None:
    """Use only deterministic CUDA kernels, or else let cuDNN choose the fastest ones."""
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # These sum in switches, in an order that differs between runs.
        os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree,CollNetDirect,CollNetChain")
        torch.use_deterministic_algorithms(True)


# A warning for runs of which `varies_if_compiled` is true.
VARIES = f"torch {torch.__version__} may compile other kernels when the run is resumed; use torch 2.11 or later"


def varies_if_compiled() -> bool:
    """Return True if kernels must be deterministic, but this torch cannot compile such kernels.

    It compiles several, measures them and keeps the fastest, which may be another one in the next run and may sum in
    another order.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return False
    from torch._inductor import config  # takes a moment to import

    return not hasattr(config, "deterministic")


def suggest_allocator(device: torch.device) -> None:
    """Log how to preload tcmalloc if this process trains on one CPU thread with glibc's allocator.

    glibc returns the memory of large activations to the system and maps it again in each step. With more threads, no
    difference was measured.
    """
    if device.type != "cpu" or torch.get_num_threads() > 1:
        return
    with contextlib.suppress(OSError):  # no such file outside Linux
        libraries = Path("/proc/self/maps").read_text(errors="replace")
        if not any(name in libraries for name in ("tcmalloc", "jemalloc", "mimalloc")):
            logger.info(
                "memory    glibc's allocator; small models train faster with LD_PRELOAD=libtcmalloc_minimal.so.4 "
                "(Debian: libtcmalloc-minimal4)"
            )


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_lost_peer(error: Exception) -> bool:
    """Return True for the errors that a process raises after another process of the run has ended."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def is_lost_loader(error: Exception) -> bool:
    """Return True for the errors that a process raises after one of its data-loader workers was killed."""
    # ConnectionError and EOFError: the worker was killed while it sent a batch.
    said = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
    return said or isinstance(error, ConnectionError | EOFError)


def is_full_memory(error: Exception) -> bool:
    """Return True for the errors that a process raises when shared memory (/dev/shm) is full."""
    said = str(error)
    of_gpu = "out of resource" in said or "Too much shared memory" in said  # a kernel needs more than its GPU has
    missing = "</torch_" in said or ("shared memory" in said and not of_gpu)  # of torch; of a worker killed by SIGBUS
    return missing or (isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None)


def known_cause(error: Exception) -> str:
    """Explain what ended a run; '' if the cause is unknown."""
    said = last_line(error)
    if isinstance(error, RunError):
        return said
    if is_full_memory(error):
        remedy = "pass --num-workers 0, or give the machine or container more (docker run --shm-size)"
        return f"the shared memory, /dev/shm, is full ({said}); {remedy}"
    if isinstance(error, torch.OutOfMemoryError):
        remedy = "lower --batch-size and raise --accum-steps, or add --grad-checkpointing"
        return f"the memory of the GPU is full ({said}); {remedy}"
    if is_lost_loader(error):
        return f"a data-loader worker is gone ({said}); if memory ran out, lower --num-workers or --ram-cache"
    if is_distributed() and is_lost_peer(error):
        return "another process is gone (its own message says why)"
    return ""


def barrier(is_long: bool = False) -> None:
    """Wait for all processes.

    Args:
        is_long: some processes may be hours ahead, e.g. during a download; other waits time out after 30 minutes.
    """
    group = _groups.get("patient") if is_long else None
    if group is not None:
        dist.barrier(group)
    elif is_distributed():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all processes in place; a no-op with one process."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def agree(*numbers: float) -> list[float]:
    """Return the maximum of each number over all processes, without a GPU sync; all processes must call it."""
    if not is_distributed():
        return list(numbers)
    largest = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


class Poll:
    """`agree` with a delay of one call, so that no process waits for the others.

    A call returns the maxima of the previous call; the first call returns zeros. All processes must call it. A single
    process gets its own numbers at once.
    """

    def __init__(self) -> None:
        self._asked: tuple[torch.Tensor, Any] | None = None

    def __call__(self, *numbers: float) -> list[float]:
        if not is_distributed():
            return list(numbers)
        before, largest = self._asked, torch.tensor(numbers, dtype=torch.float64)
        self._asked = largest, dist.all_reduce(largest, dist.ReduceOp.MAX, async_op=True)
        if before is None:
            return [0.0] * len(numbers)
        found, work = before
        work.wait()
        return found.tolist()


def gather(numbers: list[float]) -> list[list[float]]:
    """Return the numbers of every process by rank; all processes must pass equally many."""
    if not is_distributed():
        return [numbers]
    own = torch.tensor(numbers, dtype=torch.float64)
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    return [row.tolist() for row in rows]


class StopSignals:
    """Context in which a stop signal only sets `received`, so that the run can save and stop; a second SIGINT kills it.

    If the run does not call `answer` within `timeout` seconds, because a data-loader worker or another process is
    stuck, a thread ends the process with status 75. If the main thread was waiting for a batch, the thread saves first.

    Outside the main thread, Python receives no signals, and the context does nothing.
    """

    NUMBERS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"))

    def __init__(self, timeout: float = 60) -> None:
        self.received = 0  # number of the last signal
        self.timeout = timeout
        self._process = os.getpid()
        self._earlier: dict[int, Any] = {}
        self._earlier_wakeup = -1
        self._pipe: tuple[int, int] | None = None
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._answered, self._is_saving = threading.Event(), False
        self._computes = threading.Lock()  # held by the main thread except while it waits for a batch
        self._save: Callable[[], str] | None = None

    def __enter__(self) -> StopSignals:
        self._computes.acquire()
        if threading.current_thread() is not threading.main_thread():
            return self
        # Python's signal handlers do not run while the main thread waits in C code. The wakeup pipe works at once.
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._watcher.start()
        self._earlier_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in self.NUMBERS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
                self._earlier[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.answer()
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._earlier_wakeup)
            os.write(self._pipe[1], b"\0")
            self._watcher.join()
            for end in self._pipe:
                os.close(end)

    def answer(self) -> None:
        """Confirm that the run is stopping by itself, which may take long."""
        self._answered.set()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Pause the timeout while a checkpoint is written, which may take long."""
        self._is_saving = True
        try:
            yield
        finally:
            self._is_saving = False

    def interruptible(self, batches: Iterable[Any], save: Callable[[], str]) -> Iterator[Any]:
        """Yield the same batches; if a stop is overdue while waiting for one, call `save` and report its result."""
        self._save, iterator, end = save, iter(batches), object()
        while True:
            self._computes.release()
            try:
                batch = next(iterator, end)
            finally:
                self._computes.acquire()
            if batch is end:
                break
            yield batch
        self._save = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:  # False in a data-loader worker that is just starting
            self._react(number)

    def _react(self, number: int) -> None:
        if number == self.received == signal.SIGINT:
            os._exit(128 + number)
        self.received = number
        if number == signal.SIGINT and os.isatty(2):
            os.write(2, b"\n")  # a line break after the terminal's ^C

    def _watch(self) -> None:
        """Wait for a signal, then until the run has confirmed it."""
        while (number := os.read(self._pipe[0], 1)[0]) not in self.NUMBERS:
            if not number:  # sent by `__exit__`
                return
        asked = time.monotonic()
        while not self._answered.wait(0.1):
            asked = time.monotonic() if self._is_saving else asked
            if time.monotonic() - asked > self.timeout:
                self._end(number)

    def _end(self, number: int) -> None:
        kept = "run the same command again"
        if self._save is not None and self._computes.acquire(blocking=False):  # blocks the main thread for good
            try:
                kept = self._save()
            except Exception as error:
                kept = f"not saved: {reason(error)}"
        kill_workers()
        with contextlib.suppress(OSError):  # the terminal may be gone
            text = f"main.py: stopped by {signal.Signals(number).name}, and stuck for {self.timeout:g} s; {kept}"
            os.write(2, f"{escaped(text)}\n".encode())
        os._exit(75)


class EndingSignals(StopSignals):
    """Context in which a stop signal raises `Interrupted`, because there is nothing to save."""

    def _react(self, number: int) -> None:
        if self.received:
            os._exit(75)
        self.received = number
        raise Interrupted(number)


def kill_workers() -> None:
    """Kill data-loader workers: they ignore SIGTERM and may be stuck, and Python would wait for them at exit."""
    if threading.current_thread() is threading.main_thread():  # no other can set handlers
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises an error for a killed worker
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def ignore_stop_signals(worker: int) -> None:
    """Ignore stop signals in a data-loader worker (a `worker_init_fn`); the training process handles them.

    Launchers signal all processes. A worker that ended at once would abort the current step.
    """
    if multiprocessing.parent_process() is None:
        return
    signal.set_wakeup_fd(-1)
    for number in StopSignals.NUMBERS:
        if isinstance(getattr(signal.getsignal(number), "__self__", None), StopSignals):
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def main_process_first(local_rank: int = 0) -> Iterator[None]:
    """Run the block in the first process of each machine (e.g. to download), then in the others."""
    if local_rank != 0:
        barrier(is_long=True)
    try:
        yield
    finally:
        if local_rank == 0:
            barrier(is_long=True)


def once_per_machine(make: Callable[[], Any], local_rank: int) -> Any:
    """Call `make` on the first process of each machine; all of its processes get the result.

    They map its tensors from one temporary file, so that they share the memory. The first process deletes the file as
    soon as all have mapped it: no later run can read it.

    Args:
        make: returns what `torch.load(weights_only=True)` reads.

    Raises:
        UserError: on all processes of the machine, if `make` raises it, or if they do not share TMPDIR.
        RunError: on the others, if `make` raises anything else.
    """
    if not is_distributed():
        return make()
    path = Path(tempfile.gettempdir(), f"deit-{int(*agree(secrets.randbits(48))):012x}")
    try:
        with main_process_first(local_rank):
            if local_rank == 0:
                _write_result(make, path)
            return _read_result(path)
    finally:
        barrier(is_long=True)  # all have mapped the file
        if local_rank == 0:
            path.unlink(missing_ok=True)


def _write_result(make: Callable[[], Any], path: Path) -> None:
    """Write what `make` returns or raises. Machines that share the folder replace each other's equal files."""
    failure: Exception | None = None
    try:
        content = {"result": make()}
    except Exception as error:
        kind, said = ("mistake", "") if isinstance(error, UserError) else ("error", f"{type(error).__name__}: ")
        failure, content = error, {kind: f"{said}{reason(error)}"}
    own = path.with_name(f"{path.name}-{secrets.token_hex(8)}")
    try:
        with open(own, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as stream:
            torch.save(content, stream)
        os.replace(own, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        failure = failure or UserError(
            f"TMPDIR {path.parent}: cannot be written ({reason(error)}); name another folder"
        )
    finally:
        own.unlink(missing_ok=True)
    if failure is not None:
        raise failure


def _read_result(path: Path) -> Any:
    try:
        content = torch.load(path, weights_only=True, mmap=is_utf8(str(path)))
    except OSError:
        raise UserError(
            f"TMPDIR {path.parent}: the first process of this machine has written nothing there; if it does not say "
            f"why, set TMPDIR to a folder that all of them share"
        ) from None
    if "mistake" in content:
        raise UserError(content["mistake"])
    if "error" in content:
        raise RunError(f"the first process of this machine: {content['error']}")
    return content["result"]


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


# Names for files that are not regular ones, by file type.
_SPECIAL = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular_file(path: str | Path) -> Path:
    """Check that a path is a regular file before it is opened; reading a FIFO or a device may hang or never end.

    Raises:
        OSError: if the file does not exist or is of another kind.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        what = _SPECIAL.get(stat.S_IFMT(mode), "a special file")
        raise OSError(errno.EINVAL, f"is {what}, not a regular file", str(path))
    return Path(path)


def is_utf8(path: str) -> bool:
    """Return True if a path can be passed to C++ (PyTorch, TensorBoard); other paths work in Python only."""
    return not any("\ud800" <= character <= "\udfff" for character in path)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not valid JSON.
    """
    return parse_json(regular_file(path).read_bytes())


def parse_json(content: bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: if it is not valid JSON, or nested too deeply.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def map_array(path: Path, dtype: np.dtype, length: int, mode: str = "r") -> np.ndarray:
    """Map a `.npy` file of `length` records into memory; `mode` is "r" or "r+".

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it holds anything else than `length` records of this dtype.
    """
    regular_file(path)
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception:  # a damaged header can raise anything
        raise ValueError("is not a .npy array") from None
    if array.dtype != dtype or array.shape != (length,):
        raise ValueError(f"does not hold {length} records of this kind")
    # Check first: opening for writing would extend the file to the length in its header.
    return array if mode == "r" else np.lib.format.open_memmap(path, mode=mode)


def temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_temporary(path: Path) -> None:
    """Remove what killed processes left of writing this file; no other process may write it now."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk, as fsync does for the content of a file."""
    with contextlib.suppress(OSError):  # not all systems can open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def whole_file(path: Path, write: Any) -> Iterator[Path]:
    """Write a file by `write(stream)` to a temporary name, which the block may link; then rename it to `path`.

    At any time, `path` is either the old file or the complete new one.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def lock_folder(folder: Path) -> TextIO:
    """Lock an output folder against other runs, until the returned file is closed or this process ends.

    Raises:
        UserError: if another process holds the lock.
    """
    lock = (folder / ".lock").open("a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise UserError(
            f"--output-dir {folder}: another run is writing there ({holder}); wait for it, or name another folder"
        ) from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): start no second run in it", folder, error.strerror)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: `path` is always either the old file or the complete new one."""
    with whole_file(path, lambda stream: stream.write(content)):
        pass


def write_first(path: Path, content: bytes) -> None:
    """Write a file unless it exists; if several processes do (even on several machines), exactly one succeeds.

    At any time, `path` is either missing or complete.
    """
    if path.exists():
        return
    own = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # not the pid, which is unique on one machine only
    write_whole(own, content)
    try:
        os.link(own, path)
        _sync_folder(path.parent)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            os.replace(own, path)
    finally:
        own.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# Meters and logging
# ----------------------------------------------------------------------------------------------------------------------


def open_standard_error() -> None:
    """Open /dev/null as standard error if the process started without one; otherwise a file would get number 2."""
    if sys.stderr is None:
        while (descriptor := os.open(os.devnull, os.O_WRONLY)) < 2:
            pass
        sys.stderr = os.fdopen(descriptor if descriptor == 2 else os.dup2(descriptor, 2), "w")


def escaped(text: str) -> str:
    """Escape control characters and line breaks; names in files could forge log lines or control a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class _OneLine(logging.Formatter):
    """Formatter that makes one line of each record."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


class _AboveBars(logging.StreamHandler):
    """Handler that writes log lines above the progress bars of a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def set_up_logging(world: World) -> None:
    """Log this run to standard error; ranks other than 0 log errors only."""
    handler = _AboveBars(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.lastResort.setFormatter(_OneLine())  # for loggers without a handler, such as timm's
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if world.is_main else logging.ERROR)


def check_space(folder: Path, needed: float, what: str, remedy: str) -> None:
    """Check that a disk has room for `needed` bytes in a folder, which may not exist yet.

    Args:
        what: flag, folder and what needs the space, for the error message.
        remedy: suggestion for the user.

    Raises:
        UserError: if the disk has less free space.
    """
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(f"{what} takes about {needed / 2**20:.0f} MiB, the disk has {free / 2**20:.0f}; {remedy}")


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, or the type of an error without a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def last_line(error: Exception) -> str:
    """Return the last line of a message, without the traceback that a data-loader worker adds."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the records of `log.txt`, without invalid lines (a killed run may leave half a line).

    Raises:
        OSError: if the file cannot be read.
    """
    records = []
    for line in regular_file(folder / "log.txt").read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            records.append(parse_json(line))
    return [record for record in records if isinstance(record, dict) and type(record.get("epoch")) is int]


def open_log(folder: Path, first_epoch: int, earlier: Path | None = None) -> None:
    """Start `log.txt`; a resumed run drops the lines from `first_epoch` on, which it will write again.

    Args:
        earlier: folder of the resumed run, if it is another one.

    Raises:
        OSError: if the file cannot be read or written.
    """
    source = earlier or folder
    records = read_log(source) if first_epoch and (source / "log.txt").exists() else []
    lines = [json.dumps(record) + "\n" for record in records if record["epoch"] < first_epoch]
    write_whole(folder / "log.txt", "".join(lines).encode())


def append_log(folder: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as a line to `log.txt`.

    Raises:
        RunError: if the disk is full or cannot be written.
    """
    with _disk_errors(folder / "log.txt"), open(folder / "log.txt", "a") as stream:
        stream.write(json.dumps(record) + "\n")
        stream.flush()
        os.fsync(stream.fileno())  # after a power cut, a checkpoint must not exist without this line


def _say_what_a_thread_raised(thread: threading.ExceptHookArgs) -> None:
    """Print Python's traceback, except for TensorBoard's thread, whose error the writer's next call raises again."""
    if type(thread.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(thread)


class TensorBoard:
    """Writer of `step/...` and `epoch/...` scalars for TensorBoard and, with a project, Weights & Biases.

    Both kinds count steps, so an epoch's values appear at its last step.

    Args:
        folder: for the files, including wandb's.
        next_step: viewers drop values of an earlier attempt from this step on. None if steps are counted anew: they
            keep all values, and Weights & Biases, whose steps only increase, gets a new run.
        config: the run's flags, by name.
        project: Weights & Biases project; "" for none.
    """

    LAYOUT = {
        "training and validation": {
            "loss": ["Multiline", ["epoch/train_loss", "epoch/test_loss", "epoch/test_ema_loss"]],
            "top-1 accuracy": ["Multiline", ["epoch/test_acc1", "epoch/test_ema_acc1"]],
        }
    }

    def __init__(
        self, folder: Path, next_step: int | None = 0, config: Mapping[str, Any] | None = None, project: str = ""
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow import, needed on rank 0 only

        threading.excepthook = _say_what_a_thread_raised
        is_new = not any(folder.glob("events*"))
        if next_step is None:
            (folder / "wandb_id").unlink(missing_ok=True)
        self.board = SummaryWriter(str(folder), purge_step=next_step)
        self.wandb = _start_wandb(folder, config or {}, project) if project else None
        if is_new and config:
            self._introduce(config)

    def _introduce(self, config: Mapping[str, Any]) -> None:
        """Write the flags, as a table and as hyperparameters, and a layout that groups the curves."""
        from torch.utils.tensorboard.summary import hparams

        rows = "\n".join(f"| {name} | {escaped(str(value))} |" for name, value in sorted(config.items()))
        values = {
            name: value if isinstance(value, int | float) else escaped(str(value)) for name, value in config.items()
        }
        with _disk_errors("TensorBoard files"):
            self.board.add_text("flags", f"| flag | value |\n|---|---|\n{rows}")
            for summary in hparams(values, {"epoch/test_acc1": 0}):
                self.board.file_writer.add_summary(summary)
            self.board.add_custom_scalars(self.LAYOUT)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Write the value of a step.

        Raises:
            RunError: if the disk is full or cannot be written.
        """
        with _disk_errors("TensorBoard files"):
            self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log({name: value}, step=step)

    def add_epoch(self, record: Mapping[str, float], step: int) -> None:
        """Write a record of log.txt; `step` is the number of steps until the end of its epoch."""
        for name, value in record.items():
            if name != "epoch":
                self.add_scalar(f"epoch/{name}", value, step)

    def add_images(self, name: str, images: torch.Tensor, step: int) -> None:
        """Write RGB images [B, 3, H, W] with values in [0, 1]."""
        with _disk_errors("TensorBoard files"):
            self.board.add_images(name, images, step)

    def flush(self) -> None:
        """Write all pending values to the files."""
        with _disk_errors("TensorBoard files"):
            self.board.flush()

    def close(self) -> None:
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _start_wandb(folder: Path, config: Mapping[str, Any], project: str) -> Any:
    """Start a run of Weights & Biases, or continue the one that the folder names.

    Raises:
        UserError: if the package is missing or fails to start.
    """
    try:
        import wandb
    except ImportError:
        raise UserError(f"--log-wandb {project}: the package is missing; pip install wandb") from None
    try:
        write_first(folder / "wandb_id", uuid.uuid4().hex.encode())
        number = (folder / "wandb_id").read_text()
        return wandb.init(project=project, id=number, resume="allow", dir=folder, config=dict(config))
    except Exception as error:  # the network, an account, or its service
        raise UserError(
            f"--log-wandb {project}: cannot start ({reason(error)}); log in, set WANDB_MODE=offline, or drop the flag"
        ) from None


def duration(seconds: float) -> str:
    """Format seconds: `3723` -> `1:02:03`."""
    return str(datetime.timedelta(seconds=round(seconds)))


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process so far in bytes, GPU memory if the device is a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class EpochTable:
    """The table of epochs that a run logs, one line of at most 71 characters per epoch; accuracies in percent.

    Args:
        epochs: total epochs of the run.
        done: epochs already trained (may be fractional).
        columns: which of "top-5" and "EMA" to show.
    """

    EVERY = 20  # lines between two headings

    def __init__(self, epochs: int, done: float, columns: Collection[str]) -> None:
        self.epochs, self.first, self.start = epochs, done, time.perf_counter()
        names = ("epochs", "loss", "lr", "top-1", "top-5", "EMA", "best", "images/s", "left")
        widths = dict(zip(names, (9, 6, 7, 6, 6, 6, 6, 8, 8), strict=True))
        self.widths = {name: widths[name] for name in names if name not in ("top-5", "EMA") or name in columns}
        self.lines = 0

    def add(self, record: Mapping[str, float], best: float) -> None:
        """Log the line of an epoch's record; `best` is the best top-1 so far, negative if there is none."""
        if self.lines % self.EVERY == 0:
            logger.info(self._line({name: name for name in self.widths}))
        self.lines += 1
        done = record["epoch"] + 1
        timed = done - self.first  # too little of an epoch says nothing about the others
        seconds = (time.perf_counter() - self.start) / timed * (self.epochs - done) if timed >= 0.5 else None
        found = {"top-1": "test_acc1", "top-5": "test_acc5", "EMA": "test_ema_acc1"}
        cells = {name: f"{record[key]:.2f}" if key in record else "-" for name, key in found.items()}
        cells |= {"epochs": f"{done}/{self.epochs}", "loss": f"{record['train_loss']:.3f}"}
        cells |= {"lr": f"{record['train_lr']:.1e}", "best": f"{best:.2f}" if best >= 0 else "-"}
        cells |= {
            "images/s": f"{record['images_per_second']:.0f}",
            "left": "-" if seconds is None else duration(seconds),
        }
        logger.info(self._line(cells))

    def _line(self, cells: Mapping[str, str]) -> str:
        return " ".join(f"{cells[name]:>{width}}" for name, width in self.widths.items())


@contextlib.contextmanager
def _disk_errors(what: Any) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write to {what}: {error.strerror}") from error


@dataclass
class _Table:
    """Logged values of some steps, on their way to the host.

    Attributes:
        steps: values of each step; those that are tensors have to be read from `cells`.
        updates: the update that each step belongs to.
        end: index of the step after the last one.
        cells: [steps, tensors + 1] on the host, valid once `event` is done; the last column counts the ranks with a
            non-finite loss.
        event: CUDA event at the end of the copy, or None if there is nothing to wait for.
        arrived: when the copy was first seen to be done, in `time.perf_counter()` seconds.
    """

    steps: list[dict[str, torch.Tensor | float]]
    updates: list[int]
    end: int
    cells: torch.Tensor
    event: Any
    arrived: float | None = None

    def look(self) -> None:
        """Note the time if the copy is done by now, without waiting."""
        if self.arrived is None and (self.event is None or self.event.query()):
            self.arrived = time.perf_counter()

    def read(self) -> tuple[list[dict[str, float]], list[int]]:
        """Return each step's values as numbers, and the steps with a non-finite loss; wait if necessary."""
        if self.event is not None:
            self.event.synchronize()
        self.look()
        rows, bad = [], []
        for step, (values, cells) in enumerate(zip(self.steps, self.cells.tolist(), strict=True)):
            column = iter(cells)
            rows.append({k: next(column) if isinstance(v, torch.Tensor) else float(v) for k, v in values.items()})
            if next(column):
                bad.append(step)
        return rows, bad


def _to_host(table: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Copy to the host; return the copy and the event that ends it, or None if it is valid already."""
    if table.device.type != "cuda":
        return table.cpu(), None
    host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)  # copies to unpinned memory would block
    host.copy_(table, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(table.device))
    return host, event


class Progress:
    """A progress bar on a terminal, otherwise log lines; silent if this process does not log.

    Args:
        description: what is done.
        total: number of units to do, or None if it is not known.
        unit: what is counted.
        done: units already done.
    """

    LINE_SECONDS = 10.0  # minimum time between two default lines

    def __init__(self, description: str, total: int | None, unit: str, done: int = 0) -> None:
        self.description, self.unit, self.first = description, unit, done
        on_terminal = logger.isEnabledFor(logging.INFO) and sys.stderr.isatty()  # only rank 0 logs
        options = {"total": total, "initial": done, "desc": description, "unit": unit}
        options["delay"] = 1 if total is None else 0  # s: it may be over at once
        self.bar = tqdm(**options, disable=not on_terminal, leave=False)
        self.done, self.start = done, time.perf_counter()
        self.said = self.start

    def skip(self, number: int) -> None:
        """Subtract units from the total."""
        self.bar.total -= number
        self.bar.refresh()

    def move(self, number: int = 1) -> None:
        """Count units as done and move the bar, without a log line."""
        self.done += number
        self.bar.update(number)

    def advance(self, number: int = 1, status: str = "", line: str = "") -> None:
        """Count units as done and report progress.

        Args:
            status: text next to the bar.
            line: log line if there is no bar. Default: rate and remaining time, every `LINE_SECONDS`.
        """
        self.bar.set_postfix_str(status, refresh=False)
        self.move(number)
        now = time.perf_counter()
        if self.bar.disable and (line or now - self.said > self.LINE_SECONDS):
            self.said = now
            logger.info(line or self._default_line(now))

    def _default_line(self, now: float) -> str:
        rate = (self.done - self.first) / max(1e-9, now - self.start)
        if self.bar.total is None:
            return f"{self.description}: {self.done} {self.unit}s, {rate:.0f} {self.unit}s/s"
        left = (self.bar.total - self.done) / max(1e-9, rate)
        counted = f"{self.done} of {self.bar.total} {self.unit}s"
        return f"{self.description}: {counted}, {rate:.0f} {self.unit}s/s, {left:.0f} s left"

    def close(self) -> None:
        self.bar.close()


class StepLog:
    """Log of the steps of an epoch: reports every `interval` steps without waiting for the device.

    On CUDA, values are copied to the host asynchronously every `interval` steps and logged one interval later. Only the
    last step of an epoch and `report` wait for the copy. Other devices log at once. All ranks must make the same calls.

    Args:
        epoch: epoch number, for the log lines.
        num_steps: steps in this epoch.
        batch_images: images per step over all ranks, for the rate.
        interval: steps between two lines, and between checks for a non-finite loss (on CUDA, one interval later).
        writer: a TensorBoard writer, or None.
        first_step: step of this epoch to start with.
        totals: `totals` of an earlier log that this one continues.
        max_skipped: updates per epoch that may have a non-finite loss; they do not count in the means.
    """

    def __init__(
        self,
        epoch: int,
        num_steps: int,
        batch_images: int,
        interval: int,
        writer: Any = None,
        first_step: int = 0,
        totals: Mapping[str, float] | None = None,
        max_skipped: int = 0,
    ) -> None:
        self.epoch, self.num_steps, self.batch_images = epoch, num_steps, batch_images
        self.interval, self.writer, self.max_skipped = interval, writer, max_skipped
        self.pending: list[dict[str, torch.Tensor | float]] = []
        self.updates: list[int] = []  # the update that each pending step belongs to
        self.last_skipped = -1  # the last update counted as skipped
        self.sent: _Table | None = None  # values on their way to the host
        # Sums over this rank's steps. "steps" counts finite steps, "skipped" counts non-finite updates of all ranks.
        # "seconds" is the time that training "timed_images" on all ranks took.
        self.totals = {"steps": 0.0, "skipped": 0.0, "timed_images": 0.0, "seconds": 0.0} | dict(totals or {})
        self.step = self.first_step = first_step
        # CUDA runs behind the host, so the rate counts steps that the device has finished.
        self.done, self.done_at = first_step, time.perf_counter()
        self.start = self.done_at
        self.progress = Progress(f"epoch {epoch}", num_steps, "step", first_step)

    def update(self, values: dict[str, torch.Tensor | float], num_updates: int | None = None) -> None:
        """Record one step's values: 0-d tensors on the device, or numbers.

        Args:
            num_updates: updates made before this step; by default, each step is an update.

        Raises:
            RunError: on all ranks, if too many of the updates reported now are not finite on any rank.
        """
        self.updates.append(self.step if num_updates is None else num_updates)
        self.pending.append({k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in values.items()})
        self.step += 1
        self.progress.move()
        if self.sent is not None:
            self.sent.look()
        if self.step == self.num_steps:
            self.report()
        elif self.step % self.interval == 0:
            self._send()

    def report(self) -> None:
        """Report all values recorded so far; waits for the device."""
        self._send()
        self._receive()

    def _send(self) -> None:
        """Send pending values to the host and report those sent before."""
        if not self.pending:
            return
        self._receive()
        steps, self.pending = self.pending, []
        updates, self.updates = self.updates, []
        names = [name for name, value in steps[0].items() if isinstance(value, torch.Tensor)]
        cells = [values[name].float() for values in steps for name in names]
        table = torch.stack(cells).view(len(steps), len(names))
        bad = all_reduce_sum((~torch.isfinite(table[:, names.index("loss")])).float())  # (steps,), number of ranks
        self.sent = _Table(steps, updates, self.step, *_to_host(torch.cat([table, bad[:, None]], dim=1)))
        if self.sent.event is None:
            self._receive()

    def _receive(self) -> None:
        """Report the values that were sent, if any."""
        if self.sent is None:
            return
        table, self.sent = self.sent, None
        rows, bad_steps = table.read()
        first = table.end - len(rows)
        self.totals["timed_images"] += (table.end - self.done) * self.batch_images
        self.totals["seconds"] += max(0.0, table.arrived - self.done_at)
        self.done, self.done_at = table.end, table.arrived
        skipped = {table.updates[step] for step in bad_steps} - {self.last_skipped}
        self.totals["skipped"] += len(skipped)
        self.last_skipped = max(skipped, default=self.last_skipped)
        if skipped and self.totals["skipped"] > self.max_skipped:
            self.progress.close()
            where = "on another rank" if math.isfinite(rows[bad_steps[0]]["loss"]) else "here"
            raise RunError(
                f"the loss is not finite in epoch {self.epoch} at step {first + bad_steps[0]} ({where}); try a lower "
                f"--lr, --clip-grad 1, or --amp off, or tolerate some with --max-skipped-steps"
            )
        for step, row in enumerate(rows):
            if step in bad_steps:
                if table.updates[step] in skipped:  # warn once per update
                    skipped.remove(table.updates[step])
                    logger.warning("epoch %d  step %d skipped: its loss is not finite", self.epoch, first + step)
                continue
            self.totals["steps"] += 1
            for name, value in row.items():
                self.totals[name] = self.totals.get(name, 0.0) + value
                if self.writer is not None:
                    self.writer.add_scalar(f"step/{name}", value, self.epoch * self.num_steps + first + step)
        self._say(rows[-1])

    def _say(self, latest: dict[str, float]) -> None:
        rate = self.images_per_second
        seconds_left = (self.num_steps - self.done) * self.batch_images / rate
        self.progress.advance(
            0,
            status=f"loss {latest['loss']:.3f}, lr {latest['lr']:.1e}, {rate:.0f} images/s",
            line=f"epoch {self.epoch}  step {self.done}/{self.num_steps}  loss {latest['loss']:.4f}  "
            f"lr {latest['lr']:.2e}  {rate:.0f} images/s  {seconds_left:.0f} s left in the epoch",
        )

    @property
    def images_per_second(self) -> float:
        """Rate since this log began: a resumed epoch counts from where it was resumed."""
        return (self.done - self.first_step) * self.batch_images / max(1e-9, self.done_at - self.start)

    def close(self) -> dict[str, float]:
        """Return the means over steps and ranks, and `images_per_second` over all ranks.

        The rate is that of the whole epoch, also if it was resumed. If updates were skipped, `skipped_steps` is their
        number.

        Raises:
            RunError: if all updates were skipped.
        """
        rate = self.totals["timed_images"] / max(1e-9, self.totals["seconds"])
        self.progress.close()
        sums = torch.tensor(list(self.totals.values()), dtype=torch.float64)
        totals = dict(zip(self.totals, all_reduce_sum(sums).tolist(), strict=True))
        steps, skipped, *_ = (totals.pop(name) for name in ("steps", "skipped", "timed_images", "seconds"))
        if skipped and not steps:
            raise RunError(f"no loss of epoch {self.epoch} is finite: the teacher or the data may be broken")
        means = {name: total / max(1.0, steps) for name, total in totals.items()}
        return means | {"images_per_second": rate} | ({"skipped_steps": self.totals["skipped"]} if skipped else {})
