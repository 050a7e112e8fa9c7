"""Pack a data set for fast reading: images resized once, in a few large files.

    python -m tools.pack_dataset --data-path /path/to/imagenet --output packed
    python main.py --data-set PACKED --data-path packed ...
    python -m tools.pack_dataset --output packed --verify

--verify reads a pack and compares its checksums. Of the data flags below,
--ram-cache, --allow-class-mismatch and --eval-crop-ratio have no effect here;
a warning says so.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image

import packs
from datasets import DataOptions, build_sources
from flags import Parser, add_data_arguments, fill, in_range, parse_args, spelled, without_effect
from sources import Source
from tools import command
from utils import Progress, RunError, UserError, World, available_cpus, check_space, logger, set_up_logging, write_whole

PROBES = 16  # images used to estimate the pack's size
UNUSED = ("ram_cache", "allow_class_mismatch", "eval_crop_ratio")  # data flags that do not change a pack
MAX_SIDE_RATIO = 1.5  # maximum long side, relative to --size
SHARD_BYTES = 2**30
T, R = TypeVar("T"), TypeVar("R")


def build_parser() -> Parser:
    # main.py replaces broken images by others. This tool drops them.
    parser = Parser(
        prog="python -m tools.pack_dataset", usage="%(prog)s [flags]", description=__doc__, conflict_handler="resolve"
    )
    add_data_arguments(parser)
    parser.set_defaults(data_set=None)
    add = parser.add_argument_group("pack").add_argument
    add("--output", type=Path, required=True, help="folder of the pack")
    add(
        "--size",
        type=in_range(int, 1, 16384),
        default=256,
        metavar="PIXELS",
        help="short side of an image; the long side is at most 1.5 times this: 256 turns 16:9 into 384x216",
    )
    add(
        "--format",
        choices=packs.KINDS,
        default="uint8",
        help="uint8: raw pixels, no decoding; jpeg: about a seventh of the space",
    )
    add("--quality", type=in_range(int, 1, 100), help="JPEG quality, for --format jpeg; default: 90")
    add("--shard-mib", type=in_range(float, 0, open_low=True), default=1024, help="maximum file size in MiB")
    add(
        "--skip-broken-images",
        type=in_range(int, 0),
        default=0,
        metavar="N",
        help="drop up to N training images that cannot be read; validation images are never dropped",
    )
    add("--overwrite", action=argparse.BooleanOptionalAction, default=False, help="replace a pack in --output")
    add(
        "--verify",
        action="store_true",
        help="compare all checksums after packing; without --data-set and --data-path, only verify --output",
    )
    return parser


def find_sources(own: argparse.Namespace) -> dict[str, Source]:
    """Return the data to pack, by split.

    Raises:
        UserError: as main.py, and for a stream.
    """
    # Keep nothing in memory, and drop unreadable images instead of replacing them.
    changed = {"data_set": own.data_set or "IMNET", "ram_cache": 0, "skip_broken_images": 0}
    sources = build_sources(replace(fill(DataOptions, own), **changed))
    defaults = vars(parse_args([]))
    data = {name: value for name, value in vars(own).items() if name in defaults and name not in UNUSED}
    sentences = [f"{spelled(name)} has no effect on a pack" for name in UNUSED if vars(own)[name] != defaults[name]]
    for sentence in sentences + without_effect(argparse.Namespace(**defaults | data | changed)):
        logger.warning(sentence)
    if not all(isinstance(source, Source) for source in sources):
        raise UserError(f"--data-set {own.data_set}: is a stream, which is in large files already; train from it as is")
    return dict(zip(packs.SPLITS, sources, strict=True))


# -- writing a pack ----------------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """An image as it is written to a shard."""

    content: bytes
    height: int
    width: int
    target: int


def reduced(image: Image.Image, size: int) -> Image.Image:
    """Shrink an image until its short side is at most `size` and its long side at most 1.5 · `size` pixels.

    The aspect ratio is kept, so beyond 3:2 the short side becomes shorter than `size`.
    """
    scale = min(size / min(image.size), MAX_SIDE_RATIO * size / max(image.size))
    if scale >= 1:
        return image
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)


def encode(image: Image.Image, target: int, *, kind: str, size: int, quality: int | None) -> Record:
    """Encode an RGB image and its class as a record; `quality` (1 to 100) is for jpeg."""
    image = reduced(image, size)
    content = image.tobytes()
    if kind == "jpeg":
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
        content = stream.getvalue()
    return Record(content, image.height, image.width, target)


def holds_pack(folder: Path) -> bool:
    """Return True if the folder holds a pack, even a damaged one."""
    return (folder / packs.PACK).exists()


def files_of(folder: Path) -> list[Path]:
    """List all files in the folder that are named like those of a pack, including leftovers of a killed process."""
    names = [packs.PACK, *(f"{split}_index.npy" for split in packs.SPLITS)]
    shards = [f"{split}_[0-9][0-9][0-9][0-9][0-9].bin" for split in packs.SPLITS]
    patterns = [*names, *(f".{name}.*.tmp" for name in names), *shards]
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def write_pack(
    folder: Path,
    splits: Mapping[str, Iterable[Record]],
    *,
    kind: str,
    size: int,
    quality: int | None,
    num_classes: int,
    class_names: Sequence[str] = (),
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write a pack, replacing an existing one; return the content of its pack.json.

    Args:
        folder: created if needed.
        splits: records of "train" and "val", consumed one at a time in this order.
        kind, size, quality: arguments of `encode` for these records.
        num_classes: number of classes.
        class_names: class names, if known.
        shard_bytes: maximum size of a shard, unless a single record is larger.

    Raises:
        RunError: if the disk is full or cannot be written.
        UserError: if a split has no images.
    """
    about = {"version": packs.VERSION, "kind": kind, "size": size, "quality": quality}
    about |= {"num_classes": num_classes, "class_names": list(class_names)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        about["splits"] = {split: _write_split(folder, split, splits[split], shard_bytes) for split in splits}
        write_whole(folder / packs.PACK, (json.dumps(about, indent=1) + "\n").encode())
    except BaseException as error:
        with contextlib.suppress(OSError):
            _clear(folder)
        if isinstance(error, OSError):
            raise RunError(f"cannot write to {folder} ({error.strerror or error}); no pack was written") from error
        raise
    return about


def _clear(folder: Path) -> None:
    """Remove a pack or what a killed process has left of it."""
    for path in files_of(folder):  # pack.json first: without it there is no pack
        path.unlink()


def _write_split(folder: Path, split: str, records: Iterable[Record], shard_bytes: int) -> dict[str, Any]:
    """Write shards and index of one split; return its entry in pack.json."""
    index, shards = bytearray(), _Shards(folder, split, shard_bytes)
    try:
        for record in records:
            number, offset = shards.add(record.content)
            row = (number, offset, len(record.content), record.height, record.width, record.target)
            index += np.array((*row, zlib.crc32(record.content)), packs.INDEX).tobytes()
    finally:
        shards.close()
    rows = np.frombuffer(index, packs.INDEX)
    if not len(rows):
        raise UserError(f"--data-path: there are no images for {split}; check the data")
    stream = io.BytesIO()
    np.save(stream, rows)
    write_whole(folder / f"{split}_index.npy", stream.getvalue())
    return {"images": len(rows), "index_crc32": zlib.crc32(rows), "shards": shards.written}


class _Shards:
    """Writer of files of at most `limit` bytes, one after the other."""

    def __init__(self, folder: Path, split: str, limit: int) -> None:
        self.folder, self.split, self.limit = folder, split, limit
        self.written: list[dict[str, Any]] = []  # name, bytes and CRC-32 of each shard
        self.stream: BinaryIO | None = None

    def add(self, content: bytes) -> tuple[int, int]:
        """Append a record; return the index of its shard and its offset there."""
        if self.stream is None or self.written[-1]["bytes"] + len(content) > self.limit:
            self.close()
            name = f"{self.split}_{len(self.written):05d}.bin"
            self.stream = (self.folder / name).open("wb")
            self.written.append({"name": name, "bytes": 0, "crc32": 0})
        shard = self.written[-1]
        offset = shard["bytes"]
        self.stream.write(content)
        shard["bytes"] += len(content)
        shard["crc32"] = zlib.crc32(content, shard["crc32"])
        return len(self.written) - 1, offset

    def close(self) -> None:
        """Sync the open file to disk, because pack.json promises that it is complete."""
        if self.stream is not None:
            with self.stream:
                self.stream.flush()
                os.fsync(self.stream.fileno())
            self.stream = None


# -- reading the images ------------------------------------------------------------------------------------------------


class Reader:
    """Reader of records from a source, which drops a limited number of unreadable training images.

    Args:
        limit: maximum number of dropped images.
        encode: function (image, target) -> record.
    """

    def __init__(self, limit: int, encode: Callable[..., Record]) -> None:
        self.limit, self.encode = limit, encode
        self.skipped: list[str] = []

    def read(self, source: Source, position: int) -> Record | str:
        """Return the record of one image, or a description of its error."""
        try:
            image, target = source[position]
        except RunError as error:
            return f"{source.images.describe(source.order[position])} ({error.__cause__})"
        return self.encode(image, target)

    def records(self, source: Source, split: str, pool: ThreadPoolExecutor) -> Iterator[Record]:
        """Yield the records of a source in order, with only a few in memory at a time.

        Raises:
            RunError: if a validation image or too many training images cannot be read.
        """
        for record in in_order(pool, partial(self.read, source), range(len(source)), 4 * available_cpus()):
            if isinstance(record, Record):
                yield record
                continue
            if split != "train":
                raise RunError(
                    f"cannot read validation image {record}; fix or remove it: --skip-broken-images drops training "
                    f"images only, because an accuracy is that of all validation images"
                )
            if len(self.skipped) == self.limit:
                raise RunError(
                    f"cannot read image {record}, and --skip-broken-images is {self.limit}; fix or remove it, or "
                    f"raise that number"
                )
            self.skipped.append(record)
            logger.warning("skipped: %s", record)

    def length(self, sources: Iterable[Source]) -> float:
        """Estimate the bytes of all records from a few of them."""
        total = 0.0
        for source in sources:
            probes = [self.read(source, position) for position in np.linspace(0, len(source) - 1, PROBES).astype(int)]
            lengths = [len(record.content) for record in probes if isinstance(record, Record)]
            total += len(source) * float(np.mean(lengths or [0]) + packs.INDEX.itemsize)
        return total


def in_order(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Map with a thread pool in order, computing at most `ahead` results in advance."""
    pending: deque = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # if the caller stops early
        for future in pending:
            future.cancel()


def with_progress(records: Iterable[Record], split: str, total: int) -> Iterator[Record]:
    """Yield the same records with a progress bar or log lines."""
    progress = Progress(split, total, "image")
    for record in records:
        yield record
        progress.advance()
    progress.close()


def pack(own: argparse.Namespace) -> dict[str, Any]:
    """Write the pack that the flags describe; return the content of its pack.json.

    Raises:
        UserError: if flags or data are wrong, or the disk is too small.
        RunError: if an image cannot be read, or the disk is full.
    """
    if own.quality is not None and own.format != "jpeg":
        raise UserError("--quality: has no effect on --format uint8; drop the flag, or add --format jpeg")
    if own.output.exists() and not own.output.is_dir():
        raise UserError(f"--output {own.output}: is a file; name a folder")
    if (found := files_of(own.output)) and not own.overwrite:
        what = "a pack" if holds_pack(own.output) else f"{found[0].name}, of an unfinished pack or another program"
        raise UserError(f"--output {own.output}: holds {what}; add --overwrite to replace it, or name another folder")
    if own.data_path and own.output.resolve() == Path(own.data_path).resolve():
        raise UserError(f"--output {own.output}: is the folder of the data; name another")
    sources = find_sources(own)
    quality = (own.quality or 90) if own.format == "jpeg" else None
    settings = {"kind": own.format, "size": own.size, "quality": quality}
    reader = Reader(own.skip_broken_images, partial(encode, **settings))
    reusable = sum(path.stat().st_size for path in files_of(own.output))
    check_space(
        own.output,
        reader.length(sources.values()) - reusable,
        f"--output {own.output}: the pack",
        "lower --size, take --format jpeg, or another disk",
    )
    start = time.perf_counter()
    with ThreadPoolExecutor(available_cpus()) as pool:  # decoding and resizing release the GIL
        # Validation first: it is small, and a single broken image ends the tool.
        splits = {
            split: with_progress(reader.records(sources[split], split, pool), split, len(sources[split]))
            for split in reversed(packs.SPLITS)
        }
        classes = {name: getattr(sources["train"], name) for name in ("num_classes", "class_names")}
        about = write_pack(own.output, splits, **settings, **classes, shard_bytes=int(own.shard_mib * 2**20))
    seconds = time.perf_counter() - start
    images = sum(part["images"] for part in about["splits"].values())
    shards = [shard for part in about["splits"].values() for shard in part["shards"]]
    logger.info(
        "packed %d images into %d files, %.1f MiB, in %.1f s (%.0f images/s), %d skipped",
        images,
        len(shards),
        sum(shard["bytes"] for shard in shards) / 2**20,
        seconds,
        images / seconds,
        len(reader.skipped),
    )
    return about


def check(folder: Path) -> None:
    """Verify a pack.

    Raises:
        UserError: if the pack cannot be opened.
        RunError: if records are damaged.
    """
    damaged = packs.verify(folder, "--output")
    if damaged:
        raise RunError(f"{folder} is damaged: {', '.join(damaged)}; pack it again with python -m tools.pack_dataset")
    logger.info("%s is intact", folder)


def typed(argv: Sequence[str] | None) -> list[str]:
    """Return the flags for packing that were typed, also those typed with their default value."""
    parser, unset = build_parser(), object()
    blank = argparse.Namespace(**{action.dest: unset for action in parser._actions})
    own = vars(parser.parse_args(argv, blank))
    return [spelled(name) for name, value in own.items() if value is not unset and name not in ("output", "verify")]


def main(argv: Sequence[str] | None = None) -> None:
    with command.one_line_errors("pack_dataset"):
        own = build_parser().parse_args(argv)
        set_up_logging(World.alone(torch.device("cpu")))
        packing = own.data_set is not None or own.data_path is not None
        if not packing and not own.verify:
            raise UserError("--data-set: name the data to pack, or add --verify to check the pack in --output")
        if packing:
            pack(own)
        elif given := typed(argv):
            raise UserError(f"{given[0]}: --verify without --data-set and --data-path packs nothing; drop it")
        if own.verify:
            check(own.output)


if __name__ == "__main__":
    main()
