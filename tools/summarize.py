"""Compare runs in a table: accuracy, speed, model and data set of each run.

    python -m tools.summarize output/* --sort best

`best` is the highest validation top-1, next to its epoch. For an EViT, only
epochs at the final keep rate count, as for best.pth. Images/s is the median
over epochs; minutes are training time without evaluation, unknown if log.txt
lacks the first epochs. --within M compares runs at equal training time: it uses
only the epochs of the first M minutes.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flags import Parser, in_range
from tools import command
from tools.runs import Run, number, read_run
from utils import UserError, escaped

# Columns: key in csv and json, heading in the table.
COLUMNS = {
    "folder": "run",
    "epochs": "epochs",
    "test_acc1": "top-1 %",
    "best": "best %",
    "best_epoch": "at epoch",
    "test_ema_acc1": "EMA %",
    "images_per_second": "images/s",
    "minutes": "minutes",
    "model": "model",
    "data_set": "data set",
}
DIGITS = {"images_per_second": 0, "minutes": 1}  # after the point; 2 for accuracies
FIELDS = ("folder", "epochs", "planned_epochs", *list(COLUMNS)[2:])
TEXTS = ("folder", "model", "data_set")  # sorted ascending; numbers descending


def build_parser() -> Parser:
    parser = Parser(prog="python -m tools.summarize", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of runs")
    columns = f"column to sort by, numbers descending, text ascending: {', '.join(FIELDS)}"
    parser.add_argument("--sort", choices=FIELDS, default="best", metavar="COLUMN", help=columns)
    parser.add_argument(
        "--within", type=in_range(float, 0), metavar="M", help="use only the epochs of the first M minutes of training"
    )
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table", help="format of the output")
    return parser


def summarize_run(run: Run) -> dict[str, Any]:
    """Return the row of a run with the keys `FIELDS`; None for values that its files do not contain."""
    tested = [(value, record) for value, record in zip(run.values("test_acc1"), run.records, strict=True)]
    counted = [pair for pair in tested if pair[0] is not None and run.is_comparable(pair[1])]
    best, at = max(counted, key=lambda pair: pair[0], default=(None, {}))
    rates = [rate for rate in run.values("images_per_second") if rate is not None]
    names = {key: run.config.get(key) for key in ("model", "data_set")}
    return {
        "folder": str(run.folder),
        "epochs": len(run.records),
        "planned_epochs": number(run.config.get("epochs")) and int(run.config["epochs"]),
        "test_acc1": _last(run.values("test_acc1")),
        "best": best,
        "best_epoch": at.get("epoch"),
        "test_ema_acc1": _last(run.values("test_ema_acc1")),
        "images_per_second": statistics.median(rates) if rates else None,
        "minutes": _last(run.values("minutes")),
    } | {key: name if isinstance(name, str) else None for key, name in names.items()}


def _last(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)


def sorted_rows(rows: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Sort rows by one of the `FIELDS`, then by folder; rows without a value come last."""

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        value = row[key]
        return value is None, value if key in TEXTS else -(value or 0), row["folder"]

    return sorted(rows, key=order)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows for a terminal."""
    lines = [list(COLUMNS.values()), *([_cell(row, name) for name in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = zip(line, widths, COLUMNS, strict=True)
        padded = [cell.ljust(width) if name in TEXTS else cell.rjust(width) for cell, width, name in cells]
        text.append("  ".join(padded).rstrip())
    return "\n".join(text)


def _cell(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if name == "epochs":
        return f"{value}/{row['planned_epochs']}" if row["planned_epochs"] else str(value)
    if isinstance(value, float):
        return f"{value:.{DIGITS.get(name, 2)}f}"
    return "-" if value is None else escaped(str(value))


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows as CSV with a header; missing values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: escaped(v) if isinstance(v, str) else v for key, v in row.items()} for row in rows)
    return text.getvalue().rstrip("\n")


def main(argv: Sequence[str] | None = None) -> None:
    with command.one_line_errors("summarize"):
        own = build_parser().parse_args(argv)
        rows, failed = [], []
        for folder in own.folders:
            try:
                run = read_run(folder)
                rows.append(summarize_run(run if own.within is None else run.within(own.within)))
            except UserError as error:
                failed.append(error)
        if not rows:
            for error in failed[:-1]:
                print(f"summarize: {escaped(str(error))}", file=sys.stderr)
            raise failed[-1]
        for error in failed:
            print(f"summarize: skipped {escaped(str(error))}", file=sys.stderr)
        rows = sorted_rows(rows, own.sort)
        formats = {"table": table, "csv": as_csv, "json": lambda rows: json.dumps(rows, indent=1)}
        print(formats[own.format](rows))


if __name__ == "__main__":
    main()
