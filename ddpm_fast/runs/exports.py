"""The U-Net for other programs: an ONNX file, or what torch.export saves. Any batch size, plain operators, float32.

Inputs are x_t [N, C, H, W], t [N] int64 and, of a conditional U-Net, labels [N] int64, whose number of classes is "no
label"; the output is the prediction [N, C, H, W].
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ddpm_fast.errors import InputError, MathematicsError
from ddpm_fast.files import whole
from ddpm_fast.model.forms import Forms
from ddpm_fast.model.unet import UNet

PLAIN = Forms(transposed_upsampling=False, sums_left_to_norms=False, skips_joined_by_norms=False)
"""Which form upsampling takes must not depend on the batch."""
INPUTS, OUTPUT = ("x_t", "t", "labels"), "prediction"
CLOSE = 1e-5
"""Largest difference, relative to the largest prediction, of what was written from the U-Net: other sums round so."""


class _Denoiser(nn.Module):
    """The U-Net of two inputs, or three."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.unet(x_t, t, labels=labels)


def export(unet: UNet, dest: Path) -> float:
    """Write a U-Net as .onnx or .pt2, and run what was written at another batch size.

    A .pt2 file is only written here: reading one may run code that it holds.

    Returns:
        The largest difference of its prediction from the U-Net's, relative to the largest prediction.

    Raises:
        InputError: a package that writes ONNX is missing, or the file cannot be written.
        MathematicsError: what was written predicts something else.
    """
    plain = UNet(unet.config, PLAIN)
    plain.load_state_dict(unet.state_dict())
    denoiser = _Denoiser(plain.requires_grad_(False).eval())
    batch = Dim("batch", min=1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about the exporter's own insides
        inputs = _inputs(unet, 2)
        program = torch.export.export(denoiser, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
        with whole(dest, remedy="choose another DEST") as temporary:
            write = _write_onnx if dest.suffix == ".onnx" else _write_pt2
            again = write(program, temporary, INPUTS[: len(inputs)])
            difference = _difference(denoiser, again, _inputs(unet, 3))
            if not difference <= CLOSE:
                raise MathematicsError(
                    f"the exported U-Net predicts something else, {difference:.1e} off: none is kept"
                )
    return difference


def _inputs(unet: UNet, images: int) -> tuple[Tensor, ...]:
    config, generator = unet.config, torch.Generator().manual_seed(images)
    shape = (images, config.image_channels, config.height, config.width)
    x_t, numbers = torch.randn(shape, generator=generator), torch.arange(images)
    labels = (numbers * config.classes // (images - 1),) if config.classes else ()  # from the first to "no label"
    return x_t, numbers * 400, *labels


def _difference(denoiser: nn.Module, again: Any, inputs: tuple[Tensor, ...]) -> float:
    expected = denoiser(*inputs)
    return float((again(*inputs) - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _write_pt2(program: ExportedProgram, file: Path, names: tuple[str, ...]) -> Any:
    torch.export.save(program, file)
    return program.module()


def _write_onnx(program: ExportedProgram, file: Path, names: tuple[str, ...]) -> Any:
    """Write an ONNX file; return what runs it."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # which PyTorch's exporter needs
    except ImportError as error:
        raise InputError(f"ONNX needs the package {error.name}: pip install 'ddpm-fast[onnx]'") from None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that are not needed
    torch.onnx.export(
        program, (), file, dynamo=True, input_names=names, output_names=[OUTPUT], external_data=False, verbose=False
    )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        values = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run([OUTPUT], values)[0])

    return run
