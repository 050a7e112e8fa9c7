"""One `train_one_epoch`, one `evaluate`, `fit`, and the `TrainState` that they move."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoints import save_checkpoint
from datasets import BrokenImages
from loaders import EpochLoader, closing_workers, copied_ahead, to_device
from losses import Criterion
from models import load_exactly, set_train_mode, weights_of
from samplers import Batch, random_key, seed_generators
from teachers import CachedTeacher
from utils import (
    Preempted,
    RunError,
    StepLog,
    StopSignals,
    UserError,
    World,
    agree,
    all_reduce_sum,
    append_log,
    barrier,
    gather,
    logger,
    reason,
)


class Schedule(Protocol):
    """A value that follows the number of optimiser updates made so far."""

    name: str

    def step_update(self, num_updates: int) -> None: ...

    @property
    def value(self) -> float:
        """What it is now, for the log."""
        ...

    def state_dict(self) -> dict[str, Any]: ...


class LearningRate:
    """The learning rate as a function of the number of updates: one of timm's schedulers."""

    name = "lr"

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def step_update(self, num_updates: int) -> None:
        self.scheduler.step_update(num_updates)

    @property
    def value(self) -> float:
        return self.scheduler.optimizer.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()


def build_lr_schedule(
    optimizer: torch.optim.Optimizer, updates_per_epoch: int, epochs: int, warmup_epochs: int, **options: Any
) -> LearningRate:
    """Linear warm-up, then `options["sched"]`, stepped at every update.

    Args:
        updates_per_epoch: optimiser updates in an epoch.
        epochs, warmup_epochs: lengths in epochs.
        options: further arguments of `timm.scheduler.create_scheduler_v2`.

    Raises:
        UserError: a name that timm does not know.
    """
    if 0 < epochs <= warmup_epochs:
        logger.warning(
            "--warmup-epochs %d takes all of the %d epochs: the rate never reaches --lr", warmup_epochs, epochs
        )
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            num_epochs=epochs,
            warmup_epochs=warmup_epochs,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
            **options,
        )
    except (ValueError, AssertionError):
        scheduler = None
    if scheduler is None:
        raise UserError(f"--sched {options.get('sched')}: not available; use cosine, step, multistep, tanh or poly")
    return LearningRate(scheduler)


# Those with a fused implementation: one pass over the weights, and in fp16 no wait for the device.
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def build_optimizer(
    model: nn.Module, name: str, *, lr: float, betas: Sequence[float] | None = None, **options: Any
) -> torch.optim.Optimizer:
    """timm's optimiser of that name, without weight decay on biases, norms and what the model exempts.

    Raises:
        UserError: a name that timm does not know, or options that the optimiser does not take.
    """
    if betas:
        options["betas"] = tuple(betas)
    try:
        base = get_optimizer_info(name.lower().rpartition("_")[2])  # adamw, of lookahead_adamw
        if base.opt_class in _FUSED and next(model.parameters()).device.type in ("cpu", "cuda"):
            options.setdefault("fused", True)
        return create_optimizer_v2(model, name, lr=lr, **options)
    except (ValueError, AssertionError, TypeError, LookupError) as error:
        raise UserError(
            f"--opt {name}: timm has no such optimiser, or not with these --opt-* flags ({reason(error)}); "
            f"timm.optim.list_optimizers() lists them"
        ) from None


def select_amp(name: str, device: torch.device) -> torch.dtype | None:
    """Autocast type for `auto`, `bf16`, `fp16` or `off`; None is float32.

    `auto` is bf16 where the hardware computes in it, else fp16 on CUDA, else off (elsewhere bf16 is slower).
    """
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        elif device.type == "cpu" and _cpu_computes_bf16():
            name = "bf16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)


def _cpu_computes_bf16() -> bool:
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(check is not None and check() for check in checks)


def autocast(module: nn.Module, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast for the module's device; None computes in float32."""
    return torch.autocast(next(module.parameters()).device.type, dtype=dtype, enabled=dtype is not None)


@dataclass
class TrainState:
    """All that a training step changes, and how it changes it.

    Attributes:
        model: what the loop calls: the module itself, or DDP around it.
        module: the module itself; its names carry no prefix.
        optimizer: timm's or torch's.
        amp_dtype: autocast type, or None for float32.
        accum_steps: micro-batches in an update.
        clip_grad: largest gradient norm, or None.
        max_skipped_steps: in an epoch, updates whose gradient is not finite are left out up to so many times; above 0,
            each update waits for the device.
        ema: moving average of the module's weights, or None.
        num_updates: optimiser updates made, or left out.
        best_acc1: best top-1 accuracy so far, in per cent; -1 before the first evaluation.
        epoch: the epoch to train next, or to go on with.
        totals: of a resumed epoch, what each rank's `StepLog` had collected.
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
    epoch: int = 0
    totals: list[dict[str, float]] = field(default_factory=list)
    scaler: torch.amp.GradScaler = field(init=False)
    _micro_step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @contextlib.contextmanager
    def forward(self) -> Any:
        """Around a training forward: autocast, and gradients exchanged only by the last micro-batch of an update."""
        last = (self._micro_step + 1) % self.accum_steps == 0
        ddp = isinstance(self.model, DistributedDataParallel)
        with (
            autocast(self.module, self.amp_dtype),
            self.model.no_sync() if ddp and not last else contextlib.nullcontext(),
        ):
            yield

    @property
    def is_within_update(self) -> bool:
        """Whether micro-batches of an update are still to come."""
        return self._micro_step % self.accum_steps != 0

    def step(self, loss: torch.Tensor) -> torch.Tensor:
        """Accumulate the gradient of `loss`; at the last micro-batch clip, update the weights and their average.

        Returns:
            The loss, or NaN if the update was left out.
        """
        self.scaler.scale(loss / self.accum_steps).backward()
        self._micro_step += 1
        if self.is_within_update:
            return loss
        left_out = False
        if self.clip_grad is not None or self.max_skipped_steps:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_grad or math.inf)
            # In fp16 an overflow is the scaler's affair.
            left_out = self.max_skipped_steps > 0 and not self.scaler.is_enabled() and not bool(norm.isfinite())
        if not left_out:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_updates += 1
        if self.ema is not None:
            self.ema.update(self.module, step=self.num_updates)
        return torch.full_like(loss, math.nan) if left_out else loss

    def state_dict(self, schedules: Sequence[Schedule], progress: dict[str, Any] | None = None) -> dict[str, Any]:
        """Everything a resumed run needs, as tensors, numbers and strings.

        Args:
            progress: within an epoch, its `images` so far and the `totals` of each rank's `StepLog`.
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
        }

    def resume(self, checkpoint: dict[str, Any], path: str, updates_per_epoch: int, images_per_update: int = 1) -> None:
        """Go on where a checkpoint was written.

        Args:
            checkpoint: what `state_dict` gave.
            path: the file it is from, for error messages.
            updates_per_epoch: optimiser updates in an epoch of this run.
            images_per_update: images in one of them, over all ranks.

        Raises:
            UserError: if it is for another model or holds weights only.
        """
        weights = weights_of(checkpoint, "--resume", path)
        load_exactly(self.module, weights, path)
        if self.ema is not None:
            if not checkpoint.get("model_ema"):
                logger.warning("%s has no averaged weights; the average starts from its weights", path)
            average = {"model": checkpoint.get("model_ema") or weights}
            load_exactly(self.ema.module, weights_of(average, "--resume", path), path)
        try:
            options = set(self.optimizer.defaults)  # taken before loading, which adds to them
            self.optimizer.load_state_dict(_implemented_as(self.optimizer, checkpoint["optimizer"]))
            if not options <= self.optimizer.param_groups[0].keys():
                raise ValueError("the state of another optimiser")
            self.scaler.load_state_dict(checkpoint["scaler"])
            self.epoch, step = int(checkpoint["epoch"]), int(checkpoint["step"])
            self.best_acc1 = float(checkpoint["best_acc1"])
            progress = checkpoint.get("progress") or {"images": 0, "totals": []}
            images, self.totals = int(progress["images"]), list(progress["totals"])
        except (LookupError, ValueError, RuntimeError, TypeError, AttributeError):
            raise UserError(
                f"--resume {path}: has no training state that fits (optimizer, epoch, ...); start from its weights "
                f"with --finetune, or pass the --opt and --train-scope it was trained with"
            ) from None
        # Counters, not history, drive the schedules: with another batch size an epoch is still an epoch.
        done, again = divmod(images, images_per_update)
        self.num_updates = self.epoch * updates_per_epoch + min(done, updates_per_epoch)
        if self.num_updates != step:
            logger.warning(
                "%s was written with other updates per epoch; this run has %d, and shows %d images of epoch %d again",
                *(path, updates_per_epoch, again, self.epoch),
            )


def _implemented_as(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """The saved state for this optimiser's implementation, fused or not, in place of the one that wrote it."""
    own = {name: optimizer.defaults[name] for name in ("fused", "foreach") if name in optimizer.defaults}
    return saved | {"param_groups": [group | own for group in saved["param_groups"]]}


def prepared(
    loader: Iterable[Batch],
    prepare: Callable[[Batch], Batch],
    device: torch.device,
    *,
    seed: int,
    epoch: int,
    rank: int,
    first_step: int = 0,
) -> Iterator[Batch]:
    """The batches of an epoch as models see them: on the device and mixed, whoever asks.

    Args:
        loader: this rank's batches from `first_step` on.
        prepare: mixes a batch on the device.
        device: where the batches are to be.
        seed, epoch, rank: with the step they seed Mixup and CutMix.
    """
    for step, batch in enumerate(copied_ahead(loader, device), first_step):
        seed_generators(random_key(seed, "mix", epoch, step, rank))
        yield prepare(batch)


def train_one_epoch(
    state: TrainState,
    loader: EpochLoader | Sequence[Batch],
    criterion: Criterion,
    prepare: Callable[[Batch], Batch],
    schedules: Sequence[Schedule],
    log: StepLog,
    *,
    after_update: Callable[[StepLog], None] = lambda log: None,
    seed: int = 0,
    rank: int = 0,
    view_epoch: int | None = None,
) -> dict[str, float]:
    """Train on every batch of `loader` once.

    Args:
        loader: the epoch's batches from `log.first_step` on.
        prepare: takes a batch to the device and mixes it.
        schedules: all are set to the number of updates made before each step.
        log: takes every step's loss, terms and schedule values.
        after_update: is called where the run may be saved and stopped.
        seed, rank: with the epoch and the step they seed Mixup, dropout and stochastic depth.
        view_epoch: the epoch that Mixup is seeded with, if it is another one.

    Returns:
        Mean over steps of all that was logged, and `images_per_second`.

    Raises:
        RunError: on all ranks, if the loss is not finite.
    """
    set_train_mode(state.model)
    view_epoch, first = state.epoch if view_epoch is None else view_epoch, log.first_step
    batches = prepared(loader, prepare, state.device, seed=seed, epoch=view_epoch, rank=rank, first_step=first)
    for step, batch in enumerate(batches, first):
        for schedule in schedules:
            schedule.step_update(state.num_updates)
        seed_generators(random_key(seed, "step", state.epoch, step, rank), state.device)
        with state.forward():
            loss, terms = criterion(state.model(batch.images), batch)
        loss = state.step(loss)
        log.update({"loss": loss} | terms | {schedule.name: schedule.value for schedule in schedules})
        if not state.is_within_update:
            after_update(log)
    return log.close()


def precompute(
    teacher: CachedTeacher,
    loader: EpochLoader,
    prepare: Callable[[Batch], Batch],
    epochs: range,
    autocast: contextlib.AbstractContextManager,
    *,
    seed: int,
    world: World,
    group: int = 1,
    log_interval: int = 50,
) -> None:
    """Ask the teacher about every view of these epochs that its store has no answer to.

    Ranks do not wait for each other: each goes on where it stopped.

    Args:
        group: batches to show the teacher at once.
    """
    open_steps, done, start = len(loader) * len(epochs), 0, time.perf_counter()
    bar = tqdm(total=open_steps, unit="step", disable=not world.is_main or not sys.stderr.isatty())
    for epoch in epochs:
        loader.set_epoch(epoch)
        teacher.cache.open(epoch)
        first = teacher.cache.next_missing() // (loader.images_per_batch // world.size)
        loader.skip(first)
        open_steps -= first
        bar.total = open_steps
        batches = prepared(loader, prepare, world.device, seed=seed, epoch=epoch, rank=world.rank, first_step=first)
        while together := list(itertools.islice(batches, group)):
            with autocast:
                teacher(Batch(*(torch.cat(parts) for parts in zip(*(batch[:3] for batch in together), strict=True))))
            done += len(together)
            bar.update(len(together))
            if bar.disable and (done % log_interval < group or done == open_steps):
                rate = done / (time.perf_counter() - start)
                logger.info(
                    "teacher: epoch %d of %d  %.0f images/s  %.0f s left",
                    *(epoch, epochs.stop, rate * loader.images_per_batch, (open_steps - done) / rate),
                )
    bar.close()


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Iterable[Batch], autocast: contextlib.AbstractContextManager
) -> dict[str, float]:
    """Exact loss and accuracies over all images of all ranks: sums over samples, nothing padded or averaged twice.

    Args:
        model: the bare module, whose forward involves no other process.
        loader: this rank's share of the images.
        autocast: the precision to use.

    Returns:
        `loss` (cross-entropy), `acc1` and `acc5` (per cent; top-k of k classes if there are fewer than 5), `images`.
    """
    model.eval()
    device = next(model.parameters()).device
    totals = torch.zeros(4, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    for batch in copied_ahead(loader, device):
        images, targets = batch[:2]
        with autocast:
            logits = model(images)
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # [B, k]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        totals += torch.stack([loss, hits[:, 0].sum(), hits.sum(), loss.new_full((), len(targets))])
    loss, top1, top5, images = all_reduce_sum(totals).tolist()
    images = max(images, 1)
    return {"loss": loss / images, "acc1": 100 * top1 / images, "acc5": 100 * top5 / images, "images": images}


@torch.no_grad()
def features(
    model: nn.Module, loader: Iterable[Batch], autocast: contextlib.AbstractContextManager
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a timm model hands to its classification layer, float32 [N, D], and the classes [N], both on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    rows, targets = [], []
    for batch in loader:
        targets.append(batch.targets)
        with autocast:
            maps = model.forward_features(to_device(batch, device).images)
            rows.append(model.forward_head(maps, pre_logits=True).float().cpu())
    return torch.cat(rows), torch.cat(targets)


def settle_buckets(model: DistributedDataParallel, example: torch.Tensor) -> None:
    """Let DDP order its gradient buckets now, by a step whose gradient is dropped.

    It would do so after the first step of the process. Sums over three or more ranks depend on that order, so a resumed
    run would differ in bits from one that was never stopped.

    Args:
        example: an input of two images or more (of one, gradients would have another layout in memory).
    """
    set_train_mode(model)
    statistics = [buffer.clone() for buffer in model.buffers()]
    with torch.compiler.set_stance("force_eager"):
        outputs = model(example)
        sum(output.sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), statistics, strict=True):
            buffer.copy_(value)


def modules_of(state: TrainState) -> dict[str, nn.Module]:
    """The model and, if there is one, its average, by their prefix in the log."""
    return {"test_": state.module} | ({"test_ema_": state.ema.module} if state.ema is not None else {})


def evaluate_state(
    state: TrainState, loader: Iterable[Batch], is_over: Callable[[], int] = lambda: 0
) -> dict[str, float]:
    """`evaluate` the model, and its average if there is one, as `test_*` and `test_ema_*` for the log.

    Args:
        is_over: is asked before each batch whether the result is no longer wanted.
    """
    stats = {}
    for prefix, module in modules_of(state).items():
        wanted = itertools.takewhile(lambda _: not is_over(), loader)
        result = evaluate(module, wanted, autocast(module, state.amp_dtype))
        stats |= {prefix + name: value for name, value in result.items() if name != "images"}
    return stats


def describe(stats: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in stats.items())


def _close_epoch(state: TrainState, world: World) -> None:
    """Make sure that the weights are worth keeping and that all ranks hold the same."""
    _require_finite(state)
    if world.size > 1:
        # Each rank gathers batch statistics; those of rank 0 count, as in DDP and in a checkpoint within the epoch.
        for module in modules_of(state).values():
            distribute_bn(module, world.size, reduce=False)


@dataclass
class Saver:
    """What is saved of a run, and when: after each epoch, every so many minutes within one, and when it is to stop.

    All ranks must call it alike; only rank 0 writes.

    Attributes:
        about: what else the checkpoint is to hold: the run's flags and data, as JSON values.
        folder: of the checkpoints and log.txt, or None for nowhere.
        writer: a TensorBoard writer, brought to its files first, or None.
        minutes: between two savings within an epoch, or None.
        broken: images that could not be read so far, or None.
        stop: the signals that end the run.
    """

    state: TrainState
    schedules: Sequence[Schedule]
    world: World
    stop: StopSignals
    about: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    writer: Any = None
    minutes: float | None = None
    broken: BrokenImages | None = None
    saved_at: float = field(default_factory=time.monotonic)

    def check(self, log: StepLog) -> None:
        """Between two updates: save if it is time to; save and stop if any rank has been told to.

        Raises:
            Preempted: on all ranks, after the checkpoint is on the disk.
        """
        due = self.minutes is not None and time.monotonic() - self.saved_at >= 60 * self.minutes
        signal, due = agree(self.stop.received, due and self.world.is_main)
        if signal or due:
            self.save(log)
        if signal:
            barrier()  # a launcher may end all as soon as one has ended
            kept = "nothing is kept without --output-dir"
            if self.folder is not None:
                kept = f"epoch {self.state.epoch}, step {log.step} is kept; go on with --resume auto"
            raise Preempted(int(signal), kept)

    def save(self, log: StepLog | None = None, is_best: bool = False) -> None:
        """Write a checkpoint, within an epoch whose `log` is given, or after one.

        Raises:
            RunError: if a loss or the weights are not finite, or the disk takes no more.
        """
        progress = None
        if log is not None:
            log.report()
            _require_finite(self.state)
            totals = [dict(zip(log.totals, row, strict=True)) for row in gather(list(log.totals.values()))]
            progress = {"images": log.step * log.batch_images, "totals": totals}
        checkpoint = self.state.state_dict(self.schedules, progress) | self.about
        checkpoint["broken_images"] = self.broken.all_found() if self.broken is not None else []
        if self.writer is not None:
            self.writer.flush()
        if self.world.is_main and self.folder is not None:
            save_checkpoint(checkpoint, self.folder, is_best)
        self.saved_at = time.monotonic()

    def end_epoch(self, record: dict[str, Any]) -> None:
        """Log a finished epoch and save."""
        epoch, state = self.state.epoch, self.state
        is_best = record.get("test_acc1", -1.0) > state.best_acc1
        state.best_acc1 = record["test_acc1"] if is_best else state.best_acc1
        state.epoch += 1
        trainable = sum(p.numel() for p in state.module.parameters() if p.requires_grad)
        record = record | {"epoch": epoch, "n_parameters": trainable}
        if self.writer is not None:
            for name, value in record.items():
                self.writer.add_scalar(f"epoch/{name}", value, epoch)
        if self.world.is_main and self.folder is not None:
            append_log(self.folder, record)  # first: a resumed run drops the lines of epochs that it repeats
        self.save(is_best=is_best)


def _require_finite(state: TrainState) -> None:
    # The loss of the last step says nothing of the weights that this step left behind.
    if not all(bool(weight.isfinite().all()) for weight in state.module.parameters()):
        raise RunError(
            f"the weights are not finite in epoch {state.epoch}; try a lower --lr, --clip-grad 1, or --amp off; the "
            f"last checkpoint is intact"
        )


def _position(state: TrainState, loader: EpochLoader, schedules: Sequence[Schedule], view_epoch: int) -> int:
    """Turn loader and schedules to the epoch, or to where in it a resumed run goes on: the first step."""
    loader.set_epoch(view_epoch)
    first = (state.num_updates - state.epoch * loader.updates_per_epoch) * state.accum_steps
    if first:
        loader.skip(first)
        for schedule in schedules:  # as the last step has left them: the epoch may have no step left
            schedule.step_update(state.num_updates - 1)
    return first


def _totals(state: TrainState, rank: int, first: int) -> dict[str, float]:
    """What this rank had logged of a resumed epoch; of a run of fewer processes, what they had on average."""
    totals, state.totals = state.totals, []
    if not first or not totals:
        return {}
    if rank < len(totals):
        return totals[rank]
    return {name: sum(each[name] for each in totals) / len(totals) for name in totals[0]}


def _described(trained: dict[str, float], schedules: Sequence[Schedule]) -> dict[str, float]:
    """An epoch's means for log.txt, with the published names."""
    # Other schedules than the published train_lr go by their own name and with the value that is evaluated.
    values = {schedule.name: schedule.value for schedule in schedules if schedule.name != "lr"}
    plain = ("images_per_second", "skipped_steps")
    named = {name if name in plain else f"train_{name}": v for name, v in trained.items() if name not in values}
    return named | values


def fit(
    state: TrainState,
    train_loader: EpochLoader,
    val_loader: Iterable[Batch],
    criterion: Criterion,
    prepare: Callable[[Batch], Batch],
    schedules: Sequence[Schedule],
    *,
    epochs: int,
    world: World,
    about: dict[str, Any] | None = None,
    output_dir: Path | None = None,
    writer: Any = None,
    seed: int = 0,
    log_interval: int = 50,
    eval_interval: int = 1,
    augmentation_epochs: int | None = None,
    checkpoint_minutes: float | None = None,
) -> None:
    """Train from where `state` is to `epochs`: one line of log.txt, one evaluation and one checkpoint per epoch.

    Args:
        about: what else the checkpoint is to hold: the run's flags and data, as JSON values.
        output_dir: where log.txt and checkpoints go, or None for nowhere; only rank 0 writes.
        writer: a TensorBoard writer on rank 0, or None.
        log_interval: steps between two lines and two checks for a non-finite loss.
        eval_interval: epochs between two evaluations; the last epoch is always evaluated.
        augmentation_epochs: after so many epochs the same views come again.
        checkpoint_minutes: between two checkpoints within an epoch, or None.

    Raises:
        Preempted: on all ranks, if any was sent SIGTERM, SIGINT, SIGUSR1 or SIGUSR2; the run is saved.
        RunError: on all ranks, if the loss or the weights are not finite, or the disk is full.
    """
    start, broken = time.time(), train_loader.broken
    with StopSignals() as stop, closing_workers(train_loader.loader, val_loader):
        saver = Saver(
            *(state, schedules, world, stop),
            about=about or {},
            folder=output_dir,
            writer=writer,
            minutes=checkpoint_minutes,
            broken=broken,
        )
        while state.epoch < epochs:
            view_epoch = state.epoch % (augmentation_epochs or epochs)
            first = _position(state, train_loader, schedules, view_epoch)
            log = StepLog(
                *(state.epoch, len(train_loader), train_loader.images_per_batch, log_interval, writer),
                first_step=first,
                totals=_totals(state, world.rank, first),
                max_skipped=state.max_skipped_steps,
            )
            trained = train_one_epoch(
                *(state, train_loader, criterion, prepare, schedules, log),
                after_update=saver.check,
                seed=seed,
                rank=world.rank,
                view_epoch=view_epoch,
            )
            _close_epoch(state, world)
            record = _described(trained, schedules)
            if (state.epoch + 1) % eval_interval == 0 or state.epoch + 1 == epochs:
                tested = evaluate_state(state, val_loader, lambda: stop.received)
                saver.check(log)  # before anything believes an evaluation that was cut short
                logger.info(describe(tested))
                record |= tested
            if broken is not None:
                record["broken_images"] = broken.report()
            saver.end_epoch(record)
    logger.info("%d epochs in %.0f s, best top-1 %.2f %%", epochs, time.time() - start, state.best_acc1)
