"""Pictures and HTML page of `tools.report`, drawn from the numbers in report.json."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools import pictures
from utils import escaped

BLUE, ORANGE, GRAY = *pictures.COLORS[:2], "#777777"
MAX_NUMBERS = 20  # maximum number of classes for numbers in the cells of a confusion matrix
MAX_PAIRS = 30  # confusions on the page
MAX_LABEL_LENGTH = 24  # characters of a class name in a picture
FIGURES = {"reliability": "reliability.png", "confusion": "confusion.png", "keep_rates": "keep_rates.png"}


# -- pictures ----------------------------------------------------------------------------------------------------------


def draw_figures(report: dict[str, Any], folder: Path) -> None:
    """Write the PNG files of `FIGURES` that the report has numbers for."""
    _draw_reliability(report["calibration"], folder / FIGURES["reliability"])
    if report["confusion_matrix"] is not None:
        names = [row["class"] for row in report["classes"]]
        _draw_confusion(np.array(report["confusion_matrix"]), names, folder / FIGURES["confusion"])
    if report["keep_rates"]:
        _draw_keep_rates(report["keep_rates"], folder / FIGURES["keep_rates"])


def _legend_above(axes: Any) -> None:
    """Draw a legend above the axes, where it hides nothing."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=9)


def _draw_reliability(calibration: dict[str, Any], file: Path) -> None:
    """Draw accuracy over confidence by bin, above the number of images per bin."""
    with pictures.plot(file, 5, 5.5) as figure:
        above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        edges = [100 * row["low"] for row in calibration["bins"]]
        width = 100 / len(edges)
        filled = [row for row in calibration["bins"] if row["images"]]
        bars = {"width": width, "align": "edge", "color": BLUE, "edgecolor": "white"}
        above.bar([100 * row["low"] for row in filled], [row["accuracy"] for row in filled], label="accuracy", **bars)
        points = [row["confidence"] for row in filled]
        above.plot(points, points, "D", color=ORANGE, markersize=5, label="mean confidence")
        above.plot([0, 100], [0, 100], "--", color=GRAY, linewidth=1, label="perfect calibration")
        above.set(ylabel="top-1 accuracy (%)", xlim=(0, 100), ylim=(0, 100))
        figure.suptitle(f"expected calibration error {calibration['ece']:.1f} %", fontsize=11)
        _legend_above(above)
        below.bar(edges, [row["images"] for row in calibration["bins"]], **bars)
        below.set(xlabel="probability of the predicted class (%)", ylabel="images")
        for axes in (above, below):
            axes.set_axisbelow(True)


def _draw_confusion(matrix: np.ndarray, names: Sequence[str], file: Path) -> None:
    """Draw the confusion matrix, shaded by the share of each true class; small matrices show counts.

    Shades follow the square root, which makes rare confusions visible.
    """
    from matplotlib.colors import PowerNorm

    count = len(names)
    has_numbers = count <= MAX_NUMBERS
    side = 2.5 + (0.55 if has_numbers else 0.12) * count
    with pictures.plot(file, max(5, side + 1), max(4, side)) as figure:
        axes = figure.subplots()
        axes.grid(False)
        share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        picture = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 100))
        bar = figure.colorbar(picture, ax=axes, shrink=0.8, ticks=(0, 1, 5, 10, 20, 40, 60, 80, 100))
        bar.set_label("share of the true class's images (%)")
        labels = [pictures.plain(name, MAX_LABEL_LENGTH) for name in names]
        size = {"fontsize": 10 if has_numbers else 7}
        axes.set_xticks(range(count), labels=labels, rotation=90 if count > 5 else 30, **size)
        if count <= 5:
            for text in axes.get_xticklabels():
                text.set(ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), labels=labels, **size)
        axes.set(xlabel="predicted class", ylabel="true class")
        if has_numbers:
            for (row, column), images in np.ndenumerate(matrix):
                color = "white" if share[row, column] > 35 else "black" if images else GRAY
                axes.text(column, row, str(images), ha="center", va="center", color=color, fontsize=9)


def rate_label(rate: float | Sequence[float]) -> str:
    """Format a keep rate: `0.7`, or `0.7, 0.7, 0.5` for one per layer."""
    return ", ".join(f"{each:g}" for each in ([rate] if isinstance(rate, (int, float)) else rate))


def _draw_keep_rates(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw top-1 with its interval at each keep rate; the model's own is highlighted."""
    with pictures.plot(file, max(5, 0.9 * len(rows) + 1), 3.5) as figure:
        axes = figure.subplots()
        for own, color, marker, label in (
            (False, BLUE, "o", "other keep rates"),
            (True, ORANGE, "D", "the model's own"),
        ):
            chosen = [index for index, row in enumerate(rows) if row["is_own"] == own]
            tops = np.array([rows[index]["acc1"] for index in chosen])
            margins = np.abs(np.array([rows[index]["interval"] for index in chosen]).reshape(-1, 2).T - tops)
            axes.errorbar(chosen, tops, margins, fmt=marker, color=color, capsize=4, label=label)
        axes.set_xticks(range(len(rows)), labels=[rate_label(row["keep_rate"]) for row in rows])
        axes.set(xlabel="keep rate", ylabel="top-1 accuracy (%)")
        axes.margins(0.1)
        _legend_above(axes)


# -- the page ----------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem .2rem 0; text-align: left; overflow-wrap: anywhere; }
th { border-bottom: 1px solid #888; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
img.figure { max-width: 100%; } .note { color: #555; }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { font-size: .85rem; overflow-wrap: anywhere; } figure img { max-width: 100%; }
"""


def _text(value: Any) -> str:
    """Escape a value for the page: one line, without control characters or markup."""
    return html.escape(escaped(str(value)))


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f} %"


def _interval(bounds: Sequence[float] | None) -> str:
    return "–" if bounds is None else f"{bounds[0]:.1f} to {bounds[1]:.1f} %"


def _table(headings: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[int] = ()) -> str:
    """Build an HTML table; the columns `numbers` are right-aligned."""

    def line(tag: str, cells: Sequence[Any]) -> str:
        kinds = [' class="number"' if column in numbers else "" for column in range(len(cells))]
        return "".join(f"<{tag}{kind}>{_text(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{line('th', headings)}</tr></thead>\n" if any(headings) else ""
    return f"<table>\n{head}<tbody>\n{body}\n</tbody>\n</table>"


def _picture(figure: str, width: int, text: str) -> str:
    return f'<p><img class="figure" src="{FIGURES[figure]}" width="{width}" alt="{html.escape(text)}"></p>'


def _summary(report: dict[str, Any]) -> str:
    settings = report["settings"]
    rows = [
        ("top-1", f"{report['acc1']:.2f} %, 95 % interval {_interval(report['interval'])}"),
        ("top-5", f"{report['acc5']:.2f} %"),
        ("loss (cross-entropy)", f"{report['loss']:.4f}"),
        ("expected calibration error", f"{report['calibration']['ece']:.2f} %"),
        ("images, classes", f"{report['images']}, {len(report['classes'])}"),
        ("checkpoint", settings["resume"] + (" (EMA weights)" if settings["ema"] else "")),
        ("model", settings["model"]),
        ("data", " ".join(str(settings[name]) for name in ("data_set", "data_path") if settings[name])),
        ("input size", " × ".join(str(side) for side in settings["input_size"]) + " px"),
        ("precision, device", f"{settings['precision']}, {report['environment']['device']}"),
    ]
    return _table(("", ""), rows)


def _classes(report: dict[str, Any]) -> str:
    worst_first = sorted(report["classes"], key=lambda row: 101 if row["acc1"] is None else row["acc1"])
    rows = [
        (row["class"], row["images"], row["correct"], _percent(row["acc1"]), _interval(row["interval"]))
        for row in worst_first
    ]
    note = "<p class='note'>The least accurate class comes first. Intervals are Wilson's, of 95 %.</p>"
    return note + _table(("class", "images", "correct", "top-1", "95 % interval"), rows, (1, 2, 3, 4))


def _confusions(report: dict[str, Any]) -> str:
    parts = []
    if report["confusion_matrix"] is not None:
        text = "Confusion matrix: a row for each true class, a column for each predicted class"
        parts.append(_picture("confusion", min(960, 400 + 24 * len(report["classes"])), text))
    pairs = report["confused_pairs"]
    rows = [(row["true"], row["predicted"], row["images"], _percent(row["share"])) for row in pairs[:MAX_PAIRS]]
    if rows:
        shown = f"the {MAX_PAIRS} most frequent of {len(pairs)}" if len(pairs) > MAX_PAIRS else "all"
        parts.append(f"<p class='note'>Pairs of true and predicted class, {shown}.</p>")
        parts.append(_table(("true class", "predicted class", "images", "of the true class"), rows, (2, 3)))
    return "\n".join(parts) or "<p>There are none.</p>"


def _mistakes(report: dict[str, Any]) -> str:
    rows = report["mistakes"]
    if not rows:
        return "<p>None shown.</p>"
    if rows[0]["picture"] is None:
        cells = [(row["true"], row["predicted"], _percent(100 * row["probability"])) for row in rows]
        note = "<p class='note'>The images of a stream have no index, so there are no pictures of them.</p>"
        return note + _table(("true class", "predicted class", "probability"), cells, (2,))
    figures = [
        f'<figure><img src="{row["picture"]}" alt="image {row["position"]}"><figcaption>'
        f"predicted: <b>{_text(row['predicted'])}</b> {_percent(100 * row['probability'])}<br>"
        f"true class: {_text(row['true'])} {_percent(100 * row['true_probability'])}<br>"
        f"{_text(row['image'])}</figcaption></figure>"
        for row in rows
    ]
    return '<div class="mistakes">\n' + "\n".join(figures) + "\n</div>"


def _calibration(report: dict[str, Any]) -> str:
    calibration = report["calibration"]
    rows = [
        (
            f"{100 * row['low']:.1f} to {100 * row['high']:.1f} %",
            row["images"],
            _percent(row["confidence"]),
            _percent(row["accuracy"]),
        )
        for row in calibration["bins"]
    ]
    note = (
        f"<p>Expected calibration error {calibration['ece']:.2f} % in {len(rows)} bins of equal width. The mean "
        f"probability of the predicted class ({_text(report['probability'])}) is "
        f"{calibration['mean_confidence']:.2f} %, the top-1 accuracy {report['acc1']:.2f} %.</p>"
    )
    text = "Reliability diagram: accuracy over the probability of the predicted class, and the images in each bin"
    headings = ("probability", "images", "mean probability", "top-1")
    return note + _picture("reliability", 500, text) + _table(headings, rows, (1, 2, 3))


def _keep_rates(report: dict[str, Any]) -> str:
    rows = [
        (
            rate_label(row["keep_rate"]) + (" (the model's own)" if row["is_own"] else ""),
            _percent(row["acc1"], 2),
            _interval(row["interval"]),
            _percent(row["acc5"], 2),
            f"{row['loss']:.4f}",
        )
        for row in report["keep_rates"]
    ]
    table = _table(("keep rate", "top-1", "95 % interval", "top-5", "loss"), rows, (1, 2, 3, 4))
    return _picture("keep_rates", 560, "Top-1 accuracy at each keep rate, with 95 % intervals") + table


def page(report: dict[str, Any]) -> str:
    """Build the HTML page, which needs only the PNG files next to it."""
    sections = {
        "Summary": _summary(report),
        "Accuracy by class": _classes(report),
        "Confusions": _confusions(report),
        "Most confident mistakes": _mistakes(report),
        "Calibration": _calibration(report),
    }
    if report["keep_rates"]:
        sections["Keep rates"] = _keep_rates(report)
    title = f"Evaluation of {_text(report['settings']['resume'])}"
    body = "\n".join(f"<section>\n<h2>{heading}</h2>\n{content}\n</section>" for heading, content in sections.items())
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f"<p class='note'>{_text(report['environment']['date'])}. All numbers are in "
        f"<a href='report.json'>report.json</a>.</p>\n{body}\n</body>\n</html>\n"
    )
