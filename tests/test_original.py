"""Compatibility with the original DeiT and EViT code: training states resume, views are the same."""

import argparse
import contextlib
import json
import math

import numpy as np
import pytest
import timm
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torchvision import transforms

import checkpoints
import datasets
import engine
import main
from augment import ViewOptions
from flags import FREE_ON_RESUME, parse_args, parse_command
from samplers import seed_generators

NAME = "deit_tiny_distilled_patch16_224"
RATE, DECAY, BETAS, EPS, EMA = 1e-3, 0.05, (0.9, 0.999), 1e-8, 0.9
FLAGS = [*tiny.PLAIN, "--epochs", "8", "--lr", "8e-3", "--warmup-epochs", "2", "--model-ema-decay", str(EMA)]
# Of the original's distilled models: the parameters of the model itself, in order, and those that never decay.
VERSIONS = {
    "DeiT, timm 0.3.2": (["cls_token", "pos_embed", "dist_token"], {"cls_token", "pos_embed"}),
    "EViT, timm 0.4.12": (["cls_token", "dist_token", "pos_embed"], {"cls_token", "pos_embed", "dist_token"}),
}


def args_of(**changes):
    """The original's flags after a run: argparse's, and what its `main` has written into them."""
    flags = vars(parse_args(FLAGS))
    kept = (
        "model",
        "batch_size",
        "epochs",
        "opt",
        "opt_eps",
        "weight_decay",
        "smoothing",
        "drop_path",
        "warmup_epochs",
    )
    args = {name: flags[name] for name in kept} | {"input_size": 32, "data_set": "DIGITS", "repeated_aug": True}
    scaled = 8e-3 * 64 * 2 / 512
    return argparse.Namespace(**args | {"lr": scaled, "world_size": 2, "distributed": True, "nb_classes": 10} | changes)


def write_original(path, version="DeiT, timm 0.3.2", epoch=4, weight_decay=DECAY, seed=0):
    """What the original code saves: a model in its own order, AdamW after two steps of known gradients, averages.

    Returns:
        The weights, their averages, and of each name the two gradients.
    """
    first, exempt = VERSIONS[version]
    generator = torch.Generator().manual_seed(seed)
    model = timm.create_model(NAME, num_classes=10, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    weights = {name: torch.randn(value.shape, generator=generator) * 0.1 for name, value in model.state_dict().items()}
    names = first + [name for name in weights if "." in name]
    parameters = {name: torch.nn.Parameter(weights[name].clone()) for name in names}
    bare = [n for n in names if parameters[n].ndim == 1 or n.endswith(".bias") or n in exempt]
    split = [(bare, 0.0), ([n for n in names if n not in bare], weight_decay)] if weight_decay else [(names, 0.0)]
    groups = [{"params": [parameters[n] for n in members], "weight_decay": decay} for members, decay in split]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS)
    gradients = {name: [] for name in names}
    for _ in range(2):
        for name, parameter in parameters.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.01
            gradients[name].append(parameter.grad.double().clone())
        optimizer.step()
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    average = {name: value + 0.01 for name, value in weights.items()}
    checkpoint = {
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [RATE], "metric": None},
        "epoch": epoch,
        "model_ema": average,
        "scaler": {"scale": 2048.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000},
        "args": args_of(),
    }
    checkpoint["scaler"]["_growth_tracker"] = 7
    torch.save(checkpoint, path)
    return weights, average, gradients


class Stopped(Exception):
    """Ends a run after its first update."""


@contextlib.contextmanager
def first_update(found):
    """Let a run make one update; `found` takes its state before and after, and the batch."""
    train = engine.train_one_epoch

    def one(state, loader, criterion, schedules, log, **options):
        batch = next(iter(loader))
        found.update(epoch=state.epoch, updates=state.num_updates, best=state.best_acc1, batch=batch)
        found["optimizer"] = {
            name: {key: value.clone() for key, value in state.optimizer.state[parameter].items()}
            for name, parameter in state.module.named_parameters()
        }
        log.num_batches = 1
        train(state, [batch], criterion, schedules, log)
        found["rate"] = state.optimizer.param_groups[0]["lr"]
        found["weights"], found["average"] = (m.state_dict() for m in (state.module, state.ema.module))
        raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(engine, "train_one_epoch", one)
        yield


def moments(gradients):
    """AdamW's averages of the gradients and of their squares, in float64."""
    mean = square = torch.zeros_like(gradients[0])
    for gradient in gradients:
        mean, square = BETAS[0] * mean + (1 - BETAS[0]) * gradient, BETAS[1] * square + (1 - BETAS[1]) * gradient**2
    return mean, square


def rate_at(update, updates):
    """The flags' learning rate: two epochs of warm-up from 1e-6, and a cosine to 1e-5 over all eight."""
    peak = 8e-3 * 64 / 512
    if update < 2 * updates:
        return 1e-6 + (peak - 1e-6) * update / (2 * updates)
    return 1e-5 + (peak - 1e-5) * (1 + np.cos(np.pi * update / (8 * updates))) / 2


@pytest.fixture(scope="module", params=VERSIONS)
def resumed(request, tmp_path_factory):
    """An original checkpoint, and the first update of the run that continues it."""
    folder, found = tmp_path_factory.mktemp("original"), {}
    written = write_original(folder / "checkpoint.pth", request.param)
    records = [{"train_lr": 1e-3, "test_acc1": 10.0 + n, "epoch": n, "n_parameters": 7} for n in range(6)]
    (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in records))
    with first_update(found):
        main.main(parse_args([*FLAGS, "--resume", str(folder / "checkpoint.pth"), "--output-dir", str(folder / "new")]))
    return folder, *written, found


def test_an_original_run_continues_with_the_next_epoch(resumed):
    folder, *_, found = resumed
    assert (found["epoch"], found["updates"], found["best"]) == (5, 5 * 22, -1)
    assert found["rate"] == pytest.approx(rate_at(5 * 22, 22), rel=1e-12)
    assert [record["test_acc1"] for record in tiny.log_of(folder / "new")] == [10, 11, 12, 13, 14]


def test_the_optimizer_continues_with_the_moments_of_each_parameter(resumed):
    *_, gradients, found = resumed
    assert found["optimizer"].keys() == gradients.keys()
    for name, state in found["optimizer"].items():
        for key, expected in zip(("exp_avg", "exp_avg_sq"), moments(gradients[name]), strict=True):
            torch.testing.assert_close(state[key].double(), expected, rtol=1e-5, atol=1e-9, msg=name)
        assert float(state["step"]) == 2


def test_the_next_update_is_the_one_computed_by_hand(resumed):
    _, weights, average, gradients, found = resumed
    model = timm.create_model(NAME, num_classes=10, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    model.load_state_dict(weights)
    model.double().train()
    logits = model(found["batch"].images.double())
    F.cross_entropy(logits, found["batch"].targets, label_smoothing=0.1).backward()
    rate = rate_at(5 * 22, 22)
    for name, parameter in model.named_parameters():
        mean, square = moments([*gradients[name], parameter.grad])
        direction = mean / (1 - BETAS[0] ** 3) / ((square / (1 - BETAS[1] ** 3)).sqrt() + EPS)
        # here, the distillation token never decays
        decay = DECAY if parameter.ndim > 1 and name not in ("cls_token", "pos_embed", "dist_token") else 0
        expected = weights[name].double() * (1 - rate * decay) - rate * direction
        torch.testing.assert_close(found["weights"][name].double(), expected, rtol=0, atol=1e-3 * rate, msg=name)
        expected = EMA * average[name].double() + (1 - EMA) * expected
        torch.testing.assert_close(found["average"][name].double(), expected, rtol=0, atol=1e-3 * rate, msg=name)


def state_of(opt="adamw", amp_dtype=None, **options):
    model = timm.create_model(NAME, num_classes=10, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    optimizer = engine.build_optimizer(model, opt, lr=RATE, **{"weight_decay": DECAY} | options)
    return engine.TrainState(model, model, optimizer, amp_dtype=amp_dtype, opt=opt)


def resume(path, state=None, **changes):
    """The state after reading a checkpoint, with some of it replaced."""
    state = state or state_of()
    checkpoint = checkpoints.read_checkpoint(str(path), "--resume") | changes
    checkpoint = checkpoints.as_ours(checkpoint, state.module, state.optimizer, "x.pth", 22)
    state.resume(checkpoint, "x.pth", 22)
    return state, checkpoint


def test_the_loss_scale_continues(tmp_path):
    write_original(tmp_path / "x.pth")
    scaler = resume(tmp_path / "x.pth", state_of(amp_dtype=torch.float16))[0].scaler.state_dict()
    assert (scaler["scale"], scaler["_growth_tracker"]) == (2048, 7)


def test_without_weight_decay_there_is_one_group(tmp_path):
    *_, gradients = write_original(tmp_path / "x.pth", weight_decay=0)
    state, _ = resume(tmp_path / "x.pth", state_of(weight_decay=0))
    for name, parameter in state.module.named_parameters():
        moment = state.optimizer.state[parameter]["exp_avg"].double()
        torch.testing.assert_close(moment, moments(gradients[name])[0], rtol=1e-5, atol=1e-9)
    with tiny.user_error("--weight-decay: --resume x.pth was trained without it"):
        resume(tmp_path / "x.pth")


def test_its_flags_are_compared_in_the_form_that_they_have_here(tmp_path, caplog):
    write_original(tmp_path / "x.pth")
    about = {"args": vars(parse_args([*FLAGS, "--seed", "3"])), "run": {"processes": 1, "precision": "None"}}
    compared = about["args"].keys() - FREE_ON_RESUME
    assert checkpoints.changes(resume(tmp_path / "x.pth")[1], about, compared) == [
        "processes was 2, is 1",
        "precision was torch.float16, is None",
    ]
    assert "x.pth is of the original implementation: the run continues with epoch 5" in caplog.text
    assert "updates per epoch" not in caplog.text
    shrink = {"base_keep_rate": 0.7, "drop_loc": "(3, 6, 9)", "fuse_token": True, "shrink_start_epoch": 0}
    theirs = args_of(data_set="CIFAR", unscale_lr=True, lr=8e-3, distributed=False, **shrink)
    found = checkpoints.changes(resume(tmp_path / "x.pth", args=theirs)[1], about, compared)
    assert found[:-2] == [
        "--data-set was CIFAR100, is DIGITS",
        "--repeated-aug was False, is True",
        "--shrink-start-epoch was 0, is None",
        "--lr-scaling was none, is linear",
    ]


@pytest.mark.parametrize(
    "name, rate, expected",
    [
        ("deit_small_patch16_224_shrink05", 0.7, 0.7),
        ("deit_small_patch16_224_shrink05", 0.5, None),
        ("deit_small_patch16_288_shrink06", 0.7, 0.7),
        ("deit_small_patch16_288_shrink06", 0.5, 0.5),
        ("deit_small_patch16_224_shrink", 0.7, None),
        ("deit_small_patch16_shrink_base", 0.5, 0.5),
        ("deit_small_patch16_224", 0.7, None),
    ],
)
def test_keep_rate_of_an_original_run_is_that_of_its_flag(name, rate, expected):
    found = checkpoints.flags_of({"args": args_of(model=name, base_keep_rate=rate)})["base_keep_rate"]
    assert found == expected
    if name != "deit_small_patch16_224":
        with torch.device("meta"):
            model = timm.create_model(name, **({} if found is None else {"keep_rate": found}))
        assert model.blocks[3].keep_rate == rate


@pytest.mark.parametrize("data, words", [("CIFAR", ("CIFAR100", "id")), ("INAT", ("INAT", "original"))])
def test_an_evaluation_has_the_classes_of_the_original(data, words, tmp_path):
    torch.save({"model": {}, "args": args_of(data_set=data)}, tmp_path / "x.pth")
    args = parse_command(["--eval", "--resume", str(tmp_path / "x.pth")])
    assert (args.data_set, args.inat_numbering) == words


def without(mapping, key):
    return {name: value for name, value in mapping.items() if name != key}


def changed(checkpoint, position, change):
    """Copy a checkpoint with the state of one parameter changed."""
    optimizer = checkpoint["optimizer"]
    state = optimizer["state"] | {position: change(optimizer["state"][position])}
    return {"optimizer": optimizer | {"state": state}}


def regrouped(checkpoint, *sizes):
    ends = np.cumsum(sizes).tolist()
    groups = [
        group | {"params": list(range(end - size, end))}
        for group, size, end in zip(checkpoint["optimizer"]["param_groups"], sizes, ends, strict=True)
    ]
    return {"optimizer": checkpoint["optimizer"] | {"param_groups": groups}}


# In the original's order, 23 parameters are not decayed. Then come the distillation token and the patch embedding.
WRONG = {
    "no moments": (lambda c: {"optimizer": c["optimizer"] | {"state": {}}}, "has nothing of cls_token"),
    "none of one": (
        lambda c: {"optimizer": c["optimizer"] | {"state": without(c["optimizer"]["state"], 9)}},
        "optimizer.state has nothing of blocks.0.mlp.fc1.bias",
    ),
    "no squares": (lambda c: changed(c, 3, lambda s: without(s, "exp_avg_sq")), "has no exp_avg_sq"),
    "transposed": (
        lambda c: changed(c, 27, lambda s: s | {"exp_avg": s["exp_avg"].T}),
        "exp_avg is [48, 192] of torch.float32, not [192, 48]",
    ),
    "of another": (lambda c: changed(c, 22, lambda s: c["optimizer"]["state"][23]), "exp_avg is [1, 1, 48]"),
    "not finite": (lambda c: changed(c, 3, lambda s: s | {"exp_avg": s["exp_avg"] * math.nan}), "is not finite"),
    "other groups": (lambda c: regrouped(c, 25, 10), "25 parameters without weight decay, not 23"),
    "too few": (lambda c: regrouped(c, 23, 9), "the optimizer has 32 parameters, not 35"),
    "one too many": (lambda c: changed(c, 3, dict) | {"optimizer": {**c["optimizer"], "state": {99: {}}}}, "has 99"),
    "no groups": (lambda c: {"optimizer": {"state": {}}}, "has no 'param_groups'"),
    "optimizer is text": (lambda c: {"optimizer": "adamw"}, "no training state that fits"),
    "epoch is text": (lambda c: {"epoch": "4"}, "epoch is 4"),
    "epoch before the first": (lambda c: {"epoch": -1}, "epoch is -1"),
    "epoch without end": (lambda c: {"epoch": 2**60}, "epoch is "),
    "scaler is text": (lambda c: {"scaler": "x"}, "no training state that fits"),
    "other weights": (lambda c: {"model": without(c["model"], "head.bias")}, "the optimizer has 35 parameters, not 34"),
    "another optimizer": (lambda c: {"args": args_of(opt="sgd")}, "was trained with --opt sgd"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "x.pth"
    write_original(path)
    return path


@pytest.mark.parametrize("name", WRONG)
def test_a_state_that_cannot_be_mapped_is_one_line(name, written):
    change, words = WRONG[name]
    changes = change(checkpoints.read_checkpoint(str(written), "--resume"))
    with tiny.user_error("--resume x.pth", words):
        resume(written, **changes)


def test_a_wrong_original_checkpoint_ends_a_run_with_status_2(written, tmp_path, capsys):
    checkpoint = checkpoints.read_checkpoint(str(written), "--resume")
    torch.save(checkpoint | WRONG["transposed"][0](checkpoint), tmp_path / "x.pth")
    with pytest.raises(SystemExit) as end:
        main.cli([*FLAGS, "--resume", str(tmp_path / "x.pth"), "--output-dir", ""])
    assert end.value.code == 2
    assert "exp_avg is [48, 192]" in capsys.readouterr().err.splitlines()[-1]


def test_other_files_are_left_as_they_are():
    state = state_of()
    ours = state.state_dict([])
    for checkpoint in (ours, {"model": ours["model"]}, {"state_dict": ours["model"], "optimizer": {}, "epoch": 3}):
        assert checkpoints.as_ours(checkpoint, state.module, state.optimizer, "x.pth", 22) is checkpoint


# -- views -------------------------------------------------------------------------------------------------------------


def original_transform(size, is_training):
    """DeiT's `build_transform` at its defaults."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    if not is_training:
        resize = [transforms.Resize(int(size / 0.875), 3), transforms.CenterCrop(size)] if size > 32 else []
        return transforms.Compose([*resize, transforms.ToTensor(), transforms.Normalize(mean, std)])
    recipe = {"color_jitter": 0.3, "auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic"}
    erasing = {"re_prob": 0.25, "re_mode": "pixel", "re_count": 1}
    transform = create_transform(size, is_training=True, **recipe, **erasing)
    if size <= 32:
        transform.transforms[0] = transforms.RandomCrop(size, padding=4)
    return transform


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("size", [224, 32])
def test_views_are_bitwise_those_of_the_original(size, is_training):
    build = datasets.build_train_transform if is_training else datasets.build_eval_transform
    ours = build(ViewOptions(input_size=(size, size)), (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    theirs, generator = original_transform(size, is_training), np.random.default_rng(0)
    shape = (80, 110, 3) if size > 32 else (32, 32, 3)
    views = []
    for key in range(20):
        image = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
        for transform in (ours, theirs):
            seed_generators(key)
            views.append(transform(image))
        assert torch.equal(*views[-2:])
    assert views[0].shape == (3, size, size) and not torch.equal(views[0], views[2])
