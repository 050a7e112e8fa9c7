"""Tools that take a trained model: the patches they draw, the accuracies they measure."""

import argparse
import json
import os
import re

import numpy as np
import pytest
import timm
import tiny
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import ExifTags, Image
from timm.layers import resample_abs_pos_embed

import main
from models_evit import EViTBlock, evit_blocks, reduce_tokens
from tools import (
    command,
    compare,
    export,
    outcomes,
    pictures,
    plot_runs,
    predict,
    report,
    show_augmentation,
    summarize,
    tradeoff,
    visualize_tokens,
)
from utils import World

MODEL = ["--model", "evit_tiny_distilled_patch16_224", *tiny.MODEL, "--drop-loc", "0", "--base-keep-rate", "0.5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Output folder of an EViT trained for an epoch; 16 patches, of which layer 0 keeps 8."""
    folder = tmp_path_factory.mktemp("run")
    flags = [
        "--shrink-start-epoch",
        "0",
        "--warmup-epochs",
        "0",
        "--epochs",
        "1",
        "--amp",
        "off",
        "--model-ema-decay",
        "0.9",
    ]
    flags += ["--train-fraction", "0.25", "--batch-size", "16", "--lr", "1e-2"]
    main.cli([*MODEL, *tiny.DATA, *flags, "--output-dir", str(folder)])
    return folder


@pytest.fixture
def checkpoint(run):
    return str(run / "best.pth")


def line_of(capsys, tool, *flags):
    """The one line with which the tool refuses, after the lines of its log."""
    with pytest.raises(SystemExit) as exit_info:
        tool.main([str(flag) for flag in flags])
    error = re.sub(r"^\d\d:\d\d:\d\d .*\n", "", capsys.readouterr().err, flags=re.MULTILINE)
    assert exit_info.value.code == 2 and error.count("\n") == 1, error
    return error


def model_of(checkpoint):
    args = torch.load(checkpoint, weights_only=True)
    model = timm.create_model(
        "evit_tiny_distilled_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=2,
        num_heads=3,
        num_classes=10,
        drop_loc=(0,),
        keep_rate=0.5,
    )
    model.load_state_dict(args["model"])
    return model.eval()


# -- what checkpoints say ----------------------------------------------------------------------------------------------


def test_the_checkpoint_names_model_and_data_and_flags_go_before_it(checkpoint):
    own, run, weights, *_ = command.parse(command.get_parser("x", None), ["--resume", checkpoint])
    assert (run.model, run.data_set, run.drop_loc) == ("evit_tiny_distilled_patch16_224", "DIGITS", [0])
    assert run.output_dir == "output" and run.resume == ""  # how it was trained is not what is asked now
    _, run, *_ = command.parse(
        command.get_parser("x", None), ["--base_keep_rate", "0.25", "--resume", checkpoint, "--data_set", "CIFAR"]
    )
    assert (run.base_keep_rate, run.data_set) == (0.25, "CIFAR")
    model = command.load_model(run, weights, own.resume, torch.device("cpu"))
    assert evit_blocks(model)[0].keep_rate == 0.25 and not model.training and model.num_classes == 10


def test_a_checkpoint_of_the_original_implementation_is_read_by_its_flags(checkpoint, tmp_path):
    published = argparse.Namespace(
        model="evit_tiny_distilled_patch16_224",
        input_size=32,
        drop_loc="(0,)",
        base_keep_rate=0.5,
        fuse_token=False,
        data_set="CIFAR",
        data_path="/data",
        lr=1e-3,
        patch_size=8,
    )
    torch.save({"model": model_of(checkpoint).state_dict(), "args": published}, tmp_path / "their.pth")
    flags = ["--resume", str(tmp_path / "their.pth"), "--model-kwargs", "embed_dim=48", "depth=2", "num_heads=3"]
    own, run, weights, *_ = command.parse(command.get_parser("x", None), flags)
    assert run.input_size == [32] and run.drop_loc == [0] and run.fuse_token is False
    assert not evit_blocks(command.load_model(run, weights, own.resume, torch.device("cpu")))[0].fuse_token


def test_ema_weights_are_taken_with_the_ema_flag(checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    for flags, name in (([], "model"), (["--ema"], "model_ema")):
        _, _, weights, *_ = command.parse(command.get_parser("x", None), ["--resume", checkpoint, *flags])
        assert all(torch.equal(weights[key], value) for key, value in saved[name].items())


def test_ema_weights_of_timm_and_weights_in_a_wrapper_are_read(checkpoint, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)
    average = saved["model_ema"]
    wrapped = {f"model.{key}": value for key, value in saved["model"].items()}
    torch.save({"state_dict": wrapped, "state_dict_ema": average, "args": saved["args"]}, tmp_path / "x.pth")
    for flags, expected in ((["--ema"], average), ([], saved["model"])):
        own, run, weights, *_ = command.parse(
            command.get_parser("x", None), ["--resume", str(tmp_path / "x.pth"), *flags]
        )
        model = command.load_model(run, weights, own.resume, torch.device("cpu"))
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_a_model_is_evaluated_at_another_image_size(checkpoint):
    flags = ["--resume", checkpoint, "--input-size", "16", "64"]  # as many patches
    own, run, weights, *_ = command.parse(command.get_parser("x", None), flags)
    model, pos_embed = command.load_model(run, weights, own.resume, torch.device("cpu")), weights["pos_embed"]
    expected = resample_abs_pos_embed(pos_embed, [2, 8], old_size=[4, 4], num_prefix_tokens=2)
    torch.testing.assert_close(model.pos_embed, expected)


def test_checkpoints_that_do_not_say_enough_are_a_one_line_error(checkpoint, tmp_path, capsys):
    bare = tmp_path / "bare.pth"
    torch.save({"model": model_of(checkpoint).state_dict()}, bare)
    assert "does not name its model; add --model" in line_of(capsys, tradeoff, "--resume", bare)
    unnamed = line_of(capsys, tradeoff, "--resume", bare, "--model-kwargs", "depth=2")
    assert "does not name its model; add --model" in unnamed
    assert "has no EMA weights" in line_of(capsys, tradeoff, "--resume", bare, *MODEL[:-2], "--ema")
    assert "no such file" in line_of(capsys, tradeoff, "--resume", tmp_path / "gone.pth")
    contradiction = line_of(capsys, tradeoff, "--resume", checkpoint, "--patch-size", "4")
    assert "was trained with --patch-size 8, not 4" in contradiction
    assert "did you mean --base-keep-rate" in line_of(capsys, tradeoff, "--resume", checkpoint, "--base-keep-rat=1")
    ignored = line_of(capsys, tradeoff, "--resume", checkpoint, "--base-keep-rate", "0.5", "--keep-rates", "1")
    assert "--base-keep-rate: is a flag of main.py that this tool does not read; drop it" in ignored


# -- visualize_tokens --------------------------------------------------------------------------------------------------


def naive_follow(model, image):
    """Follow kept patches with lists of names; a fused token has the name None."""
    said = []
    hooks = [block.keep.register_forward_hook(lambda _m, args, _o: said.append(args)) for block in evit_blocks(model)]
    with torch.no_grad():
        model(image[None])
    for hook in hooks:
        hook.remove()
    names, kept = list(range(model.patch_embed.num_patches)), []
    for _, attentiveness, num_keep, fuse in said:
        ranked = sorted(range(len(names)), key=lambda token: -attentiveness[0, token].item())
        names = [names[token] for token in ranked[:num_keep]] + ([None] if fuse else [])
        kept.append(names)
    return kept


@pytest.mark.parametrize("fuse", [True, False])
def test_followed_patches_are_those_the_layers_keep(fuse):
    survivals = 0
    for seed in range(8):
        torch.manual_seed(seed)
        size = {"img_size": (48, 80), "depth": 5, "embed_dim": 48, "num_heads": 3}
        model = timm.create_model("vit_tiny_patch16_224", **size, block_fn=EViTBlock)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        reduce_tokens(model.eval(), 0.6, drop_loc=(1, 2, 4), fuse_token=fuse)
        image = torch.randn(3, 48, 80)
        reductions, expected = visualize_tokens.follow(model, image), naive_follow(model, image)
        assert [reduction.layer for reduction in reductions] == [1, 2, 4]
        for reduction, names in zip(reductions, expected, strict=True):
            assert reduction.kept.nonzero()[:, 0].tolist() == sorted(name for name in names if name is not None)
        survivals += any(names.count(None) > 1 for names in expected)
    # the interesting case did occur: a fused token that a later layer kept
    assert survivals > 0 if fuse else survivals == 0


def panel(picture, height, width, column, columns, below=0):
    """A panel [height, width, 3] of the last row of a sheet, found from its right and lower edges."""
    right = picture.shape[1] - pictures.MARGIN - (columns - 1 - column) * (width + pictures.GAP)
    bottom = picture.shape[0] - pictures.MARGIN - below
    return picture[bottom - height : bottom, right - width : right].astype(int)


@pytest.mark.parametrize("color", ["noise", 0, 96, 128, 255])
def test_dropped_patches_differ_visibly_from_kept_ones(color):
    pixels = np.random.default_rng(0).integers(0, 256, (240, 480, 3), dtype=np.uint8)
    if color != "noise":
        pixels = np.full_like(pixels, color)
    kept = torch.tensor([True, False, False, True, True, False, True, True])  # of 2 rows and 4 columns
    picture = np.asarray(visualize_tokens.draw(pixels, [visualize_tokens.Reduction(3, kept)], (2, 4)))
    assert (panel(picture, 240, 480, 0, 2) == pixels).all()
    for patch in range(8):
        row, column = divmod(patch, 4)
        position = np.s_[row * 120 : row * 120 + 120, column * 120 : column * 120 + 120]
        drawn, original = panel(picture, 240, 480, 1, 2)[position], pixels[position].astype(int)
        if kept[patch]:
            assert (drawn == original).all()
            continue
        assert (drawn[:, :, :1] == drawn).all()  # gray
        differs = np.abs(drawn - original).max(axis=2) >= 40
        assert differs.mean() > 0.2  # everywhere, or where the hatching is
        assert np.ptp(drawn) >= 40  # the hatching itself


@pytest.mark.parametrize("fuse", [True, False])
def test_pictures_say_what_became_of_dropped_patches(checkpoint, tmp_path, monkeypatch, fuse):
    drawn = []
    monkeypatch.setattr(pictures, "sheet", lambda *args: drawn.append(args) or Image.new("RGB", (1, 1)))
    saved = torch.load(checkpoint, weights_only=True)
    torch.save(saved | {"args": saved["args"] | {"fuse_token": fuse}}, trained := tmp_path / "trained.pth")
    visualize_tokens.main(["--resume", str(trained), "--num-images", "1", "--output", str(tmp_path)])
    ((rows, headings, title, caption),) = drawn
    assert headings == ["model input\n16 patches", "after layer 0\n8 kept (50 %)"] and len(rows[0][1]) == 2
    assert ", class " in title and ("fused into one token" in caption) == fuse and ("dropped" in caption) != fuse


@pytest.mark.parametrize("options", [{}, {"dynamic_img_size": True, "dynamic_img_pad": True}])
@pytest.mark.parametrize("size", [(47, 47), (33, 50)])
def test_sizes_that_are_no_multiple_of_the_patch_are_drawn(size, options):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=size, depth=2, embed_dim=48, num_heads=3, block_fn=EViTBlock, **options
    )
    reduce_tokens(model.eval(), 0.5, drop_loc=(0,))
    (reduction,) = visualize_tokens.follow(model, torch.randn(3, *size))
    grid = [-(-side // 16) if "dynamic_img_pad" in options else side // 16 for side in size]
    assert list(model.patch_embed.dynamic_feat_size(size)) == grid and len(reduction.kept) == grid[0] * grid[1]
    pixels = np.random.default_rng(0).integers(0, 200, (*size, 3), dtype=np.uint8)
    zoom = -(-pictures.SMALLEST_PANEL // size[1])
    picture = np.asarray(visualize_tokens.draw(pixels, [reduction], grid, (16, 16)))
    drawn = panel(picture, size[0] * zoom, size[1] * zoom, 1, 2)[::zoom, ::zoom]
    for row in range(size[0]):  # pixel by pixel
        for column in range(size[1]):
            position = (row // 16, column // 16)
            inside = position[0] < grid[0] and position[1] < grid[1]
            kept = inside and bool(reduction.kept[position[0] * grid[1] + position[1]])
            assert (drawn[row, column] == pixels[row, column]).all() == kept


def test_names_that_are_not_utf8_are_escaped(checkpoint, tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / os.fsdecode(b"\xfe.png"))
    flags = ["--resume", checkpoint, "--images", str(folder)]
    visualize_tokens.main([*flags, "--output", str(folder / "out")])
    assert r"\udcff/\udcfe.png, 16 patches" in capsys.readouterr().out
    show_augmentation.main(
        ["--images", str(folder), "--output", str(folder / "out.png"), "--input-size", "32", "--views", "0"]
    )
    assert r"\udcff/out.png: 2 images" in capsys.readouterr().out
    export.main(["--resume", checkpoint, "--output", str(folder / "m.pt2")])
    assert r"\udcff/m.pt2: " in capsys.readouterr().out
    (folder / "log.txt").write_text('{"epoch": 0, "test_acc1": 50.0}\n')
    summarize.main([str(folder)])
    assert r"\udcff       1    50.00" in capsys.readouterr().out
    plot_runs.main([str(folder), "--keys", "test_acc1", "--output", str(folder / "curves.png")])
    assert r"\udcff/curves.png: " in capsys.readouterr().out


def test_pictures_of_a_data_set_and_of_files(checkpoint, tmp_path, capsys):
    visualize_tokens.main(["--resume", checkpoint, "--num-images", "3", "--output", str(tmp_path / "digits")])
    assert capsys.readouterr().out.count("16 patches, 8 after layer 0") == 3
    assert len(list((tmp_path / "digits").glob("*.png"))) == 3
    (tmp_path / "in" / "deep").mkdir(parents=True)
    Image.new("RGB", (50, 40), "red").save(tmp_path / "in" / "deep" / "a.jpg")
    Image.new("L", (32, 32)).save(tmp_path / "in" / "b.png")
    for ignored in ("notes.txt", "._b.png", "deep/.hidden.jpg"):
        (tmp_path / "in" / ignored).write_text("no image")
    (tmp_path / "in" / "deep" / "loop").symlink_to("..")
    lone = tmp_path / "lone.webp"
    Image.new("RGB", (32, 32), "blue").save(lone)
    flags = ["--resume", checkpoint, "--images", str(tmp_path / "in"), str(lone), "--output", str(tmp_path / "files")]
    visualize_tokens.main(flags)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split(",")[0] for line in said] == [
        str(tmp_path / "in" / "b.png"),
        str(tmp_path / "in" / "deep" / "a.jpg"),
        str(lone),
    ]
    picture = Image.open(tmp_path / "files" / "0001.png")  # 32 px enlarged to at least 224, twice
    assert picture.width == 2 * 224 + pictures.GAP + 2 * pictures.MARGIN and picture.height > 224


def test_photos_need_no_data_set_and_take_no_flags_of_one(checkpoint, tmp_path, capsys):
    saved = torch.load(checkpoint, weights_only=True)
    elsewhere = {"data_set": "IMNET", "data_path": "/gone"}
    torch.save(saved | {"args": saved["args"] | elsewhere}, trained := tmp_path / "trained.pth")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    flags = ["--resume", str(trained), "--images", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    visualize_tokens.main(flags)
    assert "16 patches, 8 after layer 0" in capsys.readouterr().out
    for given in (["--data_path", "x"], ["--val-split=val"], ["--no-upright"], ["--data-set", "CIFAR"]):
        flag = given[0].partition("=")[0].replace("_", "-").replace("no-", "")
        assert f"{flag}: is for images of a data set" in line_of(capsys, visualize_tokens, *flags, *given)


def test_pictures_of_an_earlier_call_are_replaced(checkpoint, tmp_path, capsys):
    flags = ["--resume", checkpoint, "--output", str(tmp_path)]
    visualize_tokens.main([*flags, "--num-images", "3"])
    (tmp_path / "notes.png").touch()
    (tmp_path / "0001.png").unlink()  # a gap
    visualize_tokens.main([*flags, "--num-images", "1"])
    assert sorted(os.listdir(tmp_path)) == ["0000.png", "notes.png"]
    Image.new("RGB", (32, 32)).save(tmp_path / "0007.png")
    line = line_of(capsys, visualize_tokens, *flags, "--num-images", "1")
    assert "0007.png does not say that it is of this tool" in line
    assert sorted(os.listdir(tmp_path)) == ["0000.png", "0007.png", "notes.png"]
    line = line_of(capsys, visualize_tokens, *flags, "--images", tmp_path, "--num-images", "2")
    assert "--num-images: is for validation images" in line


def test_what_cannot_be_drawn_is_a_one_line_error(checkpoint, tmp_path, capsys):
    tool, resume = visualize_tokens, ("--resume", checkpoint, "--output", tmp_path / "out")
    assert "no such file or folder" in line_of(capsys, tool, *resume, "--images", tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in line_of(capsys, tool, *resume, "--images", tmp_path / "empty")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    assert "cannot read image" in line_of(capsys, tool, *resume, "--images", tmp_path / "broken.jpg")
    assert "drops no patches" in line_of(capsys, tool, *resume, "--base-keep-rate", "1")
    (tmp_path / "file").write_text("")
    assert "file" in line_of(capsys, tool, "--resume", checkpoint, "--output", tmp_path / "file" / "deeper")
    tool.main(["--resume", checkpoint, "--num-images", "1", "--base-keep-rate", "0.99", "--output", str(tmp_path)])
    assert "16 patches, all kept" in capsys.readouterr().out


# -- tradeoff ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tradeoff_has_the_accuracy_of_the_run_at_its_own_rate(run, checkpoint, tmp_path, capsys):
    file = tmp_path / "new" / "tradeoff.json"
    flags = ["--resume", checkpoint, "--keep-rates", "1", "0.5", "--amp", "off", "--rounds", "1", "--steps", "1"]
    tradeoff.main([*flags, "--num-workers", "0", "--batch-size", "50", "--output", str(file)])
    written = json.loads(file.read_text())
    whole, half = written["rows"]
    logged = tiny.log_of(run)[-1]
    assert half["acc1"] == logged["test_acc1"] and half["loss"] == pytest.approx(logged["test_loss"], rel=1e-5)
    assert whole["loss"] != half["loss"] and whole["images"] == half["images"] == 355
    assert (whole["tokens"], half["tokens"]) == ([18, 18], [11, 11]) and half["macs"] < whole["macs"]
    assert whole["ratio"] == 1.0 and half["ratio"] == pytest.approx(
        half["images_per_second"] / whole["images_per_second"]
    )
    assert whole["acc1_change"] == 0.0 and whole["acc1_change_interval"] == [0.0, 0.0]
    assert half["acc1_change"] == pytest.approx(half["acc1"] - whole["acc1"])
    for row in (whole, half):
        assert row["acc1_interval"] == outcomes.wilson(round(row["acc1"] * 3.55), 355)
    assert written["settings"]["batch_size"] == 50 and "date" in written["environment"]
    assert Image.open(file.with_suffix(".png")).width > 100
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 80


def test_tradeoff_tables_have_at_most_80_columns():
    usual = {"acc1": 100.0, "acc1_interval": [94.34, 100.0], "acc1_change": -100.0, "ratio": 12.34, "macs": 1234.56e9}
    row = usual | {"acc1_change_interval": [-100.0, -66.17], "images_per_second": 123456.7}
    rates = (1.0, [0.75, 0.75, 0.55], [0.5, 0.7], [0.75] * 24)
    lines = tradeoff.table([row | {"keep_rate": rate} for rate in rates] + [row | {"keep_rate": 0.5, "macs": None}])
    lines = lines.splitlines()
    assert max(map(len, lines)) <= 80 and lines[2] == "0.75,0.75,0.55" and lines[4].split()[0] == "0.5,0.7"
    assert lines[1].split() == [
        "1",
        "100.00",
        "94.34-100.00",
        "-100.00",
        "-100.0",
        "-66.2",
        "123456.7",
        "12.34",
        "1234.6",
    ]
    assert "".join(lines[5:7]) == ",".join(["0.75"] * 24) and lines[-1].endswith("     -")


def row_of(keep_rate, acc1, speed, images=400, spread=0.1):
    ends = {"images_per_second_min": speed * (1 - spread), "images_per_second_max": speed * (1 + spread)}
    return {"keep_rate": keep_rate, "acc1": acc1, "images_per_second": speed, "images": images} | ends


def plotted(monkeypatch, folder, rows):
    """The axes of the tradeoff plot of these rows."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (save(self, *a, **k), figures.append(self)))
    tradeoff.plot(rows, folder / "plot.png", "model on $data$")
    return figures[0].axes[0]


def test_tradeoff_plot_has_error_bars_and_a_wide_axis(tmp_path, monkeypatch):
    axes = plotted(monkeypatch, tmp_path, [row_of(1.0, 50.0, 100.0, 10000), row_of([0.7, 0.5], 50.2, 200.0, 10000)])
    across, along = axes.collections
    bars = [segment.tolist() for segment in along.get_segments()]
    # 1.96 sqrt(0.5 * 0.5 / 10000) = 0.98 percentage points; Wilson center 50
    assert bars[0] == [[100, pytest.approx(49.02, abs=1e-3)], [100, pytest.approx(50.98, abs=1e-3)]]
    assert across.get_segments()[1].tolist() == [[pytest.approx(180), 50.2], [pytest.approx(220), 50.2]]
    assert [text.get_text() for text in axes.texts] == ["1", "0.7,0.5"]
    assert np.ptp(axes.get_ylim()) == pytest.approx(5) and axes.get_xlim()[0] == 0
    assert "images/s" in axes.get_xlabel() and "10,000 images" in axes.get_xlabel() and "%" in axes.get_ylabel()
    assert axes.get_title() == r"model on \$data\$"


@pytest.mark.parametrize("accuracy", [0.0, 50.0, 100.0])
def test_labels_of_near_points_do_not_overlap(tmp_path, monkeypatch, accuracy):
    rows = [row_of(rate, accuracy, 500 + 4 * number) for number, rate in enumerate([0.9, 0.8, 0.75, 0.7, 0.65])]
    axes = plotted(monkeypatch, tmp_path, rows)
    axes.figure.draw_without_rendering()  # at its own resolution, not that of the file
    renderer = axes.figure.canvas.get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]
    assert len(boxes) == 5
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
        assert axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1


@pytest.mark.slow
def test_each_layer_may_have_its_rate_and_a_deit_may_be_evaluated(checkpoint, tmp_path, capsys):
    bare = tmp_path / "deit.pth"
    torch.save({"model": model_of(checkpoint).state_dict()}, bare)
    flags = ["--resume", str(bare), *MODEL[:-2], *tiny.DATA, "--drop-loc", "0,1", "--rounds", "1"]
    tradeoff.main([*flags, "--keep-rates", "1", "0.5,0.25", "--output", str(tmp_path / "t.json")])
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert rows[1]["keep_rate"] == [0.5, 0.25]
    assert rows[1]["tokens"] == [2 + 8 + 1, 2 + 3 + 1]
    assert "0.5,0.25" in capsys.readouterr().out


def test_what_has_no_tradeoff_is_a_one_line_error(checkpoint, tmp_path, capsys):
    deit = ["--model", "deit_tiny_distilled_patch16_224", *tiny.MODEL]
    bare = tmp_path / "deit.pth"
    torch.save({"model": model_of(checkpoint).state_dict()}, bare)
    assert "no EViT blocks" in line_of(capsys, tradeoff, "--resume", bare, *deit, *tiny.DATA)
    for name in ("a.png", "a.PNG", "a.Svg"):
        assert "is the name of the plot" in line_of(capsys, tradeoff, "--resume", checkpoint, "--output", name)
    assert "1.5 is not above 0 and at most 1" in line_of(
        capsys, tradeoff, "--resume", checkpoint, "--keep-rates", "1.5"
    )
    for part in ("train", "val"):
        for kind in ("a", "b"):
            (tmp_path / "data" / part / kind).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / "data" / part / kind / "1.png")
    flags = ["--resume", checkpoint, "--data-set", "IMNET", "--data-path", tmp_path / "data"]
    assert "the model has 10 classes, the data have 2; name data" in line_of(capsys, tradeoff, *flags)


# -- compare -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_models_are_compared_on_the_same_images(run, checkpoint, tmp_path, capsys):
    """Each once; models differ by the images that one of the two gets wrong."""
    other = tmp_path / "other.pth"
    saved = torch.load(checkpoint, weights_only=True)
    saved["model"]["head.bias"] += 0.2 * torch.arange(10)
    torch.save(saved, other)
    flags = [checkpoint, checkpoint, other, "--num-workers", "0", "--amp", "off"]
    flags += ["--output", tmp_path / "new" / "c.json"]
    compare.main([str(flag) for flag in flags])
    rows = json.loads((tmp_path / "new" / "c.json").read_text())["rows"]
    assert rows[0]["acc1"] == tiny.log_of(run)[-1]["test_acc1"] and rows[0]["images"] == 355
    assert rows[0]["acc1_change"] == 0 and rows[0]["acc1_change_interval"] == [0, 0]
    assert rows[1]["acc1_change"] == pytest.approx(rows[1]["acc1"] - rows[0]["acc1"]) and rows[1]["acc1_change"] != 0
    low, high = rows[1]["acc1_change_interval"]
    assert low < rows[1]["acc1_change"] < high
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].endswith(str(other)) and f"{low:+.2f} {high:+.2f}" in lines[2]


@pytest.fixture(scope="module")
def turned_photos(tmp_path_factory):
    """Class folders of 10 photos each, all with an EXIF orientation."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for kind in "ab":
        (folder / kind).mkdir()
        for number in range(10):
            pixels = generator.integers(0, 255, (40, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{kind}{number}.jpg", exif=exif)
    return folder


def write_checkpoint(file, photos, num_classes=2, names="ab", **args):
    """A random model that names these photos as its data, 0.3 of them held out."""
    torch.manual_seed(0)
    size = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    size_of_image = {"img_size": args.get("input_size", [32])[0], "patch_size": 8}
    model = timm.create_model("evit_tiny_patch16_224", num_classes=num_classes, drop_loc=(0,), **size_of_image, **size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    usual = {"model_kwargs": size, "input_size": [32], "patch_size": 8, "val_fraction": 0.3, "drop_loc": [0]}
    args = usual | {"base_keep_rate": None} | args
    args |= {"model": "evit_tiny_patch16_224", "data_set": "IMNET", "data_path": str(photos)}
    torch.save({"model": model.state_dict(), "args": args, "class_names": list(names)}, file)
    return str(file)


PHOTOS = ["--num-workers", "0", "--device", "cpu", "--amp", "off"]


def rows_of(tool, folder, *flags):
    tool.main([*map(str, flags), *PHOTOS, "--output", str(folder / "rows.json")])
    return json.loads((folder / "rows.json").read_text())["rows"]


def test_models_of_other_held_out_images_are_not_compared(turned_photos, tmp_path, capsys):
    """The smaller held-out part is in the larger one, so no model was trained on it."""
    files = [write_checkpoint(tmp_path / f"{n}.pth", turned_photos, val_fraction=n / 10) for n in (3, 1)]
    line = line_of(capsys, compare, *files, *PHOTOS)
    assert "--val-fraction: " in line and "trained with 0.3" in line and "add --val-fraction 0.1" in line
    rows = rows_of(compare, tmp_path, *files, "--val-fraction", "0.1")
    assert [row["images"] for row in rows] == [2, 2]
    assert f"{files[0]}: evaluated with another setting than in training: --val-fraction was 0.3" in (
        capsys.readouterr().err
    )


def test_compared_model_that_was_trained_on_the_images_is_a_warning(turned_photos, tmp_path, capsys):
    """Another data set, whose checkpoint holds out no fraction: the data are split with that of the first."""
    files = [write_checkpoint(tmp_path / "1.pth", turned_photos), str(tmp_path / "2.pth")]
    other = torch.load(files[0])
    other["args"] |= {"data_set": "csv/list.csv", "val_fraction": 0.0}
    torch.save(other | {"run": {"file_names": 1}}, files[1])
    rows_of(compare, tmp_path, *files)
    assert f"{files[1]}: was trained on other files than those that --val-fraction 0.3" in capsys.readouterr().err


def test_unknown_tag_of_a_model_is_a_one_line_error(checkpoint, tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    line = line_of(capsys, predict, "--model", "test_vit.typo", "--pretrained", tmp_path / "x.png")
    assert line.startswith("predict: error: --model test_vit.typo: Invalid pretrained tag")


def test_each_compared_model_has_its_own_preprocessing(turned_photos, tmp_path):
    changes = ({}, {"upright": True}, {"input_size": [80], "eval_crop_ratio": 0.5})
    files = [write_checkpoint(tmp_path / f"{n}.pth", turned_photos, **change) for n, change in enumerate(changes)]
    rows = rows_of(compare, tmp_path, *files)
    alone = [rows_of(compare, tmp_path, file)[0] for file in files]
    assert [row["loss"] for row in rows] == [row["loss"] for row in alone] and len({row["loss"] for row in rows}) == 3


def test_data_with_some_of_the_classes_are_compared(turned_photos, tmp_path):
    """As main.py --eval does: they keep the class indices of the checkpoint."""
    file = write_checkpoint(tmp_path / "x.pth", turned_photos, num_classes=3, names=["_", "a", "b"])
    half = write_checkpoint(tmp_path / "y.pth", turned_photos, num_classes=3, names=["_", "a", "b"], base_keep_rate=0.5)
    partly = write_checkpoint(tmp_path / "z.pth", turned_photos, num_classes=4, names=["_", "a", "b"])
    one, other, fewer_names = rows_of(compare, tmp_path, file, half, partly)
    assert fewer_names["images"] == 6 and fewer_names["loss"] != one["loss"]
    assert one["images"] == 6 and one["loss"] != other["loss"]
    rates = ["--keep-rates", "0.7", "0.5", "--rounds", "1", "--steps", "1", "--batch-size", "4"]
    assert [row["loss"] for row in rows_of(tradeoff, tmp_path, "--resume", file, *rates)] == [
        pytest.approx(one["loss"]),
        pytest.approx(other["loss"]),
    ]


def test_compared_data_of_other_classes_have_a_remedy(turned_photos, tmp_path, capsys):
    first = write_checkpoint(tmp_path / "2.pth", turned_photos)
    other = write_checkpoint(tmp_path / "3.pth", turned_photos, num_classes=3, names="xyz")
    line = line_of(capsys, compare, first, other, *PHOTOS)
    assert f"--resume {other}: the model has 3 classes, the data have 2; name data" in line


def test_models_of_other_classes_are_not_compared(checkpoint, tmp_path, capsys):
    saved = torch.load(checkpoint, weights_only=True)
    saved["class_names"] = [f"number {name}" for name in saved["class_names"]]
    torch.save(saved, tmp_path / "other.pth")
    line = line_of(capsys, compare, checkpoint, tmp_path / "other.pth", "--num-workers", "0")
    assert str(tmp_path / "other.pth") in line and "10 of 10 classes differ" in line
    assert "no such file" in line_of(capsys, compare, checkpoint, tmp_path / "gone.pth")
    assert "name all checkpoints without this flag" in line_of(capsys, compare, checkpoint, "--resume", checkpoint)


@pytest.mark.slow
def test_classes_in_another_order_are_evaluated_by_name(checkpoint, tmp_path, capsys):
    saved = torch.load(checkpoint, weights_only=True)
    saved["class_names"] = saved["class_names"][::-1]
    for name, value in saved["model"].items():
        if name.startswith("head"):
            saved["model"][name] = value.flip(0)
    torch.save(saved, turned := tmp_path / "turned.pth")
    words = ["--num-workers", "0", "--amp", "off"]
    compare.main([str(word) for word in (checkpoint, turned, *words, "--output", tmp_path / "c.json")])
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert rows[0]["acc1"] == rows[1]["acc1"] and rows[1]["acc1_change"] == 0
    capsys.readouterr()
    for path in (checkpoint, turned):
        main.cli(["--eval", "--resume", str(path), *words])
    said = capsys.readouterr().err
    ours, theirs = [line.split("test_loss")[1] for line in said.splitlines() if "test_loss" in line]
    assert ours == theirs and "the same classes in another order" in said


# -- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", [export, tradeoff, visualize_tokens])
def test_weights_that_are_not_finite_are_a_one_line_error(checkpoint, tmp_path, capsys, tool):
    saved = torch.load(checkpoint, weights_only=True)
    saved["model"]["norm.weight"][3] = float("nan")
    torch.save(saved, file := tmp_path / "nan.pth")
    output = ["--output", tmp_path / "out.pt2"]
    assert f"{file}: norm.weight is not finite" in line_of(capsys, tool, "--resume", file, *output)


@pytest.mark.parametrize(
    ("tool", "flag"),
    [
        (report, "--output-dir=x"),
        (report, "--compile"),
        (report, "--lr=1"),
        (compare, "--epochs=3"),
        (tradeoff, "--seed=1"),
        (predict, "--no-upright"),
        (predict, "--data-path=x"),
        (export, "--device=cpu"),
        (export, "--batch-size=7"),
        (visualize_tokens, "--amp=off"),
        (report, "--eval"),
    ],
)
def test_tools_refuse_flags_that_they_do_not_read(checkpoint, capsys, tool, flag):
    resume = [checkpoint] if tool is compare else ["--resume", checkpoint]
    line = line_of(capsys, tool, *resume, *(["x.jpg"] if tool is predict else []), flag)
    remedy = "did you mean --output?" if flag == "--output-dir=x" else "drop it"
    assert f"{flag.partition('=')[0]}: is a flag of main.py that this tool does not read; {remedy}" in line


@pytest.mark.parametrize("tool", [report, compare, tradeoff, predict, visualize_tokens])
def test_one_process_uses_a_model(checkpoint, capsys, monkeypatch, tool):
    monkeypatch.setattr(command, "init_distributed", lambda _: World(0, 2, 0, 1, torch.device("cpu")))
    resume = [checkpoint] if tool is compare else ["--resume", checkpoint]
    line = line_of(capsys, tool, *resume, *(["x.jpg"] if tool is predict else []))
    assert "WORLD_SIZE=2: one process " in line and "start it without a launcher" in line


def test_what_differs_from_training_is_logged(turned_photos, tmp_path, capsys):
    file = write_checkpoint(tmp_path / "x.pth", turned_photos)
    report.main(["--resume", file, *PHOTOS, "--val-fraction", "0.8", "--num-mistakes", "0", "--keep-rates", "0.7"])
    changed = "evaluated with another setting than in training: --val-fraction was 0.3, is 0.8"
    assert changed in capsys.readouterr().err
    photo = str(turned_photos / "a" / "a0.jpg")
    predict.main(["--resume", file, "--base-keep-rate", "0.5", photo])
    predict.main(["--resume", file, photo])
    said = capsys.readouterr().err
    assert said.count("another setting than in training: ") == 1 and "--base-keep-rate was None, is 0.5" in said
