"""Predict the classes of photos with a trained model.

    python -m tools.predict --resume output/best.pth photo.jpg folder/
    python -m tools.predict --resume output/best.pth folder --format csv > p.csv
    python -m tools.predict --model deit_tiny_patch16_224 --pretrained photo.jpg

Predictions go to standard output, log and errors to standard error. If images
cannot be read, the others are still predicted, and the exit status is 1.
"""

from __future__ import annotations

import csv
import json
import sys
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TextIO

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

import engine
from augment import ImageError, ViewOptions, decoding, open_rgb
from checkpoints import class_names_of, flags_of
from datasets import build_eval_transform
from flags import COUNT, Parser, fill
from loaders import LoaderOptions, num_workers
from models import normalization
from sources import HostView
from tools import command
from utils import Progress, escaped, logger

WIDTH, MAX_CLASS_LENGTH = 80, 40  # columns of the table and of a class name
READ_AHEAD = 2  # batches of views to decode ahead


class Prediction(NamedTuple):
    """The most probable classes of an image, in decreasing order."""

    path: str
    classes: list[int]
    probabilities: list[float]


# -- the meaning of the outputs ----------------------------------------------------------------------------------------


def score_name(about: Mapping[str, Any]) -> str:
    """Return the function from logits to probabilities: `sigmoid` after training with --bce-loss, else `softmax`."""
    return "sigmoid" if flags_of(about).get("bce_loss") is True else "softmax"


def probabilities(logits: torch.Tensor, score: str) -> torch.Tensor:
    """Return float32 probabilities [B, C] of logits [B, C] in any precision; `score` is a `score_name`.

    They are NaN for an image with a logit that is not finite.
    """
    logits = logits.float()
    finite = logits.isfinite().all(dim=1, keepdim=True)
    return (logits.sigmoid() if score == "sigmoid" else logits.softmax(dim=1)).where(finite, torch.nan)


def class_names(about: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Return the class names of the checkpoint or of timm's weights, and `class 3` for a class without a name.

    Without any names, 1000 classes are those of ImageNet-1k.
    """
    config, total = getattr(model, "pretrained_cfg", {}), model.num_classes
    published = [] if about else list(config.get("label_names") or ())
    described = config.get("label_descriptions") or {}
    names = list(class_names_of(about)) or [str(described.get(name, name)) for name in published]
    if not names and total == 1000:
        return ImageNetInfo(infer_imagenet_subset(model)).label_descriptions()
    if len(names) > total:  # of another model
        names = []
    return [*names, *(f"class {index}" for index in range(len(names), total))]


# -- from files to predictions -----------------------------------------------------------------------------------------


def read_views(
    files: Sequence[str], transform: HostView, batch_size: int, threads: int
) -> Iterator[list[torch.Tensor | str]]:
    """Yield the views [3, H, W] of the files in batches, decoded ahead; for an unreadable file, the reason."""

    def view(file: str) -> torch.Tensor | str:
        try:
            with decoding():
                return transform(open_rgb(file, upright=True))
        except ImageError as error:
            return getattr(error.__cause__, "strerror", None) or str(error)  # without the path

    waiting: deque[list[Future]] = deque()
    with ThreadPoolExecutor(threads) as pool:  # decoding and resizing release the GIL
        for start in range(0, len(files), batch_size):
            waiting.append([pool.submit(view, file) for file in files[start : start + batch_size]])
            if len(waiting) == READ_AHEAD:
                yield [each.result() for each in waiting.popleft()]
        for batch in waiting:
            yield [each.result() for each in batch]


def predict(
    files: Sequence[str],
    batches: Iterator[list[torch.Tensor | str]],
    score: Callable[[torch.Tensor], torch.Tensor],
    topk: int,
    failed: list[str],
) -> Iterator[Prediction]:
    """Predict the files in their order.

    Args:
        batches: views or errors, see `read_views`.
        score: images [B, 3, H, W] on the CPU -> probabilities [B, C] on the CPU.
        failed: gets a line with the reason for each file without a prediction.
    """
    names = iter(files)
    # No progress bar if the predictions themselves appear on the terminal.
    progress = None if sys.stdout.isatty() else Progress("predict", len(files), "image")
    for batch in batches:
        found = [view for view in batch if isinstance(view, torch.Tensor)]
        rows = iter(score(torch.stack(found)) if found else ())
        for view in batch:
            path, row = next(names), None if isinstance(view, str) else next(rows)
            why = view if row is None else "" if row.isfinite().all() else "its logits are not finite; try --amp off"
            if why:
                failed.append(f"{path} ({why})")
                logger.error("cannot predict %s", failed[-1])
                continue
            values, indices = row.topk(min(topk, len(row)))
            yield Prediction(path, indices.tolist(), values.tolist())
        if progress is not None:
            progress.advance(len(batch))
    if progress is not None:
        progress.close()


# -- formats -----------------------------------------------------------------------------------------------------------


def _columns(text: str) -> int:
    """Return the terminal columns of a text; wide characters, such as Chinese ones, take two."""
    return sum((unicodedata.east_asian_width(char) in "WF") + (not unicodedata.combining(char)) for char in text)


def _shortened(text: str, columns: int, from_left: bool = False) -> str:
    """Shorten a text that is too long with an ellipsis at its end, or at its beginning."""
    if _columns(text) <= columns:
        return text
    while _columns(text) > max(0, columns - 1):
        text = text[1:] if from_left else text[:-1]
    return f"…{text}" if from_left else f"{text}…"


def write_table(rows: Iterator[Prediction], names: Sequence[str], score: str, out: TextIO) -> None:
    """Write one line per class in at most `WIDTH` columns; an image is named in its first line."""
    shown = [_shortened(escaped(name), MAX_CLASS_LENGTH) for name in names]
    width = max(map(_columns, ["class", *shown]))
    out.write(f"{score:>7s}  {'class':{width}s}  image\n")
    for number, row in enumerate(rows):
        if number and len(row.classes) > 1:
            out.write("\n")
        path = _shortened(escaped(row.path), WIDTH - 7 - width - 4, from_left=True)
        for index, probability in zip(row.classes, row.probabilities, strict=True):
            padded = shown[index] + " " * (width - _columns(shown[index]))
            out.write(f"{100 * probability:5.1f} %  {padded}  {path}".rstrip() + "\n")
            path = ""


def write_csv(rows: Iterator[Prediction], names: Sequence[str], topk: int, out: TextIO) -> None:
    """Write one record per image: path, class_1, probability_1, class_2, ...; control characters are escaped."""
    writer = csv.writer(out, lineterminator="\n")
    numbers = range(1, min(topk, len(names)) + 1)
    writer.writerow(["path", *(f"{column}_{number}" for number in numbers for column in ("class", "probability"))])
    for row in rows:
        pairs = zip(row.classes, row.probabilities, strict=True)
        cells = [cell for index, value in pairs for cell in (escaped(names[index]), f"{value:.6g}")]
        writer.writerow([escaped(row.path), *cells])


def write_json(rows: Iterator[Prediction], names: Sequence[str], out: TextIO) -> None:
    """Write a list of {"path", "predictions": [{"class", "index", "probability"}, ...]}, one line per image."""
    separator = "[\n"
    for row in rows:
        pairs = zip(row.classes, row.probabilities, strict=True)
        found = [{"class": names[index], "index": index, "probability": float(f"{p:.6g}")} for index, p in pairs]
        out.write(separator + json.dumps({"path": row.path, "predictions": found}))
        separator = ",\n"
    out.write("[]\n" if separator == "[\n" else "\n]\n")


def build_parser() -> Parser:
    parser = command.get_parser(
        "predict",
        __doc__,
        weights="timm's weights of --model NAME, with --pretrained",
        reads=command.OF_PHOTOS,
    )
    add = parser.add_argument
    photos = "files and folders (searched recursively); name them before flags that take several values"
    add("images", nargs="+", help=photos)
    add("--topk", type=COUNT, default=5, help="classes per image")
    add(
        "--format",
        choices=("table", "csv", "json"),
        default="table",
        help="format of the output; csv: one record per image",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    with command.one_line_errors("predict"):
        trained = command.parse(parser, argv)
        own, run, weights, about, _ = trained
        world = command.start(trained, "predicts")
        files = command.find_files(own.images, "images")
        model = command.load_model(run, weights, own.resume, world.device)
        names, score, amp_dtype = class_names(about, model), score_name(about), engine.select_amp(run.amp, world.device)
        if score == "sigmoid":
            logger.info("trained with --bce-loss: a sigmoid for each class, so probabilities do not sum to 1")

        @torch.no_grad()
        def scores(images: torch.Tensor) -> torch.Tensor:
            with engine.autocast(model, amp_dtype):
                logits = model(images.to(world.device))
            return probabilities(logits, score).cpu()

        transform = build_eval_transform(fill(ViewOptions, run), normalization(model))
        threads = max(1, num_workers(fill(LoaderOptions, run), world))
        failed: list[str] = []
        rows = predict(files, read_views(files, transform, run.batch_size, threads), scores, own.topk, failed)
        if own.format == "table":
            write_table(rows, names, score, sys.stdout)
        elif own.format == "csv":
            write_csv(rows, names, own.topk, sys.stdout)
        else:
            write_json(rows, names, sys.stdout)
        if failed:
            logger.error("%d of %d images have no prediction", len(failed), len(files))
            sys.exit(1)


if __name__ == "__main__":
    main()
