"""Whole runs in this process: what they write, and flags that work together."""

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import tiny
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoints
import datasets
import engine
import loaders
import main
import models
import sources
import utils
from augment import ViewOptions
from flags import check_flags, fill, parse_args, parse_command
from models_evit import evit_blocks

PUBLISHED_KEYS = {"train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"}


SMALL = [*tiny.TINY, "--train-fraction", "0.1", "--batch-size", "16", "--lr", "2e-3"]  # an epoch of 8 updates


def run(folder, *flags):
    main.cli([*SMALL, "--output-dir", str(folder), *map(str, flags)])
    return None if "--dry-run" in flags else tiny.log_of(folder)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    run(folder, "--model", "deit_tiny_patch16_224", "--epochs", "2")
    return folder


@pytest.fixture(scope="module")
def teacher_flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    main.cli([*tiny.RESNET, "--epochs", "1", "--train-fraction", "0.25", "--output-dir", str(folder)])
    return ["--teacher-model", "test_resnet", "--teacher-path", folder / "best.pth"]


def test_log_has_a_line_per_epoch_with_the_published_keys(plain_run):
    log = tiny.log_of(plain_run)
    assert [record["epoch"] for record in log] == [0, 1]
    for record in log:
        assert record.keys() >= PUBLISHED_KEYS | {
            "test_ema_loss",
            "test_ema_acc1",
            "test_ema_acc5",
            "images_per_second",
        }


def events_in(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_has_the_log_and_every_step(plain_run):
    log, events = tiny.log_of(plain_run), events_in(plain_run)
    for name in PUBLISHED_KEYS - {"epoch"}:
        values = [event.value for event in events.Scalars(f"epoch/{name}")]
        assert values == pytest.approx([record[name] for record in log], rel=1e-6)
        assert [event.step for event in events.Scalars(f"epoch/{name}")] == [8, 16]
    assert "epoch/epoch" not in events.Tags()["scalars"]
    steps = events.Scalars("step/loss")
    assert [event.step for event in steps] == list(range(16))  # 8 updates in each of two epochs
    rates = [event.value for event in events.Scalars("step/lr")]
    assert len(rates) == 16 and rates == sorted(rates, reverse=True)  # a cosine without warm-up
    assert sum(event.value for event in steps[:8]) / 8 == pytest.approx(log[0]["train_loss"], rel=1e-5)


def test_tensorboard_has_flags_layout_and_training_images(plain_run):
    events = events_in(plain_run)
    assert {"flags/text_summary", "custom_scalars__config__"} <= set(events.Tags()["tensors"])
    assert any(name.startswith("_hparams_") for name in events.summary_metadata)
    text = events.Tensors("flags/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| model | deit_tiny_patch16_224 |" in text and "| batch_size | 16 |" in text
    pictures = events.Images("training images") if "training images" in events.Tags()["images"] else []
    assert len(pictures) == 1 and (pictures[0].step, pictures[0].height) == (0, 32)


def test_epochs_are_a_table_of_80_columns(tmp_path, capsys):
    log = run(tmp_path, "--epochs", "2")
    lines = [
        line for line in capsys.readouterr().err.splitlines() if " 1/2 " in line or " 2/2 " in line or "top-1 " in line
    ]
    heading, *rows = [line for line in lines if "best top-1" not in line]
    assert heading.split()[1:] == ["epochs", "loss", "lr", "top-1", "top-5", "EMA", "best", "images/s", "left"]
    for row, record in zip(rows, log, strict=True):
        cells = dict(zip(heading.split(), row.split(), strict=True))
        assert len(row) <= 80 and cells["loss"] == f"{record['train_loss']:.3f}"
        assert [cells[name] for name in ("top-1", "top-5", "EMA")] == [
            f"{record[f'test_{name}']:.2f}" for name in ("acc1", "acc5", "ema_acc1")
        ]
    assert rows[1].split()[-1] == "0:00:00"


def test_a_run_says_first_what_it_trains(tmp_path, capsys):
    run(tmp_path, "--train-scope", "head", "--dry-run")
    said = capsys.readouterr().err
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10
    )
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    # patches, and of 18 tokens: qkv, attention (twice 18 x 48), projection, MLP; two heads
    tokens, width = 18, 48
    block = tokens * width * (3 * width + 2 * tokens + width + 8 * width)
    macs = 16 * 3 * 64 * width + 2 * block + 2 * width * 10
    assert f"{size:.2f} M parameters (0.00 M trained), {macs / 1e9:.3g} GMACs at 32 x 32 px" in said
    assert models.count_macs(model, (32, 32)) == macs
    assert "143 training and 355 validation images, 10 classes" in said
    assert "1 epochs of 8 updates of 16 images" in said and str(tmp_path) in said


def test_a_dry_run_saves_nothing_and_says_what_a_run_would_take(tmp_path, capsys):
    main.cli([*tiny.TINY, "--output-dir", str(tmp_path / "x"), "--dry-run", "--epochs", "30", "--accum-steps", "2"])
    said = capsys.readouterr().err
    assert "dry run: an update takes" in said and "all 30 epochs 0:" in said and "GiB" in said
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit):
        main.cli([*tiny.TINY, "--dry-run", "--eval", "--pretrained"])
    assert "--dry-run: --eval trains nothing" in capsys.readouterr().err


def test_a_dry_run_counts_the_evaluations_of_the_whole_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "_evaluation_seconds", lambda *_: 3600)
    run(tmp_path / "x", "--dry-run", "--epochs", "8", "--eval-interval", "3")  # after 3, 6 and 8 epochs
    assert re.search(r"an evaluation 1:00:00, all 8 epochs 3:0\d:", capsys.readouterr().err)


def test_a_dry_run_of_an_epoch_without_updates_left_takes_the_next_ones(tmp_path, capsys, monkeypatch):
    def stopped(*_):
        raise utils.RunError("stopped")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(engine, "_test", stopped)  # after the epoch was saved, before its evaluation
        run(tmp_path, "--epochs", "2")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run(tmp_path, "--epochs", "2", "--resume", "auto", "--dry-run")
    assert "dry run: an update takes" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files


def test_few_images_from_scratch_are_a_warning(tmp_path, capsys):
    run(tmp_path / "scratch", "--batch-size", "32")
    assert "are too few to train deit_tiny_distilled_patch16_224 from scratch" in capsys.readouterr().err
    run("", "--finetune", tmp_path / "scratch" / "checkpoint.pth", "--dry-run")
    assert "are too few" not in capsys.readouterr().err


@pytest.mark.process
def test_weights_and_biases_gets_every_value(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    seen, log = [], wandb.sdk.wandb_run.Run.log
    monkeypatch.setattr(
        wandb.sdk.wandb_run.Run, "log", lambda run, values, **at: (seen.append((values, at)), log(run, values, **at))
    )
    (record,) = run(tmp_path, "--log-wandb", "mine")
    values = {name: value for each, at in seen for name, value in each.items() if name.startswith("epoch/")}
    assert values == {f"epoch/{name}": value for name, value in record.items() if name != "epoch"}
    assert sum("step/loss" in each for each, _ in seen) == 8
    assert list((tmp_path / "tensorboard" / "wandb").glob("offline-run-*/*.wandb"))


def test_checkpoints_are_plain_and_hold_the_flags_as_json(plain_run):
    checkpoint = torch.load(plain_run / "checkpoint.pth", weights_only=True)
    expected = {"model", "optimizer", "lr_scheduler", "scaler", "model_ema", "epoch", "step", "best_acc1", "args"}
    expected |= {"progress", "broken_images", "run", "validation", "class_names", "class_samples", "best_epoch"}
    assert checkpoint.keys() == expected
    assert (checkpoint["epoch"], checkpoint["step"]) == (2, 16)
    assert json.loads(json.dumps(checkpoint["args"]))["model"] == "deit_tiny_patch16_224"
    assert checkpoint["best_acc1"] == max(record["test_acc1"] for record in tiny.log_of(plain_run))
    assert torch.load(plain_run / "checkpoint_previous.pth", weights_only=True)["epoch"] == 1
    assert (plain_run / "best.pth").exists()


def test_plain_weights_are_fine_tuned_into_a_distilled_model(plain_run, teacher_flags, tmp_path):
    flags = ["--finetune", plain_run / "best.pth", "--distillation-type", "soft", *teacher_flags]
    (record,) = run(tmp_path, *flags, "--distillation-alpha", "0.3")
    combined = 0.7 * record["train_loss_base"] + 0.3 * record["train_loss_distillation"]
    assert record["train_loss"] == pytest.approx(combined, rel=1e-3)
    assert 0 <= record["train_teacher_acc1"] <= 100 and 0 <= record["train_teacher_agreement"] <= 100


def test_only_the_chosen_scope_is_trained(plain_run, tmp_path):
    start = torch.load(plain_run / "best.pth", weights_only=True)["model"]
    flags = ["--model", "deit_tiny_patch16_224", "--finetune", plain_run / "best.pth"]
    run(tmp_path, *flags, "--train-scope", "attn")
    end = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"]
    changed = {name for name in end if not torch.equal(start[name], end[name])}
    assert changed == {name for name in end if any(part in name for part in ("head.", ".attn.", "pos_embed"))}


@pytest.mark.slow
def test_flags_of_the_recipe_work_together(tmp_path):
    flags = ["--bce-loss", "--clip-grad", "1", "--accum-steps", "2", "--grad-checkpointing"]
    flags += ["--lr-scaling", "sqrt", "--drop", "0.1", "--amp", "bf16", "--opt", "lamb", "--mixup-mode", "elem"]
    (record,) = run(tmp_path, *flags)
    assert record["train_loss"] < 2  # binary cross-entropy of ten classes starts near log 2


def test_weights_and_ema_weights_of_timm_are_evaluated(plain_run, tmp_path, capsys):
    saved = torch.load(plain_run / "best.pth", weights_only=True)
    theirs = {"arch": "deit_tiny_patch16_224", "state_dict": saved["model"], "state_dict_ema": saved["model_ema"]}
    torch.save(theirs | {"args": argparse.Namespace(lr=np.float64(0.1), output=Path("a"))}, tmp_path / "timm.pth.tar")
    results = []
    for path in (plain_run / "best.pth", tmp_path / "timm.pth.tar"):
        main.cli([*tiny.TINY, "--model", "deit_tiny_patch16_224", "--eval", "--resume", str(path)])
        results.append(re.findall(r"test\w*_(?:loss|acc1) \S+", capsys.readouterr().err))
    assert results[0] == results[1] and len(results[0]) == 4
    assert results[0][0].split()[1] != results[0][2].split()[1]  # of the EMA weights


def test_an_evaluation_can_be_compiled(plain_run, capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append((type(module), options)))
    for words in ([], ["--compile"]):
        flags = ["--model", "deit_tiny_patch16_224", "--eval", "--resume", str(plain_run / "best.pth"), *words]
        main.cli([*tiny.TINY, *flags])
    assert compiled == [(timm.models.VisionTransformer, {"dynamic": False})]


def described(*words):
    """What the checkpoints of such a run say about its teacher."""
    source = sources.whole_source(sources.MemoryImages([np.zeros((8, 8, 3), np.uint8)]), np.zeros(1, int), range(1))
    world = utils.World.alone(torch.device("cpu"))
    run = main.Run(parse_args(list(map(str, words))), world, source, source, None, None, None, None, None)
    loader = argparse.Namespace(is_stream=False, augmentation={"where": "host"})
    found = main.describe_run(run, loader)["run"]
    return {name: found[name] for name in ("teacher", "soft predictions")}


def test_checkpoints_tell_which_teacher_and_predictions_taught(tmp_path):
    (tmp_path / "t.pth").write_bytes(b"teacher")
    of_file = {"teacher": hashlib.sha256(b"teacher").hexdigest(), "soft predictions": "cached"}
    soft = ["--distillation-type", "soft"]
    assert described(*soft, "--teacher-path", tmp_path / "t.pth", "--teacher-cache", tmp_path) == of_file
    assert described(*soft, "--teacher-pretrained") == {"teacher": "timm", "soft predictions": "live"}
    hard = {"teacher": "timm", "soft predictions": None}
    assert described("--distillation-type", "hard", "--teacher-pretrained") == hard
    assert described() == {"teacher": None, "soft predictions": None}


def test_an_earlier_run_is_resumed_or_kept_and_never_written_over(plain_run, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run(plain_run, "--model", "deit_tiny_patch16_224")
    assert exit_info.value.code == 2
    assert "--resume" in capsys.readouterr().err
    assert len(tiny.log_of(plain_run)) == 2


def test_a_fraction_of_the_data_is_logged(tmp_path, capsys):
    run("", "--batch-size", "32", "--no-repeated-aug", "--dry-run")
    assert "128 views of 128 different images (of 143)" in capsys.readouterr().err


def test_a_run_is_augmented_and_evaluated_on_the_device(plain_run, tmp_path, capsys):
    flags = ["--model", "deit_tiny_patch16_224", "--augment", "device"]
    (record,) = run(tmp_path, *flags)
    assert "augmented on the device" in capsys.readouterr().err
    assert record["train_loss"] == pytest.approx(tiny.log_of(plain_run)[0]["train_loss"], rel=0.05)
    evaluated = []
    for where in ("host", "device"):
        flags = ["--model", "deit_tiny_patch16_224", "--eval", "--resume", str(plain_run / "best.pth")]
        main.cli([*tiny.TINY, *flags, "--augment", where])
        evaluated.append(re.findall(r"test_loss (\S+)  test_acc1 (\S+)", capsys.readouterr().err)[0])
    (host_loss, host_acc1), (device_loss, device_acc1) = evaluated
    assert float(device_loss) == pytest.approx(float(host_loss), rel=1e-3)
    assert float(device_acc1) == pytest.approx(float(host_acc1), abs=1)


@pytest.mark.parametrize(
    ("device", "flags", "expected"),
    [
        ("cuda", [], True),
        ("cpu", [], False),
        ("cuda", ["--augment", "host"], False),
        ("cpu", ["--augment", "device"], True),
        ("cuda", ["--aa", "augmix-m5"], False),
        ("cuda", ["--aa", "3a"], True),
        ("cuda", ["--aa", "3a", "--src"], True),
        ("cuda", ["--src"], False),  # with operations that move the image
        ("cuda", ["--aa", "none"], True),
    ],
)
def test_images_in_memory_are_augmented_on_a_gpu_unless_told_otherwise(device, flags, expected):
    source, _ = datasets.read_sources(datasets.DataOptions("DIGITS"))
    args = parse_args(flags)
    views = fill(ViewOptions, args)
    assert loaders.augments_on_device(source, args.augment, views, torch.device(device)) == expected


def test_image_files_are_augmented_on_the_host(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.new("RGB", (20, 10)).save(tmp_path / part / "cat" / "1.png")
    source, _ = datasets.read_sources(datasets.DataOptions("IMNET", str(tmp_path)))
    views, gpu = ViewOptions(), torch.device("cuda")
    assert not loaders.augments_on_device(source, "auto", views, gpu)
    with tiny.user_error("--augment device", "tools.pack_dataset"):
        loaders.augments_on_device(source, "device", views, gpu)
    in_memory = sources.keep_in_memory(source, 1)
    assert loaders.augments_on_device(in_memory, "auto", views, gpu)


@pytest.mark.parametrize("scaling, lr", [("linear", "6.25e-05"), ("sqrt", "0.000177"), ("none", "0.0005")])
def test_the_rate_follows_the_effective_batch(scaling, lr, tmp_path, capsys):
    # 16 images in each of 4 forward passes: 5e-4 x 64 / 512, x its root, x 1
    dry = [] if scaling == "linear" else ["--dry-run"]
    run(tmp_path, "--lr-scaling", scaling, "--lr", "5e-4", "--accum-steps", "4", *dry)
    assert f"effective batch 64 images, peak learning rate {lr}" in capsys.readouterr().err
    if not dry:
        events = events_in(tmp_path)
        assert events.Scalars("step/lr")[0].value == pytest.approx(float(lr), rel=5e-3)  # there is no warm-up


@pytest.mark.parametrize("cpus, host, device", [(2, 2, 2), (1, 1, 1), (24, 24, 10)])
def test_data_loader_workers_default_to_the_cpus_of_a_rank(cpus, host, device):
    world = utils.World(0, 4, 0, cpus, torch.device("cpu"))
    options = fill(loaders.LoaderOptions, parse_args([]))
    assert [loaders.num_workers(options, world, where) for where in (False, True)] == [host, device]
    options = fill(loaders.LoaderOptions, parse_args(["--num-workers", "0"]))
    assert [loaders.num_workers(options, world, where) for where in (False, True)] == [0, 0]


def test_pretrained_weights_are_where_training_starts(tmp_path):
    # a folder in the hub's format stands in for the download
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = timm.create_model("deit_tiny_patch16_224", **shape)
    timm.models.save_for_hf(model, tmp_path / "hub", model_args=shape)
    args = ["--model", f"local-dir:{tmp_path / 'hub'}", "--pretrained", "--input-size", "32", "--drop-path", "0"]
    built = models.build_model(fill(models.ModelOptions, parse_args(args)), 10)
    assert built.head.out_features == 10
    for name, value in model.state_dict().items():
        assert name.startswith("head.") or torch.equal(built.state_dict()[name], value)


def write_folder(folder, name, **options):
    """Write a folder for --model local-dir: with a tiny model."""
    size = {"img_size": [32, 32], "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = timm.create_model(name, num_classes=10, **size, **options)
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    config = {"architecture": name, "num_classes": 10, "model_args": size | options, "pretrained_cfg": {}}
    (folder / "config.json").write_text(json.dumps(config))
    return ["--model", f"local-dir:{folder}", "--pretrained", "--input-size", "32", "--drop-path", "0"]


def test_token_flags_are_taken_by_an_evit_in_a_folder(tmp_path):
    words = write_folder(tmp_path / "evit", "evit_tiny_patch16_224", drop_loc=[1], keep_rate=0.5)
    run(tmp_path / "a", *words, "--shrink-start-epoch", "0")
    assert tiny.log_of(tmp_path / "a")[0]["keep_rate"] == 0.5
    run(tmp_path / "b", *words, "--shrink-start-epoch", "0", "--base-keep-rate", "0.25")
    assert tiny.log_of(tmp_path / "b")[0]["keep_rate"] == 0.25


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (
            "--shrink-start-epoch=0",
            "--shrink-start-epoch: the model has no EViT blocks; use a model such as evit_small",
        ),
        ("--base-keep-rate=0.5", "unexpected keyword argument 'keep_rate'"),
    ],
)
def test_token_flags_are_refused_for_a_deit_in_a_folder(flag, said, tmp_path, capsys):
    words = write_folder(tmp_path / "deit", "deit_tiny_patch16_224")
    assert said in refusal(capsys, *SMALL, *words, flag, "--output-dir", "")


def test_the_best_checkpoint_is_there_even_if_nothing_was_right(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.evaluate", lambda *_: {"loss": 1.0, "acc1": 0.0, "acc5": 0.0, "images": 1})
    run(tmp_path, "--epochs", "2")
    assert torch.load(tmp_path / "best.pth", weights_only=True)["epoch"] == 1
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["best_acc1"] == 0.0


# -- what a class index means, and settings that no tensor shape shows -------------------------------------------------

NAMES = [f"n{number:04d}" for number in range(12)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny.write_folders(tmp_path_factory.mktemp("folders"), NAMES)


@pytest.fixture(scope="module")
def named_run(folders, tmp_path_factory):
    """Output folder of a run on twelve named class folders."""
    folder = tmp_path_factory.mktemp("named")
    flags = ["--data-set", "IMNET", "--data-path", folders, "--train-fraction", "1", "--model-ema-decay", "0.9"]
    run(folder, *flags, "--lr", "5e-4")
    return folder


def refusal(capsys, *flags):
    """The line of a run that ends with status 2."""
    with pytest.raises(SystemExit) as exit_info:
        main.cli(list(map(str, flags)))
    assert exit_info.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def renamed(folders, target, names):
    """The folders under other names, in `target`."""
    for part in ("train", "val"):
        for old, new in zip(NAMES, names, strict=True):
            shutil.copytree(folders / part / old, target / part / new)
    return target


def test_class_names_are_in_checkpoint_and_config(named_run):
    checkpoint = torch.load(named_run / "best.pth", weights_only=True)
    assert checkpoint["class_names"] == NAMES and len(set(checkpoint["class_samples"]["train"])) == 12
    assert json.loads((named_run / "config.json").read_text())["class_names"] == NAMES


def test_an_evaluation_needs_only_the_checkpoint(named_run, capsys):
    main.cli(["--eval", "--resume", str(named_run / "best.pth")])
    (expected,) = (record["test_acc1"] for record in tiny.log_of(named_run))
    found = re.findall(r"test_acc1 (\S+)", capsys.readouterr().err)
    assert float(found[0]) == pytest.approx(expected, abs=0.01)


def test_other_class_names_are_refused_or_allowed(named_run, folders, tmp_path, capsys):
    numbered = renamed(folders, tmp_path, [str(number) for number in range(12)])
    flags = ["--eval", "--resume", named_run / "best.pth", "--data-path", numbered]
    assert "class 0 is 'n0000' there and '0' in the data (12 of 12 classes differ)" in refusal(capsys, *flags)
    main.cli([*map(str, flags), "--allow-class-mismatch"])
    output = capsys.readouterr().err
    assert "class 0 is 'n0000' there" in output and "test_acc1" in output


def test_classes_that_exchange_names_are_refused(named_run, folders, tmp_path, capsys):
    swapped = renamed(folders, tmp_path / "data", [NAMES[1], NAMES[0], *NAMES[2:]])
    line = refusal(capsys, "--eval", "--resume", named_run / "best.pth", "--data-path", swapped)
    assert "class 'n0000' of val/ has the images that 'n0001' had" in line
    shutil.copytree(named_run, tmp_path / "run")
    flags = ["--data-set", "IMNET", "--data-path", swapped, "--batch-size", "16", "--epochs", "2"]
    line = refusal(capsys, *tiny.TINY, *flags, "--output-dir", tmp_path / "run", "--resume", "auto")
    assert "class 'n0000' of train/ has the images that 'n0001' had" in line


@pytest.mark.parametrize("flag", ["--finetune", "--teacher-path"])
def test_weights_for_other_classes_of_the_same_number_are_refused(flag, named_run, folders, tmp_path, capsys):
    other = renamed(folders, tmp_path, NAMES[::-1][:11] + ["z"])
    flags = ["--data-set", "IMNET", "--data-path", other, "--batch-size", "16", "--output-dir", ""]
    if flag == "--teacher-path":
        model = ["--teacher-model", "deit_tiny_distilled_patch16_224", "--teacher-model-kwargs", "patch_size=8"]
        flags += ["--distillation-type", "hard", *model, "embed_dim=48", "depth=2", "num_heads=3"]
    assert "class 0 is 'n0000' there and 'n0001' in the data" in refusal(
        capsys, *tiny.TINY, *flags, flag, named_run / "best.pth"
    )


def test_data_without_class_names_are_evaluated_as_they_are(named_run):
    data = sources.whole_source([], [0, 2, 1], (), num_classes=12)
    args = argparse.Namespace(
        resume=f"{named_run}/checkpoint.pth", eval=True, val_fraction=0.0, allow_class_mismatch=False
    )
    assert main.compare_file(args, "resume", data, data) is data


def test_some_of_the_classes_are_evaluated_with_their_own_indices(named_run, folders, tmp_path, capsys):
    def accuracy(*flags):
        main.cli(["--eval", "--resume", str(named_run / "best.pth"), *map(str, flags)])
        output = capsys.readouterr().err
        return float(re.findall(r"test_acc1 (\S+)", output)[0]), output

    parts = {"some": NAMES[4:9], "others": NAMES[:4] + NAMES[9:]}
    for part, names in parts.items():
        for name in names:
            for split in ("train", "val"):
                shutil.copytree(folders / split / name, tmp_path / part / split / name)
    (some, said), (others, _), (every, _) = (
        accuracy("--data-path", tmp_path / "some"),
        accuracy("--data-path", tmp_path / "others"),
        accuracy(),
    )
    assert "evaluating 5 of its 12 classes" in said
    assert every > 0 and (5 * some + 7 * others) / 12 == pytest.approx(every, abs=0.02)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--model-kwargs embed_dim=48 depth=2 num_heads=6", "--model-kwargs embed_dim=48 depth=2 num_heads=3, not"),
        ("--model vit_tiny_patch16_224", "--model deit_tiny_distilled_patch16_224, not vit_tiny_patch16_224"),
        ("--patch-size 16", "--patch-size 8, not 16"),
    ],
)
def test_a_flag_that_contradicts_the_checkpoint_is_refused(flags, named, named_run, capsys):
    assert f"was trained with {named}" in refusal(capsys, "--eval", "--resume", named_run / "best.pth", *flags.split())


def test_weights_to_fine_tune_are_evaluated_as_they_were_trained(named_run, folders, capsys):
    flags = [*tiny.TINY, "--data-set", "IMNET", "--data-path", folders, "--batch-size", "16"]
    flags += ["--model-kwargs", "embed_dim=48", "depth=2", "num_heads=6", "--finetune", named_run / "best.pth"]
    line = refusal(capsys, *flags, "--eval")
    assert "--finetune" in line and "num_heads=3, not embed_dim=48 depth=2 num_heads=6" in line
    main.cli([*map(str, flags), "--output-dir", "", "--dry-run"])  # training may change the function
    assert "num_heads=3, not embed_dim=48 depth=2 num_heads=6" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_number_of_heads(named_run, folders, capsys):
    flags = ["--data-set", "IMNET", "--data-path", folders, "--batch-size", "16", "--output-dir", named_run]
    flags += ["--model-kwargs", "embed_dim=48", "depth=2", "num_heads=6", "--resume", "auto", "--epochs", "2"]
    assert "num_heads=3, not embed_dim=48 depth=2 num_heads=6" in refusal(capsys, *tiny.TINY, *flags)


def test_a_teacher_has_the_settings_of_its_checkpoint(named_run, folders, capsys):
    flags = ["--data-set", "IMNET", "--data-path", folders, "--batch-size", "16", "--output-dir", ""]
    flags += ["--distillation-type", "hard", "--teacher-path", named_run / "best.pth"]
    kwargs = ["--teacher-model-kwargs", "patch_size=8", "embed_dim=48", "depth=2", "num_heads=6"]
    line = refusal(capsys, *tiny.TINY, *flags, "--teacher-model", "deit_tiny_distilled_patch16_224", *kwargs)
    assert "was trained with --teacher-model-kwargs" in line and "num_heads=3" in line
    line = refusal(capsys, *tiny.TINY, *flags, "--teacher-model", "vit_tiny_patch16_224")
    assert "was trained with --teacher-model deit_tiny_distilled_patch16_224, not vit_tiny_patch16_224" in line


def keep_rates(words):
    """The keep rate of each layer of the model that a command evaluates."""
    args = parse_command([str(word) for word in words])
    check_flags(args)
    return [
        block.keep_rate for block in evit_blocks(main.build_run(args, utils.World.alone(torch.device("cpu"))).model)
    ]


@pytest.mark.parametrize("set_by", ["flag", "name", "keyword"])
def test_weights_to_fine_tune_are_evaluated_at_their_keep_rate(set_by, tmp_path):
    name = "deit_small_patch16_224_shrink05" if set_by == "name" else "evit_small_patch16_224"
    run = ["--model", name, *tiny.MODEL, *tiny.DATA, "--drop-loc", "1"]
    run += ["--base-keep-rate", "0.5"] if set_by == "flag" else []
    args = parse_args(run)
    if set_by == "keyword":
        args.model_kwargs["keep_rate"] = 0.5
    model = main.build_run(args, utils.World.alone(torch.device("cpu"))).model
    path = tmp_path / "x.pth"
    torch.save({"model": model.state_dict(), "args": checkpoints.as_json(vars(args))}, path)
    plain = ["--model", "evit_small_patch16_224", *tiny.MODEL, *tiny.DATA, "--drop-loc", "1", "--eval"]
    assert keep_rates([*plain, "--finetune", path]) == [1, 0.5]
    assert keep_rates([*plain, "--finetune", path, "--base-keep-rate", "0.9"]) == [1, 0.9]
    assert keep_rates(["--eval", "--resume", path, "--model", "evit_small_patch16_224"]) == [1, 0.5]
    as_deit = ["--model", "deit_small_patch16_224", *tiny.MODEL, *tiny.DATA, "--eval", "--finetune", path]
    assert keep_rates(as_deit) == []
    if set_by != "keyword":
        assert keep_rates(["--eval", "--resume", path, "--model", as_deit[1]]) == []


@pytest.mark.parametrize(
    ("flags", "first"),
    [
        ({}, 11),
        ({"shrink_start_epoch": 0}, 1),
        ({"shrink_start_epoch": 2, "shrink_epochs": 3}, 6),
        ({"base_keep_rate": 1.0}, 0),
        ({"model": "deit_tiny_patch16_224"}, 0),
    ],
)
def test_evaluation_before_the_final_keep_rate_is_noticed(flags, first):
    trained = {"model": "evit_tiny_patch16_224", "base_keep_rate": None} | flags
    found = [engine.before_final_keep_rate({"args": trained, "epoch": epoch}) for epoch in range(13)]
    assert [bool(words) for words in found] == [True] * first + [False] * (13 - first)
    assert all("before its keep rate reached 0.7" in words for words in found[:first])


def test_an_evaluation_of_weights_to_fine_tune_logs_what_differs(named_run, folders, capsys):
    flags = [*tiny.TINY, "--data-set", "IMNET", "--data-path", folders, "--batch-size", "16", "--eval"]
    flags += ["--finetune", named_run / "best.pth"]
    main.cli([*map(str, flags)])
    assert "evaluated with another setting than in training" not in capsys.readouterr().err
    main.cli([*map(str, flags), "--input-size", "64", "--eval-crop-ratio", "0.9"])
    said = capsys.readouterr().err
    assert "evaluated with another setting than in training: --input-size was [32], is [64]" in said
    assert "evaluated with another setting than in training: --eval-crop-ratio was 0.875, is 0.9" in said


def test_keep_rate_and_input_size_are_changed_on_purpose(named_run, capsys):
    flags = ["--model", "evit_tiny_distilled_patch16_224", "--drop-loc", "1", "--base-keep-rate", "0.5"]
    main.cli(["--eval", "--resume", str(named_run / "best.pth"), *flags])
    output = capsys.readouterr().err
    assert "--base-keep-rate was None, is 0.5" in output and "test_acc1" in output
    main.cli(["--eval", "--resume", str(named_run / "best.pth"), "--input-size", "64"])
    output = capsys.readouterr().err
    assert "--input-size was [32], is [64]" in output and "resized: pos_embed" in output and "test_acc1" in output


@pytest.mark.parametrize(
    "args",
    [
        {"model": "hf-hub:someone/something"},
        {"model": "local-dir:/tmp/x"},
        {"model_kwargs": {"pretrained_cfg": "x"}},
        {"model_kwargs": {"checkpoint_path": "x"}},
        {"model_kwargs": {"@/etc/passwd": 1}},
    ],
)
def test_a_checkpoint_does_not_choose_what_is_fetched(args, named_run, tmp_path, capsys):
    checkpoint = torch.load(named_run / "best.pth", weights_only=True)
    torch.save(checkpoint | {"args": checkpoint["args"] | args}, tmp_path / "bad.pth")
    assert "a checkpoint may not choose" in refusal(capsys, "--eval", "--resume", tmp_path / "bad.pth")


def test_a_cosub_run_logs_both_losses_and_counts_its_real_images(tmp_path, monkeypatch):
    counted, forwards = [], []

    class Log(utils.StepLog):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            counted.append(self.batch_images)

    monkeypatch.setattr(engine, "StepLog", Log)
    count = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: forwards.append(len(inputs[0])) if hasattr(module, "patch_embed") else None
    )
    words = [*tiny.TINY, "--model", "deit_tiny_patch16_LS", "--train-fraction", "0.1", "--batch-size", "32"]
    try:
        main.cli([*words, "--cosub", "--bce-loss", "--src", "--ThreeAugment", "--output-dir", str(tmp_path)])
    finally:
        count.remove()
    [record] = tiny.log_of(tmp_path)
    assert counted == [32]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["images_per_epoch"] == record["train_images"] == 4 * 32  # 145 images make 4 batches
    assert forwards.count(64) == 4
    assert record["train_loss"] == pytest.approx((record["train_loss_base"] + record["train_loss_cosub"]) / 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--aa", "3a", "--clip-grad", "1"],
        ["--aa", "none", "--no-compile-augment"],
        ["--model", "evit_tiny_distilled_patch16_224", "--drop-loc", "1", "--shrink-start-epoch", "0"],
    ],
)
@pytest.mark.parametrize("teacher", ["none", "live", "cached"])
def test_no_step_waits_for_the_gpu(flags, teacher, teacher_flags, tmp_path, monkeypatch):
    """torch raises an error at every sync of the second epoch, except in the report after its last step."""
    set_mode, train, report, watched = torch.cuda.set_sync_debug_mode, engine.train_one_epoch, utils.StepLog.report, []

    def train_watched(state, *args, **options):
        if state.epoch == 1:  # the first epoch loads the GPU's libraries
            set_mode("error")
        try:
            return train(state, *args, **options)
        finally:
            set_mode("default")

    def report_unwatched(log):
        set_mode("default")
        watched.append((log.epoch, log.step))
        report(log)

    monkeypatch.setattr(engine, "train_one_epoch", train_watched)
    monkeypatch.setattr(utils.StepLog, "report", report_unwatched)
    if teacher != "none":
        flags = [*flags, *teacher_flags, "--distillation-type", "hard"]
    if teacher == "cached":
        flags += ["--teacher-cache", tmp_path / "cache", "--augmentation-epochs", "1"]
    run(tmp_path / "run", *flags, "--epochs", "2", "--log-interval", "3", "--amp", "bf16")
    assert (1, 8) in watched  # all steps of the second epoch ran before the report
