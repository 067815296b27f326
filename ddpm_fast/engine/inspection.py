"""What each layer of a network returns, looked at while a batch passes through it eagerly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

X_T = "x_t"
"""The name of what a network reads."""

Look = Callable[[str, Tensor], None]
"""Called with a layer's name and what it returns."""


@contextmanager
def watched(network: nn.Module, look: Look) -> Iterator[None]:
    """Look at what a network reads, as X_T, and at what its layers return, in the order in which they do."""

    def read(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        look(X_T, inputs[0])

    hooks = [network.register_forward_pre_hook(read)]
    for name, module in network.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            hooks.append(module.register_forward_hook(_hook(name, look)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(name: str, look: Look) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor | tuple[Tensor, ...]], None]:
    def returned(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        for one in output if isinstance(output, tuple) else (output,):
            look(name, one)

    return returned


class FirstNotFinite:
    """Remembers the first tensor with a value that is not finite."""

    def __init__(self) -> None:
        self.name = ""

    def look(self, name: str, values: Tensor) -> None:
        """Look at a layer's output."""
        if not self.name and not torch.isfinite(values).all():
            self.name = name


class Largest:
    """Remembers where the largest magnitude is, without waiting for the device before it is asked."""

    def __init__(self) -> None:
        self._names, self._magnitudes = list[str](), list[Tensor]()

    def look(self, name: str, values: Tensor) -> None:
        """Look at a layer's output."""
        self._names.append(name)
        self._magnitudes.append(values.detach().abs().amax().float())

    def found(self) -> tuple[str, float]:
        """Return the layer of the largest magnitude seen, and that."""
        magnitudes = torch.stack(self._magnitudes).cpu()
        where = int(magnitudes.argmax())
        return self._names[where], float(magnitudes[where])
