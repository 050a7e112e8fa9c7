"""Tiny real timm models: building them, fitting weights to them, teachers, partial training."""

import pytest
import safetensors.torch
import timm
import tiny
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from models import (
    ModelOptions,
    build_model,
    classifier_names,
    fit_state_dict,
    freeze,
    load_exactly,
    load_finetune_weights,
    normalization,
    set_train_mode,
    weights_of,
)
from teachers import TeacherOptions, load_teacher

PLAIN, DISTILLED = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}


def build(name=PLAIN, seed=0, num_classes=5, distilled=False, **options):
    """A model of ours without drop-path; transformers are tiny, with patches of 8 pixels."""
    if "deit" in name or "vit" in name:
        options = {"patch_size": 8} | options | {"model_kwargs": TINY | options.get("model_kwargs", {})}
    options = {"input_size": (32, 32), "drop_path": 0.0} | options
    return build_model(ModelOptions(name, seed=seed, **options), num_classes, distilled)


def build_cnn(**options):
    """A convolutional network with BatchNorm, of 24,000 parameters."""
    return build("resnet10t", model_kwargs={"channels": (8, 16, 24, 32), "stem_width": 8}, **options)


def teach(name=PLAIN, path="", num_classes=5, input_size=(32, 32), pretrained=False, **model_kwargs):
    if "deit" in name:
        model_kwargs = TINY | {"patch_size": 8} | model_kwargs
    options = TeacherOptions(
        teacher_model=name,
        teacher_model_kwargs=model_kwargs,
        teacher_path=str(path),
        teacher_pretrained=pretrained,
        input_size=input_size,
    )
    return load_teacher(options, num_classes)


def save(path, content):
    torch.save(content, path)
    return str(path)


def images(height=32, width=32, count=2):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(9))


def assert_same(found, expected, but=()):
    """State dicts are equal, except for the names in `but`."""
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
def test_rates_of_zero_and_the_input_size_are_not_handed_to_models_without_them(name):
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
    with tiny.user_error("--model resnet10t: pretrained weights cannot be had", "check the network"):
        build("resnet10t", pretrained=True)
    with tiny.user_error("--teacher-model resnet10t: pretrained weights cannot be had"):
        teach("resnet10t", pretrained=True)


def test_distillation_needs_a_model_with_a_distillation_head():
    with tiny.user_error("--distillation-type", PLAIN, "deit_tiny_distilled_patch16_224"):
        build(PLAIN, distilled=True)


def test_distilled_model_gives_two_predictions_in_training_and_their_mean_in_evaluation():
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
    report = load_finetune_weights(model, save(tmp_path / "x.pth", {"model": source.state_dict()}))
    assert_same(model.state_dict(), source.state_dict())
    assert len(report.kept) == len(source.state_dict()) and not report.resized + report.dropped + report.missing


def test_safetensors_are_read(tmp_path):
    source, model = build(seed=1), build(seed=2)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "x.safetensors")
    load_finetune_weights(model, str(tmp_path / "x.safetensors"))
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
    report = load_finetune_weights(model, save(tmp_path / "x.pth", {"model": source.state_dict()}))
    assert sorted(report.dropped) == sorted(report.missing) == sorted(heads)
    assert_same(model.state_dict(), source.state_dict(), but=heads)
    assert all(torch.equal(model.state_dict()[head], untouched[head]) for head in heads)


@pytest.mark.parametrize("name", [PLAIN, DISTILLED, "vit_tiny_patch16_224"])
@pytest.mark.parametrize(
    ("old_size", "new_size"),
    [((32, 32), (48, 48)), ((48, 48), (16, 16)), ((32, 32), (16, 48)), ((32, 32), (16, 64))],  # last: as many patches
)
def test_position_embedding_is_resampled_beside_its_prefix(tmp_path, name, old_size, new_size):
    source, model = build(name, 1, input_size=old_size), build(name, 2, input_size=new_size)
    old, prefix = source.state_dict()["pos_embed"], source.num_prefix_tokens
    report = load_finetune_weights(model, save(tmp_path / "x.pth", {"model": source.state_dict()}))
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


def test_position_embedding_of_a_model_without_a_patch_grid_is_taken_as_it_is(tmp_path):
    options = {"model_kwargs": {"embed_dim": 8, "stages": (1, 1, 1, 1), "num_heads": 1}}
    source, model = build("hiera_tiny_224", 1, **options), build("hiera_tiny_224", 2, **options)
    load_finetune_weights(model, save(tmp_path / "x.pth", {"model": source.state_dict()}))
    assert_same(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("input_size", [(32, 32), (48, 48)])
def test_distilled_weights_in_a_plain_model_keep_all_but_the_distillation(tmp_path, input_size):
    source, model = build(DISTILLED, 1), build(PLAIN, 2, input_size=input_size)
    report = load_finetune_weights(model, save(tmp_path / "x.pth", {"model": source.state_dict()}))
    assert sorted(report.dropped) == ["dist_token", "head_dist.bias", "head_dist.weight"] and not report.missing
    weights = source.state_dict()
    patches = weights["pos_embed"][:, 2:]
    if input_size != (32, 32):
        patches = resample_abs_pos_embed(patches, [6, 6], num_prefix_tokens=0)
    torch.testing.assert_close(model.pos_embed, torch.cat([weights["pos_embed"][:, :1], patches], dim=1))
    assert_same(model.state_dict(), weights, but=[*report.dropped, "pos_embed"])


def test_plain_weights_in_a_distilled_model_leave_the_distillation_as_initialised(tmp_path):
    source, model, untouched = build(PLAIN, 1), build(DISTILLED, 2), build(DISTILLED, 2).state_dict()
    report = load_finetune_weights(model, save(tmp_path / "x.pth", {"model": source.state_dict()}))
    assert sorted(report.missing) == ["dist_token", "head_dist.bias", "head_dist.weight"] and not report.dropped
    found, old = model.state_dict(), source.state_dict()["pos_embed"]
    assert torch.equal(found["pos_embed"], torch.cat([old[:, :1], untouched["pos_embed"][:, 1:2], old[:, 1:]], dim=1))
    assert all(torch.equal(found[key], untouched[key]) for key in report.missing)
    assert_same(found, source.state_dict(), but=[*report.missing, "pos_embed"])


@pytest.mark.parametrize(("old", "new"), [(PLAIN, DISTILLED), (DISTILLED, PLAIN)])
def test_other_model_other_grid_and_other_classes_at_once(tmp_path, old, new):
    source, model = build(old, 1, num_classes=7), build(new, 2, input_size=(16, 64))
    load_finetune_weights(model, save(tmp_path / "x.pth", {"state_dict": source.state_dict()}))
    assert model.eval()(images(16, 64)).isfinite().all()
    assert torch.equal(model.pos_embed[:, 0], source.pos_embed[:, 0])


@pytest.mark.parametrize(
    "make", [lambda: build(model_kwargs={"embed_dim": 96}), lambda: build(patch_size=4), build_cnn]
)
def test_weights_of_another_model_are_a_user_error(tmp_path, make):
    path = save(tmp_path / "x.pth", {"model": make().state_dict()})
    with tiny.user_error("--finetune", path, "--model"):
        load_finetune_weights(build(), path)


def test_missing_or_unreadable_file_is_a_user_error(tmp_path):
    with tiny.user_error("--finetune", tmp_path / "typo.pth", "no such file"):
        load_finetune_weights(build(), str(tmp_path / "typo.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with tiny.user_error("--finetune", tmp_path / "text.pth"):
        load_finetune_weights(build(), str(tmp_path / "text.pth"))


def test_report_says_what_became_of_the_tensors():
    _, report = fit_state_dict(build(DISTILLED, num_classes=7).state_dict(), build(input_size=(48, 48)))
    kept = len(build().state_dict()) - 3  # without the head's two and the position embedding
    assert str(report) == (
        f"kept {kept} tensors; resized: pos_embed; dropped: dist_token, head.weight, head.bias, head_dist.weight, "
        f"head_dist.bias; missing, left as initialised: head.weight, head.bias"
    )
    _, report = fit_state_dict({}, build())
    assert str(report).startswith("kept 0 tensors; resized: none; dropped: none; missing, left as initialised: ")
    assert str(report).endswith(f" and {len(build().state_dict()) - 6} more")


def test_fitting_changes_neither_the_weights_nor_the_model():
    source, model = build(DISTILLED, 1), build(PLAIN, 2, input_size=(48, 48))
    fit_state_dict(source.state_dict(), model)
    assert_same(source.state_dict(), build(DISTILLED, 1).state_dict())
    assert_same(model.state_dict(), build(PLAIN, 2, input_size=(48, 48)).state_dict())


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_exact_loading_takes_the_same_model():
    source, model = build(DISTILLED, 1), build(DISTILLED, 2)
    load_exactly(model, source.state_dict(), "x.pth")
    assert_same(model.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    ("other", "at"),
    [
        ({"num_classes": 7}, "head.weight: [7, 48] there, [5, 48] here"),
        ({"input_size": (48, 48)}, "pos_embed: [1, 37, 48] there, [1, 17, 48] here"),
        ({"name": DISTILLED}, "pos_embed: [1, 18, 48] there"),
        ({"model_kwargs": {"depth": 1}}, "blocks.1.norm1.weight: nothing there, [48] here"),
        ({"model_kwargs": {"depth": 3}}, "blocks.2.norm1.weight: [48] there, nothing here"),
    ],
)
def test_exact_loading_refuses_another_model(other, at):
    model = build(seed=2)
    with tiny.user_error("--resume x.pth", at, "--finetune"):
        load_exactly(model, build(seed=1, **other).state_dict(), "x.pth")
    assert_same(model.state_dict(), build(seed=2).state_dict())


@pytest.mark.parametrize("depth", [1, 14])
def test_pretrained_weights_are_not_loaded_in_part(monkeypatch, depth):
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: pytest.fail("they were downloaded"))
    name = "vit_tiny_patch16_224"
    with tiny.user_error(f"--model {name}: the pretrained weights do not fit", f"depth={depth}", "blocks."):
        build_model(ModelOptions(name, pretrained=True, model_kwargs={"depth": depth}), num_classes=5)


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
    with tiny.user_error("--input-size 32 32", f"6 px patch of --teacher-model {PLAIN}; use 30 or 36"):
        teach(path=path, patch_size=6)


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
    with tiny.user_error("--teacher-path", path, "not for 5 classes", f"python main.py --model {name}"):
        teach(name, path)


def test_pretrained_teacher_of_other_classes_is_a_user_error(monkeypatch):
    def create_model(name, pretrained, num_classes, **_):  # stands for a download
        assert pretrained and num_classes is None
        return timm.models.create_model(name, num_classes=1000)

    monkeypatch.setattr("timm.create_model", create_model)
    with tiny.user_error("--teacher-pretrained", "resnet10t knows 1000 classes, the data have 5"):
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
    with tiny.user_error("--teacher-path", path, f"does not fit --teacher-model {name}"):
        teach(name, path)


def test_missing_teacher_file_is_a_user_error(tmp_path):
    with tiny.user_error("--teacher-path", tmp_path / "typo.pth", "no such file"):
        teach(path=tmp_path / "typo.pth")


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


def test_parts_without_parameters_are_in_training_mode_unless_all_around_them_is_frozen():
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
    assert load_finetune_weights(same, path).resized == []
    assert torch.equal(same.pos_embed, wide.pos_embed)
    square = build(seed=1)
    assert load_finetune_weights(square, path).resized == ["pos_embed"]
    expected = resample_abs_pos_embed(wide.pos_embed, [4, 4], old_size=[2, 8], num_prefix_tokens=1)
    torch.testing.assert_close(square.pos_embed, expected)
