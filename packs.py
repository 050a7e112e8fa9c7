"""Packed data sets: all images in a few large files, reduced once, so that reading one costs next to nothing.

`tools/pack_dataset.py` writes such a folder, `--data-set PACKED` reads it:

    pack.json         format version, kind of record, sizes, checksums; written last: without it there is no pack
    train_index.npy   a row of `INDEX` for each image: where its record is, what it shows, its checksum
    train_00000.bin   the records, one after the other
    val_...           likewise

A record of kind uint8 is the pixels, [height, width, RGB], row by row; one of kind jpeg is a JPEG file.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils import RunError, UserError, write_whole

VERSION = 1
PACK = "pack.json"
KINDS = ("uint8", "jpeg")
SPLITS = ("train", "val")
LONGEST = 1.5  # longest side of an image in a pack, in its size
SHARD_BYTES = 2**30
INDEX = np.dtype(
    [(name, "<u8" if name == "offset" else "<u4") for name in
     ("shard", "offset", "length", "height", "width", "target", "crc32")]
)  # fmt: skip


# -- writing -----------------------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """An image as it goes into a shard."""

    content: bytes
    height: int
    width: int
    target: int


def reduced(image: Image.Image, size: int) -> Image.Image:
    """An image whose short side is `size` and whose long side is at most 1.5 · `size` pixels; none is enlarged.

    The aspect is kept, so the short side of a very long image is shorter than `size`.
    """
    scale = min(size / min(image.size), LONGEST * size / max(image.size))
    if scale >= 1:
        return image
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)


def encode(image: Image.Image, target: int, *, kind: str, size: int, quality: int | None) -> Record:
    """The record of an RGB image and its class; `quality` (1 to 100) is that of a jpeg."""
    image = reduced(image, size)
    content = image.tobytes()
    if kind == "jpeg":
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
        content = stream.getvalue()
    return Record(content, image.height, image.width, target)


def holds_pack(folder: Path) -> bool:
    """Whether there is a pack, sound or not, in the folder."""
    return (folder / PACK).exists()


def files_of(folder: Path) -> list[Path]:
    """All files in the folder that are named as those of a pack, also what a killed process has left of one."""
    names = [PACK, *(f"{split}_index.npy" for split in SPLITS)]
    shards = [f"{split}_[0-9][0-9][0-9][0-9][0-9].bin" for split in SPLITS]
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
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write a pack, over what there may be of another one; what is in its pack.json.

    Args:
        folder: made if it does not exist.
        splits: records of "train" and "val", which are taken one at a time.
        kind, size, quality: how the records were made by `encode`.
        num_classes: number of classes.
        shard_bytes: a shard is no longer than this, unless a single record is.

    Raises:
        RunError: if the disk takes no more.
        UserError: if a split has no images.
    """
    about = {"version": VERSION, "kind": kind, "size": size, "quality": quality, "num_classes": num_classes}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in files_of(folder):  # pack.json first: from here on there is no pack
            path.unlink()
        about["splits"] = {split: _write_split(folder, split, splits[split], shard_bytes) for split in SPLITS}
        write_whole(folder / PACK, (json.dumps(about, indent=1) + "\n").encode())
    except OSError as error:
        raise RunError(f"cannot write to {folder} ({error.strerror or error}); it holds no pack yet") from error
    return about


def _write_split(folder: Path, split: str, records: Iterable[Record], shard_bytes: int) -> dict[str, Any]:
    """Shards and index of one split; what pack.json says of them."""
    index, shards = bytearray(), _Shards(folder, split, shard_bytes)
    try:
        for record in records:
            number, offset = shards.add(record.content)
            row = (number, offset, len(record.content), record.height, record.width, record.target)
            index += np.array((*row, zlib.crc32(record.content)), INDEX).tobytes()
    finally:
        shards.close()
    rows = np.frombuffer(index, INDEX)
    if not len(rows):
        raise UserError(f"--data-path: there are no images for {split}; check the data")
    stream = io.BytesIO()
    np.save(stream, rows)
    write_whole(folder / f"{split}_index.npy", stream.getvalue())
    return {"images": len(rows), "index_crc32": zlib.crc32(rows), "shards": shards.written}


class _Shards:
    """Files of at most so many bytes, filled one after the other."""

    def __init__(self, folder: Path, split: str, limit: int) -> None:
        self.folder, self.split, self.limit = folder, split, limit
        self.written: list[dict[str, Any]] = []  # name, bytes and CRC-32 of each
        self.stream: BinaryIO | None = None

    def add(self, content: bytes) -> tuple[int, int]:
        """Append a record; its shard's number and its place there."""
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
        """Bring the open file to the disk: a pack.json promises that all is there."""
        if self.stream is not None:
            with self.stream:
                self.stream.flush()
                os.fsync(self.stream.fileno())
            self.stream = None


def check_space(folder: Path, needed: float) -> None:
    """Make sure that a pack of so many bytes has room, in place of what is there of another one.

    Raises:
        UserError: if it has not.
    """
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free + sum(path.stat().st_size for path in files_of(folder))
    if needed > free:
        raise UserError(
            f"--output {folder}: the pack takes about {needed / 2**20:.0f} MiB, the disk has {free / 2**20:.0f}; lower "
            f"--size, take --format jpeg, or another disk"
        )


# -- reading -----------------------------------------------------------------------------------------------------------


def _broken(flag: str, folder: Path, what: str) -> UserError:
    return UserError(f"{flag} {folder}: {what}; pack it again with python -m tools.pack_dataset")


def read_about(folder: Path, flag: str = "--data-path") -> dict[str, Any]:
    """What pack.json says; `flag` is the one that named the folder.

    Raises:
        UserError: if there is no such file, or none that this version reads.
    """
    try:
        about = json.loads((folder / PACK).read_bytes())
        version = about["version"]
    except FileNotFoundError:
        raise _broken(flag, folder, f"has no {PACK}, so there is no pack, or none that was finished") from None
    except (OSError, ValueError, LookupError, TypeError):
        raise _broken(flag, folder, f"{PACK} is damaged") from None
    if version != VERSION:
        raise _broken(flag, folder, f"is a pack of format version {version}, and this program reads {VERSION}")
    return about


class PackImages:
    """The images of one split of a pack.

    The shards are mapped into memory when first read, by each process for itself; a pickle holds only the folder's
    name, so that it is small and other processes open the pack anew.

    Attributes:
        kind: "uint8" or "jpeg".
        targets: class indices, int64 [N].
        shapes: height, width and 3 of each image, int64 [N, 3].
        num_classes: number of classes.
        index: rows of `INDEX`, [N], mapped into memory.

    Raises:
        UserError: if a file is missing, truncated, damaged (as far as that shows without reading the shards) or of
            another version.
    """

    def __init__(self, folder: str | Path, split: str, flag: str = "--data-path") -> None:
        """Args: split: "train" or "val"; flag: the one that named the folder, for error messages."""
        self.folder, self.split = Path(folder), split
        about = read_about(self.folder, flag)
        try:
            part = about["splits"][split]
            self.kind, self.num_classes, self.shards = about["kind"], int(about["num_classes"]), part["shards"]
            if self.kind not in KINDS:
                raise ValueError
            self._check_lengths(flag)
            self.index = self._read_index(part["images"], part["index_crc32"], flag)
        except (LookupError, TypeError, ValueError):
            raise _broken(flag, self.folder, f"{PACK} is damaged") from None
        self.targets = self.index["target"].astype(np.int64)
        self.shapes = np.full((len(self.index), 3), 3, np.int64)
        self.shapes[:, 0], self.shapes[:, 1] = self.index["height"], self.index["width"]
        self._mapped: dict[int, np.ndarray] = {}

    def _check_lengths(self, flag: str) -> None:
        for shard in self.shards:
            try:
                length = (self.folder / shard["name"]).stat().st_size
            except OSError as error:
                raise _broken(flag, self.folder, f"{shard['name']} cannot be read ({error.strerror})") from None
            if length != shard["bytes"]:
                raise _broken(flag, self.folder, f"{shard['name']} has {length} bytes in place of {shard['bytes']}")

    def _read_index(self, length: int, checksum: int, flag: str) -> np.ndarray:
        name = f"{self.split}_index.npy"
        try:
            index = np.load(self.folder / name, mmap_mode="r").view(np.ndarray)
            if index.dtype != INDEX or index.shape != (length,) or zlib.crc32(index) != checksum:
                raise ValueError("wrong length or checksum")
        except OSError as error:
            raise _broken(flag, self.folder, f"{name} cannot be read ({error.strerror or error})") from None
        except (ValueError, EOFError):
            raise _broken(flag, self.folder, f"{name} is damaged") from None
        return index

    def __reduce__(self) -> tuple[Any, ...]:
        return PackImages, (self.folder, self.split)

    def __len__(self) -> int:
        return len(self.index)

    def shard(self, number: int) -> np.ndarray:
        """All bytes of a shard, read-only."""
        if number not in self._mapped:
            path = self.folder / self.shards[number]["name"]
            self._mapped[number] = np.memmap(path, np.uint8, "r").view(np.ndarray)
        return self._mapped[number]

    def record(self, index: int) -> np.ndarray:
        """The bytes of an image as they are stored, read-only uint8 [length], without a copy."""
        number, offset, length, *_ = self.index[index].item()
        return self.shard(number)[offset : offset + length]

    def __getitem__(self, index: int) -> Image.Image:
        """The RGB image.

        Raises:
            OSError: if the record of a jpeg is damaged.
        """
        if self.kind == "uint8":
            return Image.fromarray(self.array(index))
        record = self.record(index)
        # Most damage would only change colours; this costs a hundredth of decoding.
        if zlib.crc32(record) != self.index["crc32"][index]:
            raise OSError("wrong checksum")
        with Image.open(io.BytesIO(record)) as image:
            return image.convert("RGB")

    def array(self, index: int) -> np.ndarray:
        """The pixels, uint8 [height, width, 3]: a read-only view of the file if they are stored as such, else decoded.

        Raises:
            OSError: if the record of a jpeg is damaged. Pixels are not looked at; `verify` does.
        """
        if self.kind == "jpeg":
            return np.asarray(self[index])
        return self.record(index).reshape(self.shapes[index])

    def describe(self, index: int) -> str:
        """What to call this image in an error message."""
        number, offset, *_ = self.index[index].item()
        return f"number {index} of {self.split} in {self.folder} (byte {offset} of {self.shards[number]['name']})"

    def file_names(self, order: np.ndarray) -> bytes:
        """What identifies the images in order: checksums of what they show, for a pack has no file names."""
        return self.index["crc32"][order].tobytes()


def verify(folder: Path, flag: str = "--data-path", most: int = 10) -> list[str]:
    """Read a whole pack; the names of its first damaged records, at most so many: none if it is sound.

    Raises:
        UserError: if it cannot be opened.
    """
    damaged: list[str] = []
    for split in SPLITS:
        images = PackImages(folder, split, flag)
        bar = tqdm(images.shards, split, unit="shard", disable=None)  # None: off unless on a terminal
        for number, shard in enumerate(bar):
            if zlib.crc32(images.shard(number)) == shard["crc32"]:
                continue
            rows = np.flatnonzero(images.index["shard"] == number)
            wrong = [row for row in rows if zlib.crc32(images.record(row)) != images.index["crc32"][row]]
            damaged += [images.describe(row) for row in wrong[:most]] or [shard["name"]]
            if len(damaged) >= most:
                return damaged[:most]
    return damaged
