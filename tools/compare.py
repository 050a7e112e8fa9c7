"""Compare trained models on the same validation images.

    python -m tools.compare output/A/best.pth output/B/best.pth

All models see the validation data of the first checkpoint, each at its own
input size. `change` is the top-1 minus that of the first model, in percentage
points. All intervals are 95 % confidence intervals. The interval of a change
depends on the images that only one of the two models gets right.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engine
from augment import ViewOptions
from datasets import DataOptions, build_sources
from flags import fill
from loaders import LoaderOptions, build_val_loader
from models import normalization
from sources import Data
from tools import command
from tools.outcomes import Outcome, accuracy_row, evaluate_images
from tools.predict import score_name
from tools.timing import write_results
from utils import UserError, World, escaped, init_distributed


def evaluate(trained: command.Trained, data: tuple[Data, Data], world: World) -> Outcome:
    """Evaluate one model on the validation images; `data` are the training and the validation part.

    Raises:
        UserError: if its classes are not those of the data.
    """
    run, path = trained.run, trained.own.resume
    val = command.checked_data(trained, *data)
    model = command.load_model(run, trained.weights, path, world.device)
    if val.num_classes != model.num_classes:
        raise UserError(f"--resume {path}: has {model.num_classes} classes, the data have {val.num_classes}")
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
        models = [command.parse(one, ["--resume", path, *words]) for path in own.checkpoints]
        world = init_distributed(models[0].run.device)
        if world.size > 1:
            raise UserError(f"WORLD_SIZE={world.size}: one process compares; start it without a launcher")
        data = build_sources(fill(DataOptions, models[0].run), world.local_rank, eval_only=True)
        results = [evaluate(trained, data, world) for trained in models]
        named = zip(own.checkpoints, results, strict=True)
        rows = [{"checkpoint": path} | accuracy_row(result, results[0]) for path, result in named]
        print(table(rows))
        if own.output:
            write_results(own.output, world.device, {"checkpoints": own.checkpoints, "ema": own.ema}, {"rows": rows})


if __name__ == "__main__":
    main()
