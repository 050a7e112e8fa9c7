"""Draw which patches of an image an EViT keeps after each layer that drops patches.

    python -m tools.visualize_tokens --resume output/best.pth --images photo.jpg
    python -m tools.visualize_tokens --resume output/best.pth --num-images 8

Without --images, --num-images validation images are drawn. Dropped and fused
patches are gray and hatched. The pictures of an earlier call are replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

import datasets
import sources
from augment import ViewOptions
from flags import COUNT, fill
from models import normalization
from models_evit import EViTBlock, evit_blocks, keep_attentive
from tools import command, pictures
from utils import UserError, World, escaped, regular_file

SOFTWARE = "tools.visualize_tokens"  # in the pictures; marks those that a later call may replace


@dataclass
class Reduction:
    """The patches that a layer kept.

    Attributes:
        layer: index of the layer, from 0.
        kept: [N] bool, which patches of the image are still separate tokens.
    """

    layer: int
    kept: torch.Tensor


@torch.no_grad()
def follow(model: nn.Module, image: torch.Tensor) -> list[Reduction]:
    """Run one image [3, H, W] through the model and record which of its N patches each layer of drop_loc keeps.

    Each token is represented by its shares in the N patches, a one-hot row at first. Layers that drop or fuse tokens do
    the same to these rows. A fused token has no share of exactly 1.
    """
    shares: torch.Tensor | None = None  # (1, tokens, N)
    reductions: list[Reduction] = []

    def note(layer: int, args: tuple[Any, ...]) -> None:
        nonlocal shares
        _, attentiveness, num_keep, fuse = args
        if shares is None:
            shares = torch.eye(attentiveness.shape[1])[None]
        shares = keep_attentive(shares, attentiveness.float().cpu(), num_keep, fuse)
        reductions.append(Reduction(layer, (shares[0] == 1).any(dim=0)))

    hooks = [
        block.keep.register_forward_hook(lambda _module, args, _output, layer=layer: note(layer, args))
        for layer, block in enumerate(model.blocks)
        if isinstance(block, EViTBlock)
    ]
    try:
        model(image[None].to(next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return reductions


def draw(
    pixels: np.ndarray,
    reductions: Sequence[Reduction],
    grid: tuple[int, int],
    patch_size: tuple[int, int] | None = None,
    title: str = "",
    caption: str = "",
) -> Image.Image:
    """Draw the image, uint8 [H, W, 3], next to the kept patches after each reduction; enlarge small images.

    Args:
        grid: rows and columns of patches.
        patch_size: (height, width) in pixels; by default the grid covers the image. Uncovered parts are dimmed.
        title, caption: text above and below.
    """
    height, width, _ = pixels.shape
    patch_size = patch_size or (height // grid[0], width // grid[1])
    image = pictures.enlarged(pixels)
    headings, panels = [f"model input\n{math.prod(grid)} patches"], [image]
    for reduction in reductions:
        covered = np.kron(reduction.kept.reshape(grid).numpy(), np.ones(patch_size, bool))[:height, :width]
        kept = np.zeros((height, width, 1), bool)
        kept[: covered.shape[0], : covered.shape[1], 0] = covered
        count, total = int(reduction.kept.sum()), reduction.kept.numel()
        headings.append(f"after layer {reduction.layer}\n{count} kept ({100 * count / total:.0f} %)")
        panels.append(np.where(pictures.enlarged(kept), image, pictures.dimmed(image)))
    return pictures.sheet([("", panels)], headings, title, caption)


def find_images(paths: Sequence[str], flag: str = "--images") -> sources.Source:
    """Return the image files named, also those in folders, as a source of one class; `flag` is for error messages.

    Raises:
        UserError: if a path does not exist, or a folder holds no images.
    """
    files = command.find_files(paths, flag)
    count = len(files)
    return sources.Source(sources.PathImages(files, upright=True), np.zeros(count, dtype=np.int64), 1, np.arange(count))


def validation_images(run: argparse.Namespace, world: World, number: int) -> sources.Source:
    """Return `number` images spread evenly over the validation data.

    Raises:
        UserError: if the data are a stream, or cannot be read.
    """
    options = replace(fill(datasets.DataOptions, run), ram_cache=0)  # only a few images are needed
    _, source = datasets.build_sources(options, world.local_rank, eval_only=True)
    if not isinstance(source, sources.Source):
        raise UserError(f"--data-set {run.data_set}: a stream cannot be indexed; pass files with --images")
    chosen = np.linspace(0, len(source) - 1, min(number, len(source))).astype(int)
    return replace(source, order=source.order[chosen])


def earlier_pictures(folder: Path) -> list[Path]:
    """List the pictures of an earlier call in a folder, which new ones replace.

    Raises:
        UserError: if the folder has files with their names that do not say that this tool has written them.
    """
    found = sorted(folder.glob("[0-9][0-9][0-9][0-9].png"))
    for path in found:
        start = b""
        with contextlib.suppress(OSError), regular_file(path).open("rb") as file:
            start = file.read(1024)
        if f"Software\0{SOFTWARE}".encode() not in start:  # a text chunk of the PNG file
            raise UserError(f"--output {folder}: {path.name} does not say that it is of this tool; name a new folder")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.get_parser("visualize_tokens", __doc__, reads=command.OF_DATA)
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="PATH",
        help="files and folders, turned upright by their EXIF orientation; default: the validation data",
    )
    parser.add_argument("--num-images", type=COUNT, help="number of validation images; default: 8")
    parser.add_argument("--output", type=Path, default=Path("output/tokens"), help="folder of the PNG files")
    with command.one_line_errors("visualize_tokens"):
        trained = command.parse(parser, argv)
        own, run, weights, *_ = trained
        if own.images and own.num_images:
            raise UserError("--num-images: is for validation images; drop it, or name fewer files with --images")
        earlier = earlier_pictures(own.output)
        world = command.start(trained, "draws")
        model = command.load_model(run, weights, own.resume, world.device)
        if not any(block.keep_rate < 1 for block in evit_blocks(model)):
            raise UserError(f"--model {run.model}: drops no patches; add --base-keep-rate 0.7, or --model evit_...")
        source = find_images(own.images) if own.images else validation_images(run, world, own.num_images or 8)
        mean, std = normalization(model)
        transform = datasets.build_eval_transform(fill(ViewOptions, run), (mean, std))
        own.output.mkdir(parents=True, exist_ok=True)
        made = PngInfo()
        made.add_text("Software", SOFTWARE)
        fused = any(block.fuse_token for block in evit_blocks(model))
        caption = f"Gray and hatched: {'fused into one token' if fused else 'dropped'}. Layers are counted from 0."
        for number in range(len(source)):
            image, target = source[number]
            view = transform(image)
            reductions = follow(model, view)
            pixels = (view * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]).clamp(0, 1) * 255
            patches = model.patch_embed
            grid = patches.dynamic_feat_size(view.shape[1:])  # grid_size belongs to the model's default image size
            name = source.images.describe(source.order[number])
            title = Path(name).name if isinstance(source.images, sources.PathImages) else name
            title += f", class {source.class_names[target]}" if source.class_names else ""
            pixels = pixels.round().byte().permute(1, 2, 0).numpy()
            picture = draw(pixels, reductions, grid, patches.patch_size, title, caption)
            file = own.output / f"{number:04d}.png"
            picture.save(file, pnginfo=made)
            left = ", ".join(f"{int(r.kept.sum())} after layer {r.layer}" for r in reductions) or "all kept"
            print(f"{file}: {escaped(name)}, {math.prod(grid)} patches, {left}")
        for file in earlier:
            if int(file.stem) >= len(source):
                file.unlink()


if __name__ == "__main__":
    main()
