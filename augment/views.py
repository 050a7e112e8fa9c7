"""From stored uint8 images to normalized views, in batches: training augmentation and evaluation transform."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from augment.image_ops import Affine, Resampler, in_parts, only, paint
from augment.policy import GEOMETRIC, Draws, Policy, as_affine, is_supported, jitter, recolor
from utils import UserError

SMALL_IMAGE = 64  # up to this size, views are padded and cropped instead of random resized crops
PADDING = 4  # pixels around a small image or a simple random crop
CROP_AREA, CROP_ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # ranges of random resized crops
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)
ATTEMPTS = 10  # at finding a crop or region that fits
NOISE = 2**20  # size of the table of normal numbers for erased regions


@dataclass(frozen=True)
class ViewOptions:
    """Options of the views. The fields are flags of main.py."""

    input_size: tuple[int, int] = (224, 224)  # height and width of the views in pixels
    src: bool = False  # DeiT III's simple random crop instead of random resized crops
    train_interpolation: str = "bicubic"  # of random resized crops: "bilinear", "bicubic" or "random"
    hflip: float = 0.5  # probability of a horizontal flip
    color_jitter: float = 0.3  # strength for brightness, contrast and saturation
    aa: str = "rand-m9-mstd0.5-inc1"  # timm's name of an AutoAugment policy, or "none"
    reprob: float = 0.25  # probability of random erasing
    remode: str = "pixel"  # what fills erased regions: "const", "rand" (a color) or "pixel"
    recount: int = 1  # maximum number of erased regions
    eval_crop_ratio: float = 0.875  # side of the center crop relative to the resized image, above 64 px


Normalization = tuple[Sequence[float], Sequence[float]]  # per-channel mean and std of images scaled to [0, 1]


class Normalize(nn.Module):
    """Normalization of uint8 [B, 3, H, W] to (x / 255 - mean) / std."""

    def __init__(self, normalization: Normalization) -> None:
        super().__init__()
        mean, std = (torch.tensor(list(values)).view(1, 3, 1, 1) for values in normalization)
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mul_(self.scale).add_(self.shift)


class EvalTransform(nn.Module):
    """The evaluation transform; on photos, 98 % of its values are within two gray levels of PIL's.

    The reference is `datasets.build_eval_transform`. Sharp edges and small images that are enlarged differ by more.
    Images are resized to size / eval_crop_ratio and center-cropped; up to 64 px the whole image is used.

    Args:
        stored_size: (height, width) of the padded buffer of a stored image in pixels.
        options, normalization: options of the views, per-channel (mean, std).
    """

    def __init__(self, stored_size: tuple[int, int], options: ViewOptions, normalization: Normalization) -> None:
        super().__init__()
        self.size, self.crop_ratio = options.input_size, options.eval_crop_ratio
        self.resample = Resampler(stored_size, self.size, "bicubic")
        self.normalize = Normalize(normalization)

    def forward(self, images: torch.Tensor, sizes: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """Transform uint8 [B, 3, H, W] to views [B, 3, height, width]; `sizes` [B, 2] are (height, width) of images.

        Nothing is random, so `keys` are ignored.
        """
        return in_parts(self._views, self.size, images, sizes)

    def _views(self, images: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        return self.normalize(self.resample(images, _whole(sizes), self._map(sizes)))

    def _map(self, sizes: torch.Tensor) -> Affine:
        """Return the map from view coordinates to coordinates of images of these sizes."""
        height, width = sizes.float().unbind(1)
        if max(self.size) <= SMALL_IMAGE:
            none = torch.zeros_like(height)
            return Affine.scaling(height / self.size[0], width / self.size[1], none, none)
        resized = [math.floor(side / self.crop_ratio) for side in self.size]
        if resized[0] == resized[1]:  # torchvision truncates the long side; otherwise both are rounded
            # In integers: a compiled float32 division on a GPU may give slightly less than the exact integer quotient.
            new_height, new_width = (resized[0] * sizes // sizes.amin(dim=1, keepdim=True)).float().unbind(1)
        else:
            ratio = torch.minimum(height / resized[0], width / resized[1])
            new_height, new_width = (height / ratio).round(), (width / ratio).round()
        top, left = ((new_height - self.size[0]) / 2).round(), ((new_width - self.size[1]) / 2).round()
        scale_y, scale_x = height / new_height, width / new_width
        return Affine.scaling(scale_y, scale_x, top * scale_y, left * scale_x)


def _whole(sizes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the box (top, left, height, width), [B] each, of whole images."""
    height, width = sizes.float().unbind(1)
    return torch.zeros_like(height), torch.zeros_like(width), height, width


class TrainAugmentation(nn.Module):
    """DeiT's training augmentation (paper, section 6 and table 9), as in `datasets.build_train_transform` (PIL).

    Random resized crop (up to 64 px: 4 px of padding and a random crop; optionally DeiT III's simple random crop),
    flip, the policy, color jitter (without a policy, or with 3-Augment), normalization, random erasing.

    Args:
        stored_size: (height, width) of the padded buffer of a stored image in pixels.
        options, normalization: options of the views, per-channel (mean, std).

    Raises:
        UserError: if the policy is unknown, or only the host supports it.
    """

    def __init__(self, stored_size: tuple[int, int], options: ViewOptions, normalization: Normalization) -> None:
        super().__init__()
        self.size, self.hflip = options.input_size, options.hflip
        self.re_prob, self.re_mode, self.re_count = options.reprob, options.remode, options.recount
        if options.src and not is_supported(options.aa, src=True):
            raise UserError(f"--src --aa {options.aa}: are supported together on the host only; use --augment host")
        interpolation, small = options.train_interpolation, options.src or max(self.size) <= SMALL_IMAGE
        self.crop = _simple_crop if options.src else _padded_crop if small else random_resized_crop
        # "random" means a random interpolation of random resized crops, which do not exist up to 64 px.
        interpolation = "bicubic" if small and interpolation == "random" else interpolation
        self.resample = Resampler(stored_size, self.size, interpolation)
        self.policy = None if options.aa in ("", "none") else Policy(options.aa)
        self.color_jitter = options.color_jitter if self.policy is None or "3a" in options.aa else 0.0
        self.kinds = self.policy.kinds_used if self.policy is not None else frozenset()
        self.normalize = Normalize(normalization)
        fill = torch.tensor([min(255, round(255 * value)) for value in normalization[0]], dtype=torch.uint8)
        self.register_buffer("fill", fill.view(1, 3, 1, 1))
        noise = torch.randn(NOISE + 3 * math.prod(self.size), generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", noise)  # regions use a slice that starts at one of the first NOISE values

    def forward(self, images: torch.Tensor, sizes: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Make the view of each image that its key determines.

        Args:
            images: uint8 [B, 3, H, W].
            sizes: [B, 2], height and width of each image within its buffer.
            keys: int64 [B].

        Returns:
            [B, 3, height, width], normalized.
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
        if isinstance(outside, Affine):
            views = self._blacken(views, outside, flipped < self.hflip, filled)
        elif outside is not None:
            views = _reflect(views, outside, flipped < self.hflip)
        for step, moved in zip(steps, filled, strict=True):
            views = recolor(views, step, self.kinds)
            views = only(step.is_a(*GEOMETRIC), self._fill, views, *moved.coefficients)
        for step in jitter(self.color_jitter, draws) if self.color_jitter else []:
            views = recolor(views, step, frozenset(("brightness", "contrast", "color")))
        return self._erase(self.normalize(views), draws)

    def _blacken(
        self, views: torch.Tensor, padding: Affine, flipped: torch.Tensor, filled: list[Affine]
    ) -> torch.Tensor:
        """Fill with black what comes from the padding of a small image."""
        first = _mirror(flipped, self.size[1])
        first = first.after(filled[0]) if filled else first
        outside = padding.after(first).outside(*self.size)
        return paint(views, outside, 0)

    def _fill(self, views: torch.Tensor, *coefficients: torch.Tensor) -> torch.Tensor:
        """Fill with the mean color what a geometric operation moved in from outside."""
        return paint(views, Affine(*coefficients).outside(*self.size), self.fill)

    def _erase(self, views: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Apply random erasing (Zhong et al. 2020) with timm's probabilities, after normalization."""
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
        return paint(views, inside, noise.view(-1, *shape))


def _mirror(flipped: torch.Tensor, width: int) -> Affine:
    """Return the map x -> width - x where flipped, the identity elsewhere."""
    sign, shift = torch.where(flipped, -1.0, 1.0), torch.where(flipped, float(width), 0.0)
    return Affine.scaling(torch.ones_like(sign), sign, torch.zeros_like(sign), shift)


def _padded_crop(
    draws: Draws, sizes: torch.Tensor, size: tuple[int, int]
) -> tuple[tuple[torch.Tensor, ...], Affine, Affine | None]:
    """Draw a shift of up to 4 px each way, at the view's size; return the box, the map and the padding's map."""
    down, right = draws.integer(2 * PADDING + 1) - PADDING, draws.integer(2 * PADDING + 1) - PADDING
    one = torch.ones_like(down)
    shift = Affine.scaling(one, one, down, right)
    height, width = sizes.float().unbind(1)
    none = torch.zeros_like(height)
    resize = Affine.scaling(height / size[0], width / size[1], none, none)
    return _whole(sizes), resize.after(shift), shift


def _simple_crop(
    draws: Draws, sizes: torch.Tensor, size: tuple[int, int]
) -> tuple[tuple[torch.Tensor, ...], Affine, tuple[torch.Tensor, ...]]:
    """Draw a crop of the image, resized by its short side and padded by 4 px with its reflection.

    Returns:
        The box, the map, and for `_reflect` (top, left, height, width), [B] each: first row and column of the view
        within the resized image, and size of the resized image.
    """
    # In integers, as torchvision truncates the long side.
    new_height, new_width = (size[0] * sizes // sizes.amin(dim=1, keepdim=True)).float().unbind(1)
    top = draws.integer(new_height + 2 * PADDING - size[0] + 1) - PADDING
    left = draws.integer(new_width + 2 * PADDING - size[1] + 1) - PADDING
    height, width = sizes.float().unbind(1)
    scale_y, scale_x = height / new_height, width / new_width
    map = Affine.scaling(scale_y, scale_x, top * scale_y, left * scale_x)
    return _whole(sizes), map, (top, left, new_height, new_width)


def _reflect(views: torch.Tensor, box: tuple[torch.Tensor, ...], flipped: torch.Tensor) -> torch.Tensor:
    """Fill pixels beyond the edges of the image with its reflection, which is also within the view.

    Args:
        views: [B, 3, height, width].
        box: (top, left, height, width) as `_simple_crop` returns it.
        flipped: [B], which views are mirrored.
    """
    top, left, height, width = (each[:, None].long() for each in box)
    y, x = (torch.arange(length, device=views.device) for length in views.shape[2:])
    x = torch.where(flipped[:, None], views.shape[3] - 1 - x, x)
    rows, columns = (
        (last - ((at + first).abs() - last).abs()) - first
        for at, first, last in ((y, top, height - 1), (x, left, width - 1))
    )
    columns = torch.where(flipped[:, None], views.shape[3] - 1 - columns, columns)
    views = views.gather(2, rows[:, None, :, None].expand_as(views))
    return views.gather(3, columns[:, None, None, :].expand_as(views))


def random_resized_crop(
    draws: Draws, sizes: torch.Tensor, size: tuple[int, int]
) -> tuple[tuple[torch.Tensor, ...], Affine, None]:
    """Draw a crop of 8 to 100 % of the area and aspect ratio 3/4 to 4/3; return its box, its map and no padding."""
    height, width = sizes.float().unbind(1)
    area = draws(ATTEMPTS, *CROP_AREA) * height * width  # (attempts, B)
    aspect = torch.exp(draws(ATTEMPTS, math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])))
    (crop_height, crop_width), found = _first_fitting(
        (area / aspect).sqrt().round(), (area * aspect).sqrt().round(), height, width
    )
    down, right = draws(2)
    top, left = (down * (height - crop_height + 1)).floor(), (right * (width - crop_width + 1)).floor()
    # If no attempt fits: the largest center crop with the nearest allowed aspect ratio.
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
    """Select the first attempt of [n, B] that fits; return (height, width) [2, B] and whether one fits, [B]."""
    fits = (heights <= most_height) & (widths <= most_width) & (heights >= 1) & (widths >= 1)
    first = fits.int().argmax(dim=0, keepdim=True)
    return torch.cat([heights.gather(0, first), widths.gather(0, first)]), fits.any(dim=0)


def _erased_region(draws: Draws, size: tuple[int, int], count: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Draw top, left, height and width [B] of a region to erase; empty if none fits."""
    area = draws(ATTEMPTS, *ERASED_AREA) * (size[0] * size[1]) / count
    aspect = torch.exp(draws(ATTEMPTS, math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])))
    heights, widths = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    (height, width), found = _first_fitting(heights, widths, size[0] - 1, size[1] - 1)
    down, right = draws(2)
    top, left = (down * (size[0] - height + 1)).floor(), (right * (size[1] - width + 1)).floor()
    return top, left, torch.where(found, height, 0), torch.where(found, width, 0)
