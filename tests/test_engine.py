"""The training loop, the evaluation and `TrainState`, on tiny real models."""

import contextlib
import copy
import functools
import inspect
import io
import json
import math
import re
import threading
import types

import numpy as np
import pytest
import timm
import torch
from timm.data import Mixup
from timm.optim import get_optimizer_info, kron, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

import engine
import models
from checkpoints import on_host, read_checkpoint
from engine import (
    Output,
    RunOptions,
    Saver,
    TrainState,
    build_lr_schedule,
    build_optimizer,
    evaluate,
    fit,
    train_one_epoch,
)
from flags import SCHEDULES, check_flags, fill, parse_args
from loaders import DeviceLoader, EpochLoader, collate
from losses import DistillationLoss, LossOptions, SupervisedLoss, build_base_criterion
from samplers import Batch, KeyedSampler, seed_generators
from teachers import CachedTeacher, FrozenTeacher, Labels, TeacherCache, TeacherOptions, build_teacher
from tools import chaos
from utils import RunError, StepLog, StopSignals, UserError, World

CPU = torch.device("cpu")
WORLD = World.alone(CPU)
BATCH, STEPS = 8, 4


def build_deit(num_classes=10, **options):
    seed_generators(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return timm.create_model("deit_tiny_distilled_patch16_224", num_classes=num_classes, **size, **options)


def build_resnet():
    seed_generators(0)
    return timm.create_model("test_resnet", num_classes=10)


def random_batches(sizes, num_classes=10, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return [
        Batch(
            torch.randn(size, 3, 32, 32, generator=generator, dtype=dtype),
            torch.randint(num_classes, (size,), generator=generator),
            torch.arange(size),
        )
        for size in sizes
    ]


def joined(batches):
    return Batch(*(torch.cat(parts) for parts in zip(*(batch[:3] for batch in batches), strict=True)))


def weights_in(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_bits(first, second):
    """Check that two nested dictionaries of tensors and numbers are bitwise identical."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same_bits(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same_bits(one, other)
    else:
        assert first == second


def same_bits(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


# -- evaluation --------------------------------------------------------------------------------------------------------


def naive_evaluation(model, batches):
    """Evaluate one image at a time, in float64 after the model."""
    model.eval()
    losses, top1, top5 = [], 0, 0
    for batch in batches:
        for image, target in zip(batch.images, batch.targets.tolist(), strict=True):
            with torch.no_grad():
                row = model(image[None])[0].tolist()
            losses.append(math.log(sum(math.exp(value) for value in row)) - row[target])
            order = sorted(range(len(row)), key=lambda index: -row[index])
            top1 += order[0] == target
            top5 += target in order[:5]
    n = len(losses)
    return {"loss": sum(losses) / n, "acc1": 100 * top1 / n, "acc5": 100 * top5 / n, "images": n}


@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 8, 5), (1,), (3, 7, 1)])
def test_evaluation_is_exact_for_every_division_into_batches(sizes):
    model, batches = build_deit(), random_batches(sizes)
    expected = naive_evaluation(model, batches)
    assert evaluate(model, batches, contextlib.nullcontext()) == pytest.approx(expected, rel=1e-5)


def test_batches_of_different_size_have_no_different_weight():
    model, batches = build_deit(), random_batches((7, 1))
    whole = joined(batches)
    assert evaluate(model, batches, contextlib.nullcontext()) == pytest.approx(
        evaluate(model, [whole], contextlib.nullcontext()), rel=1e-6
    )


def test_top_5_of_fewer_than_5_classes_is_top_k_of_all():
    model, batches = build_deit(num_classes=3), random_batches((8, 5), num_classes=3)
    result = evaluate(model, batches, contextlib.nullcontext())
    assert result["acc5"] == 100
    assert result == pytest.approx(naive_evaluation(model, batches), rel=1e-5)


def test_evaluation_changes_nothing_in_the_model():
    model = build_resnet().train()
    before = weights_in(model)
    result = evaluate(model, random_batches((8, 5)), contextlib.nullcontext())
    assert same_bits(before, model.state_dict()) and not model.training
    assert result == pytest.approx(naive_evaluation(model, random_batches((8, 5))), rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_in_mixed_precision_the_loss_is_still_summed_in_full():
    model, batches = build_deit(), random_batches((8, 5))
    result = evaluate(model, batches, engine.autocast(model, torch.bfloat16))
    assert result["loss"] == pytest.approx(naive_evaluation(model, batches)["loss"], rel=0.02)


def test_batches_are_brought_to_the_model_that_is_evaluated(monkeypatch):
    """EMA weights may be on the CPU while the loader's device is a GPU."""
    model, batches, devices = build_deit(), random_batches((8, 5)), []
    monkeypatch.setattr(engine, "to_device", lambda batch, device: (devices.append(device), batch)[1])
    evaluate(model, batches, contextlib.nullcontext())
    assert devices == [CPU, CPU]


def test_a_compiled_model_sees_batches_of_one_size(monkeypatch):
    model, batches, sizes = build_deit(), random_batches((8, 8, 3)), []
    expected = evaluate(model, batches, contextlib.nullcontext())
    model.compile(backend="eager")
    model._compiled_call_impl = lambda images: (sizes.append(len(images)), model.forward(images))[1]
    assert evaluate(model, batches, contextlib.nullcontext()) == pytest.approx(expected, rel=1e-6)
    assert sizes == [8, 8, 8]


def test_evaluation_of_nothing_is_nothing():
    expected = {"loss": 0, "acc1": 0, "acc5": 0, "images": 0}
    assert evaluate(build_deit(), [], contextlib.nullcontext()) == expected


def test_ema_weights_are_evaluated_next_to_the_model():
    model, batches = build_deit(), random_batches((8, 5))
    state = TrainState(model, model, torch.optim.SGD(model.parameters(), lr=0.1), ema=ModelEmaV3(model))
    with torch.no_grad():
        model.head.weight.mul_(-3)
    stats = {}
    for each in engine.evaluate_all(engine.modules_of(state).items(), batches, state.amp_dtype):
        stats |= each
    for prefix, module in (("test_", model), ("test_ema_", state.ema.module)):
        expected = naive_evaluation(module, batches)
        assert {name: stats[prefix + name] for name in ("loss", "acc1", "acc5")} == pytest.approx(
            {name: expected[name] for name in ("loss", "acc1", "acc5")}, rel=1e-5
        )
    assert stats["test_loss"] != stats["test_ema_loss"]


# -- one update --------------------------------------------------------------------------------------------------------


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch.images), batch.targets)


def state_of(model, lr=0.1, **options):
    return TrainState(model, model, torch.optim.SGD(model.parameters(), lr=lr), **options)


def take_step(state, batch):
    with state.forward():
        loss = loss_of(state.model, batch)
    state.step(loss)


def gradients(model, batch):
    model = copy.deepcopy(model)
    loss_of(model, batch).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_two_half_batches_make_the_update_of_the_whole():
    halves = random_batches((4, 4), dtype=torch.float64)
    whole = joined(halves)
    model = build_deit().double()
    expected = {name: value - 0.1 * gradients(model, whole)[name] for name, value in model.named_parameters()}
    state = state_of(model, accum_steps=2)
    before = weights_in(model)
    take_step(state, halves[0])
    assert state.num_updates == 0 and same_bits(before, model.state_dict())
    take_step(state, halves[1])
    assert state.num_updates == 1
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


def test_no_gradient_is_left_for_the_next_update():
    batches = random_batches((4, 4), dtype=torch.float64)
    model = build_deit().double()
    state = state_of(model)
    take_step(state, batches[0])
    expected = {name: value - 0.1 * gradients(model, batches[1])[name] for name, value in model.named_parameters()}
    take_step(state, batches[1])
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_gradients_are_clipped_by_their_common_norm(share):
    model, (batch,) = build_deit().double(), random_batches((4,), dtype=torch.float64)
    grads = gradients(model, batch)
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
    scale = min(1.0, share)  # a norm below the limit stays as it is
    expected = {name: value - 0.1 * scale * grads[name] for name, value in model.named_parameters()}
    take_step(state_of(model, clip_grad=share * norm), batch)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-8)


def test_clipping_sees_the_accumulated_gradient():
    halves = random_batches((4, 4), dtype=torch.float64)
    whole = joined(halves)
    once, twice = build_deit().double(), build_deit().double()
    take_step(state_of(once, clip_grad=0.1), whole)
    state = state_of(twice, clip_grad=0.1, accum_steps=2)
    for half in halves:
        take_step(state, half)
    for one, two in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_ema_weights_follow_their_formula():
    # timm's: after the first update the weights themselves, then decay · average + (1 - decay) · weights
    model = build_deit()
    state = state_of(model, ema=ModelEmaV3(model, decay=0.7))
    average = None
    for batch in random_batches((4, 4, 4)):
        take_step(state, batch)
        now = {name: value.double() for name, value in weights_in(model).items()}
        average = now if average is None else {name: 0.7 * average[name] + 0.3 * now[name] for name in now}
    for name, value in state.ema.module.state_dict().items():
        torch.testing.assert_close(value, average[name].float())


def two_nets(dtype):
    """Build two equal networks with a layer of this dtype, batch statistics, a counter and a shared weight."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 5).to(dtype))
    net.append(torch.nn.Linear(5, 5))[3].weight = net[0].weight
    return net, copy.deepcopy(net)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"use_warmup": True}, {"decay": 0.5}])
def test_listed_ema_weights_are_bitwise_those_of_timm(options, dtype):
    ours, theirs = two_nets(dtype)
    own, reference = engine.Ema(ours, **options), ModelEmaV3(theirs, **options)
    for update in range(1, 6):
        for net in (ours, theirs):
            draw = torch.Generator().manual_seed(update)
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter.dtype))
            net[1](torch.randn(4, 5, generator=draw))
        if update == 3:  # as a checkpoint is resumed
            for each in (own, reference):
                each.module.load_state_dict({k: v.clone() for k, v in each.module.state_dict().items()})
        own.update(ours, step=update)
        reference.update(theirs, step=update)
        found = own.module.state_dict()
        assert same_bits(found, reference.module.state_dict()) and found["1.num_batches_tracked"] == update
    assert engine.Ema(ours).module.state_dict().keys() == ours.state_dict().keys()


def test_ema_weights_move_once_per_update():
    model = build_deit()
    state = state_of(model, ema=ModelEmaV3(model, decay=0.5), accum_steps=2)
    before = weights_in(state.ema.module)
    take_step(state, random_batches((4,))[0])
    assert same_bits(before, state.ema.module.state_dict())
    take_step(state, random_batches((4,))[0])
    assert same_bits(model.state_dict(), state.ema.module.state_dict())


def test_the_scaled_fp16_update_is_about_that_of_float32():
    (batch,) = random_batches((8,))
    full, half = build_deit(), build_deit()
    take_step(state_of(full), batch)
    state = state_of(half, amp_dtype=torch.float16)
    assert state.scaler.is_enabled()
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 256.0})  # fits these gradients
    before = weights_in(half)
    take_step(state, batch)
    for name, value in half.named_parameters():
        step, expected = value - before[name], full.get_parameter(name) - before[name]
        assert (step - expected).norm() < 0.02 * expected.norm() + 1e-6, name


def test_clipping_measures_unscaled_gradients():
    (batch,) = random_batches((8,))
    model = build_deit()
    state = state_of(model, lr=1.0, amp_dtype=torch.float16, clip_grad=0.01)
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 256.0})
    before = weights_in(model)
    take_step(state, batch)
    after = model.state_dict()
    moved = math.sqrt(sum(float((after[name] - before[name]).square().sum()) for name in before))
    assert moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_an_fp16_overflow_skips_the_update_and_halves_the_scale(clip_grad):
    model, (batch,) = build_deit(), random_batches((8,))
    state = state_of(model, amp_dtype=torch.float16, clip_grad=clip_grad)
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 2.0**30})
    before = weights_in(model)
    take_step(state, batch)
    assert same_bits(before, model.state_dict())
    assert state.scaler.get_scale() == 2.0**29
    assert state.num_updates == 1  # the schedules count attempts, or resuming would shift them


def test_without_fp16_there_is_no_scaling():
    for dtype in (None, torch.bfloat16):
        assert not state_of(build_deit(), amp_dtype=dtype).scaler.is_enabled()


@pytest.mark.parametrize("name, dtype", [("off", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precisions_are_called_by_name(name, dtype):
    assert engine.select_amp(name, CPU) is dtype
    assert engine.select_amp("auto", CPU) in (None, torch.bfloat16)


@pytest.mark.parametrize("device, other", [("cuda", torch.float16), ("cpu", None)])
@pytest.mark.parametrize("here, there", [(True, True), (True, False), (False, True), (False, False)])
def test_ranks_on_different_hardware_use_the_same_precision(device, other, here, there, monkeypatch):
    # fp16 gradients are scaled, bf16 gradients are not, and DDP would sum them
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: here)
    monkeypatch.setattr(engine, "_cpu_computes_bf16", lambda: here)
    monkeypatch.setattr(engine, "agree", lambda lacking: [max(lacking, not there)])
    expected = torch.bfloat16 if here and there else other
    assert engine.select_amp("auto", torch.device(device)) is expected


# -- optimizers --------------------------------------------------------------------------------------------------------


def test_biases_norms_and_embeddings_are_not_decayed():
    model = build_deit()
    optimizer = build_optimizer(model, "adamw", lr=0.1, weight_decay=0.05, betas=(0.8, 0.9))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or name in ("pos_embed", "cls_token", "dist_token")
        assert (id(parameter) in decayed) != exempt, name
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}


# of a DeiT of two blocks: how many layers below the heads each parameter is (timm: the last norm is of the last block)
LAYERS_BELOW = dict.fromkeys(("cls_token", "dist_token", "pos_embed", "patch_embed."), 3)
LAYERS_BELOW |= {"blocks.0.": 2, "blocks.1.": 1, "norm.": 1, "head": 0}


def test_layer_decay_scales_the_rate_of_each_layer():
    model = build_deit()
    optimizer = build_optimizer(model, "adamw", lr=0.01, weight_decay=0.05, layer_decay=0.7)
    schedule = build_lr_schedule(optimizer, 4, 3, 1, sched="cosine", warmup_lr=1e-4, min_lr=1e-5)
    plain = build_optimizer(build_deit(), "adamw", lr=0.01, weight_decay=0.05)
    reference = build_lr_schedule(plain, 4, 3, 1, sched="cosine", warmup_lr=1e-4, min_lr=1e-5)
    assert max(schedule.scheduler.base_values) == 0.01  # what warnings compare --min-lr and --warmup-lr with
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    for update in (0, 2, 4, 7, 11):
        schedule.step_update(update)
        reference.step_update(update)
        assert schedule.value == reference.value == plain.param_groups[0]["lr"]  # that of the head is logged
        for group in optimizer.param_groups:
            for name in map(names.get, group["params"]):
                [below] = [depth for start, depth in LAYERS_BELOW.items() if name.startswith(start)]
                assert group["lr"] == pytest.approx(reference.value * 0.7**below)
                is_decayed = name.endswith(".weight") and "norm" not in name
                assert group["weight_decay"] == (0.05 if is_decayed else 0)


def test_layer_decay_updates_each_layer_by_its_share():
    first, second = build_deit(), build_deit()
    for model, options in ((first, {}), (second, {"layer_decay": 0.5})):
        optimizer = build_optimizer(model, "momentum", lr=0.1, momentum=0.0, **options)
        build_lr_schedule(optimizer, 4, 3, 0, sched="constant").step_update(0)
        take_step(TrainState(model, model, optimizer), random_batches((4,))[0])
    start = build_deit().state_dict()
    for name, value in second.state_dict().items():
        [below] = [depth for prefix, depth in LAYERS_BELOW.items() if name.startswith(prefix)]
        whole = first.state_dict()[name] - start[name]
        torch.testing.assert_close(value - start[name], 0.5**below * whole, rtol=1e-3, atol=1e-7)


def test_layer_decay_of_a_model_without_layers_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="^--layer-decay: Sequential does not name its layers [^\n]*; drop the flag$"):
        build_optimizer(model, "adamw", lr=0.1, layer_decay=0.7)


@pytest.mark.parametrize(
    "name, reference",
    [
        ("adamw", lambda groups: torch.optim.AdamW(groups, lr=0.01)),
        ("adam", lambda groups: torch.optim.Adam(groups, lr=0.01)),
        ("SGD", lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)),
        ("momentum", lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9)),
    ],
)
def test_fused_optimizers_are_taken_and_make_the_same_updates(name, reference):
    model, batches = build_deit().to(memory_format=torch.channels_last), random_batches((4, 4, 4))
    twin = copy.deepcopy(model)
    optimizer = build_optimizer(model, name, lr=0.01, weight_decay=0.05)
    assert all(group["fused"] for group in optimizer.param_groups)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        {"params": [twin.get_parameter(names[p]) for p in group["params"]], "weight_decay": group["weight_decay"]}
        for group in optimizer.param_groups
    ]
    for state in (TrainState(model, model, optimizer), TrainState(twin, twin, reference(groups))):
        for batch in batches:
            take_step(state, batch)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # Adam divides by gradients of about zero


def test_fusedlamb_makes_the_updates_of_apex_computed_by_hand():
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, "fusedlamb", lr=0.1, weight_decay=0.02, eps=1e-8)
    values = {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}
    moments = {name: (np.zeros_like(value), np.zeros_like(value)) for name, value in values.items()}
    generator = np.random.default_rng(0)
    for step in (1, 2, 3):
        gradients = {name: generator.normal(size=value.shape) * step for name, value in values.items()}
        for name, parameter in model.named_parameters():
            parameter.grad = torch.tensor(gradients[name], dtype=torch.float32)
        optimizer.step()
        norm = max(1.0, math.sqrt(sum((gradient**2).sum() for gradient in gradients.values())))  # of all, clipped to 1
        for name, value in values.items():
            gradient, (m, v), decay = gradients[name] / norm, moments[name], 0.02 if name == "weight" else 0
            moments[name] = m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            update = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8) + decay * value
            trust = np.linalg.norm(value) / np.linalg.norm(update) if decay else 1
            values[name] = value - 0.1 * trust * update
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), values[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, fused", [("lookahead_adamw", True), ("lamb", False), ("radam", False)])
def test_optimizers_of_every_kind_can_be_built(name, fused):
    model = build_deit()
    before, state = weights_in(model), TrainState(model, model, build_optimizer(model, name, lr=0.01))
    take_step(state, random_batches((4,))[0])
    assert bool(state.optimizer.param_groups[0].get("fused")) is fused
    assert not same_bits(before, model.state_dict())


@pytest.mark.parametrize("name", ["adamw", "sgd", "lookahead_adamw"])
@pytest.mark.parametrize("written, read", [(True, False), (False, True)])
@pytest.mark.parametrize("amp_dtype", [None, torch.float16])
def test_a_checkpoint_of_the_other_optimizer_kernels_resumes(name, written, read, amp_dtype):
    def build(fused):
        model = build_deit()
        optimizer = build_optimizer(model, name, lr=0.01, weight_decay=0.05, fused=fused)
        state = TrainState(model, model, optimizer, amp_dtype=amp_dtype)
        if amp_dtype is not None:
            state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 256.0})
        return state

    first, second, batches = build(written), build(read), random_batches((4, 4, 4, 4))
    for batch in batches[:3]:
        take_step(first, batch)
    second.resume(copy.deepcopy(first.state_dict([])), "here", updates_per_epoch=3)
    assert {bool(group["fused"]) for group in second.optimizer.param_groups} == {read}
    before = weights_in(first.module)
    for state in (first, second):
        take_step(state, batches[3])
    moved = [value - before[name] for name, value in first.module.named_parameters()]
    apart = [one - other for one, other in zip(first.module.parameters(), second.module.parameters(), strict=True)]
    norm = [torch.cat([each.flatten() for each in values]).norm() for values in (apart, moved)]
    assert norm[0] < 1e-3 * norm[1]


LATE = ("radam", "radabelief", "nadam", "lookahead")  # begin some of their computations after 5 or 6 updates


@pytest.mark.parametrize("name", [*list_optimizers(), "lookahead_adamw"])
def test_every_optimizer_of_timm_trains_and_resumes_or_is_refused(name, monkeypatch):
    monkeypatch.setattr(kron, "has_dynamo", False)  # it compiles its steps, for a minute
    model, twin = build_deit(), build_deit()
    for each in (model, twin):
        models.freeze(each, "head" if name.startswith("kron") else "all")  # it takes 9 s for a matrix of 192 x 48
    betas = (0.8, 0.9, 0.99)[: get_optimizer_info(name.removeprefix("lookahead_")).num_betas]
    options = {"lr": 1e-3, "weight_decay": 0.05, "momentum": 0.8, "eps": 1e-7, "betas": betas}
    try:
        state = TrainState(model, model, build_optimizer(model, name, **options), opt=name)
    except UserError as error:
        assert str(error).startswith(f"--opt {name}: ") and "\n" not in str(error)
        assert name == "adahessian" or name.startswith(("bnb", "fused"))  # of packages that are not installed here
        return
    before, (*batches, last) = weights_in(model), random_batches((4,) * (8 if name.startswith(LATE) else 3))
    for batch in batches:
        take_step(state, batch)
    assert not same_bits(before, model.state_dict())
    file = io.BytesIO()
    torch.save(state.state_dict([]) | {"args": {"opt": name}}, file)
    file.seek(0)
    resumed = TrainState(twin, twin, build_optimizer(twin, name, **options), opt=name)
    resumed.resume(torch.load(file, weights_only=True), "here", updates_per_epoch=len(batches))
    for number, each in enumerate((state, resumed)):
        torch.manual_seed(number)  # what others draw, as on another rank, must not matter
        take_step(each, last)
    if not name.startswith("kron"):  # what it draws next is not in a checkpoint
        assert_same_bits(dict(model.state_dict()), dict(twin.state_dict()))
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


@pytest.mark.parametrize("has_bf16", [True, False])
def test_muon_orthogonalizes_in_float32_on_a_cpu_without_bf16(has_bf16, monkeypatch):
    current = engine.muon.zeropower_via_newtonschulz
    monkeypatch.setattr(engine.muon, "zeropower_via_newtonschulz", getattr(current, "func", current))
    monkeypatch.setattr(engine, "_cpu_computes_bf16", lambda: has_bf16)
    model = build_deit()
    batch = random_batches((4,))[0]
    gradient = gradients(model, batch)["blocks.0.mlp.fc1.weight"].numpy().astype(float)
    weight = model.blocks[0].mlp.fc1.weight
    before = weight.detach().clone()
    state = TrainState(model, model, build_optimizer(model, "muon", lr=0.1, weight_decay=0.0, momentum=0.0))
    take_step(state, batch)
    x = gradient.T / np.linalg.norm(gradient)  # [48, 192]
    for a, b, c in engine.muon._COEFFICIENTS["quintic"]:
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    expected = before.numpy() - 0.1 * 0.2 * math.sqrt(192) * x.T
    error = np.abs(weight.detach().numpy() - expected).max()
    assert error > 1e-3 if has_bf16 else error < 1e-5


def test_an_optimizer_without_its_package_is_refused_on_a_gpu_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="^--opt bnbadamw: .*bitsandbytes to be installed"):
        build_optimizer(build_deit(), "bnbadamw", lr=0.1)


CHANGED = {"weight_decay": 0.2, "betas": (0.7, 0.8), "eps": 1e-3, "momentum": 0.6}


@pytest.mark.parametrize("name", ["adamw", "lookahead_adamw", "sgd", "lion", "rmsproptf", "adan", "lamb", "muon"])
def test_a_resumed_optimizer_has_the_options_of_its_run(name):
    first, second = (build_deit() for _ in range(2))
    changed = CHANGED | ({"betas": (0.7, 0.8, 0.9)} if name == "adan" else {})
    state = TrainState(first, first, build_optimizer(first, name, lr=0.01, weight_decay=0.05, eps=1e-8, momentum=0.9))
    for batch in random_batches((4, 4)):
        take_step(state, batch)
    resumed = TrainState(second, second, build_optimizer(second, name, lr=0.02, **changed))
    options = [dict(group) for group in resumed.optimizer.param_groups]
    resumed.resume(copy.deepcopy(state.state_dict([])), "here", updates_per_epoch=2)
    assert {group["weight_decay"] for group in options} == {0, 0.2}
    for group, expected in zip(resumed.optimizer.param_groups, options, strict=True):
        assert {key: group[key] for key in expected.keys() - {"params", "lookahead_step"}} == {
            key: expected[key] for key in expected.keys() - {"params", "lookahead_step"}
        }
        assert group.get("lookahead_step", 2) == 2  # counted on, not set back
    take_step(resumed, random_batches((4,))[0])


def test_the_update_after_a_resume_is_adamw_with_the_new_options():
    model, twin = build_deit().double(), build_deit().double()
    batches = random_batches((4, 4), dtype=torch.float64)
    state = TrainState(model, model, build_optimizer(model, "adamw", lr=0.01, weight_decay=0.05, betas=(0.9, 0.99)))
    grads = [gradients(model, batches[0])]
    take_step(state, batches[0])
    resumed = TrainState(twin, twin, build_optimizer(twin, "adamw", lr=0.02, **CHANGED))
    resumed.resume(copy.deepcopy(state.state_dict([])), "here", updates_per_epoch=2)
    grads.append(gradients(twin, batches[1]))
    before = weights_in(twin)
    take_step(resumed, batches[1])
    for name in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias", "pos_embed"):
        g1, g2, w = (each[name].numpy() for each in (*grads, before))
        m = 0.7 * (0.1 * g1) + 0.3 * g2
        v = 0.8 * (0.01 * g1**2) + 0.2 * g2**2
        decay = 0.2 if name.endswith("fc1.weight") else 0
        step = 0.02 * (m / (1 - 0.7**2)) / (np.sqrt(v / (1 - 0.8**2)) + 1e-3)
        np.testing.assert_allclose(twin.get_parameter(name).detach().numpy(), w * (1 - 0.02 * decay) - step, rtol=1e-9)


@pytest.mark.parametrize(
    "written, read",
    [
        ("sgd", "momentum"),
        ("adamw", "adam"),
        ("adamw", "lookahead_adamw"),
        ("lookahead_adamw", "adamw"),
        ("lion", "sgd"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_the_state_of_another_optimizer_is_refused(written, read, named):
    if (written, read, named) == ("adamw", "adam", False) and "decoupled_weight_decay" not in torch.optim.Adam(
        [torch.zeros(1)]
    ).defaults:
        pytest.skip("before torch 2.7, only the name tells the states of Adam and AdamW apart")
    model = build_deit()
    state = TrainState(model, model, build_optimizer(model, written, lr=0.01, momentum=0.9))
    take_step(state, random_batches((4,))[0])
    checkpoint = state.state_dict([]) | ({"args": {"opt": written}} if named else {})
    other = TrainState(model, model, build_optimizer(model, read, lr=0.01, momentum=0.9), opt=read)
    told = f"was trained with --opt {written}, whose state --opt {read} cannot use" if named else "pass the --opt"
    with pytest.raises(UserError, match=f"^--resume here: [^\n]*{told}"):
        other.resume(checkpoint, "here", updates_per_epoch=2)


@pytest.mark.parametrize(
    "written, read",
    [("nesterov", "SGD"), ("AdamW", "adamw"), ("lookahead_adamw", "Lookahead_AdamW"), ("fusedlamb", "lamb")],
)
def test_two_names_of_an_optimizer_are_one(written, read):
    model = build_deit()
    state = TrainState(model, model, build_optimizer(model, written, lr=0.01, momentum=0.9))
    take_step(state, random_batches((4,))[0])
    other = TrainState(model, model, build_optimizer(model, read, lr=0.01, momentum=0.9), opt=read)
    other.resume(state.state_dict([]) | {"args": {"opt": written}}, "here", updates_per_epoch=1)
    assert_same_bits(other.optimizer.state_dict()["state"], state.optimizer.state_dict()["state"])


@pytest.mark.parametrize(
    "name, written, read, flag",
    [
        ("rmsproptf", {"momentum": 0.0}, {"momentum": 0.9}, "--momentum"),  # would be a KeyError in the first step
        ("adamw", {"weight_decay": 0.0}, {"weight_decay": 0.05}, "--weight-decay"),  # divides the weights otherwise
        ("adamw", {"weight_decay": 0.05}, {"weight_decay": 0.0}, "--weight-decay"),
        ("adafactor", {}, {"betas": (0.9, 0.99)}, "--opt-betas"),
        ("adamw", {"weight_decay": 0.05}, {"weight_decay": 0.05, "layer_decay": 0.7}, "--layer-decay"),
        ("adamw", {"weight_decay": 0.05, "layer_decay": 0.7}, {"weight_decay": 0.05}, "--layer-decay"),
    ],
)
def test_an_option_that_changes_what_is_collected_is_refused(name, written, read, flag):
    model = build_deit()
    state = TrainState(model, model, build_optimizer(model, name, lr=0.01, **written))
    take_step(state, random_batches((4,))[0])
    other = TrainState(model, model, build_optimizer(model, name, lr=0.01, **read), opt=name)
    with pytest.raises(UserError, match=f"^{flag}: --resume here was trained with[^\n]*; pass the value"):
        other.resume(state.state_dict([]) | {"args": {"opt": name}}, "here", updates_per_epoch=2)


PRECISIONS = [None, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("written", PRECISIONS)
@pytest.mark.parametrize("read", PRECISIONS)
def test_a_checkpoint_is_resumed_in_another_precision(written, read):
    first, second = state_of(build_deit(), amp_dtype=written), state_of(build_deit(), amp_dtype=read)
    if written is torch.float16:
        first.scaler.load_state_dict(first.scaler.state_dict() | {"scale": 1024.0, "_growth_tracker": 7})
    second.resume(copy.deepcopy(first.state_dict([])), "here", updates_per_epoch=2)
    if read is torch.float16:
        restored = second.scaler.state_dict()
        expected = (1024.0, 7) if written is read else (65536.0, 0)
        assert (restored["scale"], restored["_growth_tracker"]) == expected
    take_step(second, random_batches((4,))[0])


@pytest.mark.parametrize("name, options", [("adamww", {}), ("adamw", {"betas": (0.9,)}), ("adamw", {"eps": -1.0})])
def test_an_optimizer_that_cannot_be_built_is_the_user_s_mistake(name, options):
    with pytest.raises(UserError, match=f"^--opt {name}: [^\n]*$"):
        build_optimizer(build_deit(), name, lr=0.1, **options)


# -- learning rate -----------------------------------------------------------------------------------------------------


def cosine_schedule(lr=0.5, epochs=10, warmup_epochs=2, updates_per_epoch=7, **options):
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=lr)
    options = {"sched": "cosine", "warmup_lr": 0.01, "min_lr": 0.02} | options
    return build_lr_schedule(optimizer, updates_per_epoch, epochs, warmup_epochs, **options)


def rate_at(schedule, update):
    schedule.step_update(update)
    rates = {group["lr"] for group in schedule.scheduler.optimizer.param_groups}
    assert rates == {schedule.value}  # all parameters have one rate
    return schedule.value


def test_the_rate_is_a_linear_warm_up_and_then_a_cosine():
    # timm's convention: the cosine runs from update 0, and warm-up replaces its beginning
    schedule = cosine_schedule()
    for update in range(70):
        if update < 14:
            expected = 0.01 + (0.5 - 0.01) * update / 14
        else:
            expected = 0.02 + 0.5 * (0.5 - 0.02) * (1 + math.cos(math.pi * update / 70))
        assert rate_at(schedule, update) == pytest.approx(expected, rel=1e-12), update
    assert rate_at(schedule, 70) == rate_at(schedule, 1000) == 0.02


def test_the_first_update_is_made_at_the_warm_up_rate():
    assert rate_at(cosine_schedule(), 0) == 0.01
    assert rate_at(cosine_schedule(warmup_epochs=0), 0) == 0.5


def test_the_rate_depends_on_the_number_of_updates_alone():
    walked = [rate_at(schedule, update) for schedule in [cosine_schedule()] for update in range(70)]
    for update in (0, 5, 14, 33, 69):  # a resumed run has no history
        assert rate_at(cosine_schedule(), update) == walked[update]
    back_and_forth = cosine_schedule()
    assert [rate_at(back_and_forth, update) for update in (69, 3, 40)] == [walked[69], walked[3], walked[40]]


def test_a_noisy_rate_can_be_resumed_as_well():
    def noisy():
        return cosine_schedule(noise=[0.2, 0.9], noise_seed=3)

    walked = [rate_at(schedule, update) for schedule in [noisy()] for update in range(70)]
    assert walked[30] != rate_at(cosine_schedule(), 30)
    assert [rate_at(noisy(), update) for update in (20, 30, 69)] == [walked[20], walked[30], walked[69]]


def test_a_rate_that_is_never_reached_is_worth_a_warning(caplog):
    engine.logger.addHandler(caplog.handler)
    cosine_schedule(epochs=2, warmup_epochs=2)
    engine.logger.removeHandler(caplog.handler)
    assert "--warmup-epochs 2 is too long for 2 epochs" in caplog.text


def by_hand(words, update, updates_per_epoch=10, epochs=20, warmup=2, peak=0.00768, floor=7.68e-6, start=1e-6):
    """Compute the learning rate of an update from the flags, by timm's definitions."""
    e, last = update / updates_per_epoch, epochs * updates_per_epoch
    if e < warmup:
        # linear to the peak; timm's tanh aims at the rate that follows
        target = by_hand(words, warmup * updates_per_epoch) if words == "--sched tanh" else peak
        return start + (target - start) * e / warmup
    share = update / last
    decay = max(0.0, (e - 15) / 5)  # of the last 5 epochs
    return {
        "--sched cosine": lambda: floor + (peak - floor) * (1 + math.cos(math.pi * share)) / 2,
        "--sched poly": lambda: floor + (peak - floor) * (1 - share),
        "--sched poly --poly-power 2": lambda: floor + (peak - floor) * (1 - share) ** 2,
        "--sched tanh": lambda: floor + (peak - floor) * (1 - math.tanh(-7 * (1 - share) + 3 * share)) / 2,
        "--sched step --decay-epochs 6 --decay-rate 0.5": lambda: peak * 0.5 ** (e // 6),
        # timm decays one update before the epoch
        "--sched multistep --decay-milestones 16 6 --decay-rate 0.2": lambda: (
            peak * 0.2 ** ((update + 1 >= 60) + (update + 1 >= 160))
        ),
        "--sched wsd --decay-epochs 5": lambda: floor + (peak - floor) * (1 - math.sqrt(decay)),
        "--sched rsqrt --decay-epochs 5": lambda: floor + (peak / math.sqrt(e / 2) - floor) * (1 - decay),
        "--sched constant": lambda: peak,
    }[words]()


RATES_AT_THE_END = {  # after 199 of 200 updates
    "--sched cosine": 8.15e-6,
    "--sched poly": 4.60e-5,
    "--sched poly --poly-power 2": 7.87e-6,
    "--sched tanh": 2.864e-5,
    "--sched step --decay-epochs 6 --decay-rate 0.5": 9.6e-4,
    "--sched multistep --decay-milestones 16 6 --decay-rate 0.2": 3.072e-4,
    "--sched wsd --decay-epochs 5": 8.48e-5,
    "--sched rsqrt --decay-epochs 5": 5.62e-5,
    "--sched constant": 7.68e-3,
}


@pytest.mark.parametrize("words", RATES_AT_THE_END)
def test_each_schedule_has_the_rates_computed_by_hand(words):
    args = parse_args([*words.split(), "--epochs", "20", "--warmup-epochs", "2", "--min-lr", "7.68e-6"])
    check_flags(args)
    model = build_deit()
    state = TrainState(model, model, build_optimizer(model, "adamw", lr=0.00768, weight_decay=0.05))
    (schedule,) = engine.build_schedules(state, 10, fill(engine.ScheduleOptions, args))
    for update in range(200):
        assert rate_at(schedule, update) == pytest.approx(by_hand(words, update), rel=1e-9), update
    assert schedule.value == pytest.approx(RATES_AT_THE_END[words], rel=0.01)


def test_the_schedules_of_the_flag_are_those_of_timm():
    known = set(re.findall(r"sched == '(\w+)'", inspect.getsource(create_scheduler_v2))) | {"wsd", "rsqrt"}
    assert {words.split()[1] for words in RATES_AT_THE_END} == set(SCHEDULES) == known - {"plateau"}


@pytest.mark.parametrize(
    "words, why",
    [
        ("--sched wsd", "requires 0 < decay_epochs <= epochs - warmup_epochs, got decay 210"),  # the default, 30 epochs
        ("--sched rsqrt --warmup-epochs 0 --decay-epochs 2", "requires a positive stable_timescale"),
    ],
)
def test_a_schedule_that_timm_refuses_gives_its_reason(words, why):
    args = parse_args(["--epochs", "10", *words.split()])
    model = build_deit()
    state = TrainState(model, model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UserError, match=f"^{' '.join(words.split()[:2])}: [^\n]*{why}[^\n]*; change --epochs"):
        engine.build_schedules(state, 7, fill(engine.ScheduleOptions, args))


@pytest.mark.parametrize("on_epochs", [False, True])
@pytest.mark.parametrize("sched", ["step", "multistep", "warm-up"])
@pytest.mark.parametrize("first", [8, 9, 10])
def test_a_rate_that_never_falls_or_never_peaks_is_worth_a_warning(sched, first, on_epochs, caplog, monkeypatch):
    monkeypatch.setattr(engine.logger, "propagate", True)
    kind = {"warmup_epochs": 0, "sched": sched, "decay_epochs": first, "decay_milestones": [first]}
    kind = {"warmup_epochs": first, "sched": "constant"} if sched == "warm-up" else kind
    weights = nn.Linear(2, 2)
    state = TrainState(weights, weights, torch.optim.SGD(weights.parameters(), lr=0.1))
    schedules = engine.build_schedules(state, 7, engine.ScheduleOptions(epochs=10, sched_on_epochs=on_epochs, **kind))
    rates = [rate_at(schedules[0], 7 * epoch) for epoch in range(10)]
    is_right = max(rates) == 0.1 if sched == "warm-up" else min(rates) < 0.1
    assert is_right == ("the rate never " not in caplog.text)


BELOW = "--warmup-epochs 0 --epochs 10 --no-model-ema"
LONG_DECAY = f"--model-ema-decay {0.1 ** (1 / 69) * 1.001:.6f}"  # 10 epochs of 7 updates, of which the first copies
WARNINGS = {
    "--min-lr 0.11": "--min-lr 0.11 is above the peak learning rate 0.1",
    "--min-lr 0.1": "",  # a constant rate, as published for fine-tuning at 384 px
    "--min-lr 0.11 --sched step --decay-epochs 3": "",  # which does not take it
    "--warmup-epochs 1 --warmup-lr 0.2": "--warmup-lr 0.2 is above the peak learning rate 0.1",
    "--warmup-epochs 0 --warmup-lr 0.2": "",
    "--sched step": "--sched step: the first decay, at epoch 30, is beyond the 10 epochs",
    "--sched multistep --decay-milestones 12 10": "--sched multistep: the first decay, at epoch 10, is beyond",
    "--sched multistep --decay-milestones 12 9": "",
    "--model-ema": "--model-ema-decay 0.99996 is too long for 70 updates: 100 % of the EMA weights",
    f"--model-ema {LONG_DECAY}": "for 70 updates: 11 % of the EMA weights are still the first weights",
    "--model-ema --model-ema-decay 0.967": "",
    "--model-ema --model-ema-warmup": "",
    "--model evit": "the run ends at keep rate 1, not at --base-keep-rate 0.7: --shrink-start-epoch 10 and",
    "--model evit --shrink-start-epoch 5 --shrink-epochs 10": "the run ends at keep rate 0.85, not at",
    "--model evit --shrink-start-epoch 9": "",
    "--model evit --shrink-start-epoch 0 --shrink-epochs 10": "",
    "--model evit --base-keep-rate 1": "",
}


@pytest.mark.parametrize("words", WARNINGS)
def test_settings_that_make_a_run_pointless_give_a_warning(words, caplog, monkeypatch):
    monkeypatch.setattr(engine.logger, "propagate", True)
    args = parse_args([*BELOW.split(), *words.split()])
    model = build_deit()
    if args.model == "evit":
        options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "drop_loc": (1,)}
        model = timm.create_model("evit_tiny_patch16_224", keep_rate=args.base_keep_rate or 0.7, **options)
    ema = ModelEmaV3(model, args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
    state = TrainState(model, model, torch.optim.SGD(model.parameters(), lr=0.1), ema=ema)
    engine.build_schedules(state, 7, fill(engine.ScheduleOptions, args))
    said = {record.getMessage() for record in caplog.records}  # in a whole session, another logger may have it twice
    assert len(said) == bool(WARNINGS[words]) and WARNINGS[words] in "".join(said)


def test_the_share_of_the_first_weights_that_is_told_is_true(caplog, monkeypatch):
    monkeypatch.setattr(engine.logger, "propagate", True)
    model = nn.Linear(1, 1)
    state = TrainState(model, model, torch.optim.SGD(model.parameters(), lr=1.0), ema=ModelEmaV3(model, 0.9))
    engine.build_schedules(state, 4, engine.ScheduleOptions(epochs=3, warmup_epochs=0))
    for update in range(12):
        with torch.no_grad():
            model.weight.fill_(1.0 if update == 0 else 0.0)
        state.ema.update(model, step=update + 1)
    assert f"{100 * state.ema.module.weight.item():.0f} % of the EMA weights" in caplog.text


# -- one epoch ---------------------------------------------------------------------------------------------------------


class Blobs(Dataset):
    """Noisy images whose mean color encodes their class; the noise depends on the sample's key."""

    def __init__(self, length=BATCH * STEPS + 3):
        generator = torch.Generator().manual_seed(11)
        self.colors = torch.randn(10, 3, 1, 1, generator=generator)
        self.targets = torch.randint(10, (length,), generator=generator)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, sample):
        index, position, key = sample
        seed_generators(key)
        target = self.targets[index]
        return Batch(self.colors[target] + torch.randn(3, 32, 32), target, position)


MIXUP = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.0, "num_classes": 10}
CRITERION = SupervisedLoss(build_base_criterion(False, 0.1))


class WatchedLoader(EpochLoader):
    """Calls `watch` with each batch of the training, and yields what it returns."""

    watch = None

    def __iter__(self):
        batches = super().__iter__()
        return batches if self.watch is None else map(self.watch, batches)


def epoch_of(batches, num_batches, *, accum_steps=1, watch=None, mixes=True, counter=None, **options):
    """Wrap batches as one training epoch."""
    loader = WatchedLoader(
        loader=batches,
        device=CPU,
        counter=counter,
        num_batches=num_batches,
        images_per_batch=BATCH,
        updates_per_epoch=num_batches // accum_steps,
        mixup_fn=Mixup(**MIXUP) if mixes else None,
        **options,
    )
    loader.watch = watch
    return loader


def train_loader(accum_steps=1, **options):
    sampler = KeyedSampler(len(Blobs()), multiple=BATCH * accum_steps)
    loader = DataLoader(Blobs(), BATCH, sampler=sampler, collate_fn=collate)
    return epoch_of(loader, len(sampler) // BATCH, accum_steps=accum_steps, counter=sampler, **options)


def val_loader():
    sampler = KeyedSampler(21, shuffle=False)
    return DeviceLoader(DataLoader(Blobs(), BATCH, sampler=sampler, collate_fn=collate), CPU)


class Recorder:
    """A TensorBoard writer's one method."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value))


def build_state(model=None, opt="adamw", **options):
    model = build_deit(drop_rate=0.1, drop_path_rate=0.3) if model is None else model
    optimizer = build_optimizer(model, opt, lr=2e-3, weight_decay=0.05)
    return TrainState(model, model, optimizer, ema=ModelEmaV3(model, decay=0.9), **options)


def build_schedules(state, epochs=3):
    updates = STEPS // state.accum_steps
    return [build_lr_schedule(state.optimizer, updates, epochs, 1, sched="cosine", warmup_lr=1e-4, min_lr=1e-5)]


def one_epoch(state, *, seed=0, rank=0, loader=None):
    loader = loader or train_loader(accum_steps=state.accum_steps)
    log = StepLog(state.epoch, len(loader), BATCH, 2)
    return train_one_epoch(state, loader, CRITERION, build_schedules(state), log, seed=seed, rank=rank)


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_an_epoch_with_dropout_and_mixup_is_the_same_every_time(amp_dtype):
    runs = []
    for noise in (1, 2):
        state = build_state(amp_dtype=amp_dtype)
        torch.manual_seed(noise)  # what came before must not matter
        stats = one_epoch(state)
        runs.append((weights_in(state.module), stats["loss"]))
    assert runs[0][1] == runs[1][1]
    assert same_bits(runs[0][0], runs[1][0])


@pytest.mark.parametrize("other", [{"seed": 1}, {"rank": 1}])
def test_dropout_depends_on_seed_and_rank(other):
    first, second = build_state(), build_state()
    one_epoch(first)
    one_epoch(second, **other)  # the same batches: the difference is in dropout and drop-path
    assert not same_bits(first.module.state_dict(), second.module.state_dict())


@pytest.mark.parametrize("other", [{"seed": 1}, {"rank": 1}])
def test_mixup_depends_on_seed_and_rank(other):
    first, second = build_state(), build_state()
    one_epoch(first)
    one_epoch(second, loader=train_loader(**other))  # the same views: the difference is in Mixup
    assert not same_bits(first.module.state_dict(), second.module.state_dict())


@pytest.mark.parametrize("other", [{"epoch": 1}, {"first_step": 1}])
def test_mixup_depends_on_epoch_and_step(other):
    batches = random_batches((BATCH,)) * 2
    assert not torch.equal(
        next(iter(epoch_of(batches, 2))).targets,
        next(iter(epoch_of(batches, 2, **other))).targets,
    )


def test_another_epoch_and_another_step_drop_otherwise():
    # Weights that stand still show the masks alone: the losses of the same batch differ.
    model = build_deit(drop_rate=0.5)
    state = TrainState(model, model, torch.optim.SGD(model.parameters(), lr=0.0))
    batch, losses = random_batches((BATCH,))[0], set()
    for state.epoch in (0, 1):
        schedule = build_lr_schedule(state.optimizer, 2, 2, 0, sched="cosine")
        log = StepLog(state.epoch, 2, BATCH, 2, writer=Recorder())
        train_one_epoch(state, [batch, batch], CRITERION, [schedule], log)
        losses |= {value for name, value in log.writer.scalars if name == "step/loss"}
    assert len(losses) == 4


def test_an_epoch_returns_the_means_of_what_it_logged():
    model = build_deit()
    state = TrainState(model, model, torch.optim.SGD(model.parameters(), lr=0.05))
    twin = copy.deepcopy(model)
    batches = random_batches((8, 8, 8))
    log, schedules = StepLog(0, 3, BATCH, 2), build_schedules(state)
    stats = train_one_epoch(state, batches, CRITERION, schedules, log)
    optimizer, losses, rates = torch.optim.SGD(twin.parameters(), lr=0.05), [], []
    for update, batch in enumerate(batches):
        rates.append(1e-4 + (0.05 - 1e-4) * update / STEPS)
        optimizer.param_groups[0]["lr"] = rates[-1]
        loss = nn.functional.cross_entropy(twin.train()(batch.images), batch.targets, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert stats["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert stats["lr"] == pytest.approx(sum(rates) / 3, rel=1e-6)
    assert stats["images_per_second"] > 0
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_training_learns():
    state, loader = build_state(build_deit()), train_loader(mixes=False)
    losses = []
    for epoch in range(8):
        loader.set_epoch(epoch)
        log = StepLog(epoch, len(loader), BATCH, 50)
        schedules = build_schedules(state, epochs=8)
        losses.append(train_one_epoch(state, loader, CRITERION, schedules, log)["loss"])
        state.epoch += 1
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("scope", ["all", "head"])
def test_frozen_parts_stay_in_eval_mode(scope):
    model = build_resnet()
    models.freeze(model, scope)
    state = build_state(model)
    before = weights_in(model)
    one_epoch(state)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {name for name in before if "running_" in name or "num_batches" in name}
    assert statistics
    if scope == "head":
        assert changed == {"fc.weight", "fc.bias"}
        assert not model.layer1.training and model.fc.training
    else:
        assert statistics <= changed and model.layer1.training


# -- the device is not waited for --------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Records GPU syncs: reading a number, or a shape that depends on values."""

    OPERATIONS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2"}

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.removeprefix("aten::")
        masked = name.startswith("index") and isinstance(args[1], list | tuple)
        if name in self.OPERATIONS or (masked and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.found.append(name)
        return operation(*args, **(kwargs or {}))


def waits_of_an_epoch(criterion):
    """Return the GPU syncs of an epoch with DeiT's full recipe, before its first report."""
    model = build_deit(drop_rate=0.1, drop_path_rate=0.3)
    model.set_distilled_training(True)
    state, log = build_state(model, amp_dtype=torch.bfloat16), StepLog(0, 100, BATCH, 50)
    loader = epoch_of(random_batches((BATCH,) * 4), 4)
    with Waits() as waits:
        train_one_epoch(state, loader, criterion, build_schedules(state), log)
    assert state.num_updates == 4
    return waits.found


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_no_step_waits_for_the_device(cached, tmp_path, monkeypatch):
    # On CUDA the kernel checks the classes; only on a CPU are they read first.
    monkeypatch.setattr(
        nn.functional, "one_hot", lambda labels, n: labels.new_zeros(len(labels), n).scatter(1, labels[:, None], 1)
    )
    teacher = FrozenTeacher(build_resnet(), ((0.5,) * 3, (0.5,) * 3), ((0.4,) * 3, (0.6,) * 3))
    if cached:
        teacher = CachedTeacher(TeacherCache(tmp_path, Labels(10), BATCH, 0, 1), lambda: 0, teacher)
        teacher(random_batches((BATCH,))[0])
    base = build_base_criterion(False, 0.1)
    assert waits_of_an_epoch(DistillationLoss(base, teacher, LossOptions(distillation_type="hard"))) == []


@pytest.mark.parametrize("look", [torch.Tensor.item, bool, lambda loss: loss.isfinite().nonzero(), lambda x: x[x > 0]])
def test_a_step_that_waits_for_the_device_is_noticed(look):
    def criterion(outputs, batch):
        loss, terms = CRITERION(outputs[0], batch)
        look(loss.detach())
        return loss, terms

    assert len(waits_of_an_epoch(criterion)) == 4


@pytest.mark.parametrize("mixes", [False, True])
def test_a_batch_is_not_read_before_it_is_asked_for(mixes):
    batches = random_batches((2, 2, 2))
    reader = iter(batches)
    copied = iter(epoch_of(reader, 3, mixes=mixes))
    assert next(copied).positions is batches[0].positions
    assert next(reader) is batches[1]
    assert next(copied).positions is batches[2].positions and next(copied, None) is None


def test_a_batch_without_mixup_is_that_of_the_loader():
    batches = random_batches((2, 2))
    for batch, expected in zip(epoch_of(batches, 2, mixes=False), batches, strict=True):
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.targets, expected.targets)


def test_a_batch_goes_to_the_device_but_its_positions_stay():
    (batch,) = random_batches((2,))
    batch = batch._replace(sizes=torch.ones(2, 2, dtype=torch.int64), keys=torch.arange(2))
    (moved,) = DeviceLoader([batch], torch.device("meta"))
    assert {name: value.device.type for name, value in moved._asdict().items()} == {
        **dict.fromkeys(("images", "targets", "sizes", "keys"), "meta"),
        "positions": "cpu",
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("busy", [False, True])
def test_a_batch_is_whole_when_the_gpu_reads_it(busy):
    # Idle, the GPU must wait for the copy. Busy, it reads when the loop has dropped the batch and copies the next.
    batches = [Batch(*(torch.full((2**22,), i).pin_memory() for _ in range(2)), torch.zeros(1)) for i in range(8)]
    read = []
    for batch in DeviceLoader(batches, torch.device("cuda", 0)):
        if busy:
            torch.cuda._sleep(100_000_000)
        read.append(torch.stack([*batch.images.aminmax(), *batch.targets.aminmax()]))
    assert torch.stack(read).tolist() == [[number] * 4 for number in range(8)]


@pytest.mark.parametrize("flags", [[], pytest.param(["--compile"], marks=pytest.mark.compile)])
def test_the_teacher_is_compiled_with_the_model(flags, tmp_path, monkeypatch):
    calls = []  # of compiled code

    def backend(graph, inputs):
        return lambda *args: calls.append(graph) or graph.forward(*args)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.save({"model": build_resnet().state_dict()}, tmp_path / "teacher.pth")
    flags = [*flags, "--teacher-model", "test_resnet", "--teacher-path", str(tmp_path / "teacher.pth")]
    args = parse_args([*flags, "--input-size", "32"])
    student, teacher = models.normalization(build_deit()), models.normalization(build_resnet())
    compiled = build_teacher(fill(TeacherOptions, args), 10, student, CPU)
    (batch,) = random_batches((2,))
    torch.testing.assert_close(compiled(batch), FrozenTeacher(build_resnet(), teacher, student)(batch))
    assert bool(calls) == args.compile
    assert not compiled.model.training and same_bits(build_resnet().state_dict(), compiled.model.state_dict())


# -- errors ------------------------------------------------------------------------------------------------------------


def run(folder, epochs=3, resume=None, watch=None, build=build_state, **options):
    """What `main` does with these flags, from nothing or from a checkpoint; returns the state at the end.

    `watch` is called with the state and each batch of the training, and returns the batch to train on.
    """
    state = build(**options)
    schedules = build_schedules(state, epochs)
    if resume is not None:
        state.resume(read_checkpoint(str(resume), "--resume"), str(resume), STEPS // state.accum_steps)
    fit(
        state,
        train_loader(state.accum_steps, watch=watch and functools.partial(watch, state)),
        val_loader(),
        CRITERION,
        schedules,
        RunOptions(epochs, log_interval=2),
        WORLD,
        Output(folder, about={"args": {"lr": 2e-3, "input_size": [32]}}),
    )
    return state


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_non_finite_loss_ends_the_run_and_leaves_the_files_alone(tmp_path, monkeypatch):
    files, write = [], engine.save_checkpoint
    monkeypatch.setattr(engine, "save_checkpoint", lambda *rest: (write(*rest), files.append(files_in(tmp_path))))

    def poison(state, batch):
        return batch._replace(images=batch.images * float("nan")) if state.epoch == 1 else batch

    with pytest.raises(RunError, match="not finite in epoch 1"):
        run(tmp_path, watch=poison)
    assert len(files) == 2 and files_in(tmp_path) == files[-1]  # before and after the evaluation of epoch 0
    assert files[-1].keys() == {"checkpoint.pth", "checkpoint_previous.pth", "best.pth", "log.txt"}
    checkpoint = read_checkpoint(str(tmp_path / "checkpoint.pth"), "--resume")
    assert checkpoint["epoch"] == 1
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


@pytest.mark.parametrize("amp_dtype", [None, torch.float16])
@pytest.mark.parametrize("bad", [{4}, {5}, {4, 5}])
def test_an_update_of_two_batches_is_skipped_and_counted_once(bad, amp_dtype, tmp_path, caplog):
    seen, weights = [], {}  # the second epoch has batches 4 to 7

    def poison(state, batch):
        seen.append(batch)
        number = len(seen) - 1
        if number in (4, 6):
            weights[number] = weights_in(state.module)
        return batch._replace(images=batch.images * float("nan")) if number in bad else batch

    caplog.set_level("WARNING")
    engine.logger.addHandler(caplog.handler)
    run(tmp_path, epochs=2, watch=poison, accum_steps=2, max_skipped_steps=1, amp_dtype=amp_dtype)
    engine.logger.removeHandler(caplog.handler)
    assert same_bits(weights[4], weights[6])
    assert [record.get("skipped_steps") for record in records_in(tmp_path)] == [None, 1.0]
    assert all(math.isfinite(record["train_loss"]) for record in records_in(tmp_path))
    said = {record.getMessage() for record in caplog.records if "skipped" in record.getMessage()}
    assert said == {f"epoch 1  step {min(bad) - 4} skipped: its loss is not finite"}


@pytest.mark.parametrize("amp_dtype", [None, torch.float16])
@pytest.mark.parametrize("bad", [{0}, {1}])
def test_an_infinite_loss_with_a_finite_gradient_is_skipped(bad, amp_dtype):
    model, batches = build_deit(), random_batches((4, 4))
    state = state_of(model, accum_steps=2, max_skipped_steps=1, amp_dtype=amp_dtype)
    before, losses = weights_in(model), []
    for number, batch in enumerate(batches):
        with state.forward():
            loss = loss_of(state.model, batch)
        losses.append(state.step(loss + math.inf if number in bad else loss).item())
    assert same_bits(before, model.state_dict()) and not all(map(math.isfinite, losses))
    for batch in batches:  # the next update is made
        take_step(state, batch)
    assert not same_bits(before, model.state_dict()) and state.num_updates == 2


def statistics_in(model):
    return {name: value.clone() for name, value in model.named_buffers() if value.is_floating_point()}


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_a_skipped_update_leaves_batch_statistics_alone(accum_steps):
    model, batches = build_resnet().train(), random_batches((4,) * 2 * accum_steps)
    ema = ModelEmaV3(model, decay=0.5)
    state = state_of(model, lr=1e-3, accum_steps=accum_steps, max_skipped_steps=1, ema=ema)
    for batch in batches[:accum_steps]:
        take_step(state, batch)
    before = statistics_in(model)
    for batch in batches[:accum_steps]:
        take_step(state, batch._replace(images=batch.images * math.inf))
    assert same_bits(before, statistics_in(model))
    for module in (model, ema.module):
        assert all(value.isfinite().all() for value in module.state_dict().values())
    for batch in batches[accum_steps:]:
        take_step(state, batch)
    assert not same_bits(before, statistics_in(model))


def test_batch_statistics_that_are_not_finite_are_not_saved(tmp_path):
    def poison(state, batch):
        if state.num_updates == 2 * STEPS - 1:
            next(iter(statistics_of(state.module))).fill_(math.inf)
        return batch

    def statistics_of(module):
        return [value for name, value in module.named_buffers() if name.endswith("running_var")]

    build = functools.partial(build_state, model=build_resnet().eval(), train_mode=False)
    with pytest.raises(RunError, match="not finite in epoch 1"):
        run(tmp_path, watch=poison, build=build)
    checkpoint = read_checkpoint(str(tmp_path / "checkpoint.pth"), "--resume")
    assert checkpoint["epoch"] == 1 and all(value.isfinite().all() for value in checkpoint["model"].values())


def test_two_skipped_updates_are_more_than_one(tmp_path):
    def poison(state, batch):
        return batch._replace(images=batch.images * float("nan")) if state.epoch == 1 else batch

    with pytest.raises(RunError, match="not finite in epoch 1 at step 2"):
        run(tmp_path, epochs=2, watch=poison, accum_steps=2, max_skipped_steps=1)


def test_a_non_finite_last_update_is_not_saved(tmp_path):
    # the loss before it was finite, so only the weights tell
    def break_the_last_step(state, batch):
        if state.num_updates == 2 * STEPS - 1:
            state.module.head.weight.register_hook(lambda gradient: gradient * float("nan"))
        return batch

    with pytest.raises(RunError, match="not finite"):
        run(tmp_path, watch=break_the_last_step)
    checkpoint = read_checkpoint(str(tmp_path / "checkpoint.pth"), "--resume")
    assert checkpoint["epoch"] == 1
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


@pytest.mark.parametrize(
    "name, size, scope, trains",
    [
        ("test_resnet", 64, "all", True),
        ("test_resnet", 32, "all", False),
        ("test_resnet", 32, "head", True),  # its statistics are frozen
        ("levit_128s", 224, "all", False),  # normalizes the pooled features: at any size
        ("test_vit", 32, "all", True),
    ],
)
def test_one_image_at_a_time_trains_or_is_refused(name, size, scope, trains):
    options = {"img_size": size} if name == "test_vit" else {}
    model = timm.create_model(name, num_classes=10, **options)
    models.freeze(model, scope)
    before = weights_in(model)
    arguments = (model, model, engine.OptimizerOptions(model_ema=False), 1, (3, size, size), None, WORLD)
    batch = Batch(torch.randn(1, 3, size, size), torch.tensor([3]), torch.arange(1))
    if trains:
        state = engine.build_state(*arguments)
        assert same_bits(before, model.state_dict())
        models.set_train_mode(model)
        take_step(state, batch)
        return
    with pytest.raises(UserError, match="^--batch-size 1: batch normalization [^\n]*; use --batch-size 2"):
        engine.build_state(*arguments)
    with pytest.raises(ValueError, match="more than 1 value per channel"):  # what the first step would have said
        model.train()(batch.images)


# -- resuming ----------------------------------------------------------------------------------------------------------


def records_in(folder):
    records = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "images_per_second"} for record in records]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accum_steps": 2, "clip_grad": 1.0},
        {"amp_dtype": torch.float16, "opt": "sgd"},
        {"amp_dtype": torch.bfloat16, "opt": "lamb"},
    ],
    ids=["adamw", "accumulating", "fp16", "bf16"],
)
def test_a_killed_and_resumed_run_is_bitwise_identical(tmp_path, options):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()

    def kill(state, batch):
        if state.epoch == 1 and state.num_updates == 1.5 * STEPS // state.accum_steps:
            raise KeyboardInterrupt
        return batch

    run(whole, **options)
    with pytest.raises(KeyboardInterrupt):
        run(killed, watch=kill, **options)
    assert len(records_in(killed)) == 1
    run(killed, resume=killed / "checkpoint.pth", **options)
    first, second = (read_checkpoint(str(folder / "checkpoint.pth"), "--resume") for folder in (whole, killed))
    assert first["epoch"] == 3 and first["step"] == 3 * STEPS // options.get("accum_steps", 1)
    assert_same_bits(first, second)
    assert records_in(whole) == records_in(killed)


def test_a_model_with_batch_statistics_resumes_bitwise_identically(tmp_path):
    def build():
        return build_state(build_resnet())

    run(tmp_path, epochs=2, build=build)
    at_the_end = read_checkpoint(str(tmp_path / "checkpoint.pth"), "--resume")
    run(tmp_path, epochs=1, build=build)
    again = run(None, epochs=2, build=build, resume=tmp_path / "checkpoint.pth")
    assert_same_bits(at_the_end["model"], dict(again.module.state_dict()))
    assert_same_bits(at_the_end["model_ema"], dict(again.ema.module.state_dict()))


def test_a_run_with_layer_decay_resumes_bitwise_with_the_same_rates(tmp_path):
    def build(layer_decay=0.7):
        model = build_deit(drop_path_rate=0.3)
        optimizer = build_optimizer(model, "adamw", lr=2e-3, weight_decay=0.05, layer_decay=layer_decay)
        return TrainState(model, model, optimizer)

    run(tmp_path, epochs=2, build=build)
    at_the_end = read_checkpoint(str(tmp_path / "checkpoint.pth"), "--resume")
    run(tmp_path, epochs=1, build=build)
    again = run(None, epochs=2, build=build, resume=tmp_path / "checkpoint.pth")
    assert_same_bits(at_the_end["model"], dict(again.module.state_dict()))
    other = run(None, epochs=2, build=lambda: build(0.5), resume=tmp_path / "checkpoint.pth")  # another value acts
    for state, decay in ((again, 0.7), (other, 0.5)):
        rates = {group["lr"] for group in state.optimizer.param_groups}
        assert sorted(rate / max(rates) for rate in rates) == pytest.approx([decay**3, decay**2, decay, 1])


def test_a_checkpoint_is_plain_and_its_names_carry_no_prefix(tmp_path):
    state = run(tmp_path, epochs=1)
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert set(checkpoint) == {
        "model",
        "optimizer",
        "lr_scheduler",
        "scaler",
        "model_ema",
        "epoch",
        "step",
        "progress",
        "broken_images",
        "best_acc1",
        "best_epoch",
        "args",
    }
    assert set(checkpoint["model"]) == set(checkpoint["model_ema"]) == set(build_deit().state_dict())
    assert json.loads(json.dumps(checkpoint["args"])) == checkpoint["args"]
    assert (checkpoint["epoch"], checkpoint["step"]) == (1, STEPS) and state.best_acc1 == checkpoint["best_acc1"]
    build_deit().load_state_dict(checkpoint["model"])


def test_a_finished_run_does_nothing_when_resumed(tmp_path):
    run(tmp_path, epochs=1)
    files = files_in(tmp_path)
    state = run(tmp_path, epochs=1, resume=tmp_path / "checkpoint.pth")
    assert files_in(tmp_path) == files and state.epoch == 1


def test_the_best_accuracy_is_restored_and_its_file_kept(tmp_path):
    run(tmp_path, epochs=1)
    checkpoint = read_checkpoint(str(tmp_path / "checkpoint.pth"), "--resume")
    torch.save(checkpoint | {"best_acc1": 99.5}, tmp_path / "checkpoint.pth")
    best = (tmp_path / "best.pth").read_bytes()
    state = run(tmp_path, epochs=2, resume=tmp_path / "checkpoint.pth")
    assert state.best_acc1 == 99.5
    assert (tmp_path / "best.pth").read_bytes() == best
    assert read_checkpoint(str(tmp_path / "checkpoint.pth"), "--resume")["best_acc1"] == 99.5


def test_best_pth_holds_the_epoch_of_the_best_accuracy(tmp_path):
    state = run(tmp_path, epochs=4, build=lambda: build_state(build_deit()))
    accuracies = [record["test_acc1"] for record in records_in(tmp_path)]
    best = read_checkpoint(str(tmp_path / "best.pth"), "--resume")
    assert best["best_acc1"] == state.best_acc1 == max(accuracies)
    assert best["epoch"] == accuracies.index(max(accuracies)) + 1


def test_an_accuracy_at_another_keep_rate_is_never_the_best(tmp_path):
    schedule = types.SimpleNamespace(name="keep_rate", is_comparable=False, state_dict=dict)
    saver = Saver(build_state(), [schedule], WORLD, StopSignals(), Output(tmp_path))
    for accuracy, is_comparable, best in ((90.0, False, -1.0), (20.0, True, 20.0), (80.0, False, 20.0)):
        schedule.is_comparable = is_comparable
        saver.end_epoch({"test_acc1": accuracy})
        assert saver.state.best_acc1 == best
    saver.close()
    assert read_checkpoint(str(tmp_path / "best.pth"), "--resume")["epoch"] == 2


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path, monkeypatch):
    written, write = threading.Event(), engine.save_checkpoint
    monkeypatch.setattr(engine, "save_checkpoint", lambda *rest: (written.wait(60), write(*rest)))
    state = build_state()
    one_epoch(state)
    saver = Saver(state, build_schedules(state), WORLD, StopSignals(), Output(tmp_path))
    expected = copy.deepcopy(state.state_dict(saver.schedules))
    saver.save()
    one_epoch(state)  # while it is being written
    assert not same_bits(expected["model"], state.module.state_dict()) and not files_in(tmp_path)
    written.set()
    saver.close()
    found = read_checkpoint(str(tmp_path / "checkpoint.pth"), "--resume")
    assert same_bits(expected["model"], found["model"]) and same_bits(expected["model_ema"], found["model_ema"])
    assert chaos.differences({key: found[key] for key in expected}, expected) == []


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next(tmp_path, monkeypatch):
    def full(*_):
        raise RunError("cannot write a checkpoint")

    monkeypatch.setattr(engine, "save_checkpoint", full)
    saver = Saver(build_state(), [], WORLD, StopSignals(), Output(tmp_path))
    for act in (saver.save, saver.finish, saver.close):
        saver.save()
        with pytest.raises(RunError, match="cannot write a checkpoint"):
            act()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_host_copy_is_whole_before_the_device_changes_it():
    tensor = torch.zeros(2**24, device="cuda")
    copied = on_host({"a": [tensor]})
    tensor += 1
    assert copied["a"][0].device.type == "cpu" and not copied["a"][0].any()


def test_ema_weights_missing_in_a_checkpoint_start_from_its_weights(tmp_path):
    run(tmp_path, epochs=1)
    checkpoint = read_checkpoint(str(tmp_path / "checkpoint.pth"), "--resume") | {"model_ema": None}
    state = build_state()
    state.resume(checkpoint, "checkpoint.pth", STEPS)
    assert same_bits(checkpoint["model"], state.ema.module.state_dict())


def test_with_another_number_of_updates_an_epoch_is_still_an_epoch(tmp_path):
    run(tmp_path, epochs=2)
    state = build_state()
    state.resume(read_checkpoint(str(tmp_path / "checkpoint.pth"), "--resume"), "checkpoint.pth", 2 * STEPS)
    assert state.epoch == 2 and state.num_updates == 4 * STEPS


def test_a_checkpoint_that_cannot_be_resumed_is_the_user_s_mistake(tmp_path):
    run(tmp_path, epochs=1)
    checkpoint = read_checkpoint(str(tmp_path / "checkpoint.pth"), "--resume")
    with pytest.raises(UserError, match="--resume here: .*--finetune"):  # weights only
        build_state().resume({"model": checkpoint["model"]}, "here", STEPS)
    with pytest.raises(UserError, match="--resume here: does not fit --model"):
        build_state(build_resnet()).resume(checkpoint, "here", STEPS)
    with pytest.raises(UserError, match="--resume here: does not fit --model .*head"):
        build_state(build_deit(num_classes=11)).resume(checkpoint, "here", STEPS)
    model = build_deit()
    models.freeze(model, "head")
    with pytest.raises(UserError, match="--resume here: .*--train-scope"):
        build_state(model).resume(checkpoint, "here", STEPS)


@pytest.mark.parametrize("written, read", [("adamw", "sgd"), ("sgd", "adamw")])
def test_the_state_of_another_optimizer_cannot_be_resumed(tmp_path, written, read):
    run(tmp_path, epochs=1, opt=written)
    checkpoint = read_checkpoint(str(tmp_path / "checkpoint.pth"), "--resume")
    with pytest.raises(UserError, match="--resume here: .*--opt"):
        build_state(opt=read).resume(checkpoint, "here", STEPS)


# -- a whole run -------------------------------------------------------------------------------------------------------


def test_the_log_has_the_original_keys_once_per_epoch(tmp_path):
    run(tmp_path, epochs=2)
    records = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1]
    published = {"train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"}
    averaged = {"test_ema_loss", "test_ema_acc1", "test_ema_acc5"}
    assert all(set(record) == published | averaged | {"images_per_second", "train_images"} for record in records)
    assert records[0]["n_parameters"] == sum(parameter.numel() for parameter in build_deit().parameters())


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_rates_ema_and_log_of_a_run_are_those_computed_by_hand(tmp_path, accum_steps):
    epochs, updates, rates, weights, steps = 3, STEPS // accum_steps, [], [], []
    state = build_state(accum_steps=accum_steps)
    state.optimizer.register_step_pre_hook(lambda opt, *_: rates.append([group["lr"] for group in opt.param_groups]))
    state.optimizer.register_step_post_hook(lambda *_: weights.append(weights_in(state.module)))

    def criterion(outputs, batch):
        loss, _ = CRITERION(outputs, batch)
        steps.append(loss.item())
        return loss, {"loss_base": 2 * loss.detach()}

    loader = train_loader(accum_steps)
    fit(
        state,
        loader,
        val_loader(),
        criterion,
        build_schedules(state, epochs),
        RunOptions(epochs),
        WORLD,
        Output(tmp_path),
    )
    # warm-up for an epoch from 1e-4 to 2e-3, the rest of a cosine from 2e-3 to 1e-5 over all updates
    update = np.arange(epochs * updates)
    cosine = 1e-5 + (2e-3 - 1e-5) * (1 + np.cos(np.pi * update / len(update))) / 2
    expected = np.where(update < updates, 1e-4 + (2e-3 - 1e-4) * update / updates, cosine)
    np.testing.assert_allclose(rates, np.stack([expected] * 2, axis=1), rtol=1e-12)
    average = {name: value.double() for name, value in weights[0].items()}
    for now in weights[1:]:
        average = {name: 0.9 * value + 0.1 * now[name].double() for name, value in average.items()}
    saved = read_checkpoint(str(tmp_path / "checkpoint.pth"), "--resume")
    for name, value in average.items():
        torch.testing.assert_close(saved["model_ema"][name].double(), value, rtol=1e-5, atol=1e-7)
        assert torch.equal(saved["model"][name], weights[-1][name])
    for record, losses, lr in zip(
        records_in(tmp_path), np.reshape(steps, (epochs, STEPS)), expected.reshape(epochs, updates), strict=True
    ):
        assert record["train_loss"] == pytest.approx(losses.mean(), rel=1e-6)
        assert record["train_loss_base"] == pytest.approx(2 * losses.mean(), rel=1e-6)
        assert record["train_lr"] == pytest.approx(lr.mean(), rel=1e-9)


def test_every_epoch_sees_new_views_in_a_new_order():
    state, seen = build_state(), []

    def watch(batch):
        seen.append((state.epoch, batch.images, batch.positions.tolist()))
        return batch

    arguments = (train_loader(watch=watch), val_loader(), CRITERION, build_schedules(state, epochs=2))
    fit(state, *arguments, RunOptions(2), WORLD, Output())
    first, second = ([entry for entry in seen if entry[0] == epoch] for epoch in (0, 1))
    assert len(first) == len(second) == STEPS
    assert [positions for _, _, positions in first] == [positions for _, _, positions in second]
    assert not any(torch.equal(one[1], other[1]) for one, other in zip(first, second, strict=True))


def test_the_logged_accuracy_is_that_of_the_saved_weights(tmp_path):
    run(tmp_path, epochs=1)
    model = build_deit()
    checkpoint = read_checkpoint(str(tmp_path / "checkpoint.pth"), "--resume")
    for weights, prefix in (("model", "test_"), ("model_ema", "test_ema_")):
        model.load_state_dict(checkpoint[weights])
        result = evaluate(model, val_loader(), contextlib.nullcontext())
        assert {prefix + name: result[name] for name in ("loss", "acc1", "acc5")}.items() <= records_in(tmp_path)[
            0
        ].items()


def test_logits_that_are_not_finite_are_not_evaluated():
    model = build_deit()
    with torch.no_grad():
        model.head.bias[3] = torch.inf
    with pytest.raises(RunError, match="logits of 21 of 21 validation images are not finite"):
        evaluate(model, val_loader(), contextlib.nullcontext())


def test_an_epoch_is_saved_before_its_evaluation(tmp_path, monkeypatch):
    whole, failed = tmp_path / "whole", tmp_path / "failed"
    whole.mkdir()
    failed.mkdir()
    run(whole, epochs=2)
    original = engine.evaluate
    monkeypatch.setattr(engine, "evaluate", lambda model, *rest: original(model.to("meta"), *rest))
    with pytest.raises((RuntimeError, NotImplementedError)):
        run(failed, epochs=2)
    saved = read_checkpoint(str(failed / "checkpoint.pth"), "--resume")
    assert (saved["epoch"], saved["step"], saved["best_acc1"]) == (0, STEPS, -1)
    monkeypatch.setattr(engine, "evaluate", original)
    seen = []
    run(failed, epochs=2, resume=failed / "checkpoint.pth", watch=lambda state, batch: seen.append(batch) or batch)
    assert len(seen) == STEPS  # of the second epoch alone
    assert_same_bits(*(read_checkpoint(str(folder / "checkpoint.pth"), "--resume") for folder in (whole, failed)))
    assert records_in(whole) == records_in(failed)


def test_epochs_may_go_unevaluated_but_not_the_last(tmp_path):
    state = build_state()
    arguments = (train_loader(mixes=False), val_loader(), CRITERION, build_schedules(state))
    fit(state, *arguments, RunOptions(3, eval_interval=2), WORLD, Output(tmp_path))
    assert ["test_acc1" in record for record in records_in(tmp_path)] == [False, True, True]


def test_only_rank_0_writes(tmp_path):
    state = build_state()
    world = World(rank=1, size=1, local_rank=1, cpus=1, device=CPU)
    arguments = (train_loader(mixes=False), val_loader(), CRITERION, build_schedules(state))
    fit(state, *arguments, RunOptions(1), world, Output(tmp_path))
    assert files_in(tmp_path) == {} and state.epoch == 1


def test_ema_weights_on_the_cpu_are_evaluated_in_the_precision_of_the_cpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(engine, "autocast", lambda module, amp: amp)
    monkeypatch.setattr(engine, "evaluate", lambda module, loader, amp, is_over: chosen.append(amp) or {})
    monkeypatch.setattr(engine, "select_amp", lambda name, device: f"{name} on {device}")
    on_gpu, on_cpu = torch.nn.Linear(1, 1, device="meta"), torch.nn.Linear(1, 1)
    for modules in ((on_gpu, on_cpu), (on_cpu, on_cpu)):
        list(engine.evaluate_all([(f"{n}_", module) for n, module in enumerate(modules)], [], torch.float16))
    list(engine.evaluate_all([("0_", on_gpu), ("1_", on_cpu)], [], None))
    assert chosen == [torch.float16, "auto on cpu", torch.float16, torch.float16, None, None]


@pytest.mark.parametrize(("states", "finished"), [([True], True), ([False, True], True), ([False], False)])
def test_a_gpu_that_waits_for_another_process_is_not_waited_for(states, finished, monkeypatch):
    left = list(states)
    event = types.SimpleNamespace(record=lambda stream: None, query=lambda: left.pop(0) if len(left) > 1 else left[0])
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    assert engine._has_finished(torch.device("cuda"), seconds=0.2) == finished
    assert engine._has_finished(torch.device("cpu"))


def test_a_stuck_run_saves_whole_updates_only():
    saver = object.__new__(engine.Saver)  # writing would need more
    saver.world, saver.state = World.alone(torch.device("cpu")), types.SimpleNamespace(is_within_update=True)
    assert saver.rescue(StepLog(0, 4, 8, 1)) == "not saved: within an update of several batches"


# -- rehearsal ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock.now += seconds` moves."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(engine, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def slow_batches(clock, ready, count):
    """Yield batches of 10 targets: the first `ready` at once, each of the others after 3 s."""
    for number in range(count):
        clock.now += 0 if number < ready else 3
        yield Batch(torch.zeros(10), torch.zeros(10), torch.zeros(10))


@pytest.mark.parametrize(("workers", "count", "seconds"), [(2, 99, 3), (2, 5, 3), (2, 4, 0), (0, 99, 3), (0, 0, 0)])
def test_loading_is_timed_after_the_batches_that_are_ready(clock, workers, count, seconds):
    loader = types.SimpleNamespace(num_workers=workers, prefetch_factor=2 if workers else None)
    batches = slow_batches(clock, 2 * workers, count)
    assert engine._loading_seconds(batches, types.SimpleNamespace(loader=loader)) == seconds


@pytest.mark.parametrize(
    ("workers", "device", "seconds"), [(0, "cpu", 5), (0, "cuda", 5), (2, "cpu", 5), (2, "cuda", 3)]
)
def test_an_evaluation_takes_loading_and_computing_but_no_compilation(clock, monkeypatch, workers, device, seconds):
    computing = iter([40, 2])  # with and without compilation

    def evaluate_all(*_):
        clock.now += next(computing)
        return iter(())

    class Loader:
        loader = types.SimpleNamespace(num_workers=workers, prefetch_factor=2 if workers else None)
        num_images = 1000

        def __iter__(self):
            return slow_batches(clock, 1 + 2 * workers, 99)

    monkeypatch.setattr(engine, "evaluate_all", evaluate_all)
    monkeypatch.setattr(engine, "modules_of", lambda state: {})
    world, state = types.SimpleNamespace(device=torch.device(device), size=4), types.SimpleNamespace(amp_dtype=None)
    assert engine._evaluation_seconds(state, Loader(), world) == seconds * 1000 / (10 * 4)
