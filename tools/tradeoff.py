"""Measure accuracy and speed of a trained EViT at several keep rates.

    python -m tools.tradeoff --resume output/best.pth --keep-rates 1 0.9 0.8 0.7

For a DeiT checkpoint, add `--model` with the evit_* model of its size. A model
of your own needs EViT blocks and an entry point that takes `keep_rate`. All
rates see the same images: `change` is the top-1 minus that of the first rate,
in percentage points. Intervals are 95 % confidence intervals. Speed is that of
inference, interleaved in one process; `ratio` is relative to the first rate.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import engine
from augment import ViewOptions
from datasets import DataOptions, build_sources
from flags import COUNT, TRAINED, fill, keep_rates
from loaders import LoaderOptions, build_val_loader
from models import normalization
from models_evit import evit_blocks, is_evit
from tools import command, pictures
from tools.outcomes import accuracy_row, evaluate_images, wilson
from tools.predict import score_name
from tools.speed_test import describe, inference
from tools.timing import interleaved_rates, ratio_row, write_results
from utils import UserError, World

NARROWEST_ACCURACY = 5.0  # minimum span of the axis in percentage points


def measure(trained: command.Trained, world: World) -> list[dict[str, Any]]:
    """Return a row for each keep rate; changes of top-1 and ratios of images/s are relative to the first one."""
    own, run = trained.own, trained.run
    if not is_evit(run.model) and not evit_blocks(command.load_model(run, trained.weights, own.resume, world.device)):
        raise UserError(f"--model {run.model}: has no EViT blocks; add --model with the evit_* model of its size")
    models = command.load_at_rates(trained, own.keep_rates, world.device)
    if run.compile:
        for model in models:
            model.compile()
    train, val = build_sources(fill(DataOptions, run), world.local_rank, eval_only=True)
    val = command.checked_data(trained, models[0], train, val)
    views, options, amp = fill(ViewOptions, run), fill(LoaderOptions, run), engine.select_amp(run.amp, world.device)
    loader = build_val_loader(val, views, normalization(models[0]), options, world)
    results = [evaluate_images(model, loader, score_name(trained.about), amp) for model in models]
    height, width = run.input_size[0], run.input_size[-1]
    images = torch.randn(run.batch_size, 3, height, width, device=world.device)
    works = [inference(model, images, amp, own.steps) for model in models]
    rates = interleaved_rates(works, own.rounds, world.device)
    return [
        {"keep_rate": rate}
        | accuracy_row(result, results[0])
        | ratio_row(own_rates, rates[0])
        | describe(model, (height, width))
        for rate, result, own_rates, model in zip(own.keep_rates, results, rates, models, strict=True)
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows for a terminal of 80 columns; a long list of rates has its own line."""
    heads = f"{'keep rate':>11s} {'top-1 %':>8s} {'interval':>13s} {'change':>7s} {'interval':>13s}"
    lines = [f"{heads} {'images/s':>9s} {'ratio':>6s} {'GMACs':>6s}"]
    for row in rows:
        low, high = row["acc1_interval"]
        less, more = row["acc1_change_interval"]
        around, changed = f"{low:.2f}-{high:.2f}", f"{less:+.2f} {more:+.2f}"
        changed = changed if len(changed) <= 13 else f"{less:+.1f} {more:+.1f}"
        rate, giga = label(row["keep_rate"]), (row["macs"] or 0) / 1e9
        macs = f"{giga:.3f}" if 0 < giga < 100 else f"{giga:.1f}" if giga else "-"
        if len(rate) > 11:
            lines += textwrap.wrap(rate, 80)
            rate = ""
        lines.append(
            f"{rate:>11s} {row['acc1']:8.2f} {around:>13s} {row['acc1_change']:+7.2f} "
            f"{changed:>13s} {row['images_per_second']:9.1f} {row['ratio']:6.2f} {macs:>6s}"
        )
    return "\n".join(lines)


def label(keep_rate: float | Sequence[float]) -> str:
    """Format a keep rate: `0.7`, or `0.7,0.7,0.5` for one per layer."""
    return ",".join(f"{rate:g}" for rate in ([keep_rate] if isinstance(keep_rate, float) else keep_rate))


def plot(rows: Sequence[dict[str, Any]], file: Path, title: str) -> None:
    """Plot accuracy over images/s, one point with error bars per keep rate.

    All rates see the same images, so differences are more certain than the error bars suggest: see `change`.
    """
    rows = sorted(rows, key=lambda row: -np.mean(row["keep_rate"]))  # order along the line
    speed, accuracy = (np.array([row[name] for row in rows]) for name in ("images_per_second", "acc1"))
    low, high = np.array([wilson(round(row["acc1"] * row["images"] / 100), row["images"]) for row in rows]).T
    ends = [f"images_per_second_{end}" for end in ("min", "max")]  # older files do not have them
    slowest, fastest = (np.array([row.get(end, row["images_per_second"]) for row in rows]) for end in ends)
    notes = f"Numbers: keep rates. Vertical bars: 95 % intervals for {rows[0]['images']:,.0f} images."
    notes += "\nHorizontal bars: slowest to fastest round." if (fastest > slowest).any() else ""
    with pictures.plot(file, 6.4, 4.4) as figure:
        axes = figure.subplots()
        axes.plot(speed, accuracy, color="lightgray", zorder=0)
        along, across = np.maximum([accuracy - low, high - accuracy], 0), (speed - slowest, fastest - speed)
        axes.errorbar(speed, accuracy, along, across, fmt="o", color=pictures.COLORS[0], capsize=3, linewidth=1)
        for artist in (*axes.lines, *axes.collections):
            artist.set_clip_on(False)  # for points at 0 or 100 %
        axes.set_xlim(0, 1.1 * fastest.max())
        room = 0.15 * (high.max() - low.min())  # for the labels
        axes.set_ylim(*pictures.limits([low.min() - room, high.max() + room], NARROWEST_ACCURACY, 0.0, 100.0))
        axes.set_xlabel(f"inference speed (images/s)\n{notes}")
        axes.set_ylabel("validation top-1 accuracy (%)")
        axes.set_title(pictures.plain(title, longest=80))
        points, bars = zip(speed, accuracy, strict=True), zip(slowest, low, fastest, high, strict=True)
        pictures.label_points(axes, list(points), list(bars), [label(row["keep_rate"]) for row in rows])


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.get_parser("tradeoff", __doc__, reads=command.OF_EVALUATION - {"base_keep_rate"} | {"compile"})
    default = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    add = parser.add_argument
    add(
        "--keep-rates",
        nargs="+",
        type=keep_rates,
        default=default,
        metavar="RATE",
        help="keep rates to evaluate: one for all layers of --drop-loc, or one per layer: 0.7,0.7,0.5",
    )
    add("--steps", type=COUNT, default=2, help="passes per round of the speed measurement")
    add("--rounds", type=COUNT, default=5, help="timed rounds of each keep rate")
    add("--output", type=Path, help="write the rows to this JSON file, and a plot next to it")
    with command.one_line_errors("tradeoff"):
        trained = command.parse(parser, argv)
        own, run = trained.own, trained.run
        if own.output and own.output.suffix.lower() in pictures.PLOT_SUFFIXES:
            raise UserError(f"--output {own.output}: is the name of the plot; name a .json file next to it")
        world = command.start(trained, "measures")
        rows = measure(trained, world)
        print(table(rows))
        if own.output:
            named = [name for name in (*TRAINED, "batch_size", "amp", "compile") if name != "data_path"]
            settings = {name: getattr(run, name) for name in named}
            settings |= {name: getattr(own, name) for name in ("resume", "ema", "steps", "rounds")}
            write_results(own.output, world.device, settings, {"rows": rows})
            plot(rows, own.output.with_suffix(".png"), f"{run.model} on {run.data_set}, {run.input_size[0]} px")


if __name__ == "__main__":
    main()
