"""The base criterion and the distillation losses.

Every criterion is called as `criterion(outputs, batch)` and returns `(loss, terms)`: a scalar to differentiate and a
dictionary of detached scalars to log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from samplers import Batch

Criterion = Callable[[torch.Tensor | tuple[torch.Tensor, torch.Tensor], Batch], tuple[torch.Tensor, dict]]


@dataclass(frozen=True)
class LossOptions:
    """Options of the loss. The fields are flags of main.py; see `BinaryCrossEntropy` and `DistillationLoss`."""

    bce_loss: bool = False
    smoothing: float = 0.1
    distillation_type: str = "none"
    distillation_alpha: float = 0.5
    distillation_tau: float = 1.0
    distillation_scale: str = "batchmean"
    cosub: bool = False  # see `CosubLoss`


class BinaryCrossEntropy(nn.Module):
    """Binary cross-entropy per class, as in "ResNet strikes back" (Wightman et al. 2021, section 3).

    Every class with a target above 0 counts as a positive: one class, or the two that Mixup combined. Label smoothing
    comes after this step; otherwise it would turn all classes into positives.

    Args:
        smoothing: label smoothing s; a target t in {0, 1} becomes t (1 - s) + s / C.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean over B and C, for logits [B, C] and targets [B] (class indices) or [B, C] (probabilities)."""
        num_classes = logits.shape[-1]
        if targets.ndim == 1:
            targets = F.one_hot(targets, num_classes)
        present = (targets > 0).float()  # float32, because bfloat16 cannot represent 0.9 + 0.1 / C
        smoothed = present * (1 - self.smoothing) + self.smoothing / num_classes
        return F.binary_cross_entropy_with_logits(logits.float(), smoothed)


def build_base_criterion(bce: bool, smoothing: float) -> nn.Module:
    """Build the loss of logits [B, C] against class indices [B] or probabilities [B, C].

    `nn.CrossEntropyLoss` smooths both kinds of targets. With Mixup this gives (1 - s) (λ y₁ + (1 - λ) y₂) + s / C, the
    same as smoothing y₁ and y₂ first, as the original implementation does.
    """
    return BinaryCrossEntropy(smoothing) if bce else nn.CrossEntropyLoss(label_smoothing=smoothing)


class SupervisedLoss:
    """The base criterion on the labels, without a teacher."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base

    def __call__(self, outputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.base(outputs.float(), batch.targets), {}  # float32 under autocast, as in the original


def soft_distillation(student: torch.Tensor, teacher: torch.Tensor, tau: float, scale: str) -> torch.Tensor:
    """Compute τ² KL(softmax(teacher / τ) ‖ softmax(student / τ)), DeiT equation 2 (Hinton et al. 2015).

    Args:
        student, teacher: logits [B, C].
        tau: temperature τ.
        scale: "batchmean" divides the sum by B; "legacy" by B · C, like the original implementation.
    """
    divergence = F.kl_div(
        F.log_softmax(student.float() / tau, dim=1),
        F.log_softmax(teacher.float() / tau, dim=1),
        reduction="sum",
        log_target=True,
    )
    return divergence * tau**2 / (student.numel() if scale == "legacy" else len(student))


def hard_distillation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy against the teacher's arg-max class, DeiT equation 3; logits [B, C].

    The result is NaN if a teacher logit is.
    """
    loss = F.cross_entropy(student.float(), teacher.argmax(dim=1))  # argmax returns a class even for NaN
    return loss.masked_fill(teacher.isnan().any(), float("nan"))


class DistillationLoss:
    """(1 - α) base(class head, labels) + α distillation(distillation head, teacher), DeiT section 4.

    With a single head, both losses apply to it, as in Hinton et al. 2015 (arXiv 1503.02531, section 2).

    The logged terms are the two unweighted losses, the teacher's top-1 accuracy (with Mixup, against the label with the
    larger share), and the share of images on which student and teacher agree.

    Args:
        base: criterion of the class head.
        teacher: returns logits [B, C] for a batch: a model, or cached predictions.
        options: type, weight α, temperature τ and scale of the distillation.

    Raises:
        ValueError: if the type is neither "soft" nor "hard".
    """

    def __init__(self, base: nn.Module, teacher: Callable[[Batch], torch.Tensor], options: LossOptions) -> None:
        if options.distillation_type not in ("soft", "hard"):
            raise ValueError(f"distillation_type is 'soft' or 'hard', not {options.distillation_type!r}")
        self.base, self.teacher, self.options = base, teacher, options

    def distill(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Compute the distillation loss of logits [B, C]."""
        if self.options.distillation_type == "hard":
            return hard_distillation(student, teacher)
        return soft_distillation(student, teacher, self.options.distillation_tau, self.options.distillation_scale)

    def __call__(
        self, outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor], batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        class_logits, distillation_logits = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        teacher_logits = self.teacher(batch)
        base_loss = self.base(class_logits.float(), batch.targets)
        distillation_loss = self.distill(distillation_logits, teacher_logits)
        labels = batch.targets if batch.targets.ndim == 1 else batch.targets.argmax(dim=1)
        decisions = teacher_logits.argmax(dim=1)
        terms = {
            "loss_base": base_loss.detach(),
            "loss_distillation": distillation_loss.detach(),
            "teacher_acc1": (decisions == labels).float().mean() * 100,
            "teacher_agreement": (decisions == distillation_logits.argmax(dim=1)).float().mean() * 100,
        }
        alpha = self.options.distillation_alpha
        return (1 - alpha) * base_loss + alpha * distillation_loss, terms


class CosubLoss:
    """Co-training of two submodels (cosub, Touvron et al. 2022, arXiv 2212.04884).

    ¼ [base(z₁, y) + base(z₂, y) + H(z₁, p(z₂)) + H(z₂, p(z₁))], where gradients do not flow through the predictions p.
    The batch holds each image twice; stochastic depth turns the two passes into two submodels with logits z₁ and z₂.

    Args:
        base: criterion of the labels.
        bce: use binary cross-entropy for H and the sigmoid for p, as the original implementation does; otherwise
            cross-entropy and softmax, as in the paper's abstract. H is never smoothed.
    """

    def __init__(self, base: nn.Module, bce: bool) -> None:
        self.base, self.bce = base, bce

    def follow(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Compute H(student, p(teacher)) for logits [B, C]."""
        student, teacher = student.float(), teacher.detach().float()
        if self.bce:
            return F.binary_cross_entropy_with_logits(student, teacher.sigmoid())
        return F.cross_entropy(student, teacher.softmax(dim=1))

    def __call__(self, outputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss of outputs [2B, C] for B targets; the logged terms are means over both submodels."""
        first, second = outputs.float().chunk(2)
        base_loss = (self.base(first, batch.targets) + self.base(second, batch.targets)) / 2
        cosub_loss = (self.follow(first, second) + self.follow(second, first)) / 2
        terms = {"loss_base": base_loss.detach(), "loss_cosub": cosub_loss.detach()}
        return (base_loss + cosub_loss) / 2, terms


def build_criterion(
    options: LossOptions, teacher: Callable[[Batch], torch.Tensor] | None = None
) -> SupervisedLoss | DistillationLoss | CosubLoss:
    """Build the criterion: with a teacher for distillation, with `options.cosub` for co-training, else supervised."""
    base = build_base_criterion(options.bce_loss, options.smoothing)
    if options.cosub:
        return CosubLoss(base, options.bce_loss)
    return SupervisedLoss(base) if teacher is None else DistillationLoss(base, teacher, options)
