"""Nothing is lost: runs that are stopped, killed or damaged resume exactly, or say what differs."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import time
import types
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_datasets import write_stream

import checkpoints
import datasets
import engine
import loaders
import main
import samplers
import sources
import teachers
import utils
from tools import chaos

pytestmark = pytest.mark.slow

# Mixup, dropout, stochastic depth, EMA: an epoch of 11 updates of 32 images
FLAGS = [*tiny.TINY, "--epochs", "3", "--drop", "0.1", "--model-ema-decay", "0.9", "--amp", "off"]
FLAGS += ["--train-fraction", "0.25", "--batch-size", "32"]
UPDATES, BATCH = 11, 32
WARNING = "the run continues but is no longer bitwise identical: "


def run(folder, *flags, status=None):
    """Run main.py in this process; check its exit status if `status` is given."""
    command = [*FLAGS, "--output-dir", str(folder), *map(str, flags)]
    if status is None:
        return main.cli(command)
    with pytest.raises(SystemExit) as end:
        main.cli(command)
    assert end.value.code == status


@contextlib.contextmanager
def at_update(number, do):
    """Call `do(state)` in the step that makes this update, while the run continues (if it does)."""
    step = engine.TrainState.step

    def watched(state, loss):
        if state.num_updates == number:
            do(state)
        return step(state, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.TrainState, "step", watched)
        yield


def send(number):
    return lambda state: os.kill(os.getpid(), number)


class Killed(Exception):
    """Simulates SIGKILL, which a process cannot handle."""


def kill(state):
    raise Killed


def checkpoint(folder, name="checkpoint.pth"):
    return torch.load(folder / name, weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


# -- killed ------------------------------------------------------------------------------------------------------------


# Of two processes one is killed at a time, and torchrun starts both again. (The tool also kills all at once.)
@pytest.mark.process
@pytest.mark.parametrize("flags", [["--processes", "1"], ["--processes", "2", "--restarts"]], ids=["one", "torchrun"])
def test_a_run_killed_at_random_moments_ends_bitwise_identical(flags, capfd):
    chaos.main(["--kills", "2", "--epochs", "6", *flags, "--", "--train-fraction", "0.5"])
    output = capfd.readouterr().out
    assert "2 kills, " in output and "no difference" in output and "half written" in output


@pytest.mark.process
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_same_on_a_gpu(capfd):
    chaos.main(["--kills", "3", "--epochs", "8", "--", "--device", "cuda", "--deterministic", "--amp", "bf16"])
    assert "no difference" in capfd.readouterr().out


def test_every_difference_is_seen(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "other")
    assert chaos.compare(whole, tmp_path / "other") == []
    changed = checkpoint(whole)
    changed["optimizer"]["state"][3]["exp_avg"].view(-1)[7] += 1e-9
    changed["best_acc1"] += 1
    torch.save(changed, tmp_path / "other" / "checkpoint.pth")
    with open(tmp_path / "other" / "log.txt", "a") as log:
        log.write((whole / "log.txt").read_text().splitlines()[-1] + "\n")
    (tmp_path / "other" / ".best.pth.7.tmp").touch()
    found = chaos.compare(whole, tmp_path / "other")
    assert [name.rpartition("/")[2] for name in found] == [
        "checkpoint.pth.optimizer.state.3.exp_avg",
        "checkpoint.pth.best_acc1",
        "log.txt",
        ".best.pth.7.tmp",
    ]


@pytest.mark.parametrize(
    "flags",
    [[], ["--accum-steps", "2", "--batch-size", "16"], ["--augment", "device"]],
    ids=["plain", "accumulating", "augmented on the device"],
)
def test_a_run_is_resumed_after_any_update(flags, tmp_path):
    # two epochs of two updates, saved after each and killed in the next: in an epoch, right after it, in the last one
    short = ["--train-fraction", "0.05", "--epochs", "2", *flags]
    run(tmp_path / "whole", *short)
    total = checkpoint(tmp_path / "whole")["step"]
    assert total == 4
    for number in range(1, total):
        with at_update(number, kill), pytest.raises(Killed):
            run(tmp_path / "killed", *short, "--resume", "auto", "--checkpoint-minutes", "0")
        assert checkpoint(tmp_path / "killed")["step"] == number
    run(tmp_path / "killed", *short, "--resume", "auto")
    assert chaos.compare(tmp_path / "whole", tmp_path / "killed") == []


def test_skipped_images_are_not_read(tmp_path, monkeypatch):
    read, get = [], sources.Source.__getitem__
    monkeypatch.setattr(
        sources.Source, "__getitem__", lambda self, position: (read.append(position), get(self, position))[1]
    )
    with at_update(UPDATES + 7, send(signal.SIGTERM)):
        run(tmp_path, "--eval-interval", "9", status=75)
    read.clear()
    run(tmp_path, "--epochs", "2", "--resume", "auto")
    assert len(read) == (UPDATES - 8) * BATCH + 2 * 355  # the rest of the epoch, and two evaluations


@pytest.mark.parametrize("where", ["within an epoch", "between two epochs"])
def test_tensorboard_of_a_resumed_run_is_that_of_the_whole(where, whole, tmp_path):
    at = {"within an epoch": 2 * UPDATES - 2, "between two epochs": 2 * UPDATES}[where]
    with at_update(at, kill), pytest.raises(Killed):
        run(tmp_path, "--log-interval", "1")  # writes steps that no checkpoint has
    run(tmp_path, "--resume", "auto")
    logs = []
    for folder in (whole, tmp_path):
        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        names = [name for name in events.Tags()["scalars"] if not name.endswith("images_per_second")]
        logs.append({name: [(event.step, event.value) for event in events.Scalars(name)] for name in names})
    assert logs[0] == logs[1]
    steps = {"step": list(range(3 * UPDATES)), "epoch": [UPDATES, 2 * UPDATES, 3 * UPDATES]}
    for name, points in logs[0].items():
        assert [step for step, _ in points] == steps[name.partition("/")[0]], name
    assert [record["epoch"] for record in tiny.log_of(tmp_path)] == [0, 1, 2]


def test_curves_keep_earlier_epochs_if_the_batch_size_changes(stopped):
    (stopped / "tensorboard" / "wandb_id").write_text("earlier")
    run(stopped, "--resume", "auto", "--batch-size", "64", "--log-interval", "1")
    events = EventAccumulator(str(stopped / "tensorboard"))
    events.Reload()
    epochs = [event.value for event in events.Scalars("epoch/test_acc1")]
    assert epochs[0] == pytest.approx(tiny.log_of(stopped)[0]["test_acc1"], rel=1e-6)
    assert not (stopped / "tensorboard" / "wandb_id").exists()


def test_another_run_in_the_same_folder_has_its_own_curves(stopped):
    (stopped / "tensorboard" / "wandb_id").write_text("earlier")
    run(stopped, "--overwrite", "--epochs", "1")
    events = EventAccumulator(str(stopped / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("epoch/test_acc1")] == [UPDATES]
    (flags,) = events.Tensors("flags/text_summary")
    assert "| epochs | 1 |" in flags.tensor_proto.string_val[0].decode()
    assert not (stopped / "tensorboard" / "wandb_id").exists()


def test_tensorboard_files_of_another_program_are_kept(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out").write_text("mine")
    checkpoints.start_folder(tmp_path, "", 0, -1.0)
    assert (tmp_path / "tensorboard" / "events.out").read_text() == "mine"


def test_resuming_an_older_checkpoint_does_not_drop_later_epochs(stopped, capsys):
    older = stopped / "checkpoint_previous.pth"
    files = {path: path.read_bytes() for path in stopped.glob("*.*")}
    assert checkpoint(stopped)["step"] > checkpoint(stopped, older.name)["step"]
    run(stopped, "--resume", older, status=2)
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"--resume {older}: is older than {stopped / 'checkpoint.pth'}" in said and "--overwrite" in said
    assert {path: path.read_bytes() for path in stopped.glob("*.*")} == files
    checkpoints.check_folder(stopped, str(stopped / "checkpoint.pth"), overwrite=False)
    checkpoints.check_folder(stopped, str(older), overwrite=True)
    (stopped / "checkpoint.pth").unlink()
    checkpoints.check_folder(stopped, str(older), overwrite=False)


@pytest.mark.parametrize(("interval", "ends"), [(1, 13), (2, 14), (10, 20), (3, 12)])
def test_an_early_end_waits_for_evaluated_epochs(interval, ends):
    """With the best accuracy after 10 epochs, 3 epochs later is early enough only if one of them was evaluated."""
    options = engine.RunOptions(epochs=100, eval_interval=interval, early_stop=3)
    best = 10 // interval * interval - 1
    states = (types.SimpleNamespace(epoch=done, best_epoch=best, totals=[]) for done in range(10, 100))
    assert next(state.epoch for state in states if engine._is_early_end(state, options)) == ends


def test_an_early_end_is_kept_when_resumed(tmp_path, monkeypatch, capsys):
    accuracies = iter([50.0, 40.0, 45.0, 60.0, 70.0])
    monkeypatch.setattr(engine, "_test", lambda *_: {"test_acc1": next(accuracies)})
    short = ["--train-fraction", "0.1", "--epochs", "9", "--early-stop", "2", "--batch-size", "32"]
    run(tmp_path, *short)
    saved = checkpoint(tmp_path)
    assert (saved["epoch"], saved["best_epoch"], saved["best_acc1"]) == (3, 0, 50)
    assert "no better top-1 in 2 epochs (--early-stop)" in capsys.readouterr().err
    run(tmp_path, *short, "--resume", "auto")
    assert len(tiny.log_of(tmp_path)) == 3
    run(tmp_path, *short, "--resume", "auto", "--early-stop", "3", "--epochs", "5")
    assert [record["test_acc1"] for record in tiny.log_of(tmp_path)] == [50, 40, 45, 60, 70]


# -- stopped by a signal -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, workers", [("SIGTERM", 0), ("SIGTERM", 1), ("SIGINT", 1), ("SIGUSR1", 1), ("SIGUSR2", 0), ("SIGHUP", 1)]
)
def test_a_signal_ends_the_step_saves_and_says_so(name, workers, whole, tmp_path, capsys):
    earlier = signal.getsignal(signal.SIGTERM)
    number = UPDATES + 5 if name == "SIGTERM" else 2
    epoch, step = divmod(number + 1, UPDATES)
    with at_update(number, send(getattr(signal, name))):
        run(tmp_path, "--num-workers", workers, status=75)
    saved = checkpoint(tmp_path)
    assert (saved["epoch"], saved["step"], saved["progress"]["images"]) == (epoch, number + 1, step * BATCH)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"main.py: stopped by {name}; epoch {epoch}, step {step} is saved; resume with --resume auto"
    assert signal.getsignal(signal.SIGTERM) == earlier
    if name == "SIGTERM":  # all signals save the same
        run(tmp_path, "--num-workers", workers, "--resume", "auto")
        assert chaos.compare(whole, tmp_path) == []


def test_an_evaluation_that_is_cut_short_is_made_again(whole, tmp_path, monkeypatch):
    evaluate = engine.evaluate

    def interrupted(model, loader, *rest):
        seen = []

        def watch():
            for batch in loader:
                if not seen:
                    os.kill(os.getpid(), signal.SIGTERM)
                seen.append(batch)
                yield batch

        result = evaluate(model, watch(), *rest)
        assert len(seen) == 1  # of twelve
        return result

    with monkeypatch.context() as patch:
        patch.setattr(engine, "evaluate", interrupted)
        patch.setattr(engine, "modules_of", lambda state: {"test_": state.module})
        run(tmp_path, status=75)
    saved = checkpoint(tmp_path)
    assert (saved["epoch"], saved["step"], saved["progress"]["images"]) == (0, UPDATES, UPDATES * BATCH)
    assert tiny.log_of(tmp_path) == []
    run(tmp_path, "--resume", "auto")
    assert chaos.compare(whole, tmp_path) == []


def test_without_an_output_folder_a_signal_ends_the_run_all_the_same(capsys):
    with at_update(3, send(signal.SIGUSR1)):
        run("", status=75)
    assert "stopped by SIGUSR1; nothing is saved without --output-dir" in capsys.readouterr().err


def handles(process, number):
    """Whether a process has a handler for a signal."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.process
@pytest.mark.parametrize("name, later", [("SIGTERM", 0), ("SIGINT", 0), ("SIGHUP", 3)])
def test_a_signal_while_a_run_starts_ends_it_with_status_75(name, later, tmp_path):
    process = tiny.Process(["main.py", *FLAGS, "--output-dir", tmp_path / "run"], cold=True)
    wait_for(lambda: handles(process, signal.SIGUSR1))
    time.sleep(later)
    process.send_signal(getattr(signal, name))
    output = process.output()
    assert process.returncode == 75 and "Traceback" not in output, output


@pytest.mark.parametrize("mode, name", [("eval", "SIGTERM"), ("eval", "SIGINT"), ("precompute", "SIGUSR2")])
def test_a_signal_while_nothing_is_trained_ends_with_status_75(mode, name, whole, tmp_path, monkeypatch, capsys):
    def stop(*_):
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(60)

    flags = ["--eval", "--resume", whole / "best.pth", "--output-dir", ""]
    if mode == "precompute":
        flags = ["--distillation-type", "hard", "--teacher-model", "deit_tiny_patch16_224", "--teacher-path"]
        flags += [whole / "best.pth", "--teacher-cache", tmp_path, "--precompute-teacher", "--model-kwargs"]
        flags += ["embed_dim=48", "depth=2", "num_heads=3", "--teacher-model-kwargs", "patch_size=8", "embed_dim=48"]
        flags += ["depth=2", "num_heads=3", "--teacher-model", "deit_tiny_distilled_patch16_224"]
    owner, function = (engine, "evaluate") if mode == "eval" else (teachers.CachedTeacher, "__call__")
    monkeypatch.setattr(owner, function, stop)
    run(tmp_path / "run", *flags, status=75)
    assert capsys.readouterr().err.splitlines()[-1] == f"main.py: stopped by {name}; run the same command again"


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_acts_although_the_loader_is_stuck(workers, whole, tmp_path):
    flags = [*FLAGS, "--output-dir", tmp_path / "run", "--num-workers", workers, "--log-interval", "1"]
    faulty = ["tests/faults.py", "stuck", "0", "5", *flags, "--stop-timeout", "1", "--checkpoint-minutes", "0"]
    process = tiny.Process(faulty)
    latest = tmp_path / "run" / "checkpoint.pth"
    wait_for(lambda: latest.exists() and checkpoint(tmp_path / "run")["step"] == 5)
    latest.unlink()
    process.send_signal(signal.SIGTERM)
    output = process.output(60)
    assert process.returncode == 75, output
    kept = "epoch 0, step 5 is saved; resume with --resume auto"
    assert output.splitlines()[-1] == f"main.py: stopped by SIGTERM, and stuck for 1 s; {kept}"
    if workers:
        run(tmp_path / "run", "--resume", "auto")
        assert chaos.compare(whole, tmp_path / "run") == []


def test_a_closed_terminal_is_ignored_under_nohup():
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with utils.StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == 0
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, earlier)


@pytest.mark.process
def test_a_run_with_a_closed_standard_error_is_the_same(tmp_path):
    script = tmp_path / "twice.py"
    script.write_text(
        "import os, sys; os.close(2); sys.stderr = sys.__stderr__ = None\n"  # as in a Python that starts without one
        "sys.path.insert(0, os.getcwd()); import main\n"
        "try:\n    main.cli(['--epochs', '0'])\nexcept SystemExit as end:\n    assert end.code == 2\n"
        "main.cli()\n"
    )
    assert tiny.run(script, *FLAGS, "--epochs", "1", "--output-dir", tmp_path / "run") == ""
    run(tmp_path / "open", "--epochs", "1")
    assert chaos.compare(tmp_path / "open", tmp_path / "run") == []


@pytest.mark.process
def test_a_second_sigint_ends_at_once(tmp_path):
    code = "import os, signal, sys; sys.path.insert(0, os.getcwd()); import utils\n"
    code += "with utils.StopSignals() as stop:\n    os.kill(os.getpid(), signal.SIGINT)\n"
    code += "    assert stop.received == signal.SIGINT\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "    print('continues', flush=True)\n"
    code += "    os.kill(os.getpid(), signal.SIGINT)\n    os.kill(os.getpid(), signal.SIGINT)\n    print('too long')"
    (tmp_path / "twice.py").write_text(code)
    assert tiny.run(tmp_path / "twice.py", status=130) == "continues\n"


def stop_two_ranks(flags, folder, send):
    """Start two ranks or resume them, wait for a checkpoint, let `send(run)` stop them: both at the same step."""
    said = folder.with_suffix(".out")
    said.unlink(missing_ok=True)
    run = chaos.Run(folder, [*flags, "--checkpoint-minutes", "0.001"], processes=2, restarts=0)
    saves = run.saves()
    while run.saves() == saves:
        assert run.process.poll() is None, said.read_text()
        time.sleep(0.005)
    send(run)
    assert run.wait(120) != 0
    chaos.kill(run.living())
    output = said.read_text()
    kept = re.findall(r"rank (\d): stopped by \w+; (epoch \d+, step \d+) is saved", output)
    assert sorted(rank for rank, _ in kept) == ["0", "1"] and kept[0][1] == kept[1][1], output


@pytest.mark.process
def test_a_signal_stops_both_ranks_at_the_same_step(tmp_path, capsys):
    """Two resumed ranks are bitwise identical to a run that nobody stops; one process comes near its losses."""
    # with batch statistics, of which each rank has its own
    flags = ["--model", "test_resnet", *tiny.DATA, "--input-size", "32", "--drop-path", "0", "--warmup-epochs", "0"]
    flags += ["--num-workers", "1", "--batch-size", "16", "--model-ema-decay", "0.9", "--train-fraction", "0.5"]
    flags += ["--epochs", "4"]  # about 3 seconds, so that a busy machine sends the signals before the end
    whole, stopped, one = (tmp_path / name for name in ("whole", "stopped", "one"))
    tiny.torchrun(2, "main.py", *flags, "--output-dir", whole)
    stop_two_ranks(flags, stopped, lambda run: os.kill(run.living(rank=1)[0], signal.SIGUSR2))
    shutil.copytree(stopped, one)
    stop_two_ranks(flags, stopped, lambda run: run.process.terminate())  # torchrun, which passes it on
    assert chaos.Run(stopped, flags, processes=2, restarts=0).wait(240) == 0
    assert chaos.compare(whole, stopped) == []

    main.cli([*flags, "--resume", "auto", "--batch-size", "32", "--output-dir", str(one)])
    assert f"{WARNING}--batch-size was 16, is 32; processes was 2, is 1" in capsys.readouterr().err
    ours, theirs = tiny.log_of(one), tiny.log_of(whole)
    assert [record["epoch"] for record in ours] == [record["epoch"] for record in theirs]
    for alone, together in zip(ours, theirs, strict=True):  # Mixup's pairs and dropout are drawn per rank
        assert alone["train_loss"] == pytest.approx(together["train_loss"], abs=0.2)


@pytest.mark.process
@pytest.mark.parametrize("more", [[], ["--checkpoint-minutes", "0"]], ids=["signal", "signal and checkpoints"])
def test_a_signal_to_one_rank_stops_both_one_update_later(more, tmp_path):
    # rank 1 is told in the seventh update of epoch 1; both have made the eighth by the time that rank 0 knows
    ranks = start_ranks("signal", tmp_path, *more, workers=0)
    outputs = [rank.output() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [75, 75], outputs
    for rank, output in enumerate(outputs):
        assert f"rank {rank}: stopped by SIGUSR1; epoch 1, step 8 is saved" in output
    assert (checkpoint(tmp_path)["step"], checkpoint(tmp_path)["progress"]["images"]) == (UPDATES + 8, 8 * BATCH)
    if more:  # the checkpoint before is of the update before
        assert checkpoint(tmp_path, "checkpoint_previous.pth")["step"] == UPDATES + 7


# -- errors of one rank ------------------------------------------------------------------------------------------------


def start_ranks(kind, folder, *flags, workers=1):
    """Start two ranks without a launcher, which would end one when the other fails; rank 1 fails."""
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": tiny.free_port()}
    command = ["tests/faults.py", kind, 1, UPDATES + 6, *tiny.PLAIN, "--epochs", "2", "--train-fraction", "0.25"]
    command += ["--batch-size", BATCH // 2, "--num-workers", workers, "--output-dir", folder, *flags]
    return [tiny.Process(command, RANK=rank, LOCAL_RANK=rank, **shared) for rank in (0, 1)]


@pytest.mark.process
@pytest.mark.parametrize(
    "kind, cause",
    [
        ("nan", "rank 1: run ended: the loss is not finite in epoch 1 at step 6 (here)"),
        ("exception", "rank 1: run ended: ZeroDivisionError: somebody's mistake"),
        ("loader", "rank 1: run ended: a data-loader worker is gone ("),
        ("rank", ""),
    ],
)
def test_an_error_on_one_rank_ends_all_with_its_cause(kind, cause, tmp_path):
    ranks = start_ranks(kind, tmp_path, "--log-interval", "5")
    outputs = [None, ranks[1].output()]
    begin = time.monotonic()
    outputs[0] = ranks[0].output(30)
    assert time.monotonic() - begin < 30
    assert [rank.returncode for rank in ranks] == [1, -signal.SIGKILL if kind == "rank" else 1], outputs
    assert cause in outputs[1]
    told = "another process is gone"
    if kind == "nan":
        told = "the loss is not finite in epoch 1 at step 6 (on another rank)"
    assert f"main.py: rank 0: run ended: {told}" in outputs[0]
    assert checkpoint(tmp_path)["epoch"] == 1 and len(tiny.log_of(tmp_path)) == 1
    assert all(value.isfinite().all() for value in checkpoint(tmp_path)["model"].values())


@pytest.mark.process
@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_loss_of_one_rank_is_skipped_by_all_if_that_is_tolerated(kind, tmp_path):
    flags = ["--max-skipped-steps", "1", "--amp", "fp16" if kind == "inf" else "off"]
    ranks = start_ranks(kind, tmp_path, *flags, workers=0)
    outputs = [rank.output() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert [record.get("skipped_steps") for record in tiny.log_of(tmp_path)] == [None, 1.0]
    assert "epoch 1  step 6 skipped" in outputs[0]
    saved = checkpoint(tmp_path)
    assert saved["epoch"] == 2 and all(value.isfinite().all() for value in saved["model"].values())


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_skipped_update_leaves_the_weights_alone(amp, tmp_path):
    weights = {}

    def poison(state):
        weights["before"] = {name: value.clone() for name, value in state.module.state_dict().items()}
        next(iter(state.module.parameters())).grad = None
        weights["hook"] = state.module.head.weight.register_hook(lambda gradient: gradient * float("nan"))

    def look(state):
        weights["after"] = {name: value.clone() for name, value in state.module.state_dict().items()}
        weights["hook"].remove()

    with at_update(7, poison), at_update(8, look):
        run(tmp_path, "--epochs", "1", "--amp", amp, "--max-skipped-steps", "1", "--opt", "sgd")
    assert chaos.differences(weights["before"], weights["after"]) == []
    (record,) = tiny.log_of(tmp_path)
    # In fp16 the scaler takes it for an overflow, since the loss was finite.
    assert record.get("skipped_steps") == (1.0 if amp == "off" else None)


def test_one_skipped_step_too_many_ends_the_run(tmp_path, capsys):
    def poison(state):
        state.module.head.weight.register_hook(lambda gradient: gradient * float("nan"))

    with at_update(UPDATES + 7, poison):
        run(tmp_path, "--max-skipped-steps", "2", "--log-interval", "1", status=1)
    error = capsys.readouterr().err
    assert error.count("skipped: its loss is not finite") == 2
    assert "the loss is not finite in epoch 1 at step 9 (here)" in error.splitlines()[-1]
    assert checkpoint(tmp_path)["epoch"] == 1


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_twice(tmp_path_factory):
    """A run that was stopped in its second and in its third epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    with at_update(UPDATES + 5, send(signal.SIGTERM)):
        run(folder, status=75)
    with at_update(2 * UPDATES + 5, send(signal.SIGTERM)):
        run(folder, "--resume", "auto", status=75)
    return folder


@pytest.fixture
def stopped(stopped_twice, tmp_path):
    return shutil.copytree(stopped_twice, tmp_path / "stopped")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing"])
@pytest.mark.parametrize("resume", ["auto", "file"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(damage, resume, whole, stopped, capsys):
    latest = stopped / "checkpoint.pth"
    content = bytearray(latest.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 4
    latest.write_bytes({"truncated": content[:-1000], "flipped": content, "empty": b"", "missing": b""}[damage])
    if damage == "missing":
        latest.unlink()
    if (damage, resume) == ("missing", "file"):
        return run(stopped, "--resume", latest, status=2)
    runs = (damage, resume) in (("missing", "auto"), ("flipped", "file"))  # what follows is the same for all
    run(stopped, "--resume", latest if resume == "file" else "auto", "--no-dry-run" if runs else "--dry-run")
    error = capsys.readouterr().err
    assert f"resuming epoch 2 after 0 of its {UPDATES} updates" in error
    if damage != "missing":
        assert f"{latest} is damaged; resuming from {stopped / 'checkpoint_previous.pth'}" in error
        assert (stopped / "checkpoint.damaged").exists()
    if runs:
        assert chaos.compare(whole, stopped) == []


def test_the_one_before_is_not_lost_to_a_damaged_one(stopped):
    good = (stopped / "checkpoint_previous.pth").read_bytes()
    (stopped / "checkpoint.pth").write_bytes(b"torn")
    step = checkpoint(stopped, "checkpoint_previous.pth")["step"]
    with at_update(step + 2, send(signal.SIGTERM)):
        run(stopped, "--resume", "auto", status=75)
    assert checkpoint(stopped)["step"] == step + 3
    assert (stopped / "checkpoint_previous.pth").read_bytes() == good


def test_a_damaged_checkpoint_that_cannot_be_renamed_gives_way_too(stopped, monkeypatch):
    (stopped / "checkpoint.pth").write_bytes(b"torn")
    monkeypatch.setattr("os.replace", mock.Mock(side_effect=PermissionError))
    assert checkpoints.find_checkpoint("auto", str(stopped), is_main=True) == str(stopped / "checkpoint_previous.pth")


def test_two_damaged_checkpoints_are_a_user_error(stopped, capsys):
    for name in ("checkpoint.pth", "checkpoint_previous.pth"):
        (stopped / name).write_bytes((stopped / name).read_bytes()[:1000])
    run(stopped, "--resume", "auto", status=2)
    assert "truncated" in capsys.readouterr().err.splitlines()[-1]


def test_no_flipped_bit_goes_unnoticed(whole, tmp_path):
    path, content = tmp_path / "checkpoint.pth", (whole / "checkpoint.pth").read_bytes()
    original, draw, refused = checkpoint(whole), random.Random(0), 0
    for _ in range(100):
        flipped = bytearray(content)
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            read = checkpoints.read_checkpoint(str(path), "--resume")
        except utils.UserError:
            refused += 1
        else:  # it was in the padding between two records
            assert chaos.differences(original, read) == []
    assert refused > 66


@pytest.mark.parametrize("local_rank", [0, 1])
def test_one_process_of_a_machine_compares_checksums(local_rank, stopped, monkeypatch, capsys):
    content, found = bytearray((stopped / "checkpoint.pth").read_bytes()), checkpoint(stopped)
    weight = found["model"]["blocks.0.attn.qkv.weight"].numpy().tobytes()
    content[content.index(weight) + 1] ^= 1  # one weight is a little different
    (stopped / "flipped.pth").write_bytes(content)
    world = utils.World(0, 1, local_rank, 2, torch.device("cpu"))
    monkeypatch.setattr(utils, "init_distributed", lambda _: world)
    run(stopped, "--resume", stopped / "flipped.pth", status=2 if local_rank == 0 else None)
    assert ("is damaged (wrong checksum" in capsys.readouterr().err) == (local_rank == 0)


def test_a_whole_checkpoint_is_taken_without_reading_the_one_before(stopped, monkeypatch):
    read, look = [], checkpoints.is_whole
    monkeypatch.setattr(checkpoints, "is_whole", lambda path, *rest: (read.append(path.name), look(path, *rest))[1])
    assert checkpoints.find_checkpoint("auto", str(stopped), True) == str(stopped / "checkpoint.pth")
    assert read == ["checkpoint.pth"]


def test_a_full_disk_ends_the_run_and_both_files_are_whole(tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(state):
        # From now on no file takes more than 50 kB: what a full disk is to a program.
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))

    try:
        with at_update(UPDATES + 5, fill):
            run(tmp_path, "--epochs", "2", status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert re.match(r"main.py: run ended: cannot write a checkpoint to .*; the last checkpoint is intact", last), error
    latest, previous = checkpoint(tmp_path), checkpoint(tmp_path, "checkpoint_previous.pth")
    assert (latest["epoch"], previous["epoch"]) == (1, 0)
    assert not list(tmp_path.glob(".*.tmp"))


def test_what_killed_processes_left_half_written_is_removed(stopped, whole):
    for name in (".checkpoint.pth.77.tmp", ".best.pth.77.tmp", ".log.txt.77.tmp"):
        (stopped / name).write_bytes(b"half")
    run(stopped, "--resume", "auto")
    assert {path.name for path in stopped.glob(".*")} == {".lock"} and chaos.compare(whole, stopped) == []


def test_auto_starts_where_there_is_nothing(tmp_path, capsys):
    run(tmp_path / "new", "--resume", "auto", "--epochs", "1")
    assert "a fresh start" in capsys.readouterr().err
    assert len(tiny.log_of(tmp_path / "new")) == 1
    assert json.loads((tmp_path / "new" / "config.json").read_text())["model"] == "deit_tiny_distilled_patch16_224"


def test_auto_starts_from_other_weights_only_where_there_is_nothing(tmp_path, whole, capsys):
    start = shutil.copy(whole / "best.pth", tmp_path / "start.pth")
    flags = ["--finetune", start, "--resume", "auto", "--epochs", "1"]
    run(tmp_path / "whole", *flags)
    with at_update(5, send(signal.SIGTERM)):
        run(tmp_path / "stopped", *flags, status=75)
    assert capsys.readouterr().err.count("--finetune") == 2
    Path(start).unlink()  # a resumed run does not need it
    run(tmp_path / "stopped", *flags)
    said = capsys.readouterr().err
    assert "--finetune" not in said and "--model-ema-decay" not in said
    assert chaos.compare(tmp_path / "whole", tmp_path / "stopped") == []
    config = json.loads((tmp_path / "stopped" / "config.json").read_text())
    assert config["finetune"] == checkpoint(tmp_path / "stopped")["args"]["finetune"] == str(start)


# -- whose folder ------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_another_run_is_refused_and_unchanged(whole, stopped, capsys):
    before = {path: path.read_bytes() for path in stopped.iterdir() if path.is_file()}
    run(stopped, "--resume", whole / "checkpoint.pth", "--epochs", "4", status=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("main.py")]
    assert f"--output-dir {stopped}: holds another run than --resume {whole}/checkpoint.pth" in line
    assert "--resume auto" not in line and "--overwrite" in line
    assert before == {path: path.read_bytes() for path in stopped.iterdir() if path.is_file()}
    run(stopped, "--resume", whole / "checkpoint.pth", "--epochs", "4", "--overwrite")
    assert [record["epoch"] for record in tiny.log_of(stopped)] == [0, 1, 2, 3]
    assert tiny.log_of(stopped)[:3] == tiny.log_of(whole)


def test_a_folder_with_nothing_but_best_pth_is_refused(whole, tmp_path, capsys):
    shutil.copy(whole / "best.pth", tmp_path)
    run(tmp_path, status=2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "holds an earlier run; name another folder" in line and "auto" not in line


def test_a_log_without_checkpoints_is_not_emptied(whole, tmp_path, capsys):
    shutil.copy(whole / "log.txt", tmp_path)
    for flags in ((), ("--resume", "auto")):
        run(tmp_path, *flags, status=2)
        assert "holds the log.txt of an earlier run" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "log.txt").read_bytes() == (whole / "log.txt").read_bytes()


def test_a_fresh_folder_gets_log_and_best_of_the_resumed_run(whole, stopped, tmp_path):
    run(tmp_path / "fresh", "--resume", stopped / "checkpoint.pth")
    assert chaos.compare(whole, tmp_path / "fresh") == []


def test_a_best_pth_of_another_moment_is_not_taken_along(stopped, tmp_path, capsys):
    torch.save(checkpoint(stopped) | {"best_acc1": 99.0}, stopped / "checkpoint.pth")
    run(tmp_path / "fresh", "--resume", stopped / "checkpoint.pth")
    assert "best.pth of the resumed run (99.00 %) is not next to" in capsys.readouterr().err
    assert not (tmp_path / "fresh" / "best.pth").exists()  # no later epoch is better


def test_an_overwritten_run_cannot_be_resumed(stopped, capsys):
    with at_update(3, kill), pytest.raises(Killed):
        run(stopped, "--overwrite")
    run(stopped, "--resume", "auto", "--epochs", "1")
    assert "a fresh start" in capsys.readouterr().err
    assert [record["epoch"] for record in tiny.log_of(stopped)] == [0]


def test_two_runs_at_once_cannot_share_a_folder(tmp_path, capsys):
    ready, done = (multiprocessing.get_context("fork").Event() for _ in range(2))

    def hold():
        lock = utils.lock_folder(tmp_path)
        ready.set()
        done.wait(60)
        lock.close()

    holder = multiprocessing.get_context("fork").Process(target=hold)
    holder.start()
    ready.wait(60)
    run(tmp_path, status=2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        f"main.py: error: --output-dir {tmp_path}: another run is writing there (process {holder.pid} "
    )
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}
    done.set()
    holder.join()
    run(tmp_path, "--epochs", "1")


# -- broken images -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder_of_images(tmp_path):
    """Images a to l of two classes, of which `c` and `d` are broken; training takes 24."""
    for part, number in (("train", 12), ("val", 4)):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / part / label
            folder.mkdir(parents=True)
            for index in range(number):
                color = (20 * index, 40 * (label == "cat"), len(part))  # no validation image is a training image
                Image.new("RGB", (32, 32), color).save(folder / f"{index:02d}.png")
    broken = [tmp_path / "data" / "train" / "dog" / f"{index:02d}.png" for index in (2, 3)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    return tmp_path / "data", broken


@pytest.mark.parametrize("workers, ram", [(0, 0), (1, 0), (0, 64)])
def test_broken_images_are_replaced_counted_and_named(workers, ram, folder_of_images, tmp_path, capsys):
    data, broken = folder_of_images
    flags = ["--data-set", "IMNET", "--data-path", data, "--batch-size", "8", "--ram-cache", ram, "--no-repeated-aug"]
    flags += ["--num-workers", workers, "--train-fraction", "1"]
    run(tmp_path / "stops", *flags, status=1)
    error = capsys.readouterr().err.splitlines()[-1]
    assert any(f"cannot read image {path} " in error for path in broken) and "--skip-broken-images" in error
    run(tmp_path / "one", *flags, "--skip-broken-images", "1", status=1)
    assert "cannot read image" in capsys.readouterr().err.splitlines()[-1]
    run(tmp_path / "two", *flags, "--skip-broken-images", "2")
    error = capsys.readouterr().err
    assert "2 images cannot be read and are replaced by others: " in error and all(
        str(path) in error for path in broken
    )
    assert [record["broken_images"] for record in tiny.log_of(tmp_path / "two")] == [2, 2, 2]
    with at_update(4, send(signal.SIGTERM)):
        run(tmp_path / "stopped", *flags, "--skip-broken-images", "2", status=75)
    run(tmp_path / "stopped", *flags, "--skip-broken-images", "2", "--resume", "auto")
    assert chaos.compare(tmp_path / "two", tmp_path / "stopped") == []


@pytest.mark.parametrize("change", ["removed", "repaired", "none"])
def test_broken_images_of_a_stopped_run_may_be_removed_or_repaired(change, folder_of_images, tmp_path, capsys):
    data, broken = folder_of_images
    for path in (*broken, data / "train" / "dog" / "11.png"):  # the last images
        path.write_bytes(b"")
    flags = ["--data-set", "IMNET", "--data-path", data, "--batch-size", "8", "--no-repeated-aug"]
    flags += ["--train-fraction", "1", "--num-workers", "0", "--skip-broken-images", "3"]
    with at_update(4, send(signal.SIGTERM)):
        run(tmp_path / "stopped", *flags, status=75)
    if change == "removed":
        (data / "train" / "dog" / "11.png").unlink()
    elif change == "repaired":
        Image.new("RGB", (32, 32)).save(data / "train" / "dog" / "11.png")
    run(tmp_path / "stopped", *flags, "--resume", "auto")
    left = 3 if change == "none" else 2
    assert [record["broken_images"] for record in tiny.log_of(tmp_path / "stopped")] == [3, left, left]


def test_a_broken_image_is_replaced_by_the_next_with_its_own_label(folder_of_images):
    data, _ = folder_of_images
    source, _ = datasets.read_sources(datasets.DataOptions("IMNET", str(data)))
    tolerant = datasets.replace(source, broken=sources.BrokenImages(source.images, 2))
    assert [tolerant[position][0].getpixel((0, 0))[0] for position in range(12, 18)] == [0, 20, 80, 80, 80, 100]
    assert tolerant.broken.all_found() == [14, 15]
    kept = sources.keep_in_memory(tolerant, 64)
    assert [kept[position][0].getpixel((0, 0))[0] for position in range(12, 18)] == [0, 20, 80, 80, 80, 100]
    (data / "train" / "dog" / "11.png").write_bytes(b"")  # the very last: the first one replaces it, with its own class
    tolerant = datasets.replace(source, broken=sources.BrokenImages(source.images, 3))
    assert tolerant[23][1] == 0 and sources.keep_in_memory(tolerant, 64)[23][1] == 0


# -- other circumstances -----------------------------------------------------------------------------------------------


def test_an_unchanged_run_is_resumed_without_a_warning(stopped, capsys):
    capsys.readouterr()
    run(stopped, "--resume", "auto", "--num-workers", "1", "--log-interval", "3", "--checkpoint-minutes", "9")
    assert WARNING not in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, change",
    [
        (["--lr", "0.001"], "--lr was 0.0005, is 0.001"),
        (["--seed", "1"], "--seed was 0, is 1"),
        (["--epochs", "4"], "--epochs was 3, is 4"),
        (["--mixup", "0"], "--mixup was 0.8, is 0.0"),
        (["--batch-size", "16"], "--batch-size was 32, is 16"),
        (["--train-fraction", "0.5"], "images was 360, is 721"),
        (["--amp", "bf16"], "precision was None, is torch.bfloat16"),
        (["--augment", "device"], "augmentation was host, is device"),
    ],
)
def test_what_makes_a_resumed_run_not_bitwise_identical_is_named(flags, change, stopped, capsys):
    runs = flags[0] in ("--epochs", "--batch-size")  # the others only warn here
    run(stopped, "--resume", "auto", *flags, "--no-dry-run" if runs else "--dry-run")
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if WARNING in line]
    assert change in warning.partition(WARNING)[2].split("; ")
    if runs:
        assert [record["epoch"] for record in tiny.log_of(stopped)] == list(range(4 if "--epochs" in flags else 3))


EVIT = ["--model", "evit_tiny_distilled_patch16_224", "--drop-loc", "0", "--shrink-start-epoch", "0"]


@pytest.mark.parametrize(("change", "named"), [(["--lr", "1e-3"], ""), (EVIT, "--model, --drop-loc, --base-keep-rate")])
def test_best_accuracy_of_another_function_is_forgotten(change, named, stopped, capsys):
    torch.save(checkpoint(stopped) | {"best_acc1": 99.5, "best_epoch": 0}, stopped / "checkpoint.pth")
    run(stopped, "--resume", "auto", *change)
    said, best = capsys.readouterr().err, checkpoint(stopped)["best_acc1"]
    if not named:
        assert best == 99.5 and "is not comparable" not in said
        return
    assert f"its best top-1, 99.50 %, is not comparable ({named} changed); the best of this run starts anew" in said
    assert best == checkpoint(stopped, "best.pth")["best_acc1"] == tiny.log_of(stopped)[-1]["test_acc1"]
    assert checkpoint(stopped)["best_epoch"] == 2


@pytest.mark.parametrize(
    ("then", "now", "changed"),
    [
        ([1, 2], [1, 2], False),
        ([1, 2], [1, 3], True),
        ([1, 2], [1, -1], False),
        ([1], [1, 2], False),
        (None, [1], False),
    ],
)
def test_other_validation_images_are_noticed_by_their_checksums(then, now, changed):
    images = {"images": 2, "labels": 3, "file_names": 4}
    about = {"class_samples": {"train": [], "val": now}, "validation": images}
    found = checkpoints.changed_images({"class_samples": {"val": then}}, about)
    assert found == (["validation images"] if changed else [])
    for name in images:
        other = {"class_samples": {"val": then}, "validation": images | {name: 5}}
        assert checkpoints.changed_images(other, about) == ["validation images"]


def test_options_of_the_optimizer_are_in_force_when_they_change(stopped, capsys):
    changed = ["--weight-decay", "0.1", "--opt-betas", "0.8", "0.9", "--opt-eps", "1e-6"]
    run(stopped, "--resume", "auto", *changed)
    groups = checkpoint(stopped)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0, 0.1]  # the first are biases and norms
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.8, 0.9), 1e-6)}
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if WARNING in line]
    for change in ("--weight-decay was 0.05, is 0.1", "--opt-betas was None, is [0.8, 0.9]", "--opt-eps was 1e-08"):
        assert change in warning


@pytest.mark.parametrize("then, now", [("bf16", "fp16"), ("fp16", "off")])
def test_a_run_is_resumed_in_another_precision(then, now, tmp_path, capsys):
    short = ["--train-fraction", "0.1", "--drop", "0"]
    run(tmp_path, *short, "--epochs", "1", "--amp", then)
    run(tmp_path, *short, "--epochs", "2", "--amp", now, "--resume", "auto")
    assert checkpoint(tmp_path)["epoch"] == 2 and bool(checkpoint(tmp_path)["scaler"]) is (now == "fp16")
    assert "precision was " in capsys.readouterr().err


def test_another_batch_size_resumes_at_the_same_image(stopped, monkeypatch, capsys):
    # 6 updates of 32 images are 12 of 16, or 4 of 48
    seen, iterate = [], loaders.EpochLoader.__iter__

    def watched(loader):
        for batch in iterate(loader):
            seen.append(batch)
            yield batch

    monkeypatch.setattr(loaders.EpochLoader, "__iter__", watched)
    for size in (16, 48, 50):
        folder = shutil.copytree(stopped, stopped.with_name(f"batches_of_{size}"))
        seen.clear()
        run(folder, "--resume", "auto", "--batch-size", size, "--eval-interval", "9")
        again = {16: 0, 48: 0, 50: 42}[size]
        assert int(seen[0].positions[0]) == 6 * BATCH - again
        assert sum(len(batch.positions) for batch in seen) == 360 // size * size - (6 * BATCH - again)
        assert f"repeats {again} images of epoch 2" in capsys.readouterr().err


def test_renamed_or_exchanged_images_are_noticed(folder_of_images, tmp_path, capsys):
    data, broken = folder_of_images
    for path in broken:
        shutil.copy(data / "train" / "cat" / "00.png", path)
    flags = ["--data-set", "IMNET", "--batch-size", "8", "--no-repeated-aug", "--train-fraction", "1"]
    with at_update(4, send(signal.SIGTERM)):
        run(tmp_path / "run", *flags, "--data-path", data, status=75)
    moved = shutil.move(data, tmp_path / "moved")  # which changes nothing
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    run(tmp_path / "copy", *flags, "--data-path", moved, "--resume", "auto")
    assert WARNING not in capsys.readouterr().err
    os.rename(Path(moved) / "train" / "cat" / "05.png", Path(moved) / "train" / "cat" / "99.png")
    run(tmp_path / "run", *flags, "--data-path", moved, "--resume", "auto")
    assert f"{WARNING}file names was " in capsys.readouterr().err


@pytest.fixture
def whole_images(folder_of_images):
    """Folder of images none of which is broken, in 2 classes, and flags to train on it."""
    data, broken = folder_of_images
    for number, path in enumerate(broken):
        shutil.copy(data / "train" / "cat" / f"0{number}.png", path)
    return data, ["--data-set", "IMNET", "--batch-size", "8", "--train-fraction", "1", "--no-repeated-aug"]


def test_best_accuracy_of_other_validation_images_is_forgotten(whole_images, tmp_path, capsys):
    data, flags = whole_images
    run(tmp_path, *flags, "--data-path", data, "--epochs", "1")
    last = max((data / "val" / "cat").iterdir())
    shutil.copy(last, last.with_name("zz.png"))  # the first image of each class stays
    run(tmp_path, *flags, "--data-path", data, "--epochs", "2", "--resume", "auto")
    assert "is not comparable (validation images changed)" in capsys.readouterr().err


def test_images_that_were_trained_on_are_not_held_out_silently(whole_images, tmp_path, capsys):
    data, flags = whole_images
    flags += ["--data-path", data / "train", "--val-fraction", "0.3", "--epochs", "1"]
    start, said = ["--finetune", tmp_path / "run" / "checkpoint.pth"], "may have been trained on some of the evaluated"
    run(tmp_path / "run", *flags)
    run(tmp_path / "again", *flags, *start)
    assert said not in capsys.readouterr().err
    for path in list((data / "train").rglob("*.png")):
        shutil.copy(path, path.with_name(f"more {path.name}"))
    run(tmp_path / "more", *flags, *start)
    assert said in capsys.readouterr().err
    run(tmp_path / "run", *flags, "--epochs", "2", "--resume", "auto")
    found = capsys.readouterr().err
    assert said in found and "is not comparable (validation images changed)" in found


def test_model_of_another_grid_with_as_many_patches_is_resumed(tmp_path):
    size = ["--input-size", "16", "64", "--train-fraction", "0.1"]  # a grid of 2 x 8 patches; 4 x 4 are as many
    run(tmp_path, *size, "--epochs", "1")
    run(tmp_path, *size, "--epochs", "2", "--resume", "auto")
    assert checkpoint(tmp_path)["epoch"] == 2


def test_other_classes_are_no_longer_the_same_run(folder_of_images, tmp_path, capsys):
    data, broken = folder_of_images
    flags = ["--data-set", "IMNET", "--data-path", data, "--batch-size", "8", "--skip-broken-images", "2"]
    flags += ["--train-fraction", "1"]
    run(tmp_path / "run", *flags, "--epochs", "1")
    for part in ("train", "val"):
        shutil.copytree(data / part / "cat", data / part / "emu")
    run(tmp_path / "run", *flags, "--resume", "auto", status=2)
    assert "head" in capsys.readouterr().err.splitlines()[-1]


def test_the_positions_of_a_resumed_epoch_are_the_rest_of_it():
    for multiple, start in ((64, 0), (64, 128), (60, 60)):
        sampler = samplers.KeyedSampler(500, seed=3, repeats=3, rank=1, world_size=2, multiple=multiple)
        sampler.set_epoch(4)
        everything = list(sampler)
        sampler.set_epoch(4, start)
        assert list(sampler) == everything[start:]


def test_a_stream_resumes_in_the_same_order_with_as_many_workers(tmp_path, capsys):
    path = write_stream(tmp_path, [12, 12])  # 12 updates per epoch
    model = ["--model", "deit_tiny_patch16_224", *tiny.MODEL, "--epochs", "2", "--batch-size", "2", "--amp", "off"]
    data = ["--data-set", "wds/", "--data-path", path, "--num-classes", "3"]

    def run_stream(name, *flags, workers=0, status=None):
        words = [*model, *data, "--num-workers", str(workers), "--output-dir", str(tmp_path / name), *flags]
        with contextlib.nullcontext() if status is None else pytest.raises(SystemExit) as end:
            main.cli(words)
        assert status is None or end.value.code == status
        return capsys.readouterr().err

    run_stream("whole")
    with at_update(11, send(signal.SIGTERM)):  # the last one of the first epoch
        run_stream("parts", status=75)
    shutil.copytree(tmp_path / "parts", tmp_path / "other")
    assert WARNING not in run_stream("parts", "--resume", "auto")
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pth")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert f"{WARNING}data-loader workers was 0, is 2" in run_stream("other", "--resume", "auto", workers=2)
