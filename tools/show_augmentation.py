"""Draw timm's augmentation next to ours, for comparison by eye.

    python -m tools.show_augmentation --images photo.jpg folder/
    python -m tools.show_augmentation --data-path /path/to/imagenet --aa 3a

The first rows show each operation of the policy at its magnitude, the others
random augmented images. Of the data flags below, --ram-cache,
--skip-broken-images, --allow-class-mismatch and --eval-crop-ratio have no
effect here.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import AugmentOp

from augment import Policy, TrainAugmentation, ViewOptions
from augment.image_ops import Resampler, paint
from augment.policy import KINDS, OPERATIONS, Step, as_affine, parse_policy, recolor
from datasets import KNOWN_NAMES, DataOptions, build_sources, build_train_transform
from flags import COUNT, Parser, add_data_arguments, fill, in_range
from packs import PACK
from samplers import random_keys, seed_generators
from sources import Source
from tools import command, pictures
from tools.pictures import Row
from tools.visualize_tokens import find_images
from utils import UserError, World, set_up_logging

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = tuple(round(255 * value) for value in MEAN)


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m tools.show_augmentation",
        usage="%(prog)s [flags]",
        description=__doc__,
        conflict_handler="resolve",
    )
    add_data_arguments(parser)
    default = "default: found from --data-path (class folders, a pack or images), else DIGITS"
    parser.add_argument("--data-set", help=f"{KNOWN_NAMES}; {default}")
    add = parser.add_argument_group("picture").add_argument
    add("--images", nargs="+", metavar="PATH", help="files and folders; default: the training data")
    add("--num-images", type=COUNT, default=3, help="number of images")
    add("--views", type=in_range(int, 0), default=6, help="number of rows of random augmented images")
    add("--input-size", type=in_range(int, 8), default=224, help="side of the views, in pixels")
    add("--aa", metavar="POLICY", default="rand-m9-mstd0.5-inc1", help="AutoAugment policy in timm's notation, or none")
    add("--seed", type=in_range(int, 0), default=0, help="seed of the random views and of the signs of operations")
    add("--output", type=Path, default=Path("augmentation.png"), help="file of the picture")
    return parser


def data_set_of(own: argparse.Namespace) -> str | None:
    """Return the data set to draw; None for image files. Without `--data-set`, the content of the folder decides.

    Raises:
        UserError: if flags contradict each other.
    """
    if own.images and (own.data_set or own.data_path):
        given = "--data-set" if own.data_set else "--data-path"
        raise UserError(f"--images: the pictures are those of these files, so {given} has no effect; drop one of them")
    if own.data_set == "DIGITS" and own.data_path:
        raise UserError(
            f"--data-path {own.data_path}: --data-set DIGITS is bundled and reads no folder; drop one of them"
        )
    if own.data_set or not own.data_path:
        return own.data_set or (None if own.images else "DIGITS")
    root = Path(own.data_path)
    if (root / PACK).is_file():
        return "PACKED"
    return "IMNET" if all((root / part).is_dir() for part in ("train", "val")) else None


def find_source(own: argparse.Namespace) -> Source:
    """Return `--num-images` images, spread evenly over the given files or the training data.

    Raises:
        UserError: if there are no images, or the data cannot be indexed.
    """
    name = data_set_of(own)
    if own.images:
        source = find_images(own.images)
    elif name is None:
        source = find_images([own.data_path], "--data-path")
    else:
        # Keep nothing in memory for a few images, and report unreadable ones.
        options = replace(fill(DataOptions, own), data_set=name, ram_cache=0, skip_broken_images=0)
        source, _ = build_sources(options)
        if not isinstance(source, Source):
            raise UserError(f"--data-set {name}: a stream cannot be indexed; pass files with --images")
    chosen = np.linspace(0, len(source) - 1, min(own.num_images, len(source))).astype(int)
    return replace(source, order=source.order[chosen])


def as_batch(images: Sequence[Image.Image]) -> torch.Tensor:
    """Stack images of one size into uint8 [B, 3, H, W]."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def operate(images: torch.Tensor, name: str, level: float, sign: float) -> torch.Tensor:
    """Apply one timm operation with our code to uint8 [B, 3, S, S]; level from 0 to 1, sign 1 or -1."""
    kind, argument_of = OPERATIONS[name]
    side, ones = images.shape[2], torch.ones(len(images))
    step = Step((ones * KINDS.index(kind)).long(), argument_of(level * ones, sign * ones))
    map = as_affine(step, side, side)
    views = Resampler((side, side), (side, side), "bicubic")(
        images, (0 * ones, 0 * ones, side * ones, side * ones), map
    )
    views = paint(views, map.outside(side, side), torch.tensor(FILL, dtype=torch.uint8).view(1, 3, 1, 1))
    return recolor(views, step, frozenset(KINDS))


def operation_rows(images: Sequence[Image.Image], policy: str, seed: int) -> list[Row]:
    """Apply each operation once at its magnitude; per image, return timm's result and ours."""
    found = parse_policy(policy)
    ops = found.ops if hasattr(found, "ops") else [op for row in found.policy for op in row]
    rows = []
    for number, (name, magnitude) in enumerate(sorted({(op.name, op.magnitude) for op in ops})):
        alone = AugmentOp(
            name, prob=1.0, magnitude=magnitude, hparams={"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
        )
        random.seed(seed + number)
        drawn = random.random()  # timm's first draw: a sign, or a radius
        level = drawn if name == "GaussianBlurRand" else min(magnitude, alone.magnitude_max or 10) / 10
        ours = operate(as_batch(images), name, level, -1.0 if drawn > 0.5 else 1.0)
        panels = []
        for image, view in zip(images, ours, strict=True):
            random.seed(seed + number)
            panels += [np.array(alone(image)), view.permute(1, 2, 0).numpy()]
        rows.append((f"{name} {magnitude:g}", panels))
    return rows


def as_pictures(views: torch.Tensor) -> list[np.ndarray]:
    """Convert normalized [B, 3, H, W] to a list of uint8 [H, W, 3]."""
    pixels = views * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    return list((pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy())


def view_rows(images: Sequence[Image.Image], policy: str, size: int, seed: int, number: int) -> list[Row]:
    """Draw whole random views; per image, return timm's and ours, which are independent."""
    options = ViewOptions((size, size), aa=policy)
    transform = build_train_transform(options, (MEAN, STD))
    sizes = torch.tensor([image.size[::-1] for image in images])
    height, width = sizes.amax(dim=0).tolist()
    buffer = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for padded, image in zip(buffer, images, strict=True):
        padded[:, : image.height, : image.width] = as_batch([image])[0]
    augmentation = TrainAugmentation((height, width), options, (MEAN, STD))
    rows = []
    for row in range(number):
        keys = random_keys(seed, "view", row, np.arange(len(images)))
        theirs = []
        for image, key in zip(images, keys.tolist(), strict=True):
            seed_generators(key)
            theirs.append(transform(image))
        ours = augmentation(buffer, sizes, torch.from_numpy(keys.view(np.int64)))
        pairs = zip(as_pictures(torch.stack(theirs)), as_pictures(ours), strict=True)
        rows.append((f"view {row + 1}", [picture for pair in pairs for picture in pair]))
    return rows


def draw(rows: Sequence[Row]) -> Image.Image:
    """Draw rows with their labels below each other, two columns per image; small pictures are enlarged."""
    larger = [(label, [pictures.enlarged(panel) for panel in panels]) for label, panels in rows]
    headings = [
        f"image {column // 2 + 1}\n{('timm (PIL)', 'batched')[column % 2]}" for column in range(len(rows[0][1]))
    ]
    title = (
        "Rows of operations: at the same magnitude, timm's and the batched code should look alike. "
        "Rows of views: random operations, crop, flip and erasing, drawn independently."
    )
    return pictures.sheet(larger, headings, title)


def main(argv: Sequence[str] | None = None) -> None:
    with command.one_line_errors("show_augmentation"):
        own = build_parser().parse_args(argv)
        set_up_logging(World.alone(torch.device("cpu")))
        if Image.registered_extensions().get(own.output.suffix.lower()) not in Image.SAVE:
            raise UserError(f"--output {own.output}: is not named as a picture; try {own.output.stem or 'picture'}.png")
        if own.aa not in ("", "none"):
            Policy(own.aa)  # refuses policies that cannot be compared
        source = find_source(own)
        images = [source[position][0] for position in range(len(source))]
        square = [ImageOps.fit(image, (own.input_size,) * 2, Image.Resampling.BICUBIC) for image in images]
        rows = [("original", [np.array(image) for image in square for _ in range(2)])]
        if own.aa not in ("", "none"):
            rows += operation_rows(square, own.aa, own.seed)
        rows += view_rows(images, own.aa, own.input_size, own.seed, own.views)
        picture = draw(rows)
        own.output.parent.mkdir(parents=True, exist_ok=True)
        picture.save(own.output)
        print(f"{own.output}: {len(images)} images, {len(rows)} rows, {picture.width}x{picture.height} pixels")


if __name__ == "__main__":
    main()
