"""Exported models: files and folders compute the same as the model, without this repository."""

import functools
import json
import os
import re
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import own_blocks  # noqa: F401  registers own_vit and own_convnet
import pytest
import timm
import tiny
import torch
from PIL import ExifTags, Image
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer

import main
from augment import ViewOptions
from datasets import build_eval_transform
from models import ModelOptions, build_model, normalization
from models_evit import EViTBlock, evit_blocks, reduce_tokens
from tools import command, export, tradeoff

KWARGS = {"embed_dim": 48, "depth": 2, "num_heads": 3}
HOSTILE = ["# a\n```\n<b>\r\x1b[31m", "b\ud800\u2028", "x" * 500, *"3456789"]
MODELS = {  # name -> (timm's name, image size, flags of tokens)
    "plain": ("deit_tiny_patch16_224", (72, 72), {}),
    "distilled": ("deit_tiny_distilled_patch16_224", (72, 96), {}),
    "evit": ("evit_tiny_distilled_patch16_224", (32, 32), {"drop_loc": [0], "base_keep_rate": 0.5}),
}


def save(path, name, size, tokens, **more):
    """Save a checkpoint of a model with random weights; return the model."""
    options = ModelOptions(name, size, patch_size=8, model_kwargs=KWARGS, drop_path=0.0, **tokens)
    model = build_model(options, 10).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    args = {"model": name, "input_size": list(size), "patch_size": 8, "model_kwargs": KWARGS, "eval_crop_ratio": 0.9}
    about = {"args": args | tokens, "class_names": [f"digit {n}" for n in range(10)]}
    about |= {"best_acc1": 93.21, "epoch": 5, "best_epoch": 4}
    torch.save({"model": model.state_dict()} | about | more, path)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return, by name, the model, its checkpoint, and the folder of its export."""
    root = tmp_path_factory.mktemp("export")
    models = {name: save(root / f"{name}.pth", *settings) for name, settings in MODELS.items()}
    for name in models:
        export.main(["--resume", str(root / f"{name}.pth"), "--output", f"{root / name}/"])
    return {name: (model, root / f"{name}.pth", root / name) for name, model in models.items()}


@pytest.fixture(scope="module")
def exported(trained):
    """Return a function that exports a model to one file with this suffix, once."""

    @functools.cache
    def export_once(name, suffix):
        _, checkpoint, folder = trained[name]
        file = folder.with_suffix(suffix)
        export.main(["--resume", str(checkpoint), "--output", str(file)])
        return file

    return export_once


@pytest.fixture
def evit(trained):
    return trained["evit"][1]


def line_of(capsys, *flags):
    """The one line with which the tool refuses."""
    with pytest.raises(SystemExit) as exit_info:
        export.main([str(flag) for flag in flags])
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit_info.value.code == 2 and error.startswith("export: error: "), error
    return error


def images_of(size, batch=3):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))


def photo(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save_on_its_side(image, path):
    """Save a photo as a cell phone stores it that was held upright: viewers turn it clockwise."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)


def our_view(model, size, image):
    return build_eval_transform(ViewOptions(size, eval_crop_ratio=0.9), normalization(model))(image)


def function_of(file):
    """Return the function that an exported file computes."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def metadata_of(file):
    if file.suffix == ".onnx":
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        found = session.get_modelmeta().custom_metadata_map
    else:
        found = dict.fromkeys(("architecture", "num_classes", "class_names", *export.TRANSFORM), "")
        torch.export.load(file, extra_files=found)
    return {key: json.loads(value) for key, value in found.items()}


# -- one file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_exported_files_compute_what_the_model_computes(trained, exported, tmp_path, suffix, fuse, capsys):
    model, checkpoint, _ = trained["evit"]
    if fuse:
        file = exported("evit", suffix)
    else:
        file = tmp_path / f"model{suffix}"
        saved = torch.load(checkpoint, weights_only=True)
        torch.save(saved | {"args": saved["args"] | {"fuse_token": False}}, tmp_path / "trained.pth")
        export.main(["--resume", str(tmp_path / "trained.pth"), "--output", str(file)])
        assert "logits within" in capsys.readouterr().out
    function = function_of(file)
    for batch in (1, 5):
        images = images_of((32, 32), batch)
        evit_blocks(model)[0].fuse_token = fuse
        with torch.no_grad():
            expected = model(images)
        evit_blocks(model)[0].fuse_token = True
        assert torch.allclose(function(images), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "crop", "suffix"), [("distilled", (0.9, "center"), ".pt2"), ("evit", (1.0, "squash"), ".onnx")]
)
def test_exported_files_say_classes_and_preprocessing(trained, exported, name, crop, suffix):
    model = trained[name][0]
    about = metadata_of(exported(name, suffix))
    assert about["class_names"] == [f"digit {n}" for n in range(10)] and about["num_classes"] == 10
    assert about["architecture"] == MODELS[name][0] and (about["crop_pct"], about["crop_mode"]) == crop
    transform = timm.data.create_transform(**{key: about[key] for key in export.TRANSFORM})
    image = photo(130, 101)
    assert torch.equal(transform(image), our_view(model, MODELS[name][1], image))


@pytest.mark.parametrize(("rate", "suffix"), [(1.0, ".pt2"), (0.4, ".onnx")])
def test_the_keep_rate_of_the_file_is_that_of_the_flags(trained, tmp_path, rate, suffix):
    model, checkpoint, _ = trained["evit"]
    file = tmp_path / f"m{suffix}"
    export.main(["--resume", str(checkpoint), "--output", str(file), "--base-keep-rate", str(rate)])
    images = images_of((32, 32))
    found = function_of(file)(images)
    with torch.no_grad():
        assert not torch.allclose(found, model(images), atol=1e-5)
        assert torch.allclose(found, reduce_tokens(model, rate, drop_loc=(0,))(images), atol=1e-5)
    reduce_tokens(model, 0.5, drop_loc=(0,))


@pytest.mark.parametrize("which", [1, 3])  # images in the batch
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_do_not_agree(which, value):
    def damaged(images):
        logits = images.mean(dim=(2, 3))
        return torch.where(torch.tensor(len(images) == which), value, logits)

    def sound(images):
        return images.mean(dim=(2, 3))

    for pair in ((sound, damaged), (damaged, sound), (damaged, damaged)):
        assert not export.difference(*pair, (8, 8)) <= export.TOLERANCE
    assert export.difference(sound, sound, (8, 8)) == 0
    assert export.difference(lambda images: 0 * sound(images), lambda images: 0 * sound(images), (8, 8)) == 0


def test_what_cannot_be_exported_is_a_one_line_error(evit, tmp_path, capsys, monkeypatch):
    assert "name it .onnx or .pt2" in line_of(capsys, "--resume", evit, "--output", tmp_path / "model.bin")
    more = torch.load(evit, weights_only=True) | {"class_names": list("0123456789a")}
    torch.save(more, tmp_path / "more.pth")
    error = line_of(capsys, "--resume", tmp_path / "more.pth", "--output", tmp_path / "m.onnx")
    assert "more.pth: names 11 classes, its model has 10" in error
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    for name in ("m.pt2", "folder"):
        assert "it is not written" in line_of(capsys, "--resume", evit, "--output", tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["more.pth"]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    error = line_of(capsys, "--resume", evit, "--output", tmp_path / "m.onnx")
    assert "pip install onnx onnxscript onnxruntime" in error


# -- a folder for timm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_timm_loads_the_folder(trained, name):
    model, _, folder = trained[name]
    size = MODELS[name][1]
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images_of(size)), model(images_of(size)))
    assert loaded.pretrained_cfg["label_names"] == [f"digit {n}" for n in range(10)]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded), is_training=False)
    for image in (photo(130, 101), photo(60, 90), photo(*reversed(size))):
        assert torch.equal(transform(image), our_view(model, size, image))
    modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert len(modes) == 1  # safetensors alone would keep others from reading


def test_an_evit_that_keeps_all_patches_is_exported_as_deit(trained, tmp_path):
    model, checkpoint, folder = trained["evit"]
    assert (folder / "models_evit.py").exists()
    export.main(["--resume", str(checkpoint), "--output", str(tmp_path / "deit"), "--base-keep-rate", "1"])
    assert sorted(os.listdir(tmp_path / "deit")) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((tmp_path / "deit" / "config.json").read_text())
    assert config["architecture"] == "deit_tiny_distilled_patch16_224" and "drop_loc" not in config["model_args"]
    images = images_of((32, 32))
    with torch.no_grad():
        expected = reduce_tokens(model, 1.0, drop_loc=(0,))(images)
        found = timm.create_model(f"local-dir:{tmp_path / 'deit'}", pretrained=True).eval()(images)
    reduce_tokens(model, 0.5, drop_loc=(0,))
    assert torch.equal(found, expected)


def test_the_readme_says_what_is_in_the_folder(trained, capsys):
    text = (trained["evit"][2] / "README.md").read_text()
    for part in ("# evit_tiny_distilled_patch16_224", "10 classes", "32 x 32 px", "93.21 %", "    3: digit 3\n"):
        assert part in text
    assert "    import models_evit " in text and "models_evit" not in (trained["plain"][2] / "README.md").read_text()


@pytest.mark.parametrize(
    ("changed", "flags"),
    [
        ({"epoch": 7}, []),
        ({"progress": {"images": 8}}, []),
        ({"best_epoch": None}, []),
        ({"model_ema": True}, ["--ema"]),
        ({}, ["--base-keep-rate", "1"]),
        ({}, ["--input-size", "48"]),
    ],
)
def test_readme_has_no_accuracy_of_other_weights_or_views(changed, flags, tmp_path):
    model = save(tmp_path / "x.pth", *MODELS["evit"], **changed)
    if "model_ema" in changed:
        save(tmp_path / "x.pth", *MODELS["evit"], model_ema=model.state_dict())
    export.main(["--resume", str(tmp_path / "x.pth"), "--output", str(tmp_path / "f"), *flags])
    assert "10 classes" in (text := (tmp_path / "f" / "README.md").read_text()) and "93.21" not in text


def test_hostile_class_names_stay_text(tmp_path):
    save(tmp_path / "x.pth", *MODELS["evit"], class_names=HOSTILE, best_acc1="# 99")
    export.main(["--resume", str(tmp_path / "x.pth"), "--output", str(tmp_path / "f")])
    export.main(["--resume", str(tmp_path / "x.pth"), "--output", str(tmp_path / "f.pt2")])
    assert json.loads((tmp_path / "f" / "config.json").read_text())["label_names"] == HOSTILE
    assert metadata_of(tmp_path / "f.pt2")["class_names"] == HOSTILE
    text = (tmp_path / "f" / "README.md").read_text()
    assert text.isascii() and text.replace("\n", "").isprintable() and "99" not in text
    blocks = [line for line in text.splitlines() if "```" in line or "<b>" in line]
    assert len(blocks) == 1 and blocks[0].startswith(r"    0: # a\n```\n<b>\r\x1b[31m")


def test_an_earlier_export_is_replaced_and_nothing_else(trained, tmp_path, capsys, monkeypatch):
    flags = ["--resume", trained["evit"][1], "--output", tmp_path / "out"]
    export.main([str(flag) for flag in flags])
    (tmp_path / "out" / "__pycache__").mkdir()  # of models_evit.py
    export.main([str(flag) for flag in flags] + ["--base-keep-rate", "1"])
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "config.json", "model.safetensors"]
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "holds notes.txt, which is not an earlier export" in line_of(capsys, *flags)
    (tmp_path / "out" / "notes.txt").unlink()
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left" in line_of(capsys, *flags)
    assert os.listdir(tmp_path) == ["out"] and len(os.listdir(tmp_path / "out")) == 3
    monkeypatch.undo()
    (tmp_path / "out" / "config.json").write_text('{"architecture": "deit_tiny_patch16_224"}')  # not ours
    assert "holds README.md, which is not an earlier export" in line_of(capsys, *flags)
    (tmp_path / "file").write_text("")
    assert "is a file" in line_of(capsys, *flags[:2], "--output", tmp_path / "file")
    named = tmp_path / os.fsdecode(b"\xff")
    assert "is not UTF-8" in line_of(capsys, *flags[:2], "--output", named)
    (tmp_path / "empty").mkdir()
    export.main([*map(str, flags[:2]), "--output", str(tmp_path / "empty")])
    assert len(os.listdir(tmp_path / "empty")) == 4


WITHOUT_US = """
import os, re, sys
import torch
from PIL import Image
assert not any(os.path.exists(os.path.join(folder, "models_evit.py")) for folder in sys.path)
image, results = Image.open(sys.argv[1]), {}
for name, size in (("plain", (72, 72)), ("distilled", (72, 96)), ("evit", (32, 32))):
    os.chdir(os.path.join(sys.argv[2], name))
    code = re.findall(r"^    (.*[(=].*|import .*)$", open("README.md").read(), re.MULTILINE)
    space = {"image": image}
    exec(chr(10).join(code), space)
    random = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = space["model"](random)
    deep = Image.new("I;16", (40, 40), 30000)
    try:
        exec(chr(10).join(code), {"image": deep})
    except ValueError as error:
        assert str(error) == "convert it to 8 bits per channel first"
    else:
        raise AssertionError("16-bit images would be white")
    results[name] = {"random": found, "image": space["logits"].detach(), "view": space["transform"](space["image"]),
                     "names": space["model"].pretrained_cfg["label_names"]}
assert sys.modules["models_evit"].__file__.startswith(os.getcwd()) and "checkpoints" not in sys.modules
torch.save(results, sys.argv[3])
"""


@pytest.mark.process
def test_folders_load_by_their_readme_without_this_repository(trained, tmp_path):
    save_on_its_side(photo(130, 101), tmp_path / "photo.png")
    root = trained["plain"][2].parent
    tiny.run("-I", "-c", WITHOUT_US, tmp_path / "photo.png", root, tmp_path / "results.pt")
    for name, found in torch.load(tmp_path / "results.pt", weights_only=True).items():
        model, size = trained[name][0], MODELS[name][1]
        view = our_view(model, size, photo(130, 101))
        assert torch.equal(found["view"], view) and found["names"] == [f"digit {n}" for n in range(10)]
        with torch.no_grad():
            torch.testing.assert_close(found["random"], model(images_of(size)), atol=1e-5, rtol=0)
            torch.testing.assert_close(found["image"], model(view[None]), atol=1e-5, rtol=0)


def code_of_docs(heading):
    """The indented block below a heading of docs/export.md."""
    section = (tiny.REPOSITORY / "docs" / "export.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return "\n".join(re.findall(r"^    (.*)$", section, re.MULTILINE))


@pytest.mark.process
@pytest.mark.parametrize("name", ["plain", "evit"])
def test_onnx_runs_by_its_docs_without_torch(trained, exported, tmp_path, name):
    model = trained[name][0]
    shutil.copy(exported(name, ".onnx"), tmp_path / "model.onnx")
    save_on_its_side(photo(130, 101), tmp_path / "photo.jpg")
    end = "import sys; assert 'torch' not in sys.modules; np.save('pixels.npy', pixels); np.save('logits.npy', logits)"
    code = "\n".join(["import os, sys", f"os.chdir({str(tmp_path)!r})", code_of_docs("ONNX"), end])
    printed = tiny.run("-I", "-c", code)
    with Image.open(tmp_path / "photo.jpg") as image:
        upright = image.transpose(Image.Transpose.ROTATE_270)
    view = our_view(model, MODELS[name][1], upright)
    pixels = torch.from_numpy(np.load(tmp_path / "pixels.npy")).permute(2, 0, 1)
    torch.testing.assert_close(pixels, view, atol=1e-5, rtol=0)
    with torch.no_grad():
        expected = model(view[None])
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "logits.npy")), expected, atol=1e-5, rtol=0)
    assert f"digit {expected.argmax()}" in printed
    Image.fromarray(np.full((40, 40), 30000, np.uint16)).save(tmp_path / "photo.png")  # Pillow would turn it white
    assert "convert it to 8 bits" in tiny.run("-I", "-c", code.replace("photo.jpg", "photo.png"), status=1)


# -- models of one's own -----------------------------------------------------------------------------------------------

SHORT = [*tiny.DATA, "--input-size", "32", "--train-fraction", "0.1", "--warmup-epochs", "0", "--amp", "off"]


@register_model
def own_evit(pretrained=False, keep_rate=0.7, **kwargs):
    settings = {"patch_size": 8, "block_fn": EViTBlock} | KWARGS | kwargs
    return reduce_tokens(build_model_with_cfg(VisionTransformer, "own_evit", pretrained, **settings), keep_rate, (0,))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Return, by name, the checkpoint of a run of one epoch."""
    root = tmp_path_factory.mktemp("own")
    for name in ("own_vit", "own_convnet", "own_evit"):
        drop = ["--drop-path", "0"] if name == "own_convnet" else []
        kwargs = ["--model-kwargs", "keep_rate=0.5"] if name == "own_evit" else []
        start = ["--model", name, *drop, *kwargs, *SHORT, "--epochs", "1", "--output-dir", str(root / name)]
        main.cli(start)
    return {path.parent.name: path for path in root.glob("*/checkpoint.pth")}


@pytest.mark.parametrize("name", ["own_vit", "own_convnet"])
def test_own_models_are_trained_evaluated_and_exported(own, tmp_path, name, capfd):
    main.cli(["--eval", "--resume", str(own[name]), "--num-workers", "0", "--amp", "off"])  # as it was trained
    logged = tiny.log_of(own[name].parent)[-1]
    assert f"test_acc1 {logged['test_acc1']:.4g}" in capfd.readouterr().err
    export.main(["--resume", str(own[name]), "--output", str(tmp_path / "m.pt2")])
    parsed = command.parse(command.get_parser("x", None), ["--resume", str(own[name])])
    model = command.load_model(parsed.run, parsed.weights, "x", torch.device("cpu"))
    images = images_of((32, 32))
    with torch.no_grad():
        expected = model(images)
    assert torch.allclose(torch.export.load(tmp_path / "m.pt2").module()(images), expected, atol=1e-5)
    assert expected.shape == (3, 10)


def test_a_model_of_ones_own_is_a_folder_with_its_file(own, tmp_path, capsys):
    export.main(["--resume", str(own["own_vit"]), "--output", str(tmp_path / "f")])
    assert "import own_blocks  # registers" in capsys.readouterr().out
    source = Path(own_blocks.__file__).read_text()
    assert (tmp_path / "f" / "own_blocks.py").read_text() == source
    error = line_of(capsys, "--resume", own["own_convnet"], "--output", tmp_path / "g")
    assert "build it with timm's build_model_with_cfg" in error


def test_files_that_an_own_block_imports_come_along(tmp_path, monkeypatch):
    (tmp_path / "first_block.py").write_text(
        "from second_block import x\nfrom timm.models import register_model\n\n\n@register_model\n"
        "def first_model(pretrained=False, **kwargs):\n    return None\n"
    )
    (tmp_path / "second_block.py").write_text("import torch\nx = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import first_block  # noqa: F401

    assert [file.name for file in export.modules_of("first_model", "f")] == ["first_block.py", "second_block.py"]
    (tmp_path / "third_block").mkdir()
    (tmp_path / "third_block" / "__init__.py").write_text("")
    (tmp_path / "second_block.py").write_text("import third_block\n")
    with tiny.user_error("second_block.py imports the folder third_block"):
        export.modules_of("first_model", "f")


def test_the_tradeoff_of_own_evit_blocks_is_measured(own, tmp_path):
    flags = ["--keep-rates", "1", "0.5", "--amp", "off", "--rounds", "1", "--steps", "1", "--num-workers", "0"]
    tradeoff.main(["--resume", str(own["own_evit"]), *flags, "--output", str(tmp_path / "t.json")])
    whole, half = json.loads((tmp_path / "t.json").read_text())["rows"]
    logged = tiny.log_of(own["own_evit"].parent)[-1]  # of the first epoch, which drops no patches
    assert whole["acc1"] == logged["test_acc1"] and whole["loss"] != half["loss"] and half["macs"] < whole["macs"]


@pytest.mark.parametrize("name", ["own_vit", "own_convnet", "own_evit"])
def test_classes_without_a_name_are_counted(name):
    run = command.flags.parse_args(["--model", name, "--input-size", "32"])
    weights = build_model(ModelOptions(name, (32, 32), drop_path=0.0), 12).state_dict()
    run.trained_size = None
    loaded = command.load_model(
        run, {f"model.{key}": value for key, value in weights.items()}, "x", torch.device("cpu")
    )
    assert loaded(torch.zeros(1, 3, 32, 32)).shape == (1, 12)


def test_what_own_models_do_not_say_is_a_one_line_error():
    with tiny.user_error("--model own_vit: has no pretrained weights; drop --pretrained"):
        build_model(ModelOptions("own_vit", (32, 32), pretrained=True), 10)
    with tiny.user_error("--train-scope head: ", "add get_classifier() to OwnConvNet"):
        build_model(ModelOptions("own_convnet", (32, 32), drop_path=0.0, train_scope="head"), 10)
    model = build_model(ModelOptions("own_vit", (32, 32), train_scope="head"), 10)
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {"head.weight", "head.bias"}
