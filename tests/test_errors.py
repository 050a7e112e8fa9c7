"""Errors exit with one line that names flag or file and remedy: status 2 before training, 1 during it."""

import errno
import gc
import json
import pickle
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import checkpoints
import engine
import main
import samplers
import utils
from flags import get_parser

ABSENT_DEVICE = "mps" if torch.cuda.is_available() else "cuda"  # no machine has both
RUN = "--data-set DIGITS --num-workers 0 --device cpu --input-size 32 --epochs 1 --output-dir {w}/output"
DEIT = "--model deit_tiny_patch16_224 --patch-size 8 --model-kwargs embed_dim=48 depth=1 num_heads=3"
DISTILLED = f"{DEIT} --model deit_tiny_distilled_patch16_224"
CONVOLUTIONAL = "--model test_resnet --drop-path 0"
TEACHER = "--teacher-model test_resnet --teacher-path"
FOLDERS = "--data-set IMNET --batch-size 4 --data-path"
INATURALIST = "--data-set INAT --batch-size 4 --data-path"


class Malicious:
    """Unpickled, it would leave a file behind."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def in_process(text, folder):
    """Run main.py's `cli` with these flags; {w} stands for the folder."""
    words = shlex.split(f"{RUN} {text}".replace("{w}", str(folder)))
    with pytest.raises(SystemExit) as end:
        main.cli(words)
    return end.value.code


def the_one_line(captured):
    """Return the only line of a run's output that is no log line (and no download message of torch)."""
    lines = [line for line in (captured.out + captured.err).splitlines() if not line.startswith("Downloading: ")]
    lines = [line for line in lines if not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert len(lines) == 1, captured
    return lines[0]


def save_images(folder, number):
    folder.mkdir(parents=True)
    for index in range(number):
        pixels = np.random.default_rng(index).integers(0, 256, (10, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


def folder_tree(root, train=("a", "b"), val=("a", "b"), number=8):
    for part, names in (("train", train), ("val", val)):
        for name in names:
            save_images(root / part / name, number)
    return root


def inaturalist(root, changes=None, text=None):
    """Write iNaturalist's files for six images of three species; `changes` replace training annotations."""
    save_images(root / "images", 6)
    part = {
        "images": [{"id": index, "file_name": f"images/{index}.png"} for index in range(6)],
        "annotations": [{"image_id": index, "category_id": index % 3} for index in range(6)],
        "categories": [{"id": index, "name": f"species {index}"} for index in range(3)],
    }
    (root / "val2018.json").write_text(json.dumps(part))
    (root / "train2018.json").write_text(text or json.dumps(part | (changes or {})))


@pytest.fixture(scope="module", autouse=True)
def one_process_one_thread(tmp_path_factory):
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name in (*tiny.LAUNCHER_VARIABLES, "SLURM_STEP_NUM_TASKS"):
            patch.delenv(name, raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("downloads")))
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Create the data folders, checkpoints and recipes, valid and invalid, that the cases use."""
    w = tmp_path_factory.mktemp("workspace")
    (w / "regular_file").write_text("not a folder\n")
    # data
    folder_tree(w / "tree")
    folder_tree(w / "no_val", val=())
    folder_tree(w / "no_train", train=())
    (folder_tree(w / "empty_class") / "train" / "c").mkdir()
    folder_tree(w / "other_classes", val=("a", "z"))
    save_images(folder_tree(w / "flat_val", val=()) / "val", 2)
    inaturalist(w / "inat")
    inaturalist(w / "inat_truncated", text='{"images": [')
    inaturalist(w / "inat_list", text="[]")
    inaturalist(w / "inat_no_images", {"images": []})
    inaturalist(w / "inat_no_annotations", {"annotations": []})
    inaturalist(w / "inat_other_category", {"annotations": [{"image_id": 0, "category_id": 99}]})
    # checkpoints
    words = shlex.split(f"{RUN} {DEIT} --train-fraction 0.1".replace("{w}/output", str(w / "run")))
    main.cli(words)
    good = torch.load(w / "run" / "checkpoint.pth", weights_only=True)
    data = (w / "run" / "checkpoint.pth").read_bytes()
    (w / "truncated.pth").write_bytes(data[: len(data) // 2])
    (w / "flipped.pth").write_bytes(
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    )
    (w / "empty.pth").write_bytes(b"")
    (w / "text.pth").write_text("some notes\n")
    (w / "text.safetensors").write_text("some notes\n")
    three = {key: value[:3] if key.startswith("head") else value for key, value in good["model"].items()}
    malicious = Malicious(w / "marker")
    for name, thing in {
        "tensor": torch.zeros(2),
        "list": [torch.zeros(2)],
        "nothing": {},
        "numbers": {"model": {"head.weight": 1}},
        "numbered": {"model": {0: torch.zeros(2)}},
        "other_names": {"model": {"something": torch.zeros(2)}},
        "weights_only": {"model": good["model"]},
        "no_optimizer": good | {"optimizer": None},
        "no_average": good | {"model_ema": 1},
        "three_classes": {"model": three},
        "not_finite": good | {"model": good["model"] | {"norm.bias": torch.full((48,), torch.nan)}},
        "not_finite_average": good | {"model_ema": good["model"] | {"norm.bias": torch.full((48,), torch.inf)}},
        "malicious": {"model": malicious},
    }.items():
        torch.save(thing, w / f"{name}.pth")
    (w / "malicious.pickle").write_bytes(pickle.dumps(malicious, protocol=2))
    # recipes
    (w / "typo.args").write_text("--batch-sise 4\n")
    (w / "number.args").write_text("--epochs ten\n")
    (w / "quote.args").write_text("--output-dir 'output\n")
    (w / "binary.args").write_bytes(b"\x80'\n")
    return w


# Each case: flags; the flag or file that the message must name; a word of the remedy that it must offer.
CASES = {
    # flags that argparse refuses
    "unknown flag": (f"{DEIT} --btach-size 4", "--btach-size", "did you mean --batch-size?"),
    "abbreviated flag": (f"{DEIT} --distillation-typ hard", "--distillation-typ", "did you mean --distillation-type?"),
    "stray word": (f"{DEIT} 300", "300", "--help lists the flags"),
    "flag without a value": ("--lr", "--lr", "expected one argument"),
    "batch size zero": ("--batch-size 0", "--batch-size", "at least 1"),
    "batch size negative": ("--batch-size -4", "--batch-size", "at least 1"),
    "batch size a fraction": ("--batch-size 1.5", "--batch-size", "type int"),
    "epochs zero": ("--epochs 0", "--epochs", "at least 1"),
    "epochs a word": ("--epochs ten", "--epochs", "type int"),
    "accumulation zero": ("--accum-steps 0", "--accum-steps", "at least 1"),
    "learning rate zero": ("--lr 0", "--lr", "above 0"),
    "learning rate negative": ("--lr -1", "--lr", "above 0"),
    "learning rate a word": ("--lr fast", "--lr", "type float"),
    "learning rate infinite": ("--lr inf", "--lr", "type float"),
    "learning rate not a number": ("--lr nan", "--lr", "above 0"),
    "workers negative": ("--num-workers -1", "--num-workers", "at least 0"),
    "seed negative": ("--seed -1", "--seed", "at least 0"),
    "train fraction zero": ("--train-fraction 0", "--train-fraction", "at most 1"),
    "train fraction two": ("--train-fraction 2", "--train-fraction", "at most 1"),
    "drop path too large": ("--drop-path 1.5", "--drop-path", "at most 0.999"),
    "smoothing too large": ("--smoothing 1.1", "--smoothing", "at most 1"),
    "clipping at zero": ("--clip-grad 0", "--clip-grad", "above 0"),
    "input size zero": ("--input-size 0", "--input-size", "at least 1"),
    "unknown choice": ("--distillation-type medium", "--distillation-type", "soft"),
    "unknown train scope": ("--train-scope tail", "--train-scope", "attn"),
    "unknown taxonomy level": ("--inat-category color", "--inat-category", "genus"),
    "model kwargs without =": ("--model-kwargs depth", "--model-kwargs", "key=value"),
    "model kwargs with a flag of its own": ("--model-kwargs num_classes=4", "--model-kwargs", "drop it"),
    "model kwargs that load a file": ("--model-kwargs checkpoint_path={w}/malicious.pth", "--model-kwargs", "drop it"),
    # recipes
    "recipe missing": ("@recipes/deit_huge.args", "recipes/deit_huge.args", "the recipes are in recipes/"),
    "recipe a folder": ("@{w}", "{w}", "the recipes are in recipes/"),
    "recipe with a typo": ("@{w}/typo.args", "--batch-sise", "did you mean --batch-size?"),
    "recipe with a wrong value": ("@{w}/number.args", "--epochs", "type int"),
    "recipe with an open quote": ("@{w}/quote.args", "--output-dir 'output", "close the quotation"),
    "recipe that is not text": ("@{w}/binary.args", "{w}/binary.args", "the recipes are in recipes/"),
    # numbers that no run can use
    "CutMix range of no pixel": ("--cutmix-minmax 0.5 0.52", "--cutmix-minmax 0.5 0.52", "widen"),
    "learning-rate noise of nothing": ("--lr-noise 0.1 --lr-noise-pct 0", "--lr-noise-pct", "above 0"),
    "learning-rate noise that is never drawn": ("--lr-noise 0.1 --lr-noise-pct 1e-6", "--lr-noise-pct 1e-06", "0.001"),
    "learning-rate noise below zero": ("--lr-noise 0.1 --lr-noise-pct 2", "--lr-noise-pct", "at most 1"),
    "teacher batch that is no multiple": (
        f"{DISTILLED} --distillation-type hard --teacher-cache c --precompute-teacher --precompute-batch-size 100",
        "--precompute-batch-size 100",
        "use 64",
    ),
    # flags that contradict each other
    "keep rate twice": (
        "--model evit_tiny_patch16_224 --base-keep-rate 0.7 --model-kwargs keep_rate=0.5",
        "--base-keep-rate",
        "pass one",
    ),
    "held out of a timm data set": ("--data-set torch/mnist --val-fraction 0.2", "--val-fraction 0.2", "drop the flag"),
    "resume and finetune": ("--resume a.pth --finetune b.pth", "--resume and --finetune", "pass one"),
    "pretrained and finetune": ("--pretrained --finetune b.pth", "--finetune and --pretrained", "pass one"),
    "eval without weights": (f"{DEIT} --eval", "--eval", "--resume FILE"),
    "teacher without distillation": ("--teacher-path a.pth", "--teacher-path", "--distillation-type hard"),
    "teacher twice": (
        f"{DISTILLED} --distillation-type hard --teacher-path a.pth --teacher-pretrained",
        "--teacher-pretrained",
        "pass one",
    ),
    "three input sizes": (f"{DEIT} --input-size 32 32 32", "--input-size 32 32 32", "height and width"),
    "three teacher sizes": (
        f"{DISTILLED} --distillation-type hard --teacher-path a.pth --teacher-input-size 32 32 32",
        "--teacher-input-size 32 32 32",
        "height and width",
    ),
    "drop path as a keyword": (
        f"{DEIT} --model-kwargs drop_path_rate=0.2",
        "--model-kwargs drop_path_rate",
        "pass --drop-path 0.2",
    ),
    "patch size twice": (f"{DEIT} --patch-size 4 --model-kwargs patch_size=8", "--patch-size", "pass one"),
    "decays within an epoch": ("--sched step --decay-epochs 0.5", "--decay-epochs 0.5", "pass 1 or more"),
    "features of an EViT whose keep rate changes": (
        "--model evit_tiny_patch16_224 --train-scope head --cache-features",
        "--cache-features",
        "--shrink-start-epoch 0",
    ),
    "features instead of logits": (
        "--model test_vit --input-size 32 --drop-path 0 --model-kwargs features_only=True",
        "--model test_vit",
        "--*model-kwargs",
    ),
    "cutmix region reversed": ("--cutmix-minmax 0.9 0.1", "--cutmix-minmax", "swap them"),
    # data
    "unknown data set": ("--data-set CIFAR11", "--data-set CIFAR11", "use one of CIFAR"),
    "classes of a data set that knows them": ("--num-classes 7", "--num-classes 7", "drop the flag"),
    "unknown timm data set": ("--data-set torch/nothing", "--data-set torch/nothing", "check the name"),
    "unknown hub data set": ("--data-set hfds/", "--data-set hfds/", "check the name"),
    "no data path": ("--data-set IMNET", "--data-path", "name its folder"),
    "data folder missing": (f"{FOLDERS} {{w}}/nowhere", "--data-path {w}/nowhere", "check the path"),
    "data folder a file": (f"{FOLDERS} {{w}}/regular_file", "--data-path {w}/regular_file", "check the path"),
    "train/ missing": (f"{FOLDERS} {{w}}/no_train", "--data-path {w}/no_train", "needs train/CLASS/"),
    "val/ missing": (f"{FOLDERS} {{w}}/no_val", "--data-path {w}/no_val", "val/CLASS/"),
    "val/ without classes": (f"{FOLDERS} {{w}}/flat_val", "--data-path {w}/flat_val", "val/CLASS/"),
    "class without images": (f"{FOLDERS} {{w}}/empty_class", "class c", "fill or remove"),
    "classes differ": (f"{FOLDERS} {{w}}/other_classes", "--data-path {w}/other_classes", "both need the same classes"),
    "not Stanford Cars": ("--data-set CARS --data-path {w}/tree", "--data-path {w}/tree", "it needs stanford_cars/"),
    "no annotations": (f"{INATURALIST} {{w}}/tree", "train2018.json", "put the official annotation files there"),
    "annotations truncated": (f"{INATURALIST} {{w}}/inat_truncated", "train2018.json", "fetch it again"),
    "annotations of another form": (f"{INATURALIST} {{w}}/inat_list", "--data-path {w}/inat_list", "fetch them again"),
    "annotations of other images": (f"{INATURALIST} {{w}}/inat_no_images", "inat_no_images", "fetch them again"),
    "annotations of other categories": (f"{INATURALIST} {{w}}/inat_other_category", "inat_other", "fetch them again"),
    "annotations none": (f"{INATURALIST} {{w}}/inat_no_annotations", "inat_no_annotations", "fetch them again"),
    "taxonomy level not there": (f"{INATURALIST} {{w}}/inat --inat-category genus", "--inat-category genus", "use one"),
    "batch larger than the data": (f"{DEIT} --batch-size 5000", "--batch-size 5000", "lower --batch-size"),
    "update larger than the data": (f"{DEIT} --accum-steps 99", "--batch-size 64", "lower --batch-size"),
    "batch too small for batch normalization": (
        "--model test_resnet --drop-path 0 --batch-size 1 --mixup 0 --cutmix 0",
        "--batch-size 1: batch normalization cannot train on it (Expected more than 1 value per channel",
        "use --batch-size 2",
    ),
    "odd batch with Mixup": (f"{DEIT} --batch-size 63", "--batch-size 63", "--mixup 0 --cutmix 0"),
    "unknown augmentation": (f"{DEIT} --aa magic", "--aa magic", "none"),
    # models
    "unknown model": ("--model deit_tinny_patch16_224", "--model deit_tinny_patch16_224", "deit_tiny_patch16_224"),
    "unknown model, nothing near": ("--model zzzzzz", "--model zzzzzz", "timm.list_models()"),
    "unknown weights of a model": (
        "--model deit_tiny_patch16_224.mine",
        "deit_tiny_patch16_224.mine",
        "change or drop",
    ),
    "patch size with a conv net": (f"{CONVOLUTIONAL} --patch-size 8", "--patch-size 8", "change or drop"),
    "patch size above the input": (
        f"{DEIT} --patch-size 64",
        "--model deit_tiny",
        "use 64",
    ),
    "input size no multiple of the patch": (f"{DEIT} --input-size 47", "--input-size 47 47: 47 is", "use 40 or 48"),
    "model kwargs unknown": (f"{DEIT} --model-kwargs embed_dimm=48", "--model-kwargs embed_dimm=48", "change or drop"),
    "model kwargs indivisible": (
        f"{DEIT} --model-kwargs embed_dim=50",
        "--model-kwargs embed_dim=50",
        "change or drop",
    ),
    "model kwargs zero": (f"{DEIT} --model-kwargs embed_dim=0", "--model-kwargs embed_dim=0", "change or drop"),
    "model kwargs of another size": (f"{DEIT} --model-kwargs img_size=64", "--model deit_tiny", "--*model-kwargs"),
    "grad checkpointing unsupported": (
        "--model dla46x_c --drop-path 0 --grad-checkpointing",
        "--grad-checkpointing",
        "drop the flag",
    ),
    "attention of a conv net": (f"{CONVOLUTIONAL} --train-scope attn", "--train-scope attn", "--train-scope head"),
    # optimization and devices
    "unknown optimizer": (f"{DEIT} --opt adamww", "--opt adamww", "list_optimizers()"),
    "second-order optimizer": (f"{DEIT} --opt adahessian", "--opt adahessian", "use another, such as adamw"),
    "second-order optimizer in Lookahead": (f"{DEIT} --opt lookahead_adahessian", "second derivatives", "use another"),
    "optimizer of another package": (f"{DEIT} --opt bnbadamw", "--opt bnbadamw", "list_optimizers()"),
    "three betas": (f"{DEIT} --opt-betas 0.9 0.99 0.999", "--opt adamw", "--opt-betas needs 2 numbers"),
    "one beta": (f"{DEIT} --opt-betas 0.9", "--opt adamw", "--opt-* flags"),
    "unknown schedule": (f"{DEIT} --sched cosinus", "--sched: 'cosinus' is unknown", "cosine"),
    "schedule that needs a metric": (f"{DEIT} --sched plateau", "--sched: plateau", "--sched step"),
    "schedule with too long a decay": (f"{DEIT} --sched wsd", "--sched wsd: wsd schedule requires", "--decay-epochs"),
    "multistep without milestones": (f"{DEIT} --sched multistep", "--sched multistep", "add --decay-milestones"),
    "milestones without multistep": (f"{DEIT} --decay-milestones 3", "--decay-milestones", "use --sched multistep"),
    "noise reversed": (f"{DEIT} --lr-noise 0.9 0.1", "--lr-noise 0.9 0.1", "give its start, and its end"),
    "noise of three parts": (f"{DEIT} --lr-noise 0.1 0.2 0.3", "--lr-noise 0.1 0.2 0.3", "give its start, and its end"),
    "device absent": (f"{DEIT} --device {ABSENT_DEVICE}", f"--device {ABSENT_DEVICE}", "--device auto"),
    "device unknown": (f"{DEIT} --device toaster", "--device toaster", "use auto"),
    "device unsupported": (f"{DEIT} --device meta", "--device meta", "use auto"),
    # distillation
    "no distillation head": (f"{DEIT} --distillation-type hard", "--distillation-type", "deit_tiny_distilled"),
    "teacher without weights": (f"{DISTILLED} --distillation-type hard", "--distillation-type", "--teacher-path FILE"),
    "teacher's file missing": (
        f"{DISTILLED} --distillation-type hard {TEACHER} {{w}}/nowhere.pth",
        "--teacher-path {w}/nowhere.pth",
        "check the path",
    ),
    "teacher of another model": (
        f"{DISTILLED} --distillation-type hard {TEACHER} {{w}}/run/best.pth",
        "--teacher-path {w}/run/best.pth",
        "was trained with --teacher-model deit_tiny_patch16_224, not test_resnet",
    ),
    "teacher with other classes": (
        f"{DISTILLED} --distillation-type hard --teacher-path {{w}}/three_classes.pth --teacher-model "
        f"deit_tiny_patch16_224 --teacher-model-kwargs patch_size=8 embed_dim=48 depth=1 num_heads=3",
        "--teacher-path {w}/three_classes.pth",
        "train a teacher on this data set",
    ),
    "teacher unknown": (
        f"{DISTILLED} --distillation-type hard --teacher-path {{w}}/run/best.pth --teacher-model test_resnett",
        "--teacher-model test_resnett",
        "did you mean test_resnet",
    ),
    "teacher malicious": (
        f"{DISTILLED} --distillation-type hard {TEACHER} {{w}}/malicious.pth",
        "--teacher-path {w}/malicious.pth",
        "plain tensors",
    ),
    # checkpoints
    "resume of a missing file": (f"{DEIT} --resume {{w}}/nowhere.pth", "--resume {w}/nowhere.pth", "check the path"),
    "resume of a folder": (f"{DEIT} --resume {{w}}/run", "--resume {w}/run", "check the path"),
    "resume of a dead address": (
        f"{DEIT} --resume https://127.0.0.1:9/x.pth",
        "https://127.0.0.1:9/x.pth",
        "local file",
    ),
    "resume of a truncated file": (f"{DEIT} --resume {{w}}/truncated.pth", "--resume {w}/truncated.pth", "give a file"),
    "resume of an empty file": (f"{DEIT} --resume {{w}}/empty.pth", "--resume {w}/empty.pth", "give a file"),
    "resume of a text file": (f"{DEIT} --resume {{w}}/text.pth", "--resume {w}/text.pth", "give a file"),
    "resume of a false safetensors": (f"{DEIT} --resume {{w}}/text.safetensors", "text.safetensors", "give a file"),
    "resume of a tensor": (f"{DEIT} --resume {{w}}/tensor.pth", "holds a Tensor", "give a checkpoint.pth"),
    "resume of a list": (f"{DEIT} --resume {{w}}/list.pth", "holds a list", "give a checkpoint.pth"),
    "resume of nothing": (
        f"{DEIT} --resume {{w}}/nothing.pth",
        "--resume {w}/nothing.pth",
        "checkpoint.pth or best.pth",
    ),
    "resume of numbers": (f"{DEIT} --resume {{w}}/numbers.pth", "--resume {w}/numbers.pth", "give a file"),
    "resume of numbered tensors": (f"{DEIT} --resume {{w}}/numbered.pth", "--resume {w}/numbered.pth", "give a file"),
    "resume of weights only": (
        f"{DEIT} --resume {{w}}/weights_only.pth",
        "--resume {w}/weights_only.pth",
        "--finetune",
    ),
    "resume without optimizer": (f"{DEIT} --resume {{w}}/no_optimizer.pth", "--resume {w}/no_optimizer.pth", "--opt"),
    "resume of a false average": (
        f"{DEIT} --resume {{w}}/no_average.pth",
        "--resume {w}/no_average.pth",
        "give a file",
    ),
    "resume with another optimizer": (
        f"{DEIT} --resume {{w}}/run/checkpoint.pth --opt adam --epochs 2",
        "--resume {w}/run/checkpoint.pth: was trained with --opt adamw, whose state --opt adam cannot use",
        "pass --opt adamw",
    ),
    "resume without weight decay": (
        f"{DEIT} --resume {{w}}/run/checkpoint.pth --weight-decay 0 --epochs 2",
        "--weight-decay: --resume {w}/run/checkpoint.pth was trained with it",
        "pass the value it was trained with",
    ),
    "resume with another scope": (
        f"{DEIT} --resume {{w}}/run/checkpoint.pth --train-scope head --epochs 2",
        "--resume {w}/run/checkpoint.pth",
        "--train-scope",
    ),
    "resume of another model": (
        f"{CONVOLUTIONAL} --resume {{w}}/run/checkpoint.pth",
        "--resume {w}/run/checkpoint.pth",
        "was trained with --model",
    ),
    "resume of another width": (
        f"{DEIT} --model-kwargs embed_dim=96 depth=1 num_heads=3 --resume {{w}}/run/checkpoint.pth",
        "--resume {w}/run/checkpoint.pth",
        "was trained with --model",
    ),
    "resume of a malicious file": (f"{DEIT} --resume {{w}}/malicious.pth", "--resume {w}/malicious.pth", "never run"),
    "resume of a malicious pickle": (f"{DEIT} --resume {{w}}/malicious.pickle", "malicious.pickle", "never run"),
    "eval of another model": (
        f"{CONVOLUTIONAL} --eval --resume {{w}}/run/best.pth",
        "--resume {w}/run/best.pth",
        "was trained with --model deit_tiny_patch16_224, not test_resnet",
    ),
    "eval of a head for other classes": (
        f"{DEIT} --eval --finetune {{w}}/three_classes.pth",
        "--finetune {w}/three_classes.pth",
        "train them with --finetune and without --eval",
    ),
    "eval of weights that are not finite": (
        f"{DEIT} --eval --resume {{w}}/not_finite.pth",
        "--resume {w}/not_finite.pth: norm.bias is not finite",
        "give an earlier checkpoint",
    ),
    "resume of EMA weights that are not finite": (
        f"{DEIT} --resume {{w}}/not_finite_average.pth --epochs 2",
        "--resume {w}/not_finite_average.pth: norm.bias is not finite",
        "give an earlier checkpoint",
    ),
    "finetune of a missing file": (
        f"{DEIT} --finetune {{w}}/nowhere.pth",
        "--finetune {w}/nowhere.pth",
        "check the path",
    ),
    "finetune of another model": (
        f"{CONVOLUTIONAL} --finetune {{w}}/run/best.pth",
        "--finetune {w}",
        "pass the --model",
    ),
    "finetune of other names": (f"{DEIT} --finetune {{w}}/other_names.pth", "--finetune {w}", "pass the --model"),
    "finetune of another width": (
        f"{DEIT} --model-kwargs embed_dim=96 depth=1 num_heads=3 --finetune {{w}}/run/best.pth",
        "--finetune {w}/run/best.pth",
        "--model-kwargs",
    ),
    "finetune of a malicious file": (f"{DEIT} --finetune {{w}}/malicious.pth", "--finetune {w}/malicious", "never run"),
    # resuming and saving
    "auto with eval": (f"{DEIT} --resume auto --eval", "--resume auto", "pass --resume FILE"),
    "auto with overwrite": (f"{DEIT} --resume auto --overwrite", "--resume auto", "drop one of them"),
    "auto with two starts": (
        f"{DEIT} --resume auto --pretrained --finetune {{w}}/run/best.pth",
        "--finetune and --pretrained",
        "pass one of them",
    ),
    "auto without a folder": (f"{DEIT} --resume auto --output-dir ''", "--resume auto", "add --output-dir FOLDER"),
    "checkpoints without a folder": (
        f"{DEIT} --checkpoint-minutes 5 --output-dir ''",
        "--checkpoint-minutes",
        "add --output-dir FOLDER",
    ),
    "checkpoints every negative minutes": (
        f"{DEIT} --checkpoint-minutes -1",
        "--checkpoint-minutes",
        "-1 is not at least 0",
    ),
    "checkpoints every nonsense": (f"{DEIT} --checkpoint-minutes soon", "--checkpoint-minutes", "not a number"),
    "half a skipped step": (f"{DEIT} --max-skipped-steps 0.5", "--max-skipped-steps", "not a number of type int"),
    "minus one broken image": (f"{DEIT} --skip-broken-images -1", "--skip-broken-images", "-1 is not at least 0"),
    "resume of a flipped bit": (
        f"{DEIT} --resume {{w}}/flipped.pth",
        "--resume {w}/flipped.pth",
        "checkpoint_previous",
    ),
    "resume over http": (
        f"{DEIT} --resume http://example.org/a-0a1b2c3d4e5f6a7b.pth",
        "--resume http://",
        "needs https",
    ),
    "finetune from a download without a hash": (
        f"{DEIT} --finetune https://example.org/best.pth",
        "--finetune https://example.org/best.pth",
        "#sha256=",
    ),
    "teacher from a download without a hash": (
        f"{DISTILLED} --distillation-type hard {TEACHER} https://example.org/best.pth",
        "--teacher-path https://example.org/best.pth",
        "#sha256=",
    ),
    # output
    "output below a file": (f"{DEIT} --output-dir {{w}}/regular_file/run", "{w}/regular_file/run", "another folder"),
    "output is a file": (f"{DEIT} --output-dir {{w}}/regular_file", "--output-dir {w}/regular_file", "another folder"),
    "output holds a run": (f"{DEIT} --output-dir {{w}}/run", "--output-dir {w}/run", "--overwrite"),
}


@pytest.mark.parametrize("flags, names, remedy", CASES.values(), ids=CASES)
def test_a_mistake_ends_with_status_2_and_one_line(flags, names, remedy, workspace, capsys):
    before = {path: path.stat().st_mtime_ns for path in (workspace / "run").iterdir()}
    assert in_process(flags, workspace) == 2
    line = the_one_line(capsys.readouterr())
    assert line.startswith(("main.py: error: ", f"{get_parser().prog}: error: "))
    assert names.replace("{w}", str(workspace)) in line
    assert remedy in line
    assert not (workspace / "marker").exists(), "a checkpoint's code was run"
    assert not (workspace / "output").exists(), "training was begun"
    assert before == {path: path.stat().st_mtime_ns for path in (workspace / "run").iterdir()}


def test_the_malicious_files_would_run_if_they_were_trusted(workspace):
    pickle.loads((workspace / "malicious.pickle").read_bytes())
    assert (workspace / "marker").exists()
    (workspace / "marker").unlink()


def test_weights_that_cannot_be_downloaded_are_a_mistake(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert in_process("--model deit_tiny_patch16_224 --pretrained", tmp_path) == 2
    (line,) = "".join(capsys.readouterr()).splitlines()
    assert line.startswith("main.py: error: --model deit_tiny_patch16_224: pretrained weights cannot be loaded")
    assert "check the network, or pass a local file" in line


# -- errors during a run -----------------------------------------------------------------------------------------------


def intact_checkpoint(folder, epoch):
    """Check that a failed run left a readable, finite checkpoint of that epoch, and the log until there."""
    checkpoint = checkpoints.read_checkpoint(str(folder / "checkpoint.pth"), "--resume")
    assert checkpoint["epoch"] == epoch
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    assert not list(folder.glob(".*.tmp"))
    assert [record["epoch"] for record in tiny.log_of(folder)][:epoch] == list(range(epoch))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_in_the_middle_of_training(workers, tmp_path, capsys, monkeypatch):
    # The ended run's data-loader workers are garbage here, and torch would wait 5 s for each.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    data = folder_tree(tmp_path / "data", number=12)
    sampler = samplers.KeyedSampler(24, seed=0, repeats=3, multiple=8)
    seen = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        seen.append({index for index, _, _ in sampler})
    files = sorted((data / "train").rglob("*.png"))
    broken = files[min(seen[1] - seen[0])]  # met in the second epoch only
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    flags = (
        f"{DEIT} --data-set IMNET --data-path {data} --batch-size 8 --epochs 2 --ram-cache 0 --num-workers {workers}"
    )
    assert in_process(flags, tmp_path) == 1
    line = the_one_line(capsys.readouterr())
    assert line.startswith(f"main.py: run ended: cannot read image {broken} ") and "then --resume auto" in line
    intact_checkpoint(tmp_path / "output", 1)
    gc.collect()

    broken.write_bytes(whole)
    main.cli(shlex.split(f"{RUN} {flags} --resume {{w}}/output/checkpoint.pth".replace("{w}", str(tmp_path))))
    intact_checkpoint(tmp_path / "output", 2)
    assert len(tiny.log_of(tmp_path / "output")) == 2


def test_a_broken_image_found_while_filling_the_memory(tmp_path, capsys):
    data = folder_tree(tmp_path / "data")
    (data / "val" / "b" / "3.png").write_text("no image")
    assert in_process(f"{DEIT} {FOLDERS} {data}", tmp_path) == 1
    line = the_one_line(capsys.readouterr())
    assert line.startswith(f"main.py: run ended: cannot read image {data}/val/b/3.png ")
    assert line.endswith("; fix or remove it; no checkpoint has been written")  # and no flag skips it
    assert not (tmp_path / "output").exists()


def test_a_loss_that_is_not_finite(tmp_path, capsys):
    flags = (
        "--sched step --decay-epochs 1 --decay-rate 1e36 --warmup-epochs 0 --epochs 3 --train-fraction 0.2 --amp off"
    )
    assert in_process(f"{DEIT} {flags}", tmp_path) == 1
    line = the_one_line(capsys.readouterr())
    assert line.startswith("main.py: run ended: the loss is not finite in epoch 1 ")
    assert "lower --lr" in line and "the last checkpoint is intact" in line
    intact_checkpoint(tmp_path / "output", 1)


def test_weights_that_the_last_step_of_an_epoch_spoiled(tmp_path, capsys, monkeypatch):
    step = engine.TrainState.step

    def spoil(state, loss):
        loss = step(state, loss)
        if state.num_updates == 4:  # the last of the second epoch, whose losses are all finite
            with torch.no_grad():
                next(state.module.parameters()).fill_(float("nan"))
        return loss

    monkeypatch.setattr(engine.TrainState, "step", spoil)
    assert in_process(f"{DEIT} --train-fraction 0.1 --epochs 3", tmp_path) == 1
    line = the_one_line(capsys.readouterr())
    assert line.startswith("main.py: run ended: the weights are not finite in epoch 1; ")
    intact_checkpoint(tmp_path / "output", 1)


def test_a_full_disk(tmp_path, capsys):
    save = torch.save

    def fill(checkpoint, stream):
        if checkpoint["epoch"] == 2:  # the end of the second epoch
            stream.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(checkpoint, stream)

    flags = f"{DEIT} --train-fraction 0.1 --epochs 3"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", fill)
        assert in_process(flags, tmp_path) == 1
    line = the_one_line(capsys.readouterr())
    assert line.startswith("main.py: run ended: cannot write a checkpoint to ") and "No space left" in line
    intact_checkpoint(tmp_path / "output", 1)

    with open(tmp_path / "output" / "log.txt", "a") as log:
        log.write('{"train_loss": 2.3')  # the disk took half a line of it
    main.cli(shlex.split(f"{RUN} {flags} --resume {{w}}/output/checkpoint.pth".replace("{w}", str(tmp_path))))
    intact_checkpoint(tmp_path / "output", 3)
    assert len(tiny.log_of(tmp_path / "output")) == 3


def test_a_log_that_cannot_be_written(tmp_path):
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(utils.RunError, match="log.txt: Is a directory"):
        utils.append_log(tmp_path, {"epoch": 0})
