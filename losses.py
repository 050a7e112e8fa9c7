"""The base criterion and the distillation terms.

Every criterion here is called as `criterion(outputs, batch)` and returns `(loss, terms)`: a scalar to differentiate and
a dictionary of detached scalars to log.
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
    """What is minimized. The fields are flags of main.py; see `BinaryCrossEntropy` and `DistillationLoss`."""

    bce_loss: bool = False
    smoothing: float = 0.1
    distillation_type: str = "none"
    distillation_alpha: float = 0.5
    distillation_tau: float = 1.0
    distillation_scale: str = "batchmean"
    cosub: bool = False  # see `CosubLoss`


class BinaryCrossEntropy(nn.Module):
    """Cross-entropy of C independent yes/no questions, as in "ResNet strikes back" (Wightman et al. 2021, section 3).

    Every class that is in the image at all, one or the two that Mixup put there, is a positive. Smoothing is applied
    after that, so that it cannot turn all classes into positives.

    Args:
        smoothing: label smoothing s; a target t in {0, 1} becomes t (1 - s) + s / C.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """logits [B, C]; targets [B] class indices or [B, C] probabilities; mean over B and C."""
        num_classes = logits.shape[-1]
        if targets.ndim == 1:
            targets = F.one_hot(targets, num_classes)
        present = (targets > 0).float()  # not in the logits' type: bfloat16 has no 0.9 + 0.1 / C
        smoothed = present * (1 - self.smoothing) + self.smoothing / num_classes
        return F.binary_cross_entropy_with_logits(logits.float(), smoothed)


def build_base_criterion(bce: bool, smoothing: float) -> nn.Module:
    """Loss of logits [B, C] against class indices [B] or probabilities [B, C].

    `nn.CrossEntropyLoss` smooths both alike: with Mixup, (1 - s) (λ y₁ + (1 - λ) y₂) + s / C is what the original
    implementation gets by smoothing y₁ and y₂ first.
    """
    return BinaryCrossEntropy(smoothing) if bce else nn.CrossEntropyLoss(label_smoothing=smoothing)


class SupervisedLoss:
    """The base criterion alone: the labels are all there is to learn from."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base

    def __call__(self, outputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.base(outputs.float(), batch.targets), {}  # not in autocast's type, as in the original


def soft_distillation(student: torch.Tensor, teacher: torch.Tensor, tau: float, scale: str) -> torch.Tensor:
    """τ² KL(softmax(teacher / τ) ‖ softmax(student / τ)), DeiT equation 2 (Hinton et al. 2015).

    Args:
        student, teacher: logits [B, C].
        tau: temperature τ.
        scale: "batchmean" divides the sum by B; "legacy" by B · C, as the original implementation does.
    """
    divergence = F.kl_div(
        F.log_softmax(student.float() / tau, dim=1),
        F.log_softmax(teacher.float() / tau, dim=1),
        reduction="sum",
        log_target=True,
    )
    return divergence * tau**2 / (student.numel() if scale == "legacy" else len(student))


def hard_distillation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Cross-entropy against the teacher's decision, DeiT equation 3; logits [B, C]. NaN if a teacher logit is."""
    loss = F.cross_entropy(student.float(), teacher.argmax(dim=1))  # the arg-max of NaN is a class like any other
    return loss.masked_fill(teacher.isnan().any(), float("nan"))


class DistillationLoss:
    """(1 - α) base(class head, labels) + α distillation(distillation head, teacher), DeiT section 4.

    A model with one head learns both with it, as in Hinton et al. 2015 (arXiv 1503.02531, section 2).

    The logged terms are the two losses before weighting, the teacher's top-1 accuracy (with Mixup, against the label
    with the larger share) and the share of images on which the student's distillation head agrees with the teacher.

    Args:
        base: criterion of the class head.
        teacher: maps a batch to logits [B, C]: a model, or its cached predictions.
        options: type, weight α, temperature τ and scale of the distillation.

    Raises:
        ValueError: if the type is neither "soft" nor "hard".
    """

    def __init__(self, base: nn.Module, teacher: Callable[[Batch], torch.Tensor], options: LossOptions) -> None:
        if options.distillation_type not in ("soft", "hard"):
            raise ValueError(f"distillation_type is 'soft' or 'hard', not {options.distillation_type!r}")
        self.base, self.teacher, self.options = base, teacher, options

    def distill(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The distillation term of logits [B, C]."""
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

    ¼ [base(z₁, y) + base(z₂, y) + H(z₁, p(z₂)) + H(z₂, p(z₁))], without gradients through the predictions p. The batch
    holds its images twice, and stochastic depth makes the logits z₁ and z₂ those of two submodels.

    Args:
        base: criterion of the labels.
        bce: H is binary cross-entropy and p the sigmoid, as in the original implementation, which takes it for the
            labels as well; else cross-entropy and the softmax, as the paper's abstract has it. Neither is smoothed.
    """

    def __init__(self, base: nn.Module, bce: bool) -> None:
        self.base, self.bce = base, bce

    def follow(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """H(student, p(teacher)) of logits [B, C]."""
        student, teacher = student.float(), teacher.detach().float()
        if self.bce:
            return F.binary_cross_entropy_with_logits(student, teacher.sigmoid())
        return F.cross_entropy(student, teacher.softmax(dim=1))

    def __call__(self, outputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """outputs [2B, C]; the batch has B targets. The logged terms are the means over both submodels."""
        first, second = outputs.float().chunk(2)
        base_loss = (self.base(first, batch.targets) + self.base(second, batch.targets)) / 2
        cosub_loss = (self.follow(first, second) + self.follow(second, first)) / 2
        terms = {"loss_base": base_loss.detach(), "loss_cosub": cosub_loss.detach()}
        return (base_loss + cosub_loss) / 2, terms


def build_criterion(
    options: LossOptions, teacher: Callable[[Batch], torch.Tensor] | None = None
) -> SupervisedLoss | DistillationLoss | CosubLoss:
    """The base criterion, distilling from the teacher if there is one, or co-training two submodels."""
    base = build_base_criterion(options.bce_loss, options.smoothing)
    if options.cosub:
        return CosubLoss(base, options.bce_loss)
    return SupervisedLoss(base) if teacher is None else DistillationLoss(base, teacher, options)
