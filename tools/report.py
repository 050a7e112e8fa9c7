"""Evaluate a trained model and write a report: a web page and report.json.

    python -m tools.report --resume output/best.pth
    python -m tools.report --resume output/best.pth --ema --keep-rates 1 0.9 0.7

The report has the accuracy in total and by class, the confusions, the most
confident mistakes, the calibration and, for an EViT, the top-1 at several keep
rates.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import engine
from augment import ViewOptions
from datasets import DataOptions, build_sources
from flags import TRAINED, Parser, fill, in_range, keep_rates
from loaders import DeviceLoader, LoaderOptions, build_val_loader
from models import normalization
from models_evit import evit_blocks, may_be_evit
from sources import Data, Source, keep_in_memory
from tools import command, report_page
from tools.outcomes import Outcome, evaluate_images, wilson
from tools.predict import class_names, score_name
from tools.timing import describe_environment
from utils import (
    UserError,
    World,
    parse_json,
    reason,
    regular_file,
    write_whole,
)

FORMAT = "deit report 1"  # in report.json; marks a folder that may be replaced
DEFAULT_RATES = [1.0, 0.9, 0.7, 0.5]
BINS = 15  # of the calibration
MAX_CLASSES = 100  # limit for storing and drawing the confusion matrix


# -- numbers -----------------------------------------------------------------------------------------------------------


def calibration(outcome: Outcome) -> dict[str, Any]:
    """Compute the expected calibration error in percent, with equal-width bins (Guo et al. 2017, equation 3)."""
    which = np.clip(np.ceil(outcome.confidence * BINS).astype(int) - 1, 0, BINS - 1)  # (low, high]
    rows, error = [], 0.0
    for index in range(BINS):
        members = which == index
        row = {"low": index / BINS, "high": (index + 1) / BINS, "images": int(members.sum())}
        row |= {"confidence": None, "accuracy": None}
        if members.any():
            row["confidence"] = 100 * float(outcome.confidence[members].mean())
            row["accuracy"] = 100 * float(outcome.hits[members].mean())
            error += members.mean() * abs(row["accuracy"] - row["confidence"])
        rows.append(row)
    return {"ece": float(error), "mean_confidence": 100 * float(outcome.confidence.mean()), "bins": rows}


def class_rows(outcome: Outcome, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the top-1 of each class, by class index."""
    images = np.bincount(outcome.targets, minlength=len(names)).tolist()
    hits = np.bincount(outcome.targets[outcome.hits], minlength=len(names)).tolist()
    return [
        {
            "index": index,
            "class": name,
            "images": n,
            "correct": correct,
            "acc1": 100 * correct / n if n else None,
            "interval": wilson(correct, n),
        }
        for index, (name, n, correct) in enumerate(zip(names, images, hits, strict=True))
    ]


def confused_pairs(outcome: Outcome, names: Sequence[str]) -> list[dict[str, Any]]:
    """List each occurring pair of true and wrongly predicted class, the most frequent first."""
    images = np.bincount(outcome.targets, minlength=len(names))
    wrong = np.stack([outcome.targets, outcome.predicted])[:, ~outcome.hits]
    pairs, counts = np.unique(wrong, axis=1, return_counts=True)
    return [
        {
            "true": names[true],
            "predicted": names[predicted],
            "images": int(counts[position]),
            "share": 100 * int(counts[position]) / int(images[true]),
        }
        for position in np.argsort(-counts, kind="stable")
        for true, predicted in [pairs[:, position]]
    ]


def confusion_matrix(outcome: Outcome, num_classes: int) -> np.ndarray:
    """Count images by true class (rows) and predicted class (columns), [C, C]."""
    cells = np.bincount(outcome.targets * num_classes + outcome.predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def mistakes(outcome: Outcome, names: Sequence[str], source: Data, number: int) -> list[dict[str, Any]]:
    """List the wrong predictions with the highest probability, with the files of their images."""
    wrong = np.flatnonzero(~outcome.hits)
    chosen = wrong[np.argsort(-outcome.confidence[wrong], kind="stable")[:number]]
    is_indexed = isinstance(source, Source)
    return [
        {
            "position": int(outcome.positions[position]),
            "image": source.images.describe(source.order[outcome.positions[position]]) if is_indexed else None,
            "true": names[outcome.targets[position]],
            "predicted": names[outcome.predicted[position]],
            "probability": float(outcome.confidence[position]),
            "true_probability": float(outcome.true_probability[position]),
            "picture": f"mistake_{rank:02d}.png" if is_indexed else None,
        }
        for rank, position in enumerate(chosen)
    ]


# -- the report --------------------------------------------------------------------------------------------------------


def validation_data(trained: command.Trained, model: nn.Module, world: World) -> tuple[Data, Data]:
    """Return the validation data as main.py evaluates them, and again with their file names.

    Raises:
        UserError: if a class index means another class than in the checkpoint.
    """
    options = fill(DataOptions, trained.run)
    train, files = build_sources(dataclasses.replace(options, ram_cache=0), world.local_rank, eval_only=True)
    files = command.checked_data(trained, model, train, files)
    return keep_in_memory(files, options.ram_cache), files


@dataclasses.dataclass
class AtRate:
    """The model at a keep rate; None for the rate of the checkpoint, which the report is about."""

    keep_rate: float | Sequence[float]
    model: nn.Module | None


def at_rates(trained: command.Trained, model: nn.Module, world: World) -> list[AtRate]:
    """Build the model at each of `--keep-rates`; its own rate is among them. [] for a model without keep rates.

    Raises:
        UserError: if it cannot be built with one of the rates.
    """
    own, run = trained.own, trained.run
    if not evit_blocks(model):
        return []
    usual = run.model_kwargs.get("keep_rate", run.base_keep_rate)
    if usual is None:  # the default of the model
        usual = min(block.keep_rate for block in evit_blocks(model))
    others = [rate for rate in own.keep_rates or DEFAULT_RATES if rate != usual]
    models = command.load_at_rates(trained, others, world.device)
    rates = [AtRate(usual, None), *map(AtRate, others, models)]
    return sorted(rates, key=lambda each: -np.mean(each.keep_rate))


def rate_rows(
    rates: Sequence[AtRate], loader: DeviceLoader, outcome: Outcome, amp_dtype: torch.dtype | None
) -> list[dict[str, Any]]:
    """Measure the accuracy at each keep rate; `outcome` is that of the checkpoint's rate."""
    rows = []
    for each in rates:
        stats = outcome.stats
        if each.model is not None:
            stats = engine.evaluate(each.model, loader, engine.autocast(each.model, amp_dtype))
        hits = round(stats["acc1"] * stats["images"] / 100)
        row = {"keep_rate": each.keep_rate, "is_own": each.model is None, "interval": wilson(hits, stats["images"])}
        rows.append(row | {name: stats[name] for name in ("acc1", "acc5", "loss")})
    return rows


def make_report(trained: command.Trained, world: World) -> tuple[dict[str, Any], Data]:
    """Evaluate each image once; return all numbers of the report, and the data that contain the mistakes.

    Raises:
        UserError: if model and data have different classes.
    """
    own, run = trained.own, trained.run
    model = command.load_model(run, trained.weights, own.resume, world.device)
    rates = at_rates(trained, model, world)
    val, files = validation_data(trained, model, world)
    loader = build_val_loader(val, fill(ViewOptions, run), normalization(model), fill(LoaderOptions, run), world)
    score, amp_dtype = score_name(trained.about), engine.select_amp(run.amp, world.device)
    outcome = evaluate_images(model, loader, score, amp_dtype)
    names = list(val.class_names) or class_names(trained.about, model)
    stats, correct = outcome.stats, int(outcome.hits.sum())
    settings = {name: getattr(run, name) for name in (*TRAINED, "batch_size")}
    settings |= {"resume": own.resume, "ema": own.ema, "precision": str(amp_dtype or torch.float32)}
    return {
        "format": FORMAT,
        "environment": describe_environment(world.device),
        "settings": settings,
        **{name: stats[name] for name in ("images", "acc1", "acc5", "loss")},
        "interval": wilson(correct, stats["images"]),
        "probability": score,
        "calibration": calibration(outcome),
        "classes": class_rows(outcome, names),
        "confused_pairs": confused_pairs(outcome, names),
        "confusion_matrix": confusion_matrix(outcome, len(names)).tolist() if len(names) <= MAX_CLASSES else None,
        "mistakes": mistakes(outcome, names, files, own.num_mistakes),
        "keep_rates": rate_rows(rates, loader, outcome, amp_dtype),
    }, files


# -- the folder --------------------------------------------------------------------------------------------------------

_OURS = re.compile(r"index\.html|report\.json|(confusion|reliability|keep_rates|mistake_\d+)\.png")


def earlier_report(folder: Path) -> list[Path]:
    """List the files of the report in a folder; [] for an empty or missing folder.

    Raises:
        UserError: if the folder holds anything else.
    """
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise UserError(f"--output {folder}: is a file; name a folder")
    files = sorted(folder.iterdir())
    foreign = next((path.name for path in files if not _OURS.fullmatch(path.name)), None)
    try:
        about = parse_json(regular_file(folder / "report.json").read_bytes()) if files and foreign is None else {}
    except (OSError, ValueError):
        about = {}
    if files and (foreign or not isinstance(about, dict) or about.get("format") != FORMAT):
        raise UserError(f"--output {folder}: holds {foreign or 'no report'}; name a new folder or that of a report")
    return files


def thumbnail(image: Image.Image, side: int = 224) -> Image.Image:
    """Shrink an image to at most `side` pixels; enlarge a small one by an integer factor."""
    zoom = side // max(image.size)
    if zoom > 1:
        return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn errors of the disk into a one-line error that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written ({reason(error)}); name another folder") from None


def temporary_folder(folder: Path) -> tempfile.TemporaryDirectory:
    """Create a folder next to that of the report, before the evaluation, because this may fail.

    Raises:
        UserError: see `earlier_report`, or if the folder cannot be written.
    """
    earlier_report(folder)
    real = folder.resolve()  # the name of `.` is empty
    with writing(folder):
        real.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=real.parent, prefix=f".{real.name}.")


def write(report: dict[str, Any], files: Data, new: Path, folder: Path) -> None:
    """Write the report to a new folder, then move its files to `folder`, where they replace an earlier report.

    Raises:
        UserError: see `earlier_report`, or if the folder cannot be written.
    """
    with writing(folder):
        write_whole(new / "report.json", (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
        for row in report["mistakes"]:
            if row["picture"]:
                thumbnail(files[row["position"]][0]).save(new / row["picture"])
        report_page.draw_figures(report, new)
        write_whole(new / "index.html", report_page.page(report).encode())
        for path in earlier_report(folder):
            path.unlink()
        folder.mkdir(exist_ok=True)
        # report.json first, because it marks the folder as a report.
        for path in sorted(new.iterdir(), key=lambda path: path.name != "report.json"):
            shutil.move(path, folder / path.name)  # `folder` may be a link or mount of another file system


def build_parser() -> Parser:
    parser = command.get_parser("report", __doc__)
    parser.set_defaults(output=None, keep_rates=None)
    add = parser.add_argument
    folder = "folder of the report; an earlier report is replaced; default: report/ next to the checkpoint"
    add("--output", type=Path, default=argparse.SUPPRESS, metavar="FOLDER", help=folder)
    rates = "keep rates of an EViT: one for all layers of --drop-loc, or one per layer: 0.7,0.7,0.5; default: "
    shown = " ".join(f"{rate:g}" for rate in DEFAULT_RATES)
    add("--keep-rates", nargs="+", type=keep_rates, default=argparse.SUPPRESS, metavar="RATE", help=rates + shown)
    add("--num-mistakes", type=in_range(int, 0, 99), default=24, help="most confident mistakes to show")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    with command.one_line_errors("report"):
        trained = command.parse(parser, argv)
        own, run = trained.own, trained.run
        if own.keep_rates and not may_be_evit(run.model):
            raise UserError(f"--keep-rates: {run.model} has no EViT blocks; drop the flag")
        folder = own.output or (Path() if "://" in own.resume else Path(own.resume).parent) / "report"
        with temporary_folder(folder) as new:
            world = command.start(trained, "makes the report")
            report, files = make_report(trained, world)
            write(report, files, Path(new), folder)
        low, high = report["interval"]
        print(
            f"{folder / 'index.html'}: top-1 {report['acc1']:.2f} % ({low:.2f} to {high:.2f}), top-5 "
            f"{report['acc5']:.2f} %, loss {report['loss']:.4f}, ECE {report['calibration']['ece']:.2f} %, "
            f"{report['images']} images"
        )


if __name__ == "__main__":
    main()
