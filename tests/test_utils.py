"""Checkpoint files that survive accidents and never run code; devices, launchers, and the step log."""

import argparse
import errno
import functools
import hashlib
import http.server
import json
import logging
import os
import pickle
import resource
import threading
import types
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import checkpoints
import utils
from checkpoints import read_checkpoint, save_checkpoint
from utils import RunError, StepLog, UserError, World, append_log, init_distributed, last_line, select_device

# -- writing checkpoints -----------------------------------------------------------------------------------------------


def checkpoint_of(epoch, size=10):
    return {
        "model": {"weight": torch.full((size,), float(epoch))},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "model_ema": None,
        "epoch": epoch,
        "best_acc1": 12.5,
        "args": {"model": "deit_tiny_patch16_224", "lr_noise": None, "opt_betas": [0.9, 0.99]},
    }


def epoch_in(path):
    return torch.load(path, weights_only=True)["epoch"]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_read_back_without_trusting_it(tmp_path):
    save_checkpoint(checkpoint_of(3), tmp_path, is_best=False)
    read = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert torch.equal(read["model"].pop("weight"), torch.full((10,), 3.0))
    assert read == checkpoint_of(3) | {"model": {}}
    assert read_checkpoint(str(tmp_path / "checkpoint.pth"), "--resume")["args"] == checkpoint_of(3)["args"]


def test_the_checkpoint_before_and_the_best_are_kept(tmp_path):
    save_checkpoint(checkpoint_of(0), tmp_path, is_best=True)
    assert names_in(tmp_path) == ["best.pth", "checkpoint.pth"]
    save_checkpoint(checkpoint_of(1), tmp_path, is_best=True)
    save_checkpoint(checkpoint_of(2), tmp_path, is_best=False)
    save_checkpoint(checkpoint_of(3), tmp_path, is_best=False)
    assert names_in(tmp_path) == ["best.pth", "checkpoint.pth", "checkpoint_previous.pth"]
    assert epoch_in(tmp_path / "checkpoint.pth") == 3
    assert epoch_in(tmp_path / "checkpoint_previous.pth") == 2
    assert epoch_in(tmp_path / "best.pth") == 1


def test_files_are_kept_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    save_checkpoint(checkpoint_of(0), tmp_path, is_best=True)
    save_checkpoint(checkpoint_of(1), tmp_path, is_best=False)
    assert names_in(tmp_path) == ["best.pth", "checkpoint.pth", "checkpoint_previous.pth"]
    assert [epoch_in(tmp_path / name) for name in names_in(tmp_path)] == [0, 1, 0]


def dying(error):
    def save(_, stream):
        stream.write(b"half of a checkp")
        raise error

    return save


@pytest.mark.parametrize(
    "error, expected",
    [
        (OSError(errno.ENOSPC, "No space left on device"), RunError),
        (RuntimeError("[enforce fail at inline_container.cc:664] unexpected pos\nframe #0: ..."), RunError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_save_that_dies_leaves_every_earlier_file_whole(tmp_path, monkeypatch, error, expected):
    for epoch in range(3):
        save_checkpoint(checkpoint_of(epoch), tmp_path, is_best=epoch == 0)
    before = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", dying(error))
        with pytest.raises(expected):
            save_checkpoint(checkpoint_of(3), tmp_path, is_best=True)
    assert {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)} == before
    # ... and the run that goes on from there leaves nothing behind either
    save_checkpoint(checkpoint_of(3), tmp_path, is_best=True)
    assert names_in(tmp_path) == sorted(before)
    assert [epoch_in(tmp_path / name) for name in names_in(tmp_path)] == [3, 3, 2]


def test_a_file_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    # or a power cut could leave an empty file under the good name
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    save_checkpoint(checkpoint_of(0), tmp_path, is_best=False)
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder that holds the name


def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path):
    save_checkpoint(checkpoint_of(0), tmp_path, is_best=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a real write that really fails
    try:
        with pytest.raises(RunError) as caught:
            save_checkpoint(checkpoint_of(1, size=100_000), tmp_path, is_best=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert names_in(tmp_path) == ["checkpoint.pth"] and epoch_in(tmp_path / "checkpoint.pth") == 0


def test_a_missing_folder_is_a_fault_of_the_run(tmp_path):
    with pytest.raises(RunError, match="cannot write a checkpoint"):
        save_checkpoint(checkpoint_of(0), tmp_path / "gone", is_best=False)


def test_a_kill_between_link_and_rename_does_not_cost_the_checkpoint(tmp_path, monkeypatch):
    # What such a kill leaves is a second name of checkpoint.pth. In a container the next process often has the same
    # number, and so the same temporary name: it must not write through it.
    save_checkpoint(checkpoint_of(0), tmp_path, is_best=False)
    os.link(tmp_path / "checkpoint.pth", tmp_path / f".checkpoint_previous.pth.{os.getpid()}.tmp")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", dying(RuntimeError("killed again")))
        with pytest.raises(RunError):
            save_checkpoint(checkpoint_of(1), tmp_path, is_best=False)
    assert epoch_in(tmp_path / "checkpoint.pth") == 0
    save_checkpoint(checkpoint_of(1), tmp_path, is_best=False)
    assert names_in(tmp_path) == ["checkpoint.pth", "checkpoint_previous.pth"]
    assert [epoch_in(tmp_path / name) for name in names_in(tmp_path)] == [1, 0]


def test_a_kill_between_keeping_and_replacing_leaves_no_stray_name(tmp_path):
    # then both names are one file, and renaming a third name of it onto one of them would do nothing
    save_checkpoint(checkpoint_of(0), tmp_path, is_best=False)
    os.link(tmp_path / "checkpoint.pth", tmp_path / "checkpoint_previous.pth")
    for epoch in (1, 2):
        save_checkpoint(checkpoint_of(epoch), tmp_path, is_best=False)
        assert names_in(tmp_path) == ["checkpoint.pth", "checkpoint_previous.pth"]
        assert [epoch_in(tmp_path / name) for name in names_in(tmp_path)] == [epoch, epoch - 1]


# -- reading checkpoints -----------------------------------------------------------------------------------------------


class Malicious:
    """Unpickling one of these creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("write", ["pickle", "torch", "torch, legacy"])
@pytest.mark.parametrize("name", ["checkpoint.pth", "model.safetensors", "model.pkl"])
def test_a_malicious_file_is_refused_and_never_executed(tmp_path, name, write):
    path, marker = tmp_path / name, tmp_path / "marker"
    content = {"model": {"weight": torch.zeros(1)}, "args": Malicious(marker)}
    if write == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=write == "torch")
    with pytest.raises(UserError, match="--finetune .*never run"):
        read_checkpoint(str(path), "--finetune")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Malicious(marker)))
    assert marker.exists(), "this file would have been dangerous"


def test_a_truncated_file_is_refused(tmp_path):
    save_checkpoint(checkpoint_of(0), tmp_path, is_best=False)
    path = tmp_path / "checkpoint.pth"
    for share in (0.9, 0.5, 0):
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        with pytest.raises(UserError, match="--resume .*truncated"):
            read_checkpoint(str(path), "--resume")


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(UserError, match=f"--teacher-path {path}: no such file"):
            read_checkpoint(str(path), "--teacher-path")


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="holds a Tensor"):
        read_checkpoint(str(tmp_path / "tensor.pth"), "--resume")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        read_checkpoint(str(tmp_path / "text.pth"), "--resume")


def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(UserError, match="plain tensors"):
        read_checkpoint(str(tmp_path / "model.pth"), "--finetune")


def test_a_safetensors_file_is_read(tmp_path):
    weights = {"head.weight": torch.randn(2, 3), "head.bias": torch.randn(2)}
    save_file(weights, tmp_path / "model.safetensors")
    read = read_checkpoint(str(tmp_path / "model.safetensors"), "--finetune")
    assert set(read) == {"model"} and all(torch.equal(read["model"][name], weights[name]) for name in weights)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def address(tmp_path, monkeypatch):
    """The https address of a web server for the files in tmp_path / "web" (without the encryption)."""
    (tmp_path / "web").mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    handler = functools.partial(_Quiet, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def unencrypted(request):
            request.full_url = request.full_url.replace("https://", "http://")
            return urllib.request.urlopen(request)

        monkeypatch.setattr(torch.hub, "urlopen", unencrypted)
        yield f"https://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def hash_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_of_one_name_at_two_addresses_are_two_files(tmp_path, address):
    addresses = []
    for run in (1, 2):
        (tmp_path / "web" / f"run{run}").mkdir()
        save_checkpoint(checkpoint_of(run), tmp_path / "web" / f"run{run}", is_best=True)
        published = hash_of(tmp_path / "web" / f"run{run}" / "best.pth")
        addresses.append(f"{address}/run{run}/best.pth#sha256={published}")
    assert [read_checkpoint(each, "--finetune")["epoch"] for each in addresses] == [1, 2]


def test_a_hash_in_the_file_s_name_is_taken_at_its_word(tmp_path, address):
    save_checkpoint(checkpoint_of(5), tmp_path, is_best=False)
    content = (tmp_path / "checkpoint.pth").read_bytes()
    good, bad = f"deit-{hash_of(tmp_path / 'checkpoint.pth')[:8]}.pth", "deit-0a1b2c3d.pth"
    for name in (good, bad):
        (tmp_path / "web" / name).write_bytes(content)
    assert read_checkpoint(f"{address}/{good}", "--finetune")["epoch"] == 5
    with pytest.raises(UserError, match="--finetune .*invalid hash value"):
        read_checkpoint(f"{address}/{bad}", "--finetune")
    with pytest.raises(UserError, match="invalid hash value"):  # and nothing is left to be believed the next time
        read_checkpoint(f"{address}/{bad}", "--finetune")


@pytest.mark.parametrize(
    "change",
    [("https", "http"), ("#sha256=", "#md5="), ("#sha256=1234567890", ""), ("https", "ftp"), ("https", "file")],
)
def test_a_download_without_encryption_or_hash_is_refused(change, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("it was downloaded"))
    with pytest.raises(UserError, match="--resume .*: a download needs https and its SHA-256"):
        read_checkpoint("https://example.org/best.pth#sha256=1234567890".replace(*change), "--resume")


def test_a_malicious_download_is_never_executed(tmp_path, address):
    path = tmp_path / "web" / "best.pth"
    torch.save({"model": Malicious(tmp_path / "marker")}, path)
    with pytest.raises(UserError, match="--finetune .*never run"):
        read_checkpoint(f"{address}/best.pth#sha256={hash_of(path)}", "--finetune")
    assert not (tmp_path / "marker").exists()


def test_an_address_without_a_file_is_refused(address):
    with pytest.raises(UserError, match="--finetune .*cannot be downloaded"):
        read_checkpoint(f"{address}/nothing-0a1b2c3d.pth", "--finetune")


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
    """What this process would learn of the run from an environment with these variables."""

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
    assert world == World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    assert world.is_main and not utils.is_distributed()
    total = torch.tensor([2.0])
    assert utils.all_reduce_sum(total) is total and float(total) == 2.0
    with utils.main_process_first():
        utils.barrier()
    utils.shut_down_distributed()


# -- log ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(caplog):
    """Log lines, also after a run in this process has taken the logger for itself."""
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
    with pytest.raises(RunError, match="not finite in epoch 1 at step 5 .*checkpoint is intact"):
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
    """Stands in for a GPU: a table is blank on the host until the device has come to its end, or was waited for."""

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


def test_what_a_device_reports_is_said_an_interval_later_without_waiting_for_it(device, lines):
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


def test_an_epoch_without_steps_has_no_means():
    assert set(StepLog(epoch=0, num_steps=0, batch_images=8, interval=1).close()) == {"images_per_second"}


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
        '  File "worker.py", line 1, in fetch\nutils.RunError: cannot read image a.jpg; mend or remove it\n'
    )
    assert last_line(RunError(worker_says)) == "cannot read image a.jpg; mend or remove it"
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
def test_a_killed_loader_process_is_recognised(error, lost):
    assert utils.is_lost_loader(error) == lost


def test_an_error_without_a_message_has_a_last_line_all_the_same():
    assert last_line(AssertionError()) == "AssertionError"
    assert last_line(types.new_class("Silent", (RuntimeError,))("  \n ")) == "Silent"


def test_a_checkpoint_of_the_original_code_with_its_flags_in_a_namespace_is_read(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, "args": argparse.Namespace(model="x")}, tmp_path / "original.pth")
    checkpoint = checkpoints.read_checkpoint(str(tmp_path / "original.pth"), "--finetune")
    assert torch.equal(checkpoint["model"]["w"], torch.ones(2))


def test_a_resumed_run_drops_the_log_lines_of_epochs_it_will_repeat(tmp_path):
    for epoch in range(4):
        utils.append_log(tmp_path, {"epoch": epoch})
    utils.open_log(tmp_path, 2)
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [0, 1]
    utils.open_log(tmp_path, 0)
    assert (tmp_path / "log.txt").read_text() == ""
