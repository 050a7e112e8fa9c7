"""tools.report against main.py --eval, scikit-learn and a naive calibration error."""

import html.parser
import json
import os
import re

import numpy as np
import pytest
import timm
import tiny
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix
from test_datasets import write_stream
from timm.data import create_transform
from torch import nn

import engine
import main
from loaders import DeviceLoader
from samplers import Batch
from tools import outcomes, pack_dataset, report, report_page

MODEL = ["--model", "evit_tiny_patch16_224", "--input-size", "32", "--patch-size", "8", "--drop-loc", "0"]
MODEL += ["--model-kwargs", "embed_dim=48", "depth=2", "num_heads=3"]
NAMES = ["<b>bold", "a\x1b[31m\nb", "$x_$ & 猫", "plain"]
FAST = ["--num-workers", "0", "--batch-size", "7", "--amp", "off"]


def new_model(num_classes=4, **options):
    torch.manual_seed(3)
    model = timm.create_model(
        "evit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=2,
        num_heads=3,
        num_classes=num_classes,
        drop_loc=(0,),
        **options,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_folders(tmp_path_factory.mktemp("data"), NAMES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, data):
    """A random model whose classes are the folders: it makes many kinds of mistakes."""
    file = tmp_path_factory.mktemp("run") / "best.pth"
    args = vars(main.parse_args([*MODEL, "--data-set", "IMNET", "--data-path", str(data)]))
    average = {key: value * 0.9 for key, value in new_model().state_dict().items()}
    about = {"args": args, "class_names": sorted(NAMES)}
    torch.save({"model": new_model().state_dict(), "model_ema": average} | about, file)
    return file


def made(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def folder(checkpoint):
    """The report in its default folder."""
    report.main(["--resume", str(checkpoint), *FAST])
    return checkpoint.parent / "report"


@pytest.fixture
def undrawn(monkeypatch):
    """Skip the figures of a report, which take longer than its numbers and are tested in `folder`."""
    monkeypatch.setattr(report_page, "draw_figures", lambda *_: None)


@pytest.fixture(scope="module")
def outputs(data):
    """Targets and probabilities of the validation images, by timm alone."""
    model, rows, targets = new_model(), [], []
    transform = create_transform((32, 32), crop_pct=1.0, interpolation="bicubic")
    for label, name in enumerate(sorted(NAMES)):
        for file in sorted((data / "val" / name).iterdir()):
            with torch.no_grad():
                rows.append(model(transform(Image.open(file))[None]).softmax(dim=1)[0])
            targets.append(label)
    return np.array(targets), torch.stack(rows).double().numpy()


def line_of(capsys, *flags):
    """The one line with which the tool refuses, after the lines of its log."""
    with pytest.raises(SystemExit) as info:
        report.main([str(flag) for flag in flags])
    error = re.sub(r"^\d\d:\d\d:\d\d .*\n", "", capsys.readouterr().err, flags=re.MULTILINE)
    assert info.value.code == 2 and error.count("\n") == 1, error
    return error


# -- numbers -----------------------------------------------------------------------------------------------------------


def evaluated(checkpoint, monkeypatch, *flags):
    """The numbers of `main.py --eval`, before they are rounded for the log."""
    seen = {}
    with monkeypatch.context() as patch:
        patch.setattr(engine, "describe", lambda stats: seen.update(stats) or "")
        main.cli(["--eval", "--resume", str(checkpoint), *FAST, *flags])
    return seen


@pytest.mark.usefixtures("undrawn")
def test_accuracies_and_loss_are_exactly_those_of_an_evaluation(checkpoint, folder, tmp_path, monkeypatch):
    stats = evaluated(checkpoint, monkeypatch)
    found = made(folder)
    report.main(["--resume", str(checkpoint), "--ema", *FAST, "--output", str(tmp_path / "ema")])
    average = made(tmp_path / "ema")
    for name in ("acc1", "acc5", "loss", "images"):
        assert found[name] == stats[f"test_{name}"] and average[name] == stats[f"test_ema_{name}"]
    assert found["loss"] != average["loss"] and found["images"] == 48
    assert average["settings"]["ema"] and not found["settings"]["ema"]


def test_confusions_are_those_of_scikit_learn(folder, outputs):
    targets, rows = outputs
    predicted, found = rows.argmax(axis=1), made(folder)
    matrix = confusion_matrix(targets, predicted, labels=range(4))
    assert found["confusion_matrix"] == matrix.tolist() and 0 < matrix.trace() < 48
    assert found["acc1"] == pytest.approx(100 * accuracy_score(targets, predicted))
    pairs = {(row["true"], row["predicted"]): row["images"] for row in found["confused_pairs"]}
    names = sorted(NAMES)
    assert pairs == {(names[i], names[j]): matrix[i, j] for i in range(4) for j in range(4) if i != j and matrix[i, j]}
    counts = [row["images"] for row in found["confused_pairs"]]
    assert counts == sorted(counts, reverse=True)
    for index, row in enumerate(found["classes"]):
        assert (row["class"], row["images"], row["correct"]) == (names[index], 12, matrix[index, index])
        assert row["acc1"] == pytest.approx(100 * matrix[index, index] / 12)


def naive_ece(targets, rows, bins=15):
    error = 0.0
    for index in range(bins):
        inside = [n for n, row in enumerate(rows) if index / bins < row.max() <= (index + 1) / bins]
        if inside:
            accuracy = sum(rows[n].argmax() == targets[n] for n in inside) / len(inside)
            confidence = sum(rows[n].max() for n in inside) / len(inside)
            error += len(inside) / len(rows) * abs(accuracy - confidence)
    return 100 * error


def test_the_calibration_error_is_that_of_its_definition(folder, outputs):
    found = made(folder)["calibration"]
    assert found["ece"] == pytest.approx(naive_ece(*outputs), abs=1e-3) and found["ece"] > 1
    assert len(found["bins"]) == 15 and sum(row["images"] for row in found["bins"]) == 48
    assert all((row["accuracy"] is None) == (row["images"] == 0) for row in found["bins"])


@pytest.mark.parametrize("seed", range(5))
def test_calibration_of_random_outcomes_and_of_its_limits(seed):
    generator = np.random.default_rng(seed)
    rows, targets = generator.dirichlet([0.4] * 6, 300), generator.integers(0, 6, 300)
    rows[0] = [1, 0, 0, 0, 0, 0]
    outcome = outcomes.Outcome({}, np.arange(300), targets, rows.argmax(1), rows.max(1), rows.max(1))
    assert report.calibration(outcome)["ece"] == pytest.approx(naive_ece(targets, rows))


def test_mistakes_are_the_most_confident_ones(folder, outputs, data):
    targets, rows = outputs
    wrong = [n for n in np.argsort(-rows.max(axis=1)) if rows[n].argmax() != targets[n]]
    found, names = made(folder)["mistakes"], sorted(NAMES)
    assert len(found) == min(24, len(wrong)) and len(found) > 5
    for row, position in zip(found, wrong, strict=False):
        assert row["probability"] == pytest.approx(rows[position].max(), abs=1e-5)
        assert row["true_probability"] == pytest.approx(rows[position][targets[position]], abs=1e-5)
        assert (row["position"], row["true"]) == (position, names[targets[position]])
        assert row["predicted"] == names[rows[position].argmax()]
        file = sorted((data / "val" / row["true"]).iterdir())[position % 12]
        assert row["image"] == str(file)
        assert (np.asarray(Image.open(folder / row["picture"]))[::7, ::7] == np.asarray(Image.open(file))).all()


def test_intervals_are_those_of_wilson():
    """The solutions of |hits/n - p| = z sqrt(p (1 - p) / n)."""
    for hits, n in ((0, 10), (3, 10), (10, 10), (700, 1000)):
        low, high = (bound / 100 for bound in outcomes.wilson(hits, n))
        z2, share = outcomes.Z**2, hits / n
        roots = sorted(np.roots([1 + z2 / n, -(2 * share + z2 / n), share * share]).real)
        assert (low, high) == pytest.approx(roots, abs=1e-9)
    assert outcomes.wilson(0, 0) is None


def test_a_difference_on_the_same_images_has_the_interval_of_its_pairs():
    generator = np.random.default_rng(0)
    one, other = generator.random(500) < 0.7, generator.random(500) < 0.6
    difference, (low, high) = outcomes.paired_difference(one, other)
    gained, lost = int((one & ~other).sum()), int((other & ~one).sum())
    assert difference == pytest.approx(100 * (gained - lost) / 500)
    # the mean of -1, 0 and 1 with half an observation more of each kind of pair
    counts = np.array([gained, lost, 500 - gained - lost]) + [0.5, 0.5, 1]
    mean = np.average([1, -1, 0], weights=counts)
    error = np.sqrt(np.average((np.array([1, -1, 0]) - mean) ** 2, weights=counts) / counts.sum())
    assert (low, high) == pytest.approx((100 * (mean - outcomes.Z * error), 100 * (mean + outcomes.Z * error)))
    assert (low, high) == pytest.approx(score_interval(gained, lost, 500), abs=0.05)


def score_interval(gained, lost, images):
    """Tango's score interval, by a search for the differences at which the test is at its limit."""
    counts = np.array([gained, lost, images - gained - lost])

    def statistic(delta):
        rare = np.linspace(max(0, -delta), (1 - delta) / 2, 20001)[1:-1]  # share of lost images
        shares = np.stack([rare + delta, rare, 1 - 2 * rare - delta])
        with np.errstate(divide="ignore"):
            best = rare[np.argmax((counts[:, None] * np.log(shares)).sum(axis=0))]
        return (gained - lost - images * delta) / np.sqrt(images * (2 * best + delta - delta**2))

    found = np.linspace(-0.3, 0.3, 2401)
    inside = [delta for delta in found if abs(statistic(delta)) <= outcomes.Z]
    return 100 * min(inside), 100 * max(inside)


@pytest.mark.parametrize(
    ("images", "gained", "low", "high"),
    [(42, 0, -4.45, 4.45), (1, 1, -51.01, 100), (2, 2, -19.30, 100), (20, 19, 69.48, 100), (20, -19, -100, -69.48)],
)
def test_intervals_of_few_images_are_wide_and_at_most_100_points(images, gained, low, high):
    one, other = np.arange(images) < max(gained, 0), np.arange(images) < max(-gained, 0)
    difference, interval = outcomes.paired_difference(one, other)
    assert difference == pytest.approx(100 * gained / images) and interval == pytest.approx((low, high), abs=0.005)


@pytest.mark.parametrize(("gained", "lost"), [(700, 560), (60, 80), (1000, 1400), (0, 0)])
def test_intervals_of_many_images_are_those_of_the_normal_approximation(gained, lost):
    images = np.arange(10000)
    one, other = images < gained, (images >= gained) & (images < gained + lost)
    error = 100 * outcomes.Z * (one.astype(float) - other).std() / 100
    difference, interval = outcomes.paired_difference(one, other)
    assert interval == pytest.approx((difference - error, difference + error), abs=0.02)


def test_only_a_model_compared_with_itself_has_no_interval():
    row = outcomes.Outcome(dict.fromkeys(("acc1", "acc5", "loss", "images"), 0), *np.zeros((5, 42), int))
    other = outcomes.Outcome(row.stats, *np.zeros((5, 42), int))
    assert outcomes.accuracy_row(row, row)["acc1_change_interval"] == [0, 0]
    assert outcomes.accuracy_row(other, row)["acc1_change_interval"] == pytest.approx((-4.45, 4.45), abs=0.005)


def test_a_compiled_model_s_padded_batches_are_recorded_without_padding():
    """A worker's partial batch of a stream may come before full ones."""
    torch.manual_seed(0)
    images, model = torch.randn(10, 3, 4, 4), nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    with torch.no_grad():
        targets = model(images).argmax(dim=1)
    targets[3] = (targets[3] + 1) % 3
    batches = [Batch(images[a:b], targets[a:b], torch.arange(a, b)) for a, b in ((0, 4), (4, 6), (6, 10))]
    model.compile(backend="eager")
    outcome = outcomes.evaluate_images(model, DeviceLoader(batches, torch.device("cpu"), None, 10), "softmax", None)
    assert outcome.hits.tolist() == [position != 3 for position in range(10)] and outcome.stats["acc1"] == 90
    assert outcome.positions.tolist() == list(range(10)) and len(outcome.true_probability) == 10


@pytest.mark.usefixtures("undrawn")
def test_keep_rates_have_the_accuracy_of_their_evaluation(checkpoint, tmp_path, monkeypatch):
    flags = ["--resume", str(checkpoint), *FAST, "--num-mistakes", "0"]
    report.main([*flags, "--keep-rates", "0.25", "1", "--output", str(tmp_path / "rates")])
    rows = made(tmp_path / "rates")["keep_rates"]
    assert [(row["keep_rate"], row["is_own"]) for row in rows] == [(1.0, False), (0.7, True), (0.25, False)]
    for row in rows:
        stats = evaluated(checkpoint, monkeypatch, "--base-keep-rate", str(row["keep_rate"]))
        assert all(row[name] == stats[f"test_{name}"] for name in ("acc1", "acc5", "loss"))
    assert len({row["loss"] for row in rows}) == 3


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        ({"model_kwargs": {"keep_rate": 0.5}}, {0.25: False, 0.5: True, 1.0: False}),
        ({"base_keep_rate": 0.25}, {0.25: True, 1.0: False}),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_a_model_s_own_rate_is_marked_whichever_flag_set_it(checkpoint, tmp_path, monkeypatch, flags, rates):
    saved = torch.load(checkpoint, weights_only=True)
    saved["args"]["model_kwargs"] |= flags.pop("model_kwargs", {})
    saved["args"] |= flags
    torch.save(saved, tmp_path / "own.pth")
    flags = ["--resume", str(tmp_path / "own.pth"), *FAST, "--num-mistakes", "0", "--keep-rates", "0.25", "1"]
    report.main([*flags, "--output", str(tmp_path / "rates")])
    found = {row["keep_rate"]: row for row in made(tmp_path / "rates")["keep_rates"]}
    assert {rate: row["is_own"] for rate, row in found.items()} == rates
    stats = evaluated(checkpoint, monkeypatch, "--base-keep-rate", "0.25")
    assert found[0.25]["loss"] == stats["test_loss"] and len({row["loss"] for row in found.values()}) == len(rates)


@pytest.mark.usefixtures("undrawn")
def test_some_of_the_classes_have_the_indices_of_the_checkpoint(checkpoint, data, tmp_path, monkeypatch):
    (tmp_path / "val").mkdir()
    for name in sorted(NAMES)[1:3]:
        (tmp_path / "val" / name).symlink_to(data / "val" / name)
    flags = ["--data-set", "IMNET", "--data-path", str(tmp_path)]
    report.main(["--resume", str(checkpoint), *FAST, *flags, "--output", str(tmp_path / "out")])
    found = made(tmp_path / "out")
    assert found["acc1"] == evaluated(checkpoint, monkeypatch, *flags)["test_acc1"]
    assert [row["images"] for row in found["classes"]] == [0, 12, 12, 0]
    assert found["classes"][0]["acc1"] is None and found["classes"][0]["interval"] is None


@pytest.mark.parametrize("stored", [sorted(NAMES), []])  # an earlier version stored names for some of the outputs
@pytest.mark.usefixtures("undrawn")
def test_outputs_without_a_class_of_the_data_have_a_number(data, tmp_path, stored):
    torch.save({"model": new_model(6).state_dict(), "class_names": stored}, tmp_path / "six.pth")
    flags = ["--data-set", "torch/image_folder", "--data-path", str(data), "--num-classes", "6"]
    report.main(["--resume", str(tmp_path / "six.pth"), *MODEL, *flags, *FAST, "--keep-rates", "0.7"])
    names = [row["class"] for row in made(tmp_path / "report")["classes"]]
    assert names == [*stored, *(f"class {index}" for index in range(len(stored), 6))]
    pack_dataset.main([*flags, "--output", str(tmp_path / "pack"), "--size", "32", "--verify"])


# -- the page ----------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Tags, pictures and text of a page, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.pictures, self.words = [], set(), [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])
        if tag not in ("img", "br", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def test_the_page_shows_every_part_and_needs_no_network(folder):
    text = (folder / "index.html").read_bytes().decode()
    page = Page(text)
    assert not page.open and "http" not in text and "script" not in page.tags
    assert sorted(page.pictures) == sorted(path.name for path in folder.iterdir() if path.suffix == ".png")
    assert {"reliability.png", "confusion.png", "keep_rates.png", "mistake_00.png"} <= set(page.pictures)
    for path in folder.glob("*.png"):
        assert min(Image.open(path).size) > 100
    assert f"{made(folder)['acc1']:.2f} %" in page.words and "Keep rates" in page.words


def test_names_are_text_on_the_page(folder):
    text = (folder / "index.html").read_text()
    assert "<b>bold" not in text and "\x1b" not in text
    words = Page(text).words
    assert all(name in words for name in ("<b>bold", r"a\x1b[31m\nb", "$x_$ & 猫"))


def test_many_classes_have_a_list_instead_of_a_picture(folder, tmp_path):
    numbers = made(folder) | {"confusion_matrix": None, "keep_rates": []}
    report_page.draw_figures(numbers, tmp_path)
    assert os.listdir(tmp_path) == ["reliability.png"]
    page = Page(report_page.page(numbers))
    assert "confusion.png" not in page.pictures and "predicted class" in page.words
    assert "Keep rates" not in page.words


@pytest.mark.parametrize("count", [2, 20, 21])
def test_confusion_matrices_of_any_number_of_classes_are_drawn(tmp_path, count):
    matrix = np.diag([*range(count)])  # of the first class there are no images
    report_page._draw_confusion(matrix, ["$a_$" * 20] * count, tmp_path / "x.png")
    assert min(Image.open(tmp_path / "x.png").size) >= 600


def test_a_stream_has_no_pictures_of_mistakes(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    path = write_stream(shards)
    torch.save({"model": new_model(3).state_dict()}, tmp_path / "x.pth")
    flags = ["--data-set", "wds/", "--data-path", path, "--num-classes", "3", "--keep-rates", "0.7"]
    report.main(["--resume", str(tmp_path / "x.pth"), *MODEL, *flags, *FAST])
    found = made(tmp_path / "report")
    assert found["images"] == 7 and found["mistakes"] and found["mistakes"][0]["picture"] is None
    assert sum(map(sum, found["confusion_matrix"])) == 7
    assert "a stream have no index" in Page((tmp_path / "report" / "index.html").read_text()).words


# -- the folder --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_an_earlier_report_is_replaced_whole(checkpoint, tmp_path):
    flags = ["--resume", str(checkpoint), *FAST, "--keep-rates", "0.7", "--output", str(tmp_path / "r")]
    report.main([*flags, "--num-mistakes", "3"])
    assert len(list((tmp_path / "r").glob("mistake_*"))) == 3
    report.main([*flags, "--num-mistakes", "1"])
    assert len(list((tmp_path / "r").glob("mistake_*"))) == 1


def test_the_current_folder_can_hold_the_report(checkpoint, tmp_path, monkeypatch):
    (folder := tmp_path / "here").mkdir()
    monkeypatch.chdir(folder)
    report.main(["--resume", str(checkpoint), *FAST, "--output", "."])
    assert {"index.html", "report.json"} < set(os.listdir(folder)) and os.listdir(tmp_path) == ["here"]


def test_an_earlier_report_survives_an_error_while_writing(checkpoint, tmp_path, capsys, monkeypatch):
    flags = ["--resume", checkpoint, *FAST, "--num-mistakes", "1", "--keep-rates", "0.7", "--output", tmp_path / "r"]
    report.main([str(flag) for flag in flags])
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(report_page, "draw_figures", fail)
    assert "cannot be written (disk full)" in line_of(capsys, *flags)
    assert {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()} == before
    assert os.listdir(tmp_path) == ["r"]


def test_what_can_be_checked_is_checked_before_the_evaluation(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "evaluate_images", lambda *_: pytest.fail("evaluated"))
    resume = ["--resume", checkpoint, *FAST, "--output"]
    line = line_of(capsys, *resume, tmp_path / "r", "--keep-rates", "0.7,0.5")
    assert "--keep-rates" in line and "--base-keep-rate" not in line
    (tmp_path / "file").touch()
    assert "cannot be written" in line_of(capsys, *resume, tmp_path / "file" / "deeper" / "r")
    assert os.listdir(tmp_path) == ["file"]


def test_folders_of_anything_else_are_left_alone(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "make_report", lambda *_: pytest.fail("evaluated"))
    resume = ["--resume", checkpoint, "--output"]
    assert "holds best.pth" in line_of(capsys, *resume, checkpoint.parent)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("mine")
    assert "holds no report" in line_of(capsys, *resume, tmp_path / "site")
    (tmp_path / "site" / "report.json").write_text('{"format": "another"}')
    assert "holds no report" in line_of(capsys, *resume, tmp_path / "site")
    assert "is a file" in line_of(capsys, *resume, checkpoint)
    assert (tmp_path / "site" / "index.html").read_text() == "mine"


def test_what_cannot_be_reported_is_a_one_line_error(checkpoint, tmp_path, capsys):
    deit = ["--model", "deit_tiny_patch16_224", "--keep-rates", "0.5"]
    torch.save({"model": new_model().state_dict()}, tmp_path / "x.pth")
    assert "has no EViT blocks" in line_of(capsys, "--resume", tmp_path / "x.pth", *deit)
    other = tiny.write_folders(tmp_path / "other", ["one", "two"], per_class=1)
    flags = ["--resume", checkpoint, "--data-set", "IMNET", "--data-path", other, *FAST]
    assert "the model has 4 classes, the data have 2; name data" in line_of(capsys, *flags)
    renamed = tiny.write_folders(tmp_path / "renamed", ["one", "two", "three", "four"], per_class=1)
    flags = ["--resume", checkpoint, "--data-set", "IMNET", "--data-path", renamed, *FAST]
    assert "--allow-class-mismatch" in line_of(capsys, *flags)
