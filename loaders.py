"""From a source to batches on the device: data-loader workers, views on the host or on the device, Mixup.

`KeyedImages` seeds every generator from the sample's key before it touches the sample: a view depends on nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.readers.reader_wds import ReaderWds
from torch.utils.data import DataLoader, Dataset, default_collate

from datasets import BrokenImages, MemoryImages, Source, StreamingImages
from samplers import Batch, KeyedSampler, seed_generators
from utils import UserError, World, ignore_stop_signals, logger

MOST_PADDING = 4  # area of a padded buffer, in that of the average image


# -- views -------------------------------------------------------------------------------------------------------------


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
        return Batch(self.transform(image), target, position)


class FramedImages(Dataset):
    """Batches of images as they are stored, each at the top left of a frame that takes the largest.

    Takes lists of the `(index, position, key)` of `KeyedSampler`.
    """

    def __init__(self, source: Source) -> None:
        """Args: source: images in memory or packed, whose `shapes` are known."""
        self.source, self.frame = source, frame_of(source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, samples: Sequence[tuple[int, int, int]]) -> Batch:
        frames = np.zeros((len(samples), *self.frame, 3), np.uint8)
        sizes, targets = np.empty((len(samples), 2), np.int64), np.empty(len(samples), np.int64)
        for number, (index, _, _) in enumerate(samples):
            pixels, targets[number] = self.source.array(index)
            height, width = sizes[number] = pixels.shape[:2]
            frames[number, :height, :width] = pixels
        positions = torch.tensor([position for _, position, _ in samples])
        images = torch.from_numpy(frames).permute(0, 3, 1, 2)
        return Batch(images, torch.from_numpy(targets), positions, torch.from_numpy(sizes))


class DeviceImages(Dataset):
    """`FramedImages` that live on the device: a batch is picked there."""

    def __init__(self, images: FramedImages, device: torch.device) -> None:
        batch = images.__getitems__([(index, index, 0) for index in range(len(images))])
        self.images, self.targets = batch.images.contiguous().to(device), batch.targets.to(device)
        self.sizes = batch.sizes.to(device)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, samples: Sequence[tuple[int, int, int]]) -> Batch:
        index, positions = (torch.tensor(numbers) for numbers in list(zip(*samples, strict=True))[:2])
        index = index.to(self.images.device, non_blocking=True)
        stored = (self.images, self.targets, self.sizes)
        images, targets, sizes = (each.index_select(0, index) for each in stored)
        return Batch(images, targets, positions, sizes)


def fits_frames(source: Source | StreamingImages) -> bool:
    """Whether images can be augmented on the device: in memory or packed, and not of all too different sizes."""
    if not isinstance(source, Source) or not hasattr(source.images, "shapes"):
        return False
    areas = source.images.shapes[source.order, :2].prod(axis=1)
    return np.prod(frame_of(source)) <= MOST_PADDING * areas.mean()


def frame_of(source: Source) -> tuple[int, int]:
    """Height and width that take every image of a source in memory or packed."""
    height, width = source.images.shapes[source.order, :2].max(axis=0).tolist()
    return height, width


# -- loaders ----------------------------------------------------------------------------------------------------------


@dataclass
class EpochLoader:
    """Batches of one epoch after the other; `set_epoch` must precede each iteration.

    Attributes:
        loader: this rank's batches.
        counter: what has to know the epoch.
        num_batches: batches per epoch and rank.
        images_per_batch: images in one batch of every rank together.
        updates_per_epoch: optimiser updates in an epoch.
        broken: images that could not be read so far, or None if none are tolerated.
    """

    loader: DataLoader
    counter: KeyedSampler | StreamingImages
    num_batches: int
    images_per_batch: int
    updates_per_epoch: int
    broken: BrokenImages | None = None

    @property
    def images_per_update(self) -> int:
        """Images in an optimiser update, over all ranks."""
        return self.images_per_batch * self.num_batches // self.updates_per_epoch

    def set_epoch(self, epoch: int) -> None:
        self.counter.set_epoch(epoch)

    def skip(self, num_batches: int) -> None:
        """Leave out so many batches of the epoch, unread. (A stream cannot.)"""
        self.counter.set_epoch(self.counter.epoch, num_batches * self.loader.batch_size)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(iter(self.loader), self.num_batches)


class DeviceLoader(DataLoader):
    """A loader of stored images, which become views on the device.

    Attributes:
        view: module called with a batch's images and sizes, and what `arguments` gives for it.
    """

    view: torch.nn.Module
    device: torch.device
    arguments: Callable[[Batch], tuple[torch.Tensor, ...]]

    def __iter__(self) -> Iterator[Batch]:
        for batch in copied_ahead(super().__iter__(), self.device):
            images = self.view(batch.images, batch.sizes, *self.arguments(batch))
            yield Batch(images, batch.targets, batch.positions)


View = Callable[[Image.Image], torch.Tensor] | torch.nn.Module


def build_train_loader(
    source: Source | StreamingImages,
    view: View,
    *,
    batch_size: int,
    accum_steps: int,
    repeats: int,
    seed: int,
    num_workers: int,
    pin_memory: bool,
    world: World,
) -> EpochLoader:
    """Batches of [batch_size, 3, H, W] on each rank, in whole optimiser updates.

    Args:
        view: what makes a view of an image on the host, or the module that does so for batches on the device.

    Raises:
        UserError: if the data do not fill one update.
    """
    per_update = batch_size * accum_steps * world.size
    if len(source) < per_update:
        raise UserError(
            f"--batch-size {batch_size}: an update takes {per_update} images (batch size x processes x --accum-steps), "
            f"the training data hold {len(source)}; lower --batch-size"
        )
    updates = len(source) // per_update
    counts = {
        "num_batches": updates * accum_steps,
        "images_per_batch": batch_size * world.size,
        "updates_per_epoch": updates,
    }
    if isinstance(source, StreamingImages):
        source.transform, source.seed, source.rank, source.world_size = view, seed, world.rank, world.size
        reader = source.dataset.reader
        reader.dist_rank, reader.dist_num_replicas = world.rank, world.size
        reader.common_seed, reader.batch_size = seed, batch_size
        num_workers = _workers_with_shards(reader, num_workers, world)
        source.dataset.set_loader_cfg(num_workers=num_workers)
        if repeats > 1:
            logger.info("repeated augmentation needs an index, which a stream has not: each image is seen once")
        loader = _loader(source, None, batch_size, num_workers, pin_memory)
        return EpochLoader(loader, source, **counts)

    def keys(batch: Batch) -> tuple[torch.Tensor]:
        keys = torch.from_numpy(sampler.keys(batch.positions.numpy()).view(np.int64))
        return (keys.to(world.device, non_blocking=True),)

    sampler = KeyedSampler(
        len(source), seed=seed, repeats=repeats, rank=world.rank, world_size=world.size, multiple=per_update
    )
    logger.info(
        "an epoch holds %d views of %d different images (of %d), in %d updates",
        *(sampler.num_positions, sampler.num_distinct, len(source), updates),
    )
    loader = _view_loader(source, view, sampler, keys, batch_size, num_workers, pin_memory, world.device)
    return EpochLoader(loader, sampler, **counts, broken=source.broken)


def _workers_with_shards(reader: Any, num_workers: int, world: World) -> int:
    """No more loader processes than WebDataset has shards for: one without a shard would end the epoch early."""
    if not isinstance(reader, ReaderWds):
        return num_workers
    shards = len(reader.split_info.filenames)
    if shards < world.size:
        raise UserError(
            f"--data-set wds/: {shards} training shards do not reach {world.size} processes; write more shards, or "
            f"start fewer processes"
        )
    return min(num_workers, shards // world.size)


def build_eval_loader(
    source: Source | StreamingImages,
    view: View,
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    world: World,
) -> DataLoader:
    """Each image exactly once over all ranks: ranks may differ by one image, nothing is padded."""
    if isinstance(source, StreamingImages):
        source.transform, source.rank, source.world_size = view, world.rank, world.size
        return _loader(source, None, batch_size, 0, pin_memory)
    sampler = KeyedSampler(len(source), shuffle=False, rank=world.rank, world_size=world.size)
    return _view_loader(source, view, sampler, lambda _: (), batch_size, num_workers, pin_memory, world.device)


def _view_loader(
    source: Source,
    view: View,
    sampler: KeyedSampler,
    arguments: Callable[[Batch], tuple[torch.Tensor, ...]],
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    device: torch.device,
) -> DataLoader:
    """A loader whose views are made where `view` makes them."""
    if not isinstance(view, torch.nn.Module):
        return _loader(KeyedImages(source, view), sampler, batch_size, num_workers, pin_memory)
    images = FramedImages(source)
    if isinstance(source.images, MemoryImages):  # nothing to read, nothing to copy: no processes
        images, num_workers, pin_memory = DeviceImages(images, device), 0, False
    loader = _loader(images, sampler, batch_size, num_workers, pin_memory, DeviceLoader)
    loader.view, loader.arguments, loader.device = view.to(device), arguments, device
    return loader


def _loader(
    dataset: Dataset,
    sampler: KeyedSampler | None,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    kind: type[DataLoader] = DataLoader,
) -> DataLoader:
    return kind(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        collate_fn=collate,
        worker_init_fn=ignore_stop_signals,
    )


@contextlib.contextmanager
def closing_workers(*loaders: Any) -> Iterator[None]:
    """Afterwards, end the processes of these loaders, which may not heed SIGTERM."""
    try:
        yield
    finally:
        for loader in loaders:
            processes = getattr(loader, "_iterator", None)  # of a DataLoader whose processes persist
            if processes is not None:
                processes._shutdown_workers()
                loader._iterator = None


# -- Mixup and the way to the device -----------------------------------------------------------------------------------


def collate(samples: list[Batch] | Batch) -> Batch:
    """A batch of single samples; one that was read as a whole stays as it is."""
    return samples if isinstance(samples, Batch) else Batch(*default_collate([sample[:3] for sample in samples]))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """All but the positions; what is there already is not copied."""
    images, targets = (tensor.to(device, non_blocking=True) for tensor in batch[:2])
    sizes = None if batch.sizes is None else batch.sizes.to(device, non_blocking=True)
    return Batch(images, targets, batch.positions, sizes)


def copied_ahead(loader: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches of `loader`, on the device.

    On CUDA they are copied on a stream of their own. The loop has its steps queued by the time it asks for the next
    batch, so that its copy runs while the device computes; no batch is read before it is asked for.
    """
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in loader)
        return
    copies, computes = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for batch in loader:
        with torch.cuda.stream(copies):
            batch = to_device(batch, device)
        computes.wait_stream(copies)
        for tensor in (batch.images, batch.targets, batch.sizes):
            if tensor is not None:
                tensor.record_stream(computes)  # its memory is not to be used again before this stream is done with it
        yield batch


def build_prepare(device: torch.device, mixup: Mixup | None) -> Callable[[Batch], Batch]:
    """What happens to a training batch between loader and model: to the device, then Mixup or CutMix."""

    def prepare(batch: Batch) -> Batch:
        batch = to_device(batch, device)
        if mixup is None:
            return batch
        images, targets = mixup(batch.images, batch.targets)
        return Batch(images, targets, batch.positions)

    return prepare


def build_mixup(
    *,
    mixup: float,
    cutmix: float,
    cutmix_minmax: Sequence[float] | None,
    prob: float,
    switch_prob: float,
    mode: str,
    num_classes: int,
    batch_size: int,
) -> Mixup | None:
    """timm's Mixup/CutMix, or None when both are off. Smoothing is the criterion's affair.

    Raises:
        UserError: if the batch cannot be paired off.
    """
    if mixup <= 0 and cutmix <= 0 and cutmix_minmax is None:
        return None
    if batch_size % 2:
        raise UserError(
            f"--batch-size {batch_size}: Mixup pairs images off and needs an even batch; or --mixup 0 --cutmix 0"
        )
    return Mixup(
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        cutmix_minmax=list(cutmix_minmax) if cutmix_minmax else None,
        prob=prob,
        switch_prob=switch_prob,
        mode=mode,
        label_smoothing=0.0,
        num_classes=num_classes,
    )
