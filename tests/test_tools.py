"""Tools on tiny inputs; their timings are not checked."""

import argparse
import csv
import importlib
import io
import json
import os
import re
import types
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from matplotlib.figure import Figure
from PIL import Image

from tools import (
    bench,
    chaos,
    checkpoint_cost,
    distillation_cost,
    loop_overhead,
    pictures,
    plot_runs,
    show_augmentation,
    speed_test,
    summarize,
)
from tools.runs import read_run, short_names
from tools.timing import describe_environment, interleaved_rates, ratio_row
from utils import UserError


def write_run(folder, *records, **config):
    """An output folder with these records, epochs counted from 0, and with a config.json of these flags."""
    folder.mkdir(parents=True)
    lines = [json.dumps({"epoch": epoch} | record) + "\n" for epoch, record in enumerate(records)]
    (folder / "log.txt").write_text("".join(lines))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def error_line(capsys, main, *flags):
    with pytest.raises(SystemExit) as end:
        main([str(flag) for flag in flags])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1, error
    return error


TOOLS = [path.stem for path in (tiny.REPOSITORY / "tools").glob("*.py") if "def main(" in path.read_text()]


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_help_of_tools_names_no_empty_default(tool, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "500")  # one line per flag
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"tools.{tool}").main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and said.startswith(f"usage: python -m tools.{tool} ")
    assert not re.search(r"default: *(None|True|False|\{|\[|''|;|$)", said, re.MULTILINE)


# -- summarize ---------------------------------------------------------------------------------------------------------


def test_summary_row_has_accuracies_epochs_and_flags(tmp_path):
    folder = write_run(
        tmp_path / "run",
        {"test_acc1": 90.0, "images_per_second": 10.0},
        {"images_per_second": 40.0},
        {"test_acc1": 80.0, "test_ema_acc1": 85.0, "images_per_second": 30.0},
        **{"epochs": 5, "model": "deit_tiny_patch16_224", "data_set": "CIFAR", "base_keep_rate": None},
    )
    row = summarize.summarize_run(read_run(tmp_path / "run"))
    assert row == {
        "folder": folder,
        "epochs": 3,
        "planned_epochs": 5,
        "test_acc1": 80.0,
        "best": 90.0,
        "best_epoch": 0,
        "test_ema_acc1": 85.0,
        "images_per_second": 30.0,
        "minutes": None,
        "model": "deit_tiny_patch16_224",
        "data_set": "CIFAR",
    }
    heading, line = summarize.table([row]).splitlines()
    assert line.split() == [folder, "3/5", "80.00", "90.00", "0", "85.00", "30", "-", "deit_tiny_patch16_224", "CIFAR"]
    assert heading.split()[:2] == ["run", "epochs"]


@pytest.mark.parametrize(
    "config, best",
    [
        ({"base_keep_rate": 0.5}, (60.0, 3)),
        ({"base_keep_rate": [0.9, 0.5]}, (60.0, 3)),  # the log has the lowest rate
        ({}, (60.0, 3)),  # without config.json, the lowest rate in the log is the final one
        ({"base_keep_rate": None}, (60.0, 3)),  # the model's default, which is the lowest in the log
        ({"base_keep_rate": 0.3}, (None, None)),  # stopped before the final rate
        ({"base_keep_rate": None, "final_keep_rate": 0.5}, (60.0, 3)),  # a model with another default
    ],
)
def test_best_accuracy_is_at_the_final_keep_rate(tmp_path, config, best):
    rates, accuracies = (1.0, 0.8, 0.7, 0.5, 0.5), (90.0, 80.0, 70.0, 60.0, 50.0)
    records = [{"keep_rate": r, "test_acc1": a} for r, a in zip(rates, accuracies, strict=True)]
    write_run(tmp_path / "run", *records, **config)
    row = summarize.summarize_run(read_run(tmp_path / "run"))
    assert (row["best"], row["best_epoch"]) == best and row["test_acc1"] == 50.0


@pytest.mark.parametrize(
    "flags, order",
    [
        ([], "b a c d"),
        (["--sort", "best"], "b a c d"),  # a and c tie
        (["--sort", "test_acc1"], "c a b d"),
        (["--sort", "epochs"], "b a c d"),  # c and d tie
        (["--sort", "folder"], "a b c d"),
        (["--sort", "model"], "c b a d"),
    ],
)
def test_summary_is_sorted(tmp_path, capsys, flags, order):
    folders = [
        write_run(tmp_path / "d", {}),  # has nothing to sort by
        write_run(tmp_path / "c", {"test_acc1": 70.0}, model="a"),
        write_run(tmp_path / "b", {"test_acc1": 80.0}, {}, {"test_acc1": 20.0}, model="b"),
        write_run(tmp_path / "a", {"test_acc1": 70.0}, {"test_acc1": 60.0}, model="c"),
    ]
    summarize.main([*folders, "--format", "json", *flags])
    found = json.loads(capsys.readouterr().out)
    assert " ".join(Path(row["folder"]).name for row in found) == order


def test_summary_as_csv_and_json_hold_the_same(tmp_path, capsys):
    name = 'a,"b"\n\x1b[31m'
    folder = write_run(tmp_path / name, {"test_acc1": 12.345678, "images_per_second": 7.0}, model="m", epochs=2)
    summarize.main([folder, "--format", "json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["folder"] == folder and row["best"] == 12.345678 and row["test_ema_acc1"] is None
    summarize.main([folder, "--format", "csv"])
    text = capsys.readouterr().out
    (parsed,) = csv.DictReader(io.StringIO(text))
    assert "\x1b" not in text and parsed.pop("folder").endswith(r'a,"b"\n\x1b[31m')
    assert parsed == {key: "" if value is None else str(value) for key, value in row.items() if key != "folder"}


def test_summary_skips_folders_without_a_log(tmp_path, capsys):
    folder = write_run(tmp_path / "run", {"test_acc1": 50.0})
    (tmp_path / "empty").mkdir()
    summarize.main([str(tmp_path / "empty"), folder])
    output = capsys.readouterr()
    assert output.err.startswith(f"summarize: skipped {tmp_path / 'empty' / 'log.txt'}: No such file or directory;")
    assert output.err.count("\n") == 1
    assert folder in output.out


@pytest.mark.process
def test_runs_are_compared_at_equal_minutes(tmp_path, capsys):
    records = [{"images_per_second": 100.0 / n, "test_acc1": 10.0 * n} for n in (1, 2, 3)]  # 1, 2 and 3 minutes
    folder = write_run(tmp_path / "run", *records, images_per_epoch=6000)
    untimed = write_run(tmp_path / "untimed", {"test_acc1": 50.0})
    for within, expected in ((0.9, [0, None, None]), (3.0, [2, 20.0, 3.0]), (100, [3, 30.0, 6.0])):
        summarize.main([folder, untimed, "--within", str(within), "--format", "json"])
        output = capsys.readouterr()
        (row,) = json.loads(output.out)
        assert [row["epochs"], row["test_acc1"], row["minutes"]] == expected
        assert f"skipped --within: {untimed}/config.json has no images_per_epoch; drop" in output.err


def test_summary_of_no_run_is_a_one_line_error(tmp_path):
    output = tiny.run("-m", "tools.summarize", tmp_path, status=2)
    assert output.count("\n") == 1 and "log.txt: No such file" in output and "--output-dir" in output


# -- plot_runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch):
    """Record the figures that are written."""
    written, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (save(self, *a, **k), written.append(self)))
    return written


def curves_of(axes):
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]


def test_plotted_values_are_those_of_the_logs(tmp_path, capsys, figures):
    one = write_run(tmp_path / "one", {"train_loss": 2.0, "test_acc1": 10.5}, {"train_loss": 1.0, "test_acc1": 30.0})
    two = write_run(tmp_path / "two", {"train_loss": 3.0}, {"train_loss": 2.5, "test_acc1": 20.0}, {"train_loss": 1.5})
    plot_runs.main([one, two, one, "--output", str(tmp_path / "new" / "curves.png")])
    (figure,) = figures
    accuracy, loss = figure.axes
    assert curves_of(accuracy) == [([0, 1], [10.5, 30.0]), ([1], [20.0])]  # not every epoch is evaluated
    assert curves_of(loss) == [([0, 1], [2.0, 1.0]), ([0, 1, 2], [3.0, 2.5, 1.5])]
    assert "%" in accuracy.get_ylabel() and accuracy.get_title() == "validation top-1 accuracy"
    assert accuracy.get_xlabel() == "epoch"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]
    styles = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in loss.lines]
    assert all(first != second for first, second in zip(*styles, strict=True))  # told apart in gray, too
    assert Image.open(tmp_path / "new" / "curves.png").width > 500
    assert "2 runs" in capsys.readouterr().out


def test_references_are_marked_in_the_first_panel(tmp_path, capsys, figures):
    folder = write_run(tmp_path / "run", {"train_loss": 2.0, "test_acc1": 10.5})
    flags = ["--reference", "5,78.5,a GPU, 3 hours", "--reference", "2,60,$b$"]
    plot_runs.main([folder, *flags, "--output", str(tmp_path / "x.png")])
    accuracy, loss = figures[0].axes
    points = [line for line in accuracy.lines if line.get_marker() == "*"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in points] == [(5.0, 78.5), (2.0, 60.0)]
    assert accuracy.get_ylim()[0] < 10.5 and accuracy.get_ylim()[1] > 78.5 and len(loss.lines) == 1
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["run", "a GPU, 3 hours", r"\$b\$"]
    for wrong in ("5,78", "x,78,name", "1,nan,name", "1,2, "):
        assert "X,Y,NAME" in error_line(capsys, plot_runs.main, folder, "--reference", wrong)


def test_axes_do_not_turn_noise_into_a_trend(tmp_path, figures):
    records = [{"test_acc1": 50.0 + x, "train_loss": 2 + x, "images_per_second": 900 + x} for x in (0.0, 0.1)]
    folder = write_run(tmp_path / "run", *records)
    plot_runs.main([folder, "--keys", *records[0], "--output", str(tmp_path / "x.png")])
    limits = [axes.get_ylim() for axes in figures[0].axes]
    assert np.ptp(limits[0]) == pytest.approx(5) and sum(limits[0]) / 2 == pytest.approx(50.05)
    assert np.ptp(limits[1]) == pytest.approx(0.21)
    assert limits[2][0] == 0 and limits[2][1] > 900


@pytest.mark.parametrize(
    "values, options, expected",
    [
        ([10.0, 20.0], {"narrowest": 5.0}, (9.5, 20.5)),
        ([10.0, 10.0], {"narrowest": 5.0}, (7.5, 12.5)),
        ([99.0, 99.5], {"narrowest": 5.0, "lowest": 0.0, "highest": 100.0}, (95.0, 100.0)),
        ([0.1], {"narrowest": 5.0, "lowest": 0.0, "highest": 100.0}, (0.0, 5.0)),
        ([0.0, 100.0], {"narrowest": 5.0, "lowest": 0.0, "highest": 100.0}, (0.0, 100.0)),
    ],
)
def test_limits_keep_width_and_bounds(values, options, expected):
    assert pictures.limits(values, **options) == pytest.approx(expected)


def test_time_axis_is_computed_from_images_and_rate(tmp_path):
    records = [{"images_per_second": rate} for rate in (100.0, 50.0)]
    for name in ("a", "b", "c"):
        write_run(tmp_path / name, *(records if name != "c" else [{}]))
    for name in ("a", "c"):
        (tmp_path / name / "config.json").write_text(json.dumps({"images_per_epoch": 6000}))
    runs = {name: read_run(tmp_path / name) for name in ("a", "b", "c")}
    label, positions = plot_runs.positions([runs["a"]], "minutes")
    assert "without evaluation" in label and positions == [[1.0, 3.0]]
    assert plot_runs.positions([runs["a"]], "images")[1] == [[6000, 12000]]
    for axis in ("minutes", "images"):
        with tiny.user_error(f"--x {axis}", "b/config.json has no images_per_epoch"):
            plot_runs.positions([runs["a"], runs["b"]], axis)
    with tiny.user_error("--x minutes", "c/log.txt has records with no images_per_second"):
        plot_runs.positions([runs["a"], runs["c"]], "minutes")


def test_plot_errors_are_a_one_line_error(tmp_path, capsys):
    folder = write_run(tmp_path / "run", {"test_acc1": 10.0, "test_loss": float("nan")})
    begun = write_run(tmp_path / "begun")
    output = ["--output", tmp_path / "x.png"]
    assert "log.txt: No such file" in error_line(capsys, plot_runs.main, tmp_path, *output)
    unknown = error_line(capsys, plot_runs.main, folder, "--keys", "test_ac1", *output)
    assert "did you mean test_acc1" in unknown and "log.txt has test_acc1, test_loss" in unknown
    assert "finite" in error_line(capsys, plot_runs.main, folder, "--keys", "test_loss", *output)
    assert "no records yet" in error_line(capsys, plot_runs.main, begun, *output)
    assert "is not named .png" in error_line(capsys, plot_runs.main, folder, "--output", tmp_path / "x.gif")
    assert not (tmp_path / "x.png").exists()


def test_runs_without_a_key_are_named(tmp_path, capsys, figures):
    folders = [write_run(tmp_path / "a", {"test_acc1": 1.0, "keep_rate": 0.7}), write_run(tmp_path / "b", {})]
    plot_runs.main([*folders, "--keys", "keep_rate", "--output", str(tmp_path / "x.png")])
    assert len(figures[0].axes[0].lines) == 1
    assert capsys.readouterr().err == f"plot_runs: {folders[1]}: no record has keep_rate; it is not in that panel\n"


def test_names_of_runs_are_drawn_as_they_are(tmp_path, figures):
    names = ["$\\frac{$", "_hidden", "a\x1b[31m", os.fsdecode(b"\xff"), "x" * 200]
    folders = [write_run(tmp_path / name / "seed0", {"test_acc1": 1.0}) for name in names]
    plot_runs.main([*folders, "--keys", "test_acc1", "--output", str(tmp_path / "x.png")])
    drawn = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert drawn[:4] == [r"\$\frac{\$", " _hidden", r"a\x1b[31m", r"\udcff"] and len(drawn[4]) <= 60


@pytest.mark.parametrize(
    "folders, names",
    [
        (["output/A", "output/B"], ["A", "B"]),
        (["output/A/seed0", "output/B/seed0"], ["A", "B"]),
        (["output/A/x", "output/A/y/x", "output/B/x"], ["A", "A/y", "B"]),
        (["output", "output/A"], ["output", "output/A"]),
        (["output/A"], ["A"]),
    ],
)
def test_names_of_runs_are_what_differs(folders, names):
    assert short_names([Path(folder) for folder in folders]) == names


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_sheet_has_all_panels_and_room_for_its_texts():
    shades = np.arange(10, 130, 20).reshape(3, 2)
    rows = [(f"label {i}", [np.full((50, 60, 3), v, np.uint8) for v in row]) for i, row in enumerate(shades)]
    picture = np.asarray(pictures.sheet(rows, ["a", "a heading that is wider than its column"]))
    for row in range(3):
        for column in range(2):
            y = picture.shape[0] - pictures.MARGIN - (2 - row) * (50 + pictures.GAP) - 50
            x = picture.shape[1] - pictures.MARGIN - (1 - column) * (60 + pictures.GAP) - 60
            assert (picture[y : y + 50, x : x + 60] == shades[row, column]).all()
            assert (picture[y - 1, x : x + 60] == 255).all()  # no text runs into a panel
            assert (picture[y : y + 50, x - 1] == 255).all()
    assert (picture[:, -pictures.MARGIN :] == 255).all()  # nor over the edge
    labels = picture[-60:-10, pictures.MARGIN : -pictures.MARGIN - 2 * 60 - pictures.GAP]
    assert labels.min() < 100


def test_texts_of_a_sheet_are_wrapped_and_escaped():
    rows = [("", [np.zeros((50, 100, 3), np.uint8)])]
    bare, long = pictures.sheet(rows, ["x"]), pictures.sheet(rows, ["x"], "many words " * 9 + "W" * 50, "\n\x1b\udcff")
    assert long.width == bare.width and long.height > bare.height + 100
    assert (np.asarray(long)[:, -pictures.MARGIN :] == 255).all()


# -- timing ------------------------------------------------------------------------------------------------------------


def test_works_take_turns_after_a_round_to_warm_up():
    calls = []

    def work(name, images):
        return lambda: calls.append(name) or images

    rates = interleaved_rates([work("a", 10), work("b", 5)], 3, torch.device("cpu"))
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert [len(each) for each in rates] == [3, 3]
    row = ratio_row([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    rate = {"images_per_second": 4.0, "images_per_second_min": 2.0, "images_per_second_max": 9.0}
    assert row == rate | {"ratio": 2.0, "ratio_min": 1.0, "ratio_max": 3.0}


@pytest.mark.process
def test_overhead_is_written_with_its_environment(tmp_path):
    flags = ["--device", "cpu", "--rounds", "1", "--steps", "1", "--batch-size", "2", "--views", "50"]
    output = tiny.run("-m", "tools.loop_overhead", *flags, "--output", tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["environment"]["torch"] == torch.__version__
    loop = written["loop"]  # of a single round
    assert loop["ratio"] == pytest.approx(loop["images_per_second"] / loop["images_per_second_bare"])
    assert output.count("ratio") == 3
    assert {"microseconds", "microseconds_min", "microseconds_max"} == written["update"].keys() and "update" in output


def test_the_time_of_an_update_is_what_the_loop_adds_to_a_bare_one(monkeypatch):
    rates = [[1000.0, 500.0, 2000.0], [2000.0, 1000.0, 1000.0]]  # updates/s of three rounds, of the loop and bare
    monkeypatch.setattr(loop_overhead, "interleaved_rates", lambda works, *_: [works[0]() and rates[0], rates[1]])
    row = loop_overhead.measure_update(argparse.Namespace(steps=1, batch_size=2, rounds=3))
    assert row == pytest.approx({"microseconds": 500, "microseconds_min": -500, "microseconds_max": 1000})


def test_environment_is_json_and_names_versions():
    environment = json.loads(json.dumps(describe_environment(torch.device("cpu"))))
    assert {"device", "torch", "torchvision", "timm", "python", "date"} <= environment.keys()


def test_speed_rows_count_tokens_and_products(tmp_path, capsys):
    flags = [
        "--models",
        "deit_tiny_patch16_224",
        "evit_tiny_patch16_224",
        "--keep-rates",
        "0.5",
        "--batch-sizes",
        "1",
        "2",
    ]
    flags += ["--input-size", "64", "--rounds", "1", "--steps", "1", "--device", "cpu"]
    speed_test.main([*flags, "--output", str(tmp_path / "speed.json")])
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [(row["model"], row["batch_size"]) for row in rows] == [
        (name, size) for size in (1, 2) for name in ("deit_tiny_patch16_224", "evit_tiny_patch16_224")
    ]
    deit, evit = rows[:2]
    assert deit["ratio"] == 1.0 and deit["tokens"] == [17] * 12
    # 16 patches -> 8 and the fused one -> 5 and the fused one -> 3 and the fused one, each with the class token
    assert evit["tokens"] == [17] * 3 + [10] * 3 + [7] * 3 + [5] * 3
    width, tokens = 192, 17
    block = (
        12 * width * width * tokens + 2 * tokens * tokens * width
    )  # qkv, projection, MLP; q·kᵀ and its product with v
    assert deit["macs"] == 12 * block + 16 * 768 * width + width * 1000
    assert evit["parameters"] == deit["parameters"] and evit["macs"] < deit["macs"]
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_speed_of_an_unknown_model_is_a_one_line_error(capsys):
    with pytest.raises(SystemExit):
        speed_test.main(["--models", "deit_tinny_patch16_224", "--device", "cpu"])
    assert "did you mean deit_tiny_patch16_224" in capsys.readouterr().err


def test_minutes_are_those_of_the_epochs_in_the_log(tmp_path):
    """Not of those before --start-epoch, and unknown after an epoch without a rate."""
    rate = {"images_per_second": 10.0}
    write_run(tmp_path / "run", rate, rate, images_per_epoch=600)
    log = (tmp_path / "run" / "log.txt").read_text()
    (tmp_path / "run" / "log.txt").write_text(
        log.replace('"epoch": 1', '"epoch": 101').replace('"epoch": 0', '"epoch": 100')
    )
    assert read_run(tmp_path / "run").values("minutes") == [None, None]  # 100 epochs of unknown time
    (tmp_path / "run" / "config.json").write_text(json.dumps({"images_per_epoch": 600, "start_epoch": 100}))
    assert read_run(tmp_path / "run").values("minutes") == [1.0, 2.0]
    write_run(tmp_path / "zero", rate, {"images_per_second": 0.0}, rate, images_per_epoch=600)
    assert read_run(tmp_path / "zero").values("minutes") == [1.0, None, None]
    write_run(tmp_path / "huge", rate, images_per_epoch=600)
    (tmp_path / "huge" / "log.txt").write_text('{"epoch": 1' + 400 * "0" + ', "images_per_second": 1}\n')
    assert read_run(tmp_path / "huge").values("minutes") == [None]


def test_a_log_without_its_first_epochs_tells_no_time(tmp_path, capsys):
    folder = write_run(tmp_path / "run", *3 * [{"images_per_second": 10.0}], images_per_epoch=600, start_epoch=0)
    log = (tmp_path / "run" / "log.txt").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "log.txt").write_text("".join(log[1:]))  # resumed from a checkpoint without its log
    summarize.main([folder, "--format", "json"])
    assert json.loads(capsys.readouterr().out)[0]["minutes"] is None
    assert "lacks the epochs before 1" in error_line(capsys, summarize.main, folder, "--within", "9")
    flags = ["--keys", "images_per_second", "--output", tmp_path / "x.png"]
    assert "use --x epoch" in error_line(capsys, plot_runs.main, folder, "--x", "minutes", *flags)
    plot_runs.main([folder, "--x", "images", *map(str, flags)])


def test_each_record_has_its_own_number_of_images(tmp_path):
    """A run may resume with another batch size; config.json is that of the last start."""
    records = [{"images_per_second": 10.0, "train_images": images} for images in (600, 600, 1200)]
    write_run(tmp_path / "run", *records, images_per_epoch=1200)
    run = read_run(tmp_path / "run")
    assert run.values("images") == [600, 1200, 2400] and run.values("minutes") == [1.0, 2.0, 4.0]
    write_run(tmp_path / "old", {"images_per_second": 10.0}, records[2], images_per_epoch=300)
    assert read_run(tmp_path / "old").values("minutes") == [0.5, 2.5]


def test_models_whose_blocks_yield_no_tokens_are_measured(capsys):
    models = ["crossvit_tiny_240", "test_efficientnet"]
    speed_test.main(["--models", *models, "--input-size", "240", "--batch-sizes", "1", "--rounds", "1", "--steps", "1"])
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert speed_test.describe(speed_test.build(models[1], None, 64, torch.device("cpu")), (64, 64))["tokens"] == []


BENCHMARKS = (bench, checkpoint_cost, distillation_cost, loop_overhead, speed_test)


@pytest.mark.parametrize("tool", BENCHMARKS, ids=lambda tool: tool.__name__)
@pytest.mark.parametrize("flags", [("--rounds", "0"), ("--steps", "-1"), ("--device", "gpu"), ("--ronds", "1")])
def test_wrong_flags_of_a_benchmark_are_a_one_line_error(tool, flags, capsys):
    with pytest.raises(SystemExit) as ended:
        tool.main(list(flags))
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert flags[0] in line or flags[1] in line


def test_a_kill_waits_until_its_rank_has_started(monkeypatch):
    killed, living = [], iter([[], [], [7]])
    monkeypatch.setattr(chaos, "kill", killed.append)
    process = types.SimpleNamespace(poll=lambda: None)
    run = types.SimpleNamespace(process=process, saves=lambda: 0, victims=lambda rank: next(living))
    assert chaos.wait_and_kill(run, "start", 0, rank=1) and killed == [[7]]


def test_chaos_needs_a_process(capsys):
    with pytest.raises(SystemExit) as ended:
        chaos.main(["--processes", "0"])
    assert ended.value.code == 2 and "0 is not at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("tool", (speed_test, distillation_cost), ids=lambda tool: tool.__name__)
def test_an_unwritable_output_costs_no_figures(tool, tmp_path, capsys, monkeypatch):
    """The table is printed before the file is written."""
    monkeypatch.setattr(tool, "measure", lambda *_: [])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        tool.main(["--device", "cpu", "--output", str(tmp_path / "file" / "out.json")])
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_peak_memory_is_what_was_held_at_once():
    def work():
        first = torch.zeros(1 << 20)  # 4 MiB
        del first
        return torch.zeros(1 << 20).add(1).numel()  # two more at once

    assert speed_test.peak_memory(work, torch.device("cpu")) == pytest.approx(2 * 4 * 2**20, rel=0.01)


@pytest.mark.slow
def test_the_whole_attention_matrix_takes_its_memory(tmp_path):
    peaks = {}
    for attention in ("auto", "math"):
        flags = ["--models", "deit_tiny_patch16_224", "--attention", attention, "--batch-sizes", "2", "--device", "cpu"]
        flags += ["--input-size", "384", "--rounds", "1", "--steps", "1", "--output", str(tmp_path / attention)]
        speed_test.main(flags)
        peaks[attention] = json.loads((tmp_path / attention).read_text())["rows"][0]["peak_memory_bytes"]
    matrix = 2 * 3 * 577 * 577 * 4  # images, heads, tokens, tokens, bytes
    assert peaks["math"] - peaks["auto"] > matrix


@pytest.mark.parametrize(
    ("tool", "flags", "words"),
    [
        (speed_test, ["--models", "deit_tiny_patch16_224", "--input-size", "8"], "8 is not a multiple of the 16 px"),
        (speed_test, ["--models", "test_resnet", "--train", "--batch-sizes", "2", "1"], "--batch-sizes 1: batch"),
        (distillation_cost, ["--student", "test_resnet", "--batch-size", "1"], "--batch-size 1: batch norm"),
        (distillation_cost, ["--teacher", "deit_tiny_patch16_224", "--input-size", "24"], "patch of --teacher deit"),
        (checkpoint_cost, ["--model", "test_resnet", "--batch-size", "1"], "--batch-size 1: batch norm"),
        (checkpoint_cost, ["--input-size", "8"], "8 is not a multiple of the 16 px patch"),
    ],
)
def test_sizes_that_a_model_cannot_take_are_a_one_line_error(tool, flags, words, capsys):
    usual = ["--device", "cpu", "--input-size", "32", "--rounds", "1", "--steps", "1"]
    usual += ["--teacher", "test_resnet"] if tool is distillation_cost else []
    assert words in error_line(capsys, tool.main, *usual, *flags)


@pytest.mark.parametrize("suffix", [".psd", ".fli", ".dcx", ".xyz"])
def test_pictures_of_formats_that_are_only_read_are_a_one_line_error(tmp_path, capsys, suffix):
    flags = ["--input-size", "32", "--aa", "none", "--output", tmp_path / f"x{suffix}"]
    assert "is not named as a picture; try x.png" in error_line(capsys, show_augmentation.main, *flags)


def test_a_distilled_model_is_timed_in_every_way_to_be_taught(tmp_path, capsys):
    flags = ["--student", "deit_tiny_distilled_patch16_224", "--teacher", "test_resnet", "--input-size", "32"]
    flags += ["--batch-size", "2", "--rounds", "1", "--steps", "2", "--device", "cpu"]
    distillation_cost.main([*flags, "--output", str(tmp_path / "cost.json")])
    rows = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert [row["teacher"].split()[0] for row in rows] == ["no", "cached", "50", "live"]
    assert rows[0]["ratio"] == 1.0 and all(row["images_per_second"] > 0 for row in rows)
    assert capsys.readouterr().out.count("images/s") == 4


def test_a_resumed_process_is_timed_to_its_first_step(tmp_path, monkeypatch):
    """With --accum-steps, a log line counts forward passes and a checkpoint updates."""
    lines = iter(["resuming epoch 0 after 10 of its 90 updates\n", "epoch 0  step 21/180  loss 2\n", "step 22/180\n"])
    calls = {"terminate": lambda: None, "communicate": lambda: None, "stderr": lines, "pid": 0}
    fake = types.SimpleNamespace(Popen=lambda *_, **__: types.SimpleNamespace(**calls), DEVNULL=None, PIPE=None)
    monkeypatch.setattr(checkpoint_cost, "subprocess", fake)
    assert checkpoint_cost.until_step([], tmp_path)["seconds"] > 0 and next(lines) == "step 22/180\n"


def test_a_middle_beyond_the_epoch_ends_at_the_first_step(tmp_path, monkeypatch):
    lines = iter(["epoch 0  step 1/180  loss 2\n", "step 2/180\n"])
    calls = {"terminate": lambda: None, "communicate": lambda: None, "stderr": lines, "pid": 0}
    fake = types.SimpleNamespace(Popen=lambda *_, **__: types.SimpleNamespace(**calls), DEVNULL=None, PIPE=None)
    monkeypatch.setattr(checkpoint_cost, "subprocess", fake)
    with pytest.raises(UserError, match="--middle 300: an epoch has 180 steps; pass at most 180"):
        checkpoint_cost.until_step([], tmp_path, 300)
    assert next(lines) == "step 2/180\n"


@pytest.mark.process
def test_saving_and_resuming_are_measured(tmp_path, capsys):
    small = ["--input-size", "32", "--batch-size", "2", "--steps", "1", "--rounds", "1", "--middle", "20"]
    flags = [*map(str, tiny.TINY), "--batch-size", "16", "--epochs", "9", "--accum-steps", "2"]
    checkpoint_cost.main([*small, "--device", "cpu", "--output", str(tmp_path / "out.json"), "--", *flags])
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["saving"]["mebibytes"] > 60 and written["saving"]["seconds_of_saving"] > 0  # four of 5.5 million
    assert written["resuming"]["images_skipped"] % 16 == 0 and written["resuming"]["images_skipped"] >= 20 * 16
    for kind in ("fresh", "resumed"):
        assert written["resuming"][kind]["seconds"] > 0 and written["resuming"][kind]["mebibytes_read"] > 1
    assert capsys.readouterr().out.count(" to the first step") == 2
