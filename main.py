"""Train and evaluate data-efficient image transformers: `python main.py --help`."""

from __future__ import annotations

import os
import signal

# Importing torch takes seconds. A stop signal during the imports exits with the same status as a later one.
if __name__ == "__main__":
    for _number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        if signal.getsignal(_number) != signal.SIG_IGN:  # ignored under nohup
            signal.signal(_number, lambda *_: os._exit(75))

import argparse
import contextlib
import dataclasses
import functools
import itertools
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch

import checkpoints
import datasets
import engine
import loaders
import losses
import models
import sources
import teachers
import utils
from augment import Normalization, ViewOptions
from flags import (
    FREE_ON_RESUME,
    TRAINED,
    check_flags,
    fill,
    measured_otherwise,
    parse_args,
    parse_command,
    shaping,
    spelled,
    without_effect,
)
from samplers import Batch
from sources import Data
from utils import Preempted, UserError, World, escaped, logger


def settle_resume(args: argparse.Namespace, world: World) -> argparse.Namespace:
    """Return the flags with `--resume` replaced by an existing file: `auto` and damaged checkpoints are resolved."""
    if not args.resume or args.eval:
        return args
    path = checkpoints.find_checkpoint(args.resume, args.output_dir, world.is_main)
    return argparse.Namespace(**{**vars(args), "resume": path})


# -- the parts of a run ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """The parts of a run that all modes share.

    Attributes:
        train, val: training and validation data.
        model: on its device, with its initial weights.
        views, loading: options of the augmentation and of the loaders.
        val_loader: loader of the validation images.
        amp_dtype: autocast dtype, or None for float32.
    """

    args: argparse.Namespace
    world: World
    train: Data
    val: Data
    model: torch.nn.Module
    views: ViewOptions
    loading: loaders.LoaderOptions
    val_loader: loaders.DeviceLoader
    amp_dtype: torch.dtype | None

    @functools.cached_property
    def teacher_weights(self) -> str | None:
        """Name of the teacher's weights: "timm", or the SHA-256 of their file, read once; None without a teacher."""
        path = self.args.teacher_path
        if self.args.teacher_pretrained:
            return "timm"
        return checkpoints.file_hash(path, "--teacher-path") if path else None

    @property
    def normalization(self) -> Normalization:
        """Mean and standard deviation of the model's input images."""
        return models.normalization(self.model)

    @property
    def autocast(self) -> contextlib.AbstractContextManager:
        """Autocast context of the run's precision."""
        return engine.autocast(self.model, self.amp_dtype)

    @property
    def view_epochs(self) -> range:
        """Epochs with different views that the run trains on or precomputes."""
        return self.args.precompute_epochs or range(fill(engine.RunOptions, self.args).view_epochs)


def build_run(args: argparse.Namespace, world: World) -> Run:
    """Read the data, compare its classes with those of the files named by flags, and build the model.

    Raises:
        UserError: see `datasets.build_sources`, `compare_file` and `models.build_model`.
    """
    train, val = datasets.build_sources(fill(datasets.DataOptions, args), world.local_rank, eval_only=args.eval)
    for name in ("resume" if args.resume else "finetune", "teacher_path"):
        if getattr(args, name):
            val = compare_file(args, name, train, val)
    distilled = args.distillation_type != "none" and not args.distill_on_class_token
    replaced = {"finetune": "", "pretrained": False} if args.resume else {}  # that is where the resumed run started
    options = dataclasses.replace(fill(models.ModelOptions, args), **replaced)
    model = models.build_model(options, val.num_classes, distilled, eval_only=args.eval)
    model = models.place(model, world.device)
    views, loading = fill(ViewOptions, args), fill(loaders.LoaderOptions, args)
    val_loader = loaders.build_val_loader(val, views, models.normalization(model), loading, world)
    return Run(args, world, train, val, model, views, loading, val_loader, engine.select_amp(args.amp, world.device))


def compare_file(args: argparse.Namespace, name: str, train: Data, val: Data) -> Data:
    """Compare the classes of a flag's file with those of the data; return the validation data.

    With --eval, data that have only some of the file's classes, or in another order, are renumbered to its indices.

    Raises:
        UserError: if a class index means different classes in file and data.
    """
    path = getattr(args, name)
    about, what = checkpoints.read_checkpoint(path, spelled(name), mmap=True), f"{spelled(name)} {path}"
    same_classes = name != "teacher_path" and checkpoints.class_names_of(about) == val.class_names
    if args.eval or (same_classes and about.get("validation") != sources.describe_images(val)):
        sources.check_held_out(train, about, args.val_fraction, what)
    if args.eval:
        val = sources.with_classes(val, checkpoints.class_names_of(about), what)
    parts = {"val": val} if args.eval else {"train": train, "val": val}
    checkpoints.compare_classes(about, parts, what, args.allow_class_mismatch)
    return val


def training_batches(run: Run) -> tuple[loaders.EpochLoader, torch.nn.Module]:
    """Build the training batches and return them with the trained module: the model, or its head on cached features."""
    mixup = fill(loaders.MixupOptions, run.args)
    if run.args.cache_features:
        source, head = cache_features(run)
        return loaders.build_epoch_loader(source, torch.clone, mixup, run.loading, run.world), head
    loader = loaders.build_train_loader(run.train, run.views, run.normalization, mixup, run.loading, run.world)
    return loader, run.model


def cache_features(run: Run) -> tuple[sources.Source, torch.nn.Linear]:
    """Return the classification layer and, as a source, its inputs for all training images.

    Raises:
        UserError: if the weights of a resumed run do not fit the model.
    """
    if path := run.args.resume:  # the features are those of its weights
        checkpoint = checkpoints.read_checkpoint(path, "--resume", mmap=True)
        weights, size = checkpoints.weights_of(checkpoint, "--resume", path), checkpoints.trained_size(checkpoint)
        models.load_weights(run.model, weights, "--resume", path, size=size)
    head = models.linear_head(run.model, run.args.model)
    return loaders.feature_source(run.train, run.model, run.views, run.loading, run.world, run.autocast), head


def find_teacher(run: Run, loader: loaders.EpochLoader) -> Callable[[Batch], torch.Tensor] | None:
    """Build the teacher that the flags name: None, a model, or its cached predictions.

    Raises:
        UserError: if the teacher cannot be built, or if the cache belongs to another run.
    """
    args, world, options = run.args, run.world, fill(teachers.TeacherOptions, run.args)
    if args.distillation_type == "none":
        return None
    if not args.teacher_cache:
        return teachers.build_teacher(options, run.train.num_classes, run.normalization, world.device)
    if loader.is_stream:
        raise UserError(f"--teacher-cache: {args.data_set} is a stream, whose views have no index; drop the flag")
    teacher = teachers.build_cached_teacher(
        options, run.train.num_classes, loader, run.view_epochs, run.normalization, world
    )
    flags, weights = shaping(args, "views", "teacher"), run.teacher_weights
    fingerprint = teachers.fingerprint(flags, run.train, loader, run.normalization, weights, run.amp_dtype, world)
    folder, may_differ = Path(args.teacher_cache), args.allow_class_mismatch
    with utils.main_process_first(world.local_rank):
        teachers.check_fingerprint(folder, fingerprint, run.train, may_differ, writes=not args.dry_run)
    return (args.dry_run and teacher.live) or teacher


def describe_run(run: Run, loader: loaders.EpochLoader) -> dict[str, Any]:
    """Describe the run for its checkpoints: flags, other settings that results depend on, and class names."""
    args, device = run.args, run.world.device
    soft = "cached" if args.teacher_cache else "live"  # those in the cache are rounded, and only the largest
    name = f"{device.type} ({torch.get_num_threads()})"
    return {
        "args": vars(args),
        "run": sources.describe_images(run.train)
        | {
            "processes": run.world.size,
            "data-loader workers": loader.loader.num_workers if loader.is_stream else None,
            "augmentation": loader.augmentation["where"],
            "device (threads)": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
            "precision": str(run.amp_dtype),
            "teacher": run.teacher_weights,
            "soft predictions": soft if args.distillation_type == "soft" else None,
            "versions": {name: version(name) for name in ("torch", "timm", "torchvision", "pillow")},
        },
        "validation": sources.describe_images(run.val),
        "class_names": list(run.train.class_names),
        "class_samples": {"train": list(run.train.class_samples), "val": list(run.val.class_samples)},
    }


def announce(run: Run, loader: loaders.EpochLoader, macs: int | None) -> None:
    """Log what is about to be trained: model, data, device, length and output folder."""
    args, device, (height, width) = run.args, run.world.device, run.views.input_size
    weights = list(run.model.parameters())
    trained = sum(parameter.numel() for parameter in weights if parameter.requires_grad) / 1e6
    size, cost = sum(map(torch.numel, weights)) / 1e6, f", {macs / 1e9:.3g} GMACs" if macs else ""
    part = "" if trained == size else f" ({trained:.2f} M trained)"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    precision = str(run.amp_dtype or torch.float32).removeprefix("torch.")
    images = f"{len(run.train)} training and {len(run.val)} validation images"
    updates = f"{loader.updates_per_epoch} updates of {loader.images_per_update} images"
    logger.info("model     %s: %.2f M parameters%s%s at %d x %d px", args.model, size, part, cost, height, width)
    data = " ".join(filter(None, (args.data_set, args.data_path)))
    logger.info("data      %s: %s, %d classes", data, images, run.train.num_classes)
    logger.info("device    %d x %s (%s), %s", run.world.size, device.type, name, precision)
    utils.suggest_allocator(device)
    logger.info("training  %d epochs of %s", args.epochs, updates)
    logger.info("output    %s", args.output_dir or "none")
    if len(run.train) < engine.FEW_IMAGES and not (args.pretrained or args.finetune or args.resume):
        few = "%d images are too few to train %s from scratch; start from --pretrained, or --finetune FILE"
        logger.warning(few, len(run.train), args.model)


def resume(run: Run, state: engine.TrainState, loader: loaders.EpochLoader, about: dict[str, Any]) -> bool:
    """Resume from the checkpoint `--resume`; warn if the run is no longer bitwise identical.

    Args:
        about: result of `describe_run` for this run.

    Returns:
        Whether an epoch has as many steps as before, so that curves over steps continue.

    Raises:
        UserError: if the checkpoint is of another model or optimizer, or holds weights only.
    """
    args, is_first = run.args, run.world.local_rank == 0  # first process of its machine, which verifies the checksums
    checkpoint = checkpoints.read_checkpoint(args.resume, "--resume", mmap=not is_first)
    checkpoint = checkpoints.as_ours(checkpoint, state.module, state.optimizer, args.resume, loader.updates_per_epoch)
    compared = vars(parse_args([])).keys() - FREE_ON_RESUME  # a submitit job has more flags in `args`
    changes = checkpoints.changes(checkpoint, about, compared)
    trained = checkpoints.flags_of(checkpoint)
    if "model" in trained:
        models.refuse_another_model(vars(args), trained, f"--resume {args.resume}")
    progress = checkpoint.get("progress")
    images = progress.get("images") if isinstance(progress, dict) else None
    epoch = loader.updates_per_epoch * loader.images_per_update
    if loader.is_stream and isinstance(images, int) and 0 < images < epoch:
        changes.append("a stream has no index, so the epoch begins again")
        checkpoint["progress"] = None
    elif loader.is_stream and args.data_set.startswith("tfds/"):
        changes.append("tfds/ starts its shuffling again")
    state.resume(checkpoint, args.resume, loader.updates_per_epoch, loader.images_per_update)
    state.forget_best(measured_otherwise(args, trained) + checkpoints.changed_images(checkpoint, about), args.resume)
    files = {name: about["run"][name] for name in ("images", "labels", "file_names")}
    if loader.broken is not None and not checkpoints.changes(checkpoint, {"args": {}, "run": files}, ()):
        loader.broken.restore(checkpoint.get("broken_images") or [])
    if changes:
        logger.warning("%s: the run continues but is no longer bitwise identical: %s", args.resume, "; ".join(changes))
    done = state.num_updates - state.epoch * loader.updates_per_epoch
    logger.info("resuming epoch %d after %d of its %d updates", state.epoch, done, loader.updates_per_epoch)
    furthest, least = utils.agree(state.num_updates, -state.num_updates)
    if furthest != -least:
        raise UserError(f"--resume {args.resume}: the processes read different files; name one that all of them see")
    same_steps = trained.get("accum_steps", args.accum_steps) == args.accum_steps
    return same_steps and state.num_updates == checkpoint["step"]


# -- the modes of a run ------------------------------------------------------------------------------------------------


def evaluate_only(run: Run) -> None:
    """Evaluate the model's weights and, if the checkpoint has them, its EMA weights (`--eval`)."""
    if run.args.compile:
        run.model.compile(dynamic=False)
    path, weights = run.args.resume, {"test_": None}
    if file := path or run.args.finetune:
        checkpoint = checkpoints.read_checkpoint(file, "--resume" if path else "--finetune", mmap=not path)
        for change in checkpoints.changes(checkpoint, {"args": vars(run.args), "run": {}}, TRAINED):
            logger.info("evaluated with another setting than in training: %s", change)
        if before := engine.before_final_keep_rate(checkpoint):
            logger.warning("%s: %s", file, before)
    if path:
        weights = {"test_": checkpoints.weights_of(checkpoint, "--resume", path)}
        average = checkpoints.ema_of(checkpoint, "--resume", path)
        weights |= {"test_ema_": average} if average else {}
        size = checkpoints.trained_size(checkpoint) or run.views.input_size

    def loaded(state_dict: dict[str, torch.Tensor] | None) -> torch.nn.Module:
        if state_dict is not None:
            models.load_weights(run.model, state_dict, "--resume", path, models.EVALUATION, size)
        return run.model

    modules = ((prefix, loaded(state_dict)) for prefix, state_dict in weights.items())
    for stats in engine.evaluate_all(modules, run.val_loader, run.amp_dtype):
        logger.info(engine.describe(stats))


def precompute_only(run: Run, loader: loaders.EpochLoader, teacher: teachers.CachedTeacher) -> None:
    """Cache the teacher's predictions for all views without one, and train nothing (`--precompute-teacher`).

    Ranks do not wait for each other. Each resumes where it stopped.
    """
    group = max(1, (run.args.precompute_batch_size or 0) // run.args.batch_size)
    progress = utils.Progress("teacher", loader.num_positions * len(run.view_epochs), "image")
    for epoch in run.view_epochs:
        teacher.cache.open(epoch)
        first = teacher.cache.next_missing() // run.args.batch_size
        loader.set_epoch(epoch, first)
        progress.skip(first * loader.images_per_batch)
        batches = iter(loader)
        while together := list(itertools.islice(batches, group)):
            with run.autocast:
                teacher(Batch(*(torch.cat(parts) for parts in zip(*(batch[:3] for batch in together), strict=True))))
            progress.advance(len(together) * loader.images_per_batch)
    progress.close()


def train(run: Run, loader: loaders.EpochLoader, trained: torch.nn.Module, criterion: losses.Criterion) -> None:
    """Train to the last epoch, from the start or from `--resume`."""
    args, world = run.args, run.world
    shape = (3, *run.views.input_size) if trained is run.model else (trained.in_features,)
    options, macs = fill(engine.OptimizerOptions, args), models.count_macs(run.model, run.views.input_size)
    state = engine.build_state(run.model, trained, options, loader.images_per_batch, shape, run.amp_dtype, world)
    schedules = engine.build_schedules(state, loader.updates_per_epoch, fill(engine.ScheduleOptions, args))
    about = describe_run(run, loader)
    state.start_at(args.start_epoch, loader.updates_per_epoch)
    continues = not args.resume or resume(run, state, loader, about)
    announce(run, loader, macs)
    options = fill(engine.RunOptions, args)
    if args.dry_run:
        if args.output_dir:
            checkpoints.check_folder(Path(args.output_dir), args.resume, args.overwrite)
        return engine.rehearse(state, loader, run.val_loader, criterion, schedules, options, world)
    facts = {f"final_{each.name}": each.final for each in schedules if hasattr(each, "final")}
    facts |= {"images_per_epoch": loader.num_positions}
    output = engine.open_output(args, state, about, facts, world, continues)
    engine.fit(state, loader, run.val_loader, criterion, schedules, options, world, output)
    output.close()


def main(args: argparse.Namespace) -> None:
    """Run one command, from flags to the last checkpoint. Flags are read, never changed.

    Raises:
        UserError: before training starts, if flags or files are wrong.
        RunError: during training, on all ranks.
    """
    check_flags(args)
    utils.set_up_kernels(args.deterministic)  # first, because NCCL reads these settings when processes connect
    world = utils.init_distributed(args.device)
    utils.set_up_logging(world)
    args = settle_resume(args, world)
    run = build_run(args, world)
    for sentence in without_effect(args):
        logger.warning(sentence)
    if args.compile and utils.varies_if_compiled():
        logger.warning("--compile --deterministic: %s", utils.VARIES)
    if args.eval:
        evaluate_only(run)
        return utils.shut_down_distributed()
    loader, trained = training_batches(run)
    teacher = find_teacher(run, loader)
    if args.precompute_teacher:
        precompute_only(run, loader, teacher)
    else:
        train(run, loader, trained, losses.build_criterion(fill(losses.LossOptions, args), teacher))
    utils.shut_down_distributed()


def cli(argv: Sequence[str] | None = None) -> None:
    """Run `main` and exit with a status.

    0: done; 1: an error during the run; 2: wrong flags or files; 75: stopped by a signal, after saving.
    """
    args = None
    utils.open_standard_error()
    try:
        with utils.EndingSignals(timeout=10):
            args = parse_command(argv)
            main(args)
    except utils.Interrupted as stop:
        _end(f"main.py: {stop}", 75)
    except Exception as error:
        rank = f"rank {os.environ.get('RANK', '')}: " if utils.is_distributed() else ""
        if isinstance(error, UserError):
            _end(f"main.py: error: {error}", 2)
        if isinstance(error, Preempted):
            _end(f"main.py: {rank}{error}", 75)
        why = utils.known_cause(error)
        if not why and not utils.is_distributed():
            raise
        if not why:
            sys.stderr.write("".join(f"{escaped(line)}\n" for line in traceback.format_exc().splitlines()))
        why = why or f"{type(error).__name__}: {utils.last_line(error)}"
        _end(f"main.py: {rank}run ended: {why}{_what_is_kept(args)}", 1)


def _what_is_kept(args: argparse.Namespace | None) -> str:
    """Describe what an ended run has saved, as the end of a message; '' if this process does not know."""
    if args is None or args.eval or args.precompute_teacher or os.environ.get("RANK", "0") != "0":
        return ""
    if args.output_dir and checkpoints.holds_checkpoint(Path(args.output_dir)):
        return "; the last checkpoint is intact"
    return "; no checkpoint has been written"


def _end(message: str, status: int) -> NoReturn:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(escaped(message), file=sys.stderr, flush=True)
    utils.kill_workers()
    # At exit, a failed rank must not wait for the others, nor they for it.
    if utils.is_distributed():
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    cli()
