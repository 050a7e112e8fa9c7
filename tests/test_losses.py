"""Criteria against hand-computed values, naive loops in float64, and what the original implementation computes."""

import math

import numpy as np
import pytest
import timm
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from losses import (
    BinaryCrossEntropy,
    CosubLoss,
    DistillationLoss,
    LossOptions,
    SupervisedLoss,
    build_base_criterion,
    build_criterion,
    hard_distillation,
    soft_distillation,
)
from samplers import Batch, seed_generators
from teachers import FrozenTeacher


def batch_of(targets, images=None):
    images = torch.zeros(len(targets), 3, 2, 2) if images is None else images
    return Batch(images, targets, torch.arange(len(targets)))


def log_softmax(row):
    """In Python floats, which are float64."""
    largest = max(row)
    log_sum = largest + math.log(sum(math.exp(value - largest) for value in row))
    return [value - log_sum for value in row]


@pytest.fixture
def logits():
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def teacher_logits():
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(1)) * 3


# -- binary cross-entropy ----------------------------------------------------------------------------------------------


def naive_bce(logits, targets):
    terms = []
    for logit_row, target_row in zip(logits.tolist(), targets, strict=True):
        for logit, target in zip(logit_row, target_row, strict=True):
            share = 1 / (1 + math.exp(-logit))
            terms.append(-target * math.log(share) - (1 - target) * math.log(1 - share))
    return sum(terms) / len(terms)


def test_bce_by_hand():
    # sigmoid(0) = 1/2 for every class, whatever the target
    assert float(BinaryCrossEntropy()(torch.zeros(2, 4), torch.tensor([0, 3]))) == pytest.approx(math.log(2))
    # sigmoid(ln 3) = 3/4: -(ln 3/4 + ln 1/2 + ln 1/2) / 3
    loss = BinaryCrossEntropy()(torch.tensor([[math.log(3), 0.0, 0.0]]), torch.tensor([0]))
    assert float(loss) == pytest.approx(-(math.log(0.75) + 2 * math.log(0.5)) / 3)


def test_bce_of_class_indices_has_one_positive_per_image(logits):
    targets = [[float(column == row % 5) for column in range(5)] for row in range(6)]
    loss = BinaryCrossEntropy()(logits, torch.arange(6) % 5)
    assert float(loss) == pytest.approx(naive_bce(logits, targets), rel=1e-6)


def test_bce_takes_both_mixed_classes_as_positives(logits):
    # shares 0.9 and 0.1 say how much of a class there is, not whether
    mixed = torch.zeros(6, 5)
    mixed[:, 1], mixed[:, 3] = 0.9, 0.1
    loss = BinaryCrossEntropy()(logits, mixed)
    assert float(loss) == pytest.approx(naive_bce(logits, [[0, 1, 0, 1, 0]] * 6), rel=1e-6)


@pytest.mark.parametrize("as_probabilities", [False, True])
def test_smoothing_does_not_turn_absent_classes_into_positives(logits, as_probabilities):
    targets = torch.full((6,), 2)
    if as_probabilities:
        targets = nn.functional.one_hot(targets, 5).float()
    loss = BinaryCrossEntropy(smoothing=0.1)(logits, targets)
    low, high = 0.1 / 5, 0.9 + 0.1 / 5
    assert float(loss) == pytest.approx(naive_bce(logits, [[low, low, high, low, low]] * 6), rel=1e-6)


def test_smoothed_bce_is_least_at_the_smoothed_targets():
    logits = torch.zeros(1, 4, requires_grad=True)
    probabilities = torch.tensor([[0.1 / 4, 0.9 + 0.1 / 4, 0.1 / 4, 0.1 / 4]])
    loss = BinaryCrossEntropy(0.1)(torch.logit(probabilities) + logits, torch.tensor([1]))
    loss.backward()
    assert logits.grad.abs().max() < 1e-6


def test_under_autocast_bce_is_that_of_float32(logits):
    # Targets in bfloat16 would be 0.922 instead of 0.92, and 0.0201 instead of 0.02.
    logits = logits.bfloat16()
    expected = BinaryCrossEntropy(0.1)(logits.float(), torch.arange(6) % 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(BinaryCrossEntropy(0.1)(logits, torch.arange(6) % 5), expected)


# -- cross-entropy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True])
def test_cross_entropy_of_bf16_logits_is_computed_in_float32(logits, mixed):
    logits, targets = logits.bfloat16(), torch.arange(len(logits)) % 5
    targets = F.one_hot(targets, logits.shape[1]).float() if mixed else targets
    batch = Batch(torch.zeros(len(logits), 3, 4, 4), targets, torch.zeros(len(logits)))
    loss, _ = SupervisedLoss(build_base_criterion(False, 0.1))(logits, batch)
    expected = F.cross_entropy(logits.float(), targets, label_smoothing=0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)


class SoftmaxTypes(TorchDispatchMode):
    """Records the device and dtype of the input of each log-softmax."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation._schema.name == "aten::_log_softmax":
            self.found.append((args[0].device.type, args[0].dtype))
        return operation(*args, **(kwargs or {}))


@tiny.NEEDS_FAKE_GPU
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind, softmaxes", [("none", 1), ("hard", 2), ("soft", 3)])
def test_cross_entropy_on_a_gpu_is_computed_in_float32(kind, softmaxes, mixed):
    # Tensors without values need no GPU. Outside autocast, a GPU computes the log-softmax in the dtype of the logits.
    with FakeTensorMode():
        logits = torch.empty(6, 5, dtype=torch.bfloat16, device="cuda")
        targets = torch.empty(6, 5, device="cuda") if mixed else torch.empty(6, dtype=torch.int64, device="cuda")
        teacher, outputs = (None, logits) if kind == "none" else ((lambda batch: logits), (logits, logits))
        criterion = build_criterion(LossOptions(distillation_type=kind), teacher)
        with SoftmaxTypes() as inputs:
            loss, _ = criterion(outputs, batch_of(targets, logits))
        assert (loss.device.type, loss.dtype) == ("cuda", torch.float32)
        assert inputs.found == [("cuda", torch.float32)] * softmaxes


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("options", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}, {"mode": "elem"}, {"prob": 0.0}])
def test_mixed_cross_entropy_is_the_published_one(options, smoothing):
    """The original smooths inside Mixup and then uses the soft-target loss; here the criterion smooths."""
    options = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "num_classes": 10} | options
    targets = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    logits = torch.randn(8, 10, generator=torch.Generator().manual_seed(2))
    mixed = []
    for inside in (smoothing, 0.0):
        seed_generators(5)  # the same mixing twice
        mixed.append(Mixup(label_smoothing=inside, **options)(torch.rand(8, 3, 8, 8), targets)[1])
    published = SoftTargetCrossEntropy()(logits, mixed[0])
    ours = build_base_criterion(bce=False, smoothing=smoothing)(logits, mixed[1])
    torch.testing.assert_close(ours, published)


def test_cross_entropy_of_class_indices_by_hand(logits):
    targets, smoothing = [0, 1, 2, 3, 4, 0], 0.1
    losses = []
    for row, target in zip(logits.tolist(), targets, strict=True):
        logs = log_softmax(row)
        losses.append(-(1 - smoothing) * logs[target] - smoothing * sum(logs) / 5)
    loss = build_base_criterion(bce=False, smoothing=smoothing)(logits, torch.tensor(targets))
    assert float(loss) == pytest.approx(sum(losses) / 6, rel=1e-6)


def test_the_flag_chooses_the_criterion():
    assert isinstance(build_base_criterion(True, 0.1), BinaryCrossEntropy)
    assert isinstance(build_base_criterion(False, 0.1), nn.CrossEntropyLoss)


def test_the_supervised_loss_is_the_base_alone(logits):
    base = build_base_criterion(False, 0.1)
    batch = batch_of(torch.arange(6) % 5)
    loss, terms = SupervisedLoss(base)(logits, batch)
    assert torch.equal(loss, base(logits, batch.targets)) and terms == {}


# -- distillation terms ------------------------------------------------------------------------------------------------


def naive_soft_distillation(student, teacher, tau):
    """τ² times the mean over the batch of KL(teacher ‖ student), in float64."""
    total = 0.0
    for student_row, teacher_row in zip(student.tolist(), teacher.tolist(), strict=True):
        log_student = log_softmax([value / tau for value in student_row])
        log_teacher = log_softmax([value / tau for value in teacher_row])
        total += sum(math.exp(t) * (t - s) for s, t in zip(log_student, log_teacher, strict=True))
    return tau**2 * total / len(student)


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_soft_distillation_agrees_with_a_naive_loop(logits, teacher_logits, tau):
    loss = soft_distillation(logits, teacher_logits, tau, "batchmean")
    assert float(loss) == pytest.approx(naive_soft_distillation(logits, teacher_logits, tau), rel=1e-5)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_the_legacy_scale_is_smaller_by_the_number_of_classes(logits, teacher_logits, tau):
    loss, legacy = (soft_distillation(logits, teacher_logits, tau, scale) for scale in ("batchmean", "legacy"))
    torch.testing.assert_close(legacy * 5, loss)


def test_the_legacy_scale_is_the_published_expression(logits, teacher_logits):
    tau = 3.0
    published = (
        nn.functional.kl_div(
            nn.functional.log_softmax(logits / tau, dim=1),
            nn.functional.log_softmax(teacher_logits / tau, dim=1),
            reduction="sum",
            log_target=True,
        )
        * (tau * tau)
        / logits.numel()
    )
    torch.testing.assert_close(soft_distillation(logits, teacher_logits, tau, "legacy"), published)


def test_soft_distillation_vanishes_only_where_the_student_says_the_same(logits, teacher_logits):
    # a constant added to the logits does not change what they say
    assert float(soft_distillation(teacher_logits + 5, teacher_logits, 2.0, "batchmean")) == pytest.approx(0, abs=1e-5)
    assert float(soft_distillation(logits, teacher_logits, 2.0, "batchmean")) > 0.1


def test_soft_distillation_is_computed_in_float32(logits, teacher_logits):
    student, teacher = logits.bfloat16(), teacher_logits.bfloat16()
    loss = soft_distillation(student, teacher, 1.0, "batchmean")
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(naive_soft_distillation(student, teacher, 1.0), rel=1e-5)


def test_hard_distillation_is_cross_entropy_against_the_teacher_s_decision(logits, teacher_logits):
    losses = [
        -log_softmax(row)[max(range(5), key=said.__getitem__)]
        for row, said in zip(logits.tolist(), teacher_logits.tolist(), strict=True)
    ]
    assert float(hard_distillation(logits, teacher_logits)) == pytest.approx(sum(losses) / 6, rel=1e-6)


def test_hard_distillation_from_a_teacher_of_nan_is_nan(logits, teacher_logits):
    teacher_logits[2, 3] = float("inf")  # a decision like any other
    before = hard_distillation(logits, teacher_logits)
    assert before.isfinite() and torch.equal(before, nn.functional.cross_entropy(logits, teacher_logits.argmax(dim=1)))
    teacher_logits[4, 1] = float("nan")
    assert hard_distillation(logits, teacher_logits).isnan()


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_weights_its_two_losses(logits, teacher_logits, kind, alpha):
    class_logits = logits.flip(0)
    base, batch = build_base_criterion(False, 0.1), batch_of(torch.arange(6) % 5)
    criterion = DistillationLoss(
        base,
        lambda _: teacher_logits,
        LossOptions(distillation_type=kind, distillation_alpha=alpha, distillation_tau=3.0),
    )
    loss, terms = criterion((class_logits, logits), batch)
    base_loss = base(class_logits, batch.targets)
    distilled = (
        hard_distillation(logits, teacher_logits)
        if kind == "hard"
        else soft_distillation(logits, teacher_logits, 3.0, "batchmean")
    )
    torch.testing.assert_close(loss, (1 - alpha) * base_loss + alpha * distilled)
    torch.testing.assert_close(terms["loss_base"], base_loss)
    torch.testing.assert_close(terms["loss_distillation"], distilled)


def softmax(logits):
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("mixes", [True, False])
@pytest.mark.parametrize("bce", [False, True])
@pytest.mark.parametrize("kind", ["none", "soft", "hard"])
def test_every_loss_of_a_batch_is_that_of_numpy(kind, bce, mixes):
    smoothing, alpha, tau, classes = 0.1, 0.3, 3.0, 10
    seed_generators(1)
    class_logits, distillation_logits, teacher_logits = 3 * torch.randn(3, 8, classes)
    labels = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    images = torch.rand(8, 3, 8, 8)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.0, num_classes=classes)
    batch = batch_of((mixup(images, labels) if mixes else (images, labels))[1])
    options = LossOptions(bce, smoothing, kind, alpha, tau)
    heads = class_logits if kind == "none" else (class_logits, distillation_logits)
    loss, _ = build_criterion(options, None if kind == "none" else lambda _: teacher_logits)(heads, batch)

    ours, heard, said = (x.double().numpy() for x in (class_logits, distillation_logits, teacher_logits))
    targets = batch.targets.double().numpy() if mixes else np.eye(classes)[labels]
    if bce:  # both mixed classes are there
        targets = (targets > 0) * (1 - smoothing) + smoothing / classes
        share = 1 / (1 + np.exp(-ours))
        expected = -(targets * np.log(share) + (1 - targets) * np.log(1 - share)).mean()
    else:
        targets = (1 - smoothing) * targets + smoothing / classes
        expected = -(targets * np.log(softmax(ours))).sum(axis=1).mean()
    if kind == "hard":
        distilled = -np.log(softmax(heard))[np.arange(8), said.argmax(axis=1)].mean()
    else:
        p, q = softmax(said / tau), softmax(heard / tau)
        distilled = tau**2 * (p * np.log(p / q)).sum(axis=1).mean()
    expected = expected if kind == "none" else (1 - alpha) * expected + alpha * distilled
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_each_head_learns_from_its_own_teacher(logits, teacher_logits):
    heads = [logits.clone().requires_grad_(True) for _ in range(2)]
    criterion = DistillationLoss(
        build_base_criterion(False, 0),
        lambda _: teacher_logits,
        LossOptions(distillation_type="hard", distillation_alpha=0.25),
    )
    batch = batch_of(torch.arange(6) % 5)
    criterion(tuple(heads), batch)[0].backward()
    probabilities = logits.softmax(1)
    for head, weight, labels in zip(heads, (0.75, 0.25), (batch.targets, teacher_logits.argmax(1)), strict=True):
        expected = weight * (probabilities - nn.functional.one_hot(labels, 5)) / 6
        torch.testing.assert_close(head.grad, expected)


def test_the_logged_terms_are_detached_scalars_of_accuracy_and_agreement():
    # teacher says 0 1 2 3, labels are 0 1 0 0, the distillation head says 0 0 0 3
    said, labels, heard = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 0, 0]), torch.tensor([0, 0, 0, 3])
    teacher_logits, student = (nn.functional.one_hot(rows, 4).float() for rows in (said, heard))
    student.requires_grad_(True)
    criterion = DistillationLoss(
        build_base_criterion(False, 0), lambda _: teacher_logits, LossOptions(distillation_type="hard")
    )
    _, terms = criterion((student, student), batch_of(labels))
    assert set(terms) == {"loss_base", "loss_distillation", "teacher_acc1", "teacher_agreement"}
    assert all(term.ndim == 0 and not term.requires_grad for term in terms.values())
    assert float(terms["teacher_acc1"]) == 50 and float(terms["teacher_agreement"]) == 50


def test_with_mixup_the_teacher_is_judged_by_the_larger_share():
    teacher_logits = nn.functional.one_hot(torch.tensor([0, 1]), 3).float()
    mixed = torch.tensor([[0.7, 0.3, 0.0], [0.6, 0.4, 0.0]])
    criterion = DistillationLoss(
        build_base_criterion(False, 0), lambda _: teacher_logits, LossOptions(distillation_type="soft")
    )
    _, terms = criterion((teacher_logits, teacher_logits), batch_of(mixed))
    assert float(terms["teacher_acc1"]) == 50


def test_the_scale_reaches_the_soft_loss(logits, teacher_logits):
    base, batch = build_base_criterion(False, 0), batch_of(torch.arange(6) % 5)
    for scale in ("batchmean", "legacy"):
        criterion = DistillationLoss(
            base,
            lambda _: teacher_logits,
            LossOptions(
                distillation_type="soft", distillation_alpha=1.0, distillation_tau=2.0, distillation_scale=scale
            ),
        )
        loss, _ = criterion((logits, logits), batch)
        torch.testing.assert_close(loss, soft_distillation(logits, teacher_logits, 2.0, scale))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'soft' or 'hard'"):
        DistillationLoss(build_base_criterion(False, 0), lambda _: None, LossOptions(distillation_type="firm"))


# -- two submodels -----------------------------------------------------------------------------------------------------


def naive_cosub(first, second, targets, bce, smoothing):
    """Loss in float64, one number at a time: as engine.py of facebookresearch/deit, or with softmax cross-entropy."""

    def sigmoid(value):
        return 1 / (1 + math.exp(-value))

    def term(row, wanted):
        if bce:
            pairs = [(sigmoid(value), target) for value, target in zip(row, wanted, strict=True)]
            return -sum(t * math.log(p) + (1 - t) * math.log(1 - p) for p, t in pairs) / len(row)
        return -sum(t * value for t, value in zip(wanted, log_softmax(row), strict=True))

    total = 0.0
    for one, other, target in zip(first, second, targets, strict=True):
        label = [(1 - smoothing) * (column == target) + smoothing / len(one) for column in range(len(one))]
        for row, partner in ((one, other), (other, one)):
            says = [sigmoid(value) for value in partner] if bce else [math.exp(v) for v in log_softmax(partner)]
            total += 0.25 * (term(row, label) + term(row, says))
    return total / len(targets)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bce", [True, False])
def test_cosub_loss_and_gradient_are_those_computed_by_hand(bce, smoothing, logits):
    targets = torch.tensor([4, 0, 2])
    leaf = logits.clone().requires_grad_(True)
    loss, terms = build_criterion(LossOptions(bce, smoothing, cosub=True))(leaf, batch_of(targets))
    loss.backward()
    first, second = logits[:3].double().tolist(), logits[3:].double().tolist()
    loss = loss.detach()
    assert float(loss) == pytest.approx(naive_cosub(first, second, targets.tolist(), bce, smoothing), rel=1e-6)
    assert float(loss) == pytest.approx(float(terms["loss_base"] + terms["loss_cosub"]) / 2)
    # d/dz of (binary) cross-entropy is p(z) - target; a prediction that is followed gets none
    z1, z2 = logits.double().chunk(2)
    p = torch.sigmoid if bce else lambda z: z.softmax(dim=1)
    label = nn.functional.one_hot(targets, 5) * (1 - smoothing) + smoothing / 5
    number = 3 * 5 if bce else 3
    expected = [(2 * p(own) - label - p(other)) / (4 * number) for own, other in ((z1, z2), (z2, z1))]
    torch.testing.assert_close(leaf.grad.double(), torch.cat(expected), rtol=1e-5, atol=1e-7)


def test_cosub_with_mixed_targets_is_the_original_implementation(logits):
    mixed = torch.tensor([[0.7, 0.3, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0.2, 0, 0, 0.8]])
    criterion = nn.BCEWithLogitsLoss()
    outputs, hard = logits.split(3), mixed.gt(0).float()  # with --bce-loss --smoothing 0
    expected = 0.25 * (criterion(outputs[0], hard) + criterion(outputs[1], hard))
    expected += 0.25 * criterion(outputs[0], outputs[1].sigmoid()) + 0.25 * criterion(outputs[1], outputs[0].sigmoid())
    loss, _ = CosubLoss(build_base_criterion(True, 0.0), bce=True)(logits, batch_of(mixed))
    torch.testing.assert_close(loss, expected)


# -- frozen teacher ----------------------------------------------------------------------------------------------------

STUDENT_NORM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TEACHER_NORM = ((0.5, 0.4, 0.3), (0.5, 0.25, 0.125))


def normalized(pixels, norm):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in norm)
    return (pixels - mean) / std


class Echo(nn.Module):
    """Says back what it sees, so that a test can look at it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return images * self.weight


def test_the_teacher_sees_the_image_in_its_own_normalization():
    pixels = torch.rand(2, 3, 4, 4)
    teacher = FrozenTeacher(Echo(), TEACHER_NORM, STUDENT_NORM)
    seen = teacher(batch_of(torch.zeros(2), normalized(pixels, STUDENT_NORM)))
    torch.testing.assert_close(seen, normalized(pixels, TEACHER_NORM), atol=1e-5, rtol=1e-5)


def test_equal_normalizations_leave_the_image_as_it_is():
    images = torch.randn(2, 3, 4, 4)
    seen = FrozenTeacher(Echo(), STUDENT_NORM, STUDENT_NORM)(batch_of(torch.zeros(2), images))
    assert torch.equal(seen, images)


@pytest.mark.parametrize("size", [(24, 24), (6, 20)])
def test_the_teacher_sees_the_images_resized_to_its_own_size(size):
    images = torch.randn(2, 3, 12, 16)
    seen = FrozenTeacher(Echo(), STUDENT_NORM, STUDENT_NORM, size)(batch_of(torch.zeros(2), images))
    assert seen.shape == (2, 3, *size)
    for channel, found in zip(images.flatten(0, 1), seen.flatten(0, 1), strict=True):
        expected = Image.fromarray(channel.numpy()).resize(size[::-1], Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(expected) - found.numpy()).max() < 1e-5
    same = FrozenTeacher(Echo(), STUDENT_NORM, STUDENT_NORM, (12, 16))(batch_of(torch.zeros(2), images))
    assert torch.equal(same, images)


@pytest.fixture(scope="module")
def resnet():
    seed_generators(0)
    return timm.create_model("test_resnet", num_classes=5)


def test_a_real_teacher_runs_in_eval_mode_and_without_gradients(resnet):
    resnet.train().requires_grad_(True)
    before = {name: value.clone() for name, value in resnet.state_dict().items()}
    teacher = FrozenTeacher(resnet, TEACHER_NORM, STUDENT_NORM)
    pixels = torch.rand(4, 3, 32, 32)
    images = normalized(pixels, STUDENT_NORM).requires_grad_(True)
    said = teacher(batch_of(torch.zeros(4), images))
    assert not said.requires_grad and said.dtype == torch.float32
    assert not any(module.training for module in resnet.modules())
    assert not any(parameter.requires_grad for parameter in resnet.parameters())
    # batch statistics untouched, and an image's logits independent of the others in the batch
    assert all(torch.equal(value, before[name]) for name, value in resnet.state_dict().items())
    with torch.no_grad():
        alone = torch.cat([resnet(normalized(pixels[i : i + 1], TEACHER_NORM)) for i in range(4)])
    torch.testing.assert_close(said, alone, atol=1e-4, rtol=1e-4)


def test_under_autocast_the_teacher_still_predicts_in_float32(resnet):
    teacher = FrozenTeacher(resnet, TEACHER_NORM, STUDENT_NORM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert teacher(batch_of(torch.zeros(2), torch.randn(2, 3, 32, 32))).dtype == torch.float32


def test_only_the_student_gets_gradients_from_a_distilled_step(resnet):
    student = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=48, depth=1, num_heads=3, num_classes=5
    )
    student.set_distilled_training(True)
    teacher = FrozenTeacher(resnet, TEACHER_NORM, STUDENT_NORM)
    criterion = DistillationLoss(
        build_base_criterion(False, 0.1), teacher, LossOptions(distillation_type="soft", distillation_tau=3.0)
    )
    batch = batch_of(torch.tensor([0, 1, 2, 3]), torch.randn(4, 3, 32, 32))
    loss, terms = criterion(student.train()(batch.images), batch)
    loss.backward()
    assert student.head.weight.grad.abs().max() > 0 and student.head_dist.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in resnet.parameters())
    torch.testing.assert_close(loss.detach(), 0.5 * terms["loss_base"] + 0.5 * terms["loss_distillation"])


@pytest.mark.parametrize("bce", [False, True])
def test_losses_of_half_precision_logits_are_those_in_float32(bce):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (5 * torch.randn(8, 10, generator=generator).bfloat16() for _ in range(2))
    batch = Batch(torch.zeros(8, 3, 4, 4), torch.arange(8), torch.arange(8))
    options = LossOptions(bce_loss=bce, distillation_type="hard")
    for criterion, outputs in (
        (build_criterion(options), logits),
        (build_criterion(options, lambda batch: teacher), (logits, logits)),
    ):
        whole = tuple(each.double() for each in outputs) if isinstance(outputs, tuple) else outputs.double()
        (loss, _), (expected, _) = criterion(outputs, batch), criterion(whole, batch)
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)
