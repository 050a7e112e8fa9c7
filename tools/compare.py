"""Compare trained models on the same validation images.

    python -m tools.compare output/A/best.pth output/B/best.pth

All models see the validation data of the first checkpoint, each at its own
input size, crop ratio and --upright. Checkpoints of one data set must agree on
its other flags, such as --val-fraction. `change` is the top-1 minus that of the
first model, in percentage points. All intervals are 95 % confidence intervals.
The interval of a change depends on the images that only one of the two models
gets right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

import engine
from augment import ViewOptions
from datasets import DataOptions, build_sources
from flags import SHAPES, fill, spelled
from loaders import LoaderOptions, build_val_loader
from models import normalization
from sources import Data
from tools import command
from tools.outcomes import Outcome, accuracy_row, evaluate_images
from tools.predict import score_name
from tools.timing import write_results
from utils import UserError, World, escaped

OWN = ("upright", "eval_crop_ratio")  # part of a model's preprocessing, so models may differ


def check_split(models: Sequence[command.Trained]) -> None:
    """Check that models of one data set were trained with the same split of it.

    Raises:
        UserError: naming the first flag that differs.
    """
    first = models[0]
    for other in models[1:]:
        if other.run.data_set != first.run.data_set:
            continue
        for name in SHAPES["evaluation"]:
            ours, theirs = getattr(first.run, name), getattr(other.run, name)
            if ours == theirs or name in ("data_path", *OWN):
                continue
            remedy = f"add {spelled(name)} VALUE for all, whose images no model was trained on"
            if name == "val_fraction":  # a smaller held-out part is contained in a larger one
                smallest = min(trained.run.val_fraction for trained in models)
                remedy = f"add --val-fraction {smallest:g}, which all of them held out" if smallest else "drop one"
            raise UserError(
                f"{spelled(name)}: {first.own.resume} was trained with {ours}, {other.own.resume} with {theirs}, so "
                f"one may have been trained on validation images of the other; {remedy}"
            )


def read_data(models: Sequence[command.Trained], world: World) -> list[tuple[Data, Data]]:
    """Return both parts of the first checkpoint's data once per model, upright where the model expects it."""
    options = fill(DataOptions, models[0].run)
    found = {
        upright: build_sources(replace(options, upright=upright), world.local_rank, eval_only=True)
        for upright in {trained.run.upright for trained in models}
    }
    return [found[trained.run.upright] for trained in models]


def evaluate(trained: command.Trained, model: nn.Module, val: Data, world: World) -> Outcome:
    """Evaluate one model on these images, with its own preprocessing."""
    run = trained.run
    loader = build_val_loader(val, fill(ViewOptions, run), normalization(model), fill(LoaderOptions, run), world)
    return evaluate_images(model, loader, score_name(trained.about), engine.select_amp(run.amp, world.device))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows for a terminal."""
    lines = ["top-1 %       interval   change       interval  model"]
    for row in rows:
        (low, high), (less, more) = row["acc1_interval"], row["acc1_change_interval"]
        lines.append(
            f"{row['acc1']:7.2f} {f'{low:.2f}-{high:.2f}':>14s} {row['acc1_change']:+8.2f} "
            f"{f'{less:+.2f} {more:+.2f}':>14s}  {escaped(row['checkpoint'])}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.get_parser("compare", __doc__, weights=None)
    parser.add_argument("checkpoints", nargs="+", metavar="PATH", help="checkpoints; name them before other flags")
    parser.add_argument("--output", type=Path, help="write the rows to this JSON file as well")
    with command.one_line_errors("compare"):
        own = parser.parse_args(argv)
        if own.resume:
            raise UserError(f"--resume {own.resume}: would not be compared; name all checkpoints without this flag")
        words = [*own.main_flags, *(["--ema"] if own.ema else [])]
        one = command.get_parser("compare", __doc__)
        paths = list(dict.fromkeys(own.checkpoints))  # each once
        models = [command.parse(one, ["--resume", path, *words]) for path in paths]
        check_split(models)
        world = command.start(models[0], "compares")
        for trained in models[1:]:
            command.log_changes(trained)
        built = [command.load_model(each.run, each.weights, each.own.resume, world.device) for each in models]
        parts = [
            command.checked_data(trained, model, *data, models[0].run.val_fraction)
            for trained, model, data in zip(models, built, read_data(models, world), strict=True)
        ]
        results = [evaluate(*each, world) for each in zip(models, built, parts, strict=True)]
        named = zip(paths, results, strict=True)
        rows = [{"checkpoint": path} | accuracy_row(result, results[0]) for path, result in named]
        print(table(rows))
        if own.output:
            write_results(own.output, world.device, {"checkpoints": paths, "ema": own.ema}, {"rows": rows})


if __name__ == "__main__":
    main()
