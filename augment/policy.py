"""Random draws of a view: numbers hashed from its key, and the operations of timm's policies."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data.auto_augment import AutoAugment, RandAugment, auto_augment_transform, rand_augment_transform
from torch import nn

from augment.image_ops import (
    Affine,
    adjust_color,
    adjust_sharpness,
    autocontrast_table,
    contrast_table,
    equalize_table,
    gaussian_blur,
    look_up,
    only,
)
from utils import UserError

# -- random numbers ----------------------------------------------------------------------------------------------------


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


def splitmix64(x: torch.Tensor) -> torch.Tensor:
    """Hash int64 tensors like `samplers._splitmix64` (integers wrap around)."""

    def shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
        return (value >> bits) & (2 ** (64 - bits) - 1)  # logical shift: drop the sign bits

    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ shifted(x, 31)


class Draws:
    """Uniform random numbers in [0, 1) per sample; each call takes the next ones.

    Args:
        keys: int64 [B], keys of the samples. They must be hashed: small neighboring integers would share draws.
        number: how many numbers each sample has.
    """

    def __init__(self, keys: torch.Tensor, number: int) -> None:
        bits = splitmix64(keys ^ torch.arange(number, device=keys.device)[:, None]) >> 40 & 0xFFFFFF
        self.numbers, self.used = bits.float() * 2.0**-24, 0  # (number, B)

    def __call__(self, number: int = 1, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """Draw float32 [number, B], uniform in [low, high)."""
        self.used += number
        if self.used > len(self.numbers):
            raise IndexError(f"there are {len(self.numbers)} numbers for each sample, {self.used} are drawn")
        return low + (high - low) * self.numbers[self.used - number : self.used]

    def normal(self) -> torch.Tensor:
        """Draw float32 [B], standard normal (Box and Muller 1958)."""
        radius, angle = self(2)
        return (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)

    def integer(self, number: torch.Tensor | int) -> torch.Tensor:
        """Draw float32 [B], integers from 0 to number - 1."""
        return (self()[0] * number).floor()


# -- policies ----------------------------------------------------------------------------------------------------------

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
TABLES = ("autocontrast", "equalize", "contrast", "invert", "posterize", "solarize", "solarize_add", "brightness")
KINDS = ("none", *GEOMETRIC, *TABLES, "color", "sharpness", "blur")


def _toward_two(level: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    return (1 + sign * 0.9 * level).clamp(min=0.1)


def _enhancement(level: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    return 0.1 + 1.8 * level


def _floor(number: torch.Tensor) -> torch.Tensor:
    """Round down, robust to results that float rounding has left slightly below an integer."""
    return (number + 1e-3).floor()


# timm's operation -> (our operation, its argument by level (0 to 1 for magnitudes 0 to 10) and random sign)
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
    "TranslateXRel": ("translate_x", lambda level, sign: sign * 0.45 * level),  # share of the width
    "TranslateYRel": ("translate_y", lambda level, sign: sign * 0.45 * level),  # share of the height
    "Desaturate": ("color", lambda level, sign: 0.5 - 0.5 * level),
    "GaussianBlur": ("blur", lambda level, sign: 0.1 + 1.9 * level),
    # A radius from 0.1 to twice the level. The level itself is drawn below.
    "GaussianBlurRand": ("blur", lambda level, sign: 0.1 + 1.9 * level),
}


# The policies that timm knows. Its parser skips parts that it does not understand.
_FLOAT = r"\d+(\.\d*)?"
KNOWN_POLICY = re.compile(
    rf"rand(-(mstd{_FLOAT}|mmax\d+|m\d+|n\d+|p{_FLOAT}|inc\d+|t(weights|3aw?)))*"
    rf"|augmix(-(mstd{_FLOAT}|m\d+|w\d+|d\d+|a{_FLOAT}|b\d+))*"
    rf"|(v0r?|originalr?|3a)(-mstd{_FLOAT})*",
    re.ASCII,
)


@dataclass
class Step:
    """One operation per sample: its kind [B] (an index into KINDS) and its argument [B]."""

    kind: torch.Tensor
    argument: torch.Tensor

    def is_a(self, *names: str) -> torch.Tensor:
        """Return which samples have one of these kinds, bool [B]."""
        wanted = self.kind == KINDS.index(names[0])
        for name in names[1:]:
            wanted = wanted | (self.kind == KINDS.index(name))
        return wanted


class Policy(nn.Module):
    """timm's RandAugment and AutoAugment policies (including 3-Augment), drawn for a whole batch.

    Args:
        name: in timm's notation: rand-..., v0, v0r, original, originalr, 3a; augmix is not supported.

    Raises:
        UserError: if timm does not know the policy, or only the host supports it.
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
        # Two passes cannot resample a rotation by 90°.
        steep = self.num_steps > 2 or any((op.magnitude_max or 10) > 10 for op in ops)
        if not set(self.names) <= OPERATIONS.keys() or steep or getattr(policy, "choice_weights", None) is not None:
            raise UserError(f"--aa {name}: is supported on the host only; use --augment host")
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
        """Draw the operations of each sample, in order."""
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


def is_supported(name: str, src: bool = False) -> bool:
    """Return True if this code supports a timm policy ("none" included); `src`: with DeiT III's simple random crop."""
    try:
        return name in ("", "none") or not (Policy(name).kinds_used & {*GEOMETRIC} and src)
    except UserError:
        return False


def parse_policy(name: str) -> RandAugment | AutoAugment | Any:
    """Parse a policy in timm's notation.

    Raises:
        UserError: if timm does not know it, or only the host supports it.
    """
    check_policy(name)
    if name.startswith("augmix"):
        raise UserError(f"--aa {name}: is supported on the host only; use --augment host")
    return (rand_augment_transform if name.startswith("rand") else auto_augment_transform)(name)


def check_policy(name: str) -> None:
    """Check that timm understands all of a policy's name.

    Raises:
        UserError: if it does not.
    """
    if not KNOWN_POLICY.fullmatch(name):
        raise UserError(f"--aa {name}: timm has no such policy; try rand-m9-mstd0.5-inc1, or none")


def jitter(strength: float, draws: Draws) -> list[Step]:
    """Draw color jitter: brightness, contrast and saturation by factors in 1 ± strength, in random order."""
    brightness, contrast, color = (KINDS.index(name) for name in ("brightness", "contrast", "color"))
    order = draws(3).argsort(dim=0)  # (3, B)
    factors = draws(3, max(0.0, 1 - strength), 1 + strength)
    # Creating a tensor from these numbers would copy from the host, which is a GPU sync.
    kinds = torch.where(order == 0, brightness, torch.where(order == 1, contrast, color))
    return [Step(kind, factors.gather(0, which[None])[0]) for kind, which in zip(kinds, order, strict=True)]


def as_affine(step: Step, height: int, width: int) -> Affine:
    """Return a geometric step as an affine map of view coordinates; the identity for other steps."""

    def argument(name: str) -> torch.Tensor:
        return torch.where(step.is_a(name), step.argument, 0.0)

    angle = torch.deg2rad(argument("rotate"))
    cos, sin = torch.cos(angle), torch.sin(angle)
    x, y = width / 2, height / 2  # the center of a rotation
    return Affine(
        cos,
        argument("shear_x") - sin,
        x - cos * x + sin * y + argument("translate_x") * width,
        argument("shear_y") + sin,
        cos,
        y - sin * x - cos * y + argument("translate_y") * height,
    )


def recolor(images: torch.Tensor, step: Step, kinds: frozenset[str]) -> torch.Tensor:
    """Apply a step to the samples whose operation changes colors.

    Eight of the eleven color operations are tables of 256 values per channel, which are applied together.

    Args:
        images: uint8 [B, 3, H, W].
        kinds: operations that may occur.
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
    """Build the tables, uint8 [B, 3, 256], of samples whose operation is in `names`; the identity for others."""
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
