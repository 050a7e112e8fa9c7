"""Export a trained model: to ONNX, to torch.export, or to a folder for timm.

    python -m tools.export --resume output/best.pth --output model.onnx
    python -m tools.export --resume output/best.pth --output model.pt2
    python -m tools.export --resume output/best.pth --output my_model

The exports do not need this repository. Input: normalized images [B, 3, H, W],
any B; output: logits [B, classes]. An EViT keeps its final keep rate; choose
another with --base-keep-rate. Class names and preprocessing are stored as well.
Each export is read back and compared with the model before it is renamed to
--output.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from augment import SMALL_IMAGE, ViewOptions
from checkpoints import class_names_of
from flags import fill
from models import normalization, pretrained_config
from models_evit import evit_blocks, is_evit, plain_name
from tools import command
from utils import UserError, World, escaped, is_utf8, read_json, reason, set_up_logging, write_whole

TOLERANCE = 1e-3  # relative to the largest logit
TRANSFORM = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")  # keys of timm's create_transform
FILES = {"config.json", "model.safetensors", "README.md", "__pycache__"}
EXPORTER = "tools.export"  # recorded in config.json
LISTED_CLASSES = 20  # in README.md

Exported = Callable[[torch.Tensor], torch.Tensor]  # images -> logits, by the exported model


def describe(model: nn.Module, run: argparse.Namespace, trained: command.Trained) -> dict[str, Any]:
    """Describe an exported model with timm's keys: its classes and its evaluation transform.

    Raises:
        UserError: if there are more class names than classes.
    """
    views = fill(ViewOptions, run)
    with torch.no_grad():
        num_classes = model(torch.zeros(1, 3, *views.input_size)).shape[1]
    names, path = class_names_of(trained.about), trained.own.resume
    if len(names) > num_classes:
        raise UserError(f"--resume {path}: names {len(names)} classes, its model has {num_classes}; give another file")
    # An EViT has the config name of its DeiT. A local-dir: model has its name in its config only.
    name = pretrained_config(model)["architecture"] if ":" in run.model else run.model.partition(".")[0]
    mean, std = normalization(model)
    is_small = max(views.input_size) <= SMALL_IMAGE  # resized to exactly this size
    return {
        "architecture": name,
        "num_classes": num_classes,
        "class_names": list(names),
        "input_size": [3, *views.input_size],
        "interpolation": "bicubic",
        "mean": list(mean),
        "std": list(std),
        "crop_pct": 1.0 if is_small else views.eval_crop_ratio,
        "crop_mode": "squash" if is_small else "center",
    }


@torch.no_grad()
def difference(model: nn.Module, exported: Exported, input_size: tuple[int, int]) -> float:
    """Return the largest difference of a logit for 1 and 3 noise images, relative to the largest logit.

    NaN if any logit is NaN.
    """
    generator, parts = torch.Generator().manual_seed(0), []
    for batch in (1, 3):
        images = torch.randn(batch, 3, *input_size, generator=generator)
        expected = model(images)
        largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)  # all logits may be zero
        parts.append((exported(images) - expected).abs().max() / largest)
    return torch.stack(parts).max().item()  # Python's max would drop NaN


def check_agreement(model: nn.Module, exported: Exported, about: Mapping[str, Any], output: str) -> float:
    """Return `difference`; raise a one-line error if it is too large."""
    worst = difference(model, exported, tuple(about["input_size"][1:]))
    if not worst <= TOLERANCE:  # NaN fails, too
        raise UserError(f"--output {output}: its logits differ by {worst:.1e} of the largest, so it is not written")
    return worst


# -- one file ----------------------------------------------------------------------------------------------------------


def program_of(model: nn.Module, input_size: tuple[int, int]) -> torch.export.ExportedProgram:
    """Export the model in evaluation mode with `torch.export`, for any number of images of this (height, width)."""
    batch = {0: torch.export.Dim("batch", max=2**20)}  # torch 2.6 requires a limit
    # Two images: with one, the batch size would become a constant.
    return torch.export.export(model.eval(), (torch.zeros(2, 3, *input_size),), dynamic_shapes=(batch,))


def as_pt2(program: torch.export.ExportedProgram, metadata: Mapping[str, str]) -> tuple[bytes, Exported]:
    """Return the content of a .pt2 file with metadata as extra files, and the function that it computes."""
    content = io.BytesIO()
    torch.export.save(program, content, extra_files=dict(metadata))
    return content.getvalue(), torch.export.load(io.BytesIO(content.getvalue())).module()


def as_onnx(program: torch.export.ExportedProgram, metadata: Mapping[str, str]) -> tuple[bytes, Exported]:
    """Return the content of an .onnx file with metadata, and the function that it computes.

    Raises:
        UserError: if a package is missing.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise UserError(f"--output: {error.name} is missing; pip install onnx onnxscript onnxruntime") from None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    written = torch.onnx.export(
        program, (), input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
    ).model_proto
    onnx.helper.set_model_props(written, dict(metadata))
    content = written.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def export_file(model: nn.Module, output: str, about: Mapping[str, Any]) -> float:
    """Write an .onnx or .pt2 file with JSON metadata; return the difference between the logits.

    Raises:
        UserError: if packages are missing, or the logits differ too much.
    """
    program = program_of(model, tuple(about["input_size"][1:]))
    metadata = {key: json.dumps(value) for key, value in about.items()}
    content, exported = (as_pt2 if output.endswith(".pt2") else as_onnx)(program, metadata)
    worst = check_agreement(model, exported, about, output)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(output), content)
    return worst


# -- a folder for timm -------------------------------------------------------------------------------------------------


def load(trained: command.Trained, run: argparse.Namespace) -> nn.Module:
    """Build the model that these flags describe."""
    model = command.load_model(run, trained.weights, trained.own.resume, torch.device("cpu"))
    return model.to(memory_format=torch.contiguous_format)  # required by the formats


def load_for_timm(trained: command.Trained) -> tuple[nn.Module, argparse.Namespace]:
    """Build the model and return it with its flags; an EViT that keeps all patches becomes a DeiT, known to timm."""
    run = trained.run
    model = load(trained, run)
    if is_evit(run.model) and all(block.keep_rate == 1 for block in evit_blocks(model)):
        tokens = ("keep_rate", "drop_loc", "fuse_token")
        kwargs = {key: value for key, value in run.model_kwargs.items() if key not in tokens}
        plain = {"model": plain_name(run.model), "model_kwargs": kwargs}
        plain |= dict.fromkeys(("base_keep_rate", "drop_loc", "fuse_token"))
        run = argparse.Namespace(**{**vars(run), **plain})
        model = load(trained, run)
    return model, run


def modules_of(architecture: str, output: str) -> list[Path]:
    """Return the file that registers a model with timm, and the files next to it that it imports; [] for timm's models.

    Raises:
        UserError: if the model needs more than single files, which can be copied.
    """
    name = timm.model_entrypoint(architecture).__module__
    if name.startswith("timm."):
        return []
    if "." in name:
        raise UserError(f"--output {output}: {architecture} is of the package {name}; use .onnx or .pt2")
    files = [Path(sys.modules[name].__file__)]
    for file in files:  # the list grows in the loop
        for imported in sorted(_imports_of(file)):
            sibling = file.with_name(f"{imported}.py")
            if file.with_name(imported).is_dir() and file.with_name(imported).joinpath("__init__.py").exists():
                raise UserError(f"--output {output}: {file.name} imports the folder {imported}; use .onnx or .pt2")
            if sibling.exists() and sibling not in files:
                files.append(sibling)
    return files


def _imports_of(file: Path) -> set[str]:
    """Return the names of the top-level modules that a Python file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module.partition(".")[0]} if node.module else {alias.name for alias in node.names}
    return names


def check_folder(output: str) -> Path:
    """Return the resolved folder to write.

    Raises:
        UserError: if timm cannot read that name, or the folder holds something other than an earlier export.
    """
    folder = Path(output).resolve()
    if not is_utf8(str(folder)):
        raise UserError(f"--output {output}: is not UTF-8, which timm needs; name another folder")
    if folder.is_dir():
        found = {path.name for path in folder.iterdir()}
        try:
            config = read_json(folder / "config.json") if found else {}
        except (OSError, ValueError):
            config = {}
        config = config if isinstance(config, dict) and config.get("exporter") == EXPORTER else {}
        modules = config.get("modules")
        own = (FILES | set(map(str, modules if isinstance(modules, list) else ()))) if config else set()
        if found - own:
            raise UserError(
                f"--output {output}: holds {min(found - own)}, which is not an earlier export; name another folder"
            )
    elif os.path.lexists(folder):
        raise UserError(f"--output {output}: is a file; name it .onnx or .pt2, or name another folder")
    return folder


def loading_lines(folder: str, modules: Sequence[Path]) -> list[str]:
    """Return the lines of Python that load a folder."""
    lines = [f"folder = {folder!r}"]
    if modules:
        lines += ["import sys", f"sys.path.insert(0, folder)  # holds {modules[0].name}"]
        lines += [f"import {modules[0].stem}  # registers the model with timm"]
    return [*lines, "import timm", 'model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()']


def accuracy_of(trained: command.Trained) -> float | None:
    """Return the top-1 in percent of these very weights and this preprocessing in the training run, if it is known."""
    about, is_changed = trained.about, bool(trained.own.ema or trained.own.main_flags)
    epoch, best_epoch, best_acc1 = (about.get(key) for key in ("epoch", "best_epoch", "best_acc1"))
    if is_changed or about.get("progress") or not type(epoch) is type(best_epoch) is int or epoch != best_epoch + 1:
        return None
    return best_acc1 if type(best_acc1) in (int, float) and 0 <= best_acc1 <= 100 else None


def readme(about: Mapping[str, Any], modules: Sequence[Path], acc1: float | None) -> str:
    """Build README.md of a folder; texts from the checkpoint are in indented blocks, where markup has no effect."""
    names, size = about["class_names"], " x ".join(map(str, about["input_size"][1:]))
    accuracy = "" if acc1 is None else f"It had {acc1:.2f} % top-1 accuracy on the validation data of its training run."
    classes = [f"{index}: {escaped(name)[:80]}" for index, name in enumerate(names[:LISTED_CLASSES])]
    more = f"The other {len(names) - len(classes)} are in `config.json`." if len(names) > len(classes) else ""
    crop = "resized to that size" if about["crop_mode"] == "squash" else "resized, and cropped to the center"
    code = loading_lines(".", modules)
    code[0] += "  # this folder"
    parts = [
        "---\nlibrary_name: timm\npipeline_tag: image-classification\n---",
        f"# {about['architecture']}",
        f"An image classifier with {about['num_classes']} classes for images of {size} px. {accuracy}".rstrip(),
        f"## Load it\n\nWith timm {timm.__version__} or newer:",
        _indented(code),
        f"## Preprocess images\n\nImages are {crop}, and normalized:",
        _indented(
            [
                "import PIL.ImageOps",
                "config = timm.data.resolve_model_data_config(model)",
                "transform = timm.data.create_transform(**config, is_training=False)",
                "image = PIL.ImageOps.exif_transpose(image)  # a PIL image; photos may be stored on their side",
                'if image.mode[0] in "IF": raise ValueError("convert it to 8 bits per channel first")',
                'logits = model(transform(image.convert("RGB"))[None])',
            ]
        ),
        _indented([f"{key}: {about[key]}" for key in TRANSFORM]),
        *(["## Classes", _indented(classes), more] if names else []),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


def save_for_timm(model: nn.Module, folder: Path, about: Mapping[str, Any], modules: Sequence[Path]) -> None:
    """Save with timm's `save_for_hf`: model.safetensors, and a config.json from which timm builds the model.

    Raises:
        ValueError: if timm cannot describe or save the model.
    """
    of_source = ("tag", "license", "description", "origin_url", "notes", "label_names", "label_descriptions")
    config = {
        "label_names": about["class_names"],
        "pretrained_cfg": {"architecture": about["architecture"]} | dict.fromkeys(of_source),
        "exporter": EXPORTER,
        "modules": [module.name for module in modules],
    }
    transform = {key: about[key] for key in TRANSFORM}
    try:
        save_for_hf(model, str(folder), model_config=config, safe_serialization=True, data_config=transform)
    except (AttributeError, LookupError, TypeError, RuntimeError) as error:
        raise ValueError(reason(error)) from error
    weights = folder / "model.safetensors"
    weights.chmod((folder / "config.json").stat().st_mode)  # safetensors makes it readable by its owner only


def export_folder(
    model: nn.Module, output: str, about: Mapping[str, Any], acc1: float | None
) -> tuple[float, list[str]]:
    """Write a folder that timm loads, completely or not at all; return the logit difference and the loading code.

    Raises:
        UserError: if timm cannot load it, or it would replace something other than an earlier export.
    """
    folder, modules = check_folder(output), modules_of(about["architecture"], output)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        try:
            save_for_timm(model, new, about, modules)
            loaded = timm.create_model(f"local-dir:{new}", pretrained=True).eval()
        except OSError:
            raise
        except Exception as error:  # the model's own entry point can raise anything
            raise UserError(
                f"--output {output}: timm cannot load {about['architecture']} from a folder ({reason(error)}); build "
                f"it with timm's build_model_with_cfg, or use .onnx or .pt2"
            ) from error
        worst = check_agreement(model, loaded, about, output)
        (new / "README.md").write_text(readme(about, modules, acc1), encoding="utf-8")
        for module in modules:
            shutil.copyfile(module, new / module.name)
        _swap(new, check_folder(output), old)
    return worst, loading_lines(str(folder), modules)


def _swap(new: Path, folder: Path, old: Path) -> None:
    """Rename a new folder to `folder`; an existing one becomes `old`."""
    for file in new.iterdir():
        with open(file, "rb+") as stream:
            os.fsync(stream.fileno())
    existed = folder.exists()
    if existed:
        os.rename(folder, old)
    try:
        os.rename(new, folder)
    except OSError:
        if existed:
            os.rename(old, folder)
        raise


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.get_parser("export", __doc__, reads=command.OF_MODEL)
    parser.add_argument(
        "--output", required=True, metavar="PATH", help="NAME.onnx, NAME.pt2, or a folder for timm: no suffix, or NAME/"
    )
    with command.one_line_errors("export"):
        trained = command.parse(parser, argv)
        set_up_logging(World.alone(torch.device("cpu")))
        command.log_changes(trained)
        output, lines = trained.own.output, []
        if output.endswith("/") or not Path(output).suffix:
            check_folder(output)
            model, run = load_for_timm(trained)
            worst, lines = export_folder(model, output, describe(model, run, trained), accuracy_of(trained))
            files = list(Path(output).iterdir())
        elif output.endswith((".onnx", ".pt2")):
            model = load(trained, trained.run)
            worst, files = export_file(model, output, describe(model, trained.run, trained)), [Path(output)]
        else:
            raise UserError(f"--output {output}: name it .onnx or .pt2, or without a suffix for a folder")
        size = sum(file.stat().st_size for file in files) / 2**20
        print(f"{output}: {size:.1f} MiB, logits within {worst:.1e} of the largest")
        for line in lines:
            print(f"    {escaped(line)}")


if __name__ == "__main__":
    main()
