"""The sampling order: which sample each rank sees at which position, with which random key.

Every random draw is a hash of the run's seed, the purpose of the draw, and counters (epoch, position, step, rank). No
generator state needs saving: a resumed run continues with later counters.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

_MASK = 2**64 - 1
CHUNK = 2**14  # positions of a rank that are prepared at once


class Batch(NamedTuple):
    """A batch as the loaders yield it. (A single sample has the same fields without the batch dimension.)"""

    images: torch.Tensor  # [B, 3, H, W], normalized views; or stored uint8 images, to be augmented on the device
    targets: torch.Tensor  # [B] class indices, or [B, C] class probabilities after Mixup
    positions: torch.Tensor  # [B], index in the epoch's global order; stays on the CPU
    sizes: torch.Tensor | None = None  # [B, 2], height and width of each stored image within the padded buffer
    keys: torch.Tensor | None = None  # [B] int64, random key of each view (see `signed`)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Hash 64-bit integers with the output function of SplitMix64 (Steele et al. 2014), a bijection."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def random_keys(seed: int, purpose: str, *counters: int | np.ndarray) -> np.ndarray:
    """Return a 64-bit key for each combination of counters.

    Args:
        seed: the run's seed.
        purpose: what the draw is for; different purposes have independent keys.
        counters: non-negative integers or integer arrays, broadcast against each other.

    Returns:
        uint64 array with the broadcast shape of the counters.
    """
    key = _splitmix64(np.atleast_1d(np.uint64(seed % 2**64)))
    for counter in (zlib.crc32(purpose.encode()), *counters):
        key = _splitmix64(key ^ np.atleast_1d(np.asarray(counter).astype(np.uint64)))
    return key


def random_key(seed: int, purpose: str, *counters: int) -> int:
    """Return one key of `random_keys` for plain integers, much faster than with arrays."""
    key = seed % 2**64
    for counter in (0, zlib.crc32(purpose.encode()), *counters):
        x = (key ^ int(counter)) + 0x9E3779B97F4A7C15 & _MASK
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
        key = x ^ x >> 31
    return key


def signed(key: int) -> int:
    """Reinterpret an unsigned 64-bit key as a signed integer, for int64 tensors."""
    return key - 2**64 if key >= 2**63 else key


def seed_generators(key: int, device: torch.device | None = None) -> None:
    """Seed the default generators of Python, NumPy, torch and, if given, the device from a 64-bit key."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    # torch.manual_seed loops over all devices, which costs more than decoding a small image.
    torch.default_generator.manual_seed(key)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(key)
    elif device is not None and device.type == "mps":
        torch.mps.manual_seed(key & 0xFFFFFFFF)


class KeyedSampler(Sampler):
    """Sampler of `(index, position, key)` for this rank's share of an epoch.

    The epoch's global order has the length N of the data. It is a permutation of the data or, with repeated
    augmentation (Hoffer et al. 2020), of ceil(N / repeats) images that each appear `repeats` times in a row. Rank r of
    R gets positions r, r + R, r + 2R, ..., so a global batch holds the same views for any number of ranks.

    Args:
        length: N, number of samples in the data set.
        seed: the run's seed.
        shuffle: False keeps the data's order.
        repeats: views per drawn image and epoch; 1 disables repeated augmentation.
        classes: class of each sample, to draw all classes equally often before truncation; None to draw from the data
            as they are.
        rank, world_size: this process among all.
        multiple: truncate the order to a multiple of this many positions; 1 keeps all, so ranks may differ by one
            sample, which an exact evaluation needs.
    """

    def __init__(
        self,
        length: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        repeats: int = 1,
        classes: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
        multiple: int = 1,
    ) -> None:
        self.length, self.seed, self.shuffle, self.repeats = length, seed, shuffle, repeats
        self.rank, self.world_size = rank, world_size
        self.num_positions = length // multiple * multiple
        self.epoch, self.start = 0, 0
        self.members: list[np.ndarray] = []  # sample indices of each non-empty class
        if classes is not None:
            _, counts = np.unique(classes, return_counts=True)
            self.members = np.split(np.argsort(classes, kind="stable"), np.cumsum(counts)[:-1])

    @property
    def num_drawn(self) -> int:
        """Images drawn per epoch, each for `repeats` views; with `classes` an image may be drawn more than once."""
        return -(-self.num_positions // self.repeats)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Select the epoch to iterate over and skip the first `start` samples of this rank."""
        self.epoch, self.start = epoch, start

    def _global_order(self) -> np.ndarray:
        """Return the sample index at each position, [num_positions]."""
        if not self.shuffle:
            return np.arange(self.num_positions) // self.repeats
        # The order is cut at the end, so that it does not depend on the batch size and the number of ranks.
        balanced = self._balanced(-(-self.length // self.repeats)) if self.members else None
        length = self.length if balanced is None else len(balanced)
        # Sorting distinct random keys gives a permutation that is the same in all library versions.
        order = np.argsort(random_keys(self.seed, "shuffle", self.epoch, np.arange(length)))[: self.num_drawn]
        if balanced is not None:
            order = balanced[order]
        return np.repeat(order, self.repeats)[: self.num_positions]

    def _balanced(self, number: int) -> np.ndarray:
        """Draw `number` sample indices, of all classes equally often (up to one sample).

        Samples of small classes repeat. Within a class, all samples appear equally often (up to one time).
        """
        share = -(-number // len(self.members))
        columns = []
        for members in self.members:
            turn, index = np.divmod(np.arange(-(-share // len(members)) * len(members)), len(members))
            keys = random_keys(self.seed, "balance", self.epoch, turn, members[index])
            columns.append(members[index[np.lexsort((keys, turn))][:share]])
        first = random_key(self.seed, "balance", self.epoch) % len(columns)  # rotates which classes get one sample less
        return np.stack(columns[first:] + columns[:first], axis=1).ravel()[:number]

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        order = self._global_order()
        first, step = self.rank + self.start * self.world_size, self.world_size * CHUNK
        for start in range(first, self.num_positions, step):  # in chunks: a whole epoch would take gigabytes
            positions = np.arange(start, min(start + step, self.num_positions), self.world_size)
            keys = random_keys(self.seed, "view", self.epoch, positions)
            yield from zip(order[positions].tolist(), positions.tolist(), keys.tolist(), strict=True)

    def __len__(self) -> int:
        return len(range(self.rank, self.num_positions, self.world_size))
