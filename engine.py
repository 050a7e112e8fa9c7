"""Training and evaluation: `fit`, `train_one_epoch`, `evaluate`, and the `TrainState` that they update."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, get_optimizer_info, muon
from timm.optim.kron import Kron
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from checkpoints import (
    check_folder,
    ema_of,
    flags_of,
    no_training_state,
    on_host,
    optimizer_state,
    save_checkpoint,
    start_folder,
    trained_size,
)
from flags import SCHEDULES, spelled
from loaders import DeviceLoader, EpochLoader, to_device
from losses import Criterion
from models import (
    is_compiled,
    load_weights,
    normalization,
    select_attention,
    set_eval_layers,
    set_train_mode,
    trained_keep_rate,
    weights_of,
)
from models_evit import SHRINK_STEPS, KeepRate, evit_blocks
from samplers import Batch, random_key, seed_generators
from sources import BrokenImages
from utils import (
    EpochTable,
    Poll,
    Preempted,
    RunError,
    StepLog,
    StopSignals,
    TensorBoard,
    UserError,
    World,
    agree,
    all_reduce_sum,
    append_log,
    barrier,
    duration,
    gather,
    lock_folder,
    logger,
    peak_memory,
    read_log,
    reason,
    write_whole,
)

SHRINK_START_EPOCH = 10  # default of --shrink-start-epoch
FEW_IMAGES = 1000  # below this many, a model trained from scratch learns little


class Schedule(Protocol):
    """A value that depends on the number of optimizer updates made so far."""

    name: str

    def step_update(self, num_updates: int) -> None: ...

    @property
    def value(self) -> float:
        """Current value, for the log."""
        ...

    @property
    def is_comparable(self) -> bool:
        """True if an accuracy measured now is comparable to those of later epochs."""
        ...

    def state_dict(self) -> dict[str, Any]: ...


class LearningRate:
    """Learning-rate schedule: one of timm's schedulers, driven by the number of updates.

    Args:
        scheduler: steps per update, or per epoch.
        updates_per_epoch: updates per epoch if the scheduler steps per epoch, else None. Such a schedule behaves like
            `scheduler.step(epoch)` after each epoch: epoch 0 keeps the initial rate, epoch n has the value of n - 1.
    """

    name, is_comparable = "lr", True

    def __init__(self, scheduler: Scheduler, updates_per_epoch: int | None = None) -> None:
        self.scheduler, self.updates_per_epoch = scheduler, updates_per_epoch

    def step_update(self, num_updates: int) -> None:
        if self.updates_per_epoch is None:
            self.scheduler.step_update(num_updates)
        elif num_updates >= self.updates_per_epoch:
            self.scheduler.step(num_updates // self.updates_per_epoch - 1)

    @property
    def value(self) -> float:
        """Learning rate of the head; with --layer-decay, lower layers have smaller rates."""
        return max(self.scheduler.optimizer.param_groups, key=lambda group: group.get("lr_scale", 1.0))["lr"]

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()


def build_lr_schedule(
    optimizer: torch.optim.Optimizer,
    updates_per_epoch: int,
    epochs: int,
    warmup_epochs: int,
    on_epochs: bool = False,
    **options: Any,
) -> LearningRate:
    """Build linear warm-up followed by the schedule `options["sched"]`.

    Args:
        updates_per_epoch: optimizer updates per epoch.
        epochs, warmup_epochs: lengths in epochs.
        on_epochs: step after every epoch instead of before every update.
        options: more arguments of `timm.scheduler.create_scheduler_v2`.

    Raises:
        UserError: if timm rejects the arguments.
    """
    if 0 < epochs <= warmup_epochs + on_epochs:
        logger.warning(
            "--warmup-epochs %d is too long for %d epochs: the rate never reaches --lr", warmup_epochs, epochs
        )
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            num_epochs=epochs,
            warmup_epochs=warmup_epochs,
            step_on_epochs=on_epochs,
            updates_per_epoch=updates_per_epoch,
            **options,
        )
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"--sched {options['sched']}: {reason(error)} (lengths in {'epochs' if on_epochs else 'updates'}, an "
            f"epoch has {updates_per_epoch}); change --epochs, --warmup-epochs or --decay-epochs, or use --sched cosine"
        ) from None
    return LearningRate(scheduler, updates_per_epoch if on_epochs else None)


@dataclass(frozen=True)
class ScheduleOptions:
    """Options of the learning-rate and keep-rate schedules, all flags of main.py (see timm's `create_scheduler_v2`)."""

    epochs: int = 300
    sched: str = "cosine"
    sched_on_epochs: bool = False
    warmup_epochs: int = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    decay_epochs: float = 30
    decay_milestones: Sequence[int] | None = None
    decay_rate: float = 0.1
    poly_power: float = 1.0
    lr_noise: Sequence[float] | None = None
    lr_noise_pct: float = 0.67
    lr_noise_std: float = 1.0
    seed: int = 0
    shrink_start_epoch: int | None = None
    shrink_epochs: int | None = None
    pretrained: bool = False  # this and the next: whether the run starts from trained weights
    finetune: str = ""


def build_schedules(state: TrainState, updates_per_epoch: int, options: ScheduleOptions) -> list[Schedule]:
    """Build all schedules: the learning rate and, for an EViT, the keep rate.

    Raises:
        UserError: if timm rejects the learning-rate schedule, or there is nothing to shrink.
    """
    learning_rate = build_lr_schedule(
        state.optimizer,
        updates_per_epoch,
        options.epochs,
        options.warmup_epochs,
        on_epochs=options.sched_on_epochs,
        sched=options.sched,
        warmup_lr=options.warmup_lr,
        min_lr=options.min_lr,
        decay_epochs=options.decay_epochs,
        decay_milestones=sorted(options.decay_milestones or ()),
        decay_rate=options.poly_power if options.sched == "poly" else options.decay_rate,  # one argument in timm
        noise=options.lr_noise,
        noise_pct=options.lr_noise_pct,
        noise_std=options.lr_noise_std,
        noise_seed=options.seed,
    )
    _warn_of_pointless_rates(learning_rate, options)
    if state.ema is not None and not (options.pretrained or options.finetune):
        _warn_of_long_ema(state.ema, options.epochs * updates_per_epoch)
    if not evit_blocks(state.module):
        _refuse_shrinking(options)
        return [learning_rate]
    start = SHRINK_START_EPOCH if options.shrink_start_epoch is None else options.shrink_start_epoch
    models = modules_of(state).values()
    keep_rate = KeepRate(models, updates_per_epoch, start, options.shrink_epochs or 0)
    shrunk = keep_rate.shrunk(options.epochs * updates_per_epoch - 1)
    if shrunk < 1 and keep_rate.value < 1:
        lowest = 1 - shrunk * (1 - keep_rate.value)  # keep_rate.value is still the final rate here
        logger.warning(
            "the run ends at keep rate %.3g, not at --base-keep-rate %.3g: --shrink-start-epoch %d and --shrink-epochs "
            "%d go beyond its %d epochs; lower them",
            lowest,
            keep_rate.value,
            start,
            options.shrink_epochs or 0,
            options.epochs,
        )
    return [learning_rate, keep_rate]


def before_final_keep_rate(checkpoint: Mapping[str, Any]) -> str:
    """Describe that an EViT's checkpoint is from before its final keep rate; "" if it is not, or no EViT."""
    trained, epoch = flags_of(checkpoint), checkpoint.get("epoch")
    rate, start = trained_keep_rate(trained), trained.get("shrink_start_epoch")
    start, length = SHRINK_START_EPOCH if start is None else start, trained.get("shrink_epochs") or 0
    if rate in (None, 1) or not all(isinstance(each, int) for each in (epoch, start, length)) or epoch > start + length:
        return ""
    return f"was saved after {epoch} epochs, before its keep rate reached {rate}; log.txt has the rate of each epoch"


def _refuse_shrinking(options: ScheduleOptions) -> None:
    """Refuse flags of the keep-rate schedule for a model without one; `check_flags` knows only the model's name."""
    for name in ("shrink_start_epoch", "shrink_epochs"):
        if getattr(options, name) is not None:
            raise UserError(
                f"{spelled(name)}: the model has no EViT blocks; use a model such as evit_small_patch16_224"
            )


def _warn_of_pointless_rates(learning_rate: LearningRate, options: ScheduleOptions) -> None:
    """Warn about learning rates that are valid one by one but make no sense together."""
    peak = max(learning_rate.scheduler.base_values)
    if options.min_lr > peak and "min_lr" in SCHEDULES[options.sched]:
        logger.warning(
            "--min-lr %.3g is above the peak learning rate %.3g, so the rate rises to it; lower it",
            options.min_lr,
            peak,
        )
    if options.warmup_epochs and options.warmup_lr > peak:
        logger.warning(
            "--warmup-lr %.3g is above the peak learning rate %.3g, so the warm-up falls; lower it",
            options.warmup_lr,
            peak,
        )
    by_kind = {"step": options.decay_epochs, "multistep": min(options.decay_milestones or [0])}
    first = by_kind.get(options.sched, 0)
    if options.sched_on_epochs and options.sched == "step":
        first += 1  # timm's multistep looks one epoch ahead
    if first >= options.epochs:
        logger.warning(
            "--sched %s: the first decay, at epoch %g, is beyond the %d epochs: the rate never falls",
            options.sched,
            first,
            options.epochs,
        )


def _warn_of_long_ema(ema: ModelEmaV3, updates: int) -> None:
    """Warn if the EMA weights would stay close to the initial weights."""
    share = ema.decay ** (updates - 1)  # the first update copies the weights
    if share > 0.1 and not ema.use_warmup:
        logger.warning(
            "--model-ema-decay %g is too long for %d updates: %.0f %% of the EMA weights are still the first weights; "
            "lower it, or add --model-ema-warmup",
            ema.decay,
            updates,
            100 * share,
        )


# Optimizers with a fused implementation: a single pass over the weights, and no GPU sync under fp16.
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def build_optimizer(
    model: nn.Module, name: str, *, lr: float, betas: Sequence[float] | None = None, **options: Any
) -> torch.optim.Optimizer:
    """Build timm's optimizer of that name, without weight decay on biases, norms and what the model exempts.

    Raises:
        UserError: a name that timm does not know, or options that the optimizer does not take.
    """
    if options.get("layer_decay") is not None and not hasattr(model, "group_matcher"):
        raise UserError(
            f"--layer-decay: {type(model).__name__} does not name its layers (group_matcher); drop the flag"
        )
    try:
        if name.lower().endswith("fusedlamb"):
            logger.info("--opt %s: trains with timm's lamb, the same update rule without APEX", name)
            name = _without_apex(name)
        base = get_optimizer_info(name.lower().rpartition("_")[2])  # adamw, of lookahead_adamw
        if betas:
            options["betas"] = tuple(betas)
            if base.has_betas and len(betas) != base.num_betas:  # it would be noticed in the first step
                raise ValueError(f"--opt-betas needs {base.num_betas} numbers")
        if base.opt_class in _FUSED and next(model.parameters()).device.type in ("cpu", "cuda"):
            options.setdefault("fused", True)
        if base.opt_class is Kron:
            options["deterministic"] = True  # else it draws from torch's generator, which differs between ranks
        if base.opt_class is muon.Muon and next(model.parameters()).device.type == "cpu" and not _cpu_computes_bf16():
            _orthogonalize_in_float32()
        optimizer = create_optimizer_v2(model, name, lr=lr, **options)
    except (ValueError, AssertionError, TypeError, LookupError, ImportError) as error:
        raise UserError(
            f"--opt {name}: timm has no such optimizer, or not with these --opt-* flags ({reason(error)}); "
            f"timm.optim.list_optimizers() lists them"
        ) from None
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"--opt {name}: needs second derivatives, which are not computed; use another, such as adamw")
    return optimizer


def _orthogonalize_in_float32() -> None:
    """Make timm's Muon compute its Newton-Schulz iteration in float32, for the whole process.

    timm uses bf16, which takes a CPU without bf16 instructions about 12 times as long.
    """
    compute = muon.zeropower_via_newtonschulz
    if not isinstance(compute, functools.partial):
        muon.zeropower_via_newtonschulz = functools.partial(compute, dtype=torch.float32)


def _without_apex(name: str) -> str:
    """Drop the "fused" prefix of Apex: `lookahead_fusedlamb` -> `lookahead_lamb`."""
    return f"{name[:-9]}lamb" if name.lower().endswith("fusedlamb") else name


def select_amp(name: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype for `auto`, `bf16`, `fp16` or `off`; None means float32.

    `auto` is bf16 if the hardware of all ranks supports it, else fp16 on CUDA, else off (emulated bf16 is slower than
    float32). All ranks must call it.
    """
    if name == "auto":
        if device.type == "cuda":
            has_bf16, other = torch.cuda.is_bf16_supported(including_emulation=False), "fp16"
        else:
            has_bf16, other = device.type == "cpu" and _cpu_computes_bf16(), "off"
        # Ranks may have different GPUs. fp16 gradients are scaled and bf16 gradients are not: they cannot be summed.
        name = other if any(agree(not has_bf16)) else "bf16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)


def _cpu_computes_bf16() -> bool:
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(check is not None and check() for check in checks)


def autocast(module: nn.Module, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Return an autocast context for the module's device, and select its attention for it; None is float32."""
    if dtype is None:
        return contextlib.nullcontext()  # a disabled autocast would take 20 µs
    select_attention(module, dtype)
    return torch.autocast(next(module.parameters()).device.type, dtype=dtype)


class Ema(ModelEmaV3):
    """timm's EMA of weights and buffers; it lists the tensors only once, since listing takes longer than the update.

    Args:
        model: on its device; its tensors may be updated in place, but not replaced.
        options: more arguments of `ModelEmaV3`.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        both = (module.state_dict(keep_vars=True).values() for module in (self.module, model))
        pairs = list(zip(*both, strict=True))
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._averaged = [[pair[side] for pair in pairs if pair[0].is_floating_point()] for side in (0, 1)]
        types = {tensor.dtype for tensors in self._averaged for tensor in tensors}
        self._is_float32 = types <= {torch.float32}  # timm rounds bf16 EMA weights stochastically

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        if not self.foreach:  # the EMA is on another device
            return super().apply_update_(model, decay)
        for own, theirs in self._copied:
            own.copy_(theirs)
        lerp = torch._foreach_lerp_ if self._is_float32 else self._foreach_lerp_
        lerp(*self._averaged, weight=1.0 - decay)


@dataclass
class TrainState:
    """Everything that a training step updates, and the settings of the update.

    Attributes:
        model: called for training: the module itself, or DDP around it.
        module: the module itself, whose parameter names have no prefix.
        optimizer: timm's or torch's.
        amp_dtype: autocast dtype, or None for float32.
        accum_steps: micro-batches per update.
        clip_grad: maximum gradient norm, or None.
        max_skipped_steps: updates per epoch that may be skipped because of a non-finite loss or gradient; values above
            0 add one GPU sync per update.
        ema: EMA of the module's weights, or None.
        num_updates: optimizer updates made or skipped.
        best_acc1: best top-1 so far in percent (of an EViT: at its final keep rate); -1 if there is none.
        best_epoch: epoch of `best_acc1`; -1 if there is none.
        epoch: epoch to train next, or to resume.
        totals: when resuming within an epoch, the sums that each rank's `StepLog` had collected.
        opt: timm's name of the optimizer, or None if unknown.
        train_mode: if False, layers train in evaluation mode: no dropout, no stochastic depth, fixed batch statistics.
    """

    model: nn.Module
    module: nn.Module
    optimizer: torch.optim.Optimizer
    amp_dtype: torch.dtype | None = None
    accum_steps: int = 1
    clip_grad: float | None = None
    max_skipped_steps: int = 0
    ema: ModelEmaV3 | None = None
    num_updates: int = 0
    best_acc1: float = -1.0
    best_epoch: int = -1
    epoch: int = 0
    totals: list[dict[str, float]] = field(default_factory=list)
    opt: str | None = None
    train_mode: bool = True
    scaler: torch.amp.GradScaler = field(init=False)
    _micro_step: int = field(default=0, init=False)
    # Only with max_skipped_steps: floating-point buffers before the update, and the number of its non-finite losses.
    _buffers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list, init=False)
    _bad_losses: torch.Tensor | float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @contextlib.contextmanager
    def forward(self) -> Any:
        """Wrap a training forward: autocast, and no gradient all-reduce except in the last micro-batch of an update."""
        if self.max_skipped_steps and not self.is_within_update:
            self._buffers = [(each, each.clone()) for each in self.module.buffers() if each.is_floating_point()]
        last = (self._micro_step + 1) % self.accum_steps == 0
        ddp = isinstance(self.model, DistributedDataParallel)
        with (
            autocast(self.module, self.amp_dtype),
            self.model.no_sync() if ddp and not last else contextlib.nullcontext(),
        ):
            yield

    @property
    def is_within_update(self) -> bool:
        """True if the current update still needs more micro-batches."""
        return self._micro_step % self.accum_steps != 0

    def step(self, loss: torch.Tensor) -> torch.Tensor:
        """Backpropagate `loss`; after the last micro-batch clip the gradient, update weights and EMA weights.

        Returns:
            The loss, or NaN if the update was skipped.
        """
        share = loss / self.accum_steps if self.accum_steps > 1 else loss  # a division takes 10 µs
        self.scaler.scale(share).backward()
        self._micro_step += 1
        if self.max_skipped_steps:
            self._bad_losses = self._bad_losses + (~loss.detach().isfinite()).float()
        if self.is_within_update:
            return loss
        is_skipped = False
        if self.clip_grad is not None or self.max_skipped_steps:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_grad or math.inf)
            is_skipped = self.max_skipped_steps > 0 and self._is_bad(norm)
        if is_skipped:
            self._restore_buffers()
        else:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_updates += 1
        if self.ema is not None:
            self.ema.update(self.module, step=self.num_updates)
        return torch.full_like(loss, math.nan) if is_skipped else loss

    def _is_bad(self, norm: torch.Tensor) -> bool:
        """Return True on all ranks if a loss of this update on any rank, or the norm of the gradient, is not finite."""
        bad, self._bad_losses = self._bad_losses, 0.0
        if not self.scaler.is_enabled():  # in fp16 the scaler handles gradients that overflow
            bad = bad + (~norm.isfinite()).float()
        return bool(all_reduce_sum(bad) > 0)

    @torch.no_grad()
    def _restore_buffers(self) -> None:
        """Undo what this update has done to batch statistics."""
        for buffer, value in self._buffers:
            buffer.copy_(value)

    def start_at(self, epoch: int, updates_per_epoch: int) -> None:
        """Start at this epoch as if all earlier epochs had been trained."""
        self.epoch, self.num_updates = epoch, epoch * updates_per_epoch

    def state_dict(self, schedules: Sequence[Schedule], progress: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return everything that a resumed run needs, as tensors, numbers and strings.

        Args:
            progress: within an epoch, the number of `images` so far and the `totals` of each rank's `StepLog`.
        """
        return {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": next((s.state_dict() for s in schedules if s.name == "lr"), {}),
            "scaler": self.scaler.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema is not None else None,
            "epoch": self.epoch,
            "step": self.num_updates,
            "progress": progress,
            "best_acc1": self.best_acc1,
            "best_epoch": self.best_epoch,
        }

    def resume(self, checkpoint: dict[str, Any], path: str, updates_per_epoch: int, images_per_update: int = 1) -> None:
        """Resume from a checkpoint.

        Args:
            checkpoint: a result of `state_dict`.
            path: its file, for error messages.
            updates_per_epoch: optimizer updates per epoch of this run.
            images_per_update: images per update over all ranks.

        Raises:
            UserError: if it is for another model or another optimizer, or holds weights only.
        """
        weights, size = weights_of(checkpoint, "--resume", path), trained_size(checkpoint)
        load_weights(self.module, weights, "--resume", path, size=size)
        if self.ema is not None:
            average = ema_of(checkpoint, "--resume", path)
            if average is None:
                logger.warning("%s has no EMA weights; they start from its weights", path)
            load_weights(self.ema.module, average or weights, "--resume", path, size=size)
        try:
            self._load_optimizer(checkpoint, path)
            if checkpoint["scaler"]:  # empty if the earlier run did not use fp16
                self.scaler.load_state_dict(checkpoint["scaler"])
            self.epoch, step = int(checkpoint["epoch"]), int(checkpoint["step"])
            self.best_acc1 = float(checkpoint["best_acc1"])
            last = self.epoch - 1 if self.best_acc1 >= 0 else -1  # older versions do not store best_epoch
            self.best_epoch = int(checkpoint.get("best_epoch", last))
            progress = checkpoint.get("progress") or {"images": 0, "totals": []}
            images, self.totals = int(progress["images"]), list(progress["totals"])
        except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise no_training_state(path, error) from None
        # Schedules depend on counters alone, so an epoch stays an epoch when the batch size changes.
        done, again = divmod(images, images_per_update)
        self.num_updates = self.epoch * updates_per_epoch + min(done, updates_per_epoch)
        if self.num_updates != step:
            logger.warning(
                "%s was written with other updates per epoch; this run has %d, and repeats %d images of epoch %d",
                path,
                updates_per_epoch,
                again,
                self.epoch,
            )

    def forget_best(self, changed: Sequence[str], path: str) -> None:
        """Forget the best accuracy of a resumed checkpoint if these changes make it incomparable, with a warning."""
        if changed and self.best_acc1 >= 0:
            what = "%s: its best top-1, %.2f %%, is not comparable (%s changed); the best of this run starts anew"
            logger.warning(what, path, self.best_acc1, ", ".join(changed))
            self.best_acc1, self.best_epoch = -1.0, -1

    def _load_optimizer(self, checkpoint: Mapping[str, Any], path: str) -> None:
        """Load the optimizer's state of each weight; options such as the weight decay stay those of this run.

        Raises:
            UserError: if the state is of another optimizer.
            LookupError, ValueError, TypeError, AttributeError: if the state does not fit.
        """
        saved, written_by = checkpoint["optimizer"], flags_of(checkpoint).get("opt")
        if written_by and self.opt and _optimizer_of(written_by) != _optimizer_of(self.opt):
            raise UserError(
                f"--resume {path}: was trained with --opt {written_by}, whose state --opt {self.opt} cannot use; pass "
                f"--opt {written_by}, or start from its weights with --finetune"
            )
        own = [{name: group[name] for name in group.keys() - _COUNTED} for group in self.optimizer.param_groups]
        for name in _FLAGS.keys() & {*(own[0].keys() & saved["param_groups"][0].keys()), "lr_scale"}:
            then, now = (any(group.get(name) for group in groups) for groups in (saved["param_groups"], own))
            if then != now:
                raise UserError(
                    f"{_FLAGS[name]}: --resume {path} was trained {'with' if then else 'without'} it, so the state of "
                    f"the optimizer does not fit; pass the value it was trained with, or start from its weights with "
                    f"--finetune"
                )
        saved = optimizer_state(self.optimizer, checkpoint, path)
        groups = list(zip(saved["param_groups"], own, strict=True))
        if not (written_by and self.opt) and any(_fixed(group) != _fixed(options) for group, options in groups):
            raise ValueError("the state of another optimizer")
        # set before loading: what is loaded depends on whether the optimizer is fused
        self.optimizer.load_state_dict(saved | {"param_groups": [group | options for group, options in groups]})


@dataclass(frozen=True)
class OptimizerOptions:
    """Options of the weight update. The fields are flags of main.py."""

    opt: str = "adamw"  # timm's name of the optimizer
    opt_eps: float = 1e-8
    opt_betas: Sequence[float] | None = None
    momentum: float = 0.9
    weight_decay: float = 0.05
    lr: float = 5e-4  # peak learning rate before scaling
    layer_decay: float | None = None  # factor of the rate for each layer below the head, as in timm
    lr_scaling: str = "linear"  # multiply by (effective batch / 512), by its root ("sqrt"), or by 1 ("none")
    accum_steps: int = 1  # this and the next two: see `TrainState`
    clip_grad: float | None = None
    max_skipped_steps: int = 0
    model_ema: bool = True  # this and the next three: see `timm.utils.ModelEmaV3`
    model_ema_decay: float = 0.99996
    model_ema_warmup: bool = False
    model_ema_force_cpu: bool = False
    compile: bool = False  # compile the model
    train_mode: bool = True  # see `TrainState`

    def scaled_lr(self, effective_batch: int) -> float:
        """Return the peak learning rate for this many images per update."""
        scale = effective_batch / 512
        return self.lr * {"linear": scale, "sqrt": scale**0.5, "none": 1}[self.lr_scaling]


def build_state(
    model: nn.Module,
    trained: nn.Module,
    options: OptimizerOptions,
    images_per_batch: int,
    input_shape: Sequence[int],
    amp_dtype: torch.dtype | None,
    world: World,
) -> TrainState:
    """Build the optimizer, mixed precision, EMA, compilation and DDP around a model.

    Args:
        model: on its device.
        trained: the part of the model to train, or the whole model.
        images_per_batch: batch size over all ranks.
        input_shape: shape of one input of `trained`.
        amp_dtype: autocast dtype, or None for float32.

    Raises:
        UserError: if the optimizer cannot be built, or if the model cannot train on a batch of one image.
    """
    effective_batch = images_per_batch * options.accum_steps
    lr = options.scaled_lr(effective_batch)
    logger.info("effective batch %d images, peak learning rate %.3g", effective_batch, lr)
    settings = {"weight_decay": options.weight_decay, "momentum": options.momentum, "eps": options.opt_eps}
    settings["layer_decay"] = options.layer_decay
    optimizer = build_optimizer(model, options.opt, lr=lr, betas=options.opt_betas, **settings)
    ema = None
    if options.model_ema:
        device = torch.device("cpu") if options.model_ema_force_cpu else None
        ema = Ema(model, decay=options.model_ema_decay, use_warmup=options.model_ema_warmup, device=device)
    if options.compile:
        # torch recompiles an EViT at each step of its keep rate, for training and for evaluation. By default it
        # silently stops compiling after 8 times.
        torch._dynamo.config.cache_size_limit = 4 * (SHRINK_STEPS + 1)
        # Otherwise a changed keep rate becomes a symbolic float, which checkpointing and DDP do not support.
        torch._dynamo.config.specialize_float = True
        if getattr(model, "grad_checkpointing", False):
            torch._dynamo.config.optimize_ddp = False  # older versions of torch support it only without checkpointing
        model.compile(dynamic=False)  # in place, so that parameter names keep no prefix
    if images_per_batch == world.size:
        check_one_image(trained, torch.zeros(1, *input_shape, device=world.device))
    wrapped = trained
    if world.size > 1:
        devices = [world.device] if world.device.type == "cuda" else None
        wrapped = DistributedDataParallel(trained, device_ids=devices, gradient_as_bucket_view=True)
        settle_buckets(wrapped, torch.zeros(2, *input_shape, device=world.device))
    return TrainState(
        wrapped,
        model,
        optimizer,
        amp_dtype=amp_dtype,
        accum_steps=options.accum_steps,
        clip_grad=options.clip_grad,
        max_skipped_steps=options.max_skipped_steps,
        ema=ema,
        opt=options.opt,
        train_mode=options.train_mode,
    )


# Options of an optimizer's parameter groups: counters; flags of main.py; set by schedule or implementation.
_COUNTED = {"params", "param_names", "step", "lookahead_step"}
_FLAGS = {
    "weight_decay": "--weight-decay",
    "momentum": "--momentum",
    "eps": "--opt-eps",
    "lr_scale": "--layer-decay",  # splits the weights into more groups
    **dict.fromkeys(("betas", "beta1", "betas_1d"), "--opt-betas"),
}
_FREE = {*_COUNTED, *_FLAGS, "lr", "initial_lr", "max_lr_snapshot", "fused", "foreach"}


def _fixed(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group that identify the kind of optimizer."""
    return {name: value for name, value in group.items() if name not in _FREE}


def _optimizer_of(name: str) -> tuple[bool, str]:
    """Return whether an optimizer is wrapped in Lookahead, and timm's name of the inner one (`nesterov` is `sgd`)."""
    *prefix, base = _without_apex(name.lower()).split("_")
    has_lookahead = prefix[:1] == ["lookahead"]
    try:
        return has_lookahead, get_optimizer_info(base).name
    except ValueError:  # a name of another timm version
        return has_lookahead, base


def train_one_epoch(
    state: TrainState,
    loader: EpochLoader | Sequence[Batch],
    criterion: Criterion,
    schedules: Sequence[Schedule],
    log: StepLog,
    *,
    after_update: Callable[[StepLog], None] = lambda log: None,
    seed: int = 0,
    rank: int = 0,
) -> dict[str, float]:
    """Train on every batch of `loader` once.

    Args:
        loader: the epoch's batches on the device, starting at `log.first_step`.
        schedules: set to the number of updates before each step.
        log: receives the loss, loss terms and schedule values of each step.
        after_update: called where the run may be saved and stopped.
        seed, rank: seed dropout and stochastic depth, together with the epoch and the step.

    Returns:
        Mean over steps of all logged values, and `images_per_second`.

    Raises:
        RunError: on all ranks, if the loss is not finite.
    """
    set_train_mode(state.model)
    if not state.train_mode:
        set_eval_layers(state.module)
    device = state.device
    for step, batch in enumerate(loader, log.first_step):
        for schedule in schedules:
            schedule.step_update(state.num_updates)
        seed_generators(random_key(seed, "step", state.epoch, step, rank), device)
        with state.forward():
            loss, terms = criterion(state.model(batch.images), batch)
        num_updates, loss = state.num_updates, state.step(loss)
        values = {"loss": loss} | terms | {schedule.name: schedule.value for schedule in schedules}
        log.update(values, num_updates)
        if not state.is_within_update:
            after_update(log)
    return log.close()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    autocast: contextlib.AbstractContextManager,
    is_over: Callable[[], int] = lambda: 0,
) -> dict[str, float]:
    """Compute the exact loss and accuracies over all images of all ranks (sums over samples, no padding).

    Args:
        model: the module itself, not DDP.
        loader: this rank's share of the images, on the device.
        autocast: context that sets the precision.
        is_over: called before each batch; a true value ends the evaluation early.

    Returns:
        `loss` (cross-entropy), `acc1` and `acc5` (percent; with k < 5 classes top-k), `images`.

    Raises:
        RunError: on all ranks, if logits are not finite, or if a `DeviceLoader` yields too few images.
    """
    model.eval()
    device, size = next(model.parameters()).device, 0
    totals = torch.zeros(5, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    for batch in itertools.takewhile(lambda _: not is_over(), loader):
        batch = to_device(batch, device)  # EMA weights may be on the CPU
        size = max(size, len(batch.images))
        with autocast:
            logits = _logits(model, batch.images, size)
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1])).indices == batch.targets[:, None]  # [B, k]
        loss = F.cross_entropy(logits, batch.targets, reduction="sum")
        bad = (~logits.isfinite()).any(dim=1)
        totals += torch.stack([loss, hits[:, 0].sum(), hits.sum(), bad.sum(), loss.new_full((), len(batch.targets))])
    # On the CPU, by gloo: NCCL would wait half an hour for a rank that has ended.
    loss, top1, top5, bad, images = all_reduce_sum(totals.cpu()).tolist()
    if bad:
        raise RunError(f"the logits of {bad:.0f} of {images:.0f} validation images are not finite; try --amp off")
    if isinstance(loader, DeviceLoader):
        _compare_number(int(images), loader.num_images, is_over)
    n = max(images, 1)
    return {"loss": loss / n, "acc1": 100 * top1 / n, "acc5": 100 * top5 / n, "images": int(images)}


def _logits(model: nn.Module, images: torch.Tensor, size: int) -> torch.Tensor:
    """Compute logits [B, C]. For a compiled model, pad smaller batches to `size`, which avoids recompilation."""
    if len(images) == size or not is_compiled(model):
        return model(images)
    filling = images.new_zeros(size - len(images), *images.shape[1:])
    return model(torch.cat([images, filling]))[: len(images)]


def _compare_number(images: int, promised: int, is_over: Callable[[], int]) -> None:
    """Compare the images evaluated on all ranks with the number that the data state (0 if unknown).

    Raises:
        RunError: on all ranks, if images are missing and no rank has ended early.
    """
    if not sys.stderr.isatty():  # on a terminal the epoch table says enough
        logger.info("evaluated %d images", images)
    if images < max(promised, 1) and not any(agree(is_over())):
        raise RunError(
            f"only {images} of {promised or 'the'} validation images were evaluated: some cannot be read, or the "
            f"data state too many; fix the data"
        )
    if images > promised > 0:
        logger.warning("the validation data state %d images but have %d; all are evaluated", promised, images)


def settle_buckets(model: DistributedDataParallel, example: torch.Tensor) -> None:
    """Make DDP fix the order of its gradient buckets now, with a step whose gradient is dropped.

    DDP otherwise does so after the first step of a process. With three or more ranks, sums depend on that order, so a
    resumed run would not be bitwise identical to an uninterrupted one.

    Args:
        example: input batch of at least two images (with one, gradients have another memory layout).
    """
    with _buffers_kept(model), torch.compiler.set_stance("force_eager"):
        outputs = model(example)
        sum(output.sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    model.zero_grad(set_to_none=True)


def check_one_image(model: nn.Module, example: torch.Tensor, flag: str = "--batch-size") -> None:
    """Check before training that a model can train on one image at a time.

    Args:
        example: input batch of one image.
        flag: the flag that set the batch size, for the error message.

    Raises:
        UserError: if batch normalization would get a single value per channel.
    """
    try:
        with torch.no_grad(), _buffers_kept(model), torch.compiler.set_stance("force_eager"):
            model(example)
    except ValueError as error:
        raise UserError(
            f"{flag} 1: batch normalization cannot train on it ({reason(error)}); use {flag} 2 or more, or a larger "
            f"--input-size"
        ) from None


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Switch to training mode for a forward pass and restore the batch statistics afterwards."""
    set_train_mode(model)
    statistics = [buffer.clone() for buffer in model.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), statistics, strict=True):
            buffer.copy_(value)


def modules_of(state: TrainState) -> dict[str, nn.Module]:
    """Return the model and, if there is one, its EMA, by their prefix in the log."""
    return {"test_": state.module} | ({"test_ema_": state.ema.module} if state.ema is not None else {})


def evaluate_all(
    modules: Iterable[tuple[str, nn.Module]],
    loader: Iterable[Batch],
    amp_dtype: torch.dtype | None,
    is_over: Callable[[], int] = lambda: 0,
) -> Iterator[dict[str, float]]:
    """Evaluate one module after the other; yield results with prefixed names, such as `test_acc1`.

    Args:
        modules: (prefix, module) pairs, see `modules_of`.
        is_over: see `evaluate`.
    """
    home = None  # the device that the precision is for
    for prefix, module in modules:
        device = next(module.parameters()).device
        home = home or device
        amp = amp_dtype if device == home or amp_dtype is None else select_amp("auto", device)  # EMA on the CPU
        stats = evaluate(module, loader, autocast(module, amp), is_over)
        yield {prefix + name: value for name, value in stats.items()}


def describe(stats: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.{12 if name.endswith('images') else 4}g}" for name, value in stats.items())


def _close_epoch(state: TrainState, world: World) -> None:
    """Check that the weights are finite, and give all ranks the batch statistics of rank 0."""
    _require_finite(state)
    if world.size > 1:
        # Each rank has its own batch statistics. Rank 0's count, as in DDP and in checkpoints within the epoch.
        for module in modules_of(state).values():
            distribute_bn(module, world.size, reduce=False)


@dataclass
class Output:
    """The output folder, TensorBoard writer and lock of a run; only rank 0 writes.

    Attributes:
        folder: for checkpoints and log.txt; None to write nothing.
        writer: TensorBoard writer on rank 0, or None.
        about: more entries of checkpoints: the run's flags and data, as JSON values.
        lock: open lock file that keeps other runs out of the folder, on rank 0, or None.
    """

    folder: Path | None = None
    writer: TensorBoard | None = None
    about: dict[str, Any] = field(default_factory=dict)
    lock: TextIO | None = None

    def close(self) -> None:
        """Close the files, which unlocks the folder for other runs."""
        for file in (self.writer, self.lock):
            if file is not None:
                file.close()


def open_output(
    args: argparse.Namespace,
    state: TrainState,
    about: dict[str, Any],
    facts: dict[str, Any],
    world: World,
    continues: bool = True,
) -> Output:
    """Open the output folder and, on rank 0, a TensorBoard writer.

    Args:
        facts: more values for config.json.
        continues: whether a resumed run counts steps as before; otherwise, no earlier points are dropped.

    Raises:
        UserError: if the folder cannot be written, is in use, or holds another run that would be lost.
    """
    if not args.output_dir:
        return Output(about=about)
    folder = Path(args.output_dir)
    check_folder(folder, args.resume, args.overwrite)
    barrier()  # all ranks must have checked before one writes
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not world.is_main:
            return Output(folder, about=about)
        lock = lock_folder(folder)
        start_folder(folder, args.resume, state.epoch, state.best_acc1)
        config = vars(args) | {"class_names": about["class_names"]} | facts
        write_whole(folder / "config.json", (json.dumps(config, indent=1, default=str) + "\n").encode())
        step = state.num_updates * state.accum_steps
        writer = TensorBoard(folder / "tensorboard", step if continues else None, config, args.log_wandb)
        if not state.totals:  # viewers drop values from `next_step` on, and the last epoch's are at that step
            for record in read_log(folder)[-1:]:
                writer.add_epoch(record, step)
        return Output(folder, writer, about, lock)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written ({error.strerror}); name another folder") from None


@dataclass
class Saver:
    """Writer of checkpoints: before and after each evaluation, every few minutes, and on a stop signal.

    All ranks must call the methods in the same order. Rank 0 writes in a thread, so that no rank waits for the disk. A
    checkpoint is on disk once `finish` has returned; the next checkpoint and `close` call it.

    Attributes:
        stop: stop signals received so far.
        output: where to save.
        minutes: time between two checkpoints within an epoch, or None.
        broken: unreadable images found so far, or None.
    """

    state: TrainState
    schedules: Sequence[Schedule]
    world: World
    stop: StopSignals
    output: Output = field(default_factory=Output)
    minutes: float | None = None
    broken: BrokenImages | None = None
    saved_at: float = field(default_factory=time.monotonic)
    poll: Poll = field(default_factory=Poll)
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), init=False)
    _writing: Future | None = field(default=None, init=False)

    def check(self, log: StepLog) -> None:
        """Save if it is time; save and stop if any rank got a stop signal. Call it between two updates.

        With several ranks the action comes one update later, so that no rank waits for the others.

        Raises:
            Preempted: on all ranks, after the checkpoint is on disk.
        """
        due = self.world.is_main and self.minutes is not None and time.monotonic() - self.saved_at >= 60 * self.minutes
        if due:
            self.saved_at = time.monotonic()  # otherwise the next call would save again
        self._act(log, *self.poll(self.stop.received, due))

    def check_now(self, log: StepLog) -> None:
        """Save and stop if any rank got a stop signal; waits for all ranks."""
        self._act(log, *agree(self.stop.received), 0.0)

    def _act(self, log: StepLog, signal: float, due: float) -> None:
        if signal:
            self.stop.answer()
        if signal or due:
            self.save(log)
        if signal:
            self.finish()
            barrier()  # some launchers kill all ranks once one has exited
            raise Preempted(int(signal), self._kept(log))

    def _kept(self, log: StepLog) -> str:
        if self.output.folder is None:
            return "nothing is saved without --output-dir"
        return f"epoch {self.state.epoch}, step {log.step} is saved; resume with --resume auto"

    def rescue(self, log: StepLog) -> str:
        """Save the last update while the loader is stuck, and return a message that says what was saved.

        Other ranks may be stuck too, so the logged means are those of this rank.
        """
        if not self.world.is_main:
            return "only rank 0 saves"
        if self.world.size == 1:
            log.report()
        elif not _has_finished(self.world.device):
            return "not saved: the GPU waits for another process"
        if self.state.is_within_update:  # the statistics of batch normalization have changed, the weights have not
            return "not saved: within an update of several batches"
        _require_finite(self.state)
        broken = self.broken.found_here() if self.broken is not None else []
        self._write({"images": log.step * log.batch_images, "totals": [log.totals]}, broken)
        self.finish()
        return self._kept(log)

    def save(self, log: StepLog | None = None, is_best: bool = False) -> None:
        """Start to write a checkpoint: with `log` within an epoch, without it after an epoch.

        Raises:
            RunError: if a loss or a weight is not finite, or if writing the previous checkpoint failed.
        """
        progress = None
        if log is not None:
            log.report()
            _require_finite(self.state)
            totals = [dict(zip(log.totals, row, strict=True)) for row in gather(list(log.totals.values()))]
            progress = {"images": log.step * log.batch_images, "totals": totals}
        broken = self.broken.all_found() if self.broken is not None else []
        self._write(progress, broken, is_best)
        self.saved_at = time.monotonic()

    def _write(self, progress: dict[str, Any] | None, broken: Sequence[int], is_best: bool = False) -> None:
        checkpoint = self.state.state_dict(self.schedules, progress) | self.output.about
        checkpoint["broken_images"] = list(broken)
        if self.output.writer is not None:
            self.output.writer.flush()
        self.finish()
        if self.world.is_main and self.output.folder is not None:
            self._writing = self._writer.submit(self._write_file, on_host(checkpoint), self.output.folder, is_best)

    def _write_file(self, checkpoint: Mapping[str, Any], folder: Path, is_best: bool) -> None:
        with self.stop.saving():
            save_checkpoint(checkpoint, folder, is_best)

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            RunError: if writing it failed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Call `finish` and end the thread."""
        self._writer.shutdown()
        self.finish()

    def end_epoch(self, record: dict[str, float]) -> None:
        """Log a finished epoch and save; `best.pth` is only written at the final keep rate."""
        epoch, state = self.state.epoch, self.state
        is_comparable = all(schedule.is_comparable for schedule in self.schedules)
        is_best = is_comparable and record.get("test_acc1", -1.0) > state.best_acc1
        if is_best:
            state.best_acc1, state.best_epoch = record["test_acc1"], epoch
        state.epoch += 1
        if self.output.writer is not None:
            self.output.writer.add_epoch(record, state.num_updates * state.accum_steps)
        if self.world.is_main and self.output.folder is not None:
            append_log(self.output.folder, record)  # first: resuming drops lines of repeated epochs
        self.save(is_best=is_best)


def _has_finished(device: torch.device, seconds: float = 10.0) -> bool:
    """Return True if the device finishes its work in this time; on a GPU it may wait for another rank's gradients."""
    if device.type != "cuda":
        return True
    event, end = torch.cuda.Event(), time.monotonic() + seconds
    event.record(torch.cuda.current_stream(device))
    while not event.query() and time.monotonic() < end:
        time.sleep(0.05)
    return event.query()


def _require_finite(state: TrainState) -> None:
    # The last loss was computed before the last update, so check the weights and batch statistics themselves.
    if not all(bool(value.isfinite().all()) for value in state.module.state_dict().values()):
        raise RunError(
            f"the weights are not finite in epoch {state.epoch}; try a lower --lr, --clip-grad 1, or --amp off"
        )


def _position(state: TrainState, loader: EpochLoader, schedules: Sequence[Schedule], view_epoch: int) -> int:
    """Move loader and schedules to the start of the epoch, or to the resumed step; return the first step."""
    first = (state.num_updates - state.epoch * loader.updates_per_epoch) * state.accum_steps
    loader.set_epoch(view_epoch, first)
    if first:
        for schedule in schedules:  # the last step has set these values; the epoch may have no step left
            schedule.step_update(state.num_updates - 1)
    return first


def _totals(state: TrainState, rank: int, first: int) -> dict[str, float]:
    """Return the sums that this rank had logged in a resumed epoch (if ranks were added, the mean)."""
    totals, state.totals = state.totals, []
    if not first or not totals:
        return {}
    if rank < len(totals):
        return totals[rank]
    return {name: sum(each[name] for each in totals) / len(totals) for name in totals[0]}


def _described(state: TrainState, trained: dict[str, float], schedules: Sequence[Schedule]) -> dict[str, float]:
    """Return an epoch's record for log.txt, with the names of the original implementation."""
    # Only train_lr has an original name. Other schedules keep their own name and the value used in the evaluation.
    values = {schedule.name: schedule.value for schedule in schedules if schedule.name != "lr"}
    plain = ("images_per_second", "skipped_steps")
    named = {name if name in plain else f"train_{name}": v for name, v in trained.items() if name not in values}
    trainable = sum(p.numel() for p in state.module.parameters() if p.requires_grad)
    return {"epoch": state.epoch, "n_parameters": trainable} | named | values


@dataclass(frozen=True)
class RunOptions:
    """Options of a run's length, logging, evaluation and saving. The fields are flags of main.py."""

    epochs: int = 300
    seed: int = 0
    log_interval: int = 50  # steps between log lines, and between checks for a non-finite loss
    eval_interval: int = 1  # epochs between two evaluations; the last epoch is always evaluated
    augmentation_epochs: int | None = None  # repeat the views after this many epochs; None: never
    early_stop: int | None = None  # stop after this many epochs without a better accuracy; None: never
    checkpoint_minutes: float | None = None  # time between two checkpoints within an epoch
    stop_timeout: float = 60  # seconds to wait for the current update after a stop signal

    @property
    def view_epochs(self) -> int:
        """Number of epochs with different views."""
        return min(self.epochs, self.augmentation_epochs or self.epochs)


def fit(
    state: TrainState,
    train_loader: EpochLoader,
    val_loader: DeviceLoader,
    criterion: Criterion,
    schedules: Sequence[Schedule],
    options: RunOptions,
    world: World,
    output: Output,
) -> None:
    """Train from the epoch of `state` to the last one; after each epoch evaluate, write a line of log.txt and save.

    Raises:
        Preempted: on all ranks, after any of them got one of the `StopSignals`; the run is saved.
        RunError: on all ranks, if the loss or the weights are not finite, or the disk is full.
    """
    start, broken = time.time(), train_loader.broken
    done = state.num_updates / train_loader.updates_per_epoch
    table = EpochTable(options.epochs, done, _columns(state))
    with (
        StopSignals(options.stop_timeout) as stop,
        contextlib.closing(train_loader),
        contextlib.closing(val_loader),
        contextlib.closing(Saver(state, schedules, world, stop, output, options.checkpoint_minutes, broken)) as saver,
    ):
        while state.epoch < options.epochs and not _is_early_end(state, options):
            first = _position(state, train_loader, schedules, state.epoch % options.view_epochs)
            log = _step_log(state, train_loader, options, output.writer, first, _totals(state, world.rank, first))
            seeds = {"seed": options.seed, "rank": world.rank}
            batches = stop.interruptible(
                _with_pictures(train_loader, state, output), functools.partial(saver.rescue, log)
            )
            trained = train_one_epoch(state, batches, criterion, schedules, log, after_update=saver.check, **seeds)
            _close_epoch(state, world)
            record = _described(state, trained, schedules) | {"train_images": train_loader.num_positions}
            if (state.epoch + 1) % options.eval_interval == 0 or state.epoch + 1 == options.epochs:
                saver.save(log)  # because the evaluation can fail
                tested = _test(state, val_loader, stop)
                saver.check_now(log)  # before anything uses the results of an aborted evaluation
                record |= tested
            if broken is not None:
                record["broken_images"] = broken.report()
            saver.end_epoch(record)
            table.add(record, state.best_acc1)
    if state.best_acc1 < 0:
        best = "no epoch at the final keep rate, so no best.pth"
    else:
        best = f"best top-1 {state.best_acc1:.2f} %"
    logger.info("%d epochs in %.0f s, %s", state.epoch, time.time() - start, best)


def rehearse(
    state: TrainState,
    train_loader: EpochLoader,
    val_loader: DeviceLoader,
    criterion: Criterion,
    schedules: Sequence[Schedule],
    options: RunOptions,
    world: World,
) -> None:
    """Make two updates, evaluate one batch, load some more, save nothing, and log how long the run would take."""
    state.start_at(state.epoch, train_loader.updates_per_epoch)  # a resumed epoch may have no updates left
    first, ends = _position(state, train_loader, schedules, state.epoch % options.view_epochs), [time.perf_counter()]
    log = _step_log(state, train_loader, options, None, first, {})

    def note_time(log: StepLog) -> None:
        log.report()  # syncs with the device
        ends.append(time.perf_counter())

    with contextlib.closing(train_loader), contextlib.closing(val_loader):
        seeds, batches = {"seed": options.seed, "rank": world.rank}, iter(train_loader)
        few = itertools.islice(batches, 2 * state.accum_steps)
        train_one_epoch(state, few, criterion, schedules, log, after_update=note_time, **seeds)
        update = ends[-1] - ends[-2]
        if train_loader.loader.num_workers:  # the batches of these updates were loaded meanwhile or before
            update = _with_loading(update, state.accum_steps * _loading_seconds(batches, train_loader), world.device)
        evaluation = _evaluation_seconds(state, val_loader, world)
    images, epoch = train_loader.images_per_update, update * train_loader.updates_per_epoch
    total = epoch * options.epochs + evaluation * math.ceil(options.epochs / options.eval_interval)
    logger.info(
        "dry run: an update takes %.2f s, %.0f images/s; the first took %.1f s",
        update,
        images / update,
        ends[1] - ends[0],
    )
    logger.info(
        "an epoch would take about %s, an evaluation %s, all %d epochs %s; peak memory so far %.1f GiB",
        duration(epoch),
        duration(evaluation),
        options.epochs,
        duration(total),
        peak_memory(world.device) / 2**30,
    )


def _loading_seconds(batches: Iterator[Batch], loader: DeviceLoader) -> float:
    """Return the seconds in which a batch is loaded while nothing else is done; 0 if too few batches are left."""
    workers = loader.loader.num_workers
    for _ in itertools.islice(batches, workers * (loader.loader.prefetch_factor or 0)):  # these are ready
        pass
    start = time.perf_counter()
    loaded = sum(1 for _ in itertools.islice(batches, max(1, workers)))
    return (time.perf_counter() - start) / loaded if loaded else 0.0


def _with_loading(computing: float, loading: float, device: torch.device) -> float:
    """Return the seconds per batch if workers load the next ones meanwhile: on a CPU, they need its cores as well."""
    return computing + loading if device.type == "cpu" else max(computing, loading)


def _evaluation_seconds(state: TrainState, loader: DeviceLoader, world: World) -> float:
    """Estimate how long an evaluation takes, from one batch; its second pass is timed, after any compilation."""
    batches = iter(loader)
    first = list(itertools.islice(batches, 1))
    for _ in range(2):
        start = time.perf_counter()
        for _ in evaluate_all(modules_of(state).items(), first, state.amp_dtype):
            pass
        computing = time.perf_counter() - start
    loading = _loading_seconds(batches, loader)
    seconds = _with_loading(computing, loading, world.device) if loader.loader.num_workers else computing + loading
    return seconds * loader.num_images / (max(1, sum(len(batch.targets) for batch in first)) * world.size)


def _columns(state: TrainState) -> list[str]:
    """Return the optional columns of the epoch table; top-5 of five classes is always 100 %."""
    is_worth_it = {"top-5": getattr(state.module, "num_classes", 6) > 5, "EMA": state.ema is not None}
    return [name for name, is_worth in is_worth_it.items() if is_worth]


def _step_log(
    state: TrainState,
    loader: EpochLoader,
    options: RunOptions,
    writer: TensorBoard | None,
    first_step: int,
    totals: Mapping[str, float],
) -> StepLog:
    return StepLog(
        state.epoch,
        len(loader),
        loader.images_per_batch,
        options.log_interval,
        writer,
        first_step=first_step,
        totals=totals,
        max_skipped=state.max_skipped_steps,
    )


def _with_pictures(loader: EpochLoader, state: TrainState, output: Output) -> Iterator[Batch]:
    """Yield the same batches; write a few images of a run's first batch to TensorBoard, as the model sees them."""
    is_first = state.num_updates == 0 and output.writer is not None
    for batch in loader:
        if is_first and batch.images.ndim == 4:
            mean, std = (torch.tensor(values)[:, None, None] for values in normalization(state.module))
            views = batch.images[:8].float().cpu() * std + mean
            output.writer.add_images("training images", views.clamp(0, 1), 0)
        is_first = False
        yield batch


def _is_early_end(state: TrainState, options: RunOptions) -> bool:
    """Return True if --early-stop ends the run: no better top-1 in the last epochs."""
    if options.early_stop is None or state.best_epoch < 0 or state.totals:
        return False
    evaluated = state.epoch // options.eval_interval * options.eval_interval - 1  # the last such epoch
    waited = evaluated - state.best_epoch
    if waited >= options.early_stop:
        logger.info("ended early: no better top-1 in %d epochs (--early-stop)", waited)
    return waited >= options.early_stop


def _test(state: TrainState, loader: Iterable[Batch], stop: StopSignals) -> dict[str, float]:
    """Evaluate the model and its EMA; return losses and accuracies for log.txt."""
    modules, stats = modules_of(state).items(), {}
    for each in evaluate_all(modules, loader, state.amp_dtype, lambda: stop.received):
        stats |= {name: value for name, value in each.items() if not name.endswith("_images")}
    return stats
