"""Write a trained model as one file that runs without this repository: ONNX, or a program of torch.export.

    python -m tools.export --resume output/best.pth --output model.onnx
    python -m tools.export --resume output/best.pth --output model.pt2 --base-keep-rate 0.5

Images go in normalised, [B, 3, H, W] with any B; logits [B, classes] come out. An EViT keeps its final keep rate. The
file is read back and compared with the model.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from checkpoints import class_names_of
from tools import command
from utils import UserError

TOLERANCE = 1e-3  # of the largest logit


def export(model: nn.Module, input_size: tuple[int, int]) -> torch.export.ExportedProgram:
    """`torch.export` of the model in evaluation mode, for any number of images of that (height, width)."""
    batch = {0: torch.export.Dim("batch", max=2**20)}  # torch 2.6 wants a limit
    # Two images: an example of one would fix the batch size.
    return torch.export.export(model.eval(), (torch.zeros(2, 3, *input_size),), dynamic_shapes=(batch,))


def save(
    program: torch.export.ExportedProgram, file: Path, class_names: Sequence[str] = ()
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Write the program by the file's suffix; returns what the file computes.

    The class names go in as JSON: in a .pt2 as the extra file `class_names`, in an .onnx as metadata of that name.

    Raises:
        UserError: another suffix, or packages that are not installed.
    """
    names = json.dumps(list(class_names))
    if file.suffix == ".pt2":
        content = io.BytesIO()  # torch aborts on a path that is not UTF-8
        torch.export.save(program, content, extra_files={"class_names": names})
        file.write_bytes(content.getvalue())
        return torch.export.load(io.BytesIO(file.read_bytes())).module()
    if file.suffix != ".onnx":
        raise UserError(f"--output {file}: name it .onnx or .pt2")
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise UserError(f"--output {file}: {error.name} is missing; pip install onnx onnxscript onnxruntime") from None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.onnx.export(program, (), file, input_names=["images"], output_names=["logits"], dynamo=True, verbose=False,
                      external_data=False)  # fmt: skip
    written = onnx.load(file)
    onnx.helper.set_model_props(written, {"class_names": names})
    onnx.save(written, file)
    # From memory: as a path it takes no name that is not UTF-8.
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


@torch.no_grad()
def difference(
    model: nn.Module, exported: Callable[[torch.Tensor], torch.Tensor], input_size: tuple[int, int]
) -> float:
    """Largest difference of a logit between the two, for 1 and 3 images of noise, in parts of the largest logit.

    NaN if any logit is.
    """
    generator, parts = torch.Generator().manual_seed(0), []
    for batch in (1, 3):
        images = torch.randn(batch, 3, *input_size, generator=generator)
        expected = model(images)
        largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)  # a head may be all zero
        parts.append((exported(images) - expected).abs().max() / largest)
    return torch.stack(parts).max().item()  # Python's max would lose a NaN


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.get_parser("export", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="file to write, .onnx or .pt2")
    with command.errors_in_a_line("export"):
        own, run, weights, about = command.parse(parser, argv)
        input_size = run.input_size[0], run.input_size[-1]
        model = command.load_model(run, weights, own.resume, torch.device("cpu"))
        own.output.parent.mkdir(parents=True, exist_ok=True)
        exported = save(export(model, input_size), own.output, class_names_of(about))
        worst = difference(model, exported, input_size)
        if not worst <= TOLERANCE:  # NaN is no agreement
            raise UserError(f"--output {own.output}: its logits differ by {worst:.1e} of the largest; do not use it")
        print(f"{own.output}: {own.output.stat().st_size / 2**20:.1f} MiB, logits within {worst:.1e} of the largest")


if __name__ == "__main__":
    main()
