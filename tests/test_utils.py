"""Devices, launchers, the progress of long work, and the step log."""

import datetime
import errno
import gc
import io
import json
import logging
import math
import os
import resource
import signal
import socket
import threading
import time
import types

import pytest
import tiny
import torch
from torch.utils.data import DataLoader

import main
import utils
from utils import Progress, RunError, StepLog, UserError, World, append_log, init_distributed, last_line, select_device

# -- devices -----------------------------------------------------------------------------------------------------------


def test_a_device_that_is_there_is_selected():
    assert select_device("cpu", local_rank=3) == torch.device("cpu")
    assert select_device("auto", local_rank=0).type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "meta", "banana", "gpu", "cuda:x", ""])
def test_a_device_that_is_not_there_is_the_user_s_mistake(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"^--device {name}: .*cpu$"):
        select_device(name, local_rank=0)


@pytest.mark.parametrize(
    "device, threads, libraries, lines",
    [
        ("cpu", 1, "/usr/lib/libc.so.6", 1),
        ("cpu", 1, "/usr/lib/libc.so.6\n/usr/lib/libtcmalloc_minimal.so.4.5.10", 0),
        ("cpu", 1, "/usr/lib/libjemalloc.so.2", 0),
        ("cpu", 2, "/usr/lib/libc.so.6", 0),
        ("cuda", 1, "/usr/lib/libc.so.6", 0),
        ("cpu", 1, None, 0),  # not on Linux
    ],
)
def test_another_allocator_is_suggested_on_one_cpu_thread(device, threads, libraries, lines, monkeypatch):
    def read_text(path, errors):
        assert str(path) == "/proc/self/maps"
        if libraries is None:
            raise FileNotFoundError
        return libraries

    said = []
    monkeypatch.setattr(utils.Path, "read_text", read_text)
    monkeypatch.setattr(utils.logger, "info", said.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    utils.suggest_allocator(torch.device(device))
    assert len(said) == lines and all("LD_PRELOAD=libtcmalloc_minimal.so.4" in line for line in said)


def test_auto_without_an_accelerator_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert select_device("auto", local_rank=0) == torch.device("cpu")


def test_each_local_rank_has_a_gpu_of_its_own_unless_one_is_named(monkeypatch):
    # the numbering is ours to get right on machines without GPUs, too
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert [select_device("cuda", rank) for rank in range(4)] == [torch.device("cuda", i) for i in (0, 1, 0, 1)]
    assert select_device("auto", 1) == torch.device("cuda", 1)
    assert select_device("cuda:1", 0) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="--device cuda:7: there are only 2 GPUs"):
        select_device("cuda:7", 0)


# -- launchers ---------------------------------------------------------------------------------------------------------

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
TORCHRUN |= {"MASTER_ADDR": "node3", "MASTER_PORT": "29500"}

# `srun` inside an allocation of 3 machines, task 4 of 6
SRUN = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "3"}
SRUN |= {"SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_NTASKS": "6"}


@pytest.fixture
def launched(monkeypatch):
    """Return the world of this process under a launcher with these variables."""

    def ask(**variables):
        with monkeypatch.context() as patch:
            for name in list(os.environ):
                if name.startswith("SLURM_") or name in TORCHRUN:
                    patch.delenv(name)
            for name, value in variables.items():
                patch.setenv(name, value)
            return utils._launcher_environment()

    return ask


def test_without_a_launcher_there_is_one_process(launched):
    assert launched() == {}


def test_torchrun_variables_are_taken_as_they_are(launched):
    assert launched(**TORCHRUN) == TORCHRUN


def test_torchrun_inside_a_slurm_step_wins(launched):
    assert launched(**TORCHRUN, **SRUN) == TORCHRUN


def test_a_bare_srun_is_understood(launched):
    found = launched(**SRUN)
    port = int(found.pop("MASTER_PORT"))
    assert 1024 < port < 65536
    assert found == {
        "RANK": "4",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
    }


def test_all_tasks_of_a_step_agree_on_the_port_and_two_steps_do_not(launched):
    def port(**changes):
        return launched(**SRUN | changes)["MASTER_PORT"]

    assert port(SLURM_PROCID="0", SLURM_LOCALID="1") == port()
    assert port(SLURM_STEP_ID="3") != port() != port(SLURM_JOB_ID="4712")


def test_a_master_address_given_to_srun_is_kept(launched):
    found = launched(**SRUN, MASTER_ADDR="10.0.0.1", MASTER_PORT="1234")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "1234")


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu[07-09,12]", "gpu07"),
        ("gpu[12,07-09]", "gpu12"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("a,b", "a"),
        ("a,gpu[1-2]", "a"),
        ("gpu7", "gpu7"),
        ("rack1-gpu[003-004]", "rack1-gpu003"),
    ],
)
def test_the_first_machine_of_a_compressed_list_is_the_master(launched, nodes, first):
    assert launched(**SRUN | {"SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


def test_a_batch_script_without_srun_stays_a_single_process(launched):
    # the script itself sees the whole allocation, but no other process runs it
    script = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "6", "SLURM_NNODES": "3", "SLURM_PROCID": "0"}
    script |= {"SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu[07-09]"}
    assert launched(**script) == {}
    assert launched(**script, SLURM_STEP_NUM_TASKS="1", SLURM_STEP_ID="0") == {}


def test_a_single_process_needs_no_process_group(monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # leaves torch's threads alone
    world = init_distributed("cpu")
    assert world == World.alone(torch.device("cpu"))
    assert world.is_main and not utils.is_distributed()
    assert utils.Poll()(3, -1) == [3, -1]
    total = torch.tensor([2.0])
    assert utils.all_reduce_sum(total) is total and float(total) == 2.0
    with utils.main_process_first():
        utils.barrier()
    utils.shut_down_distributed()


@pytest.fixture
def started(monkeypatch):
    """Start this process as a launcher with these variables would."""

    def start(device="cpu", **variables):
        for name in list(os.environ):
            if name.startswith("SLURM_") or name in TORCHRUN or name.endswith("_VISIBLE_DEVICES"):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        return init_distributed(device)

    return start


TWO = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR: is not set"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR: is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT: is not set"),
        ({"MASTER_PORT": "auto"}, "MASTER_PORT=auto: is not a whole number"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0: is not from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: is not from 1 to 65535"),
        ({"RANK": None}, "RANK: is not set"),
        ({"RANK": "first"}, "RANK=first: is not a whole number"),
        ({"RANK": "2"}, "RANK=2: is not from 0 to 1 (WORLD_SIZE=2)"),
        ({"RANK": "-1"}, "RANK=-1: is not from 0 to 1"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE: is not set"),
        ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE=1.5: is not a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: is not from 1"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x: is not a whole number"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2: is not from 0 to 1 (LOCAL_WORLD_SIZE=2)"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1: is not from 0 to 0 (LOCAL_WORLD_SIZE=1)"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3: is not from 1 to 2 (WORLD_SIZE=2)"),
    ],
)
def test_wrong_variables_of_a_launcher_are_named(started, changes, words):
    with pytest.raises(UserError) as caught:
        started(**{name: value for name, value in (TWO | changes).items() if value is not None})
    assert str(caught.value).startswith(words) and "torchrun" in str(caught.value) and "\n" not in str(caught.value)
    assert not utils.is_distributed()


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_STEP_NODELIST"])
def test_a_slurm_step_that_lacks_a_variable_is_named(launched, missing):
    with pytest.raises(UserError, match=f"^{missing}: is not set"):
        launched(**{name: value for name, value in SRUN.items() if name != missing})
    with pytest.raises(UserError, match="^SLURM_STEP_NUM_TASKS=many: is not a whole number"):
        launched(SLURM_STEP_NUM_TASKS="many")


def test_unevenly_spread_tasks_of_a_step_are_understood(launched):
    # 6 tasks on 3 machines, 4 of them on the first
    found = launched(**SRUN | {"SLURM_PROCID": "3", "SLURM_LOCALID": "3"})
    assert (found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("3", "4")


def test_a_busy_port_is_the_user_s_mistake(started):
    with socket.create_server(("", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(UserError, match=f"^MASTER_PORT={port}: .*already in use.*another port$"):
            started(**TWO | {"MASTER_PORT": port})


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_arrives_is_a_one_line_error(started, monkeypatch, rank):
    monkeypatch.setattr(utils, "JOIN_TIMEOUT", datetime.timedelta(seconds=0.2))
    port = tiny.free_port()
    with pytest.raises(
        UserError, match=rf"^MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: rank {rank} .*WORLD_SIZE=2 [^\n]*$"
    ):
        started(**TWO | {"RANK": rank, "MASTER_PORT": port})


def test_the_interface_towards_an_address_is_the_one_that_routes_to_it():
    assert utils._interface_towards("127.0.0.1", 29500) in ("lo", "lo0")
    assert utils._interface_towards("no.such.host.invalid", 29500) == ""
    assert utils._interface_towards("::1", 29500) == ""  # not asked for: gloo finds its own


QUOTA, PERIOD = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "1600000 100000"}, 8),
        ({QUOTA: "-1", PERIOD: "100000"}, 8),
        ({QUOTA: "50000", PERIOD: "100000"}, 1),
    ],
)
def test_the_quota_of_a_container_limits_its_cpus(files, cpus, tmp_path, monkeypatch):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(utils, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert utils.available_cpus() == cpus


@pytest.fixture
def one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_processes_than_gpus_are_the_user_s_mistake(started, one_gpu, device):
    with pytest.raises(UserError, match=r"^LOCAL_RANK=1: there is no GPU .* has 1; .*--nproc-per-node 1\), .*cpu$"):
        started(device, **TWO | {"RANK": 1, "LOCAL_RANK": 1})


def test_a_launcher_may_show_each_process_its_own_gpu(started, one_gpu, monkeypatch):
    joined = []
    monkeypatch.setattr(utils, "_join", lambda world, *_: joined.append(world))
    world = started("cuda", **TWO | {"RANK": 1, "LOCAL_RANK": 1, "CUDA_VISIBLE_DEVICES": "1"})
    assert len(joined) == 1 and world.device == torch.device("cuda", 0)


def test_processes_that_share_a_gpu_are_told_by_its_uuid():
    def compare(*uuids):
        store = torch.distributed.HashStore()
        for rank, uuid in enumerate(uuids):
            store.set(f"gpu{rank}", uuid)
        world = World(rank=1, size=len(uuids), local_rank=1, cpus=1, device=torch.device("cuda", 0))
        utils._compare_gpus(store, world, types.SimpleNamespace(uuid=uuids[1], name="H100") if uuids[1] else None)

    compare("a", "b", "c")
    compare("", "", "")
    with pytest.raises(UserError, match=r"^--device: ranks 0, 2 would share a GPU"):
        compare("a", "b", "a")
    for uuids in (("a", "b", ""), ("a", "", "")):  # a machine without a driver; others would wait for its GPU
        with pytest.raises(UserError, match=r"^--device: ranks (2|1, 2) find no GPU and the others do"):
            compare(*uuids)


GIVEN_CPUS = {  # by each rank of a machine: the CPUs it may use
    "all of the machine": [range(16)] * 4,
    "two halves": [range(8), range(8), range(8, 16), range(8, 16)],
    "its own": [range(4 * rank, 4 * rank + 4) for rank in range(4)],
    "one": [range(1)] * 4,
}


@pytest.mark.parametrize("given, expected", list(zip(GIVEN_CPUS, (4, 4, 4, 1), strict=True)))
def test_processes_divide_the_cpus_that_they_share(given, expected, monkeypatch):
    numbers = []
    monkeypatch.setattr(utils, "gather", lambda own: numbers.append(own) or [own])
    for cpus in GIVEN_CPUS[given]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cpus=cpus: set(cpus))
        utils._own_cpus(4)
    monkeypatch.setattr(utils, "gather", lambda own: numbers)
    for cpus in GIVEN_CPUS[given]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cpus=cpus: set(cpus))
        assert utils._own_cpus(4) == expected


# -- the end -----------------------------------------------------------------------------------------------------------


def test_killed_workers_raise_no_error_in_the_ending_process():
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        loader = DataLoader(range(4), num_workers=1, persistent_workers=True, multiprocessing_context="fork")
        batches = iter(loader)
        next(batches)
        utils.kill_workers()
        for worker in batches._workers:
            worker.join(60)  # where torch's handler would raise
            assert worker.exitcode == -signal.SIGKILL
    finally:
        signal.signal(signal.SIGCHLD, handler)


# -- progress ----------------------------------------------------------------------------------------------------------


class Screen(io.StringIO):
    """Standard error, on a terminal or not."""

    def __init__(self, is_terminal):
        super().__init__()
        self.isatty = lambda: is_terminal

    def lines(self):
        """Log lines without their time."""
        return [line.split(" ", 1)[1] for line in self.getvalue().splitlines()]


@pytest.fixture
def screen(monkeypatch):
    """Standard error of a process that logs as this rank does."""

    def open_screen(rank=0, is_terminal=False):
        screen = Screen(is_terminal)
        monkeypatch.setattr("sys.stderr", screen)
        monkeypatch.setattr(utils, "logger", logging.getLogger("deit.test"))  # other tests keep theirs
        utils.set_up_logging(World(rank, 2, rank, 2, torch.device("cpu")))
        return screen

    return open_screen


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock of `utils` by a settable one."""
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(utils, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_progress_without_a_terminal_logs_now_and_then(screen, clock):
    screen, progress = screen(), Progress("teacher", 1000, "image")
    said_at = []
    for second in range(1, 4 * int(Progress.LINE_SECONDS)):
        clock.now += 1
        before = len(screen.lines())
        progress.advance(10)
        said_at += [second] * (len(screen.lines()) - before)
    progress.close()
    assert len(said_at) == 3 and said_at[0] >= Progress.LINE_SECONDS
    assert all(later - earlier >= Progress.LINE_SECONDS for earlier, later in zip(said_at, said_at[1:], strict=False))
    counts = [10 * second for second in said_at]
    assert screen.lines() == [
        f"teacher: {done} of 1000 images, 10 images/s, {100 - done / 10:.0f} s left" for done in counts
    ]


def test_progress_counts_no_work_that_was_already_done(screen, clock):
    screen, progress = screen(), Progress("teacher", 1000, "image", done=500)
    progress.skip(100)
    clock.now += 20
    progress.advance(100)
    assert screen.lines() == ["teacher: 600 of 900 images, 5 images/s, 60 s left"]


def test_progress_without_a_total_says_the_count_and_the_rate(screen, clock):
    screen, progress = screen(), Progress("listing train", None, "file")
    progress.advance(100)  # a small folder is listed without a word
    clock.now += 1.5 * Progress.LINE_SECONDS
    progress.advance(200)
    assert screen.lines() == ["listing train: 300 files, 20 files/s"]


def test_progress_without_a_total_shows_no_bar_for_a_moment(screen):
    screen, progress = screen(is_terminal=True), Progress("listing train", None, "file")
    progress.advance(100)
    progress.close()
    assert "listing" not in screen.getvalue()


def test_progress_says_a_given_line_at_once(screen, clock):
    screen, progress = screen(), Progress("epoch 0", 100, "step")
    for step in range(3):
        progress.advance(1, status="of the bar", line=f"step {step}")
    assert screen.lines() == ["step 0", "step 1", "step 2"]
    clock.now += 0.9 * Progress.LINE_SECONDS
    progress.advance(1, line="step 3")
    clock.now += 0.9 * Progress.LINE_SECONDS  # since the last line, whichever that was
    progress.advance(1)
    assert screen.lines()[3:] == ["step 3"]


def test_progress_on_a_terminal_is_a_bar_and_no_lines(screen):
    screen, progress = screen(is_terminal=True), Progress("teacher", 8, "image", done=2)
    assert "teacher" in screen.getvalue() and "2/8" in screen.getvalue()
    time.sleep(0.2)  # tqdm draws no more often
    progress.advance(4, status="loss 1.5", line="a line of the log")
    assert "6/8" in screen.getvalue() and "loss 1.5" in screen.getvalue()
    progress.skip(1)
    assert "6/7" in screen.getvalue()
    progress.close()
    *_, last, cursor = screen.getvalue().split("\r")
    assert not last.strip() and not cursor  # the bar is gone
    assert "a line" not in screen.getvalue() and "\n" not in screen.getvalue()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_is_silent_on_other_ranks(screen, clock, is_terminal):
    screen, progress = screen(rank=1, is_terminal=is_terminal), Progress("teacher", 8, "image")
    clock.now += 2 * Progress.LINE_SECONDS
    progress.advance(4, status="loss 1.5")
    progress.skip(1)
    progress.advance(1, line="a line of the log")
    progress.close()
    assert screen.getvalue() == ""


# -- log ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(caplog):
    """Capture log lines, even after a run in this process has reconfigured the logger."""
    level = utils.logger.level
    utils.logger.addHandler(caplog.handler)
    utils.logger.setLevel(logging.INFO)
    yield lambda: list(dict.fromkeys(record.getMessage() for record in caplog.records))
    utils.logger.removeHandler(caplog.handler)
    utils.logger.setLevel(level)


class Recorder:
    """A TensorBoard writer's one method."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))


def step_values(step):
    return {"loss": torch.tensor(float(step), requires_grad=True), "lr": 0.5 * step, "loss_base": torch.tensor(2.0)}


@pytest.mark.parametrize("interval", [1, 3, 4, 100])
def test_the_step_log_gives_means_over_all_steps(interval):
    log = StepLog(epoch=0, num_steps=10, batch_images=8, interval=interval)
    for step in range(10):
        log.update(step_values(step))
    means = log.close()
    assert means.pop("images_per_second") > 0
    assert means == pytest.approx({"loss": 4.5, "lr": 2.25, "loss_base": 2.0})


def test_the_step_log_speaks_at_its_interval_and_at_the_end(lines):
    log = StepLog(epoch=7, num_steps=10, batch_images=8, interval=4)
    for step in range(10):
        log.update(step_values(step))
    log.close()
    assert [line.split("  ")[:3] for line in lines()] == [
        ["epoch 7", "step 4/10", "loss 3.0000"],
        ["epoch 7", "step 8/10", "loss 7.0000"],
        ["epoch 7", "step 10/10", "loss 9.0000"],
    ]


def test_every_step_reaches_tensorboard_under_its_global_number():
    writer = Recorder()
    log = StepLog(epoch=20, num_steps=5, batch_images=8, interval=2, writer=writer)
    for step in range(5):
        log.update(step_values(step))
    losses = [(value, step) for name, value, step in writer.scalars if name == "step/loss"]
    assert losses == [(float(step), 100 + step) for step in range(5)]
    assert {name for name, _, _ in writer.scalars} == {"step/loss", "step/lr", "step/loss_base"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_loss_ends_the_run_at_the_next_report(bad):
    log = StepLog(epoch=1, num_steps=100, batch_images=8, interval=4)
    for step in range(4):
        log.update(step_values(step))
    values = [step_values(4), step_values(5) | {"loss": torch.tensor(bad)}, step_values(6), step_values(7)]
    for step in range(3):
        log.update(values[step])  # nobody has waited for the device yet
    with pytest.raises(RunError, match="not finite in epoch 1 at step 5 .*--max-skipped-steps"):
        log.update(values[3])


def test_a_non_finite_loss_in_the_last_step_is_not_missed():
    log = StepLog(epoch=0, num_steps=2, batch_images=8, interval=50)
    log.update(step_values(0))
    with pytest.raises(RunError):
        log.update(step_values(1) | {"loss": torch.tensor(float("nan"))})


def test_the_step_log_keeps_no_graph_alive():
    log = StepLog(epoch=0, num_steps=10, batch_images=8, interval=10)
    log.update(step_values(1))
    assert not any(isinstance(value, torch.Tensor) and value.requires_grad for value in log.pending[0].values())


class Device:
    """Simulates a GPU: a table arrives on the host when the device is done or is waited for."""

    def __init__(self):
        self.tables, self.waits = [], 0  # of the tables not yet there, the blank ones and what is to be in them

    def to_host(self, table):
        blank = torch.full_like(table, -1.0)
        self.tables.append((blank, table))
        return blank, DeviceEvent(self, blank)

    def catch_up(self):
        for blank, table in self.tables:
            blank.copy_(table)
        self.tables.clear()


class DeviceEvent:
    def __init__(self, device, blank):
        self.device, self.blank = device, blank

    def query(self):
        return all(blank is not self.blank for blank, _ in self.device.tables)

    def synchronize(self):
        if not self.query():
            self.device.waits += 1
            self.device.catch_up()


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(utils, "_to_host", device.to_host)
    return device


def test_device_values_are_logged_one_interval_later_without_a_sync(device, lines):
    log = StepLog(epoch=7, num_steps=10, batch_images=8, interval=4, writer=Recorder())
    for step in range(9):
        log.update(step_values(step))
        if step == 5:
            device.catch_up()
    assert [line.split("  ")[1] for line in lines()] == ["step 4/10"] and device.waits == 0
    log.update(step_values(9))  # the last step waits for all
    assert [line.split("  ")[1:3] for line in lines()] == [
        ["step 4/10", "loss 3.0000"],
        ["step 8/10", "loss 7.0000"],
        ["step 10/10", "loss 9.0000"],
    ]
    assert [entry for entry in log.writer.scalars if entry[0] == "step/lr"] == [
        ("step/lr", 0.5 * step, 70 + step) for step in range(10)
    ]
    means = log.close()
    assert means.pop("images_per_second") > 0 and means == pytest.approx({"loss": 4.5, "lr": 2.25, "loss_base": 2.0})


def test_a_report_waits_for_all_that_is_on_its_way(device):
    log = StepLog(epoch=0, num_steps=10, batch_images=8, interval=2)
    for step in range(5):
        log.update(step_values(step))
    assert log.totals["steps"] == 2
    log.report()
    assert log.totals["steps"] == 5 and log.totals["loss"] == 10 and log.totals["lr"] == 5
    log.report()  # and then there is nothing to say
    assert log.totals["steps"] == 5


def test_a_device_s_non_finite_loss_ends_the_run_an_interval_later(device):
    log = StepLog(epoch=1, num_steps=100, batch_images=8, interval=4)
    for step in range(7):
        log.update(step_values(step) | ({"loss": torch.tensor(float("nan"))} if step == 2 else {}))
    with pytest.raises(RunError, match="not finite in epoch 1 at step 2 "):
        log.update(step_values(7))


def test_the_rate_is_that_of_the_steps_the_device_has_done(device, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(utils, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    log = StepLog(epoch=0, num_steps=12, batch_images=10, interval=4)
    for step in range(12):
        now[0] += 1  # it takes the host a second to begin a step
        if step == 5:
            device.catch_up()  # with the first 4 steps, after 6 s; that is said after 8 s
        if step == 11:
            device.catch_up = lambda catch_up=device.catch_up: (catch_up(), now.append(now.pop() + 6))
        log.update(step_values(step))
        assert step != 7 or log.images_per_second == pytest.approx(40 / 6)
    assert log.close()["images_per_second"] == 120 / 24  # 12 s, and two waits of 6 s


@pytest.mark.parametrize("first", [1, 6, 10])
def test_the_rate_of_a_resumed_epoch_is_that_of_the_whole_epoch(monkeypatch, first):
    """10 steps of 8 images, 1 s each before it was stopped and 3 s each after; the last may be stopped after all."""
    now = [0.0]
    monkeypatch.setattr(utils, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    log = StepLog(epoch=0, num_steps=10, batch_images=8, interval=1)
    for step in range(first):
        now[0] += 1
        log.update(step_values(step))
    now[0] += 1000
    log = StepLog(epoch=0, num_steps=10, batch_images=8, interval=1, first_step=first, totals=log.totals)
    for step in range(first, 10):
        now[0] += 3
        log.update(step_values(step))
    assert log.close()["images_per_second"] == pytest.approx(80 / (first + 3 * (10 - first)))


def test_a_resumed_epoch_may_have_skipped_more_than_is_tolerated_now():
    log = StepLog(epoch=0, num_steps=10, batch_images=8, interval=1, first_step=4, totals={"steps": 1, "skipped": 3})
    log.update(step_values(4))
    with pytest.raises(RunError, match="not finite in epoch 0 at step 5 "):
        log.update(step_values(5) | {"loss": torch.tensor(float("nan"))})


def test_the_time_left_is_said_after_half_an_epoch(lines, monkeypatch):
    record = {"epoch": 3, "train_loss": 1.0, "train_lr": 0.1, "images_per_second": 5.0}
    for done in (4.0, 3.4):  # resumed before the evaluation of epoch 3, and 0.6 of an epoch earlier
        now = iter([100.0, 103.0])
        monkeypatch.setattr(utils, "time", types.SimpleNamespace(perf_counter=lambda now=now: next(now)))
        utils.EpochTable(300, done, []).add(record, -1.0)
    # 3 s for 0.6 of an epoch, 296 epochs to go
    assert [line.split()[-1] for line in lines() if "/300" in line] == ["-", "0:24:40"]


def test_an_epoch_whose_updates_were_all_skipped_ends_the_run():
    log = StepLog(epoch=2, num_steps=2, batch_images=8, interval=1, max_skipped=9)
    for step in range(2):
        log.update(step_values(step) | {"loss": torch.tensor(float("nan"))})
    with pytest.raises(RunError, match="no loss of epoch 2 is finite"):
        log.close()


def test_an_epoch_without_steps_has_no_means():
    assert set(StepLog(epoch=0, num_steps=0, batch_images=8, interval=1).close()) == {"images_per_second"}


@pytest.mark.parametrize("interval", [1, 2, 4, 5])
def test_skipped_updates_of_several_steps_are_counted_once(interval):
    log = StepLog(epoch=0, num_steps=9, batch_images=8, interval=interval, max_skipped=2)
    for step, loss in enumerate([1.0, 1.0, 1.0, math.inf, math.nan, math.nan, 1.0, math.nan, 4.0]):
        log.update({"loss": torch.tensor(loss), "lr": 0.1}, step // 3)
    stats = log.close()
    assert stats["skipped_steps"] == 2  # the second and the third
    assert stats["loss"] == pytest.approx(8 / 5)


def test_the_log_file_has_one_json_object_per_line(tmp_path):
    records = [{"epoch": epoch, "train_loss": 0.1 * epoch} for epoch in range(3)]
    for record in records:
        append_log(tmp_path, record)
    assert [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()] == records


def test_only_rank_0_talks(monkeypatch, capsys):
    # a logger of its own, so that the other tests keep theirs
    monkeypatch.setattr(utils, "logger", logging.getLogger("deit.test"))
    for rank in (0, 1):
        utils.set_up_logging(World(rank, 2, rank, 2, torch.device("cpu")))
        utils.logger.info("hello from %d", rank)
        utils.logger.error("trouble on %d", rank)
    said = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert said == ["hello from 0", "trouble on 0", "trouble on 1"]


def test_the_last_line_is_the_message_without_the_worker_s_traceback():
    worker_says = (
        "Caught RunError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "worker.py", line 1, in fetch\nutils.RunError: cannot read image a.jpg; fix or remove it\n'
    )
    assert last_line(RunError(worker_says)) == "cannot read image a.jpg; fix or remove it"
    assert last_line(RunError("the loss is not finite")) == "the loss is not finite"


@pytest.mark.parametrize(
    "error, lost",
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), True),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),  # while it handed a batch over
        (EOFError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (FileNotFoundError(2, "No such file or directory"), False),
    ],
)
def test_a_killed_data_loader_worker_is_recognized(error, lost):
    assert utils.is_lost_loader(error) == lost


@pytest.mark.parametrize(
    "error, full",
    [
        (RuntimeError("unable to write to file </torch_7_1_0>: No space left on device (28)"), True),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
                "workers are out of shared memory. Please try to raise your shared memory limit."
            ),
            True,
        ),
        (OSError(errno.ENOSPC, "No space left on device"), True),  # a semaphore
        (OSError(errno.ENOSPC, "No space left on device", "log.txt"), False),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), False),
    ],
)
def test_a_full_shared_memory_is_recognized(error, full):
    assert utils.is_full_memory(error) == full


def test_a_full_gpu_is_said_with_its_remedies():
    said = utils.known_cause(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert said.startswith("the memory of the GPU is full (CUDA out of memory.") and "--accum-steps" in said


def test_tensorboard_on_a_full_disk_is_an_error_without_a_traceback(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            utils.TensorBoard(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()
    assert capfd.readouterr().err == ""


def test_an_error_without_a_message_has_a_last_line_all_the_same():
    assert last_line(AssertionError()) == "AssertionError"
    assert last_line(types.new_class("Silent", (RuntimeError,))("  \n ")) == "Silent"


def test_a_resumed_run_drops_the_log_lines_of_epochs_it_will_repeat(tmp_path):
    for epoch in range(4):
        utils.append_log(tmp_path, {"epoch": epoch})
    utils.open_log(tmp_path, 2)
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [0, 1]
    utils.open_log(tmp_path, 0)
    assert (tmp_path / "log.txt").read_text() == ""


@pytest.mark.parametrize("earlier", [None, "Tree"])
def test_deterministic_kernels_exclude_sums_in_switches(earlier, monkeypatch):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for name in ("NCCL_ALGO", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    if earlier:
        monkeypatch.setenv("NCCL_ALGO", earlier)
    utils.set_up_kernels(deterministic=True)
    assert os.environ["NCCL_ALGO"] == (earlier or "^NVLS,NVLSTree,CollNetDirect,CollNetChain")


def test_compiling_is_deterministic_only_if_torch_can_do_that(tmp_path, monkeypatch, capsys):
    assert not utils.varies_if_compiled()  # kernels need not be deterministic
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for config, varies in ((types.SimpleNamespace(deterministic=True), False), (types.SimpleNamespace(), True)):
        with monkeypatch.context() as patch:
            patch.setattr(torch._inductor, "config", config)
            assert utils.varies_if_compiled() == varies
    monkeypatch.setattr(utils, "set_up_kernels", lambda deterministic: None)
    monkeypatch.setattr(utils, "varies_if_compiled", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)
    for flags, warns in (([], False), (["--compile"], True)):
        main.cli([*tiny.TINY, "--deterministic", "--dry-run", "--output-dir", str(tmp_path), *flags])
        assert (f"--compile --deterministic: {utils.VARIES}" in capsys.readouterr().err) == warns
