"""Train and evaluate data-efficient image transformers: `python main.py --help`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

import augment
import checkpoints
import datasets
import engine
import loaders
import losses
import models
import models_evit
import teachers
import utils
from flags import check_flags, get_parser
from samplers import random_key, seed_generators
from utils import Preempted, RunError, UserError, World, logger


def settle_resume(args: argparse.Namespace, world: World) -> argparse.Namespace:
    """The flags with the file that `--resume` means: what `auto` finds, or the one before a damaged one."""
    if not args.resume or args.eval:
        return args
    path = checkpoints.find_checkpoint(args.resume, args.output_dir, world.is_main)
    replaced = {"finetune": "", "pretrained": False} if path else {}
    return argparse.Namespace(**{**vars(args), **replaced, "resume": path})


def build_sources(args: argparse.Namespace, world: World) -> tuple[Any, Any]:
    """Training and validation data, cut to `--train-fraction` and kept in memory if they are small."""
    train, val = datasets.build_sources(
        args.data_set,
        args.data_path,
        inat_category=args.inat_category,
        train_split=args.train_split,
        val_split=args.val_split,
        num_classes=args.num_classes,
        local_rank=world.local_rank,
    )
    if args.skip_broken_images:
        if not isinstance(train, datasets.Source):
            raise UserError(f"--skip-broken-images: {args.data_set} is a stream, which skips them by itself; drop it")
        train = dataclasses.replace(train, broken=datasets.BrokenImages(train.images, args.skip_broken_images))
    if not args.eval:
        train = datasets.keep_in_memory(datasets.take_fraction(train, args.train_fraction), args.ram_cache)
    return train, datasets.keep_in_memory(val, args.ram_cache)


def build_model(args: argparse.Namespace, num_classes: int, device: torch.device) -> torch.nn.Module:
    """The model with its first weights, on the device."""
    seed_generators(random_key(args.seed, "weights"))
    tokens = {"keep_rate": args.base_keep_rate, "drop_loc": args.drop_loc, "fuse_token": args.fuse_token}
    model = models.build_model(
        args.model,
        num_classes=num_classes,
        input_size=_size(args),
        pretrained=args.pretrained,
        drop=args.drop,
        drop_path=args.drop_path,
        patch_size=args.patch_size,
        model_kwargs={key: value for key, value in tokens.items() if value is not None} | args.model_kwargs,
        distilled=args.distillation_type != "none" and not args.distill_on_class_token,
        grad_checkpointing=args.grad_checkpointing,
    )
    if args.finetune:
        models.load_finetune_weights(model, args.finetune)
    models.freeze(model, args.train_scope)
    return _place(model, device)


def _place(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    # Convolutions with weights in channels-last order run several times faster on CPUs and on GPUs in mixed precision.
    return model.to(device, memory_format=torch.channels_last)


def _size(args: argparse.Namespace) -> tuple[int, int]:
    return args.input_size[0], args.input_size[-1]


def _loader_options(args: argparse.Namespace, world: World) -> dict[str, Any]:
    workers = min(10, max(1, utils.available_cpus() // world.local_size))
    return {
        "batch_size": args.batch_size,
        "num_workers": workers if args.num_workers is None else args.num_workers,
        "pin_memory": args.pin_mem and world.device.type == "cuda",
        "world": world,
    }


def _augments_on_device(args: argparse.Namespace, source: Any, device: torch.device) -> bool:
    """Whether this source's images become views in batches on the device.

    Raises:
        UserError: if they are to, and cannot.
    """
    if args.augment == "auto":
        return device.type == "cuda" and loaders.fits_frames(source) and augment.is_supported(args.aa)
    if args.augment == "device" and not loaders.fits_frames(source):
        raise UserError(
            "--augment device: the images are neither in memory nor packed, or of too different sizes; raise "
            "--ram-cache, pack them with python -m tools.pack_dataset, or drop the flag"
        )
    return args.augment == "device"


def _compiled(args: argparse.Namespace, view: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    if args.compile and device.type == "cuda":  # a CPU is faster without: it leaves out what a sample does not need
        view.compile()
    return view


def build_eval_transform(args: argparse.Namespace, model: torch.nn.Module) -> Callable[[Any], torch.Tensor]:
    """How the model is shown an image that it is asked about."""
    return datasets.build_eval_transform(
        _size(args), *models.normalization(model), interpolation="bicubic", crop_ratio=args.eval_crop_ratio
    )


def build_val_loader(args: argparse.Namespace, source: Any, model: torch.nn.Module, world: World) -> Any:
    """Every process's share of the images, as the model is shown images that it is asked about."""
    view = build_eval_transform(args, model)
    if _augments_on_device(args, source, world.device):
        frame, size = loaders.frame_of(source), _size(args)
        view = augment.EvalTransform(frame, size, *models.normalization(model), crop_ratio=args.eval_crop_ratio)
        view = _compiled(args, view, world.device)
    return loaders.build_eval_loader(source, view, **_loader_options(args, world))


def build_train_view(
    args: argparse.Namespace, model: torch.nn.Module, source: Any, device: torch.device
) -> loaders.View:
    """How the model is shown an image to learn from."""
    options = {
        "interpolation": args.train_interpolation,
        "hflip": args.hflip,
        "color_jitter": args.color_jitter,
        "auto_augment": args.aa,
        "re_prob": args.reprob,
        "re_mode": args.remode,
        "re_count": args.recount,
    }
    if not _augments_on_device(args, source, device):
        return datasets.build_train_transform(_size(args), *models.normalization(model), **options)
    logger.info("images are augmented on the device (--augment)")
    frame = loaders.frame_of(source)
    view = augment.TrainAugmentation(frame, _size(args), *models.normalization(model), **options)
    return _compiled(args, view, device)


def cache_features(
    args: argparse.Namespace, model: torch.nn.Module, source: Any, world: World
) -> tuple[datasets.Source, Callable[[torch.Tensor], torch.Tensor], torch.nn.Module]:
    """Features of the training images as a data set, the way they are shown (as they are), and the head they go to.

    Every process computes them all.
    """
    if not isinstance(source, datasets.Source):
        raise UserError(f"--cache-features: {args.data_set} is a stream, whose images have no place; drop the flag")
    head = models.linear_head(model, args.model)
    alone = dataclasses.replace(world, rank=0, size=1)
    loader = build_val_loader(args, source, model, alone)
    amp = engine.autocast(model, engine.select_amp(args.amp, world.device))
    start = time.perf_counter()
    features, targets = engine.features(model, loader, amp)
    logger.info("features of %d images in %.0f s", len(features), time.perf_counter() - start)
    order = np.arange(len(features))
    return datasets.Source(features, targets.numpy(), source.num_classes, order, source.broken), torch.clone, head


def build_train_loader(args: argparse.Namespace, source: Any, view: loaders.View, world: World) -> loaders.EpochLoader:
    return loaders.build_train_loader(
        source,
        view,
        accum_steps=args.accum_steps,
        repeats=3 if args.repeated_aug else 1,
        seed=args.seed,
        **_loader_options(args, world),
    )


def build_prepare(args: argparse.Namespace, num_classes: int, device: torch.device) -> Callable:
    """The way of a training batch to the device, with Mixup and CutMix."""
    mixup = loaders.build_mixup(
        mixup=args.mixup,
        cutmix=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        num_classes=num_classes,
        batch_size=args.batch_size,
    )
    return loaders.build_prepare(device, mixup)


def build_teacher(
    args: argparse.Namespace, student: torch.nn.Module, num_classes: int, device: torch.device
) -> teachers.FrozenTeacher:
    """The teacher with its weights, on the device."""
    model = teachers.build_teacher(
        args.teacher_model,
        path=args.teacher_path,
        pretrained=args.teacher_pretrained,
        num_classes=num_classes,
        input_size=_size(args),
        model_kwargs=args.teacher_model_kwargs,
    )
    _place(model, device)
    if args.compile:
        model.compile()
    return teachers.FrozenTeacher(model, *models.normalization(model), *models.normalization(student))


def build_cached_teacher(
    args: argparse.Namespace, student: torch.nn.Module, source: Any, loader: loaders.EpochLoader, world: World
) -> teachers.CachedTeacher:
    """The store of the teacher's answers; the teacher itself only if answers are missing.

    Raises:
        UserError: if the store is of another run, or the disk too small, or answers and teacher are missing.
    """
    if not isinstance(source, datasets.Source):
        raise UserError(f"--teacher-cache: {args.data_set} is a stream, whose views have no place; drop the flag")
    if source.num_classes >= 2**16:
        raise UserError(
            f"--teacher-cache: holds classes below {2**16 - 1}, the data have {source.num_classes}; drop it"
        )
    hard, folder = args.distillation_type == "hard", Path(args.teacher_cache)
    codec = (
        teachers.Labels(source.num_classes)
        if hard
        else teachers.LogProbabilities(source.num_classes, args.teacher_cache_topk)
    )
    num_positions = loader.counter.num_positions
    cache = teachers.TeacherCache(folder, codec, num_positions, world.rank, world.size)
    missing = [epoch for epoch in _view_epochs(args) if not cache.is_whole(epoch)]
    live = None
    if missing:
        if not args.teacher_path and not args.teacher_pretrained:
            raise UserError(
                f"--teacher-cache {folder}: {len(missing)} epochs are missing, the first is {missing[0]}; add "
                f"--teacher-path FILE or --teacher-pretrained, or precompute them"
            )
        needed = cache.check_space(len(missing))
        logger.info("%s: %d epochs are missing and will take %.1f MiB", folder, len(missing), needed / 2**20)
        live = build_teacher(args, student, source.num_classes, world.device)
    with utils.main_process_first(world.local_rank):
        teachers.check_fingerprint(folder, fingerprint(args, student, source, loader, world))
    return teachers.CachedTeacher(cache, lambda: loader.counter.epoch, live)


def _view_epochs(args: argparse.Namespace) -> range:
    """The epochs of different views that a run sees, or precomputes."""
    return args.precompute_epochs or range(min(args.epochs, args.augmentation_epochs or args.epochs))


def fingerprint(
    args: argparse.Namespace, student: torch.nn.Module, source: Any, loader: loaders.EpochLoader, world: World
) -> dict[str, Any]:
    """All that shapes the views of a run and what a teacher says about them; None for what is not known here."""
    flags = ("data_set", "train_fraction", "seed", "input_size", "repeated_aug", "hflip", "color_jitter", "aa")
    flags += ("train_interpolation", "reprob", "remode", "recount", "mixup", "cutmix", "cutmix_minmax", "mixup_prob")
    flags += ("mixup_switch_prob", "mixup_mode", "distillation_type", "teacher_model", "teacher_model_kwargs")
    mixes = bool(args.mixup or args.cutmix or args.cutmix_minmax)
    teacher = (
        checkpoints.file_hash(args.teacher_path) if args.teacher_path else "timm" if args.teacher_pretrained else None
    )
    return {name: getattr(args, name) for name in flags} | {
        "views": loader.counter.num_positions,
        "labels": zlib.crc32(source.targets[source.order].tobytes()),
        "normalization": models.normalization(student),
        "batch_size": args.batch_size if mixes else 0,  # what is mixed with what
        "processes": world.size if mixes else 0,
        "teacher_weights": teacher,
        "precision": str(engine.select_amp(args.amp, world.device)),
        "augmentation": _augmentation(loader),
        "topk": None if args.distillation_type == "hard" else args.teacher_cache_topk,
    }


def _augmentation(loader: loaders.EpochLoader) -> dict[str, str]:
    """Where views are made, and the versions of what makes them."""
    on_device = isinstance(loader.loader, loaders.DeviceLoader)
    code = ("torch", "timm") if on_device else ("timm", "torchvision", "pillow")
    return {"where": "device" if on_device else "host"} | {name: version(name) for name in code}


def build_criterion(
    args: argparse.Namespace, student: torch.nn.Module, source: Any, loader: loaders.EpochLoader, world: World
) -> losses.SupervisedLoss | losses.DistillationLoss:
    """The base criterion, with a teacher if there is one."""
    base = losses.build_base_criterion(args.bce_loss, args.smoothing)
    if args.distillation_type == "none":
        return losses.SupervisedLoss(base)
    if args.teacher_cache:
        teacher = build_cached_teacher(args, student, source, loader, world)
    else:
        teacher = build_teacher(args, student, source.num_classes, world.device)
    return losses.DistillationLoss(
        base,
        teacher,
        args.distillation_type,
        alpha=args.distillation_alpha,
        tau=args.distillation_tau,
        scale=args.distillation_scale,
    )


def build_state(
    args: argparse.Namespace, model: torch.nn.Module, trained: torch.nn.Module, images_per_batch: int, world: World
) -> engine.TrainState:
    """Optimiser, precision, weight average, compilation and DDP around a model, or the part of it that is trained."""
    effective_batch = images_per_batch * args.accum_steps
    lr = args.lr * {"linear": effective_batch / 512, "sqrt": (effective_batch / 512) ** 0.5, "none": 1}[args.lr_scaling]
    logger.info("effective batch %d images, peak learning rate %.3g", effective_batch, lr)
    optimizer = engine.build_optimizer(
        model,
        args.opt,
        lr=lr,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
        eps=args.opt_eps,
        betas=args.opt_betas,
    )
    ema = None
    if args.model_ema:
        device = torch.device("cpu") if args.model_ema_force_cpu else None
        ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=device)
    if args.compile:
        # An EViT is compiled anew at each step of its keep rate, for training and for evaluation; after 8 times torch
        # would silently compile no more.
        torch._dynamo.config.cache_size_limit = 4 * (models_evit.SHRINK_STEPS + 1)
        model.compile()  # in place, so that parameter names keep no prefix
    wrapped = trained
    if world.size > 1:
        devices = [world.device] if world.device.type == "cuda" else None
        wrapped = DistributedDataParallel(trained, device_ids=devices, gradient_as_bucket_view=True)
        shape = (3, *_size(args)) if trained is model else (trained.in_features,)
        engine.settle_buckets(wrapped, torch.zeros(2, *shape, device=world.device))
    amp_dtype = engine.select_amp(args.amp, world.device)
    return engine.TrainState(
        wrapped,
        model,
        optimizer,
        amp_dtype=amp_dtype,
        accum_steps=args.accum_steps,
        clip_grad=args.clip_grad,
        max_skipped_steps=args.max_skipped_steps,
        ema=ema,
    )


def build_schedules(
    args: argparse.Namespace, state: engine.TrainState, updates_per_epoch: int
) -> list[engine.Schedule]:
    """Everything that follows the number of updates."""
    learning_rate = engine.build_lr_schedule(
        state.optimizer,
        updates_per_epoch,
        args.epochs,
        args.warmup_epochs,
        sched=args.sched,
        warmup_lr=args.warmup_lr,
        min_lr=args.min_lr,
        decay_epochs=args.decay_epochs,
        decay_rate=args.decay_rate,
        cooldown_epochs=args.cooldown_epochs,
        noise=args.lr_noise,
        noise_pct=args.lr_noise_pct,
        noise_std=args.lr_noise_std,
        noise_seed=args.seed,
    )
    if not models_evit.is_evit(args.model):
        return [learning_rate]
    return [
        learning_rate,
        models_evit.KeepRate(
            engine.modules_of(state).values(),
            updates_per_epoch,
            start_epoch=10 if args.shrink_start_epoch is None else args.shrink_start_epoch,
            epochs=args.shrink_epochs or 0,
        ),
    ]


# Flags that may change between a run and the one that resumes it without changing a bit of its weights. (What the data
# and the precision are is compared by itself.)
FREE_FLAGS = frozenset(("output_dir", "overwrite", "resume", "finetune", "pretrained", "eval", "eval_interval"))
FREE_FLAGS |= {"log_interval", "num_workers", "pin_mem", "device", "amp", "augment", "checkpoint_minutes", "data_path"}
FREE_FLAGS |= {"ram_cache", "teacher_cache", "teacher_path", "teacher_pretrained", "precompute_batch_size"}
FREE_FLAGS |= {"precompute_teacher", "dist_eval", "distributed", "world_size", "dist_url", "patience_epochs"}


def describe_run(
    args: argparse.Namespace, source: Any, loader: loaders.EpochLoader, state: engine.TrainState, world: World
) -> dict[str, dict[str, Any]]:
    """What a checkpoint says of its run: the flags, and what else its bits depend on."""
    indexed, cuda = isinstance(source, datasets.Source), world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if cuda else f"{world.device.type} ({torch.get_num_threads()})"
    return {
        "args": vars(args),
        "run": {
            "images": len(source),
            "labels": zlib.crc32(source.targets[source.order].tobytes()) if indexed else None,
            "file_names": zlib.crc32(source.file_names()) if indexed else None,
            "processes": world.size,
            "augmentation": _augmentation(loader)["where"],
            "device (threads)": device,
            "precision": str(state.amp_dtype),
            "teacher": checkpoints.file_hash(args.teacher_path) if args.teacher_path else None,
            "versions": {name: version(name) for name in ("torch", "timm", "torchvision", "pillow")},
        },
    }


def resume(
    args: argparse.Namespace, state: engine.TrainState, loader: loaders.EpochLoader, about: dict[str, dict[str, Any]]
) -> None:
    """Go on where `--resume` was written, and say what keeps the run from being the same to the bit.

    Args:
        about: what `describe_run` says of this run.

    Raises:
        UserError: if the checkpoint is for another model or another optimiser, or holds weights only.
    """
    checkpoint = checkpoints.read_checkpoint(args.resume, "--resume")
    changes = _changes(checkpoint, about)
    if checkpoint.get("progress") and isinstance(loader.counter, datasets.StreamingImages):
        changes.append("a stream has no places, so the epoch begins again")
        checkpoint["progress"] = None
    state.resume(checkpoint, args.resume, loader.updates_per_epoch, loader.images_per_update)
    if loader.broken is not None:
        loader.broken.restore(checkpoint.get("broken_images") or [])
    if changes:
        logger.warning("%s: the run goes on, but not to the bit as it would have: %s", args.resume, "; ".join(changes))
    done = state.num_updates - state.epoch * loader.updates_per_epoch
    logger.info("going on with epoch %d after %d of its %d updates", state.epoch, done, loader.updates_per_epoch)
    furthest, least = utils.agree(state.num_updates, -state.num_updates)
    if furthest != -least:
        raise UserError(f"--resume {args.resume}: the processes read different files; name one that all of them see")


def _changes(checkpoint: dict[str, Any], now: dict[str, dict[str, Any]]) -> list[str]:
    """What differs from the run that wrote the checkpoint, and shows in every further bit; None is not known."""
    flags = checkpoint.get("args") or {}
    then = {"args": vars(flags) if isinstance(flags, argparse.Namespace) else flags, "run": checkpoint.get("run") or {}}
    then, now = (json.loads(json.dumps(each, default=str)) for each in (then, now))  # no difference of list and tuple
    flags = vars(get_parser().parse_args([])).keys() - FREE_FLAGS  # those of a job are in args as well
    changes = [
        (f"--{name.replace('_', '-')}", value, now["args"][name])
        for name, value in then["args"].items()
        if name in flags
    ]
    changes += [
        (name.replace("_", " "), value, now["run"][name])
        for name, value in then["run"].items()
        if now["run"].get(name) is not None
    ]
    return [f"{name} was {old}, is {new}" for name, old, new in changes if old != new]


def open_output(
    args: argparse.Namespace, state: engine.TrainState, world: World
) -> tuple[Path | None, utils.TensorBoard | None]:
    """Output folder and, on rank 0, a TensorBoard writer.

    Raises:
        UserError: if the folder cannot be written, or holds an earlier run that would be lost.
    """
    if not args.output_dir:
        return None, None
    folder = Path(args.output_dir)
    if checkpoints.holds_checkpoint(folder) and not args.resume and not args.overwrite:
        raise UserError(
            f"--output-dir {folder}: holds an earlier run; go on with --resume auto, name another folder, or add "
            f"--overwrite"
        )
    utils.barrier()  # all have looked before anyone writes
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not world.is_main:
            return folder, None
        checkpoints.remove_temporary_files(folder)
        utils.write_whole(folder / "config.json", (json.dumps(vars(args), indent=1, default=str) + "\n").encode())
        utils.open_log(folder, state.epoch)
        step = state.num_updates * state.accum_steps
        return folder, utils.TensorBoard(folder / "tensorboard", step, state.epoch)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written ({error.strerror}); name another folder") from None


def evaluate_only(args: argparse.Namespace, model: torch.nn.Module, val_loader: Any, world: World) -> None:
    """`--eval`: the weights, and their average if the checkpoint has one."""
    weights = {"test": None}
    if args.resume:
        checkpoint = checkpoints.read_checkpoint(args.resume, "--resume")
        weights = {"test": models.weights_of(checkpoint, "--resume", args.resume)}
        if checkpoint.get("model_ema"):
            weights["test_ema"] = checkpoint["model_ema"]
    for prefix, state_dict in weights.items():
        if state_dict is not None:
            models.load_exactly(model, state_dict, args.resume)
        stats = engine.evaluate(model, val_loader, engine.autocast(model, engine.select_amp(args.amp, world.device)))
        logger.info(engine.describe({f"{prefix}_{name}": value for name, value in stats.items()}))


def precompute_only(
    args: argparse.Namespace,
    student: torch.nn.Module,
    teacher: teachers.CachedTeacher,
    loader: loaders.EpochLoader,
    prepare: Callable,
    world: World,
) -> None:
    """`--precompute-teacher`: the store of answers, and no student."""
    engine.precompute(
        teacher,
        loader,
        prepare,
        _view_epochs(args),
        engine.autocast(student, engine.select_amp(args.amp, world.device)),
        seed=args.seed,
        world=world,
        group=max(1, (args.precompute_batch_size or 0) // args.batch_size),
        log_interval=args.log_interval,
    )


def main(args: argparse.Namespace) -> None:
    """One run, from flags to the last checkpoint. Flags are read, never changed.

    Raises:
        UserError: before training starts, if the flags or files are wrong.
        RunError: during training, on all ranks.
    """
    check_flags(args)
    world = utils.init_distributed(args.device)
    utils.set_up_logging(world)
    utils.set_up_kernels(args.deterministic)
    args = settle_resume(args, world)
    train, val = build_sources(args, world)
    model = build_model(args, train.num_classes, world.device)
    val_loader = build_val_loader(args, val, model, world)
    if args.eval:
        evaluate_only(args, model, val_loader, world)
        return utils.shut_down_distributed()
    view, trained = build_train_view(args, model, train, world.device), model
    if args.cache_features:
        train, view, trained = cache_features(args, model, train, world)
    train_loader = build_train_loader(args, train, view, world)
    prepare = build_prepare(args, train.num_classes, world.device)
    criterion = build_criterion(args, model, train, train_loader, world)
    if args.precompute_teacher:
        precompute_only(args, model, criterion.teacher, train_loader, prepare, world)
        return utils.shut_down_distributed()
    state = build_state(args, model, trained, train_loader.images_per_batch, world)
    schedules = build_schedules(args, state, train_loader.updates_per_epoch)
    about = describe_run(args, train, train_loader, state, world)
    if args.resume:
        resume(args, state, train_loader, about)
    output_dir, writer = open_output(args, state, world)
    engine.fit(
        state,
        train_loader,
        val_loader,
        criterion,
        prepare,
        schedules,
        epochs=args.epochs,
        world=world,
        about=about,
        output_dir=output_dir,
        writer=writer,
        seed=args.seed,
        log_interval=args.log_interval,
        eval_interval=args.eval_interval,
        augmentation_epochs=args.augmentation_epochs,
        checkpoint_minutes=args.checkpoint_minutes,
    )
    if writer is not None:
        writer.close()
    utils.shut_down_distributed()


def cli(argv: Sequence[str] | None = None) -> None:
    """`main` with a command's exit statuses.

    0 done, 1 a fault during the run, 2 a mistake in the flags or files, 75 stopped by a signal and saved.
    """
    args = get_parser().parse_args(argv)
    try:
        main(args)
    except Exception as error:
        rank = f"rank {os.environ.get('RANK', '')}: " if utils.is_distributed() else ""
        if isinstance(error, UserError):
            _end(f"main.py: error: {error}", 2)
        if isinstance(error, Preempted):
            _end(f"main.py: {rank}{error}", 75)
        if isinstance(error, RunError):
            _end(f"main.py: {rank}run ended: {utils.last_line(error)}", 1)
        if utils.is_lost_loader(error):
            _end(
                f"main.py: {rank}run ended: a loader process is gone ({utils.last_line(error)}); if memory ran out, "
                f"lower --num-workers or --ram-cache; the last checkpoint is intact",
                1,
            )
        if not utils.is_distributed():
            raise
        if utils.is_lost_peer(error):
            _end(
                f"main.py: {rank}run ended: another process is gone (its own message says why); the last checkpoint "
                f"is intact",
                1,
            )
        _end(f"{traceback.format_exc()}main.py: {rank}run ended: {type(error).__name__}: {utils.last_line(error)}", 1)


def _end(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    # A rank that fails must not wait at exit for the others, nor they for it.
    if utils.is_distributed():
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    cli()
