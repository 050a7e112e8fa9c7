"""Sources: images with their classes, in files, in memory, behind another library's reader, or as a stream.

A `Source` is a sequence of (RGB image, class); the classes are known without decoding images.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data.readers import reader_wds
from timm.data.readers.shared_count import SharedCount
from torch.utils.data import IterableDataset, get_worker_info

from augment import ImageError, as_rgb, decoding, open_image, open_rgb
from checkpoints import flags_of
from samplers import Batch, random_key, random_keys, seed_generators, signed
from utils import RunError, UserError, gather, logger, reason

HostView = Callable[[Image.Image], torch.Tensor]
# timm decodes the images of a WebDataset by itself. Through this name it would take any format that Pillow knows.
reader_wds.Image = SimpleNamespace(open=open_image)


class Images(Protocol):
    """Images that are decoded when indexed."""

    def __getitem__(self, index: int) -> Image.Image: ...

    def describe(self, index: int) -> str:
        """Return the name of this image for error messages."""


class BrokenImages:
    """Indices of unreadable images, up to a limit, shared by all data-loader workers of this process."""

    def __init__(self, images: Images, limit: int) -> None:
        """Start without broken images.

        Args:
            images: used for the names in messages.
            limit: number of different broken images to tolerate over all ranks.
        """
        self.images, self.limit = images, limit
        self.found = torch.full((limit + 1,), -1).share_memory_()  # indices, then -1
        self.lock = torch.multiprocessing.Lock()
        self.reported = 0

    def add(self, index: int) -> bool:
        """Record a broken image; return True if the number of different ones is within the limit."""
        with self.lock:
            known = self.found.tolist()
            if index not in known and -1 in known:
                self.found[known.index(-1)] = int(index)
            return int(self.found[-1]) == -1

    def all_found(self) -> list[int]:
        """Return the indices found on all ranks; all ranks must call it."""
        return sorted({int(index) for row in gather(self.found.tolist()) for index in row if index >= 0})

    def found_here(self) -> list[int]:
        """Return the indices found on this rank."""
        return [int(index) for index in self.found.tolist() if index >= 0]

    def restore(self, indices: Sequence[int]) -> None:
        """Restore the indices that a resumed run had found, except for images that have been repaired."""
        for index in indices[: self.limit]:
            try:
                with decoding():
                    self.images[index]
            except ImageError:
                self.add(index)

    def report(self) -> int:
        """Log new broken images and return the number so far, over all ranks; all ranks must call it.

        Raises:
            RunError: on all ranks, if there are too many.
        """
        found = self.all_found()
        if len(found) > self.reported:
            names = ", ".join(self.images.describe(index) for index in found)
            logger.warning("%d images cannot be read and are replaced by others: %s", len(found), names)
        self.reported = len(found)
        if len(found) > self.limit:
            raise RunError(f"{len(found)} images cannot be read, --skip-broken-images is {self.limit}; fix them")
        return len(found)


@dataclass(frozen=True)
class Source:
    """Images with their classes: the samples `order[0]`, `order[1]`, ... of `images`.

    Attributes:
        images: decodes an image.
        targets: class index of each sample of `images`.
        num_classes: number of classes.
        order: which samples of `images` belong to this source.
        class_names: name of each class, or () if the data do not say.
        class_samples: CRC-32 of the first image file of each class, or (); it reveals classes that swapped their names.
        broken: records unreadable images, which are replaced by the next ones; or None.
        is_training: whether --skip-broken-images applies to the images.
    """

    images: Images
    targets: np.ndarray  # [N] int64
    num_classes: int
    order: np.ndarray  # [n] int64
    broken: BrokenImages | None = None
    class_names: tuple[str, ...] = ()
    class_samples: tuple[int, ...] = ()
    is_training: bool = False

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> tuple[Image.Image, int]:
        return self._sample(position, lambda images, index: images[index])

    def array(self, position: int) -> tuple[np.ndarray, int]:
        """Return a sample as uint8 [H, W, 3] and its class, for images in memory or packed."""
        return self._sample(position, lambda images, index: images.array(index))

    def _sample(self, position: int, read: Callable[[Any, int], Any]) -> tuple[Any, int]:
        for _ in range(len(self)):
            index = self.order[position]
            try:
                with decoding():
                    return read(self.images, index), int(self.targets[index])
            except ImageError as error:
                if self.broken is None or not self.broken.add(index):
                    remedy = ", then --resume auto, or skip some with --skip-broken-images" if self.is_training else ""
                    raise RunError(
                        f"cannot read image {self.images.describe(index)} ({error}); fix or remove it{remedy}"
                    ) from error
            position = (position + 1) % len(self)
        raise RunError(f"none of the {len(self)} images can be read; check the folder")

    def label_checksum(self) -> int:
        """Return the CRC-32 of the classes in order."""
        return zlib.crc32(self.targets[self.order])

    def file_names(self) -> bytes:
        """Return the image file names in order, without folders, which may move; b"" if there are none."""
        return self.images.file_names(self.order) if hasattr(self.images, "file_names") else b""


def whole_source(
    images: Images, targets: Sequence[int], class_names: Sequence[str], num_classes: int | None = None
) -> Source:
    """Build a source of all `images`; pass `num_classes` if the classes have no names."""
    targets = np.asarray(targets, dtype=np.int64)
    names = tuple(map(str, class_names))
    return Source(images, targets, len(names) or num_classes, np.arange(len(targets)), class_names=names)


@dataclass(frozen=True)
class Paths:
    """File paths in a few arrays, which processes can share; a list of a million strings takes several times as much.

    A path is a folder, which ends with a slash, and a name. In `folders` and `names`, each is followed by a NUL.
    """

    names: np.ndarray  # uint8
    starts: np.ndarray  # int64 [N + 1], of each name; then the end
    folders: np.ndarray  # uint8
    folder_starts: np.ndarray  # int64 [number of folders + 1]
    folder_of: np.ndarray  # int32 [N]

    @classmethod
    def listed(cls, paths: Iterable[str | Path]) -> Paths:
        """Store paths in their order."""
        index: dict[bytes, int] = {}
        folder_of = array("i")

        def names() -> Iterator[bytes]:
            for path in map(os.fsencode, paths):
                length = path.rfind(b"/") + 1
                folder_of.append(index.setdefault(path[:length], len(index)))
                yield path[length:]

        joined, starts = _joined(names())
        return cls(joined, starts, *_joined(index), np.frombuffer(folder_of, np.int32))

    def __len__(self) -> int:
        return len(self.folder_of)

    def __getitem__(self, index: int) -> bytes:
        folder = self.folder_of[index]
        start, end = self.folder_starts[folder : folder + 2]
        first, last = self.starts[index : index + 2]
        return self.folders[start : end - 1].tobytes() + self.names[first : last - 1].tobytes()

    def file_names(self, order: np.ndarray) -> bytes:
        """Return the names without folders, separated by NULs."""
        parts = []
        for part in np.array_split(order, len(order) // 2**13 + 1):
            starts, lengths = self.starts[part], self.starts[part + 1] - self.starts[part]
            shifts = starts - np.cumsum(lengths) + lengths
            parts.append(self.names[np.repeat(shifts, lengths) + np.arange(lengths.sum())].tobytes())
        return b"".join(parts)[:-1]


def _joined(texts: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Join texts, each followed by a NUL; return them as uint8, and the start of each plus the end."""
    joined, starts = bytearray(), array("q", [0])
    for text in texts:
        joined += text + b"\0"
        starts.append(len(joined))
    return np.frombuffer(joined, np.uint8), np.frombuffer(starts, np.int64)


class PathImages:
    """Image files."""

    def __init__(self, paths: Paths | Iterable[str | Path], upright: bool = False) -> None:
        """Keep the paths.

        Args:
            upright: rotate photos by their EXIF orientation.
        """
        self.paths, self.upright = paths if isinstance(paths, Paths) else Paths.listed(paths), upright

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        return open_rgb(self.describe(index), upright=self.upright)

    def describe(self, index: int) -> str:
        return os.fsdecode(self.paths[index])

    def file_names(self, order: np.ndarray) -> bytes:
        return self.paths.file_names(order)


def as_tensors(parts: Sequence[Source]) -> list[dict[str, Any]]:
    """Convert sources of image files to plain values, for `from_tensors`; shared arrays stay shared."""
    tensors: dict[int, torch.Tensor] = {}

    def tensor(values: np.ndarray) -> torch.Tensor:
        return tensors.setdefault(id(values), torch.from_numpy(values))

    return [
        {
            "paths": {name: tensor(values) for name, values in vars(part.images.paths).items()},
            "targets": tensor(part.targets),
            "order": tensor(part.order),
            "num_classes": part.num_classes,
            "class_names": list(part.class_names),
            "class_samples": list(part.class_samples),
        }
        for part in parts
    ]


def from_tensors(parts: Sequence[dict[str, Any]]) -> list[Source]:
    """Rebuild the sources of `as_tensors` without copying."""
    return [
        Source(
            images=PathImages(Paths(**{name: values.numpy() for name, values in part["paths"].items()})),
            targets=part["targets"].numpy(),
            num_classes=part["num_classes"],
            order=part["order"].numpy(),
            class_names=tuple(part["class_names"]),
            class_samples=tuple(part["class_samples"]),
        )
        for part in parts
    ]


class MemoryImages:
    """Decoded images in one uint8 buffer, shared with forked data-loader workers."""

    def __init__(self, arrays: Sequence[np.ndarray], names: bytes = b"") -> None:
        """Copy the images into the buffer.

        Args:
            arrays: uint8 [H, W, 3] each, of any sizes.
            names: names of the files that they are from.
        """
        self.names = names
        self.shapes = np.array([array.shape for array in arrays])
        self.ends = np.cumsum(self.shapes.prod(axis=1))
        self.pixels = np.concatenate([array.ravel() for array in arrays])

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.array(index))

    def array(self, index: int) -> np.ndarray:
        """Return uint8 [H, W, 3], not a copy."""
        end, shape = self.ends[index], self.shapes[index]
        return self.pixels[end - shape.prod() : end].reshape(shape)

    def describe(self, index: int) -> str:
        return f"number {index} in memory"

    def file_names(self, order: np.ndarray) -> bytes:
        return self.names


def read_rgb(image: Any) -> Image.Image:
    """Convert what a reader returns to RGB: a decoded or encoded image, or Hugging Face's dict of bytes and path.

    Raises:
        ImageError: see `augment.open_rgb`.
    """
    if isinstance(image, Image.Image):
        return as_rgb(image)
    if isinstance(image, dict):
        image = image["bytes"] or image["path"]
    return open_rgb(io.BytesIO(image) if isinstance(image, bytes) else image)


class DatasetImages:
    """Images of a torchvision data set, or of a timm reader, which returns encoded files."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name
        if hasattr(dataset, "loader"):  # torchvision's would make 16-bit images white
            dataset.loader = open_rgb

    def __getitem__(self, index: int) -> Image.Image:
        if hasattr(self.dataset, "image_key"):  # timm's reader of Hugging Face data would open any path, a FIFO too
            return read_rgb(self.dataset.dataset[int(index)][self.dataset.image_key])
        return read_rgb(self.dataset[int(index)][0])

    def describe(self, index: int) -> str:
        return f"number {index} of {self.name}"


def with_classes(source: Data, class_names: Sequence[str], what: str) -> Data:
    """Renumber the classes of data to be evaluated to those of a checkpoint, if it has all of them.

    Args:
        class_names: of the checkpoint.
        what: flag and file of the checkpoint, for messages.

    Raises:
        UserError: if it is a stream.
    """
    ours, theirs = set(source.class_names), set(class_names)
    if not ours or not ours <= theirs or source.class_names == tuple(class_names) or len(theirs) < len(class_names):
        return source
    if isinstance(source, StreamingImages):
        raise UserError(f"{what}: numbers the classes of this stream otherwise, which is not supported; pack it first")
    if ours == theirs:
        logger.info("%s: has the same classes in another order; those of the data are renumbered", what)
    else:
        logger.info("%s: evaluating %d of its %d classes", what, len(ours), len(theirs))
    index = np.array([class_names.index(name) for name in source.class_names])
    names = tuple(class_names)
    return replace(source, targets=index[source.targets], num_classes=len(names), class_names=names, class_samples=())


def _by_class(source: Source) -> list[np.ndarray]:
    """Return the positions of the images of each class, in ascending order."""
    labels = source.targets[source.order]
    ends = np.cumsum(np.bincount(labels, minlength=source.num_classes))
    return np.split(np.argsort(labels, kind="stable"), ends[:-1])


def take_fraction(source: Data, fraction: float) -> Data:
    """Select a fixed, class-balanced part: round(fraction · n) images of each class, at least one.

    The part does not depend on the run's seed. A larger fraction contains a smaller one.
    """
    if fraction >= 1:
        return source
    if isinstance(source, StreamingImages):
        raise UserError("--train-fraction: a stream cannot be divided by class; drop the flag")
    keys = random_keys(0, "train-fraction", source.order)
    chosen = []
    for members in _by_class(source):
        count = max(1, round(fraction * len(members))) if len(members) else 0
        chosen.append(members[np.argsort(keys[members], kind="stable")[:count]])
    return replace(source, order=source.order[np.sort(np.concatenate(chosen))])


def hold_out(source: Source, fraction: float) -> tuple[Source, Source]:
    """Split image files into two parts by class; of each class, round(fraction · n) images are held out.

    Each part gets at least one image of each class. The file names decide which images are held out, so adding images
    to a class changes the split of few others.

    Raises:
        UserError: if a class has only one image.
    """
    is_held_out = np.zeros(len(source), dtype=bool)
    for label, members in enumerate(_by_class(source)):
        if len(members) < 2:
            name = source.class_names[label]
            raise UserError(
                f"--val-fraction {fraction:g}: class {name} has {len(members)} images, at least 2 are needed"
            )
        names = source.images.file_names(source.order[members]).split(b"\0")
        keys = [hashlib.sha256(name).digest() for name in names]
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        is_held_out[members[sorted(range(len(members)), key=keys.__getitem__)[:count]]] = True
    return replace(source, order=source.order[~is_held_out]), replace(source, order=source.order[is_held_out])


def describe_images(data: Data) -> dict[str, int | None]:
    """Return the number of images and the CRC-32 of their classes and file names, None if unknown."""
    if not isinstance(data, Source):
        return {"images": len(data), "labels": None, "file_names": None}
    return {"images": len(data), "labels": data.label_checksum(), "file_names": zlib.crc32(data.file_names())}


def check_held_out(train: Data, checkpoint: Mapping[str, Any], fraction: float, what: str) -> None:
    """Warn if images that count as held out may have been trained on.

    Args:
        train: training part of the data.
        checkpoint: its `run` holds the CRC-32 of the training part's file names.
        fraction: `--val-fraction` of the data.
        what: flag and file of the checkpoint, for messages.
    """
    run, flags = checkpoint.get("run"), flags_of(checkpoint)
    trained = run.get("file_names") if isinstance(run, Mapping) else None
    share, then = (flags.get(name) for name in ("train_fraction", "val_fraction"))
    if fraction and trained and isinstance(train, Source) and len(train):
        part = take_fraction(train, share if isinstance(share, float) and share > 0 else 1.0)
        if zlib.crc32(part.file_names()) != trained:
            logger.warning(
                "%s: was trained on other files than those that --val-fraction %g leaves to train, so it may have been "
                "trained on some of the evaluated images; evaluate images that were added later, in a folder val/",
                what,
                fraction,
            )
    elif not fraction and isinstance(then, float) and then > 0:
        logger.warning(
            "%s: --val-fraction %g of its training is not applied to other data; if they are the same images, pass "
            "--val-fraction %g to evaluate only those held out",
            what,
            then,
            then,
        )


def keep_in_memory(source: Data, limit_mb: float) -> Data:
    """Decode all images once if they fit in `limit_mb` MiB (estimated from 16 of them); else return the source."""
    if isinstance(source, StreamingImages) or isinstance(source.images, MemoryImages) or limit_mb <= 0:
        return source
    probes = np.linspace(0, len(source) - 1, 16).astype(int)
    sizes = [np.prod((*source[probe][0].size, 3)) for probe in probes]
    if np.mean(sizes) * len(source) > limit_mb * 2**20:
        return source

    def read(positions: range) -> list[tuple[np.ndarray, int]]:
        return [_decoded(source, position) for position in positions]

    blocks = [range(start, min(start + 256, len(source))) for start in range(0, len(source), 256)]
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter's lock
        samples = itertools.chain.from_iterable(pool.map(read, blocks))
        arrays, targets = zip(*samples, strict=True)
    targets = np.asarray(targets, dtype=np.int64)
    images, order = MemoryImages(arrays, source.file_names()), np.arange(len(targets))
    return replace(source, images=images, targets=targets, order=order)


def _decoded(source: Source, position: int) -> tuple[np.ndarray, int]:
    if hasattr(source.images, "array"):
        return source.array(position)
    image, target = source[position]
    return np.asarray(image), target


# -- streams ----------------------------------------------------------------------------------------------------------


class StreamingImages(IterableDataset):
    """A timm stream, whose own shuffling sets the order; a view's key depends on its position in the stream.

    A WebDataset is shuffled by the run's seed and the epoch.

    For training, timm distributes shards over ranks and data-loader workers, so the order depends on their numbers. For
    evaluation, each rank reads the whole stream and keeps its share, which is exact but decodes everything.
    """

    def __init__(
        self, dataset: Any, num_classes: int, training: bool, name: str, class_names: tuple[str, ...] = ()
    ) -> None:
        self.dataset, self.num_classes, self.training, self.name = dataset, num_classes, training, name
        self.class_names = class_names  # or () if the stream does not name them
        self.class_samples: tuple[int, ...] = ()
        self.transform: HostView | None = None
        self.seed, self.rank, self.world_size = 0, 0, 1
        self.epoch = SharedCount(0)  # persistent workers must see it change
        if not training:
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1

    def __len__(self) -> int:
        return self.dataset.reader.num_samples  # of all ranks; timm's own length is one rank's

    def set_epoch(self, epoch: int) -> None:
        self.epoch.value = epoch
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if self.training and isinstance(self.dataset.reader, reader_wds.ReaderWds):
            self._restart(worker, number, workers)
        for count, (image, target) in enumerate(self._samples()):
            position = count * workers + number
            if self.training:
                position = position * self.world_size + self.rank
            elif position % self.world_size != self.rank:
                continue
            key = random_key(self.seed, "view", self.epoch.value, position)
            seed_generators(key)
            try:
                with decoding():
                    rgb = read_rgb(image)
            except ImageError as error:
                raise RunError(
                    f"--data-set {self.name}: cannot read image number {position} ({error}); fix or remove it"
                ) from error
            yield Batch(self.transform(rgb), target, position, keys=signed(key))

    def _restart(self, worker: Any, number: int, workers: int) -> None:
        """Let timm shuffle a WebDataset anew; its generator would continue where the last epoch ended.

        Then the order is a function of seed, epoch, rank and worker, for given numbers of ranks and workers.
        """
        reader = self.dataset.reader
        reader.ds, reader.worker_info, reader.worker_id, reader.num_workers = None, worker, number, workers
        reader.global_num_workers = reader.dist_num_replicas * workers
        reader.global_worker_id = reader.dist_rank * workers + number
        reader.worker_seed = random_key(self.seed, "stream", self.epoch.value, self.rank, number)

    def _samples(self) -> Iterator[tuple[Image.Image, int]]:
        """Yield images and classes.

        Raises:
            RunError: if the stream cannot be read, or a label is not one of the classes.
        """
        try:
            for image, label in self.dataset:
                target = class_index(label)
                if target is None or not 0 <= target < self.num_classes:
                    raise RunError(
                        f"--data-set {self.name}: has the label {label!r}, which is not one of the {self.num_classes} "
                        f"classes; check --num-classes and --label-column"
                    )
                yield image, target
        except RunError:
            raise
        except Exception as error:  # each backend has errors of its own
            raise RunError(
                f"--data-set {self.name}: the stream cannot be read ({type(error).__name__}: {reason(error)}); check "
                f"the data, --image-column and --label-column"
            ) from error


Data = Source | StreamingImages


def class_index(label: Any) -> int | None:
    """Convert a label to an integer; None if it is not one, such as text or a list."""
    try:
        return int(label) if int(label) == float(label) else None
    except (TypeError, ValueError, OverflowError):
        return None
