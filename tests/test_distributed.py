"""Whole runs, mostly in real processes: launchers, exact evaluation, reproducibility."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_datasets import encoded, write_stream

import main
import utils

FEW = ["--train-fraction", "0.1"]  # 143 images


def run(*flags):
    """main.py in this process."""
    main.cli([str(flag) for flag in flags])


def weights(folder, name="checkpoint.pth", key="model"):
    return torch.load(folder / name, weights_only=True)[key]


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differing


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    flags = ["--epochs", "2", "--batch-size", "32", "--output-dir", folder]
    output = tiny.torchrun(2, "main.py", *tiny.PLAIN, *FEW, *flags)
    return folder, output


@pytest.mark.process
def test_two_ranks_have_the_loss_curve_of_one_with_twice_the_batch(two_ranks, tmp_path):
    folder, _ = two_ranks
    run(*tiny.PLAIN, *FEW, "--epochs", "2", "--batch-size", "64", "--output-dir", tmp_path)
    for one, two in zip(tiny.log_of(tmp_path), tiny.log_of(folder), strict=True):
        for name in ("train_loss", "test_loss", "test_ema_loss", "test_acc1", "test_acc5"):
            assert two[name] == pytest.approx(one[name], abs=1e-4), name


@pytest.mark.process
def test_gradient_accumulation_over_two_ranks_has_it_too(two_ranks, tmp_path):
    folder, _ = two_ranks
    flags = ["--epochs", "2", "--batch-size", "16", "--accum-steps", "2", "--output-dir", tmp_path]
    tiny.torchrun(2, "main.py", *tiny.PLAIN, *FEW, *flags)
    for one, two in zip(tiny.log_of(tmp_path), tiny.log_of(folder), strict=True):
        assert two["test_loss"] == pytest.approx(one["test_loss"], abs=1e-4)


@pytest.mark.process
def test_an_evit_on_two_ranks_has_the_loss_curve_of_one(tmp_path):
    evit = [*tiny.PLAIN, "--model", "evit_tiny_distilled_patch16_224", "--drop-loc", "0", "--base-keep-rate", "0.5"]
    evit += [*FEW, "--shrink-start-epoch", "0", "--shrink-epochs", "1", "--epochs", "2"]
    run(*evit, "--batch-size", "32", "--output-dir", tmp_path / "one")
    checkpointed = ["--grad-checkpointing", "--batch-size", "16", "--output-dir", tmp_path / "two"]
    tiny.torchrun(2, "main.py", *evit, *checkpointed)
    logs = (tiny.log_of(tmp_path / name) for name in ("one", "two"))
    for rate, one, two in zip((0.55, 0.5), *logs, strict=True):
        assert one["keep_rate"] == two["keep_rate"] == rate
        for name in ("train_loss", "test_loss", "test_ema_loss"):
            assert two[name] == pytest.approx(one[name], abs=1e-4), name


@pytest.mark.process
def test_only_the_first_rank_talks(two_ranks):
    folder, output = two_ranks
    assert output.count("effective batch 64 images") == 1
    assert len(tiny.log_of(folder)) == 2


@pytest.mark.process
def test_evaluation_is_exact_on_any_number_of_processes(two_ranks, capsys):
    # 355 held-out images do not divide by 2 or by the batch
    folder, _ = two_ranks
    flags = [*tiny.PLAIN, "--eval", "--resume", folder / "checkpoint.pth", "--batch-size", "48"]
    capsys.readouterr()
    run(*flags)
    outputs = [capsys.readouterr().err, tiny.torchrun(2, "main.py", *flags)]
    expected = tiny.log_of(folder)[-1]
    for output in outputs:
        assert f"test_acc1 {expected['test_acc1']:.4g}" in output
        assert f"test_loss {expected['test_loss']:.4g}" in output
        assert "test_images 355" in output


@pytest.mark.process
def test_missing_validation_images_end_all_ranks(tmp_path):
    def files(number, image):
        return {"png": b"broken" if number == 5 else encoded(image), "cls": str(number % 3).encode()}

    model = ["--model", "deit_tiny_patch16_224", *tiny.MODEL, "--epochs", "1", "--batch-size", "2", "--output-dir", ""]
    data = ["--data-set", "wds/", "--data-path", write_stream(tmp_path, files=files), "--num-classes", "3"]
    # not by torchrun, which ends all ranks as soon as one has ended
    shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": tiny.free_port()}
    ranks = [tiny.Process(["main.py", *model, *data, "--num-workers", "0"], RANK=rank, **shared) for rank in (0, 1)]
    outputs = [rank.output() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], outputs
    for rank, output in enumerate(outputs):
        assert f"main.py: rank {rank}: run ended: only 6 of 7 validation images" in output


@pytest.mark.slow
def test_same_flags_twice_are_bitwise_identical(tmp_path):
    for name, workers in (("first", "0"), ("second", "2")):
        run(*tiny.TINY, *FEW, "--num-workers", workers, "--output-dir", tmp_path / name)
    for key in ("model", "model_ema"):
        assert_same_bits(weights(tmp_path / "first", key=key), weights(tmp_path / "second", key=key))


@pytest.mark.process
def test_bare_srun_starts_a_process_group(tmp_path):
    shared = {"SLURM_JOB_ID": 7, "SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_NUM_NODES": 1, "SLURM_STEP_ID": 0}
    shared |= {"SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": tiny.free_port()}
    command = ["main.py", *tiny.PLAIN, *FEW, "--batch-size", "32", "--output-dir", tmp_path]
    ranks = [tiny.Process(command, SLURM_PROCID=rank, SLURM_LOCALID=rank, **shared) for rank in (0, 1)]
    outputs = [rank.output() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert "effective batch 64 images" in outputs[0]
    assert outputs[1] == ""


@pytest.mark.process
def test_a_mistake_ends_all_ranks_with_a_one_line_error():
    output = tiny.torchrun(2, "main.py", *tiny.TINY, "--batch-size", "4096", status=1)  # torchrun's own status is 1
    assert "main.py: error: --batch-size 4096" in output
    assert "exitcode  : 2" in output


@pytest.mark.process
def test_a_busy_port_ends_with_status_2_and_one_line():
    with socket.create_server(("", 0)) as busy:
        port = busy.getsockname()[1]
        launched = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        output = tiny.run("main.py", *tiny.TINY, "--output-dir", "", status=2, **launched)
    assert output.startswith(f"main.py: error: MASTER_PORT={port}: ") and output.count("\n") == 1


@pytest.mark.process
def test_a_poll_gives_the_largest_numbers_of_the_call_before(tmp_path):
    script = tmp_path / "poll.py"
    script.write_text(
        "import os, sys, time; sys.path.insert(0, os.getcwd()); import utils; world = utils.init_distributed('cpu')\n"
        "poll, numbers = utils.Poll(), []\n"
        "for turn in range(4):\n"
        "    time.sleep(0.2 * ((turn + world.rank) % 2))\n"
        "    numbers.append(poll(10 * turn + world.rank, -turn - world.rank))\n"
        "    assert utils.agree(turn) == [turn]\n"  # other collectives run meanwhile
        "print(numbers, flush=True)\n"
        "utils.shut_down_distributed()\n"
    )
    output = tiny.torchrun(2, script)
    assert output.count("[[0.0, 0.0], [1.0, 0.0], [11.0, -1.0], [21.0, -2.0]]") == 2


@pytest.fixture
def two_hosts():
    """Create two connected network namespaces; yield the commands to enter them.

    Neither has an interface with the address of this machine's name.
    """
    names = [f"deit{os.getpid()}{end}" for end in "ab"]
    links = [f"v{os.getpid()}{end}" for end in "ab"]

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "delete", name)
            ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1], "netns", names[1])
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs root and ip for network namespaces ({getattr(error, 'stderr', None) or error})")
        for number, (name, link) in enumerate(zip(names, links, strict=True), 1):
            ip("-n", name, "address", "add", f"10.99.0.{number}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "route", "add", "default", "dev", link)
            # Debian gives a machine's own name an address of its own; the other machine knows the real one.
            folder = Path("/etc/netns") / name
            stack.callback(shutil.rmtree, folder)
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"{'127.0.1.1' if number == 1 else '10.99.0.1'} deitmaster\n")
        yield [["ip", "netns", "exec", name] for name in names], links


@pytest.mark.process
@pytest.mark.parametrize("master", ["10.99.0.1", "deitmaster"])
def test_ranks_of_two_hosts_meet_through_the_interface_between_them(two_hosts, master):
    code = "import os, utils; world = utils.init_distributed('cpu'); found = utils.agree(world.rank, -world.rank); "
    code += "print(found, os.environ['GLOO_SOCKET_IFNAME'], flush=True); utils.shut_down_distributed()"
    shared = {"WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": master, "MASTER_PORT": 29511}
    ranks = []
    for rank, enter in enumerate(two_hosts[0]):
        environment = tiny.environment(RANK=rank, GLOO_SOCKET_IFNAME=None, **shared)
        command, out = [*enter, sys.executable, "-c", code], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        ranks.append(subprocess.Popen(command, cwd=tiny.REPOSITORY, env=environment, text=True, **out))
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    # before that, torch may say that the other has no name
    assert [output.splitlines()[-1] for output in outputs] == [f"[1.0, 0.0] {link}" for link in two_hosts[1]], outputs


LISTING = """
import json, os, sys, tempfile
from pathlib import Path
from unittest import mock
sys.path.insert(0, os.getcwd())
import torchvision, datasets, utils
folder, world, results = Path(sys.argv[1]), utils.init_distributed("cpu"), {}
for case in ("good", "empty class", "unexpected", "not shared"):
    tempfile.tempdir = str(folder / ("other" if world.rank and case == "not shared" else "temporary"))
    images = None if case == "unexpected" else datasets.PathImages
    options = datasets.DataOptions("IMNET", str(folder / ("bad" if case == "empty class" else "good")))
    result = results[case] = {}
    listing = mock.patch.object(datasets, "image_files", wraps=datasets.image_files)
    with listing as walk, mock.patch.object(datasets, "PathImages", images):
        try:
            parts = datasets.read_sources(options, world.local_rank)
        except Exception as error:
            parts, result["error"] = (), f"{type(error).__name__}: {error}"
    result["walks"] = walk.call_count
    utils.barrier()  # the first rank deletes the file
    result["temporary files"] = os.listdir(tempfile.tempdir)
    for part, name in zip(parts, ("train", "val")):
        theirs = torchvision.datasets.ImageFolder(folder / "good" / name)
        samples = [(part.images.describe(index), int(part.targets[index])) for index in part.order]
        result[name] = samples == theirs.samples and part.class_names == tuple(theirs.classes)
        result["samples"] = part.class_samples
        result["mapped"] = any("deit-" in line for line in Path("/proc/self/maps").read_text().splitlines())
Path(folder, f"rank{world.rank}.json").write_text(json.dumps(results))
utils.shut_down_distributed()
"""


@pytest.fixture(scope="module")
def listings(tmp_path_factory):
    """What two ranks found in folders, by case."""
    folder = tmp_path_factory.mktemp("listings")
    for name in ("good", "bad"):
        tiny.write_folders(folder / name, ["cat", "caf\udce9", "dog"], per_class=2)
    (folder / "good/train/cat/\udce9 \n.png").touch()
    (folder / "bad/train/emu").mkdir()
    for name in ("temporary", "other"):
        (folder / name).mkdir()
    (folder / "listing.py").write_text(LISTING)
    tiny.torchrun(2, folder / "listing.py", folder)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return {case: [rank[case] for rank in ranks] for case in ranks[0]}


@pytest.mark.process
def test_two_ranks_share_one_list_of_a_folder(listings):
    first, second = listings["good"]
    assert first == {"walks": 6, "temporary files": [], "train": True, "val": True, "mapped": True} | {
        "samples": first["samples"]
    }
    assert second == first | {"walks": 0} and len(set(first["samples"])) == 3


@pytest.mark.process
def test_what_is_wrong_with_a_folder_is_said_on_both_ranks(listings):
    first, second = listings["empty class"]
    assert first["error"].startswith("UserError: --data-path") and "train/ for class emu" in first["error"]
    assert second["error"] == first["error"] and second["walks"] == 0 and second["temporary files"] == []


@pytest.mark.process
def test_an_unexpected_error_of_the_list_ends_both_ranks(listings):
    first, second = listings["unexpected"]
    assert first["error"].startswith("TypeError: ")
    assert second["error"] == f"RunError: the first process of this machine: {first['error']}"


@pytest.mark.process
def test_ranks_without_a_common_temporary_folder_are_a_user_error(listings):
    first, second = listings["not shared"]
    assert first["train"] and "error" not in first
    assert second["error"].startswith("UserError: TMPDIR ") and "/other: the first process" in second["error"]


@pytest.mark.process
def test_distillation_runs_on_two_ranks(tmp_path):
    small = [*FEW, "--opt", "sgd", "--batch-size", "32"]
    run(*tiny.RESNET, *small, "--epochs", "1", "--output-dir", tmp_path / "teacher")
    flags = ["--distillation-type", "soft", "--teacher-model", "test_resnet"]
    flags += ["--teacher-path", tmp_path / "teacher" / "best.pth", "--output-dir", tmp_path / "student"]
    tiny.torchrun(2, "main.py", *tiny.TINY, *small, *flags)
    record = tiny.log_of(tmp_path / "student")[-1]
    for name in ("train_loss_base", "train_loss_distillation", "train_teacher_acc1", "train_teacher_agreement"):
        assert name in record
    combined = 0.5 * record["train_loss_base"] + 0.5 * record["train_loss_distillation"]
    assert record["train_loss"] == pytest.approx(combined, abs=1e-4)


@pytest.mark.process
def test_sums_over_three_ranks_do_not_depend_on_when_a_run_began():
    # torch orders its gradient buckets anew after a process's first step, and three numbers have two sums
    assert tiny.torchrun(3, "tests/three_ranks.py").count("equal") == 3


@pytest.mark.process
def test_threads_are_divided_among_local_ranks():
    code = "import torch, utils; utils.init_distributed('cpu'); print(torch.get_num_threads())"
    assert int(tiny.run("-c", code, OMP_NUM_THREADS=None)) == utils.available_cpus()


@pytest.mark.process
@pytest.mark.compile
def test_a_compiled_run_writes_the_names_of_an_uncompiled_one(tmp_path):
    shallow = ["--model-kwargs", "embed_dim=48", "depth=1", "num_heads=3"]
    tiny.run("main.py", *tiny.PLAIN, *FEW, *shallow, "--compile", "--output-dir", tmp_path)
    names = weights(tmp_path).keys()
    assert "blocks.0.attn.qkv.weight" in names and not any("_orig_mod" in name for name in names)
    assert tiny.log_of(tmp_path)[0]["train_loss"] < 3


@pytest.mark.process
@pytest.mark.compile
@pytest.mark.parametrize("words", [[], ["checkpointing"]], ids=["plain", "checkpointing"])
def test_compiled_ranks_follow_a_falling_keep_rate(words):
    # in several gradient buckets: torch cannot split a graph in which the keep rate is a symbol
    assert tiny.torchrun(2, "tests/compiled_ranks.py", *words).count("equal") == 2


@pytest.mark.process
def test_a_long_barrier_outlasts_the_timeout_of_others():
    assert tiny.torchrun(2, "tests/late_rank.py").count("waited") == 2
