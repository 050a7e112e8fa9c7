"""The augmentation as batched tensor code: stored uint8 images in, normalised views out, on any device.

It follows timm's PIL pipeline operation by operation. What is different:
  - crop, flip and geometric operations are one affine map and one interpolation, where PIL interpolates each time, so
    a colour operation that comes before a geometric one sees the image already moved;
  - what is drawn for a view is hashed from its key, not taken from generators.
Views are the same whatever the batch; CPU and GPU differ by the rounding of float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.auto_augment import AutoAugment, RandAugment, auto_augment_transform, rand_augment_transform
from torch import nn

from utils import UserError

SMALL_IMAGE = 64  # up to this size views are made by padding and cropping, not by random resized crops
PADDING = 4  # pixels around a small image
CROP_AREA, CROP_ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # of random resized crops
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)
ATTEMPTS = 10  # at a crop or a region that fits
PHASE_BITS = 8
PHASES = 2**PHASE_BITS  # positions between two pixels for which interpolation weights are tabulated
CACHED_VALUES = 2_500_000  # of views made at once on a CPU: at 224 px, 16 are 1.7 times as fast each as 64
NOISE = 2**20  # normal numbers to fill erased regions with


# -- random numbers ----------------------------------------------------------------------------------------------------


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


def splitmix64(x: torch.Tensor) -> torch.Tensor:
    """`samplers`' hash of 64-bit integers, for int64 tensors (which wrap around)."""

    def shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
        return (value >> bits) & (2 ** (64 - bits) - 1)  # without the sign

    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ shifted(x, 31)


class Draws:
    """Uniform numbers in [0, 1) for each sample: the first that are asked for, the next, ...

    Args:
        keys: int64 [B], the samples' keys: hashed ones, since neighbours among small numbers would share draws.
        number: how many there are for each.
    """

    def __init__(self, keys: torch.Tensor, number: int) -> None:
        bits = splitmix64(keys ^ torch.arange(number, device=keys.device)[:, None]) >> 40 & 0xFFFFFF
        self.numbers, self.used = bits.float() * 2.0**-24, 0  # (number, B)

    def __call__(self, number: int = 1, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """float32 [number, B], uniform in [low, high)."""
        self.used += number
        if self.used > len(self.numbers):
            raise IndexError(f"there are {len(self.numbers)} numbers for each sample, {self.used} are asked for")
        return low + (high - low) * self.numbers[self.used - number : self.used]

    def normal(self) -> torch.Tensor:
        """float32 [B], standard normal (Box and Muller, 1958)."""
        radius, angle = self(2)
        return (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)

    def integer(self, number: torch.Tensor | int) -> torch.Tensor:
        """float32 [B], a whole number from 0 to number - 1."""
        return (self()[0] * number).floor()


# -- affine maps -------------------------------------------------------------------------------------------------------


@dataclass
class Affine:
    """(x, y) -> (a x + b y + c, d x + e y + f), each coefficient [B]; pixel i covers [i, i + 1)."""

    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    d: torch.Tensor
    e: torch.Tensor
    f: torch.Tensor

    @classmethod
    def scaling(cls, scale_y: torch.Tensor, scale_x: torch.Tensor, top: torch.Tensor, left: torch.Tensor) -> Affine:
        """(x, y) -> (scale_x x + left, scale_y y + top)."""
        none = torch.zeros_like(left)
        return cls(scale_x, none, left, none, scale_y, top)

    @property
    def coefficients(self) -> tuple[torch.Tensor, ...]:
        """From a to f."""
        return self.a, self.b, self.c, self.d, self.e, self.f

    def after(self, first: Affine) -> Affine:
        """The map that takes `first` and then this one."""
        return Affine(
            self.a * first.a + self.b * first.d,
            self.a * first.b + self.b * first.e,
            self.a * first.c + self.b * first.f + self.c,
            self.d * first.a + self.e * first.d,
            self.d * first.b + self.e * first.e,
            self.d * first.c + self.e * first.f + self.f,
        )

    def outside(self, height: int, width: int) -> torch.Tensor:
        """Which pixels [B, 1, height, width] of a view get their centre from outside a view of that size."""
        x, y = _centres(width, self.a), _centres(height, self.a)[:, None]
        a, b, c, d, e, f = (each[:, None, None, None] for each in self.coefficients)
        u, v = a * x + (b * y + c), d * x + (e * y + f)
        return (u < 0) | (u >= width) | (v < 0) | (v >= height)


def _centres(number: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(number, device=like.device) + 0.5


# -- resampling --------------------------------------------------------------------------------------------------------


def _bicubic(x: torch.Tensor) -> torch.Tensor:
    """Keys' kernel with a = -1/2, as PIL resizes."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _bilinear(x: torch.Tensor) -> torch.Tensor:
    return (1 - x.abs()).clamp(min=0)


@dataclass
class Lines:
    """Positions on the lines of an image: the i-th centre of line l is at skew · l + slope · i + offset, [B] each.

    Attributes:
        first, length: [B], where positions have to stay.
        margin: pixels of the lines before position 0.
    """

    skew: torch.Tensor
    slope: torch.Tensor
    offset: torch.Tensor
    first: torch.Tensor
    length: torch.Tensor
    margin: int

    def positions(self, lines: torch.Tensor, number: int) -> torch.Tensor:
        """[B, L, number] in pixels of the image; `lines` [L] are the lines' own coordinates."""
        skew, slope, offset, first, length = (
            each[:, None, None] for each in (self.skew, self.slope, self.offset, self.first, self.length)
        )
        positions = slope * _centres(number, slope) + (skew * lines[:, None] + offset)
        return torch.minimum(torch.maximum(positions, first), first + length)


class Resampler:
    """One interpolation by an affine map, antialiased where it shrinks, in two passes (Catmull and Smith, 1980).

    The first pass runs along the columns of the image, the second along the rows of the view, so that k² taps cost 2k.
    Where the map has no rotation or shear this is PIL's resize, but for the edges: what is beyond the box repeats its
    outermost pixels. Maps that turn by about 90° are not for it.

    Args:
        frame: height and width of the stored images, in pixels.
        size: height and width of the views, in pixels.
        interpolation: "bilinear", "bicubic", or "random" for one of them for each view.
    """

    def __init__(self, frame: tuple[int, int], size: tuple[int, int], interpolation: str) -> None:
        self.size, self.interpolation = size, interpolation
        self.shrink = tuple(max(1.0, old / new) for old, new in zip(frame, size, strict=True))  # at most, each way
        radius = 1 if interpolation == "bilinear" else 2
        self.taps = tuple(2 * math.ceil(radius * shrink) for shrink in self.shrink)

    def __call__(
        self, images: torch.Tensor, box: Sequence[torch.Tensor], map: Affine, bilinear: torch.Tensor | None = None
    ) -> torch.Tensor:
        """uint8 [B, 3, H, W] -> uint8 [B, 3, height, width].

        Args:
            images: as stored.
            box: top, left, height and width of the part to be seen, [B] each.
            map: from the view's coordinates to the image's.
            bilinear: which views [B] to interpolate bilinearly if it is random; the others are bicubic.
        """
        height, width = self.size
        margin_y, margin_x = (taps // 2 for taps in self.taps)
        top, left, box_height, box_width = box
        bilinear = torch.zeros_like(map.a, dtype=torch.bool) if bilinear is None else bilinear
        padded = _repeat_edges(images, 3, left, box_width, margin_x)
        padded = _repeat_edges(padded, 2, top, box_height, margin_y).transpose(2, 3) + 0.5  # (B, 3, W, H), for rounding
        # Along a column u of the image, y moves v = skew u + slope y + offset.
        skew, slope = map.d / map.a, map.e - map.d * map.b / map.a
        columns = Lines(skew, slope, map.f - skew * map.c, top, box_height, margin_y)
        seen = self._pass(padded, _centres(padded.shape[2], map.a) - margin_x, columns, height, 0, bilinear)
        rows = Lines(map.b, map.a, map.c, left, box_width, margin_x)
        views = self._pass(seen.transpose(2, 3), _centres(height, map.a), rows, width, 1, bilinear)
        return _to_uint8(views)

    def _pass(
        self, values: torch.Tensor, lines: torch.Tensor, places: Lines, number: int, axis: int, bilinear: torch.Tensor
    ) -> torch.Tensor:
        """[B, 3, L, n] -> [B, 3, L, number]. Without skew all lines are alike, and a CPU is faster with a product."""

        def sheared(_: torch.Tensor, values: torch.Tensor, *fields: torch.Tensor) -> torch.Tensor:
            places, bilinear = Lines(*fields[:5], margin), fields[5]
            return self._sheared(values, places.positions(lines, number), places, axis, bilinear)

        margin = places.margin
        fields = (places.skew, places.slope, places.offset, places.first, places.length, bilinear)
        if not _computes_some_alone(values):
            return sheared(values, values, *fields)
        weights = self._straight(values.shape[3], places.positions(lines[:1], number)[:, 0], places, axis, bilinear)
        straight = (values.flatten(1, 2) @ weights).unflatten(1, (3, -1))
        return only(places.skew != 0, sheared, straight, values, *fields)

    def _straight(
        self, length: int, positions: torch.Tensor, places: Lines, axis: int, bilinear: torch.Tensor
    ) -> torch.Tensor:
        """[B, length, n]: what each pixel of a line counts at positions [B, n]."""
        distance = (_centres(length, positions) - places.margin)[:, None] - positions[:, None, :]
        return self._weights(distance, places.slope, axis, bilinear)

    def _sheared(
        self, values: torch.Tensor, positions: torch.Tensor, places: Lines, axis: int, bilinear: torch.Tensor
    ) -> torch.Tensor:
        """Values at positions [B, L, n] by gathering taps, with weights from a table of PHASES between two pixels."""
        taps = self.taps[axis]
        phase = torch.arange(PHASES, device=values.device) / PHASES
        distance = torch.arange(taps, device=values.device)[:, None] - (taps // 2 - 1) - phase  # (taps, PHASES)
        weights = self._weights(distance.expand(len(values), -1, -1), places.slope, axis, bilinear)
        # In phases, rounded, from the centre of the first pixel
        steps = ((positions + (places.margin - taps // 2 + 0.5)) * PHASES + 0.5).long()
        phase, tap = (steps & (PHASES - 1)).flatten(1), (steps >> PHASE_BITS)[:, None].expand(-1, 3, -1, -1)
        reach, result = values.shape[3] - taps + 1, values.new_zeros(tap.shape)
        for number in range(taps):
            weight = weights[:, number].gather(1, phase).view_as(positions)[:, None]  # (B, 1, L, n)
            result = torch.addcmul(result, values[..., number : number + reach].gather(3, tap), weight)
        return result

    def _weights(self, distance: torch.Tensor, slope: torch.Tensor, axis: int, bilinear: torch.Tensor) -> torch.Tensor:
        """The kernel at distances [B, taps, n] in pixels, with sum 1 over the taps, widened where the map shrinks."""
        distance = distance / slope.abs().clamp(1, self.shrink[axis])[:, None, None]
        if self.interpolation == "random":
            weights = torch.where(bilinear[:, None, None], _bilinear(distance), _bicubic(distance))
        else:
            weights = (_bilinear if self.interpolation == "bilinear" else _bicubic)(distance)
        return weights / weights.sum(dim=1, keepdim=True)


def _repeat_edges(
    images: torch.Tensor, dim: int, first: torch.Tensor, length: torch.Tensor, margin: int
) -> torch.Tensor:
    """Add `margin` pixels on both sides of `dim`; all outside [first, first + length) repeat the outermost inside."""
    places = torch.arange(-margin, images.shape[dim] + margin, device=images.device)
    places = torch.minimum(torch.maximum(places, first[:, None].long()), (first + length)[:, None].long() - 1)
    index = places[:, None, :, None] if dim == 2 else places[:, None, None, :]
    shape = [*images.shape[:2], places.shape[1], images.shape[3]] if dim == 2 else [*images.shape[:3], places.shape[1]]
    return images.gather(dim, index.expand(shape))


def _to_uint8(values: torch.Tensor) -> torch.Tensor:
    return values.clamp_(0, 255).to(torch.uint8)


# -- operations on the colours of uint8 images [B, 3, H, W], each as PIL's ---------------------------------------------


def blend(base: torch.Tensor | float, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """base + factor (images - base), cut off as PIL does; factor [B]."""
    base = base.float() if isinstance(base, torch.Tensor) else base
    return _to_uint8(base + factor.view(-1, 1, 1, 1) * (images.float() - base))


def grey(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 1, H, W], PIL's conversion to mode L (ITU-R 601)."""
    red, green, blue = images.int().split(1, dim=1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)


def adjust_color(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """0 is grey, 1 the image; factor [B]."""
    return blend(grey(images), images, factor)


def adjust_sharpness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """0 is PIL's SMOOTH filter, 1 the image; pixels at the border stay; factor [B]."""
    # In one sum, which a compiler makes in one pass over the image, and in numbers of two bytes
    values, height, width = images.short(), images.shape[2] - 2, images.shape[3] - 2
    nine = sum(values[..., top : top + height, left : left + width] for top in range(3) for left in range(3))
    smooth = (nine + 4 * values[..., 1:-1, 1:-1]).float() / 13
    inner = blend((smooth + 0.5).floor(), images[..., 1:-1, 1:-1], factor)
    rows = torch.cat([images[..., :1, 1:-1], inner, images[..., -1:, 1:-1]], dim=2)
    return torch.cat([images[..., :1], rows, images[..., -1:]], dim=3)


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Standard deviation sigma [B] in pixels, up to 2; the border is repeated."""
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
    """[B, 3, 256]: each channel's range stretched to 0 to 255."""
    low, high = (bound.int()[..., None] for bound in (images.amin(dim=(2, 3)), images.amax(dim=(2, 3))))
    value, span = torch.arange(256, device=images.device), high - low
    return torch.where(span > 0, ((value - low).clamp(min=0) * 255 // span.clamp(min=1)).clamp(max=255), value)


def equalize_table(images: torch.Tensor) -> torch.Tensor:
    """[B, 3, 256]: each channel's histogram levelled, as PIL counts."""
    batch, pixels = len(images), images[0, 0].numel()
    channel = torch.arange(batch * 3, device=images.device)[:, None] * 256
    places = (images.reshape(batch * 3, -1).int() + channel).flatten().long()
    counts = torch.zeros(batch * 3 * 256, dtype=torch.int32, device=images.device)
    counts = counts.scatter_add(0, places, torch.ones_like(places, dtype=torch.int32)).view(batch, 3, 256).long()
    value = torch.arange(256, device=images.device)
    last = counts.gather(2, torch.where(counts > 0, value, 0).amax(dim=2, keepdim=True))
    step = (pixels - last) // 255  # 0 for a single value, which then stays
    levels = (step // 2 + counts.cumsum(dim=2) - counts) // step.clamp(min=1)
    return torch.where(step > 0, levels.clamp(max=255), value)


def contrast_table(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """[B, 1, 256]: 0 is the mean grey, 1 the image; factor [B]."""
    mean = (grey(images).float().mean(dim=(1, 2, 3)) + 0.5).floor()[:, None, None, None]
    value = torch.arange(256, device=images.device).view(1, 1, 1, 256)
    return blend(mean, value, factor)[:, 0]


def look_up(images: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Replace each value by the entry of its channel's table [B, 3, 256]."""
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def only(
    chosen: torch.Tensor, function: Callable[..., torch.Tensor], values: torch.Tensor, *arguments: torch.Tensor
) -> torch.Tensor:
    """`function(values, *arguments)` for the samples that are chosen (bool [B]), `values` for the others.

    On a CPU `values` itself is changed.
    """
    if not _computes_some_alone(values):
        return torch.where(chosen.view(-1, *[1] * (values.ndim - 1)), function(values, *arguments), values)
    places = chosen.nonzero()[:, 0]
    if len(places):
        parts = function(*(each.index_select(0, places) for each in (values, *arguments)))
        for place, part in zip(places.tolist(), parts, strict=True):
            values[place].copy_(part)  # index_copy_ is ten times slower
    return values


def paint(values: torch.Tensor, where: torch.Tensor, colour: torch.Tensor | int) -> torch.Tensor:
    """`colour` where bool [B, 1, H, W] says so: torch.where, as products, with which a CPU is ten times faster."""
    where = where.to(values.dtype)
    return values * (1 - where) + colour * where


def _computes_some_alone(values: torch.Tensor) -> bool:
    """Whether a part of the samples can be computed alone: elsewhere than on a CPU, their number is not known without
    waiting for the device, nor is it while compiling."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def in_parts(function: Callable[..., torch.Tensor], size: tuple[int, int], *arguments: torch.Tensor) -> torch.Tensor:
    """`function(*arguments)`, whose result is views of that size; a CPU makes as many at a time as its caches hold."""
    if not _computes_some_alone(arguments[0]):
        return function(*arguments)
    number = max(1, CACHED_VALUES // (3 * math.prod(size)))
    return torch.cat([function(*part) for part in zip(*(each.split(number) for each in arguments), strict=True)])


# -- policies ----------------------------------------------------------------------------------------------------------

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
TABLES = ("autocontrast", "equalize", "contrast", "invert", "posterize", "solarize", "solarize_add", "brightness")
KINDS = ("none", *GEOMETRIC, *TABLES, "color", "sharpness", "blur")


def _toward_two(level: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    return (1 + sign * 0.9 * level).clamp(min=0.1)


def _enhancement(level: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    return 0.1 + 1.8 * level


def _floor(number: torch.Tensor) -> torch.Tensor:
    """Down to a whole number, also if rounding on some device has left it a little short of one."""
    return (number + 1e-3).floor()


# timm's operations: what they are here, and their argument by level (0 to 1 for magnitudes 0 to 10) and a random sign
OPERATIONS: dict[str, tuple[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "AutoContrast": ("autocontrast", lambda level, sign: level),
    "Equalize": ("equalize", lambda level, sign: level),
    "Invert": ("invert", lambda level, sign: level),
    "Rotate": ("rotate", lambda level, sign: sign * 30 * level),  # degrees
    "Posterize": ("posterize", lambda level, sign: _floor(4 * level)),  # bits to keep
    "PosterizeIncreasing": ("posterize", lambda level, sign: 4 - _floor(4 * level)),
    "PosterizeOriginal": ("posterize", lambda level, sign: 4 + _floor(4 * level)),
    "Solarize": ("solarize", lambda level, sign: _floor(256 * level).clamp(max=256)),  # threshold
    "SolarizeIncreasing": ("solarize", lambda level, sign: 256 - _floor(256 * level).clamp(max=256)),
    "SolarizeAdd": ("solarize_add", lambda level, sign: _floor(110 * level).clamp(max=128)),
    "Color": ("color", _enhancement),
    "ColorIncreasing": ("color", _toward_two),
    "Contrast": ("contrast", _enhancement),
    "ContrastIncreasing": ("contrast", _toward_two),
    "Brightness": ("brightness", _enhancement),
    "BrightnessIncreasing": ("brightness", _toward_two),
    "Sharpness": ("sharpness", _enhancement),
    "SharpnessIncreasing": ("sharpness", _toward_two),
    "ShearX": ("shear_x", lambda level, sign: sign * 0.3 * level),
    "ShearY": ("shear_y", lambda level, sign: sign * 0.3 * level),
    "TranslateXRel": ("translate_x", lambda level, sign: sign * 0.45 * level),  # of the width
    "TranslateYRel": ("translate_y", lambda level, sign: sign * 0.45 * level),  # of the height
    "Desaturate": ("color", lambda level, sign: 0.5 - 0.5 * level),
    "GaussianBlur": ("blur", lambda level, sign: 0.1 + 1.9 * level),
    # A radius from 0.1 to twice the level: of that, the level is drawn below.
    "GaussianBlurRand": ("blur", lambda level, sign: 0.1 + 1.9 * level),
}


@dataclass
class Step:
    """One operation of each sample: its kind [B] (a place in KINDS) and its argument [B]."""

    kind: torch.Tensor
    argument: torch.Tensor

    def is_a(self, *names: str) -> torch.Tensor:
        """Which samples have one of these kinds, bool [B]."""
        wanted = self.kind == KINDS.index(names[0])
        for name in names[1:]:
            wanted = wanted | (self.kind == KINDS.index(name))
        return wanted


class Policy(nn.Module):
    """RandAugment and AutoAugment (3-Augment included) as timm reads them, drawn for a batch at once.

    Args:
        name: in timm's notation: rand-..., v0, v0r, original, originalr, 3a; augmix is not supported.

    Raises:
        UserError: a policy that timm does not know, or that can only be done on the host.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        policy = parse_policy(name)
        self.is_random = isinstance(policy, RandAugment)
        if isinstance(policy, RandAugment):
            rows, self.num_steps = [[op] for op in policy.ops], policy.num_layers
        else:
            rows, self.num_steps = policy.policy, max(map(len, policy.policy))
        ops = [op for row in rows for op in row]
        self.names = sorted({op.name for op in ops})
        # A turn by 90° cannot be resampled in two passes.
        steep = self.num_steps > 2 or any((op.magnitude_max or 10) > 10 for op in ops)
        if not set(self.names) <= OPERATIONS.keys() or steep or getattr(policy, "choice_weights", None) is not None:
            raise UserError(f"--aa {name}: is for the host alone; train with --augment host")
        self.magnitude_std, self.magnitude_max = ops[0].magnitude_std, float(ops[0].magnitude_max or 10)
        self.register_buffer("which", torch.tensor([[self.names.index(op.name) for op in row] for row in rows]))
        self.register_buffer("prob", torch.tensor([[float(op.prob) for op in row] for row in rows]))
        self.register_buffer("magnitude", torch.tensor([[float(op.magnitude) for op in row] for row in rows]))
        kinds = [KINDS.index(OPERATIONS[name][0]) for name in self.names]
        self.register_buffer("kinds", torch.tensor(kinds))

    @property
    def kinds_used(self) -> frozenset[str]:
        return frozenset(OPERATIONS[name][0] for name in self.names)

    def forward(self, draws: Draws) -> list[Step]:
        """The operations of each sample, in order."""
        steps, row = [], draws.integer(len(self.which)).long()
        for number in range(self.num_steps):
            if self.is_random and number:
                row = draws.integer(len(self.which)).long()  # with replacement
            column = 0 if self.is_random else number
            applied, sign, level = draws(3)
            noise = draws.normal()
            sign = torch.where(sign > 0.5, -1.0, 1.0)
            magnitude = self.magnitude[row, column]
            if math.isinf(self.magnitude_std):
                magnitude = magnitude * level
            elif self.magnitude_std > 0:
                magnitude = magnitude + noise * self.magnitude_std
            magnitude = magnitude.clamp(0, self.magnitude_max) / 10
            which = self.which[row, column]
            drawn = (2 * magnitude - 0.1) * level / 1.9
            arguments = [
                OPERATIONS[name][1](drawn if name == "GaussianBlurRand" else magnitude, sign) for name in self.names
            ]
            argument = torch.stack(arguments).gather(0, which[None])[0]
            kind = torch.where(applied <= self.prob[row, column], self.kinds[which], 0)
            steps.append(Step(kind, argument))
        return steps


def is_supported(name: str) -> bool:
    """Whether a policy of timm's can be done here (none can)."""
    try:
        return name in ("", "none") or bool(Policy(name))
    except UserError:
        return False


def parse_policy(name: str) -> RandAugment | AutoAugment | Any:
    """timm's policy of that name.

    Raises:
        UserError: if timm knows none, or it is one for the host alone.
    """
    if name.startswith("augmix"):
        raise UserError(f"--aa {name}: is for the host alone; train with --augment host")
    try:
        return (rand_augment_transform if name.startswith("rand") else auto_augment_transform)(name)
    except (AssertionError, KeyError, ValueError):
        raise UserError(f"--aa {name}: timm has no such policy; try rand-m9-mstd0.5-inc1, or none") from None


def jitter(strength: float, draws: Draws) -> list[Step]:
    """Brightness, contrast and saturation by factors in 1 ± strength, in random order."""
    kinds = torch.tensor(
        [KINDS.index(name) for name in ("brightness", "contrast", "color")], device=draws.numbers.device
    )
    order = draws(3).argsort(dim=0)  # (3, B)
    factors = draws(3, max(0.0, 1 - strength), 1 + strength)
    return [Step(kinds[which], factors.gather(0, which[None])[0]) for which in order]


def as_affine(step: Step, height: int, width: int) -> Affine:
    """What a geometric step does to the coordinates of a view; nothing for the others."""

    def argument(name: str) -> torch.Tensor:
        return torch.where(step.is_a(name), step.argument, 0.0)

    angle = torch.deg2rad(argument("rotate"))
    cos, sin = torch.cos(angle), torch.sin(angle)
    x, y = width / 2, height / 2  # what a rotation leaves in its place
    return Affine(
        cos,
        argument("shear_x") - sin,
        x - cos * x + sin * y + argument("translate_x") * width,
        argument("shear_y") + sin,
        cos,
        y - sin * x - cos * y + argument("translate_y") * height,
    )


def recolour(images: torch.Tensor, step: Step, kinds: frozenset[str]) -> torch.Tensor:
    """Apply a step to the samples whose operation is one of colour.

    Eight of the eleven operations are tables of 256 values a channel, applied together.

    Args:
        images: uint8 [B, 3, H, W].
        kinds: those that may occur.
    """
    tables = [name for name in TABLES if name in kinds]
    if tables:
        table = _tables(images, step, tables)
        images = only(step.is_a(*tables), look_up, images, table)
    for name, function in (("color", adjust_color), ("sharpness", adjust_sharpness), ("blur", gaussian_blur)):
        if name in kinds:
            images = only(step.is_a(name), function, images, step.argument)
    return images


def _tables(images: torch.Tensor, step: Step, names: Sequence[str]) -> torch.Tensor:
    """uint8 [B, 3, 256]: the table of each sample whose operation is one of `names`, for others as it is."""
    value, argument = torch.arange(256, device=images.device), step.argument[:, None].long()
    brightness = step.argument[:, None].clamp(min=0) * value
    plain = {
        "invert": 255 - value.expand(len(images), -1),
        "posterize": value & (256 - (1 << (8 - argument).clamp(0, 8))),
        "solarize": torch.where(value < argument, value, 255 - value),
        "solarize_add": torch.where(value < 128, (value + argument).clamp(max=255), value),
        "brightness": brightness.clamp(0, 255).long(),
    }
    table = value.expand(len(images), 256)
    for name in names:
        if name in plain:
            table = torch.where(step.is_a(name)[:, None], plain[name], table)
    table = table[:, None].expand(-1, 3, -1).to(torch.uint8).contiguous()
    measured = {
        "autocontrast": lambda table, images, factor: autocontrast_table(images).to(torch.uint8),
        "equalize": lambda table, images, factor: equalize_table(images).to(torch.uint8),
        "contrast": lambda table, images, factor: contrast_table(images, factor).expand(-1, 3, -1),
    }
    for name in names:
        if name in measured:
            table = only(step.is_a(name), measured[name], table, images, step.argument)
    return table


# -- from stored images to views ---------------------------------------------------------------------------------------


class Normalize(nn.Module):
    """uint8 [B, 3, H, W] -> (x / 255 - mean) / std, in `dtype`."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        mean, std = (torch.tensor(list(values)).view(1, 3, 1, 1) for values in (mean, std))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mul_(self.scale).add_(self.shift).to(self.dtype)


class EvalTransform(nn.Module):
    """How images are evaluated: as `datasets.build_eval_transform` shows them, within a grey level or two.

    Above 64 px they are resized to size / crop_ratio and cut to their centre; up to there they are used whole.

    Args:
        frame: height and width of the stored images, in pixels.
        size: height and width of the views, in pixels.
        mean, std: per channel, of images scaled to [0, 1].
        crop_ratio: side of the view within the resized image.
        dtype: of the views.
    """

    def __init__(
        self,
        frame: tuple[int, int],
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        crop_ratio: float = 0.875,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.size, self.crop_ratio = size, crop_ratio
        self.resample = Resampler(frame, size, "bicubic")
        self.normalize = Normalize(mean, std, dtype)

    def forward(self, images: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, H, W], of which the first `sizes` [B, 2] rows and columns count -> [B, 3, height, width]."""
        return in_parts(self._views, self.size, images, sizes)

    def _views(self, images: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        return self.normalize(self.resample(images, _whole(sizes), self._map(sizes)))

    def _map(self, sizes: torch.Tensor) -> Affine:
        """From the view's coordinates to those of images of these sizes."""
        height, width = sizes.float().unbind(1)
        if max(self.size) <= SMALL_IMAGE:
            none = torch.zeros_like(height)
            return Affine.scaling(height / self.size[0], width / self.size[1], none, none)
        resized = [math.floor(side / self.crop_ratio) for side in self.size]
        if resized[0] == resized[1]:  # the long side is cut off to whole pixels, else both are rounded
            # In whole numbers: compiled for a GPU, a quotient of float32 may be a little less than the whole one it is.
            new_height, new_width = (resized[0] * sizes // sizes.amin(dim=1, keepdim=True)).float().unbind(1)
        else:
            ratio = torch.minimum(height / resized[0], width / resized[1])
            new_height, new_width = (height / ratio).round(), (width / ratio).round()
        top, left = ((new_height - self.size[0]) / 2).round(), ((new_width - self.size[1]) / 2).round()
        scale_y, scale_x = height / new_height, width / new_width
        return Affine.scaling(scale_y, scale_x, top * scale_y, left * scale_x)


def _whole(sizes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The box [top, left, height, width] of whole images."""
    height, width = sizes.float().unbind(1)
    return torch.zeros_like(height), torch.zeros_like(width), height, width


class TrainAugmentation(nn.Module):
    """DeiT's training augmentation (paper, section 6 and table 9), as `datasets.build_train_transform` does it in PIL.

    Random resized crop (up to 64 px: padding by 4 and a random crop), flip, the policy, colour jitter where there is no
    policy or 3-Augment, normalisation, random erasing.

    Args:
        frame: height and width of the stored images, in pixels.
        size: height and width of the views, in pixels.
        mean, std: per channel, of images scaled to [0, 1].
        interpolation: "bilinear", "bicubic" or "random".
        hflip: probability of a flip.
        color_jitter: strength, for brightness, contrast and saturation.
        auto_augment: timm's name of a policy, or none.
        re_prob, re_mode, re_count: of random erasing; "const", "rand" (a colour) or "pixel", up to so many regions.
        dtype: of the views.

    Raises:
        UserError: if the policy is not known, or not for this.
    """

    def __init__(
        self,
        frame: tuple[int, int],
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        interpolation: str = "bicubic",
        hflip: float = 0.5,
        color_jitter: float = 0.3,
        auto_augment: str = "rand-m9-mstd0.5-inc1",
        re_prob: float = 0.25,
        re_mode: str = "pixel",
        re_count: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.size, self.hflip = size, hflip
        self.re_prob, self.re_mode, self.re_count = re_prob, re_mode, re_count
        small = max(size) <= SMALL_IMAGE
        self.crop = _padded_crop if small else _random_resized_crop
        # What is drawn at random in "random" is the interpolation of random crops, of which there are none up to 64 px.
        self.resample = Resampler(frame, size, "bicubic" if small and interpolation == "random" else interpolation)
        self.policy = None if auto_augment in ("", "none") else Policy(auto_augment)
        self.color_jitter = color_jitter if self.policy is None or "3a" in auto_augment else 0.0
        self.kinds = self.policy.kinds_used if self.policy is not None else frozenset()
        self.normalize = Normalize(mean, std, dtype)
        fill = torch.tensor([min(255, round(255 * value)) for value in mean], dtype=torch.uint8)
        self.register_buffer("fill", fill.view(1, 3, 1, 1))
        noise = torch.randn(NOISE + 3 * math.prod(size), generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", noise)  # read from one of the first NOISE places on

    def forward(self, images: torch.Tensor, sizes: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The view of each image that its key says.

        Args:
            images: uint8 [B, 3, H, W].
            sizes: [B, 2], rows and columns of each that count, from the first.
            keys: int64 [B].

        Returns:
            [B, 3, height, width], normalised.
        """
        return in_parts(self._views, self.size, images, sizes, keys)

    def _views(self, images: torch.Tensor, sizes: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        draws = Draws(keys, 64 + 16 * len(self.kinds) + 32 * self.re_count)
        box, map, outside = self.crop(draws, sizes, self.size)
        bilinear, flipped = draws(2)
        map = map.after(_mirror(flipped < self.hflip, self.size[1]))
        steps = self.policy(draws) if self.policy is not None else []
        filled = []
        for step in steps:
            moved = as_affine(step, *self.size)
            map = map.after(moved)
            filled = [before.after(moved) for before in filled] + [moved]
        views = self.resample(images, box, map, bilinear < 0.5)
        if outside is not None:
            views = self._blacken(views, outside, flipped < self.hflip, filled)
        for step, moved in zip(steps, filled, strict=True):
            views = recolour(views, step, self.kinds)
            views = only(step.is_a(*GEOMETRIC), self._fill, views, *moved.coefficients)
        for step in jitter(self.color_jitter, draws) if self.color_jitter else []:
            views = recolour(views, step, frozenset(("brightness", "contrast", "color")))
        return self._erase(self.normalize(views), draws)

    def _blacken(
        self, views: torch.Tensor, padding: Affine, flipped: torch.Tensor, filled: list[Affine]
    ) -> torch.Tensor:
        """Paint what comes from the padding of a small image."""
        first = _mirror(flipped, self.size[1])
        first = first.after(filled[0]) if filled else first
        outside = padding.after(first).outside(*self.size)
        return paint(views, outside, 0)

    def _fill(self, views: torch.Tensor, *coefficients: torch.Tensor) -> torch.Tensor:
        """Paint what a geometric operation has brought in from outside."""
        return paint(views, Affine(*coefficients).outside(*self.size), self.fill)

    def _erase(self, views: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Random erasing (Zhong et al. 2020) with timm's probabilities, after normalisation."""
        if not self.re_prob:
            return views
        erased = draws()[0] <= self.re_prob
        count = draws.integer(self.re_count) + 1
        for number in range(self.re_count):
            region = _erased_region(draws, self.size, count)
            offset = draws.integer(NOISE)
            views = only(erased & (number < count), self._erase_region, views, *region, offset)
        return views

    def _erase_region(
        self,
        views: torch.Tensor,
        top: torch.Tensor,
        left: torch.Tensor,
        height: torch.Tensor,
        width: torch.Tensor,
        offset: torch.Tensor,
    ) -> torch.Tensor:
        top, left, height, width = (each[:, None] for each in (top, left, height, width))
        y, x = (torch.arange(length, device=views.device) for length in self.size)
        rows, columns = (y >= top) & (y < top + height), (x >= left) & (x < left + width)
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        if self.re_mode == "const":
            return paint(views, inside, 0)
        shape = (3, 1, 1) if self.re_mode == "rand" else (3, *self.size)
        noise = self.noise.unfold(0, math.prod(shape), 1).index_select(0, offset.long())
        return paint(views, inside, noise.view(-1, *shape).to(views.dtype))


def _mirror(flipped: torch.Tensor, width: int) -> Affine:
    """x -> width - x where flipped."""
    sign, shift = torch.where(flipped, -1.0, 1.0), torch.where(flipped, float(width), 0.0)
    return Affine.scaling(torch.ones_like(sign), sign, torch.zeros_like(sign), shift)


def _padded_crop(
    draws: Draws, sizes: torch.Tensor, size: tuple[int, int]
) -> tuple[tuple[torch.Tensor, ...], Affine, Affine | None]:
    """The image at the view's size, shifted by up to 4 pixels each way: its box, its map, and where the padding is."""
    down, right = draws.integer(2 * PADDING + 1) - PADDING, draws.integer(2 * PADDING + 1) - PADDING
    one = torch.ones_like(down)
    shift = Affine.scaling(one, one, down, right)
    height, width = sizes.float().unbind(1)
    none = torch.zeros_like(height)
    resize = Affine.scaling(height / size[0], width / size[1], none, none)
    return _whole(sizes), resize.after(shift), shift


def _random_resized_crop(
    draws: Draws, sizes: torch.Tensor, size: tuple[int, int]
) -> tuple[tuple[torch.Tensor, ...], Affine, None]:
    """A crop of 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3: its box, its map, and no padding."""
    height, width = sizes.float().unbind(1)
    area = draws(ATTEMPTS, *CROP_AREA) * height * width  # (attempts, B)
    aspect = torch.exp(draws(ATTEMPTS, math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])))
    (crop_height, crop_width), found = _first_fitting(
        (area / aspect).sqrt().round(), (area * aspect).sqrt().round(), height, width
    )
    down, right = draws(2)
    top, left = (down * (height - crop_height + 1)).floor(), (right * (width - crop_width + 1)).floor()
    # Else the largest centre with the nearest allowed aspect ratio.
    most_height = torch.minimum(height, (width / CROP_ASPECT[0]).round())
    most_width = torch.minimum(width, (height * CROP_ASPECT[1]).round())
    crop_height, crop_width = torch.where(found, crop_height, most_height), torch.where(found, crop_width, most_width)
    top = torch.where(found, top, ((height - crop_height) / 2).floor())
    left = torch.where(found, left, ((width - crop_width) / 2).floor())
    box = (top, left, crop_height, crop_width)
    return box, Affine.scaling(crop_height / size[0], crop_width / size[1], top, left), None


def _first_fitting(
    heights: torch.Tensor, widths: torch.Tensor, most_height: torch.Tensor | float, most_width: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the attempts [n, B] the first that is no larger: heights and widths [2, B], and whether there is one [B]."""
    fits = (heights <= most_height) & (widths <= most_width) & (heights >= 1) & (widths >= 1)
    first = fits.int().argmax(dim=0, keepdim=True)
    return torch.cat([heights.gather(0, first), widths.gather(0, first)]), fits.any(dim=0)


def _erased_region(draws: Draws, size: tuple[int, int], count: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Top, left, height and width [B] of a region; empty if none fits."""
    area = draws(ATTEMPTS, *ERASED_AREA) * (size[0] * size[1]) / count
    aspect = torch.exp(draws(ATTEMPTS, math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])))
    heights, widths = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    (height, width), found = _first_fitting(heights, widths, size[0] - 1, size[1] - 1)
    down, right = draws(2)
    top, left = (down * (size[0] - height + 1)).floor(), (right * (size[1] - width + 1)).floor()
    return top, left, torch.where(found, height, 0), torch.where(found, width, 0)
