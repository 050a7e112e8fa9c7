"""Packed data sets: all images, already resized, in a few large files that are fast to read.

`tools/pack_dataset.py` writes such a folder, `--data-set PACKED` reads it:

    pack.json         format version, kind of records, sizes, checksums; written last: without it, a pack is unfinished
    train_index.npy   one row of `INDEX` per image: position and length of its record, size, class, checksum
    train_00000.bin   the records, one after the other
    val_...           likewise

A uint8 record holds the pixels, [height, width, RGB], row by row. A jpeg record is a JPEG file.
"""

from __future__ import annotations

import io
import os
import reprlib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from augment import ImageError, open_rgb
from utils import UserError, map_array, read_json, regular_file

VERSION = 1
PACK = "pack.json"
KINDS = ("uint8", "jpeg")
SPLITS = ("train", "val")
INDEX = np.dtype(
    [
        (name, "<u8" if name == "offset" else "<u4")
        for name in ("shard", "offset", "length", "height", "width", "target", "crc32")
    ]
)
MAX_CLASSES = 2**20
ROWS = 2**20  # index rows to check at once
LARGEST_SIDE = 65535  # pixels; the limit of JPEG
LARGEST_AREA = 2 * Image.MAX_IMAGE_PIXELS  # the limit of Pillow


def _broken(flag: str, folder: Path, what: str) -> UserError:
    return UserError(f"{flag} {folder}: {what}; pack it again with python -m tools.pack_dataset")


def read_about(folder: Path, flag: str = "--data-path") -> dict[str, Any]:
    """Return the content of pack.json; `flag` named the folder.

    Raises:
        UserError: if the file is missing, or not of a version that can be read.
    """
    try:
        about = read_json(folder / PACK)
        version = _count(about, "version")
    except FileNotFoundError:
        raise _broken(flag, folder, f"has no {PACK}, so the pack is missing or unfinished") from None
    except OSError as error:
        raise _broken(flag, folder, f"{PACK} cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(flag, folder, PACK, error) from None
    if version != VERSION:
        raise _broken(flag, folder, f"is a pack of format version {version}, and this program reads {VERSION}")
    return about


def _damaged(flag: str, folder: Path, name: str, error: Exception) -> UserError:
    """Build the error for a file's content: a KeyError names what is missing, a ValueError says what is wrong."""
    said = f"has no {error}" if isinstance(error, KeyError) else str(error)
    return _broken(flag, folder, f"{name} is damaged ({said})")


def _count(values: Mapping[str, Any], name: str, low: int = 0, high: int = 2**32 - 1) -> int:
    """Return a whole number of pack.json.

    Raises:
        LookupError, TypeError, ValueError: if it is missing, or not a number from `low` to `high`.
    """
    value = values[name] if isinstance(values, dict) else None
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {reprlib.repr(value)}")
    return value


def _stated_names(about: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    """Return the class names; () if pack.json has none (older versions, data without names).

    Raises:
        ValueError: if they are not strings, or not one per class.
    """
    names = about.get("class_names") or []
    if type(names) is not list or len(names) not in (0, num_classes) or not all(type(name) is str for name in names):
        raise ValueError(f"class_names does not have {num_classes} names")
    return tuple(names)


class PackImages:
    """The images of one split of a pack.

    Each process opens the shards when it first reads them. A pickle holds only the folder name and the split, so it is
    small, and other processes open the pack themselves. A record is read in one request, because page faults of a
    memory map would make a network file system read a few pages at a time.

    Attributes:
        kind: "uint8" or "jpeg".
        targets: class indices, int64 [N].
        shapes: height, width and 3 of each image, int64 [N, 3].
        num_classes: number of classes.
        class_names: class names, or () if the packed data had none.
        index: rows of `INDEX`, [N], memory-mapped.

    Raises:
        UserError: if a file is missing, truncated, of another version, or damaged (as far as the files other than the
            shards show it).
    """

    def __init__(self, folder: str | Path, split: str, flag: str = "--data-path") -> None:
        """Open a split and check all files but the shards.

        Args:
            split: "train" or "val".
            flag: the flag that named the folder, for error messages.
        """
        self.folder, self.split = Path(folder), split
        about = read_about(self.folder, flag)
        try:
            part = about["splits"][split]
            self.kind, self.num_classes = about["kind"], _count(about, "num_classes", 1, MAX_CLASSES)
            if self.kind not in KINDS:
                raise ValueError(f"kind is {reprlib.repr(self.kind)}")
            self.class_names = _stated_names(about, self.num_classes)
            length, checksum = _count(part, "images", 1), _count(part, "index_crc32")
            self.shards = self._check_shards(part["shards"], flag)
        except (LookupError, TypeError, ValueError) as error:
            raise _damaged(flag, self.folder, PACK, error) from None
        self.index = self._read_index(length, checksum, flag)
        self.targets = self.index["target"].astype(np.int64)
        self.shapes = np.full((len(self.index), 3), 3, np.int64)
        self.shapes[:, 0], self.shapes[:, 1] = self.index["height"], self.index["width"]
        self._files: dict[int, io.FileIO] = {}

    def _check_shards(self, shards: Any, flag: str) -> list[dict[str, Any]]:
        """Return the shards stated in pack.json, after checking that the files exist.

        Raises:
            LookupError, TypeError, ValueError: if no shards are stated, or one has an unexpected name.
            UserError: if a file is missing or has another length.
        """
        if type(shards) is not list or not shards:
            raise ValueError("has no shards")
        for number, shard in enumerate(shards):
            name = f"{self.split}_{number:05d}.bin"
            if shard["name"] != name:  # a path could lead out of the folder
                raise ValueError(f"shard {number} is named {reprlib.repr(shard['name'])}")
            stated, _ = _count(shard, "bytes", 1, 2**63 - 1), _count(shard, "crc32")
            try:
                length = regular_file(self.folder / name).stat().st_size
            except OSError as error:
                raise _broken(flag, self.folder, f"{name} cannot be read ({error.strerror})") from None
            if length != stated:
                raise _broken(flag, self.folder, f"{name} has {length} bytes instead of {stated}")
        return shards

    def _read_index(self, length: int, checksum: int, flag: str) -> np.ndarray:
        name = f"{self.split}_index.npy"
        try:
            index = map_array(self.folder / name, INDEX, length).view(np.ndarray)
            if zlib.crc32(index) != checksum:
                raise ValueError("wrong checksum")
            for first in range(0, length, ROWS):
                self._check_rows(index[first : first + ROWS], first)
        except OSError as error:
            raise _broken(flag, self.folder, f"{name} cannot be read ({error.strerror or error})") from None
        except ValueError as error:
            raise _damaged(flag, self.folder, name, error) from None
        return index

    def _check_rows(self, rows: np.ndarray, first: int) -> None:
        """Check that these rows of the index, starting at row `first`, describe images within a shard and of a class.

        Raises:
            ValueError: naming the first row that does not.
        """
        shard, offset, length, height, width, target, _ = (rows[name].astype(np.uint64) for name in INDEX.names)
        ends = np.array([shard["bytes"] for shard in self.shards], np.uint64)
        end = ends[np.minimum(shard, len(ends) - 1).astype(np.int64)]
        area = np.minimum(height, LARGEST_SIDE) * np.minimum(width, LARGEST_SIDE)
        wrong = {
            "shard": shard >= len(ends),
            "offset": (offset > end) | (length > end - np.minimum(offset, end)),
            "size": (area == 0) | (np.maximum(height, width) > LARGEST_SIDE) | (area > LARGEST_AREA),
            "length": (length != 3 * area) if self.kind == "uint8" else length == 0,
            "class": target >= self.num_classes,
        }
        for what, found in wrong.items():
            if found.any():
                raise ValueError(f"the {what} of image {first + found.argmax()} is impossible")

    def __reduce__(self) -> tuple[Any, ...]:
        return PackImages, (self.folder, self.split)

    def __len__(self) -> int:
        return len(self.index)

    def shard(self, number: int) -> io.FileIO:
        """Return the open file of a shard."""
        if number not in self._files:
            self._files[number] = open(self.folder / self.shards[number]["name"], "rb", buffering=0)  # noqa: SIM115
        return self._files[number]

    def record(self, index: int) -> np.ndarray:
        """Return the stored bytes of an image, read-only uint8 [length].

        Raises:
            ImageError: if the shard is too short.
        """
        number, offset, length, *_ = self.index[index].item()
        content = os.pread(self.shard(number).fileno(), length, offset)
        if len(content) < length:
            raise ImageError(f"{len(content)} of {length} bytes are there")
        return np.frombuffer(content, np.uint8)

    def __getitem__(self, index: int) -> Image.Image:
        """Return the RGB image.

        Raises:
            ImageError: if the record is incomplete, or a jpeg record is damaged.
        """
        if self.kind == "uint8":
            return Image.fromarray(self.array(index))
        record = self.record(index)
        # Most damage would only change colors. The checksum costs a hundredth of decoding.
        if zlib.crc32(record) != self.index["crc32"][index]:
            raise ImageError("wrong checksum")
        image, (height, width, _) = open_rgb(io.BytesIO(record)), self.shapes[index]
        if image.size != (width, height):
            raise ImageError(f"is {image.width} by {image.height} pixels, not {width} by {height}")
        return image

    def array(self, index: int) -> np.ndarray:
        """Return the pixels, uint8 [height, width, 3], read-only.

        Raises:
            ImageError: if the record is incomplete, or a jpeg record is damaged. Only `verify` compares the
                checksums of uint8 records.
        """
        if self.kind == "jpeg":
            return np.asarray(self[index])
        return self.record(index).reshape(self.shapes[index])

    def describe(self, index: int) -> str:
        """Return the name of this image for error messages."""
        number, offset, *_ = self.index[index].item()
        return f"number {index} of {self.split} in {self.folder} (byte {offset} of {self.shards[number]['name']})"

    def file_names(self, order: np.ndarray) -> bytes:
        """Return the checksums of the images in order, which identify them: a pack has no file names."""
        return self.index["crc32"][order].tobytes()


def _checksum(file: io.FileIO) -> int:
    """Return the CRC-32 of a whole file."""
    file.seek(0)
    checksum = 0
    while content := file.read(2**22):
        checksum = zlib.crc32(content, checksum)
    return checksum


def verify(folder: Path, flag: str = "--data-path", most: int = 10) -> list[str]:
    """Read a whole pack and return the names of its damaged records, at most `most`; [] if it is intact.

    Raises:
        UserError: if the pack cannot be opened.
    """
    damaged: list[str] = []
    for split in SPLITS:
        images = PackImages(folder, split, flag)
        bar = tqdm(images.shards, split, unit="shard", disable=None)  # disable=None: a bar only on a terminal
        for number, shard in enumerate(bar):
            if _checksum(images.shard(number)) == shard["crc32"]:
                continue
            rows = np.flatnonzero(images.index["shard"] == number)
            wrong = [row for row in rows if zlib.crc32(images.record(row)) != images.index["crc32"][row]]
            damaged += [images.describe(row) for row in wrong[:most]] or [shard["name"]]
            if len(damaged) >= most:
                return damaged[:most]
    return damaged
