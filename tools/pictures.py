"""Pictures of the tools, all in one style: matplotlib plots, and sheets of image panels drawn with PIL."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils import UserError, escaped

# Okabe and Ito's colors without yellow: told apart by the color-blind. Lines and markers tell them apart in gray.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
PLOT_SUFFIXES = (".png", ".pdf", ".svg")
RC = {"font.size": 10, "axes.titlesize": 11, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 1.3}
RC |= {"lines.markersize": 4.5, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}

Box = tuple[float, float, float, float]  # left, bottom, right, top
_LABEL_POSITIONS = [  # above or below the error bar, offset to the side and away from it in points; the nearest first
    (up, side * distance, up * distance)
    for distance in (4, 15, 26, 37, 48)
    for up in (1, -1)
    for side in (0, 0.6, -0.6, 1.5, -1.5)
]

GAP, MARGIN = 6, 10  # pixels between panels and around the sheet
SMALLEST_PANEL = 224  # pixels; smaller images are enlarged
HATCH_PERIOD, HATCH_WIDTH = 8, 2  # pixels


# -- plots -------------------------------------------------------------------------------------------------------------


def check_plot_name(file: Path) -> None:
    """Make sure that a plot can be written in the format that its name asks for.

    Raises:
        UserError: if not.
    """
    if file.suffix.lower() not in PLOT_SUFFIXES:
        known = ", ".join(PLOT_SUFFIXES)
        raise UserError(f"--output {file}: is not named {known}; try {file.with_suffix('.png').name or 'plot.png'}")


@contextlib.contextmanager
def plot(file: Path, width: float, height: float) -> Iterator[Any]:
    """Yield a matplotlib Figure of this size in inches and write it to `file` at the end; needs no display."""
    import matplotlib  # slow to import
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc may ask for LaTeX
        matplotlib.rcParams.update(RC)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)  # measures texts
        yield figure
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)


def line_style(index: int) -> dict[str, str]:
    """Return color, line and marker of the curve at this index; the first 28 differ in color or line."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def plain(text: str, longest: int = 60) -> str:
    """Make a text safe for matplotlib: no mathtext, no control characters, not too long.

    Its font has no glyphs for Chinese, Japanese and Korean: they become question marks.
    """
    text = "".join(char if ord(char) < 0x2E80 else "?" for char in escaped(text))
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[-(longest // 2 - 1) :]}"
    return text.replace("$", r"\$")


def limits(
    values: Sequence[float], narrowest: float, lowest: float = -math.inf, highest: float = math.inf
) -> tuple[float, float]:
    """Return the ends of an axis around the values, at least `narrowest` apart, so that noise looks like noise.

    Args:
        lowest, highest: the values' natural bounds, such as 0 and 100 %, which the axis does not exceed.
    """
    low, high = min(values), max(values)
    width = max(narrowest, 1.1 * (high - low))
    start = min(max((low + high - width) / 2, lowest), highest - width)
    return max(start, lowest), min(start + width, highest)


def label_points(axes: Any, points: Sequence[tuple[float, float]], bars: Sequence[Box], labels: Sequence[str]) -> None:
    """Write a label above or below the error bars of each point where it covers no other label and no other bars.

    A label that finds no free position is written above its bar. Set the limits of the axes before.

    Args:
        bars: ends of each point's error bars.
    """
    from matplotlib.text import Text  # slow to import

    renderer = axes.figure.canvas.get_renderer()
    axes.figure.draw(renderer)  # fixes the layout
    taken = []
    for (x, y), (x0, y0, x1, y1) in zip(points, bars, strict=True):
        left, low, right, high = axes.transData.transform([(x0, y), (x, y0), (x1, y), (x, y1)])
        taken.append((left[0] - 5, left[1] - 5, right[0] + 5, right[1] + 5))
        taken.append((low[0] - 5, low[1] - 3, high[0] + 5, high[1] + 3))
    line = {"arrowstyle": "-", "color": "gray", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
    for (x, _), (_, y0, _, y1), label in zip(points, bars, labels, strict=True):
        text = axes.annotate(label, (x, y1), (0, 0), textcoords="offset points", ha="center", arrowprops=line)
        text.set_in_layout(False)  # which has been fixed
        for position in (*_LABEL_POSITIONS, _LABEL_POSITIONS[0]):
            up, aside, away = position
            text.xy = (x, y1 if up > 0 else y0)
            text.set(position=(aside, away), va="bottom" if up > 0 else "top")
            text.update_positions(renderer)
            box = tuple(Text.get_window_extent(text, renderer).extents)  # without the line
            if _is_inside(box, axes.bbox.extents) and not any(_overlap(box, other) for other in taken):
                break
        taken.append((box[0] - 4, box[1], box[2] + 4, box[3]))


def _overlap(one: Box, other: Box) -> bool:
    """Return True if two boxes (x0, y0, x1, y1) overlap."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _is_inside(box: Box, around: Box) -> bool:
    return around[0] <= box[0] and around[1] <= box[1] and box[2] <= around[2] and box[3] <= around[3]


# -- sheets of image panels --------------------------------------------------------------------------------------------


Row = tuple[str, Sequence[np.ndarray]]  # a label, and pictures uint8 [H, W, 3]


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans, which matplotlib includes, at a size in pixels."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def zoom(width: int) -> int:
    """Return the integer factor by which to enlarge an image of this width in pixels."""
    return max(1, -(-SMALLEST_PANEL // width))


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """Enlarge an image [H, W, C]: each pixel becomes a square of `zoom` pixels."""
    factor = zoom(pixels.shape[1])
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def dimmed(pixels: np.ndarray) -> np.ndarray:
    """Dim an image [H, W, 3] to low-contrast gray with dark diagonal lines, unlike any image."""
    height, width, _ = pixels.shape
    gray = 0.2 * pixels.mean(axis=2) + 0.8 * 96
    lines = np.add.outer(np.arange(height), np.arange(width)) % HATCH_PERIOD < HATCH_WIDTH
    return np.repeat(np.where(lines, gray - 50, gray)[:, :, None], 3, axis=2).round().astype(np.uint8)


def sheet(rows: Sequence[Row], headings: Sequence[str], title: str = "", caption: str = "") -> Image.Image:
    """Draw rows of panels of one size, with a heading above each column and a label before each row.

    The last panel ends `MARGIN` pixels before the right edge, and panels are `GAP` pixels apart.

    Args:
        headings: one per column.
        title, caption: above and below all. Texts that are too long are wrapped.
    """
    height, width, _ = rows[0][1][0].shape
    size = min(max(14, width // 16), 28)
    face, line = font(size), round(1.3 * size)
    indent = max(math.ceil(face.getlength(escaped(label))) for label, _ in rows)
    left = MARGIN + (indent + MARGIN if indent else 0)
    right = left + (width + GAP) * len(headings) - GAP
    above, below = _wrapped(title, face, right - MARGIN), _wrapped(caption, face, right - MARGIN)
    columns = [[part for text in heading.split("\n") for part in _wrapped(text, face, width)] for heading in headings]
    heading_top = MARGIN + line * len(above) + (GAP if above else 0)
    top = heading_top + line * max(map(len, columns)) + GAP
    bottom = top + (height + GAP) * len(rows) - GAP
    end = bottom + (GAP + line * len(below) if below else 0)
    canvas = Image.new("RGB", (right + MARGIN, end + MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    blocks = [(MARGIN, MARGIN, above), (MARGIN, bottom + GAP, below)]
    blocks += [(left + column * (width + GAP), heading_top, lines) for column, lines in enumerate(columns)]
    for x, y, lines in blocks:
        for number, text in enumerate(lines):
            pen.text((x, y + number * line), text, fill="black", font=face)
    for number, (label, pictures) in enumerate(rows):
        y = top + number * (height + GAP)
        pen.text((MARGIN, y + height // 2), escaped(label), fill="black", font=face, anchor="lm")
        for column, picture in enumerate(pictures):
            canvas.paste(Image.fromarray(picture), (left + column * (width + GAP), y))
    return canvas


def _wrapped(text: str, face: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels, at spaces, or within a word longer than a line."""
    lines: list[str] = []
    for word in escaped(text).split():
        if lines and face.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for char in word:
            if lines[-1] and face.getlength(lines[-1] + char) > width:
                lines.append("")
            lines[-1] += char
    return lines
