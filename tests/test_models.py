"""Tiny real timm models: building them, fitting weights to them, teachers, partial training."""

import argparse
import contextlib
import copy
import re

import pytest
import safetensors.torch
import timm
import tiny
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

import models
import utils
from checkpoints import ema_of, trained_size, weights_of
from models import (
    EVALUATION,
    FINETUNING,
    ModelOptions,
    build_model,
    classifier_names,
    fit_state_dict,
    freeze,
    load_finetune_weights,
    load_weights,
    normalization,
    set_train_mode,
)
from teachers import TeacherOptions, load_teacher

PLAIN, DISTILLED = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}
CNN = {"channels": (8, 16, 24, 32), "stem_width": 8}  # of resnet10t, with 24,000 parameters


def build(name=PLAIN, seed=0, num_classes=5, distilled=False, eval_only=False, **options):
    """A model of ours without drop-path; transformers are tiny, with patches of 8 pixels, and resnet10t is narrow."""
    if "deit" in name or "vit" in name:
        options = {"patch_size": 8} | options | {"model_kwargs": TINY | options.get("model_kwargs", {})}
    if name == "resnet10t" and not options.get("pretrained"):
        options = {"model_kwargs": CNN} | options
    options = {"input_size": (32, 32), "drop_path": 0.0} | options
    return build_model(ModelOptions(name, seed=seed, **options), num_classes, distilled, eval_only)


def build_cnn(**options):
    """A convolutional network with BatchNorm."""
    return build("resnet10t", **options)


def finetune(model, path, eval_only=False):
    """Load the weights of a file, as `--finetune path` does."""
    return load_finetune_weights(model, ModelOptions(finetune=str(path)), eval_only)


def teach(
    name=PLAIN, path="", num_classes=5, input_size=(32, 32), teacher_input_size=None, pretrained=False, **model_kwargs
):
    if "deit" in name:
        model_kwargs = TINY | {"patch_size": 8} | model_kwargs
    if name == "resnet10t" and not pretrained:
        model_kwargs = model_kwargs or CNN
    options = TeacherOptions(
        teacher_model=name,
        teacher_model_kwargs=model_kwargs,
        teacher_path=str(path),
        teacher_pretrained=pretrained,
        input_size=input_size,
        teacher_input_size=teacher_input_size,
    )
    return load_teacher(options, num_classes)


def save(path, content):
    torch.save(content, path)
    return str(path)


def images(height=32, width=32, count=2):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(9))


def assert_same(found, expected, but=()):
    """Check that state dicts are equal, except for the names in `but`."""
    assert set(found) - set(but) == set(expected) - set(but)
    for key in set(expected) - set(but):
        assert torch.equal(found[key], expected[key]), key


def parameters_of(*layers):
    return [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


# -- building ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("input_size", "grid"), [((32, 32), (4, 4)), ((16, 48), (2, 6))])
def test_patch_and_input_size_reach_the_model(input_size, grid):
    model = build(input_size=input_size)
    assert model.patch_embed.grid_size == grid and model.patch_embed.patch_size == (8, 8)
    assert model(images(*input_size)).shape == (2, 5)


def test_model_options_and_rates_reach_the_model():
    model = build(drop=0.3, drop_path=0.2, model_kwargs={"depth": 3, "mlp_ratio": 2.0})
    assert len(model.blocks) == 3 and model.embed_dim == 48
    assert model.blocks[0].mlp.fc1.out_features == 96
    assert [getattr(block.drop_path1, "drop_prob", 0) for block in model.blocks] == pytest.approx([0, 0.1, 0.2])
    assert model.head_drop.p == 0.3 and model.blocks[0].mlp.drop1.p == 0.0  # timm drops before the head alone


def test_model_options_win_over_the_flags():
    assert build(model_kwargs={"patch_size": 4}).patch_embed.patch_size == (4, 4)


@pytest.mark.parametrize("name", ["vgg11", "resnet10t"])
def test_zero_rates_and_input_size_are_not_passed_to_models_without_them(name):
    with torch.device("meta"):
        assert build(name, drop=0.0, drop_path=0.0, input_size=(64, 32)).num_classes == 5


def test_unknown_model_is_a_user_error_with_the_nearest_names():
    with tiny.user_error("--model deit_tiny_patch16_22:", "did you mean deit_tiny_patch16_224"):
        build("deit_tiny_patch16_22")
    with tiny.user_error("--model zzz:", "timm.list_models()"):
        build("zzz")
    with tiny.user_error("--teacher-model regnety_16:", "regnety_160"):
        teach("regnety_16", pretrained=True)


def test_unknown_weights_tag_is_a_user_error():
    with tiny.user_error(f"--model {PLAIN}.nonsense", "Invalid pretrained tag"):
        build(f"{PLAIN}.nonsense")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet10t", {"patch_size": 8}, ["--patch-size 8", "change or drop"]),
        ("resnet10t", {"model_kwargs": {"depth": 3}}, ["--model-kwargs depth=3"]),
        ("vgg11", {"drop_path": 0.1}, ["--drop-path 0.1", "add --drop-path 0"]),
        (PLAIN, {"model_kwargs": {"num_heads": 5}}, ["--input-size 32 32", "num_heads=5", "divisible"]),
        (PLAIN, {"pretrained": True, "model_kwargs": {"foo": 1}}, ["foo=1", "change or drop"]),
    ],
)
def test_option_that_the_model_lacks_is_named(name, options, words):
    with tiny.user_error(f"--model {name}: cannot be built", *words):
        build(name, **options)


def test_teachers_options_are_named_by_the_teachers_flag(tmp_path):
    with tiny.user_error("--teacher-model resnet10t", "--teacher-model-kwargs depth=3"):
        teach("resnet10t", save(tmp_path / "t.pth", {"model": {}}), depth=3)


def test_pretrained_weights_without_a_network_are_a_user_error(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with tiny.user_error("--model resnet10t: pretrained weights cannot be loaded", "check the network"):
        build("resnet10t", pretrained=True)
    with tiny.user_error("--teacher-model resnet10t: pretrained weights cannot be loaded"):
        teach("resnet10t", pretrained=True)


def test_distillation_needs_a_model_with_a_distillation_head():
    with tiny.user_error("--distillation-type", PLAIN, "deit_tiny_distilled_patch16_224"):
        build(PLAIN, distilled=True)


def test_switch_for_distillation_without_a_second_head_is_refused():
    with tiny.user_error("--distillation-type: pit_ti_224 has no distillation head"):
        build("pit_ti_224", input_size=(64, 64), distilled=True)


def test_evaluation_mode_leaves_the_distillation_flag_of_a_head():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    model[0].distilled_training = True
    models.set_eval_layers(model)
    assert [module.training for module in model.modules()] == [False, True, False]


def test_timm_weights_evaluated_at_another_size_are_a_warning(caplog):
    model = build(PLAIN)
    model.pretrained_cfg = {"input_size": (3, 64, 64), "test_input_size": (3, 96, 96)}
    for size in ((64, 64), (96, 96)):
        models._warn_of_another_size(model, size)
    assert not caplog.records
    models._warn_of_another_size(model, (32, 32))
    assert "are for 64 x 64 px, evaluated at 32 x 32 px; pass --input-size 64" in caplog.text


def test_distilled_model_returns_both_heads_in_training_else_their_mean():
    model = build(DISTILLED, distilled=True)
    both = model(images())
    assert isinstance(both, tuple) and len(both) == 2 and not torch.equal(*both)
    torch.testing.assert_close(model.eval()(images()), (both[0] + both[1]) / 2)
    assert build(DISTILLED)(images()).shape == (2, 5)  # trained without a teacher


def test_gradient_checkpointing_changes_no_gradient():
    losses, gradients = [], []
    for grad_checkpointing in (False, True):
        model = build(grad_checkpointing=grad_checkpointing)
        assert model.grad_checkpointing == grad_checkpointing
        loss = model(images()).square().sum()
        loss.backward()
        losses.append(loss)
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert torch.equal(*losses)
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_gradient_checkpointing_of_a_model_without_it_is_a_user_error():
    with torch.device("meta"), tiny.user_error("--grad-checkpointing", "vgg11"):
        build("vgg11", grad_checkpointing=True)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        (PLAIN, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("tf_efficientnet_lite0", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_normalization_is_that_of_the_published_weights(name, mean, std):
    with torch.device("meta"):
        assert normalization(build(name)) == (mean, std)


@pytest.mark.parametrize(
    ("name", "classifiers"), [(PLAIN, ("head",)), (DISTILLED, ("head", "head_dist")), ("resnet10t", ("fc",))]
)
def test_classifiers_are_found(name, classifiers):
    with torch.device("meta"):
        assert classifier_names(build(name)) == classifiers


def test_published_teacher_is_known_to_timm():
    assert timm.is_model("regnety_160")


# -- reading weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_are_found_under_any_key_and_prefix(key, prefix):
    weights = build().state_dict()
    prefixed = {prefix + name: value for name, value in weights.items()}
    assert_same(weights_of(prefixed if key is None else {key: prefixed, "epoch": 3}, "--finetune", "x.pth"), weights)


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 3}, {"model": "deit"}, {"model": {"lr": 0.1}}])
def test_file_without_weights_is_a_user_error(content):
    with tiny.user_error("--finetune x.pth: not a checkpoint of a model"):
        weights_of(content, "--finetune", "x.pth")


# -- fine-tuning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [PLAIN, DISTILLED, "resnet10t"])
def test_same_model_takes_every_tensor(tmp_path, name):
    source, model = build(name, seed=1), build(name, seed=2)
    report = finetune(model, save(tmp_path / "x.pth", {"model": source.state_dict()}))
    assert_same(model.state_dict(), source.state_dict())
    assert len(report.kept) == len(source.state_dict()) and not report.resized + report.dropped + report.missing


def test_safetensors_are_read(tmp_path):
    source, model = build(seed=1), build(seed=2)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "x.safetensors")
    finetune(model, tmp_path / "x.safetensors")
    assert_same(model.state_dict(), source.state_dict())


def test_keys_are_those_of_the_official_checkpoints():
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    layers = [
        "patch_embed.proj",
        "norm",
        "head",
        "head_dist",
        *(f"blocks.{n}.{layer}" for n in (0, 1) for layer in block),
    ]
    official = {"cls_token", "dist_token", "pos_embed", *parameters_of(*layers)}
    assert set(build(DISTILLED).state_dict()) == official
    assert set(timm.create_model(DISTILLED, img_size=32, patch_size=8, **TINY).state_dict()) == official


@pytest.mark.parametrize("name", [PLAIN, DISTILLED, "resnet10t"])
def test_heads_for_other_classes_are_dropped(tmp_path, name):
    source, model, untouched = build(name, 1, num_classes=7), build(name, 2), build(name, 2).state_dict()
    heads = parameters_of(*classifier_names(model))
    report = finetune(model, save(tmp_path / "x.pth", {"model": source.state_dict()}))
    assert sorted(report.dropped) == sorted(report.missing) == sorted(heads)
    assert_same(model.state_dict(), source.state_dict(), but=heads)
    assert all(torch.equal(model.state_dict()[head], untouched[head]) for head in heads)


@pytest.mark.parametrize("name", ["resnet10t", "efficientnet_lite0", PLAIN, DISTILLED])
@pytest.mark.parametrize("scale", [None, 0.01])
def test_new_heads_start_small(tmp_path, name, scale):
    options = {"model_kwargs": {}} if name == "resnet10t" else {}  # of full width, whose standard deviation is known
    path = save(tmp_path / "x.pth", {"model": build(name, 1, num_classes=7, **options).state_dict()})
    model = build(name, 2, num_classes=50, finetune=path, head_init_scale=scale, **options)
    for head in classifier_names(model):
        layer = model.get_submodule(head)
        assert layer.weight.std().item() == pytest.approx(0.02 * (scale or 1), rel=0.05)
        assert layer.weight.abs().max() <= 2 * (scale or 1) and not layer.bias.any()


def test_heads_that_come_with_the_weights_are_kept(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(utils.logger, "propagate", True)
    source = build(PLAIN, 1)
    path = save(tmp_path / "x.pth", {"model": source.state_dict()})
    model = build(PLAIN, 2, finetune=path, head_init_scale=0.5)
    assert torch.equal(model.head.weight, source.head.weight)
    assert "--head-init-scale has no effect" in caplog.text
    distilled = build(DISTILLED, 2, finetune=path)  # the class head is there, that of the distillation token is new
    assert torch.equal(distilled.head.weight, source.head.weight) and not distilled.head_dist.bias.any()


def test_a_head_from_scratch_is_scaled_only_when_asked():
    plain, scaled = build("resnet10t", 1), build("resnet10t", 1, head_init_scale=0.5)
    assert_same(scaled.state_dict(), plain.state_dict(), but=parameters_of("fc"))
    for ours, theirs in zip(scaled.fc.parameters(), plain.fc.parameters(), strict=True):
        assert torch.equal(ours, theirs * 0.5)


def test_a_published_model_takes_the_size_that_it_was_published_with(caplog, monkeypatch):
    monkeypatch.setattr(utils.logger, "propagate", True)
    model = build("deit_huge_patch14_LS", patch_size=None, input_size=(160, 160))
    assert model.patch_embed.grid_size == (11, 11) and "the last 6 px of 160 are not seen" in caplog.text
    batch, cut = images(160, 160), images(160, 160)
    cut[:, :, 154:] = cut[:, :, :, 154:] = 0
    assert torch.equal(model.eval()(batch), model(cut))
    with tiny.user_error("--input-size 160 160: 160 is not a multiple of the 14 px patch"):
        build("deit3_huge_patch14_224", patch_size=None, input_size=(160, 160))


def test_a_wrong_model_name_is_told_those_that_it_begins():
    with tiny.user_error("--model deit_tiny", "did you mean deit_tiny_patch16_224"):
        build("deit_tiny")
    with tiny.user_error("--model evit_smal", "did you mean evit_small_patch16_224"):
        build("evit_smal")


@pytest.mark.parametrize("name", [PLAIN, DISTILLED, "vit_tiny_patch16_224"])
@pytest.mark.parametrize(
    ("old_size", "new_size"),
    [((32, 32), (48, 48)), ((48, 48), (16, 16)), ((32, 32), (16, 48)), ((32, 32), (16, 64))],  # last: as many patches
)
def test_position_embedding_is_resampled_except_for_its_prefix(tmp_path, name, old_size, new_size):
    source, model = build(name, 1, input_size=old_size), build(name, 2, input_size=new_size)
    old, prefix = source.state_dict()["pos_embed"], source.num_prefix_tokens
    report = finetune(model, save(tmp_path / "x.pth", {"model": source.state_dict()}))
    assert report.resized == ["pos_embed"] and not report.dropped + report.missing
    found = model.state_dict()["pos_embed"]
    grids = [[side // 8 for side in size] for size in (new_size, old_size)]
    torch.testing.assert_close(found, resample_abs_pos_embed(old, *grids, num_prefix_tokens=prefix))
    assert torch.equal(found[:, :prefix], old[:, :prefix])
    assert_same(model.state_dict(), source.state_dict(), but=["pos_embed"])


def test_resampling_by_hand():
    """Bicubic interpolation leaves a constant alone, and halving a grid takes no wide detour from its means."""
    source, model = build(seed=1, input_size=(64, 64)), build(seed=2, input_size=(32, 32))
    weights = source.state_dict()
    ramp = torch.arange(8.0)[:, None].expand(8, 8).reshape(1, 64, 1)  # the row number
    weights["pos_embed"] = torch.cat([torch.full((1, 1, 48), 5.0), ramp.expand(1, 64, 48)], dim=1)
    fitted = fit_state_dict(weights, model)[0]["pos_embed"]
    assert (fitted[:, 0] == 5).all()
    rows = fitted[0, 1:, 0].reshape(4, 4)
    torch.testing.assert_close(rows, rows[:, :1].expand(4, 4))
    torch.testing.assert_close(rows[1:3, 0], torch.tensor([2.5, 4.5]), atol=0.1, rtol=0)  # the edges feel the border


def test_positions_without_prefix_tokens_are_resampled_whole():
    """deit3 adds the class token after the position embedding, CaiT does so in its last blocks."""
    for name, options in (("deit3_small_patch16_224", {}), ("cait_xxs24_224", {"model_kwargs": {**TINY, "depth": 1}})):
        source = build(name, 1, patch_size=8, **options)
        model = build(name, 2, patch_size=8, input_size=(48, 48), **options)
        fitted = fit_state_dict(source.state_dict(), model)[0]["pos_embed"]
        torch.testing.assert_close(fitted, resample_abs_pos_embed(source.pos_embed, [6, 6], num_prefix_tokens=0))


def test_position_embedding_without_a_patch_grid_is_taken_as_it_is(tmp_path):
    options = {"model_kwargs": {"embed_dim": 8, "stages": (1, 1, 1, 1), "num_heads": 1}}
    source, model = build("hiera_tiny_224", 1, **options), build("hiera_tiny_224", 2, **options)
    finetune(model, save(tmp_path / "x.pth", {"model": source.state_dict()}))
    assert_same(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("input_size", [(32, 32), (48, 48)])
def test_distilled_weights_in_a_plain_model_keep_all_but_the_distillation(tmp_path, input_size):
    source, model = build(DISTILLED, 1), build(PLAIN, 2, input_size=input_size)
    report = finetune(model, save(tmp_path / "x.pth", {"model": source.state_dict()}))
    assert sorted(report.dropped) == ["dist_token", "head_dist.bias", "head_dist.weight"] and not report.missing
    weights = source.state_dict()
    patches = weights["pos_embed"][:, 2:]
    if input_size != (32, 32):
        patches = resample_abs_pos_embed(patches, [6, 6], num_prefix_tokens=0)
    torch.testing.assert_close(model.pos_embed, torch.cat([weights["pos_embed"][:, :1], patches], dim=1))
    assert_same(model.state_dict(), weights, but=[*report.dropped, "pos_embed"])


def test_plain_weights_leave_the_distillation_head_as_initialized(tmp_path):
    source, model, untouched = build(PLAIN, 1), build(DISTILLED, 2), build(DISTILLED, 2).state_dict()
    report = finetune(model, save(tmp_path / "x.pth", {"model": source.state_dict()}))
    assert sorted(report.missing) == ["dist_token", "head_dist.bias", "head_dist.weight"] and not report.dropped
    found, old = model.state_dict(), source.state_dict()["pos_embed"]
    assert torch.equal(found["pos_embed"], torch.cat([old[:, :1], untouched["pos_embed"][:, 1:2], old[:, 1:]], dim=1))
    assert all(torch.equal(found[key], untouched[key]) for key in report.missing)
    assert_same(found, source.state_dict(), but=[*report.missing, "pos_embed"])


@pytest.mark.parametrize(("old", "new"), [(PLAIN, DISTILLED), (DISTILLED, PLAIN)])
def test_other_model_other_grid_and_other_classes_at_once(tmp_path, old, new):
    source, model = build(old, 1, num_classes=7), build(new, 2, input_size=(16, 64))
    finetune(model, save(tmp_path / "x.pth", {"state_dict": source.state_dict()}))
    assert model.eval()(images(16, 64)).isfinite().all()
    assert torch.equal(model.pos_embed[:, 0], source.pos_embed[:, 0])


@pytest.mark.parametrize(
    "make", [lambda: build(model_kwargs={"embed_dim": 96}), lambda: build(patch_size=4), build_cnn]
)
def test_weights_of_another_model_are_a_user_error(tmp_path, make):
    path = save(tmp_path / "x.pth", {"model": make().state_dict()})
    with tiny.user_error("--finetune", path, "--model"):
        finetune(build(), path)


def test_missing_or_unreadable_file_is_a_user_error(tmp_path):
    with tiny.user_error("--finetune", tmp_path / "typo.pth", "no such file"):
        finetune(build(), tmp_path / "typo.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with tiny.user_error("--finetune", tmp_path / "text.pth"):
        finetune(build(), tmp_path / "text.pth")


def test_report_says_what_became_of_the_tensors():
    _, report = fit_state_dict(build(DISTILLED, num_classes=7).state_dict(), build(input_size=(48, 48)))
    kept = len(build().state_dict()) - 3  # without the head's two and the position embedding
    assert str(report) == (
        f"kept {kept} tensors; resized: pos_embed; dropped: dist_token, head.weight, head.bias, head_dist.weight, "
        f"head_dist.bias; missing, left as initialized: head.weight, head.bias; ignored: none"
    )
    _, report = fit_state_dict({}, build())
    assert str(report).startswith("kept 0 tensors; resized: none; dropped: none; missing, left as initialized: head.")
    assert len(report.misfits) == len(build().state_dict()) - 2


def test_fitting_changes_neither_the_weights_nor_the_model():
    source, model = build(DISTILLED, 1), build(PLAIN, 2, input_size=(48, 48))
    fit_state_dict(source.state_dict(), model)
    assert_same(source.state_dict(), build(DISTILLED, 1).state_dict())
    assert_same(model.state_dict(), build(PLAIN, 2, input_size=(48, 48)).state_dict())


# -- all or nothing ----------------------------------------------------------------------------------------------------


def test_exact_loading_takes_the_same_model():
    source, model = build(DISTILLED, 1), build(DISTILLED, 2)
    load_weights(model, source.state_dict(), "--resume", "x.pth")
    assert_same(model.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    ("other", "at", "finetune_takes_it"),
    [
        ({"num_classes": 7}, "head.weight: [7, 48] there, [5, 48] here", True),
        ({"input_size": (48, 48)}, "pos_embed: [1, 37, 48] there, [1, 17, 48] here", True),
        ({"name": DISTILLED}, "dist_token: [1, 1, 48] there, nothing here", True),
        ({"model_kwargs": {"depth": 1}}, "blocks.1.norm1.weight: nothing there, [48] here", False),
        ({"model_kwargs": {"depth": 3}}, "blocks.2.norm1.weight: [48] there, nothing here", False),
        ({"patch_size": 4, "input_size": (16, 16)}, "patch_embed.proj.weight: [48, 3, 4, 4] there", False),
    ],
)
def test_resume_refuses_another_model_and_names_finetune_where_it_works(tmp_path, other, at, finetune_takes_it):
    weights, model = build(seed=1, **other).state_dict(), build(seed=2)
    with tiny.user_error("--resume x.pth: does not fit --model", at) as caught:
        load_weights(model, weights, "--resume", "x.pth")
    assert ("--finetune" in str(caught.value)) == finetune_takes_it
    with tiny.user_error("--resume x.pth") if other != {"input_size": (48, 48)} else contextlib.nullcontext() as caught:
        load_weights(build(seed=2), weights, "--resume", "x.pth", EVALUATION)
    assert caught is None or "--finetune" not in str(caught.value)
    assert_same(model.state_dict(), build(seed=2).state_dict())
    with contextlib.nullcontext() if finetune_takes_it else tiny.user_error("--finetune", at):
        finetune(model, save(tmp_path / "x.pth", {"model": weights}))


@pytest.mark.parametrize(("there", "here"), [(2, 4), (4, 2)])
@pytest.mark.parametrize("flag", ["--resume", "--finetune", "--teacher-path"])
def test_weights_of_another_depth_are_refused_with_their_names(tmp_path, there, here, flag):
    source, kwargs = build(model_kwargs={"depth": there}), {"depth": here}
    path = save(tmp_path / "x.pth", {"model": source.state_dict()})
    with tiny.user_error(f"{flag} {path}", "blocks.2.norm1.weight: ", ", blocks.2.norm1.bias: ", "and 21 more"):
        if flag == "--teacher-path":
            teach(path=path, **kwargs)
        elif flag == "--finetune":
            finetune(build(model_kwargs=kwargs), path)
        else:
            load_weights(build(model_kwargs=kwargs), source.state_dict(), flag, path)


@pytest.mark.parametrize("key", ["blocks.1.mlp.fc2.bias", "norm.weight", "cls_token", "pos_embed"])
def test_one_missing_or_unknown_tensor_is_refused(key):
    weights, model = build(seed=1).state_dict(), build(seed=2)
    with tiny.user_error("--finetune x.pth", "extra: [2] there, nothing here"):
        load_weights(model, weights | {"extra": torch.zeros(2)}, "--finetune", "x.pth", FINETUNING)
    with tiny.user_error("--finetune x.pth", f"{key}: nothing there"):
        load_weights(
            model, {name: value for name, value in weights.items() if name != key}, "--finetune", "x.pth", FINETUNING
        )
    assert_same(model.state_dict(), build(seed=2).state_dict())


@pytest.mark.parametrize(
    ("name", "options"),
    [(PLAIN, {"num_classes": 7}), (DISTILLED, {"num_classes": 7}), ("resnet10t", {"num_classes": 7}), (DISTILLED, {})],
)
def test_evaluation_refuses_weights_that_lack_a_tensor(tmp_path, name, options):
    here = DISTILLED if not options else name
    path = save(tmp_path / "x.pth", {"model": build(PLAIN if not options else name, 1, **options).state_dict()})
    build(here, finetune=path)  # which is fine for training
    with tiny.user_error(f"--finetune {path}: does not fit --model", "there, [5", "--eval needs"):
        build(here, finetune=path, eval_only=True)


def test_evaluation_takes_weights_that_leave_nothing_as_it_was_initialized(tmp_path):
    source = build(DISTILLED, 1)
    path = save(tmp_path / "x.pth", {"model": source.state_dict()})
    assert_same(build(DISTILLED, 2, finetune=path, eval_only=True).state_dict(), source.state_dict())
    model = build(PLAIN, 2, finetune=path, eval_only=True, input_size=(48, 48))  # with the position embedding resized
    assert torch.equal(model.head.weight, source.head.weight)


def test_evaluation_of_pretrained_weights_needs_their_head(monkeypatch):
    create, published = timm.create_model, {}

    def create_model(name, pretrained=False, **options):  # with a state dict for the download
        overlay = {"state_dict": dict(published["weights"]), "num_classes": published["classes"]} if pretrained else {}
        return create(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options)

    monkeypatch.setattr("timm.create_model", create_model)
    for classes in (1000, 0):
        published |= {"classes": classes, "weights": create(PLAIN, img_size=32, num_classes=classes).state_dict()}
        options = ModelOptions(PLAIN, input_size=(32, 32), pretrained=True)
        trained = build_model(options, num_classes=5)
        assert_same(trained.state_dict(), published["weights"], but=parameters_of("head"))
        if classes:
            assert_same(build_model(options, classes, eval_only=True).state_dict(), published["weights"])
        with tiny.user_error("--eval --pretrained", f"have {classes} classes, the data have 5"):
            build_model(options, num_classes=5, eval_only=True)


@pytest.mark.parametrize("depth", [1, 14])
def test_pretrained_weights_are_not_loaded_in_part(monkeypatch, depth):
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: pytest.fail("they were downloaded"))
    name = "vit_tiny_patch16_224"
    with tiny.user_error(f"--model {name}: the pretrained weights do not fit", f"depth={depth}", "blocks."):
        build_model(ModelOptions(name, pretrained=True, model_kwargs={"depth": depth}), num_classes=5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value, dtype):
    weights = {key: tensor.to(dtype) for key, tensor in build(seed=1).state_dict().items()}
    load_weights(build(seed=2), weights, "--resume", "x.pth")
    weights["blocks.1.attn.qkv.bias"][3] = value
    path = save(tmp_path / "x.pth", {"model": weights})
    with tiny.user_error(f"--finetune {path}: blocks.1.attn.qkv.bias is not finite"):
        build(finetune=path)
    with tiny.user_error(f"--teacher-path {path}: blocks.1.attn.qkv.bias is not finite"):
        teach(path=path)
    with tiny.user_error("--resume x.pth: blocks.1.attn.qkv.bias is not finite"):
        load_weights(build(seed=2), weights, "--resume", "x.pth")


def test_batch_statistics_that_are_not_finite_are_refused():
    weights = build_cnn(seed=1).state_dict()
    load_weights(build_cnn(seed=2), weights, "--resume", "x.pth")
    name = next(key for key in weights if key.endswith("running_var"))
    weights[name][0] = float("inf")
    with tiny.user_error(f"{name} is not finite"):
        load_weights(build_cnn(seed=2), weights, "--resume", "x.pth")


def test_quantized_weights_are_refused():
    weights = build(seed=1).state_dict()
    weights["blocks.0.attn.qkv.weight"] = weights["blocks.0.attn.qkv.weight"].mul(100).to(torch.int8)
    with tiny.user_error("blocks.0.attn.qkv.weight"):
        load_weights(build(seed=2), weights, "--finetune", "x.pth", FINETUNING)


# -- other layouts -----------------------------------------------------------------------------------------------------

FAMILIES = {
    "deit3": ("deit3_small_patch16_224", TINY),
    "LS": ("deit_small_patch16_LS", TINY),
    "resmlp": ("resmlp_12_224", {}),  # which has one size
    "cait": ("cait_xxs24_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    "vit": ("vit_tiny_patch16_224", TINY),
    "evit": ("evit_tiny_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads": 3, "drop_loc": [1]}),
}


def family(name, seed=0, **options):
    """Build a tiny model whose parameters are all random, including those initialized with ones or zeros."""
    name, kwargs = FAMILIES[name]
    model = build(name, seed, **{"patch_size": 8 if kwargs else None, "model_kwargs": kwargs} | options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def renamed(weights, *pairs):
    for new, old in pairs:
        weights = {re.sub(old, new, key): value for key, value in weights.items()}
    return weights


def deit3(weights):
    return {"model": renamed(weights, (r"gamma_\1", r"ls([12])\.gamma"))}


def resmlp(weights):
    weights = renamed(weights, ("patch_embed.", r"^stem\."), ("attn.", r"linear_tokens\."), ("mlp.", r"mlp_channels\."))
    weights = renamed(weights, (r"gamma_\1", r"ls([12])$"))
    return {"model": {key: v.flatten() if key.endswith((".alpha", ".beta")) else v for key, v in weights.items()}}


def cait(weights):
    return {"model": {f"module.{key}": value for key, value in weights.items()}, "epoch": 399}


def dino(weights):
    """Student and teacher, each a backbone without a head of classes and a projection head."""
    trunk = {key: value for key, value in weights.items() if not key.startswith("head.")}
    projection = {
        "mlp.0.weight": torch.randn(8, 48),
        "mlp.0.bias": torch.zeros(8),
        "last_layer.weight_g": torch.ones(9, 1),
    }
    teacher = {f"backbone.{key}": value for key, value in trunk.items()} | {
        f"head.{k}": v for k, v in projection.items()
    }
    student = {f"module.{key}": torch.randn_like(value) for key, value in teacher.items()}
    return {"student": student, "teacher": teacher, "optimizer": {}, "epoch": 100, "dino_loss": {}}


def mae(weights):
    trunk = {key: value for key, value in weights.items() if not key.startswith("head.")}
    decoder = ["decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.norm1.weight", "decoder_pred.bias"]
    return {"model": trunk | {"mask_token": torch.zeros(1, 1, 32)} | {key: torch.ones(32) for key in decoder}}


def lightning(prefix):
    def wrap(weights):
        inner = {prefix + key: value for key, value in weights.items()}
        return {"state_dict": inner | {"criterion.weight": torch.ones(5)}, "pytorch-lightning_version": "2.5.0"}

    return wrap


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("deit3", deit3),
        ("LS", deit3),
        ("resmlp", resmlp),
        ("resmlp", lambda weights: {"state_dict": {f"model.{k}": v for k, v in resmlp(weights)["model"].items()}}),
        ("cait", cait),
        ("vit", lightning("model.")),
        ("evit", lightning("net.")),
        ("deit3", lambda weights: lightning("model._orig_mod.")(deit3(weights)["model"])),
        ("vit", lambda weights: {"arch": "vit", "state_dict": weights, "state_dict_ema": {}, "version": 2}),
        ("vit", lambda weights: {"state_dict": {f"module._orig_mod.{k}": v for k, v in weights.items()}}),
    ],
)
def test_classifiers_of_other_layouts_give_the_logits_of_the_original(tmp_path, name, layout):
    source, model = family(name, 1), family(name, 2)
    evaluated = copy.deepcopy(model)
    path = save(tmp_path / "x.pth", layout(source.state_dict()))
    expected = source(images())
    assert expected.std() > 0.01 and not torch.equal(model(images()), expected)
    report = finetune(model, path, eval_only=True)
    assert torch.equal(model(images()), expected) and len(report.kept) == len(source.state_dict())
    load_weights(evaluated, weights_of(torch.load(path), "--resume", path), "--resume", path, EVALUATION)
    assert torch.equal(evaluated(images()), expected)
    if name in ("deit3", "LS"):
        options = TeacherOptions(
            teacher_model=FAMILIES[name][0],
            teacher_model_kwargs={"patch_size": 8} | FAMILIES[name][1],
            teacher_path=path,
            input_size=(32, 32),
        )
        assert torch.equal(load_teacher(options, 5).eval()(images()), expected)


@pytest.mark.parametrize(("layout", "ignored"), [(dino, "head.mlp.0.weight"), (mae, "decoder_pred.bias")])
def test_self_supervised_weights_give_the_features_of_the_original(tmp_path, layout, ignored, caplog):
    source, model = family("vit", 1), family("vit", 2)
    head = model.head.weight.clone()
    path = save(tmp_path / "x.pth", layout(source.state_dict()))
    with caplog.at_level("INFO"):
        report = finetune(model, path)
    assert torch.equal(model.forward_features(images()), source.forward_features(images()))
    assert report.missing == parameters_of("head") and torch.equal(model.head.weight, head)
    assert ignored in report.ignored and f"ignored: {report.ignored[0]}" in caplog.text
    with tiny.user_error("--eval needs"):
        family("vit", finetune=path, eval_only=True)


def published_deit3(weights, batch, num_heads):
    """Logits [B, C] as facebookresearch/deit models_v2.py computes them, from the names in its files, in float64."""
    w = {key: value.double() for key, value in weights.items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = nn.functional.conv2d(batch.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8)
    x = x.flatten(2).transpose(1, 2) + w["pos_embed"]
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1)
    B, N, D = x.shape
    for name in sorted({key.split(".attn.")[0] for key in w if ".attn." in key}):
        y = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").reshape(B, N, 3, num_heads, -1)
        q, k, v = y.permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-2, -1)) * (D / num_heads) ** -0.5).softmax(-1) @ v
        x = x + w[f"{name}.gamma_1"] * linear(y.transpose(1, 2).reshape(B, N, D), f"{name}.attn.proj")
        y = nn.functional.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        x = x + w[f"{name}.gamma_2"] * linear(y, f"{name}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


@pytest.mark.parametrize("input_size", [(32, 32), (48, 48)])
def test_deit3_files_give_the_logits_of_the_original_and_of_timms_filter(tmp_path, input_size):
    weights = deit3(family("LS", 1).state_dict())["model"]
    assert weights["pos_embed"].shape[1] == 16 and "blocks.1.gamma_2" in weights
    model = family("LS", 2, input_size=input_size)
    finetune(model, save(tmp_path / "x.pth", {"model": weights}), eval_only=True)
    theirs = family("deit3", 3, input_size=input_size)
    theirs.load_state_dict(checkpoint_filter_fn(weights, theirs, adapt_layer_scale=True))
    batch = images(*input_size)
    assert torch.equal(model(batch), theirs(batch))
    resized = weights | {"pos_embed": model.pos_embed.detach()}
    torch.testing.assert_close(model(batch).double(), published_deit3(resized, batch, 3), rtol=1e-4, atol=1e-5)


def test_other_layouts_are_resized_and_checked_like_ours(tmp_path):
    source = family("deit3", 1)
    path = save(tmp_path / "x.pth", deit3(source.state_dict()))
    model = family("deit3", 2, input_size=(48, 32))
    report = finetune(model, path)
    expected = resample_abs_pos_embed(source.pos_embed, [6, 4], num_prefix_tokens=0)
    assert report.resized == ["pos_embed"]
    torch.testing.assert_close(model.pos_embed, expected)
    with tiny.user_error("blocks.2.norm1.weight: nothing there"):
        family("deit3", finetune=path, model_kwargs=TINY | {"depth": 3})
    with tiny.user_error("patch_embed.proj.weight: [48, 3, 8, 8] there, [48, 3, 4, 4] here"):  # timm would resize it
        family("deit3", finetune=path, patch_size=4)
    with tiny.user_error("--resume x.pth", "gamma_1: [48] there, nothing here"):  # its optimizer would not fit
        load_weights(model, deit3(source.state_dict())["model"], "--resume", "x.pth")


def test_two_models_in_one_file_are_refused(tmp_path):
    weights = family("vit", 1).state_dict()
    both = {f"{name}.{key}": value for name in ("net", "teacher") for key, value in weights.items()}
    with tiny.user_error("holds several models (net., teacher.)"):
        family("vit", finetune=save(tmp_path / "x.pth", {"state_dict": both}))


def test_ema_weights_of_timm_and_of_the_original_code_are_found():
    one, two = build(seed=1).state_dict(), build(seed=2).state_dict()
    for content in (
        {"state_dict": one, "state_dict_ema": two},
        {"model": one, "model_ema": two, "state_dict_ema": None},
    ):
        assert_same(weights_of(content, "--resume", "x.pth"), one)
        assert_same(ema_of(content, "--resume", "x.pth"), two)
    assert ema_of({"model": one, "model_ema": None}, "--resume", "x.pth") is None
    with tiny.user_error("--resume x.pth: not a checkpoint"):
        ema_of({"model": one, "model_ema": 1}, "--resume", "x.pth")


@pytest.mark.parametrize(
    ("args", "size"),
    [
        ({"input_size": [32]}, (32, 32)),
        ({"input_size": [16, 64]}, (16, 64)),
        (argparse.Namespace(input_size=224), (224, 224)),  # the original code
        (argparse.Namespace(input_size=[3, 16, 64]), (16, 64)),  # timm
        (argparse.Namespace(input_size=None), None),
        ({}, None),
        (None, None),
    ],
)
def test_size_of_the_training_images_is_found(args, size):
    assert trained_size({"args": args}) == size


# -- image sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("input_size", "words"),
    [
        ((47, 47), "--input-size 47 47: 47 is not a multiple of the 16 px patch"),
        ((32, 50), "--input-size 32 50: 50 is not"),
        ((50, 32), "use 48 or 64"),
        ((5, 5), "use 16"),
    ],
)
@pytest.mark.parametrize("name", [PLAIN, "resmlp_12_224", "evit_tiny_patch16_224"])
def test_size_that_is_no_multiple_of_the_patch_is_refused_with_the_nearest(tmp_path, name, input_size, words):
    if name == "resmlp_12_224" and input_size == (5, 5):
        pytest.skip("timm builds none of this size")
    kwargs = {} if "mlp" in name else {"depth": 1, "drop_loc": ()} if "evit" in name else {"depth": 1}
    with tiny.user_error(words, f"patch of --model {name}"):
        build_model(ModelOptions(name, input_size=input_size, drop_path=0, model_kwargs=kwargs), num_classes=5)


def test_teacher_of_a_patch_that_does_not_fit_is_refused(tmp_path):
    source = build(input_size=(48, 48), patch_size=6)
    path = save(tmp_path / "t.pth", {"model": source.state_dict()})
    with tiny.user_error("--teacher-input-size 32 32", f"6 px patch of --teacher-model {PLAIN}; use 30 or 36"):
        teach(path=path, patch_size=6)
    teach(path=path, patch_size=6, teacher_input_size=(36, 36))


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "pvt_v2_b0"])
def test_size_of_models_without_a_grid_of_patches_is_free(name):
    model = build_model(ModelOptions(name, input_size=(47, 53), drop_path=0), num_classes=5)
    assert model(images(47, 53)).shape == (2, 5)


def test_size_of_a_model_that_pads_is_free():
    kwargs = TINY | {"dynamic_img_pad": True, "dynamic_img_size": True}
    assert build(input_size=(47, 53), model_kwargs=kwargs)(images(47, 53)).shape == (2, 5)


# -- teachers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [PLAIN, DISTILLED, "resnet10t"])
def test_teacher_has_its_weights(tmp_path, name):
    source = build(name, 1)
    teacher = teach(name, save(tmp_path / "t.pth", {"model": source.state_dict(), "epoch": 3}))
    assert_same(teacher.state_dict(), source.state_dict())
    assert torch.equal(teacher.eval()(images()), source.eval()(images()))


def test_distilled_weights_may_teach_in_a_plain_model_of_another_grid(tmp_path):
    source = build(DISTILLED, 1)
    teacher = teach(PLAIN, save(tmp_path / "t.pth", {"model": source.state_dict()}), input_size=(48, 48))
    assert torch.equal(teacher.head.weight, source.head.weight) and teacher(images(48, 48)).shape == (2, 5)


@pytest.mark.parametrize("name", [PLAIN, DISTILLED, "resnet10t"])
def test_teacher_of_other_classes_is_a_user_error(tmp_path, name):
    path = save(tmp_path / "t.pth", {"model": build(name, num_classes=7).state_dict()})
    with tiny.user_error(f"--teacher-path {path}", ": [7, ", "there, [5, ", "python main.py --model"):
        teach(name, path)


def test_pretrained_teacher_of_other_classes_is_a_user_error(monkeypatch):
    def create_model(name, pretrained, num_classes, **_):  # stands for a download
        assert pretrained and num_classes is None
        return timm.models.create_model(name, num_classes=1000)

    monkeypatch.setattr("timm.create_model", create_model)
    with tiny.user_error("--teacher-pretrained", "resnet10t has 1000 classes, the data have 5"):
        teach("resnet10t", pretrained=True)
    assert teach("resnet10t", pretrained=True, num_classes=1000).num_classes == 1000


def test_teacher_without_weights_is_a_user_error():
    with tiny.user_error("--teacher-path", "--teacher-pretrained"):
        teach()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        (PLAIN, build_cnn),
        ("resnet10t", build),
        (PLAIN, lambda: build(model_kwargs={"embed_dim": 96})),
        (PLAIN, lambda: build(model_kwargs={"depth": 1})),
        (PLAIN, lambda: build(model_kwargs={"depth": 3})),  # holds all that the teacher asks for, and more
        (DISTILLED, build),
    ],
)
def test_teacher_weights_of_another_model_are_a_user_error(tmp_path, name, make):
    path = save(tmp_path / "t.pth", {"model": make().state_dict()})
    with tiny.user_error(f"--teacher-path {path}: does not fit --teacher-model", "pass the --teacher-model"):
        teach(name, path)


EVIT = "evit_tiny_patch16_224"


def write_evit(path, name=EVIT, model_kwargs=None, **args):
    """Write a tiny EViT that drops patches in layer 1, with the flags of its run."""
    kwargs = TINY | (model_kwargs or {})
    weights = build(name, 1, model_kwargs=kwargs | {"drop_loc": (1,)}).state_dict()
    args = {"model": name, "patch_size": 8, "input_size": [32], "drop_loc": [1], "model_kwargs": kwargs, **args}
    return save(path, {"model": weights, "args": args})


def teach_evit(path, name=EVIT, **kwargs):
    return teach(name, path, **TINY, patch_size=8, drop_loc=(1,), **kwargs).blocks[1].keep_rate


@pytest.mark.parametrize("args", [{"base_keep_rate": 0.5}, {"model_kwargs": {"keep_rate": 0.5}}])
def test_evit_teacher_has_the_keep_rate_of_its_training(tmp_path, caplog, args):
    caplog.set_level("INFO")
    path = write_evit(tmp_path / "t.pth", **args)
    assert teach_evit(path) == 0.5 and not caplog.messages
    assert teach_evit(path, keep_rate=0.5) == 0.5 and not caplog.messages
    assert teach_evit(path, keep_rate=0.9) == 0.9
    assert caplog.messages == [f"--teacher-path {path}: differs from its training: its keep rate was 0.5, is 0.9"]


def test_evit_teacher_has_the_default_keep_rate_of_its_name(tmp_path):
    path = write_evit(tmp_path / "t.pth", "deit_small_patch16_224_shrink05")
    assert teach_evit(path, "deit_small_patch16_224_shrink05") == 0.5
    assert teach_evit(path, "deit_small_patch16_224_shrink") == 0.5


def test_teacher_takes_an_image_size_in_its_keyword_arguments(tmp_path):
    path = write_evit(tmp_path / "t.pth", model_kwargs={"img_size": 32})
    assert teach_evit(path) == teach_evit(path, img_size=32) == 0.7


def test_wrong_options_of_a_teacher_are_spelled_as_its_flags(tmp_path):
    path = write_evit(tmp_path / "t.pth", base_keep_rate=2.0)
    with tiny.user_error("cannot be built with --teacher-input-size 32 32", "--teacher-model-kwargs keep_rate=2.0"):
        teach_evit(path)


def test_teacher_weights_of_an_evit_in_a_plain_model_are_logged(tmp_path, caplog):
    caplog.set_level("INFO")
    path = write_evit(tmp_path / "t.pth", base_keep_rate=0.5)
    teach(PLAIN, path, input_size=(48, 48), **TINY, patch_size=8)
    expected = f"its model was {EVIT}, is {PLAIN}; its input size was (32, 32), is (48, 48)"
    assert caplog.messages[0] == f"--teacher-path {path}: differs from its training: {expected}"


def test_missing_teacher_file_is_a_user_error(tmp_path):
    with tiny.user_error("--teacher-path", tmp_path / "typo.pth", "no such file"):
        teach(path=tmp_path / "typo.pth")


SIZED = ("resmlp_12_224", "mixer_s32_224", "gmlp_ti16_224", "pit_ti_224", "levit_128s")


@pytest.fixture(scope="module", params=SIZED)
def of_two_sizes(request):
    """Return a model for images of 64 px and one for 96 px; the tests change neither."""
    return [timm.create_model(request.param, img_size=size, num_classes=5) for size in (64, 96)]


@pytest.mark.parametrize("flag", ["--finetune", "--resume", "--teacher-path"])
def test_weights_that_depend_on_the_image_size_name_it(of_two_sizes, flag):
    there, here = of_two_sizes
    size_flag = "--teacher-input-size" if flag == "--teacher-path" else "--input-size"
    remedy = f"; pass {size_flag} 64, the only size that fits these weights"
    with tiny.user_error(f"{flag} x.pth: does not fit", remedy):
        load_weights(here, there.state_dict(), flag, "x.pth", FINETUNING, (64, 64))
    with tiny.user_error(f"; pass the {size_flag} (or ", "-kwargs) that these weights are from"):
        load_weights(here, there.state_dict(), flag, "x.pth", FINETUNING)


@pytest.mark.parametrize(
    "other", [{"patch_size": 16}, {"model_kwargs": {"embed_dim": 96}}, {"model_kwargs": {"mlp_ratio": 2}}]
)
def test_another_image_size_is_no_remedy_for_another_model(other):
    weights = build(seed=1, **other, input_size=(64, 64)).state_dict()
    with tiny.user_error("--finetune x.pth: does not fit", "pass the --model (and --patch-size, --model-kwargs)"):
        load_weights(build(), weights, "--finetune", "x.pth", FINETUNING, (64, 64))


# -- the function that weights were trained for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (EVIT, PLAIN + ".fb_in1k"),
        (PLAIN + ".fb_in1k", EVIT),
        (EVIT + ".fb_in1k", EVIT),
        (PLAIN, PLAIN + ".fb_in1k"),
        ("deit_small_patch16_224_shrink05", "deit_small_patch16_224.fb_in1k"),
    ],
)
def test_tags_of_the_same_function_are_one_model(here, there):
    models.refuse_another_model({"model": here}, {"model": there, "model_kwargs": {}}, "--resume x.pth")


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("vit_small_patch16_224.dino", "vit_small_patch16_224"),  # with ImageNet's mean, and with 0.5
        ("deit_tiny_patch16_224.typo", PLAIN),
        ("local-dir:/a/b.c", "local-dir:/a/b.d"),
        ("evit_small_patch16_224", "evit_tiny_patch16_224"),
    ],
)
def test_tags_of_another_function_are_another_model(here, there):
    with tiny.user_error(f"--resume x.pth: was trained with --model {there}, not {here}"):
        models.refuse_another_model({"model": here}, {"model": there}, "--resume x.pth")


def test_two_names_of_an_evit_are_compared_with_their_layers():
    here = {"model": "deit_small_patch16_224_shrink", "drop_loc": [1], "model_kwargs": {}}
    models.refuse_another_model(here, {"model": "deit_small_patch16_224", "drop_loc": None}, "x")
    models.refuse_another_model(here, {"model": "evit_small_patch16_224", "drop_loc": [1]}, "x")
    with tiny.user_error("x: was trained with --drop-loc 3,6,9, not 1; pass the same"):
        models.refuse_another_model(here, {"model": "evit_small_patch16_224", "drop_loc": None}, "x")


def test_keyword_arguments_of_evit_may_be_added_to_a_deit():
    kwargs = {"embed_dim": 48}
    here = {"model": EVIT, "model_kwargs": kwargs | {"drop_loc": (1,), "fuse_token": False, "keep_rate": 0.5}}
    models.refuse_another_model(here, {"model": PLAIN, "model_kwargs": kwargs}, "x")
    with tiny.user_error("x: was trained with --model-kwargs embed_dim=96, not embed_dim=48"):
        models.refuse_another_model(here, {"model": PLAIN, "model_kwargs": {"embed_dim": 96}}, "x")


def test_a_published_name_with_its_tag_is_cut_as_in_the_original(caplog):
    options = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    name = "deit_huge_patch14_LS.fb_in22k_ft_in1k"
    build_model(ModelOptions(name, input_size=(32, 32), drop_path=0, model_kwargs=options), 5)
    assert "the last 4 px of 32 are not seen, as in the original" in caplog.text
    weights = build_model(ModelOptions(name, input_size=(32, 32), drop_path=0, model_kwargs=options), 5).state_dict()
    assert weights["pos_embed"].shape[1] == 4


# -- partial training --------------------------------------------------------------------------------------------------


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", [PLAIN, DISTILLED, "resnet10t"])
def test_scopes_all_and_head(name):
    model = build(name)
    freeze(model, "all")
    assert trained(model) == {name for name, _ in model.named_parameters()}
    freeze(model, "head")
    assert trained(model) == set(parameters_of(*classifier_names(model)))


@pytest.mark.parametrize("name", [PLAIN, DISTILLED])
def test_scope_attn_trains_attention_positions_and_heads(name):
    model = build(name)
    freeze(model, "attn")
    attention = [f"blocks.{n}.attn.{layer}" for n in (0, 1) for layer in ("qkv", "proj")]
    assert trained(model) == {"pos_embed", *parameters_of(*attention, *classifier_names(model))}


def test_scope_attn_of_a_convolutional_network_is_a_user_error():
    with tiny.user_error("--train-scope attn", "--train-scope head"):
        freeze(build_cnn(), "attn")


def step(model):
    set_train_mode(model)
    model(images()).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad


def test_frozen_batch_statistics_stay_as_they_are():
    model, untouched = build_cnn(seed=1), build_cnn(seed=1).state_dict()
    freeze(model, "head")
    step(model)
    assert_same(model.state_dict(), untouched, but=["fc.weight", "fc.bias"])
    assert not torch.equal(model.fc.weight, untouched["fc.weight"])
    freeze(model, "all")
    model.requires_grad_(True)
    step(model)
    means = [key for key in untouched if key.endswith("running_mean")]
    assert means and not any(torch.equal(model.state_dict()[key], untouched[key]) for key in means)


def test_frozen_parts_drop_nothing_and_trained_parts_do():
    model = build(drop=0.5, drop_path=0.5, model_kwargs={"proj_drop_rate": 0.5})
    set_train_mode(model)
    assert all(module.training for module in model.modules())
    freeze(model, "attn")
    set_train_mode(model.eval())
    assert model.training and model.head.training and model.head_drop.training and model.blocks[0].attn.training
    assert not any(module.training for block in model.blocks for module in block.mlp.modules())


def test_distilled_model_with_frozen_trunk_still_gives_two_predictions():
    model = build(DISTILLED, distilled=True)
    freeze(model, "head")
    set_train_mode(model.eval())
    assert len(model(images())) == 2


def test_parts_without_parameters_train_unless_all_around_is_frozen():
    part = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    model = nn.Sequential(part, nn.Dropout(0.5), nn.Linear(2, 1))
    part.requires_grad_(False)
    set_train_mode(model)
    assert not any(module.training for module in part.modules())
    assert model.training and model[1].training and model[2].training


def test_our_checkpoints_say_which_grid_their_position_embedding_is_of(tmp_path):
    # 2 x 8 patches could as well be 4 x 4: the flags in the checkpoint tell
    wide = build(input_size=(16, 64))
    path = save(tmp_path / "wide.pth", {"model": wide.state_dict(), "args": {"input_size": [16, 64]}})
    same = build(seed=1, input_size=(16, 64))
    assert finetune(same, path).resized == []
    assert torch.equal(same.pos_embed, wide.pos_embed)
    square = build(seed=1)
    assert finetune(square, path).resized == ["pos_embed"]
    expected = resample_abs_pos_embed(wide.pos_embed, [4, 4], old_size=[2, 8], num_prefix_tokens=1)
    torch.testing.assert_close(square.pos_embed, expected)
