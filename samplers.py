"""Which sample goes to which rank at which position, and its random key.

Randomness is counted, not carried: every draw of a run is a function of the run's seed, of what the draw is for, and of
counters (epoch, position, step, rank). No generator state is saved; resuming means starting the counters elsewhere.
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
CHUNK = 2**14  # samples of a rank that a sampler prepares at once


class Batch(NamedTuple):
    """What the loaders yield and the criteria read. (A data set's single sample has the same fields, unbatched.)"""

    images: torch.Tensor  # [B, 3, H, W], normalized; or uint8 as they are stored, to be augmented on the device
    targets: torch.Tensor  # [B] class indices, or [B, C] class probabilities after Mixup
    positions: torch.Tensor  # [B], index in the epoch's global order; always on the CPU
    sizes: torch.Tensor | None = None  # [B, 2], of stored images: the height and width that they fill
    keys: torch.Tensor | None = None  # [B] int64, the random key of each view, see `signed`


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The output function of the SplitMix64 generator (Steele et al., 2014): a bijection of 64-bit integers."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def random_keys(seed: int, purpose: str, *counters: int | np.ndarray) -> np.ndarray:
    """A 64-bit key for each combination of counters.

    Args:
        seed: the run's seed.
        purpose: what the draw is for; two purposes never share a key sequence.
        counters: non-negative integers or integer arrays, broadcast against each other.

    Returns:
        uint64 array of the counters' broadcast shape.
    """
    key = _splitmix64(np.atleast_1d(np.uint64(seed % 2**64)))
    for counter in (zlib.crc32(purpose.encode()), *counters):
        key = _splitmix64(key ^ np.atleast_1d(np.asarray(counter).astype(np.uint64)))
    return key


def random_key(seed: int, purpose: str, *counters: int) -> int:
    """`random_keys` for plain numbers, without arrays, which are slow for a single key."""
    key = seed % 2**64
    for counter in (0, zlib.crc32(purpose.encode()), *counters):
        x = (key ^ int(counter)) + 0x9E3779B97F4A7C15 & _MASK
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
        key = x ^ x >> 31
    return key


def signed(key: int) -> int:
    """The 64 bits of a key as a signed number, for int64 tensors."""
    return key - 2**64 if key >= 2**63 else key


def seed_generators(key: int, device: torch.device | None = None) -> None:
    """Seed Python's, NumPy's and torch's default generators (and the device's, if given) from a 64-bit key."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    # torch.manual_seed would walk every device, which costs more than decoding a small image.
    torch.default_generator.manual_seed(key)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(key)
    elif device is not None and device.type == "mps":
        torch.mps.manual_seed(key & 0xFFFFFFFF)


class KeyedSampler(Sampler):
    """Yields `(index, position, key)` for this rank's share of an epoch.

    The epoch's global order is a permutation of the data (or, with repeated augmentation, of ceil(N / repeats) images,
    each `repeats` times in a row, Hoffer et al. 2020) of the same length N as the data. Rank r gets positions r, r + R,
    r + 2R, ..., so a global batch holds the same views for every number of ranks R.

    Args:
        length: N, number of samples in the data set.
        seed: the run's seed.
        shuffle: False keeps the data's order.
        repeats: views of each drawn image in an epoch; 1 is an ordinary epoch.
        classes: class of each sample, to draw equally many of each class; None for the data's own distribution.
        rank, world_size: this process among all.
        multiple: the order is cut to a multiple of this many positions; 1 keeps everything (ranks may then differ by
            one sample, as an exact evaluation needs).
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
        self.members: list[np.ndarray] = []  # samples of each class that has any
        if classes is not None:
            _, counts = np.unique(classes, return_counts=True)
            self.members = np.split(np.argsort(classes, kind="stable"), np.cumsum(counts)[:-1])

    @property
    def num_drawn(self) -> int:
        """How many images an epoch draws, each for `repeats` views; with `classes`, some are the same image."""
        return -(-self.num_positions // self.repeats)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch whose order the next iteration yields, without the first `start` samples of this rank."""
        self.epoch, self.start = epoch, start

    def _global_order(self) -> np.ndarray:
        """Sample index at each position, [num_positions]."""
        if not self.shuffle:
            return np.arange(self.num_positions) // self.repeats
        length = self.num_drawn if self.members else self.length
        # Sorting random keys, which all differ, is a permutation that no library version can change.
        order = np.argsort(random_keys(self.seed, "shuffle", self.epoch, np.arange(length)))[: self.num_drawn]
        if self.members:
            order = self._balanced()[order]
        return np.repeat(order, self.repeats)[: self.num_positions]

    def _balanced(self) -> np.ndarray:
        """The epoch's samples: equally many of each class, or one fewer. Those of a small class come several times.

        No sample comes again before every other of its class has come as often.
        """
        share = -(-self.num_drawn // len(self.members))
        columns = []
        for members in self.members:
            turn, index = np.divmod(np.arange(-(-share // len(members)) * len(members)), len(members))
            keys = random_keys(self.seed, "balance", self.epoch, turn, members[index])
            columns.append(members[index[np.lexsort((keys, turn))][:share]])
        first = random_key(self.seed, "balance", self.epoch) % len(columns)  # the classes that get one fewer change
        return np.stack(columns[first:] + columns[:first], axis=1).ravel()[: self.num_drawn]

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        order = self._global_order()
        first, step = self.rank + self.start * self.world_size, self.world_size * CHUNK
        for start in range(first, self.num_positions, step):  # a list of all would take gigabytes
            positions = np.arange(start, min(start + step, self.num_positions), self.world_size)
            keys = random_keys(self.seed, "view", self.epoch, positions)
            yield from zip(order[positions].tolist(), positions.tolist(), keys.tolist(), strict=True)

    def __len__(self) -> int:
        return len(range(self.rank, self.num_positions, self.world_size))
