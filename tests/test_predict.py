"""tools.predict against timm: the same weights, and the transform that timm makes for them."""

import csv
import io
import json
import os

import numpy as np
import pytest
import timm
import torch
from PIL import ExifTags, Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo, create_transform

from flags import parse_args
from tools import command, predict

NAMES = ["cat", "dog\x1b[31m\nred", "<b>bird</b>, 猫", "fish"]
SIZE = {"img_size": 96, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
KWARGS = ["--model-kwargs", "embed_dim=48", "depth=2", "num_heads=3"]
FLAGS = ["--input-size", "96", "--patch-size", "16", *KWARGS]
DISTILLED, PLAIN = "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"


def new_model(name, num_classes=4, **options):
    """Build a model whose logits differ by several units, so that the class order is unambiguous."""
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=num_classes, **SIZE, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    file = tmp_path_factory.mktemp("run") / "best.pth"
    model = new_model(DISTILLED)
    average = {key: value * 0.9 for key, value in model.state_dict().items()}
    args = vars(parse_args(["--model", DISTILLED, *FLAGS, "--data-set", "hfds/me/private", "--eval-crop-ratio", "0.8"]))
    torch.save({"model": model.state_dict(), "model_ema": average, "args": args, "class_names": NAMES}, file)
    return str(file)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five photos of noise in several sizes and formats, two of them in a folder below."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    (folder / "deep").mkdir()
    for number, name in enumerate(("a.jpg", "b.png", "c.webp", "deep/d.jpg", "deep/e.png")):
        pixels = generator.integers(0, 255, (6 + number, 9 - number, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((130 + 20 * number, 190 - 10 * number)).save(folder / name)
    return folder


def files_of(folder):
    return [str(folder / name) for name in ("a.jpg", "b.png", "c.webp", "deep/d.jpg", "deep/e.png")]


def run(capsys, *flags, status=0):
    """Standard output and error of the tool."""
    words = [*map(str, flags), "--amp", "off"]
    if status:
        with pytest.raises(SystemExit) as info:
            predict.main(words)
        assert info.value.code == status
    else:
        predict.main(words)
    return capsys.readouterr()


def table_of(output):
    """path -> {index: probability} of JSON output."""
    return {row["path"]: {p["index"]: p["probability"] for p in row["predictions"]} for row in json.loads(output)}


def expected(model, file, crop, score=lambda logits: logits.softmax(dim=1)):
    transform = create_transform(
        (96, 96),
        crop_pct=crop,
        interpolation="bicubic",
        mean=model.pretrained_cfg["mean"],
        std=model.pretrained_cfg["std"],
    )
    with torch.no_grad():
        return score(model(transform(Image.open(file).convert("RGB"))[None]))[0]


def assert_as_timm(found, model, crop, **options):
    for file, row in found.items():
        wanted = expected(model, file, crop, **options)
        assert torch.allclose(torch.tensor([row[index] for index in range(len(wanted))]), wanted, atol=1e-5), file


# -- probabilities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", ["1", "2", "64"])
def test_predictions_are_those_of_timm_with_the_same_weights(checkpoint, photos, capsys, batch_size):
    out = run(capsys, "--resume", checkpoint, photos, "--format", "json", "--batch-size", batch_size).out
    found = table_of(out)
    assert sorted(found) == sorted(files_of(photos))
    assert_as_timm(found, new_model(DISTILLED), crop=0.8)  # whose eval is the mean of the two heads
    for row in json.loads(out):
        values = [p["probability"] for p in row["predictions"]]
        assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(1, abs=1e-4)
        assert all(p["class"] == NAMES[p["index"]] for p in row["predictions"])


def test_ema_weights_and_the_crop_ratio_are_used_if_asked_for(checkpoint, photos, capsys):
    flags = ["--ema", "--eval-crop-ratio", "1", "--format", "json"]
    found = table_of(run(capsys, "--resume", checkpoint, photos / "a.jpg", *flags).out)
    model = new_model(DISTILLED)
    model.load_state_dict({key: value * 0.9 for key, value in model.state_dict().items()})
    assert_as_timm(found, model, crop=1.0)


def test_a_photo_is_turned_by_its_exif_orientation(checkpoint, photos, tmp_path, capsys):
    upright, turned = tmp_path / "upright.png", tmp_path / "turned.png"
    image, exif = Image.open(photos / "b.png"), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turn by 270 degrees to see it
    image.save(upright)
    image.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    found = table_of(run(capsys, "--resume", checkpoint, upright, turned, "--format", "json").out)
    assert found[str(upright)] == found[str(turned)]
    image.transpose(Image.Transpose.ROTATE_90).save(turned)
    assert (
        found[str(turned)] != table_of(run(capsys, "--resume", checkpoint, turned, "--format", "json").out)[str(turned)]
    )


def test_models_trained_with_bce_have_sigmoids(checkpoint, photos, tmp_path, capsys):
    saved = torch.load(checkpoint, weights_only=True)
    torch.save(saved | {"args": saved["args"] | {"bce_loss": True}}, tmp_path / "bce.pth")
    said = run(capsys, "--resume", tmp_path / "bce.pth", photos, "--format", "json")
    assert_as_timm(table_of(said.out), new_model(DISTILLED), crop=0.8, score=torch.sigmoid)
    assert "do not sum to 1" in said.err
    assert run(capsys, "--resume", tmp_path / "bce.pth", photos).out.startswith("sigmoid")


def test_keep_rate_and_input_size_act(photos, tmp_path, capsys):
    model = new_model("evit_tiny_patch16_224", drop_loc=(0,))
    args = vars(parse_args(["--model", "evit_tiny_patch16_224", *FLAGS, "--drop-loc", "0"]))
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "evit.pth")
    flags = ["--resume", tmp_path / "evit.pth", photos / "a.jpg", "--format", "json"]
    outputs = [run(capsys, *flags, *more).out for more in ([], ["--base-keep-rate", "0.2"], ["--input-size", "64"])]
    assert len(set(outputs)) == 3
    assert json.loads(outputs[0])[0]["predictions"][0]["class"].startswith("class ")


# -- weights without a checkpoint of ours ------------------------------------------------------------------------------


def test_timm_weights_have_their_own_size_crop_and_names(photos, tmp_path, capsys):
    folder, model = tmp_path / "published", new_model(PLAIN)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "input_size": [3, 96, 96],
        "crop_pct": 0.7,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "num_classes": 4,
        "interpolation": "bicubic",
        "label_names": ["n1", "n2", "n3", "n4"],
        "label_descriptions": {"n2": "second"},
    }
    about = {"architecture": PLAIN, "num_classes": 4, "model_args": SIZE, "pretrained_cfg": config}
    (folder / "config.json").write_text(json.dumps(about))
    out = run(capsys, "--model", f"local-dir:{folder}", "--pretrained", photos, "--format", "json").out
    model.pretrained_cfg |= config
    assert_as_timm(table_of(out), model, crop=0.7)
    assert {p["class"] for p in json.loads(out)[0]["predictions"]} == {"n1", "second", "n3", "n4"}


def test_a_name_of_timm_has_the_size_crop_and_normalization_of_its_weights(photos, capsys, monkeypatch):
    def without_network(name, pretrained=False, num_classes=None, **options):
        torch.manual_seed(5)
        return create(name, **({"num_classes": num_classes} if num_classes else {}), **options)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", without_network)
    name = "vit_tiny_patch16_384.augreg_in21k_ft_in1k"
    out = run(capsys, "--model", name, "--pretrained", photos / "b.png", "--topk", "1000", "--format", "json").out
    (row,) = table_of(out).values()
    model = without_network(name, num_classes=1000).eval()
    transform = create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        view = transform(Image.open(photos / "b.png").convert("RGB"))[None]
        wanted = model(view).softmax(dim=1)[0]
    assert view.shape == (1, 3, 384, 384)
    assert torch.allclose(torch.tensor([row[index] for index in range(1000)]), wanted, atol=1e-6)


def test_an_official_file_has_the_classes_of_imagenet(photos, tmp_path, capsys):
    model = new_model(PLAIN, num_classes=1000)
    torch.save({"model": model.state_dict()}, tmp_path / "official.pth")
    flags = ["--model", PLAIN, *FLAGS, "--topk", "1000", "--format", "json"]
    out = run(capsys, photos, "--resume", tmp_path / "official.pth", *flags).out
    assert_as_timm(table_of(out), model, crop=0.875)  # as its own evaluation has it
    names = ImageNetInfo().label_descriptions()
    assert all(p["class"] == names[p["index"]] for p in json.loads(out)[0]["predictions"])
    table = run(capsys, photos, "--resume", tmp_path / "official.pth", *flags[:-2]).out
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize(("outputs", "named"), [(4, 4), (6, 4), (1000, 4), (3, 0)])
def test_stored_names_are_used_as_far_as_there_are_any(outputs, named):
    model = torch.nn.Module()
    model.num_classes = outputs
    expected = [*NAMES[:named], *(f"class {index}" for index in range(named, outputs))]
    assert predict.class_names({"class_names": NAMES}, model) == expected


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_infinite_logits_have_no_probability(score):
    logits = torch.tensor([[0.0, 1.0], [torch.inf, 0.0], [-torch.inf, 0.0], [torch.nan, 0.0]], dtype=torch.float16)
    assert predict.probabilities(logits, score).isfinite().all(dim=1).tolist() == [True, False, False, False]


def test_weights_that_are_not_clear_are_a_one_line_error(checkpoint, photos, tmp_path, capsys):
    def line(*flags):
        error = run(capsys, photos, *flags, status=2).err
        assert error.count("\n") == 1
        return error

    assert "add --resume FILE, or --model NAME --pretrained" in line()
    assert "add --resume FILE" in line("--model", PLAIN)
    assert "add --resume FILE" in line("--pretrained")
    assert "--resume and --pretrained both" in line("--resume", checkpoint, "--pretrained")
    assert "pass the file as --resume x.pth" in line("--model", PLAIN, "--finetune", "x.pth")
    assert "--ema" in line("--model", PLAIN, "--pretrained", "--ema")
    assert "timm has no such model" in line("--model", "deit_tiny_patch16_225", "--pretrained")
    assert "was trained with --patch-size 16" in line("--resume", checkpoint, "--patch-size", "8")
    assert "did you mean --topk" in line("--resume", checkpoint, "--topk1")


def test_flags_of_main_keep_their_values_among_those_of_the_tool(checkpoint):
    words = ["--no-pretrained", "a.jpg", "b.jpg", "--num_workers", "0", "--topk=3", *KWARGS, "--amp=off", "--ema"]
    own, args, weights, *_ = command.parse(predict.build_parser(), ["--resume", checkpoint, *words])
    assert (own.images, own.topk, own.ema, own.resume) == (["a.jpg", "b.jpg"], 3, True, checkpoint)
    assert (args.pretrained, args.num_workers, args.amp, args.model_kwargs["depth"]) == (False, 0, "off", 2)
    assert torch.equal(weights["norm.weight"], torch.load(checkpoint, weights_only=True)["model_ema"]["norm.weight"])


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_missing_path_is_a_one_line_error_before_a_model_is_built(checkpoint, photos, capsys, monkeypatch):
    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("built"))
    said = run(capsys, "--resume", checkpoint, photos, photos / "gone.jpg", status=2)
    assert said.err == f"predict: error: images {photos / 'gone.jpg'}: no such file or folder; check the path\n"
    (photos.parent / "nothing").mkdir(exist_ok=True)
    assert "holds no images" in run(capsys, "--resume", checkpoint, photos.parent / "nothing", status=2).err
    (photos.parent / "nothing" / "1.HEIC").touch()
    said = run(capsys, "--resume", checkpoint, photos.parent / "nothing", status=2).err
    assert "holds no images" in said and "; convert its 1 .heic" in said


def test_images_that_cannot_be_read_are_named_and_the_others_predicted(checkpoint, tmp_path, capsys):
    Image.new("RGB", (70, 70), "red").save(tmp_path / "z.png")
    Image.new("RGB", (70, 70), "red").save(tmp_path / "b.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "z.png").read_bytes()[:-30])
    (tmp_path / "lost.jpg").symlink_to(tmp_path / "gone")
    (tmp_path / "notes.txt").write_text("")
    os.mkfifo(tmp_path / "pipe.jpg")
    said = run(capsys, "--resume", checkpoint, tmp_path, "--format", "json", "--batch-size", "2", status=1)
    assert list(table_of(said.out)) == [str(tmp_path / "b.png"), str(tmp_path / "z.png")]
    for name in ("broken.jpg", "cut.png", "lost.jpg", "pipe.jpg"):
        assert said.err.count(f"cannot predict {tmp_path / name} (") == 1
    assert "pipe.jpg (is a FIFO, not a regular file)" in said.err
    assert "4 of 6 images have no prediction" in said.err and "1 files are not read: 1 .txt" in said.err
    said = run(capsys, "--resume", checkpoint, tmp_path / "broken.jpg", "--format", "json", status=1)
    assert json.loads(said.out) == []


def test_logits_that_are_not_finite_are_no_prediction(checkpoint, photos, capsys, monkeypatch):
    monkeypatch.setattr(predict, "probabilities", lambda logits, _: logits * float("nan"))
    said = run(capsys, "--resume", checkpoint, photos, "--format", "csv", status=1)
    assert said.err.count("logits are not finite") == 5 and len(said.out.splitlines()) == 1


# -- formats -----------------------------------------------------------------------------------------------------------


def test_csv_and_table_say_what_json_says(checkpoint, photos, capsys):
    flags = ["--resume", checkpoint, photos, "--topk", "2"]
    found = json.loads(run(capsys, *flags, "--format", "json").out)
    rows = list(csv.reader(io.StringIO(run(capsys, *flags, "--format", "csv").out)))
    assert rows[0] == ["path", "class_1", "probability_1", "class_2", "probability_2"]
    lines = run(capsys, *flags).out.splitlines()
    assert lines[0].split() == ["softmax", "class", "image"] and max(map(len, lines)) <= 80
    groups = "\n".join(lines[1:]).split("\n\n")
    assert len(found) == len(rows) - 1 == len(groups) == 5
    for row, cells, group in zip(found, rows[1:], groups, strict=True):
        assert cells[0] == row["path"] and len(group.splitlines()) == 2
        for number, (prediction, line) in enumerate(zip(row["predictions"], group.splitlines(), strict=True)):
            shown = prediction["class"].replace("\n", "\\n").replace("\x1b", "\\x1b")
            assert cells[1 + 2 * number] == shown
            assert float(cells[2 + 2 * number]) == prediction["probability"]
            assert line.startswith(f"{100 * prediction['probability']:5.1f} %  {shown}")


def test_one_class_per_image_is_one_line_per_image(checkpoint, photos, capsys):
    lines = run(capsys, "--resume", checkpoint, photos, "--topk", "1").out.splitlines()
    assert len(lines) == 6
    for line, file in zip(lines[1:], files_of(photos), strict=True):
        assert file.endswith(line.rpartition("  ")[2].lstrip("…"))


def test_file_and_class_names_do_not_reach_a_terminal_as_they_are(checkpoint, tmp_path, capsys):
    names = ["a\n\x1b[31m<b>.png", os.fsdecode(b"\xff.png")]
    for name in names:
        Image.new("RGB", (70, 70), "red").save(tmp_path / name)
    (tmp_path / "x\n\x1b[2Jx.jpg").write_bytes(b"")
    for kind in ("table", "csv", "json"):
        said = run(capsys, "--resume", checkpoint, tmp_path, "--format", kind, status=1)
        assert "\x1b" not in said.out + said.err and r"x\n\x1b[2Jx.jpg" in said.err
        if kind == "csv":
            assert len(said.out.splitlines()) == 3 and r"a\n\x1b[31m<b>.png" in said.out
    assert sorted(table_of(said.out)) == sorted(str(tmp_path / name) for name in names)


def test_wide_characters_take_two_columns():
    assert predict._columns("猫a\u0301") == 3
    assert predict._shortened("猫猫猫", 5) == "猫猫…" and predict._shortened("/a/b.jpg", 6, from_left=True) == "…b.jpg"
