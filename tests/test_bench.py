"""The benchmark at a tiny size; its timings are not checked."""

import json
import os
import sys
import time
import types

import pytest
import tiny
import torch

from tools import bench
from utils import RunError

SMALL = ["--batch-size", "2", "--steps", "1", "--rounds", "1", "--input-size", "32", "--teacher", "test_resnet"]
SMALL += ["--models", "test_vit", "--device", "cpu"]
DEIT = ["--models", "deit_tiny_patch16_224"]
CPU = torch.device("cpu")


def run(folder, capsys, *sections, flags=()):
    """Run these sections; return their rows in the file, and the printed text."""
    file = folder / "bench.json"
    bench.main([*SMALL, *flags, "--only", *sections, "--output", str(file)])
    written = json.loads(file.read_text())
    assert written["environment"]["torch"] == torch.__version__ and written["settings"]["batch_size"] == 2
    output = capsys.readouterr().out.splitlines()
    for name in sections:
        assert name in output
        for row in written[name]:
            assert any(text.strip().startswith(row["name"]) for text in output)
            assert_spread(row, "seconds" if name == "start" else "images_per_second")
    return [written[name] for name in sections]


def assert_spread(row, *names):
    for name in names:
        assert 0 < row[f"{name}_min"] <= row[name] <= row[f"{name}_max"]


def settled(*flags):
    return bench.settle(bench.get_parser().parse_args([*SMALL, *flags]), CPU)


def test_augmentation_is_compared_for_three_kinds_of_images(tmp_path, capsys):
    (rows,) = run(tmp_path, capsys, "augmentation")
    assert [row["name"] for row in rows] == ["32 px to 32 px", "32 px to 32 px", "256 px to 32 px"]
    for row in rows:  # of a single round
        assert row["ratio"] == pytest.approx(row["images_per_second"] / row["images_per_second_timm"])
        assert "one thread each" in row["against"]


def test_both_pipelines_give_views_of_the_same_images():
    for loader in bench._readers(settled(), CPU, 40, 48, 0):
        loader.set_epoch(0)
        batches = list(loader)
        positions = torch.cat([batch.positions for batch in batches])
        assert positions.tolist() == list(range(8))  # four batches of two
        views = torch.cat([batch.images for batch in batches])
        assert views.shape == (8, 3, 48, 48) and views.dtype == torch.float32
        assert views.amin() < -1.5 and views.amax() > 1.5  # normalized noise


@pytest.mark.slow
def test_steps_are_compared_and_their_operations_counted(tmp_path, capsys, monkeypatch):
    (rows,) = run(tmp_path, capsys, "step", flags=DEIT)
    (row,) = rows
    assert row["ratio"] == pytest.approx(row["images_per_second"] / row["images_per_second_timm"])
    width, tokens = 192, 5
    block = 12 * width * width * tokens + 2 * tokens * tokens * width
    assert row["flops_per_image"] == 6 * (12 * block + 4 * 768 * width + width * 1000)
    assert row["utilisation"] is None  # of a CPU

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    fast = row | {"images_per_second": 1e6, "images_per_second_min": 5e5, "images_per_second_max": 2e6}
    fast |= {"precision": "torch.bfloat16", "flops_per_image": 98_900_000}
    used = bench.utilisation(fast, torch.device("cuda"))
    assert list(used.values()) == pytest.approx([0.1, 0.05, 0.2])
    assert "10.0 % of the device's peak" in bench.line(fast | used)
    assert bench.utilisation(fast | {"precision": "None"}, torch.device("cuda"))["utilisation"] is None


@pytest.mark.parametrize("loop", [bench._our_steps, bench._timms_steps])
def test_both_loops_train_and_average_every_weight(loop, monkeypatch):
    built, averages = [], []

    def spy(owner, name, made):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: made.append(original(*args, **options)) or made[-1])

    spy(bench.models, "build_model", built)
    spy(bench.timm, "create_model", built)
    spy(bench.engine, "Ema", averages)
    spy(bench.timm.utils, "ModelEmaV3", averages)
    options = bench.run_flags(settled(), "--model-ema-decay", "0.5", "--drop-path", "0", "--lr", "1")
    args = bench.parse_args(options)
    batch = bench.Batch(torch.randn(2, 3, 32, 32), torch.tensor([3, 4]), torch.arange(2))
    work = loop(args, [batch], CPU)
    before = {name: weight.clone() for name, weight in built[0].named_parameters()}
    assert work() == 2 and work() == 2
    average = dict(averages[0].module.named_parameters())
    for name, weight in built[0].named_parameters():
        assert not torch.equal(weight, before[name]), name
        assert not torch.equal(average[name], weight) and not torch.equal(average[name], before[name]), name


@pytest.mark.slow
def test_evit_is_compared_in_training_and_inference(tmp_path, capsys, monkeypatch):
    build = bench.speed_test.build
    monkeypatch.setattr(bench.speed_test, "build", lambda name, *rest: build(name.replace("small", "tiny"), *rest))
    (rows,) = run(tmp_path, capsys, "evit")
    assert [(row["mode"], row["keep_rate"]) for row in rows] == [
        (mode, keep) for mode in ("training", "inference") for keep in (None, 0.7, 0.5)
    ]
    assert all(row["model"].startswith("evit_small") == (row["keep_rate"] is not None) for row in rows)


@pytest.mark.slow
def test_every_way_to_be_taught_is_compared(tmp_path, capsys):
    (rows,) = run(tmp_path, capsys, "distillation")
    assert [row["name"].split()[0] for row in rows] == ["no", "cached", "50", "live"]


@pytest.mark.process
def test_whole_runs_are_timed(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(bench, "EPOCHS", 2)
    begin = time.perf_counter()
    runs, starts = run(tmp_path, capfd, "end-to-end", "start")
    assert [row["name"] for row in runs] == ["main.py --augment host", "main.py --augment device"]
    for row in runs:
        assert_spread(row, "ratio", "images_per_second_bare")
    (row,) = starts
    assert row["starts"] == 1 and row["seconds"] < time.perf_counter() - begin


def test_runs_on_a_cpu_are_timed_in_processes_of_their_own(tmp_path, capsys, monkeypatch):
    started = []

    class Process:
        returncode = 0

        def __init__(self, command, env, **options):
            folder = bench.Path(command[-1])
            folder.mkdir()
            started.append((env.get("LD_PRELOAD"), env.get("OMP_NUM_THREADS")))
            rates = (0.5, len(started))
            (folder / "log.txt").write_text("".join(json.dumps({"images_per_second": r}) + "\n" for r in rates))

        def communicate(self):
            return "", ""

    monkeypatch.setattr(bench, "subprocess", types.SimpleNamespace(Popen=Process, PIPE=None))
    monkeypatch.setattr(bench, "available_cpus", lambda: 2)
    monkeypatch.setattr(bench.ctypes.util, "find_library", lambda name: f"lib{name}.so.4")
    monkeypatch.setenv("LD_PRELOAD", "another.so")  # of this process; both are set for each run
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (rows,) = run(tmp_path, capsys, "cpu")
    library = "libtcmalloc_minimal.so.4"
    assert started == [(None, None), (None, "1"), (None, "1"), (library, None), (library, "1"), (library, "1")]
    assert [row["images_per_second"] for row in rows] == [1, 2 + 3, 4, 5 + 6]
    assert rows[3]["ratio"] == 11 and rows[3]["name"] == "tcmalloc, one run per core"
    monkeypatch.setattr(Process, "returncode", 2)
    monkeypatch.setattr(Process, "communicate", lambda self: ("", "a line\nmain.py: error: no space\n"))
    with pytest.raises(RunError, match="status 2: .*main.py: error: no space"):
        bench.cpu(settled(), CPU)


@pytest.mark.process
@pytest.mark.slow
def test_a_run_on_a_cpu_tells_its_images_per_second(monkeypatch):
    monkeypatch.setattr(bench, "SMALL_RUN", [*bench.SMALL_RUN, "--train-fraction", "0.1"])
    assert bench._rate_of_runs({**os.environ, "OMP_NUM_THREADS": "1"}, 1) > 0


def test_an_epoch_is_held_against_what_was_timed_before_and_after_it(tmp_path, monkeypatch):
    def train(script, run_name):
        folder = sys.argv[sys.argv.index("--output-dir") + 1]
        for rate in (1.0, 20.0, 30.0):
            assert bench.engine.evaluate_all(None, None) == []
            with open(f"{folder}/log.txt", "a") as file:
                file.write(json.dumps({"images_per_second": rate}) + "\n")

    monkeypatch.setattr(bench.runpy, "run_path", train)
    between = iter((10.0, 20.0, 40.0))
    assert bench._epochs_of_a_run(bench.run_flags(settled()), lambda: next(between)) == ([20.0, 30.0], [15.0, 30.0])


def test_finished_sections_are_kept_when_a_later_one_fails(tmp_path, capsys, monkeypatch):
    def fails(args, device):
        raise RunError("the disk is full")

    row = {"name": "fast", "starts": 3} | dict.fromkeys(("seconds", "seconds_min", "seconds_max"), 1.5)
    monkeypatch.setattr(bench, "SECTIONS", {"start": lambda args, device: [row], "step": fails})
    with pytest.raises(SystemExit):
        bench.main([*SMALL, "--only", "start", "step", "--output", str(tmp_path / "out" / "bench.json")])
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["start"] == [row]
    captured = capsys.readouterr()
    assert "1.50" in captured.out and captured.err == "bench: error: the disk is full\n"


def test_defaults_depend_on_the_device(monkeypatch):
    plain = bench.get_parser().parse_args(["--rounds", "9"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    small, large = bench.settle(plain, CPU), bench.settle(plain, torch.device("cuda"))
    assert (small.batch_size, small.compile, len(small.models), small.rounds) == (32, False, 1, 9)
    assert (large.batch_size, large.compile, len(large.models), large.rounds) == (256, True, 3, 9)
    assert large.output.name.startswith("bench-nvidia-h100-80gb-hbm3-20") and large.output.suffix == ".json"
    assert not bench.settle(bench.get_parser().parse_args(["--no-compile"]), torch.device("cuda")).compile


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only", "step", "stpe"], ["--only stpe", "no such section", "end-to-end"]),
        (["--data-path", "/nowhere"], ["--data-path /nowhere", "no such folder"]),
    ],
)
def test_a_mistake_is_a_one_line_error_before_anything_is_measured(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SECTIONS", {**bench.SECTIONS, "augmentation": None, "step": None})
    with tiny.user_error(*words):
        settled(*flags)
    with pytest.raises(SystemExit) as info:
        bench.main([*SMALL, *flags])
    assert info.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--models", "deit_tiny_patch16_224", "deit_tinny_patch16_224"],
            "--models deit_tinny_patch16_224: timm has no",
        ),
        (["--teacher", "resnet5"], "--teacher resnet5: timm has no such model"),
        (["--input-size", "40"], "--input-size 40 40: 40 is not a multiple of the 16 px patch"),
    ],
)
def test_a_wrong_model_is_found_before_anything_is_measured(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as info:
        bench.main([*SMALL, *DEIT, *flags])
    assert info.value.code == 2 and words in capsys.readouterr().err


def test_a_later_run_of_a_day_keeps_the_earlier_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        names.append(settled().output)
        names[-1].parent.mkdir(exist_ok=True)
        names[-1].touch()
    assert [name.name.removeprefix(names[0].stem) for name in names] == [".json", "-2.json", "-3.json"]
