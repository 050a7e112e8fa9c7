"""The cache of teacher predictions: exact, resumable, checked; as files, and as whole runs."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import time
import types
import zlib

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

import engine
import main
import teachers
from augment import ViewOptions
from datasets import build_eval_transform
from engine import select_amp
from flags import parse_args
from losses import soft_distillation
from samplers import Batch
from teachers import CachedTeacher, Labels, LogProbabilities, TeacherCache, check_fingerprint
from tools import chaos
from utils import RunError, World

CPU = torch.device("cpu")


# -- what is cached ----------------------------------------------------------------------------------------------------


def logits(count=6, classes=10, seed=0):
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(seed)) * 3


def test_labels_are_the_arg_max_in_two_bytes():
    codec = Labels(10)
    rows = codec.encode(logits())
    assert rows.dtype.itemsize == 2
    decoded = codec.decode(rows, CPU)
    assert decoded.shape == (6, 10) and torch.equal(decoded.argmax(1), logits().argmax(1))


def test_all_log_probabilities_serve_as_logits_at_any_temperature():
    codec = LogProbabilities(10, 10)
    rows = codec.encode(logits())
    assert rows.dtype.itemsize == 2 * 10
    for tau in (1.0, 3.0):
        found, expected = F.softmax(codec.decode(rows, CPU) / tau, 1), F.softmax(logits() / tau, 1)
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=0)  # float16: 11 bits of a logarithm of up to 16


def test_of_the_largest_the_rest_of_the_mass_is_spread_evenly():
    codec = LogProbabilities(10, 3)
    rows = codec.encode(logits())
    assert rows.dtype.itemsize == 3 * (2 + 2)
    found, exact = F.softmax(codec.decode(rows, CPU), 1), F.softmax(logits(), 1)
    for row, expected in zip(found, exact, strict=True):
        largest = expected.argsort(descending=True)
        torch.testing.assert_close(row[largest[:3]], expected[largest[:3]], rtol=5e-3, atol=0)
        torch.testing.assert_close(row[largest[3:]], expected[largest[3:]].mean().expand(7), rtol=0.05, atol=1e-4)


def test_logits_of_any_size_are_stored():
    sharp = torch.tensor([[1e5, 0.0, -1e5], [0.0, 0.0, 0.0]])
    for codec in (LogProbabilities(3, 3), LogProbabilities(3, 1)):
        rows = codec.encode(sharp)
        assert not codec.missing(rows).any()
        assert torch.allclose(F.softmax(codec.decode(rows, CPU), 1)[0], torch.tensor([1.0, 0.0, 0.0]), atol=1e-3)


# -- the files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fill(tmp_path):
    """Fill an epoch of 12 views in batches of two per rank, up to a number; return each rank's cache."""

    def run(world_size=1, epoch=0, batches=None, codec=None, folder=tmp_path):
        caches = []
        for rank in range(world_size):
            cache = TeacherCache(folder, codec or Labels(10), 12, rank, world_size)
            cache.open(epoch)
            own = np.arange(rank, 12, world_size)
            for start in list(range(0, len(own), 2))[:batches]:
                positions = own[start : start + 2]
                cache.write(positions, cache.codec.encode(F.one_hot(torch.from_numpy(positions % 10), 10).float()))
            caches.append(cache)
        return caches

    return run


@pytest.mark.parametrize(("writers", "readers"), [(1, 1), (2, 2), (3, 1), (1, 4), (2, 3)])
def test_any_number_of_ranks_reads_what_any_number_wrote(fill, tmp_path, writers, readers):
    fill(writers)
    for rank in range(readers):
        cache = TeacherCache(tmp_path, Labels(10), 12, rank, readers)
        assert cache.is_whole(0) and not cache.is_whole(1)
        cache.open(0)
        positions = np.arange(rank, 12, readers)
        assert cache.read(positions)["label"].tolist() == (positions % 10).tolist()


def test_a_cache_file_resumes_where_it_stopped(fill, tmp_path):
    (cache,) = fill(batches=4)
    assert not cache.is_whole(0) and cache.next_missing() == 8
    cache.close()
    again = TeacherCache(tmp_path, Labels(10), 12, 0, 1)
    again.open(0)
    assert again.next_missing() == 8
    assert again.codec.missing(again.read(np.arange(12))).tolist() == [False] * 8 + [True] * 4
    again.write(np.arange(8, 12), again.codec.encode(torch.eye(10)[:4]))
    assert again.is_whole(0) and again.next_missing() == 12
    assert not list(tmp_path.glob("*.part.*"))


def test_a_cache_file_half_written_by_a_killed_process_is_removed(fill, tmp_path):
    left = tmp_path / ".epoch_0000_rank0of1.part.npy.4194305.tmp"  # above all process numbers
    left.write_bytes(b"half")
    fill(batches=4)
    assert [path.name for path in tmp_path.glob("*.npy")] == ["epoch_0000_rank0of1.part.npy"] and not left.exists()


def test_an_epoch_is_whole_when_all_ranks_have_finished_it(fill, tmp_path):
    _, second = fill(2, batches=None)
    assert second.is_whole(0)
    second.close()
    next(tmp_path.glob("*rank1of2*")).unlink()
    assert not second.is_whole(0)
    first = TeacherCache(tmp_path, Labels(10), 12, 0, 2)
    first.open(0)
    assert first.next_missing() == 6  # of its own views it has all
    assert first.read(np.arange(0, 12, 2))["label"].tolist() == [0, 2, 4, 6, 8, 0]


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty", "another kind", "another length"])
def test_a_damaged_file_is_named(fill, tmp_path, harm):
    (cache,) = fill()
    cache.close()
    (path,) = tmp_path.glob("*.crc*")
    content = bytearray(path.read_bytes())
    if harm == "flipped":
        content[-3] ^= 1
    path.write_bytes({"truncated": content[:-2], "flipped": content, "empty": b""}.get(harm, content))
    codec = LogProbabilities(10, 10) if harm == "another kind" else Labels(10)
    reader = TeacherCache(tmp_path, codec, 14 if harm == "another length" else 12, 0, 1)
    with pytest.raises(RunError, match="is damaged") as info:
        reader.open(0)
    assert path.name in str(info.value)


def test_two_writers_of_one_file_are_refused(fill, tmp_path):
    (first,) = fill(batches=2)
    second = TeacherCache(tmp_path, Labels(10), 12, 0, 1)
    with pytest.raises(RunError, match="another run is adding"):
        second.open(0)
    second.open(1)  # another epoch is free
    first.close()
    TeacherCache(tmp_path, Labels(10), 12, 0, 1).open(0)


def test_a_full_disk_is_said_before_and_while_writing(tmp_path, monkeypatch):
    with tiny.user_error("--teacher-cache", "MiB", "--augmentation-epochs"):
        TeacherCache(tmp_path / "new", LogProbabilities(1000, 1000), 10**9, 0, 1).check_space(300)
    imagenet = TeacherCache(tmp_path / "new", Labels(1000), 1281167 // 1024 * 1024, 0, 1)
    assert imagenet.check_space(300) < 800e6

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(RunError, match="No space left"):
        TeacherCache(tmp_path, Labels(10), 12, 0, 1).open(0)


def test_a_quota_is_said_while_a_cache_file_is_created(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # no file may be larger
        with pytest.raises(RunError, match=r"part.npy cannot be written \(the disk or a quota is full\)"):
            TeacherCache(tmp_path, Labels(10), 10000, 0, 1).open(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.ESTALE, errno.ENOSPC])
def test_an_error_while_a_cache_file_is_finished_names_it(fill, tmp_path, number, monkeypatch):
    def fails(_):
        raise OSError(number, os.strerror(number))  # what mmap.flush raises, without a file name

    monkeypatch.setattr(np.memmap, "flush", fails)
    with pytest.raises(RunError, match=rf"rank0of1.part.npy cannot be written \({os.strerror(number)}\)"):
        fill()
    monkeypatch.undo()
    assert TeacherCache(tmp_path, Labels(10), 12, 0, 1).is_whole(0) is False


def test_a_cache_file_that_cannot_be_read_is_not_called_damaged(fill, tmp_path, monkeypatch):
    fill()[0].close()

    def stale(*_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(np.lib.format, "open_memmap", stale)
    with pytest.raises(RunError, match=r"npy cannot be read \(Stale file handle\); fix that and repeat") as info:
        TeacherCache(tmp_path, Labels(10), 12, 0, 1).open(0)
    assert "delete" not in str(info.value)


@pytest.mark.parametrize("codec", [Labels(10), LogProbabilities(10, 4), LogProbabilities(10, 10)])
def test_the_teacher_sees_each_view_once(tmp_path, codec):
    seen = []

    def live(batch):
        seen.extend(batch.positions.tolist())
        return logits(len(batch.positions), seed=int(batch.positions[0]))

    def predictions(teacher):
        batches = [Batch(torch.zeros(3, 1), None, torch.arange(start, start + 3)) for start in (0, 3, 6, 9)]
        return torch.cat([teacher(batch) for batch in batches])

    first = predictions(CachedTeacher(TeacherCache(tmp_path, codec, 12, 0, 1), lambda: 5, live))
    again = predictions(CachedTeacher(TeacherCache(tmp_path, codec, 12, 0, 1), lambda: 5, None))
    assert seen == list(range(12)) and torch.equal(first, again)
    with pytest.raises(RunError, match="predictions of epoch 6 are missing"):
        predictions(CachedTeacher(TeacherCache(tmp_path, codec, 12, 0, 1), lambda: 6, None))


@pytest.mark.parametrize(
    ("codec", "value"),
    [(codec, torch.nan) for codec in (Labels(10), LogProbabilities(10, 10), LogProbabilities(10, 4))]
    + [(codec, torch.inf) for codec in (LogProbabilities(10, 10), LogProbabilities(10, 4))],
)
def test_a_prediction_that_is_not_finite_is_refused_and_not_cached(tmp_path, codec, value):
    logits = torch.zeros(3, 10)
    logits[1, 7] = value
    teacher = CachedTeacher(TeacherCache(tmp_path, codec, 3, 0, 1), lambda: 0, lambda _: logits)
    with pytest.raises(RunError, match="logits in epoch 0 are not finite; try --amp off"):
        teacher(Batch(torch.zeros(3, 1), None, torch.arange(3)))
    assert teacher.cache.next_missing() == 0 and not teacher.cache.is_whole(0)


NAMELESS = types.SimpleNamespace(class_names=(), class_samples=())  # data that do not name their classes


def test_a_fingerprint_names_what_differs_and_passes_over_what_is_unknown(tmp_path):
    ours = {"seed": 0, "input_size": (32,), "teacher_weights": "abc"}
    check_fingerprint(tmp_path / "deep" / "cached", ours, NAMELESS)
    check_fingerprint(tmp_path / "deep" / "cached", ours, NAMELESS)
    check_fingerprint(tmp_path / "deep" / "cached", ours | {"teacher_weights": None}, NAMELESS)
    with tiny.user_error("seed (0 there, 1 here)", "teacher_weights ('abc' there, 'abd' here)"):
        check_fingerprint(tmp_path / "deep" / "cached", ours | {"seed": 1, "teacher_weights": "abd"}, NAMELESS)
    (tmp_path / "deep" / "cached" / "fingerprint.json").write_text("{")
    with tiny.user_error("fingerprint.json cannot be read"):
        check_fingerprint(tmp_path / "deep" / "cached", ours, NAMELESS)


@pytest.mark.parametrize("classes", [10, 1000])
def test_a_soft_loss_with_all_classes_cached_is_that_of_the_logits(classes):
    codec, teacher = LogProbabilities(classes, classes), logits(32, classes)
    for tau in (1.0, 3.0):
        student = logits(32, classes, seed=1)
        found, expected = (
            soft_distillation(student, target, tau, "batchmean")
            for target in (codec.decode(codec.encode(teacher), CPU), teacher)
        )
        assert found.item() == pytest.approx(expected.item(), rel=1e-3)


# -- whole runs --------------------------------------------------------------------------------------------------------

# with all augmentation, 7 updates in an epoch
RUN = [*tiny.TINY, "--epochs", "2", "--train-fraction", "0.16", "--batch-size", "32", "--teacher-model", "test_resnet"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    flags = [*tiny.RESNET, "--epochs", "2", "--lr", "1e-2", "--warmup-epochs", "0"]
    main.cli([*flags, "--output-dir", str(folder)])
    return ["--teacher-path", str(folder / "best.pth")]


@pytest.fixture(scope="module")
def cached(teacher, tmp_path_factory):
    """A cache for hard distillation, filled by one process."""
    folder = tmp_path_factory.mktemp("cached") / "cache"
    precompute(folder, *teacher)
    return folder


def precompute(folder, *flags, kind="hard"):
    flags = [*RUN, "--distillation-type", kind, "--precompute-teacher", "--teacher-cache", folder, *flags]
    main.cli([str(flag) for flag in flags])


def same_bits(first, second):
    one, two = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (first, second))
    return all(torch.equal(one[kind][name], two[kind][name]) for kind in ("model", "model_ema") for name in one[kind])


@pytest.mark.process
@pytest.mark.parametrize("processes", [1, 2])
def test_students_of_cached_and_live_teacher_are_bitwise_identical(processes, teacher, cached, tmp_path):
    def train(name, *flags):
        command = [*RUN, "--distillation-type", "hard", "--output-dir", tmp_path / name, *flags]
        if processes > 1:
            tiny.torchrun(processes, "main.py", *command)
        else:
            main.cli([str(word) for word in command])

    train("live", *teacher)
    if processes > 1:
        cached = tmp_path / "cache"
        train("none", *teacher, "--teacher-cache", cached, "--precompute-teacher")
        assert not (tmp_path / "none").exists() and len(list(cached.glob("*.crc*"))) == 4
    train("cached", "--teacher-cache", cached, "--num-workers", "1")  # without any teacher
    assert same_bits(tmp_path / "live", tmp_path / "cached")
    train("added", *teacher, "--teacher-cache", tmp_path / "new", "--num-workers", "2")
    assert same_bits(tmp_path / "live", tmp_path / "added")
    names = sorted(path.name for path in cached.iterdir())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names  # checksums included


@pytest.mark.slow
def test_device_views_are_the_same_for_teacher_and_student(teacher, tmp_path):
    def train(name, *flags):
        flags = [*RUN, "--augment", "device", "--distillation-type", "hard", "--output-dir", tmp_path / name, *flags]
        main.cli([str(flag) for flag in flags])

    train("live", *teacher)
    train("none", *teacher, "--teacher-cache", tmp_path / "cache", "--precompute-teacher")
    train("cached", "--teacher-cache", tmp_path / "cache")
    assert same_bits(tmp_path / "live", tmp_path / "cached")


@pytest.mark.slow
def test_a_teacher_of_another_size_is_cached_like_a_live_one(tmp_path):
    few = ["--train-fraction", "0.1", "--batch-size", "32"]
    sized = ["--model", "deit_tiny_patch16_224", *tiny.MODEL, "--input-size", "48", *tiny.DATA, "--epochs", "1", *few]
    main.cli([*sized, "--warmup-epochs", "0", "--output-dir", str(tmp_path / "teacher")])
    student = [*tiny.TINY, *few, "--distillation-type", "hard"]
    kwargs = ["patch_size=8", "embed_dim=48", "depth=2", "num_heads=3"]  # for the 36 positions of 48 px
    student += ["--teacher-model", "deit_tiny_patch16_224", "--teacher-model-kwargs", *kwargs]
    taught = ["--teacher-path", str(tmp_path / "teacher" / "best.pth"), "--teacher-input-size", "48"]
    cache = ["--teacher-cache", str(tmp_path / "cache")]
    main.cli([*student, *taught, "--output-dir", str(tmp_path / "live")])
    main.cli([*student, *taught, *cache, "--precompute-teacher"])
    main.cli([*student, *taught, *cache, "--output-dir", str(tmp_path / "cached")])
    assert same_bits(tmp_path / "live", tmp_path / "cached")


@pytest.mark.slow
def test_soft_losses_of_cached_and_live_teacher_agree_at_every_step(teacher, tmp_path, capsys):
    def output(*flags):
        run = [*RUN, "--distillation-type", "soft", "--distillation-tau", "2", *teacher, "--log-interval", "1", *flags]
        main.cli([str(flag) for flag in run])
        return capsys.readouterr().err

    cache = ["--teacher-cache", tmp_path / "cache"]
    outputs = [output("--output-dir", tmp_path / "live")]
    output(*cache, "--precompute-teacher")
    outputs.append(output(*cache, "--output-dir", tmp_path / "cached"))
    live, cached_values = ([float(loss) for loss in re.findall(r"step \S+  loss (\S+)", output)] for output in outputs)
    assert len(live) == 2 * 7 and cached_values == pytest.approx(live, rel=1e-3)
    for live, cached_values in zip(tiny.log_of(tmp_path / "live"), tiny.log_of(tmp_path / "cached"), strict=True):
        for name in ("train_loss", "train_loss_distillation", "test_loss"):
            assert cached_values[name] == pytest.approx(live[name], rel=1e-3), name


@pytest.mark.process
def test_a_killed_precomputation_resumes_and_writes_the_same_files(teacher, cached, tmp_path):
    command = ["main.py", *RUN, "--distillation-type", "hard", "--precompute-teacher", *teacher]
    command += ["--teacher-cache", tmp_path / "cache", "--log-interval", "1", "--epochs", "2"]
    process = tiny.Process(command)
    deadline = time.monotonic() + 120
    part = tmp_path / "cache" / "epoch_0000_rank0of1.part.npy"

    def some_written():
        return part.exists() and (np.load(part, mmap_mode="r")["label"] != 0xFFFF).sum() >= 64

    while not some_written() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    tiny.run(*command)
    names, expected = (
        sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")
        for folder in (tmp_path / "cache", cached)
    )
    assert names == expected


@pytest.mark.slow
def test_epochs_are_split_up_and_missing_ones_are_named(teacher, cached, tmp_path, capsys):
    folder = tmp_path / "cache"
    precompute(folder, *teacher, "--precompute-epochs", "1:2")
    with pytest.raises(SystemExit):
        main.cli([*RUN, "--distillation-type", "hard", "--teacher-cache", str(folder), "--output-dir", ""])
    assert "has no predictions for 1 epochs, the first is 0" in capsys.readouterr().err
    precompute(folder, *teacher, "--precompute-epochs", "0:1")
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in cached.iterdir())


@pytest.mark.slow
def test_larger_teacher_batches_give_the_same_predictions(teacher, cached, tmp_path):
    precompute(
        tmp_path / "cache", *teacher, "--precompute-batch-size", "96"
    )  # three batches at once, then what is left
    for path in cached.glob("*.npy"):
        (other,) = (tmp_path / "cache").glob(f"{path.name.partition('.')[0]}.*")
        assert (np.load(path)["label"] == np.load(other)["label"]).mean() > 0.99  # but for the last bit of a tie


@pytest.mark.slow
def test_with_a_period_the_same_views_come_again(teacher, tmp_path):
    flags = [*RUN, "--epochs", "3", "--augmentation-epochs", "1", "--distillation-type", "hard"]
    flags += ["--teacher-cache", str(tmp_path / "cache"), "--output-dir", str(tmp_path / "run")]
    main.cli([*flags, *teacher])
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    accuracies = [record["train_teacher_acc1"] for record in tiny.log_of(tmp_path / "run")]
    assert accuracies[0] == accuracies[1] == accuracies[2]
    losses = [record["train_loss"] for record in tiny.log_of(tmp_path / "run")]
    assert len(set(losses)) == 3


OTHER = {
    "seed": ["--seed", "1"],
    "data_set": ["--data-set", "torch/CIFAR10"],
    "train_fraction": ["--train-fraction", "0.9"],
    "aa": ["--aa", "none"],
    "hflip": ["--hflip", "0"],
    "color_jitter": ["--color-jitter", "0.1"],
    "train_interpolation": ["--train-interpolation", "bilinear"],
    "reprob": ["--reprob", "0"],
    "remode": ["--remode", "const"],
    "augmentation": ["--augment", "device"],
    "recount": ["--recount", "2"],
    "repeated_aug": ["--no-repeated-aug"],
    "mixup": ["--mixup", "0.5"],
    "cutmix": ["--cutmix", "0.5"],
    "cutmix_minmax": ["--cutmix-minmax", "0.1", "0.2"],
    "mixup_prob": ["--mixup-prob", "0.5"],
    "mixup_switch_prob": ["--mixup-switch-prob", "0.1"],
    "mixup_mode": ["--mixup-mode", "elem"],
    "batch_size": ["--batch-size", "16"],
    "input_size": ["--input-size", "40"],
    "teacher_model": ["--teacher-model", "test_vit"],
    "teacher_model_kwargs": ["--teacher-model-kwargs", "drop_rate=0"],
    "teacher_input_size": ["--teacher-input-size", "64"],
    "precision": ["--amp", "bf16" if select_amp("auto", CPU) is None else "off"],
    "distillation_type": ["--distillation-type", "soft"],
}


COMPUTED = ("augmentation", "precision", "batch_size", "input_size", "teacher_model", "distillation_type")


@pytest.mark.parametrize("field", [field for field in OTHER if field not in COMPUTED])
def test_a_flag_that_changes_the_predictions_is_in_the_fingerprint(field):
    hard = [*RUN, "--distillation-type", "hard"]
    ours, theirs = (main.shaping(parse_args(words), "views", "teacher") for words in (hard, [*hard, *OTHER[field]]))
    assert {name for name in ours if ours[name] != theirs[name]} == {field}


@pytest.mark.parametrize("field", COMPUTED)
def test_a_cache_of_another_run_is_refused_with_the_field(field, cached, capsys):
    flags = [*RUN, "--distillation-type", "hard", "--teacher-cache", str(cached), "--output-dir", "", *OTHER[field]]
    with pytest.raises(SystemExit) as exit_info:
        main.cli(flags)
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit_info.value.code == 2 and "was computed with other flags or data" in error and f"{field} (" in error


def test_any_field_of_a_fingerprint_is_compared_and_named(cached):
    fields = json.loads((cached / "fingerprint.json").read_text())
    assert {"views", "labels", "normalization", "augmentation", "processes", "teacher_weights"} <= fields.keys()
    for field in fields:
        # of soft distillation, of files, and with a message of their own
        if field not in ("topk", "samples", "class_names"):
            with tiny.user_error(f"{field} ("):
                check_fingerprint(cached, fields | {field: "another"}, NAMELESS)


def test_a_flag_that_is_unset_now_is_compared_too(cached, tmp_path):
    """Predictions for views with --cutmix-minmax, or at another teacher's size, are not those for views without."""
    fields = json.loads((cached / "fingerprint.json").read_text())
    names = types.SimpleNamespace(class_names=tuple(fields.pop("class_names")), class_samples=())
    known = {name for name, value in fields.items() if value}
    check_fingerprint(cached, fields, names)
    for field in known - {*teachers.MAY_BE_UNKNOWN, "class_names"}:
        with tiny.user_error(f"{field} ("):
            check_fingerprint(cached, fields | {field: None}, names)
    for field in ("cutmix_minmax", "teacher_input_size", "image_column"):
        folder = tmp_path / field
        check_fingerprint(folder, fields | {field: [0.2, 0.8]}, names)
        with tiny.user_error(f"{field} ([0.2, 0.8] there, None here)"):
            check_fingerprint(folder, fields | {field: None}, names)


def test_a_cache_of_other_files_is_refused(cached, tmp_path):
    folder = shutil.copytree(cached, tmp_path / "cache")
    fields = json.loads((folder / "fingerprint.json").read_text())
    names = types.SimpleNamespace(class_names=tuple(fields["class_names"]), class_samples=())
    others = {name: value for name, value in fields.items() if name not in ("files", "class_names")}
    with tiny.user_error("files ("):
        check_fingerprint(folder, others | {"files": fields["files"] + 1}, names)
    del fields["files"]
    (folder / "fingerprint.json").write_text(json.dumps(fields))  # of an earlier version
    check_fingerprint(folder, others | {"files": 3}, names)


def test_a_cache_of_files_with_other_content_is_refused(cached, tmp_path):
    folder = shutil.copytree(cached, tmp_path / "cache")
    fields = json.loads((folder / "fingerprint.json").read_text()) | {"samples": [7, 8, -1]}
    names = types.SimpleNamespace(class_names=tuple(fields["class_names"]), class_samples=())
    (folder / "fingerprint.json").write_text(json.dumps(fields))
    del fields["class_names"]
    for same in ([7, 8, -1], [7, 8, 9], [-1, 8, -1], None):
        check_fingerprint(folder, fields | {"samples": same}, names)
    with tiny.user_error("was computed with other flags or data: samples ([7, 8, -1] there, [7, 9, -1] here)"):
        check_fingerprint(folder, fields | {"samples": [7, 9, -1]}, names)
    stored = json.loads((folder / "fingerprint.json").read_text())
    del stored["samples"]  # of an earlier version
    (folder / "fingerprint.json").write_text(json.dumps(stored))
    check_fingerprint(folder, fields, names)


def test_a_fingerprint_holds_a_checksum_of_one_image_per_class(tmp_path):
    tiny.write_folders(tmp_path, ["a", "b"])
    words = [*tiny.PLAIN, "--data-set", "IMNET", "--data-path", str(tmp_path), "--batch-size", "8"]
    run = main.build_run(parse_args(words), World.alone(CPU))
    loader, _ = main.training_batches(run)
    flags = main.shaping(run.args, "views", "teacher")
    found = teachers.fingerprint(flags, run.train, loader, run.normalization, None, None, run.world)
    first = [(tmp_path / "train" / name / "0.png").read_bytes() for name in "ab"]
    assert found["samples"] == [zlib.crc32(content) for content in first]


def test_a_dry_run_adds_nothing_to_a_cache(teacher, tmp_path):
    flags = [*RUN, *teacher, "--distillation-type", "hard", "--teacher-cache", str(tmp_path / "cache")]
    main.cli([*flags, "--output-dir", "", "--dry-run"])
    assert not list(tmp_path.iterdir())


def test_a_cache_is_refused_for_other_classes(cached, tmp_path):
    folder = shutil.copytree(cached, tmp_path / "cache")
    fields = json.loads((folder / "fingerprint.json").read_text())
    digits = [str(digit) for digit in range(10)]
    assert fields.pop("class_names") == digits
    turned = types.SimpleNamespace(class_names=tuple(digits[::-1]), class_samples=())
    with tiny.user_error(folder, "class 0 is '0' there and '9' in the data", "the same names in another order"):
        check_fingerprint(folder, fields, turned)
    check_fingerprint(folder, fields, turned, allow_mismatch=True)


@pytest.mark.process
def test_caches_of_other_teachers_and_processes_are_refused(teacher, cached, tmp_path, capsys):
    run = [*RUN, "--distillation-type", "hard", "--teacher-cache", str(cached), "--output-dir", ""]
    shutil.copy(teacher[1], tmp_path / "other.pth")
    with (tmp_path / "other.pth").open("ab") as file:
        file.write(b"x")
    for flags, words in [
        ([*run, "--teacher-path", str(tmp_path / "other.pth")], "teacher_weights ("),
        (
            [*RUN, "--distillation-type", "hard", "--teacher-cache", str(tmp_path / "new")],
            "no predictions for 2 epochs",
        ),
    ]:
        with pytest.raises(SystemExit) as exit_info:
            main.cli(flags)
        assert exit_info.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
    command = ["main.py", *RUN, "--batch-size", "16", "--distillation-type", "hard", "--teacher-cache", cached]
    assert "processes (1 there, 2 here)" in tiny.torchrun(2, *command, "--output-dir", "", status=1)


@pytest.mark.process
def test_without_mixing_another_number_of_processes_may_read(teacher, tmp_path):
    plain = ["--mixup", "0", "--cutmix", "0", "--distillation-type", "hard", "--teacher-cache", tmp_path / "cache"]
    tiny.torchrun(2, "main.py", *RUN, *plain, *teacher, "--batch-size", "16", "--precompute-teacher")
    tiny.run("main.py", *RUN, *plain, "--output-dir", tmp_path / "run")
    assert len(tiny.log_of(tmp_path / "run")) == 2


# -- heads on cached features ------------------------------------------------------------------------------------------


def test_features_are_what_the_head_is_given(teacher):
    args = parse_args([*tiny.HEAD, *tiny.ONE_VIEW, "--amp", "off", "--finetune", teacher[1]])
    run = main.build_run(args, World.alone(CPU))
    model, source = run.model, run.train
    cached, head = main.cache_features(run)
    assert head is model.get_classifier() and len(cached) == len(source)
    seen = []
    head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    transform = build_eval_transform(ViewOptions(input_size=(32, 32)), run.normalization)
    for index in (0, 7, len(source) - 1):
        image, target = source[index]
        with torch.no_grad():
            model.eval()(transform(image)[None])
        assert cached[index][1] == target
        torch.testing.assert_close(cached[index][0], seen[-1][0], rtol=1e-4, atol=1e-5)


def test_features_reach_the_head_as_they_are(teacher):
    args = parse_args([*tiny.HEAD, *tiny.ONE_VIEW, "--amp", "off", "--finetune", teacher[1]])
    run = main.build_run(args, World.alone(CPU))
    cached, _ = main.cache_features(run)
    loader, head = main.training_batches(run)
    assert head is run.model.get_classifier()
    loader.set_epoch(0)
    classes = {cached[index][0].numpy().tobytes(): cached[index][1] for index in range(len(cached))}
    seen = [(row.numpy().tobytes(), target.item()) for batch in loader for row, target in zip(*batch[:2], strict=True)]
    assert len(seen) == len(dict(seen)) == 22 * 64 and all(classes[row] == target for row, target in seen)


@pytest.mark.process
def test_a_head_on_cached_features_is_trained_alone_and_saved_whole(teacher, tmp_path, capsys):
    run = [*tiny.HEAD, *tiny.ONE_VIEW, "--finetune", teacher[1], "--epochs", "30", "--eval-interval", "30"]
    main.cli([*run, "--lr", "1e-2", "--lr-scaling", "none", "--weight-decay", "0", "--output-dir", str(tmp_path)])
    before = torch.load(teacher[1], weights_only=True)["model"]
    after = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fc.weight", "fc.bias"}
    evaluated = tiny.run("main.py", *tiny.RESNET, "--eval", "--resume", tmp_path / "checkpoint.pth")
    accuracy = tiny.log_of(tmp_path)[-1]["test_acc1"]
    assert accuracy > 75 and f"test_acc1 {accuracy:.4g}" in evaluated


def test_a_resumed_head_is_trained_on_the_features_of_its_own_model(teacher, tmp_path, monkeypatch):
    run = [*tiny.HEAD, *tiny.ONE_VIEW, "--finetune", teacher[1], "--epochs", "2", "--train-fraction", "0.1"]
    main.cli([*run, "--output-dir", str(tmp_path / "whole")])

    def stopped(*_):
        raise RunError("stopped")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(engine, "_test", stopped)  # after the first epoch was saved
        main.cli([*run, "--output-dir", str(tmp_path / "stopped")])
    main.cli([*run, "--output-dir", str(tmp_path / "stopped"), "--resume", "auto"])
    assert chaos.compare(tmp_path / "whole", tmp_path / "stopped") == []


def test_a_closed_epoch_is_unlocked_although_a_forked_process_has_it_open(tmp_path):
    first, second = (TeacherCache(tmp_path, Labels(10), 12, 0, 1) for _ in range(2))
    first.open(0)
    child = os.fork()
    if not child:
        signal.pause()
    first.close()
    try:
        second.open(0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_features_for_two_heads_are_a_one_line_error(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main.cli([*tiny.HEAD, *tiny.ONE_VIEW, "--model", "deit_tiny_distilled_patch16_224", "--output-dir", ""])
    words = "does not end in one linear layer"
    assert exit_info.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_model_of_one_head_learns_from_both(teacher, tmp_path):
    plain = ["--model", "deit_tiny_patch16_224", "--distillation-type", "hard", *teacher]
    main.cli([*RUN, *plain, "--distill-on-class-token", "--output-dir", str(tmp_path)])
    record = tiny.log_of(tmp_path)[-1]
    combined = 0.5 * record["train_loss_base"] + 0.5 * record["train_loss_distillation"]
    assert record["train_loss"] == pytest.approx(combined, abs=1e-4)
    assert not any("dist" in name for name in torch.load(tmp_path / "best.pth", weights_only=True)["model"])
