"""Loaders: from a source to batches on the device, with workers, views on the host or the device, and Mixup.

`KeyedImages` seeds all generators with the sample's key before it reads the sample, so a view depends on its key only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.readers.reader_wds import ReaderWds
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

import models
from augment import EvalTransform, Normalization, TrainAugmentation, ViewOptions, is_supported
from datasets import build_eval_transform, build_train_transform
from samplers import Batch, KeyedSampler, random_key, seed_generators, signed
from sources import (
    BrokenImages,
    Data,
    MemoryImages,
    Source,
    StreamingImages,
)
from utils import VARIES, RunError, UserError, World, ignore_stop_signals, last_line, logger, varies_if_compiled

MAX_PADDING = 4  # maximum area of the padded buffer, relative to the mean image area
MAX_WORKERS = 10  # default maximum of workers that only read stored images
MAX_SOCKET_NAME = 107 if sys.platform == "linux" else 103  # length limit of an AF_UNIX socket name

View = Callable[[Image.Image], torch.Tensor] | torch.nn.Module  # on the host, or a module for batches on the device


@dataclass(frozen=True)
class LoaderOptions:
    """Options of the loaders. The fields are flags of main.py."""

    batch_size: int = 64  # images per process and forward pass
    accum_steps: int = 1  # forward passes per update
    repeated_aug: bool = True  # each epoch draws a third of the images, with three views each
    class_balanced: bool = False  # draw all classes equally often
    num_workers: int | None = None  # data-loader workers per rank; None: number of its CPUs, see `num_workers`
    pin_mem: bool = True  # pinned memory on CUDA
    seed: int = 0
    cosub: bool = False  # a batch holds each of its images twice
    augment: str = "auto"  # where views are made: "host", "device" or "auto"
    compile_augment: bool = True  # compile the augmentation on a GPU


@dataclass(frozen=True)
class MixupOptions:
    """Options of Mixup and CutMix. The fields are flags of main.py; see `timm.data.Mixup`."""

    mixup: float = 0.8
    cutmix: float = 1.0
    cutmix_minmax: Sequence[float] | None = None
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"


# -- samples -----------------------------------------------------------------------------------------------------------


class KeyedImages(Dataset):
    """Data set of a source's views, indexed by the `(index, position, key)` of `KeyedSampler`."""

    def __init__(self, source: Source, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: tuple[int, int, int]) -> Batch:
        index, position, key = sample
        seed_generators(key)
        image, target = self.source[index]
        return Batch(self.transform(image), target, position, keys=signed(key))


class PaddedImages(Dataset):
    """Data set of batches of stored images, each at the top left of a buffer of the largest image's size.

    It is indexed by lists of the `(index, position, key)` of `KeyedSampler`.
    """

    def __init__(self, source: Source) -> None:
        """Keep the source and the size of its padded buffer.

        Args:
            source: images in memory or packed, which have `shapes`.
        """
        self.source, self.size = source, padded_size(source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, samples: Sequence[tuple[int, int, int]]) -> Batch:
        images = _zeros((len(samples), *self.size, 3))
        buffer = images.numpy()
        sizes, targets = np.empty((len(samples), 2), np.int64), np.empty(len(samples), np.int64)
        for number, (index, _, _) in enumerate(samples):
            pixels, targets[number] = self.source.array(index)
            height, width = sizes[number] = pixels.shape[:2]
            buffer[number, :height, :width] = pixels
        positions, keys = _positions_and_keys(samples)
        return Batch(images.permute(0, 3, 1, 2), torch.from_numpy(targets), positions, torch.from_numpy(sizes), keys)


def _zeros(shape: tuple[int, ...]) -> torch.Tensor:
    """Allocate zeros of uint8; in a data-loader worker in shared memory, to send them without another copy."""
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's collate does; new shared memory is zero
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class DeviceImages(Dataset):
    """`PaddedImages` kept on the device, where batches are selected."""

    def __init__(self, images: PaddedImages, device: torch.device) -> None:
        batch = images.__getitems__([(index, index, 0) for index in range(len(images))])
        self.images, self.targets = batch.images.contiguous().to(device), batch.targets.to(device)
        self.sizes = batch.sizes.to(device)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, samples: Sequence[tuple[int, int, int]]) -> Batch:
        index = torch.from_numpy(np.array([index for index, _, _ in samples])).to(self.images.device, non_blocking=True)
        images, targets, sizes = (each.index_select(0, index) for each in (self.images, self.targets, self.sizes))
        positions, keys = _positions_and_keys(samples)
        return Batch(images, targets, positions, sizes, keys)


def _positions_and_keys(samples: Sequence[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    _, positions, keys = zip(*samples, strict=True)  # faster than from lists to tensors
    return torch.from_numpy(np.array(positions)), torch.from_numpy(np.array(keys, np.uint64).view(np.int64))


def padded_size(source: Source) -> tuple[int, int]:
    """Return the (height, width) that holds every image of a source in memory or packed."""
    height, width = source.images.shapes[source.order, :2].max(axis=0).tolist()
    return height, width


def can_pad(source: Data) -> bool:
    """Return True if images can be augmented on the device: in memory or packed, and of similar sizes."""
    if not isinstance(source, Source) or not hasattr(source.images, "shapes"):
        return False
    areas = source.images.shapes[source.order, :2].prod(axis=1)
    return np.prod(padded_size(source)) <= MAX_PADDING * areas.mean()


def augments_on_device(source: Data, where: str, views: ViewOptions, device: torch.device) -> bool:
    """Decide whether this source's images are augmented in batches on the device.

    Args:
        where: `--augment`: "auto", "host" or "device"; "auto" uses a GPU if it supports all of the augmentation.
        views: for `--aa` and `--src`.

    Raises:
        UserError: if "device" is impossible.
    """
    if where == "auto":
        return device.type == "cuda" and can_pad(source) and is_supported(views.aa, views.src)
    if where == "device" and not can_pad(source):
        raise UserError(
            "--augment device: the images are neither in memory nor packed, or of too different sizes; raise "
            "--ram-cache, pack them with python -m tools.pack_dataset, or drop the flag"
        )
    return where == "device"


# -- loaders -----------------------------------------------------------------------------------------------------------


@dataclass
class DeviceLoader:
    """Loader of batches on the device, which also makes the views there if `view` is a module.

    Attributes:
        loader: this rank's batches on the host.
        device: device of the batches.
        view: called with a batch's images, sizes and keys; None if the workers make the views.
        num_images: number of images over all ranks; 0 if a stream does not state it.
    """

    loader: DataLoader
    device: torch.device
    view: torch.nn.Module | None = None
    num_images: int = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in copied_ahead(self.loader, self.device):
            if self.view is not None:
                batch = batch._replace(images=self.view(batch.images, batch.sizes, batch.keys), sizes=None)
            yield batch

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def augmentation(self) -> dict[str, str]:
        """Where views are made ("host", "device" or "device, compiled"), and the package versions that matter.

        Compiled views differ in rounding.
        """
        if self.view is None:
            where, code = "host", ("timm", "torchvision", "pillow")
        else:
            where, code = "device", ("torch", "timm")
            if models.is_compiled(self.view):
                where += ", compiled"
        return {"where": where} | {name: version(name) for name in code}

    def close(self) -> None:
        """End the workers, even those that are stuck or ignore SIGTERM."""
        processes = getattr(self.loader, "_iterator", None)  # of a DataLoader with persistent workers
        if processes is not None:
            processes._shutdown_workers()
            for worker in processes._workers:
                worker.kill()  # even if stuck
            self.loader._iterator = None


@dataclass(kw_only=True)
class EpochLoader(DeviceLoader):
    """Loader of training batches with Mixup; call `set_epoch` before each iteration.

    Attributes:
        counter: the sampler or stream that yields an epoch's samples.
        num_batches: batches per epoch and rank.
        images_per_batch: images per batch over all ranks.
        updates_per_epoch: optimizer updates per epoch.
        mixup_fn: timm's Mixup, or None.
        cosub: a batch holds its images twice, once for each submodel of `losses.CosubLoss`, and its targets once.
        seed, rank: seed Mixup, together with the epoch and the step.
        broken: unreadable images found so far, or None if none are tolerated.
        epoch, first_step: the epoch to iterate over, and its first step.
    """

    counter: KeyedSampler | StreamingImages | None
    num_batches: int
    images_per_batch: int
    updates_per_epoch: int
    mixup_fn: Mixup | None = None
    cosub: bool = False
    seed: int = 0
    rank: int = 0
    broken: BrokenImages | None = None
    epoch: int = 0
    first_step: int = 0

    @property
    def images_per_update(self) -> int:
        """Images per optimizer update over all ranks."""
        return self.images_per_batch * self.num_batches // self.updates_per_epoch

    @property
    def num_positions(self) -> int:
        """Views per epoch over all ranks."""
        return self.images_per_batch * self.num_batches

    @property
    def is_stream(self) -> bool:
        """True if samples have no index."""
        return isinstance(self.counter, StreamingImages)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Select an epoch; skip the batches before `first_step` without reading them (impossible for a stream)."""
        self.epoch, self.first_step = epoch, first_step
        if self.is_stream:
            self.counter.set_epoch(epoch)
        elif self.counter is not None:
            self.counter.set_epoch(epoch, first_step * self.loader.batch_size)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        batches, done = itertools.islice(super().__iter__(), self.num_batches - self.first_step), self.first_step
        for step, batch in enumerate(batches, self.first_step):
            if self.mixup_fn is not None:
                seed_generators(random_key(self.seed, "mix", self.epoch, step, self.rank))
                images, targets = self.mixup_fn(batch.images, batch.targets)
                batch = batch._replace(images=images, targets=targets)
            if self.cosub:
                batch = batch._replace(images=torch.cat([batch.images, batch.images]))
            done = step + 1
            yield batch
        if self.is_stream and done < self.num_batches:
            raise RunError(
                f"the training stream ended after {done} of {self.num_batches} batches: some images cannot be "
                f"read, or it states too many; fix the data"
            )


def build_train_loader(
    source: Data,
    views: ViewOptions,
    normalization: Normalization,
    mixup: MixupOptions,
    options: LoaderOptions,
    world: World,
) -> EpochLoader:
    """Build the loader of augmented views, [batch_size, 3, H, W] per rank, in whole optimizer updates.

    Raises:
        UserError: if the data are too few for one update, or `options` ask for an impossible augmentation.
    """
    view: View
    if augments_on_device(source, options.augment, views, world.device):
        logger.info("images are augmented on the device (--augment)")
        view = TrainAugmentation(padded_size(source), views, normalization)
    else:
        view = build_train_transform(views, normalization)
    return build_epoch_loader(source, view, mixup, options, world)


def build_epoch_loader(
    source: Data, view: View, mixup: MixupOptions, options: LoaderOptions, world: World
) -> EpochLoader:
    """Build a loader of any views, in whole optimizer updates.

    Raises:
        UserError: if the data are too few for one update, or a batch cannot be mixed.
    """
    per_update = options.batch_size * options.accum_steps * world.size
    if len(source) < per_update:
        raise UserError(
            f"--batch-size {options.batch_size}: an update takes {per_update} images (batch size x processes x "
            f"--accum-steps), the training data hold {len(source)}; lower --batch-size"
        )
    updates = len(source) // per_update
    if isinstance(source, StreamingImages):
        if options.class_balanced:
            raise UserError("--class-balanced: a stream cannot be sampled by class; drop the flag, or pack it first")
        counter, loader = source, _stream_loader(source, view, options, world)
    else:
        counter = KeyedSampler(
            len(source),
            seed=options.seed,
            repeats=3 if options.repeated_aug else 1,
            classes=source.targets[source.order] if options.class_balanced else None,
            rank=world.rank,
            world_size=world.size,
            multiple=per_update,
        )
        logger.info(
            "an epoch holds %d views of %d %s (of %d), in %d updates",
            counter.num_positions,
            counter.num_drawn,
            "images, as many of each class" if options.class_balanced else "different images",
            len(source),
            updates,
        )
        loader = _view_loader(source, view, counter, options, world)
    return EpochLoader(
        loader=loader,
        device=world.device,
        view=_on_device(view, options, world),
        counter=counter,
        num_batches=updates * options.accum_steps,
        images_per_batch=options.batch_size * world.size,
        updates_per_epoch=updates,
        mixup_fn=build_mixup(mixup, source.num_classes, options.batch_size),
        cosub=options.cosub,
        seed=options.seed,
        rank=world.rank,
        broken=None if isinstance(source, StreamingImages) else source.broken,
    )


def build_val_loader(
    source: Data,
    views: ViewOptions,
    normalization: Normalization,
    options: LoaderOptions,
    world: World,
) -> DeviceLoader:
    """Build the loader of the validation images: each exactly once over all ranks, without padding.

    Raises:
        UserError: if `options` ask for an impossible augmentation.
    """
    view: View
    if augments_on_device(source, options.augment, views, world.device):
        view = EvalTransform(padded_size(source), views, normalization)
    else:
        view = build_eval_transform(views, normalization)
    if isinstance(source, StreamingImages):
        source.transform, source.rank, source.world_size = view, world.rank, world.size
        loader = _host_loader(source, None, 0, options, world)
    else:
        sampler = KeyedSampler(len(source), shuffle=False, rank=world.rank, world_size=world.size)
        loader = _view_loader(source, view, sampler, options, world)
    return DeviceLoader(loader, world.device, _on_device(view, options, world), len(source))


@torch.no_grad()
def feature_source(
    source: Data,
    model: torch.nn.Module,
    views: ViewOptions,
    options: LoaderOptions,
    world: World,
    autocast: contextlib.AbstractContextManager,
) -> Source:
    """Compute the inputs of the classification layer for the evaluation view of each image, as a source of [D] vectors.

    Every process computes all of them.

    Raises:
        UserError: if the data are a stream.
    """
    if isinstance(source, StreamingImages):
        raise UserError(f"--cache-features: {source.name} is a stream, whose images have no index; drop the flag")
    start, alone = time.perf_counter(), dataclasses.replace(world, rank=0, size=1)
    rows, targets = [], []
    model.eval()
    for batch in build_val_loader(source, views, models.normalization(model), options, alone):
        targets.append(batch.targets.cpu())
        with autocast:
            maps = model.forward_features(batch.images)
            rows.append(model.forward_head(maps, pre_logits=True).float().cpu())
    features = torch.cat(rows)
    logger.info("features of %d images in %.0f s", len(features), time.perf_counter() - start)
    order = np.arange(len(features))
    return Source(features, torch.cat(targets).numpy(), source.num_classes, order, source.broken)


def _on_device(view: View, options: LoaderOptions, world: World) -> torch.nn.Module | None:
    """Move the view's module to its device and compile it; None if the workers make the views."""
    if not isinstance(view, torch.nn.Module):
        return None
    # A CPU is faster without compilation, because eager code skips operations that no sample needs.
    if options.compile_augment and world.device.type == "cuda":
        lacking = why_not_compiled(world.device)
        if not lacking:
            # By default, all batches after a smaller last one would run in another kernel, with dynamic shapes.
            view.compile(dynamic=False)
        elif world.is_main:
            logger.warning("the augmentation is not compiled, which makes it slower: %s", lacking)
    return view.to(world.device)


def why_not_compiled(device: torch.device) -> str:
    """Compile and run a tiny function; return why that fails on this device, '' if it does not.

    A GPU needs Triton, a C compiler, Python's headers and compute capability 7.0; --deterministic needs a torch that
    compiles the same kernels in every run.
    """
    if varies_if_compiled():
        return f"--deterministic: {VARIES}"
    try:
        torch.compile(lambda values: values + 1, dynamic=False)(torch.zeros(1, device=device))
    except Exception as error:  # torch, Triton and the compiler raise their own
        return f"torch.compile fails here ({last_line(error)[:200]}); it needs Triton, gcc or clang, and Python.h"
    return ""


def _view_loader(source: Source, view: View, sampler: KeyedSampler, options: LoaderOptions, world: World) -> DataLoader:
    """Build the host loader of views or, if `view` works on the device, of stored images."""
    on_device = isinstance(view, torch.nn.Module)
    workers = num_workers(options, world, on_device)
    if not on_device:
        return _host_loader(KeyedImages(source, view), sampler, workers, options, world)
    images = PaddedImages(source)
    if isinstance(source.images, MemoryImages):  # nothing to read or copy, so no workers
        return _host_loader(DeviceImages(images, world.device), sampler, 0, options, world, pin=False)
    return _host_loader(images, sampler, workers, options, world)


def _stream_loader(source: StreamingImages, view: View, options: LoaderOptions, world: World) -> DataLoader:
    """Build the host loader of a stream; timm distributes its shards over ranks and workers."""
    source.transform, source.seed, source.rank, source.world_size = view, options.seed, world.rank, world.size
    reader = source.dataset.reader
    reader.dist_rank, reader.dist_num_replicas = world.rank, world.size
    reader.common_seed, reader.batch_size = options.seed, options.batch_size
    workers = _workers_with_shards(reader, num_workers(options, world), world)
    source.dataset.set_loader_cfg(num_workers=workers)
    if options.repeated_aug:
        logger.info("repeated augmentation needs an index, which a stream does not have: each image is seen once")
    return _host_loader(source, None, workers, options, world)


def num_workers(options: LoaderOptions, world: World, on_device: bool = False) -> int:
    """Return the number of workers of this rank; with `on_device` they only read stored images."""
    default = min(MAX_WORKERS, world.cpus) if on_device else world.cpus
    return default if options.num_workers is None else options.num_workers


def _workers_with_shards(reader: Any, workers: int, world: World) -> int:
    """Limit workers to the number of WebDataset shards; a worker without a shard would end the epoch early."""
    if not isinstance(reader, ReaderWds):
        return workers
    shards = len(reader.split_info.filenames)
    if shards < world.size:
        raise UserError(
            f"--data-set wds/: {shards} training shards do not reach {world.size} processes; write more shards, or "
            f"start fewer processes"
        )
    return min(workers, shards // world.size)


def _check_temporary_folder() -> None:
    """Check that workers can send batches through sockets in the temporary folder.

    Raises:
        UserError: if the folder's name is too long. Workers would fail, and the main process would wait forever.
    """
    folder = tempfile.gettempdir()
    room = MAX_SOCKET_NAME - len("/pymp-12345678/listener-12345678")
    if len(os.fsencode(folder)) > room:
        raise UserError(
            f"TMPDIR {folder}: is too long for data-loader workers, at most {room} characters; set TMPDIR to another "
            f"folder, or pass --num-workers 0"
        )


def _host_loader(
    dataset: Dataset,
    sampler: KeyedSampler | None,
    workers: int,
    options: LoaderOptions,
    world: World,
    pin: bool = True,
) -> DataLoader:
    if workers:
        _check_temporary_folder()
    return DataLoader(
        dataset,
        batch_size=options.batch_size,
        sampler=sampler,
        num_workers=workers,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # Python 3.14: forkserver
        pin_memory=pin and options.pin_mem and world.device.type == "cuda",
        persistent_workers=workers > 0,
        collate_fn=collate,
        worker_init_fn=ignore_stop_signals,
    )


# -- the copy to the device, and Mixup ---------------------------------------------------------------------------------


def collate(samples: list[Batch] | Batch) -> Batch:
    """Collate single samples; return a batch that was read as a whole unchanged."""
    if isinstance(samples, Batch):
        return samples
    fields = zip(Batch._fields, zip(*samples, strict=True), strict=True)
    return Batch(**{name: default_collate(values) for name, values in fields if values[0] is not None})


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to the device, except for its positions, which stay on the CPU."""
    if batch.images.device == device:
        return batch
    moved = {
        name: value.to(device, non_blocking=device.type == "cuda")  # copies to the host need a sync
        for name, value in batch._asdict().items()
        if value is not None and name != "positions"
    }
    return batch._replace(**moved)


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one copy stream of a GPU; each new stream would keep memory of its own, even after its end."""
    return torch.cuda.Stream(device)


def copied_ahead(loader: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches of `loader` on the device.

    On CUDA, a separate stream copies them. The loop queues the work of a step before it asks for the next batch, so the
    copy runs while the device computes. No batch is read before it is needed.
    """
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in loader)
        return
    copies, computes = copy_stream(device), torch.cuda.current_stream(device)
    for batch in loader:
        with torch.cuda.stream(copies):
            batch = to_device(batch, device)
        computes.wait_stream(copies)
        for tensor in (batch.images, batch.targets, batch.sizes, batch.keys):
            if tensor is not None:
                tensor.record_stream(computes)  # keep its memory until this stream is done with it
        yield batch


def build_mixup(options: MixupOptions, num_classes: int, batch_size: int) -> Mixup | None:
    """Build timm's Mixup/CutMix, or None if both are off; the criterion does the label smoothing.

    Raises:
        UserError: if the batch size does not allow pairs.
    """
    if options.mixup <= 0 and options.cutmix <= 0 and options.cutmix_minmax is None:
        return None
    if batch_size % 2:
        raise UserError(f"--batch-size {batch_size}: Mixup needs an even batch size; pass one, or --mixup 0 --cutmix 0")
    return Mixup(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        cutmix_minmax=list(options.cutmix_minmax) if options.cutmix_minmax else None,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        mode=options.mixup_mode,
        label_smoothing=0.0,
        num_classes=num_classes,
    )
