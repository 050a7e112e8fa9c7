"""Plot values of several runs from their log.txt: one panel per value, one curve per run.

    python -m tools.plot_runs output/A output/B --keys test_acc1 train_loss --output curves.png

An axis of accuracy spans at least 5 points, one of loss at least a tenth of its largest value. Throughput starts at 0.
"""

from __future__ import annotations

import difflib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flags import Parser
from tools import command, pictures
from tools.runs import Run, read_run, short_names
from utils import UserError, escaped

NARROWEST_ACCURACY = 5.0  # percentage points
NARROWEST_SHARE = 0.1  # of the largest value, for other axes
MOST_MARKERS = 20  # on a curve
TITLES = {
    "train_loss": "training loss",
    "train_lr": "learning rate",
    "images_per_second": "training throughput",
    "keep_rate": "keep rate",
    "n_parameters": "trainable parameters",
}
MEASURES = {"loss": "loss", "acc1": "top-1 accuracy", "acc5": "top-5 accuracy"}
TITLES |= {f"test_{name}": f"validation {title}" for name, title in MEASURES.items()}
TITLES |= {f"test_ema_{name}": f"validation {title}, EMA weights" for name, title in MEASURES.items()}


def build_parser() -> Parser:
    parser = Parser(prog="python -m tools.plot_runs", description=__doc__)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, help="output folders of runs")
    add("--keys", nargs="+", default=["test_acc1", "train_loss"], help="values of log.txt, one panel each")
    add("--x", choices=("epoch", "minutes", "images"), default="epoch", help="horizontal axis")
    add(
        "--output", type=Path, default=Path("curves.png"), help=f"file of the plot: {', '.join(pictures.PLOT_SUFFIXES)}"
    )
    return parser


def positions(runs: Sequence[Run], axis: str) -> tuple[str, list[list[float | None]]]:
    """Label of the horizontal axis, and where each record of each run is on it.

    Minutes are those of training alone, computed from `images` and `images_per_second`.

    Raises:
        UserError: if a log does not hold what is needed.
    """
    if axis == "epoch":
        return "epoch", [run.values("epoch") for run in runs]
    for run in runs:
        for key in ("images", "images_per_second")[: 1 if axis == "images" else 2]:
            if None in run.values(key):
                no_images = "config.json has no images_per_epoch"
                missing = no_images if key == "images" else f"log.txt has records with no {key}"
                raise UserError(f"--x {axis}: {run.folder}/{missing}; use --x epoch")
    if axis == "images":
        return "training images seen", [run.values("images") for run in runs]
    return "training time without evaluation (minutes)", [_training_minutes(run) for run in runs]


def _training_minutes(run: Run) -> list[float]:
    """Minutes of training up to the end of each epoch, at the logged images/s."""
    minutes, images, times = 0.0, 0.0, []
    for total, rate in zip(run.values("images"), run.values("images_per_second"), strict=True):
        minutes += max(0.0, total - images) / max(rate, 1e-9) / 60
        images = total
        times.append(minutes)
    return times


def check_keys(runs: Sequence[Run], keys: Sequence[str]) -> None:
    """Make sure that each key has a number in some record, and name the runs that have none.

    Raises:
        UserError: if no run has one.
    """
    known = sorted({key for run in runs for record in run.records for key in record if key != "epoch"})
    for key in keys:
        lacking = [run for run in runs if all(value is None for value in run.values(key))]
        if len(lacking) < len(runs):
            for run in lacking:
                print(
                    escaped(f"plot_runs: {run.folder}: no record has {key}; it is not in that panel"), file=sys.stderr
                )
            continue
        if not known:
            raise UserError(f"{runs[0].folder / 'log.txt'}: holds no records yet; wait for the end of the first epoch")
        if key in known:
            raise UserError(f"--keys {key}: no record has a finite number for it; drop the key")
        near = difflib.get_close_matches(key, known, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"--keys {key}: no record has it; {hint}log.txt has {', '.join(known)}")


def is_accuracy(key: str) -> bool:
    """Whether the values are percentages of correct predictions."""
    return key.endswith(("acc1", "acc5"))


def value_limits(key: str, values: Sequence[float]) -> tuple[float, float]:
    """Ends of the vertical axis of a panel."""
    if is_accuracy(key):
        return pictures.limits(values, NARROWEST_ACCURACY, 0.0, 100.0)
    if key == "keep_rate":
        return 0.0, 1.05
    if key == "images_per_second":
        return 0.0, 1.1 * max(max(values), 1e-9)
    narrowest = max(NARROWEST_SHARE * max(map(abs, values)), 1e-12)
    return pictures.limits(values, narrowest, 0.0 if min(values) >= 0 else -math.inf)


def draw_panel(axes: Any, key: str, runs: Sequence[Run], all_xs: Sequence[Sequence[float | None]]) -> None:
    """Draw one value of all runs, with a marker at records that have it."""
    drawn = []
    for index, (run, xs) in enumerate(zip(runs, all_xs, strict=True)):
        points = [(x, y) for x, y in zip(xs, run.values(key), strict=True) if x is not None and y is not None]
        if points:
            every = -(-len(points) // MOST_MARKERS)
            axes.plot(*zip(*points, strict=True), **pictures.line_style(index), markevery=every, clip_on=False)
            drawn += [y for _, y in points]
    if drawn:
        axes.set_ylim(*value_limits(key, drawn))
    unit = " (%)" if is_accuracy(key) else " (images/s)" if key == "images_per_second" else ""
    axes.set_title(pictures.plain(TITLES.get(key, key)))
    axes.set_ylabel(pictures.plain(key) + unit)


def plot(runs: Sequence[Run], keys: Sequence[str], axis: str, file: Path) -> None:
    """Draw a panel per key with a common legend below.

    Raises:
        UserError: see `positions`.
    """
    from matplotlib.lines import Line2D  # slow to import
    from matplotlib.ticker import EngFormatter, MaxNLocator

    label, all_xs = positions(runs, axis)
    columns = min(len(keys), 3 if len(keys) in (3, 5, 6, 9) else 2)
    rows = -(-len(keys) // columns)
    names = [pictures.plain(name) for name in short_names([run.folder for run in runs])]
    names = [f" {name}" if name.startswith("_") else name for name in names]  # matplotlib hides those
    width = 4.8 * columns
    legend_columns = min(len(names), max(1, int(width / (0.085 * max(map(len, names)) + 0.8))))
    legend_height = 0.2 * -(-len(names) // legend_columns) + 0.15  # inches
    with pictures.plot(file, width, height := 3.4 * rows + legend_height) as figure:
        share = legend_height / height
        figure.get_layout_engine().set(rect=(0, share, 1, 1 - share), w_pad=0.1, h_pad=0.1)
        panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
        for axes, key in zip(panels, keys, strict=False):
            draw_panel(axes, key, runs, all_xs)
            axes.set_xlabel(label)
            axes.tick_params(labelbottom=True)  # which sharing turns off, except in the last row
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=axis == "epoch"))
            if axis == "images":
                axes.xaxis.set_major_formatter(EngFormatter())
        for axes in panels[len(keys) :]:
            axes.remove()
        handles = [Line2D([], [], **pictures.line_style(index)) for index in range(len(runs))]
        figure.legend(handles, names, loc="lower center", ncol=legend_columns, handlelength=3)


def main(argv: Sequence[str] | None = None) -> None:
    with command.one_line_errors("plot_runs"):
        own = build_parser().parse_args(argv)
        pictures.check_plot_name(own.output)
        folders = {os.path.abspath(folder): folder for folder in own.folders}  # each once
        runs, keys = [read_run(folder) for folder in folders.values()], list(dict.fromkeys(own.keys))
        check_keys(runs, keys)
        plot(runs, keys, own.x, own.output)
        print(f"{own.output}: {', '.join(keys)} of {len(runs)} {'run' if len(runs) == 1 else 'runs'}")


if __name__ == "__main__":
    main()
