"""The commands of README for your own photos, one after the other, on tiny photos."""

import json

import numpy as np
import onnxruntime
import pytest
import timm
import tiny
import torch
from PIL import ExifTags, Image

import main
from tools import export, predict, report

pytestmark = pytest.mark.slow
NAMES = ("ant", "bee", "cow", "dog")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """CLASS/NUMBER.png, 20 of each class."""
    return tiny.write_folders(tmp_path_factory.mktemp("photos"), NAMES, per_class=20, parts=("",))


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """Output folder of the recipe, with a small model."""
    folder = tmp_path_factory.mktemp("trained")
    weights = timm.create_model("test_resnet", num_classes=1000).state_dict()
    torch.save({"model": weights}, folder / "weights.pth")
    flags = ["--model", "test_resnet", "--input-size", "72", "--epochs", "15", "--lr", "2e-3", "--num-workers", "0"]
    recipe = f"@{tiny.REPOSITORY}/recipes/finetune_photos.args"
    output = ["--finetune", str(folder / "weights.pth"), "--output-dir", str(folder / "run")]
    main.cli([recipe, "--data-path", str(photos), *flags, *output])
    return folder / "run"


@pytest.fixture(scope="module")
def predicted(photos, trained):
    """What tools.predict says of every photo, by its path."""
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("sys.stdout.write", lines.append)
        predict.main(
            ["--resume", str(trained / "best.pth"), str(photos), "--topk", "4", "--format", "json", "--amp", "off"]
        )
    return {each["path"]: each["predictions"] for each in json.loads("".join(lines))}


def test_photos_are_told_apart(trained):
    assert max(record["test_acc1"] for record in tiny.log_of(trained)) >= 90


def test_predictions_name_the_class_folders(photos, predicted):
    right = [photos.joinpath(path).parent.name == best[0]["class"] for path, best in predicted.items()]
    assert len(right) == 80 and np.mean(right) >= 0.9
    assert all({each["class"] for each in best} == set(NAMES) for best in predicted.values())


def test_report_counts_the_held_out_photos(trained):
    report.main(["--resume", str(trained / "best.pth")])
    found = json.loads((trained / "report" / "report.json").read_text())
    best = max(record["test_acc1"] for record in tiny.log_of(trained))
    assert found["images"] == 16 and found["acc1"] == pytest.approx(best)
    assert (trained / "report" / "index.html").stat().st_size > 1000


def evaluated(trained, capsys, *words):
    """Evaluate with --eval and tools.report; return both outputs and the number of images in the report."""
    capsys.readouterr()
    main.cli(["--eval", "--resume", str(trained / "best.pth"), *words])
    said = capsys.readouterr().err
    report.main(["--resume", str(trained / "best.pth"), "--output", str(trained / "other"), *words])
    return said, capsys.readouterr().err, json.loads((trained / "other" / "report.json").read_text())["images"]


def test_added_photos_are_a_warning_in_an_evaluation(trained, photos, tmp_path, capsys):
    warning = "may have been trained on some of the evaluated images"
    plain, report_plain, images = evaluated(trained, capsys)
    assert images == 16 and warning not in plain + report_plain
    added = [photos / name / "more.png" for name in NAMES]
    for number, path in enumerate(added):
        Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(path)
    try:
        said = evaluated(trained, capsys)
    finally:
        for path in added:
            path.unlink()
    assert all(warning in text for text in said[:2])


def test_all_photos_of_another_folder_are_evaluated(trained, photos, tmp_path, capsys):
    tiny.write_folders(tmp_path, NAMES, per_class=5, parts=("new",))
    for words, number in (([], 20), (["--val-fraction", "0.4"], 8), (["--data-set", "IMNET"], 20)):
        said = evaluated(trained, capsys, "--data-path", str(tmp_path / "new"), *words)
        assert said[2] == number
        assert all(("all its 20 images are evaluated" in text) is (number == 20) for text in said[:2])
        assert all(("is not applied to other data" in text) is (number == 20) for text in said[:2])
    (tmp_path / "same").symlink_to(photos)
    assert evaluated(trained, capsys, "--data-path", str(tmp_path / "same"))[2] == 16


def test_timm_and_onnxruntime_agree_with_the_predictions(photos, trained, predicted, tmp_path):
    for name in ("folder", "model.onnx"):
        export.main(["--resume", str(trained / "best.pth"), "--output", str(tmp_path / name)])
    model = timm.create_model(f"local-dir:{tmp_path}/folder", pretrained=True).eval()
    assert list(model.pretrained_cfg["label_names"]) == list(NAMES)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for path in sorted(predicted)[::16]:
        with Image.open(path) as photo:
            view = transform(photo.convert("RGB"))[None]
        expected = {each["class"]: each["probability"] for each in predicted[path]}
        with torch.no_grad():
            logits = [model(view)[0], torch.from_numpy(session.run(None, {"images": view.numpy()})[0][0])]
        for found in logits:
            assert dict(zip(NAMES, found.softmax(dim=0).tolist(), strict=True)) == pytest.approx(expected, abs=1e-4)


def test_photos_are_turned_upright(trained, photos, tmp_path):
    """A run on photos that lie on their side, as EXIF says, is the run on upright ones."""
    for part, turned in (("upright", False), ("turned", True)):
        for label, name in enumerate(NAMES[:2]):
            for number in range(4):
                pixels = np.random.default_rng(10 * label + number).integers(0, 256, (40, 24, 3), dtype=np.uint8)
                image, exif = Image.fromarray(pixels), Image.Exif()
                if turned:
                    image = image.rotate(90, expand=True)  # counterclockwise; viewers turn it clockwise again
                    exif[ExifTags.Base.Orientation] = 6
                folder = tmp_path / part / name
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{number}.png", exif=exif)
    flags = [*tiny.TINY, "--data-set", "IMNET", "--val-fraction", "0.5", "--batch-size", "2", "--output-dir"]
    for part in ("upright", "turned"):
        main.cli([*flags, str(tmp_path / f"run_{part}"), "--data-path", str(tmp_path / part), "--upright"])
    logs = [tiny.log_of(tmp_path / f"run_{part}")[0] for part in ("upright", "turned")]
    assert logs[0] | {"images_per_second": 0} == logs[1] | {"images_per_second": 0}
    sideways = tmp_path / "run_sideways"
    main.cli([*flags, str(sideways), "--data-path", str(tmp_path / "turned")])
    assert tiny.log_of(sideways)[0]["test_loss"] != logs[0]["test_loss"]
