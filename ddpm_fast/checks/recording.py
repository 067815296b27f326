"""One training step as it really runs, recorded: what each function was given, what it returned, and what moved.

Nothing of the engine is replaced: its ops are wrapped where the U-Net holds them, its modules carry hooks, and weights,
moments and averages are read before and after. Shapes: N images, C channels, H x W pixels.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_fast.config import Config
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.model.unet import UNet
from ddpm_fast.ops import Ops, reference
from ddpm_fast.ops.reference import Dropout

WATCHED = ("q_sample", "noise_mse", "timestep_embedding")

State = dict[str, dict[str, Tensor]]
"""Copies by what they are ("model", "ema", "exp_avg", "exp_avg_sq") and by parameter."""


@dataclass
class Call:
    """One call of a function or module."""

    given: dict[str, Any]
    """Arguments by name; those that a module was given by position, by that."""
    returned: Tensor
    undropped: Tensor | None = None
    """What a module that was told to drop returns of the same without dropout."""

    def maps(self) -> Tensor:
        """Return the feature maps (or, if there are none, the vectors) that were given, side by side."""
        tensors = [v for v in self.given.values() if isinstance(v, Tensor) and v.is_floating_point()]
        most = max(tensor.dim() for tensor in tensors)
        return torch.cat([tensor for tensor in tensors if tensor.dim() == most], dim=1)

    def vectors(self) -> list[Tensor]:
        """Return the vectors per image that were given."""
        return [v for v in self.given.values() if isinstance(v, Tensor) and v.is_floating_point() and v.dim() == 2]


@dataclass
class TrainingStep:
    """What one step did."""

    number: int
    updates: int
    """Steps that the weights had taken before."""
    config: Config
    before: State
    after: State = field(default_factory=dict)
    batches: list[tuple[Any, ...]] = field(default_factory=list)
    """Each batch taken: first example, how many, images [N, C, H, W], sample_index [N], and any labels [N]."""
    ops: dict[str, list[Call]] = field(default_factory=partial(defaultdict, list))
    modules: dict[str, list[Call]] = field(default_factory=partial(defaultdict, list))
    """By name; the U-Net's own is empty."""
    prediction_gradients: list[Tensor] = field(default_factory=list)
    """[N, C, H, W] of the step's loss, for each call of noise_mse."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """By parameter, before they are clipped; those of frozen ones are left out."""
    loss: float = 0.0
    """What the trainer says it was."""
    next_number: int = 0
    """Of the step that the trainer would take next."""

    def pixels(self) -> Tensor:
        """Return the batch's images that q_sample was given, by their numbers: [N, C, H, W] uint8."""
        _, _, images, numbers, *_ = self.batches[0]
        used = self.joined("q_sample", "sample_index")
        return images[(used[:, None] == numbers).int().argmax(1)]

    def joined(self, op: str, argument: str) -> Tensor:
        """Return an argument of all calls of an op, one after the other, for the whole batch."""
        return torch.cat([call.given[argument] for call in self.ops[op]])

    def returned(self, op: str) -> Tensor:
        """Return what all calls of an op returned, for the whole batch."""
        return torch.cat([call.returned for call in self.ops[op]])

    def told(self, position: int, name: str) -> Tensor:
        """Return what the U-Net was given as an argument, for the whole batch."""
        calls = self.modules[""]
        return torch.cat([call.given[str(position) if str(position) in call.given else name] for call in calls])

    def input(self, module: str) -> Tensor | None:
        """Return the feature maps that a module was given for the whole batch, or nothing if it was not called."""
        calls = self.modules[module]
        return torch.cat([call.maps() for call in calls]) if calls else None

    def output(self, module: str) -> Tensor | None:
        """Return what a module returned for the whole batch, or nothing if it was not called."""
        calls = self.modules[module]
        return torch.cat([call.returned for call in calls]) if calls else None


def distance(found: Tensor, expected: Tensor) -> float:
    """Return how far a tensor is from what is expected, relative to its length; infinite if shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.detach().double(), expected.detach().double()
    off = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return off if off == off else float("inf")


def copy_of_state(trainer: Trainer) -> State:
    """Copy weights, averages and Adam's moments."""
    parts, names = trainer.state(), list(trainer.parameters)
    moments = {
        part: {name: parts["optimizer"][f"{part}.{name}"] for name in names} for part in ("exp_avg", "exp_avg_sq")
    }
    found = {"model": parts["model"], "ema": parts["ema"], **moments}
    return {part: {name: tensors[name].detach().clone() for name in names} for part, tensors in found.items()}


def put_back(trainer: Trainer, start: State) -> None:
    """Return to step 0 with the weights and averages of a state, and Adam's moments at 0."""
    moments = {name: torch.zeros_like(value) for name, value in trainer.state()["optimizer"].items()}
    trainer.load_state(0, {"model": start["model"], "ema": start["ema"], "optimizer": moments})


def record_step(trainer: Trainer, number: int, updates: int, modules: tuple[str, ...] = ()) -> TrainingStep:
    """Take the training step of that number, and record it.

    Args:
        trainer: eager; its weights move.
        number: of the step.
        updates: steps that its weights have taken before.
        modules: names of those whose calls are recorded.
    """
    trainer.step = number
    step = TrainingStep(number, updates, trainer.config, copy_of_state(trainer))
    with ExitStack() as stack:
        stack.enter_context(_recorded_batches(trainer, step))
        stack.enter_context(_recorded_ops(trainer.unet, step))
        stack.enter_context(_recorded_gradients(trainer, step))
        stack.enter_context(_recorded_modules(trainer.unet, modules, step))
        trainer.train_step_no_sync()
    step.loss, step.after, step.next_number = trainer.read_loss(), copy_of_state(trainer), trainer.step
    return step


@contextmanager
def _recorded_batches(trainer: Trainer, step: TrainingStep) -> Iterator[None]:
    batch = trainer.batch

    def recorded(first: int, n: int) -> tuple[Tensor, ...]:
        taken = batch(first, n)
        step.batches.append((first, n, *(values.clone() for values in taken)))
        return taken

    trainer.batch = recorded
    try:
        yield
    finally:
        trainer.batch = batch


@contextmanager
def _recorded_ops(unet: UNet, step: TrainingStep) -> Iterator[None]:
    ops = unet.ops
    unet.use(replace(ops, **{name: _recorded_op(name, ops, step) for name in WATCHED}))
    try:
        yield
    finally:
        unet.use(ops)


def _recorded_op(name: str, ops: Ops, step: TrainingStep) -> Callable[..., Tensor]:
    op, signature = getattr(ops, name), inspect.signature(getattr(reference, name))

    def recorded(*given: Any, **named: Any) -> Tensor:
        result = op(*given, **named)
        arguments = signature.bind(*given, **named).arguments
        detached = {key: _copied(value) for key, value in arguments.items()}  # the next step writes over its buffers
        step.ops[name].append(Call(detached, result.detach().clone()))
        if name == "noise_mse" and arguments["prediction"].requires_grad:
            number = len(step.prediction_gradients)
            step.prediction_gradients.append(torch.zeros_like(detached["prediction"]))
            arguments["prediction"].register_hook(lambda gradient: step.prediction_gradients[number].add_(gradient))
        return result

    return recorded


def _copied(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # an address in tensors
        return type(value)(*map(_copied, value))
    return value.detach().clone() if isinstance(value, Tensor) else value


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


@contextmanager
def _recorded_gradients(trainer: Trainer, step: TrainingStep) -> Iterator[None]:
    backward = trainer.backward

    def recorded() -> Tensor:
        loss = backward()
        learning = [name for name, parameter in trainer.parameters.items() if parameter.requires_grad]
        step.gradients = {name: trainer.gradients[name].clone() for name in learning}
        return loss

    trainer.backward = recorded  # hides the class's own until it is deleted
    try:
        yield
    finally:
        del trainer.backward


@contextmanager
def _recorded_modules(unet: nn.Module, names: tuple[str, ...], step: TrainingStep) -> Iterator[None]:
    waiting: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def before(name: str, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        values = {str(position): value for position, value in enumerate(given)} | named
        waiting[name].append({key: _copied(value) for key, value in values.items()})

    def after(name: str, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
        call = Call(waiting[name].pop(), _first(result).detach().clone())
        if any(isinstance(value, Dropout) for value in call.given.values()):
            plain = [None if isinstance(value, Dropout) else value for value in given]
            with torch.no_grad():  # not as a module, which would be recorded
                call.undropped = _first(
                    module.forward(*plain, **(named | {k: None for k in named if isinstance(named[k], Dropout)}))
                )
        step.modules[name].append(call)

    handles = []
    for name, module in unet.named_modules():
        if name in names:
            handles += [
                module.register_forward_pre_hook(partial(before, name), with_kwargs=True),
                module.register_forward_hook(partial(after, name), with_kwargs=True),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
