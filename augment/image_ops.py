"""Batched image operations on uint8 tensors: affine resampling and PIL's color operations, on any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

PHASE_BITS = 8
PHASES = 2**PHASE_BITS  # tabulated subpixel positions of the interpolation kernel
CACHED_VALUES = 2_500_000  # of views made at once on a CPU: at 224 px, 16 are 1.7 times as fast each as 64


# -- affine maps -------------------------------------------------------------------------------------------------------


@dataclass
class Affine:
    """Affine map (x, y) -> (a x + b y + c, d x + e y + f) with coefficients [B]; pixel i covers [i, i + 1)."""

    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    d: torch.Tensor
    e: torch.Tensor
    f: torch.Tensor

    @classmethod
    def scaling(cls, scale_y: torch.Tensor, scale_x: torch.Tensor, top: torch.Tensor, left: torch.Tensor) -> Affine:
        """Build the map (x, y) -> (scale_x x + left, scale_y y + top)."""
        none = torch.zeros_like(left)
        return cls(scale_x, none, left, none, scale_y, top)

    @property
    def coefficients(self) -> tuple[torch.Tensor, ...]:
        """The coefficients a to f, in order."""
        return self.a, self.b, self.c, self.d, self.e, self.f

    def after(self, first: Affine) -> Affine:
        """Return the composed map that applies `first`, then this map."""
        return Affine(
            self.a * first.a + self.b * first.d,
            self.a * first.b + self.b * first.e,
            self.a * first.c + self.b * first.f + self.c,
            self.d * first.a + self.e * first.d,
            self.d * first.b + self.e * first.e,
            self.d * first.c + self.e * first.f + self.f,
        )

    def outside(self, height: int, width: int) -> torch.Tensor:
        """Return the pixels [B, 1, height, width] of a view whose centers map to points outside a view of that size."""
        x, y = _centers(width, self.a), _centers(height, self.a)[:, None]
        a, b, c, d, e, f = (each[:, None, None, None] for each in self.coefficients)
        u, v = a * x + (b * y + c), d * x + (e * y + f)
        return (u < 0) | (u >= width) | (v < 0) | (v >= height)


def _centers(number: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(number, device=like.device) + 0.5


# -- resampling --------------------------------------------------------------------------------------------------------


def _bicubic(x: torch.Tensor) -> torch.Tensor:
    """Evaluate Keys' cubic kernel with a = -1/2, which PIL uses."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _bilinear(x: torch.Tensor) -> torch.Tensor:
    return (1 - x.abs()).clamp(min=0)


@dataclass
class Lines:
    """Sampling positions along the lines of an image: skew · l + slope · i + offset for sample i of line l, each [B].

    Attributes:
        first, length: [B], range that positions are clamped to.
        margin: padding pixels before position 0 of each line.
    """

    skew: torch.Tensor
    slope: torch.Tensor
    offset: torch.Tensor
    first: torch.Tensor
    length: torch.Tensor
    margin: int

    def positions(self, lines: torch.Tensor, number: int) -> torch.Tensor:
        """Return positions [B, L, number] in pixels of the image; `lines` [L] are coordinates of the lines."""
        skew, slope, offset, first, length = (
            each[:, None, None] for each in (self.skew, self.slope, self.offset, self.first, self.length)
        )
        positions = slope * _centers(number, slope) + (skew * lines[:, None] + offset)
        return torch.minimum(torch.maximum(positions, first), first + length)


class Resampler:
    """Resampling by an affine map with antialiasing, as two one-dimensional passes (Catmull and Smith 1980).

    The first pass runs along image columns, the second along view rows, which takes 2k taps instead of k². Without
    rotation and shear, this equals PIL's resize except at the edges, where pixels outside the box repeat its border.
    Rotations of about 90° are not supported.

    Args:
        stored_size: (height, width) of the stored images in pixels.
        size: (height, width) of the views in pixels.
        interpolation: "bilinear", "bicubic", or "random" to choose one of them per view.
    """

    def __init__(self, stored_size: tuple[int, int], size: tuple[int, int], interpolation: str) -> None:
        self.size, self.interpolation = size, interpolation
        self.shrink = tuple(
            max(1.0, old / new) for old, new in zip(stored_size, size, strict=True)
        )  # at most, each way
        radius = 1 if interpolation == "bilinear" else 2
        self.taps = tuple(2 * math.ceil(radius * shrink) for shrink in self.shrink)

    def __call__(
        self, images: torch.Tensor, box: Sequence[torch.Tensor], map: Affine, bilinear: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Resample uint8 [B, 3, H, W] to uint8 [B, 3, height, width].

        Args:
            images: stored images.
            box: top, left, height and width of the visible part, [B] each.
            map: from coordinates of the view to those of the image.
            bilinear: [B], the views to interpolate bilinearly if the interpolation is "random"; others are bicubic.
        """
        height, width = self.size
        margin_y, margin_x = (taps // 2 for taps in self.taps)
        top, left, box_height, box_width = box
        bilinear = torch.zeros_like(map.a, dtype=torch.bool) if bilinear is None else bilinear
        padded = _repeat_edges(images, 3, left, box_width, margin_x)
        padded = _repeat_edges(padded, 2, top, box_height, margin_y).transpose(2, 3) + 0.5  # (B, 3, W, H), for rounding
        # On column u of the image, row v of the view samples y = skew u + slope v + offset.
        skew, slope = map.d / map.a, map.e - map.d * map.b / map.a
        columns = Lines(skew, slope, map.f - skew * map.c, top, box_height, margin_y)
        seen = self._pass(padded, _centers(padded.shape[2], map.a) - margin_x, columns, height, 0, bilinear)
        rows = Lines(map.b, map.a, map.c, left, box_width, margin_x)
        views = self._pass(seen.transpose(2, 3), _centers(height, map.a), rows, width, 1, bilinear)
        return _to_uint8(views)

    def _pass(
        self, values: torch.Tensor, lines: torch.Tensor, grid: Lines, number: int, axis: int, bilinear: torch.Tensor
    ) -> torch.Tensor:
        """Run one pass, [B, 3, L, n] -> [B, 3, L, number]; on a CPU, without skew, as a faster matrix product."""

        def sheared(_: torch.Tensor, values: torch.Tensor, *fields: torch.Tensor) -> torch.Tensor:
            grid, bilinear = Lines(*fields[:5], margin), fields[5]
            return self._sheared(values, grid.positions(lines, number), grid, axis, bilinear)

        margin = grid.margin
        fields = (grid.skew, grid.slope, grid.offset, grid.first, grid.length, bilinear)
        if not can_select_samples(values):
            return sheared(values, values, *fields)
        weights = self._straight(values.shape[3], grid.positions(lines[:1], number)[:, 0], grid, axis, bilinear)
        straight = (values.flatten(1, 2) @ weights).unflatten(1, (3, -1))
        return only(grid.skew != 0, sheared, straight, values, *fields)

    def _straight(
        self, length: int, positions: torch.Tensor, grid: Lines, axis: int, bilinear: torch.Tensor
    ) -> torch.Tensor:
        """Return the weights [B, length, n] of each pixel of a line at positions [B, n]."""
        distance = (_centers(length, positions) - grid.margin)[:, None] - positions[:, None, :]
        return self._weights(distance, grid.slope, axis, bilinear)

    def _sheared(
        self, values: torch.Tensor, positions: torch.Tensor, grid: Lines, axis: int, bilinear: torch.Tensor
    ) -> torch.Tensor:
        """Gather taps at positions [B, L, n] and weight them with a table of PHASES subpixel positions."""
        taps = self.taps[axis]
        phase = torch.arange(PHASES, device=values.device) / PHASES
        distance = torch.arange(taps, device=values.device)[:, None] - (taps // 2 - 1) - phase  # (taps, PHASES)
        weights = self._weights(distance.expand(len(values), -1, -1), grid.slope, axis, bilinear)
        # Rounded to phases, relative to the center of the first pixel.
        steps = ((positions + (grid.margin - taps // 2 + 0.5)) * PHASES + 0.5).long()
        phase, tap = (steps & (PHASES - 1)).flatten(1), (steps >> PHASE_BITS)[:, None].expand(-1, 3, -1, -1)
        reach, result = values.shape[3] - taps + 1, values.new_zeros(tap.shape)
        for number in range(taps):
            weight = weights[:, number].gather(1, phase).view_as(positions)[:, None]  # (B, 1, L, n)
            result = torch.addcmul(result, values[..., number : number + reach].gather(3, tap), weight)
        return result

    def _weights(self, distance: torch.Tensor, slope: torch.Tensor, axis: int, bilinear: torch.Tensor) -> torch.Tensor:
        """Return kernel weights at distances [B, taps, n] in pixels: normalized, and wider where the map shrinks."""
        distance = distance / slope.abs().clamp(1, self.shrink[axis])[:, None, None]
        if self.interpolation == "random":
            weights = torch.where(bilinear[:, None, None], _bilinear(distance), _bicubic(distance))
        else:
            weights = (_bilinear if self.interpolation == "bilinear" else _bicubic)(distance)
        return weights / weights.sum(dim=1, keepdim=True)


def _repeat_edges(
    images: torch.Tensor, dim: int, first: torch.Tensor, length: torch.Tensor, margin: int
) -> torch.Tensor:
    """Pad `dim` by `margin` pixels on both sides; everything outside [first, first + length) repeats the border."""
    grid = torch.arange(-margin, images.shape[dim] + margin, device=images.device)
    grid = torch.minimum(torch.maximum(grid, first[:, None].long()), (first + length)[:, None].long() - 1)
    index = grid[:, None, :, None] if dim == 2 else grid[:, None, None, :]
    shape = [*images.shape[:2], grid.shape[1], images.shape[3]] if dim == 2 else [*images.shape[:3], grid.shape[1]]
    return images.gather(dim, index.expand(shape))


def _to_uint8(values: torch.Tensor) -> torch.Tensor:
    return values.clamp_(0, 255).to(torch.uint8)


# -- color operations on uint8 images [B, 3, H, W], each equal to PIL's ------------------------------------------------


def blend(base: torch.Tensor | float, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Compute base + factor (images - base), clipped like PIL; factor [B]."""
    base = base.float() if isinstance(base, torch.Tensor) else base
    return _to_uint8(base + factor.view(-1, 1, 1, 1) * (images.float() - base))


def gray(images: torch.Tensor) -> torch.Tensor:
    """Convert to gray, uint8 [B, 1, H, W], as PIL converts to mode L (ITU-R 601)."""
    red, green, blue = images.int().split(1, dim=1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)


def adjust_color(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with the gray image: factor 0 is gray, 1 the image; factor [B]."""
    return blend(gray(images), images, factor)


def adjust_sharpness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with PIL's SMOOTH filter: factor 0 is smooth, 1 the image; border pixels stay; factor [B]."""
    # One sum in 16 bits, which torch.compile turns into a single pass over the image.
    values, height, width = images.short(), images.shape[2] - 2, images.shape[3] - 2
    nine = sum(values[..., top : top + height, left : left + width] for top in range(3) for left in range(3))
    smooth = (nine + 4 * values[..., 1:-1, 1:-1]).float() / 13
    inner = blend((smooth + 0.5).floor(), images[..., 1:-1, 1:-1], factor)
    rows = torch.cat([images[..., :1, 1:-1], inner, images[..., -1:, 1:-1]], dim=2)
    return torch.cat([images[..., :1], rows, images[..., -1:]], dim=3)


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blur with standard deviation sigma [B] in pixels, up to 2; the border is repeated."""
    reach = 6
    distance = torch.arange(-reach, reach + 1, device=images.device) / sigma[:, None].clamp(min=1e-3)
    weights = torch.exp(-0.5 * distance * distance)
    weights = weights / weights.sum(dim=1, keepdim=True)
    values = F.pad(images.float(), (reach,) * 4, mode="replicate")
    for dim, length in ((2, images.shape[2]), (3, images.shape[3])):
        parts = (values.narrow(dim, tap, length) * weights[:, tap, None, None, None] for tap in range(2 * reach + 1))
        values = sum(parts)
    return _to_uint8(values + 0.5)


def autocontrast_table(images: torch.Tensor) -> torch.Tensor:
    """Build tables [B, 3, 256] that stretch each channel's range to [0, 255]."""
    low, high = (bound.int()[..., None] for bound in (images.amin(dim=(2, 3)), images.amax(dim=(2, 3))))
    value, span = torch.arange(256, device=images.device), high - low
    return torch.where(span > 0, ((value - low).clamp(min=0) * 255 // span.clamp(min=1)).clamp(max=255), value)


def _histogram(bins: torch.Tensor, length: int) -> torch.Tensor:
    """Count how often each of the numbers 0 to length - 1 occurs in `bins` [N], int64; return int32 [length]."""
    counts = torch.zeros(length, dtype=torch.int32, device=bins.device)
    return counts.scatter_add(0, bins, torch.ones_like(bins, dtype=torch.int32))


@torch.library.custom_op("deit::histogram_unsorted", mutates_args=(), schema="(Tensor bins, int length) -> Tensor")
def _histogram_unsorted(bins: torch.Tensor, length: int) -> torch.Tensor:
    """Run `_histogram` outside torch's deterministic mode, in which a GPU sorts all pixels; integer sums need no order.

    An operator of its own, because torch.compile cannot switch the mode inside a graph.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        return _histogram(bins, length)
    finally:
        torch.set_deterministic_debug_mode(mode)


@_histogram_unsorted.register_fake
def _(bins: torch.Tensor, length: int) -> torch.Tensor:
    return bins.new_empty(length, dtype=torch.int32)


def equalize_table(images: torch.Tensor) -> torch.Tensor:
    """Build tables [B, 3, 256] that equalize each channel's histogram, like PIL."""
    batch, pixels = len(images), images[0, 0].numel()
    channel = torch.arange(batch * 3, device=images.device)[:, None] * 256
    bins = (images.reshape(batch * 3, -1).int() + channel).flatten().long()
    histogram = _histogram_unsorted if torch.are_deterministic_algorithms_enabled() else _histogram
    counts = histogram(bins, batch * 3 * 256).view(batch, 3, 256).long()
    value = torch.arange(256, device=images.device)
    last = counts.gather(2, torch.where(counts > 0, value, 0).amax(dim=2, keepdim=True))
    step = (pixels - last) // 255  # 0 if the channel has a single value, which then stays
    levels = (step // 2 + counts.cumsum(dim=2) - counts) // step.clamp(min=1)
    return torch.where(step > 0, levels.clamp(max=255), value)


def contrast_table(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Build tables [B, 1, 256] for contrast: factor 0 is the mean gray, 1 the image; factor [B]."""
    mean = (gray(images).float().mean(dim=(1, 2, 3)) + 0.5).floor()[:, None, None, None]
    value = torch.arange(256, device=images.device).view(1, 1, 1, 256)
    return blend(mean, value, factor)[:, 0]


def look_up(images: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Replace each value by its entry in its channel's table [B, 3, 256]."""
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def only(
    chosen: torch.Tensor, function: Callable[..., torch.Tensor], values: torch.Tensor, *arguments: torch.Tensor
) -> torch.Tensor:
    """Apply `function(values, *arguments)` to the chosen samples (bool [B]) and keep the others.

    On a CPU, `values` is modified in place.
    """
    if not can_select_samples(values):
        return torch.where(chosen.view(-1, *[1] * (values.ndim - 1)), function(values, *arguments), values)
    indices = chosen.nonzero()[:, 0]
    if len(indices):
        parts = function(*(each.index_select(0, indices) for each in (values, *arguments)))
        for index, part in zip(indices.tolist(), parts, strict=True):
            values[index].copy_(part)  # index_copy_ is ten times slower
    return values


def paint(values: torch.Tensor, where: torch.Tensor, color: torch.Tensor | int) -> torch.Tensor:
    """Fill with `color` where the mask [B, 1, H, W] is True; on a CPU ten times as fast as torch.where."""
    where = where.to(values.dtype)
    return values * (1 - where) + color * where


def can_select_samples(values: torch.Tensor) -> bool:
    """Return True on an eager CPU, where selecting part of a batch is free.

    On a GPU it needs a sync, under torch.compile a dynamic shape.
    """
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def in_parts(function: Callable[..., torch.Tensor], size: tuple[int, int], *arguments: torch.Tensor) -> torch.Tensor:
    """Compute `function(*arguments)`, which returns views of that size; on a CPU in parts that fit its caches."""
    if not can_select_samples(arguments[0]):
        return function(*arguments)
    number = max(1, CACHED_VALUES // (3 * math.prod(size)))
    return torch.cat([function(*part) for part in zip(*(each.split(number) for each in arguments), strict=True)])
