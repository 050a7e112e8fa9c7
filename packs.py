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
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from augment import ImageError, open_rgb
from utils import UserError

VERSION = 1
PACK = "pack.json"
KINDS = ("uint8", "jpeg")
SPLITS = ("train", "val")
INDEX = np.dtype(
    [(name, "<u8" if name == "offset" else "<u4") for name in
     ("shard", "offset", "length", "height", "width", "target", "crc32")]
)  # fmt: skip


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
        class_names: their names, or () if the packed data did not say.
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
            self.class_names = tuple(map(str, about.get("class_names") or ()))
            if self.kind not in KINDS or len(self.class_names) not in (0, self.num_classes):
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
            ImageError: if the record of a jpeg is damaged.
        """
        if self.kind == "uint8":
            return Image.fromarray(self.array(index))
        record = self.record(index)
        # Most damage would only change colours; this costs a hundredth of decoding.
        if zlib.crc32(record) != self.index["crc32"][index]:
            raise ImageError("wrong checksum")
        return open_rgb(io.BytesIO(record))

    def array(self, index: int) -> np.ndarray:
        """The pixels, uint8 [height, width, 3]: a read-only view of the file if they are stored as such, else decoded.

        Raises:
            ImageError: if the record of a jpeg is damaged. Pixels are not looked at; `verify` does.
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
