"""Read output folders of finished, stopped or running runs for the tools that compare them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models_evit import KEEP_RATE
from utils import UserError, read_json, read_log


@dataclass(frozen=True)
class Run:
    """An output folder.

    Attributes:
        folder: as the user named it.
        records: one per epoch, from log.txt. If it or config.json has the images per epoch, with the number of
            training `images` so far and the `minutes` of training so far, without evaluation, at the logged images/s.
        config: the flags, from config.json; empty if it cannot be read.
    """

    folder: Path
    records: list[dict[str, Any]]
    config: dict[str, Any]

    def values(self, key: str) -> list[float | None]:
        """Return the value of each record, None where a record has none."""
        return [number(record.get(key)) for record in self.records]

    def final_keep_rate(self) -> float | None:
        """Return the lowest final keep rate of any layer (`keep_rate` in log.txt); None without EViT blocks.

        Without config.json it is the lowest in the log.
        """
        logged = [rate for rate in self.values("keep_rate") if rate is not None]
        known = number(self.config.get("final_keep_rate"))
        if known is not None or not logged or "base_keep_rate" not in self.config:
            return min(logged, default=None) if known is None else known
        given = self.config["base_keep_rate"]  # config.json of an earlier version
        rates = [number(rate) for rate in (given if isinstance(given, list) else [given])]
        return min((rate for rate in rates if rate is not None), default=min(KEEP_RATE, *logged))

    def is_comparable(self, record: dict[str, Any]) -> bool:
        """Return True if a record's accuracy counts for the best: an EViT must be at its final keep rate."""
        return number(record.get("keep_rate")) in (None, self.final_keep_rate())

    def why_untimed(self) -> str:
        """Return why the minutes of some record are unknown; '' if all are known."""
        if None in self.values("images"):
            return f"{self.folder}/config.json has no images_per_epoch"
        if not _begins(self.records, self.config):
            return f"{self.folder}/log.txt lacks the epochs before {self.records[0]['epoch']} and their time"
        return f"{self.folder}/log.txt has records with no images_per_second" if None in self.values("minutes") else ""

    def within(self, minutes: float) -> Run:
        """Return the run as it was after this much training.

        Raises:
            UserError: if its files do not tell the time.
        """
        if why := self.why_untimed():
            raise UserError(f"--within: {why}; drop the flag or this run")
        times = self.values("minutes")
        return replace(self, records=[r for r, time in zip(self.records, times, strict=True) if time <= minutes])


def number(value: object) -> float | None:
    """Convert to a finite float; None for any other JSON value."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def read_run(folder: Path) -> Run:
    """Read log.txt and, if there is one, config.json.

    Raises:
        UserError: if log.txt cannot be read.
    """
    try:
        records = read_log(folder)
    except OSError as error:
        raise UserError(f"{folder / 'log.txt'}: {error.strerror}; name a run's --output-dir") from None
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        config = {}
    config = config if isinstance(config, dict) else {}
    return Run(folder, _with_time(records, config), config)


def _begins(records: Sequence[dict[str, Any]], config: dict[str, Any]) -> bool:
    """Return True if the records begin at the first epoch of the run."""
    return not records or records[0]["epoch"] in (0, config.get("start_epoch"))


def _with_time(records: Sequence[dict[str, Any]], config: dict[str, Any]) -> list[dict[str, Any]]:
    """Add `images` and `minutes` until the end of each record, as far as they are known.

    Epochs before the first record count as images of the same number per epoch; their minutes are unknown, except for
    those before --start-epoch, which do not count.
    """
    timed, last, images, minutes = [], None, 0.0, 0.0 if _begins(records, config) else None
    for record in records:
        epoch, rate = number(record["epoch"]), number(record.get("images_per_second"))
        size = number(record.get("train_images", config.get("images_per_epoch")))  # logs of earlier versions: config
        if epoch is None or size is None:  # above all floats
            return list(records)
        images += size * (epoch + 1 if last is None else epoch - last)
        since = 1 if last is None else epoch - last
        minutes = None if not rate or minutes is None else minutes + since * size / rate / 60
        last = epoch
        timed.append({"images": images} | ({} if minutes is None else {"minutes": minutes}) | record)
    return timed


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return what distinguishes the folders: `A`, `B` for `output/A/seed0`, `output/B/seed0`; else the name."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    shortest = min(map(len, parts))
    if len(set(parts)) == 1:
        return [path[-1] for path in parts]
    first = next((i for i in range(shortest) if len({path[i] for path in parts}) > 1), shortest - 1)
    parts = [path[min(first, shortest - 1) :] for path in parts]
    shortest = min(map(len, parts))
    last = next((i for i in range(1, shortest) if len({path[-i] for path in parts}) > 1), shortest)
    return ["/".join(path[: len(path) - last + 1]) for path in parts]
