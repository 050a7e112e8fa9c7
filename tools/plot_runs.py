"""Plot values of several runs from their log.txt, one panel per value.

    python -m tools.plot_runs output/A output/B --keys test_acc1 train_loss

An axis of accuracy spans at least 5 points, one of loss at least a tenth of its
largest value. Throughput and times start at 0.
"""

from __future__ import annotations

import difflib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flags import Parser
from tools import command, pictures
from tools.runs import Run, read_run, short_names
from utils import UserError, escaped

NARROWEST_ACCURACY = 5.0  # percentage points
NARROWEST_SHARE = 0.1  # of the largest value, for other axes
MAX_MARKERS = 20  # on a curve
TITLES = {
    "train_loss": "training loss",
    "train_lr": "learning rate",
    "images_per_second": "training throughput",
    "keep_rate": "keep rate",
    "n_parameters": "trainable parameters",
    "train_images": "training images per epoch",
}
MEASURES = {"loss": "loss", "acc1": "top-1 accuracy", "acc5": "top-5 accuracy"}
TITLES |= {f"test_{name}": f"validation {title}" for name, title in MEASURES.items()}
TITLES |= {f"test_ema_{name}": f"validation {title}, EMA weights" for name, title in MEASURES.items()}


@dataclass(frozen=True)
class Reference:
    """A point of another source: its position and its name in the legend."""

    x: float
    y: float
    name: str


def reference_point(text: str) -> Reference:
    """Parse `186,78,175 epochs on a GPU` into `Reference(186.0, 78.0, "175 epochs on a GPU")`."""
    x, y, name = text.split(",", 2)
    if not (math.isfinite(float(x)) and math.isfinite(float(y)) and name.strip()):
        raise ValueError
    return Reference(float(x), float(y), name.strip())


reference_point.__name__ = "X,Y,NAME"  # argparse's errors name it


def build_parser() -> Parser:
    parser = Parser(prog="python -m tools.plot_runs", description=__doc__)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, help="output folders of runs")
    add("--keys", nargs="+", default=["test_acc1", "train_loss"], help="values of log.txt, one panel each")
    add("--x", choices=("epoch", "minutes", "images"), default="epoch", help="horizontal axis")
    reference = "mark a point in the first panel, such as a published result; may be repeated"
    add("--reference", type=reference_point, action="append", default=[], metavar="X,Y,NAME", help=reference)
    add(
        "--output", type=Path, default=Path("curves.png"), help=f"file of the plot: {', '.join(pictures.PLOT_SUFFIXES)}"
    )
    return parser


def positions(runs: Sequence[Run], axis: str) -> tuple[str, list[list[float | None]]]:
    """Return the label of the horizontal axis, and the position of each record of each run on it.

    Raises:
        UserError: if a log does not hold what is needed.
    """
    if axis == "epoch":
        return "epoch", [run.values("epoch") for run in runs]
    for run in runs:
        if None in run.values("images") or (axis == "minutes" and run.why_untimed()):
            raise UserError(f"--x {axis}: {run.why_untimed()}; use --x epoch")
    if axis == "images":
        return "training images seen", [run.values("images") for run in runs]
    return "training time without evaluation (minutes)", [run.values("minutes") for run in runs]


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
    """Return True if the values are percentages of correct predictions."""
    return key.endswith(("acc1", "acc5"))


def value_limits(key: str, values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the vertical axis of a panel."""
    if is_accuracy(key):
        return pictures.limits(values, NARROWEST_ACCURACY, 0.0, 100.0)
    if key == "keep_rate":
        return 0.0, 1.05
    if key == "images_per_second":
        return 0.0, 1.1 * max(max(values), 1e-9)
    narrowest = max(NARROWEST_SHARE * max(map(abs, values)), 1e-12)
    return pictures.limits(values, narrowest, 0.0 if min(values) >= 0 else -math.inf)


def draw_panel(
    axes: Any,
    key: str,
    runs: Sequence[Run],
    all_xs: Sequence[Sequence[float | None]],
    references: Sequence[Reference],
) -> None:
    """Draw one value of all runs, with a marker at records that have it, and a star at each reference."""
    drawn = [reference.y for reference in references]
    for index, reference in enumerate(references):
        style = _reference_style(index)
        axes.plot([reference.x], [reference.y], **style, clip_on=False)
        axes.axhline(reference.y, color=style["color"], linestyle=":", linewidth=0.8)
    for index, (run, xs) in enumerate(zip(runs, all_xs, strict=True)):
        points = [(x, y) for x, y in zip(xs, run.values(key), strict=True) if x is not None and y is not None]
        if points:
            every = -(-len(points) // MAX_MARKERS)
            axes.plot(*zip(*points, strict=True), **pictures.line_style(index), markevery=every, clip_on=False)
            drawn += [y for _, y in points]
    if drawn:
        axes.set_ylim(*value_limits(key, drawn))
    unit = " (%)" if is_accuracy(key) else " (images/s)" if key == "images_per_second" else ""
    axes.set_title(pictures.plain(TITLES.get(key, key)))
    axes.set_ylabel(pictures.plain(key) + unit)


def _reference_style(index: int) -> dict[str, Any]:
    colors = ("#000000", "#808080")
    return {"color": colors[index % len(colors)], "linestyle": "", "marker": "*", "markersize": 10}


def plot(runs: Sequence[Run], keys: Sequence[str], axis: str, file: Path, references: Sequence[Reference] = ()) -> None:
    """Draw a panel per key with a common legend below. The references are in the first panel.

    Raises:
        UserError: see `positions`.
    """
    from matplotlib.lines import Line2D  # slow to import
    from matplotlib.ticker import EngFormatter, MaxNLocator

    label, all_xs = positions(runs, axis)
    columns = min(len(keys), 3 if len(keys) in (3, 5, 6, 9) else 2)
    rows = -(-len(keys) // columns)
    names = [*short_names([run.folder for run in runs]), *(reference.name for reference in references)]
    names = [pictures.plain(name) for name in names]
    names = [f" {name}" if name.startswith("_") else name for name in names]  # matplotlib hides those
    width = 4.8 * columns
    legend_columns = min(len(names), max(1, int(width / (0.085 * max(map(len, names)) + 0.8))))
    legend_height = 0.2 * -(-len(names) // legend_columns) + 0.15  # inches
    with pictures.plot(file, width, height := 3.4 * rows + legend_height) as figure:
        share = legend_height / height
        figure.get_layout_engine().set(rect=(0, share, 1, 1 - share), w_pad=0.1, h_pad=0.1)
        panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
        for index, (axes, key) in enumerate(zip(panels, keys, strict=False)):
            draw_panel(axes, key, runs, all_xs, () if index else references)
            axes.set_xlabel(label)
            axes.tick_params(labelbottom=True)  # which sharing turns off, except in the last row
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=axis == "epoch"))
            if axis != "epoch":
                axes.set_xlim(left=0)
            if axis == "images":
                axes.xaxis.set_major_formatter(EngFormatter())
        for axes in panels[len(keys) :]:
            axes.remove()
        styles = [pictures.line_style(index) for index in range(len(runs))]
        styles += [_reference_style(index) for index in range(len(references))]
        handles = [Line2D([], [], **style) for style in styles]
        figure.legend(handles, names, loc="lower center", ncol=legend_columns, handlelength=3)


def main(argv: Sequence[str] | None = None) -> None:
    with command.one_line_errors("plot_runs"):
        own = build_parser().parse_args(argv)
        pictures.check_plot_name(own.output)
        folders = {os.path.abspath(folder): folder for folder in own.folders}  # each once
        runs, keys = [read_run(folder) for folder in folders.values()], list(dict.fromkeys(own.keys))
        check_keys(runs, keys)
        plot(runs, keys, own.x, own.output, own.reference)
        print(f"{own.output}: {', '.join(keys)} of {len(runs)} {'run' if len(runs) == 1 else 'runs'}")


if __name__ == "__main__":
    main()
