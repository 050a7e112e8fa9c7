"""Evaluate a model image by image, and state how certain an accuracy is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

import engine
from loaders import DeviceLoader
from samplers import Batch
from tools.predict import probabilities
from utils import Progress

Z = 1.959964  # normal quantile of 95 % intervals


@dataclasses.dataclass
class RecordedLoader(DeviceLoader):
    """A loader that remembers the current batch and reports progress."""

    batch: Batch | None = None

    def __iter__(self) -> Iterator[Batch]:
        progress = Progress("evaluation", self.num_images, "image")
        for self.batch in super().__iter__():
            yield self.batch
            progress.advance(len(self.batch.positions))
        progress.close()


class Recorder(nn.Module):
    """A model wrapper that records what the report needs of each image.

    Attributes:
        rows: per batch: positions, targets, predicted class, its probability, probability of the true class.
    """

    def __init__(self, model: nn.Module, loader: RecordedLoader, score: str) -> None:
        super().__init__()
        self.model, self.loader, self.score = model, loader, score
        self.rows: list[list[torch.Tensor]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output, batch = self.model(images), self.loader.batch
        logits = output[: len(batch.targets)]  # a compiled model also gets images that fill the batch
        scores = probabilities(logits, self.score)
        # As in engine.evaluate, so that ties are decided alike.
        predicted = logits.float().topk(min(5, logits.shape[1])).indices[:, :1]
        chosen = [scores.gather(1, index)[:, 0] for index in (predicted, batch.targets[:, None])]
        self.rows.append([each.cpu() for each in (batch.positions, batch.targets, predicted[:, 0], *chosen)])
        return output


@dataclasses.dataclass
class Outcome:
    """The result of each image, in the order of the data.

    Attributes:
        stats: result of `engine.evaluate`.
        positions, targets, predicted: [N] int64.
        confidence, true_probability: [N] float64, probability of the predicted and of the true class.
    """

    stats: dict[str, float]
    positions: np.ndarray
    targets: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    true_probability: np.ndarray

    @property
    def hits(self) -> np.ndarray:
        """Which images are predicted correctly, [N] bool."""
        return self.targets == self.predicted


def evaluate_images(model: nn.Module, loader: DeviceLoader, score: str, amp_dtype: torch.dtype | None) -> Outcome:
    """Run `engine.evaluate` and record the result of each image."""
    recorded = RecordedLoader(**vars(loader))
    recorder = Recorder(model, recorded, score)
    stats = engine.evaluate(recorder, recorded, engine.autocast(model, amp_dtype))
    columns = [torch.cat(parts).numpy() for parts in zip(*recorder.rows, strict=True)]
    if len({stats["images"], *map(len, columns)}) > 1:
        raise RuntimeError(f"{stats['images']} images, but records of {', '.join(str(len(each)) for each in columns)}")
    order = np.argsort(columns[0], kind="stable")
    positions, targets, predicted, *chosen = (column[order] for column in columns)
    return Outcome(stats, positions, targets, predicted, *(each.astype(np.float64) for each in chosen))


def wilson(hits: int, images: int) -> list[float] | None:
    """Return Wilson's 95 % interval of a share in percent; None without images."""
    if not images:
        return None
    share, spread = hits / images, Z * Z / images
    center, scale = share + spread / 2, 1 + spread
    margin = Z * math.sqrt(share * (1 - share) / images + spread / (4 * images))
    return [100 * max(0.0, float(center - margin) / scale), 100 * min(1.0, float(center + margin) / scale)]


def paired_difference(hits: np.ndarray, others: np.ndarray) -> tuple[float, list[float]]:
    """Compare two models on the same images.

    Args:
        hits, others: [N] bool, which images each model predicts correctly.

    Returns:
        The difference of the top-1 accuracies in percentage points, and its 95 % interval by Agresti and Min (2005):
        Wald's after adding 1/2 to each of the four counts of pairs, so that few images do not give a narrow interval.
        Images that both models get right, or both wrong, narrow it.
    """
    images, gained, lost = len(hits), int((hits & ~others).sum()), int((others & ~hits).sum())
    total, difference = images + 2, gained - lost
    margin = Z * math.sqrt(gained + lost + 1 - difference**2 / total) / total
    low, high = max(-1.0, difference / total - margin), min(1.0, difference / total + margin)
    return 100 * difference / images, [100 * low, 100 * high]


def accuracy_row(result: Outcome, first: Outcome) -> dict[str, Any]:
    """Return accuracies and loss as JSON values, with the change of top-1 against the first result."""
    change, interval = (0.0, [0.0, 0.0]) if result is first else paired_difference(result.hits, first.hits)
    stats = {name: result.stats[name] for name in ("acc1", "acc5", "loss", "images")}
    known = {"acc1_interval": wilson(int(result.hits.sum()), len(result.hits))}
    return stats | known | {"acc1_change": change, "acc1_change_interval": interval}
