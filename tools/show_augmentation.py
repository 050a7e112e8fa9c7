"""Draw what the augmentation does, by timm's PIL code and by the batched code side by side, for the eye to compare.

    python -m tools.show_augmentation --images photo.jpg folder/ --input-size 224 --output augmentation.png
    python -m tools.show_augmentation --data-set CIFAR --num-images 4 --aa 3a

First each operation of the policy at its magnitude, then whole random views, which are drawn independently.
Of the data flags below, --ram-cache, --skip-broken-images and --eval-crop-ratio have no effect here.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from timm.data.auto_augment import AugmentOp

from augment import Policy, TrainAugmentation, ViewOptions
from augment.image_ops import Resampler, paint
from augment.policy import KINDS, OPERATIONS, Step, as_affine, parse_policy, recolour
from datasets import (
    DataOptions,
    build_sources,
    build_train_transform,
)
from flags import Parser, add_data_arguments, fill, in_range
from samplers import random_keys, seed_generators
from sources import Source
from tools import command
from tools.visualize_tokens import find_images
from utils import UserError, World, set_up_logging

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = tuple(round(255 * value) for value in MEAN)
GAP, HEADING, LEGEND, SMALLEST_PANEL = 4, 14, 150, 96  # pixels
Row = tuple[str, list[np.ndarray]]  # a label, and pictures [H, W, 3]


def build_parser() -> Parser:
    parser = Parser(prog="python -m tools.show_augmentation", description=__doc__)
    add_data_arguments(parser)
    parser.set_defaults(data_set="DIGITS")
    add = parser.add_argument_group("picture").add_argument
    add("--images", nargs="+", help="files and folders; default: the training data")
    add("--num-images", type=in_range(int, 1), default=3, help="how many images")
    add("--views", type=in_range(int, 0), default=6, help="rows of whole random views")
    add("--input-size", type=in_range(int, 8), default=224, help="side of the views, in pixels")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="AutoAugment policy in timm's notation; none for none")
    add("--seed", type=in_range(int, 0), default=0, help="of the random views and of the operations' signs")
    add("--output", type=Path, default=Path("augmentation.png"), help="the picture")
    return parser


def find_source(own: argparse.Namespace) -> Source:
    """`--num-images` images, of the files named or spread evenly over the training data.

    Raises:
        UserError
    """
    if own.images:
        source = find_images(own.images)
    else:
        # Only a few images are needed, and one that cannot be read is named.
        source, _ = build_sources(replace(fill(DataOptions, own), ram_cache=0, skip_broken_images=0))
        if not isinstance(source, Source):
            raise UserError(f"--data-set {own.data_set}: a stream has no single images; pass files with --images")
    chosen = np.linspace(0, len(source) - 1, min(own.num_images, len(source))).astype(int)
    return replace(source, order=source.order[chosen])


def as_batch(images: Sequence[Image.Image]) -> torch.Tensor:
    """uint8 [B, 3, H, W] of images of one size."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def operate(images: torch.Tensor, name: str, level: float, sign: float) -> torch.Tensor:
    """One operation of timm's on uint8 [B, 3, S, S], by the batched code; level 0 to 1, sign 1 or -1."""
    kind, argument_of = OPERATIONS[name]
    side, ones = images.shape[2], torch.ones(len(images))
    step = Step((ones * KINDS.index(kind)).long(), argument_of(level * ones, sign * ones))
    map = as_affine(step, side, side)
    views = Resampler((side, side), (side, side), "bicubic")(
        images, (0 * ones, 0 * ones, side * ones, side * ones), map
    )
    views = paint(views, map.outside(side, side), torch.tensor(FILL, dtype=torch.uint8).view(1, 3, 1, 1))
    return recolour(views, step, frozenset(KINDS))


def operation_rows(images: Sequence[Image.Image], policy: str, seed: int) -> list[Row]:
    """Each operation once at its magnitude: for each image timm's result and ours."""
    found = parse_policy(policy)
    ops = found.ops if hasattr(found, "ops") else [op for row in found.policy for op in row]
    rows = []
    for number, (name, magnitude) in enumerate(sorted({(op.name, op.magnitude) for op in ops})):
        alone = AugmentOp(
            name, prob=1.0, magnitude=magnitude, hparams={"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
        )
        random.seed(seed + number)
        drawn = random.random()  # the first that timm draws: a sign, or a radius
        level = drawn if name == "GaussianBlurRand" else min(magnitude, alone.magnitude_max or 10) / 10
        ours = operate(as_batch(images), name, level, -1.0 if drawn > 0.5 else 1.0)
        pictures = []
        for image, view in zip(images, ours, strict=True):
            random.seed(seed + number)
            pictures += [np.array(alone(image)), view.permute(1, 2, 0).numpy()]
        rows.append((f"{name} {magnitude:g}", pictures))
    return rows


def as_pictures(views: torch.Tensor) -> list[np.ndarray]:
    """Normalised [B, 3, H, W] as uint8 [H, W, 3] each."""
    pixels = views * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    return list((pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy())


def view_rows(images: Sequence[Image.Image], policy: str, size: int, seed: int, number: int) -> list[Row]:
    """Whole random views: for each image timm's and ours, which have nothing to do with each other."""
    options = ViewOptions((size, size), aa=policy)
    transform = build_train_transform(options, (MEAN, STD))
    sizes = torch.tensor([image.size[::-1] for image in images])
    height, width = sizes.amax(dim=0).tolist()
    stored = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for frame, image in zip(stored, images, strict=True):
        frame[:, : image.height, : image.width] = as_batch([image])[0]
    augmentation = TrainAugmentation((height, width), options, (MEAN, STD))
    rows = []
    for row in range(number):
        keys = random_keys(seed, "view", row, np.arange(len(images)))
        theirs = []
        for image, key in zip(images, keys.tolist(), strict=True):
            seed_generators(key)
            theirs.append(transform(image))
        ours = augmentation(stored, sizes, torch.from_numpy(keys.view(np.int64)))
        pairs = zip(as_pictures(torch.stack(theirs)), as_pictures(ours), strict=True)
        rows.append((f"view {row + 1}", [picture for pair in pairs for picture in pair]))
    return rows


def draw(rows: Sequence[Row], side: int) -> Image.Image:
    """The rows below each other with their labels, small pictures enlarged; a pair of columns for each image."""
    panel = side * max(1, -(-SMALLEST_PANEL // side))
    step, columns = panel + GAP, len(rows[0][1])
    canvas = Image.new("RGB", (LEGEND + step * columns, HEADING + step * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    for column in range(columns):
        pen.text((LEGEND + column * step + 1, 1), "batched" if column % 2 else "timm", fill="black")
    for number, (label, pictures) in enumerate(rows):
        pen.text((GAP, HEADING + number * step + panel // 2), label, fill="black")
        for column, picture in enumerate(pictures):
            enlarged = Image.fromarray(picture).resize((panel, panel), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (LEGEND + column * step, HEADING + number * step))
    return canvas


def main(argv: Sequence[str] | None = None) -> None:
    with command.errors_in_a_line("show_augmentation"):
        own = build_parser().parse_args(argv)
        set_up_logging(World.alone(torch.device("cpu")))
        if own.output.suffix.lower() not in Image.registered_extensions():
            raise UserError(f"--output {own.output}: is not named as a picture; try {own.output.stem or 'picture'}.png")
        if own.aa not in ("", "none"):
            Policy(own.aa)  # refuses those that cannot be compared
        source = find_source(own)
        images = [source[place][0] for place in range(len(source))]
        square = [ImageOps.fit(image, (own.input_size,) * 2, Image.Resampling.BICUBIC) for image in images]
        rows = [("image", [np.array(image) for image in square for _ in range(2)])]
        if own.aa not in ("", "none"):
            rows += operation_rows(square, own.aa, own.seed)
        rows += view_rows(images, own.aa, own.input_size, own.seed, own.views)
        picture = draw(rows, own.input_size)
        own.output.parent.mkdir(parents=True, exist_ok=True)
        picture.save(own.output)
        print(f"{own.output}: {len(images)} images, {len(rows)} rows, {picture.width}x{picture.height} pixels")


if __name__ == "__main__":
    main()
