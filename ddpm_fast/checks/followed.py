"""The textbook's U-Net, run along what the engine's was recorded doing.

Its blocks are given what the engine's blocks were given, and each result is replaced by the engine's, so that a fault
shows where it is and is not carried on. A result keeps its own gradient, so that one backward pass through the textbook
is right at the engine's values. Shapes: N images, C channels, H x W pixels.
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast import textbook
from ddpm_fast.checks.dropout import KeptAsRecorded
from ddpm_fast.checks.recording import TrainingStep, distance
from ddpm_fast.config import UNetConfig

ENDS = ("", "time_embedding", "conv_in", "conv_norm_out", "conv_out")
FLOAT32 = torch.finfo(torch.float32).eps
BLOCK_BOUND = 512 * FLOAT32
"""Relative: blocks were 5e-7 off, by rounding, in all presets on a CPU; a GPU's Winograd convolutions round coarser."""
ROUNDINGS = 16
"""How many times the textbook's own rounding in float32 the engine's may be, which computes in another order."""


class Difference(NamedTuple):
    """How far one side of a block is from the textbook's, relative to its size."""

    block: str
    side: str
    distance: float
    bound: float


@cache
def watched_modules(config: UNetConfig) -> tuple[str, ...]:
    """Return the names of the modules whose calls are to be recorded."""
    with torch.device("meta"):
        modules = textbook.UNet(config).named_modules()
    return tuple(name for name, module in modules if _is_block(name, module) or isinstance(module, nn.GroupNorm))


def _is_block(name: str, module: nn.Module) -> bool:
    resizes = name.endswith(("downsamplers.0", "upsamplers.0"))
    return name in ENDS or resizes or isinstance(module, textbook.ResBlock | textbook.Attention)


def textbook_unet(
    config: UNetConfig, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float64
) -> textbook.UNet:
    """Return the textbook's U-Net with these weights.

    Raises:
        RuntimeError: it has other parameters.
    """
    with torch.device("meta"):
        unet = textbook.UNet(config)
    unet.load_state_dict({name: weight.detach().to(dtype) for name, weight in weights.items()}, assign=True)
    return unet


class FollowedUNet:
    """The textbook's U-Net with the engine's weights, each block of which is given what the engine's was."""

    def __init__(self, step: TrainingStep, dtype: torch.dtype = torch.float64) -> None:
        """Take over the weights.

        Raises:
            RuntimeError: the engine's U-Net has other parameters.
        """
        self.step, self.dtype, self.differences = step, dtype, list[Difference]()
        self.outputs: dict[str, Tensor] = {}
        self.sinusoids = torch.empty(0)
        self.unet = textbook_unet(step.config.unet, step.before["model"], dtype)
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_(name in step.gradients)
        for name, module in self.unet.named_modules():
            if isinstance(module, textbook.ResBlock):
                module.dropout = KeptAsRecorded(step.modules[f"{name}.norm2"])
            if name and _is_block(name, module):
                module.register_forward_pre_hook(partial(self._compare_input, name))
            if _is_block(name, module):
                module.register_forward_hook(partial(self._compare_output, name))

    def run(self) -> Tensor:
        """Predict what the engine predicted: [N, C, H, W]."""
        x_t = (
            self.step.told(0, "x").to(self.dtype).requires_grad_()
        )  # behind a frozen layer PyTorch's GroupNorm needs this
        return self.unet(x_t, self.step.told(1, "t"), self._labels())

    def _labels(self) -> Tensor | None:
        """Return the labels that the network was told, [N], if it knows classes."""
        return self.step.told(3, "labels") if self.unet.class_embedding is not None else None

    def gradients(self) -> dict[str, Tensor]:
        """Run, and return each parameter's gradient, given the engine's of the prediction."""
        gradient = torch.cat(self.step.prediction_gradients).to(self.dtype)
        (self.run() * gradient).sum().backward()  # not `backward(gradient)`, for which PyTorch imports SymPy
        return {name: p.grad for name, p in self.unet.named_parameters() if p.grad is not None}

    def differing(self) -> list[Difference]:
        """Return the sides of blocks that are not the textbook's, in forward order.

        A block in which rounding grows, as in a norm of two equal numbers, is held to what float32 does there.
        """
        beyond = [difference for difference in self.differences if not difference.distance <= difference.bound]
        if not beyond:
            return []
        rounded = FollowedUNet(self.step, torch.float32)
        rounded.run()
        return [
            difference
            for difference in beyond
            if difference.side != "output"
            or difference.distance
            > difference.bound + ROUNDINGS * distance(rounded.outputs[difference.block], self.outputs[difference.block])
        ]

    def sinusoids_are_off(self) -> bool:
        """Return whether the op itself is wrong, for the t that the network was given."""
        told, t = self.step.joined("timestep_embedding", "t"), self.step.told(1, "t")
        return torch.equal(told, t) and distance(self.step.returned("timestep_embedding"), self.sinusoids) > 1e-3

    def shift_is_off(self, name: str) -> bool:
        """Return whether what a ResBlock is told of the timestep differs: the projection, and conv1's bias."""
        block, embedding = self.unet.get_submodule(name), self.step.output("time_embedding")
        shifts = [call.vectors() for call in self.step.modules[name]]
        if not isinstance(block, textbook.ResBlock) or embedding is None or not all(shifts):
            return False
        embedding = embedding.to(self.dtype)
        if self.unet.class_embedding is not None:
            embedding = embedding + self.unet.class_embedding(self._labels())
        expected = block.time_emb_proj(F.silu(embedding)) + block.conv1.bias
        return distance(torch.cat([vectors[0] for vectors in shifts]), expected) > BLOCK_BOUND

    def _compare_input(self, name: str, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        theirs, own = self.step.input(name), given[0]
        if theirs is None:
            self.differences.append(Difference(name, "call", float("inf"), 0.0))
            return None
        # Sinusoids: an angle of up to T is rounded to eps(float32) of itself.
        bound = FLOAT32 * self.step.config.diffusion.timesteps if name == "time_embedding" else 0.0
        self.sinusoids = own if name == "time_embedding" else self.sinusoids
        self.differences.append(Difference(name, "input", distance(theirs, own), bound + BLOCK_BOUND))
        return (_with_value(own, theirs), *given[1:])

    def _compare_output(self, name: str, module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        theirs = self.step.output(name)
        if name == "conv_norm_out" or theirs is None:  # the engine's ends in SiLU: to be seen at conv_out's input
            return output
        self.outputs[name] = output.detach()
        self.differences.append(Difference(name, "output", distance(theirs, output), BLOCK_BOUND))
        return _with_value(output, theirs)


def _with_value(own: Tensor, value: Tensor) -> Tensor:
    """Return the value with own's gradient, or own where the shapes differ."""
    return own + (value - own).detach() if value.shape == own.shape else own
