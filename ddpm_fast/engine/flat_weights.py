"""All that training moves, side by side in memory, so that one op updates it in one pass (`reference.adam_ema`).

A U-Net has hundreds of parameters, most of them tiny: one by one, launches would cost more than bytes. So weights,
their average, Adam's moments and gradients are one tensor each, of which all that has a name, in the U-Net as in a
checkpoint, is a view. P numbers lie there: those of all parameters, and zeros up to where the next one begins.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from ddpm_fast.config import TrainingConfig
from ddpm_fast.constants import STEP_FIGURE, STEP_NUMBER, StepFigures, StepNumbers
from ddpm_fast.model.blocks import Attention
from ddpm_fast.model.unet import UNet

ALIGNMENT = 64
"""Parameters begin at multiples of so many numbers: 128 bytes in bfloat16, a line of the cache."""

Parts = Mapping[str, Mapping[str, Tensor]]
"""A checkpoint's tensors by part, "model", "ema" or "optimizer", and name."""


JOINED = ("to_q", "to_k", "to_v")
"""Layers of an attention whose weights lie one behind the other, and whose biases do: they are one product."""


def places(parameters: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """Return where each parameter begins, by name, and P, where the last one's place ends."""
    starts, end = dict[str, int](), 0
    for name in parameters:
        layer, _, kind = name.rpartition(".")
        attention, _, part = layer.rpartition(".")
        together = [f"{attention}.{one}.{kind}" for one in JOINED] if part in JOINED else [name]
        for one in together:
            if one not in starts:
                starts[one] = end
                end += -(-parameters[one].numel() // ALIGNMENT) * ALIGNMENT
    return starts, end


class FlatWeights:
    """A U-Net's weights, their average, Adam's moments and the gradients, each one tensor [P]."""

    def __init__(self, unet: UNet, dtype: torch.dtype) -> None:
        """Move a U-Net's parameters into one tensor, where they keep their values and their layout.

        Args:
            unet: on its device, in float32.
            dtype: of its arithmetic. If that is not float32, `network` is a copy that computes in it.
        """
        self.parameters, device = dict(unet.named_parameters()), unet.conv_in.weight.device
        self._starts, size = places(self.parameters)
        self.weights, self.exp_avg, self.exp_avg_sq, self.gradient = (
            torch.zeros(size, device=device) for _ in range(4)
        )
        for name, place in self.named(self.weights).items():
            self.parameters[name].data = place.copy_(self.parameters[name].data)
        self.ema = self.weights.clone()
        self.numbers = torch.tensor(StepNumbers(step=0, updates=0, bad_step=-1, loss_steps=0), device=device)
        self.figures = torch.zeros(len(StepFigures._fields), device=device)
        self.low_precision = None if dtype == torch.float32 else self.weights.to(dtype)
        self.network = unet if self.low_precision is None else self._copy_in(self.low_precision, unet)
        self.gradients = self.named(self.gradient)
        self._computing = dict(self.network.named_parameters())
        self._places = dict(self.gradients)
        for attention, layer in self._joined(self.gradient).items():
            self._places |= {f"{attention}.joined.{kind}": place for kind, place in layer.items()}

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Return a tensor [P] as parameters: views by their names."""
        return {
            name: flat.as_strided(parameter.shape, parameter.stride(), self._starts[name])
            for name, parameter in self.parameters.items()
        }

    def _copy_in(self, low_precision: Tensor, unet: UNet) -> UNet:
        """Return the U-Net with what may be in low precision there; the rest of its parameters it shares."""
        low = unet.low_precision_parameters()
        network = copy.deepcopy(unet, {id(p): p for name, p in self.parameters.items() if name not in low})
        places = self.named(low_precision)
        for name in low:
            network.get_parameter(name).data = places[name]
        for name, layer in self._joined(low_precision).items():
            attention = network.get_submodule(name)
            assert isinstance(attention, Attention)
            attention.join(**layer)
        return network

    def _joined(self, flat: Tensor) -> dict[str, dict[str, Tensor]]:
        """Return, by attention, where in a tensor [P] the weights of q, k and v lie as one [3 * C, C], and the biases.

        Attentions are left out where they do not, as `ALIGNMENT` leaves gaps, or where not all of them learn.
        """
        found = {}
        for name in [name.removesuffix(".to_q.weight") for name in self.parameters if name.endswith(".to_q.weight")]:
            parts = [self.parameters[f"{name}.{layer}.{kind}"] for layer in JOINED for kind in ("weight", "bias")]
            if all(part.numel() % ALIGNMENT == 0 and part.requires_grad for part in parts):
                starts = (self._starts[f"{name}.{JOINED[0]}.{kind}"] for kind in ("weight", "bias"))
                weight, bias = (flat[at : at + 3 * part.numel()] for at, part in zip(starts, parts[:2], strict=True))
                found[name] = {"weight": weight.view(-1, parts[0].shape[1]), "bias": bias}
        return found

    def collect_gradients(self, add: bool) -> None:
        """Move what a backward pass left in the network's parameters to `gradient`, in float32.

        Args:
            add: to what lies there, instead of in its place.
        """
        # By dtype: PyTorch copies a list in few launches if all of it has one.
        for dtype in dict.fromkeys(parameter.dtype for parameter in self._computing.values()):
            found = {name: p.grad for name, p in self._computing.items() if p.dtype == dtype and p.grad is not None}
            collect = torch._foreach_add_ if add else torch._foreach_copy_
            if found:
                collect([self._places[name] for name in found], list(found.values()))
        without = [self._places[name] for name, p in self._computing.items() if p.grad is None]
        if without and not add:  # a layer that this step left out: else the last step's gradient would count again
            torch._foreach_zero_(without)
        self.discard_gradients()

    def discard_gradients(self) -> None:
        """Forget what a backward pass left in the network's parameters."""
        for parameter in self._computing.values():
            parameter.grad = None

    def update(self, loss: Tensor, training: TrainingConfig) -> None:
        """Take the step that `gradient` and the step's loss ask for, unless one is not finite or ever was."""
        self.network.ops.adam_ema(
            self.weights,
            self.exp_avg,
            self.exp_avg_sq,
            self.ema,
            self.gradient,
            loss,
            self.numbers,
            self.figures,
            self.low_precision,
            learning_rate=training.learning_rate,
            warmup_steps=training.warmup_steps,
            steps=training.steps,
            cooldown_steps=training.cooldown_steps,
            beta2=training.adam_beta2,
            clip_norm=training.clip_norm,
            ema_decay=training.ema_decay,
        )

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return all that a checkpoint needs: with the step number, the run continues bit for bit."""
        optimizer = {
            "loss_sum": self.figures[STEP_FIGURE.loss_sum],
            "loss_steps": self.numbers[STEP_NUMBER.loss_steps],
            **{f"exp_avg.{name}": place for name, place in self.named(self.exp_avg).items()},
            **{f"exp_avg_sq.{name}": place for name, place in self.named(self.exp_avg_sq).items()},
            # As PyTorch's optimizer keeps it, of each parameter.
            **{f"step.{name}": self.numbers[STEP_NUMBER.updates].float() for name in self.parameters},
        }
        return {"model": self.named(self.weights), "ema": self.named(self.ema), "optimizer": optimizer}

    @torch.no_grad()
    def load_state(self, parts: Parts) -> None:
        """Continue from a checkpoint's tensors, in the form of `state`.

        Raises:
            ValueError: a name or a shape does not fit this U-Net.
        """
        state = self.state()
        for part, tensors in state.items():
            _copy_all(part, tensors, parts[part])
        first = next(iter(self.parameters))
        self.numbers[STEP_NUMBER.updates] = state["optimizer"][f"step.{first}"].long()
        if self.low_precision is not None:
            self.low_precision.copy_(self.weights)


def _copy_all(part: str, into: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    differing = sorted(set(into) ^ set(source))
    if differing:
        raise ValueError(f"{part}: {differing[0]} and {len(differing) - 1} more names are on one side only")
    for name, tensor in into.items():
        if tensor.shape != source[name].shape:
            raise ValueError(f"{part}: {name} is {tuple(source[name].shape)}, not {tuple(tensor.shape)}")
        tensor.copy_(source[name])
