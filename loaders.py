"""From a source to batches on the device: data-loader workers, views on the host or on the device, Mixup.

`KeyedImages` seeds every generator from the sample's key before it touches the sample: a view depends on nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import shutil
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
from utils import RunError, UserError, World, available_cpus, ignore_stop_signals, logger

MOST_PADDING = 4  # area of the padded buffer, relative to that of the mean image
MOST_WORKERS = 10  # by default, of those that only read stored images
MOST_SOCKET_NAME = 107 if sys.platform == "linux" else 103  # characters, of an AF_UNIX socket

View = Callable[[Image.Image], torch.Tensor] | torch.nn.Module  # on the host, or for batches on the device


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made. The fields are flags of main.py."""

    batch_size: int = 64  # images per process and forward pass
    accum_steps: int = 1  # forward passes per update
    repeated_aug: bool = True  # three views of each of a third of the images per epoch
    class_balanced: bool = False  # draw equally many images of each class
    num_workers: int | None = None  # data-loader workers per rank; None: its CPUs, see `num_workers`
    pin_mem: bool = True  # page-locked batches on CUDA
    seed: int = 0
    cosub: bool = False  # each batch holds its images twice
    augment: str = "auto"  # where views are made: "host", "device" or "auto"
    compile_augment: bool = True  # compile the augmentation on a GPU


@dataclass(frozen=True)
class MixupOptions:
    """Mixup and CutMix. The fields are flags of main.py; see `timm.data.Mixup`."""

    mixup: float = 0.8
    cutmix: float = 1.0
    cutmix_minmax: Sequence[float] | None = None
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"


# -- samples -----------------------------------------------------------------------------------------------------------


class KeyedImages(Dataset):
    """Views of a source's images; takes the `(index, position, key)` of `KeyedSampler`."""

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
    """Batches of stored images, each at the top left of a buffer that has the size of the largest.

    Takes lists of the `(index, position, key)` of `KeyedSampler`.
    """

    def __init__(self, source: Source) -> None:
        """Args: source: images in memory or packed, whose `shapes` are known."""
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
    """Zeros of uint8; in a data-loader worker in shared memory, through which they go without another copy."""
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's collate does; the system clears it
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class DeviceImages(Dataset):
    """`PaddedImages` that live on the device: a batch is selected there."""

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
    _, positions, keys = zip(*samples, strict=True)  # lists become arrays faster than tensors
    return torch.from_numpy(np.array(positions)), torch.from_numpy(np.array(keys, np.uint64).view(np.int64))


def padded_size(source: Source) -> tuple[int, int]:
    """Height and width that hold every image of a source in memory or packed."""
    height, width = source.images.shapes[source.order, :2].max(axis=0).tolist()
    return height, width


def can_pad(source: Data) -> bool:
    """Whether images can be augmented on the device: in memory or packed, and of similar sizes."""
    if not isinstance(source, Source) or not hasattr(source.images, "shapes"):
        return False
    areas = source.images.shapes[source.order, :2].prod(axis=1)
    return np.prod(padded_size(source)) <= MOST_PADDING * areas.mean()


def augments_on_device(source: Data, where: str, views: ViewOptions, device: torch.device) -> bool:
    """Decide whether this source's images become views in batches on the device.

    Args:
        where: `--augment`: "auto", "host" or "device"; "auto" is the device if it is a GPU and supports it all.
        views: `--aa` and `--src`.

    Raises:
        UserError: if "device" is not possible.
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
    """Batches on the device: copied once, and made into views there if `view` is a module.

    Attributes:
        loader: this rank's batches on the host.
        device: where the batches go.
        view: called with a batch's images, sizes and keys; None if the workers have made the views.
        num_images: images of all ranks, each once; 0 if a stream does not say.
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
        """Where views are made, and the versions of the packages that make them.

        "host", "device", or "device, compiled" (compiled views differ in rounding).
        """
        if self.view is None:
            where, code = "host", ("timm", "torchvision", "pillow")
        else:
            where, code = "device", ("torch", "timm")
            if models.is_compiled(self.view):
                where += ", compiled"
        return {"where": where} | {name: version(name) for name in code}

    def close(self) -> None:
        """End the workers, which may ignore SIGTERM."""
        processes = getattr(self.loader, "_iterator", None)  # of a DataLoader with persistent workers
        if processes is not None:
            processes._shutdown_workers()
            for worker in processes._workers:
                worker.kill()  # one that is stuck
            self.loader._iterator = None


@dataclass(kw_only=True)
class EpochLoader(DeviceLoader):
    """Training batches, mixed, of one epoch after the other; `set_epoch` must precede each iteration.

    Attributes:
        counter: yields this epoch's samples.
        num_batches: batches per epoch and rank.
        images_per_batch: images in one batch over all ranks.
        updates_per_epoch: optimizer updates in an epoch.
        mixup_fn: timm's Mixup, or None.
        cosub: a batch holds its images twice, once for each submodel of `losses.CosubLoss`, and its targets once.
        seed, rank: seed Mixup, with the epoch and the step.
        broken: unreadable images so far, or None if none are tolerated.
        epoch, first_step: the epoch to iterate over, and the step to begin with.
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
        """Images in an optimizer update, over all ranks."""
        return self.images_per_batch * self.num_batches // self.updates_per_epoch

    @property
    def num_positions(self) -> int:
        """Views in an epoch, over all ranks."""
        return self.images_per_batch * self.num_batches

    @property
    def is_stream(self) -> bool:
        """Whether the samples have no index."""
        return isinstance(self.counter, StreamingImages)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Turn to an epoch, without reading the batches before `first_step` (which a stream cannot skip)."""
        self.epoch, self.first_step = epoch, first_step
        if self.is_stream:
            self.counter.set_epoch(epoch)
        elif self.counter is not None:
            self.counter.set_epoch(epoch, first_step * self.loader.batch_size)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        batches, done = itertools.islice(super().__iter__(), self.num_batches), self.first_step
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
    """Batches of augmented views, [batch_size, 3, H, W] on each rank, in whole optimizer updates.

    Raises:
        UserError: if the data do not fill one update, or cannot be augmented where `options` say.
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
    """Batches of any views, in whole optimizer updates.

    Raises:
        UserError: if the data do not fill one update, or a batch cannot be mixed.
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
            raise UserError("--class-balanced: a stream cannot be drawn from by class; drop the flag, or pack it first")
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
    """Each image exactly once over all ranks: ranks may differ by one image, nothing is padded.

    Raises:
        UserError: if the data cannot be augmented where `options` say.
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
    """The inputs of the classification layer, as a source of [D] vectors. The images have their evaluation views.

    Every process computes them all.

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
    """The view's module on its device, or None if the workers make the views."""
    if not isinstance(view, torch.nn.Module):
        return None
    # A CPU is faster without compilation: it skips what a sample does not need.
    if options.compile_augment and world.device.type == "cuda":
        if _can_compile():
            view.compile()
        elif world.is_main:
            logger.warning("the augmentation is not compiled, which makes it slower: install Triton and a C compiler")
    return view.to(world.device)


def _can_compile() -> bool:
    """Whether this machine has what torch.compile needs for a GPU."""
    has_compiler = bool(os.environ.get("CC")) or any(map(shutil.which, ("cc", "gcc", "clang")))
    return has_compiler and importlib.util.find_spec("triton") is not None


def _view_loader(source: Source, view: View, sampler: KeyedSampler, options: LoaderOptions, world: World) -> DataLoader:
    """Views, or stored images if `view` makes the views on the device."""
    on_device = isinstance(view, torch.nn.Module)
    workers = num_workers(options, world, on_device)
    if not on_device:
        return _host_loader(KeyedImages(source, view), sampler, workers, options, world)
    images = PaddedImages(source)
    if isinstance(source.images, MemoryImages):  # nothing to read, nothing to copy: no workers
        return _host_loader(DeviceImages(images, world.device), sampler, 0, options, world, pin=False)
    return _host_loader(images, sampler, workers, options, world)


def _stream_loader(source: StreamingImages, view: View, options: LoaderOptions, world: World) -> DataLoader:
    """A stream's views: timm deals its shards out among ranks and workers."""
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
    """Data-loader workers of this rank; `on_device` says that they only read what becomes views on the device."""
    cpus = max(1, available_cpus() // world.local_size)
    default = min(MOST_WORKERS, cpus) if on_device else cpus
    return default if options.num_workers is None else options.num_workers


def _workers_with_shards(reader: Any, workers: int, world: World) -> int:
    """No more workers than WebDataset has shards for: one without a shard would end the epoch early."""
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
    """Make sure that workers can hand batches over: through sockets in the folder of temporary files.

    Raises:
        UserError: if its name is too long for a socket's. The workers would fail, and the main process wait for them.
    """
    folder = tempfile.gettempdir()
    room = MOST_SOCKET_NAME - len("/pymp-12345678/listener-12345678")
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
    """A batch of single samples; one that was read as a whole stays as it is."""
    if isinstance(samples, Batch):
        return samples
    fields = zip(Batch._fields, zip(*samples, strict=True), strict=True)
    return Batch(**{name: default_collate(values) for name, values in fields if values[0] is not None})


def to_device(batch: Batch, device: torch.device) -> Batch:
    """All but the positions; what is there already is not copied."""
    moved = {
        name: value.to(device, non_blocking=device.type == "cuda")  # a copy to the host would not have arrived
        for name, value in batch._asdict().items()
        if value is not None and name != "positions"
    }
    return batch._replace(**moved)


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of copies to a GPU: the allocator keeps the memory of each stream apart, also of a dead one."""
    return torch.cuda.Stream(device)


def copied_ahead(loader: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches of `loader`, on the device.

    On CUDA they are copied on a stream of their own. The loop has its steps queued by the time it asks for the next
    batch, so that its copy runs while the device computes; no batch is read before it is needed.
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
                tensor.record_stream(computes)  # its memory is not to be used again before this stream is done with it
        yield batch


def build_mixup(options: MixupOptions, num_classes: int, batch_size: int) -> Mixup | None:
    """timm's Mixup/CutMix, or None when both are off. Label smoothing belongs to the criterion.

    Raises:
        UserError: if the batch cannot be split into pairs.
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
