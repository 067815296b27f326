"""Dropout in training, from recorded activations: what is dropped, how much, and how the rest is scaled.

What was dropped is 0 behind a ResBlock's second GroupNorm, and is not without dropout.
Shapes: N images, C channels, H x W pixels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ddpm_fast.checks.chance import most_by_chance
from ddpm_fast.checks.recording import Call, TrainingStep
from ddpm_fast.checks.results import CheckResult, judged
from ddpm_fast.constants import Stream, drop_threshold
from ddpm_fast.diffusion.noise import NoiseAddress, random_words_below

SCALE_BOUND = 1e-3
NORM, BLOCKS, TRAINER = (f"ddpm_fast/{name}.py" for name in ("ops/reference", "model/blocks", "engine/trainer"))

Masks = dict[tuple[int, str], Tensor]
"""By the step's number and the layer: as `dropped` returns them, of the whole batch."""


class KeptAsRecorded(nn.Dropout):
    """The textbook's dropout of what the engine dropped, scaled as the engine did."""

    def __init__(self, calls: list[Call]) -> None:
        """Take the engine's calls of the norm before it."""
        super().__init__()
        self.factor = torch.cat([factor(call) for call in calls]) if calls else None

    def forward(self, input: Tensor) -> Tensor:
        return input if self.factor is None or self.factor.shape != input.shape else input * self.factor.to(input.dtype)


def dropped(call: Call) -> Tensor:
    """Return what a call dropped: [N, C, H, W], 1 where it did, 0 where not, NaN where there was nothing to drop."""
    if call.undropped is None:
        return torch.zeros_like(call.returned)
    return torch.where(call.undropped == 0, torch.nan, (call.returned == 0).float())


def scale_of(call: Call) -> float | None:
    """Return by what a call multiplied what it kept, or nothing if it kept nothing.

    It is the median, since rounding makes it no one number.
    """
    if call.undropped is None:
        return 1.0
    kept = (call.returned != 0) & (call.undropped != 0)
    return float((call.returned[kept].double() / call.undropped[kept].double()).median()) if kept.any() else None


def factor(call: Call) -> Tensor:
    """Return what a call multiplied by: 0 where it dropped: [N, C, H, W] float64."""
    return (dropped(call) != 1).double() * (scale_of(call) or 1.0)


def check_dropout(steps: list[TrainingStep], fused: bool) -> Iterator[CheckResult]:
    """Check dropout's share, that no two masks are alike, and the scale of what is kept."""
    p, file = steps[0].config.unet.dropout, "kernels/group_norm_silu.py" if fused else NORM
    calls = {
        (step.number, name): found
        for step in steps
        for name, found in step.modules.items()
        if name.endswith("norm2") and found
    }
    masks = {key: torch.cat([dropped(call) for call in found]) for key, found in calls.items()}
    if not masks:
        return
    n = sum(int((~mask.isnan()).sum()) for mask in masks.values())
    share = sum(float(mask.nansum()) for mask in masks.values()) / n
    by_examples = {tuple(step.joined("q_sample", "sample_index").tolist()): step.number for step in steps}
    others = by_examples.values()  # steps of the same examples, which would be a fault of their own, drop the same
    alike = _most_alike({key: mask for key, mask in masks.items() if key[0] in others}, share) if p else ""
    independent = n if not alike else min(mask[0].numel() for mask in masks.values())
    most = most_by_chance(independent * p * (1 - p), max(p, 1 - p)) if p else 0.0
    right, file = abs(share - p) * independent <= most, f"{file} or {BLOCKS}"
    expected = f"{p:.1%} of what is behind norm2" if p else "nothing"
    yield CheckResult("dropout", "dropout drops its share", judged(right), expected, f"{share:.2%}", file)
    if p == 0:
        return
    found = "so" if alike else next((words for step in steps if (words := _elsewhere(step, p))), "so")
    name, expected = "dropout drops by its seed, example, layer and pixel", "the places of these addresses"
    yield CheckResult("dropout", name, judged(found == "so"), expected, found, f"{file} or {TRAINER}")
    name, found = "dropout drops other places in every layer, example and step", alike or "all differ"
    yield CheckResult("dropout", name, judged(not alike), "no two masks alike", found, file)
    scales = [scale for found in calls.values() for call in found if (scale := scale_of(call)) is not None]
    worst = max(scales, key=lambda scale: abs(scale * (1 - p) - 1), default=1 / (1 - p))
    right = abs(worst * (1 - p) - 1) < SCALE_BOUND or share == 0
    name, expected = "what dropout keeps is divided by 1 - p", f"times {1 / (1 - p):.4f}"
    yield CheckResult("dropout", name, judged(right), expected, f"times {worst:.4f}", file)


def _elsewhere(step: TrainingStep, p: float) -> str:
    """Say in which layer other places are dropped than the address's, or nothing; four channels are looked at."""
    address = NoiseAddress(step.ops["q_sample"][0].given["key"], step.joined("q_sample", "sample_index"))
    layers = [(name, calls) for name, calls in step.modules.items() if name.endswith("norm2") and calls]
    for number, (name, calls) in enumerate(layers):  # as they were called: in forward order
        mask = torch.cat([dropped(call)[:, :4] for call in calls])
        shape = (mask.shape[1], mask.shape[2], mask.shape[3])
        places = random_words_below(address, number, Stream.DROPOUT, shape, drop_threshold(p))
        if not bool(((mask == places) | mask.isnan()).all()):
            return f"others in {name} in step {step.number}"
    return ""


def _most_alike(masks: Masks, p: float) -> str:
    """Return which masks go together, or nothing: how far each is from p is multiplied and added up.

    Examples are compared with the one before and with the one behind, so that no pair shares an example with another.
    """
    values, layers = list(masks.items()), {}
    pairs: list[tuple[str, Tensor, Tensor]] = []
    for (number, name), mask in values:
        pairs += [(f"examples of {name}", mask[i + 1 :: 2], mask[i:-1:2]) for i in (0, 1) if len(mask) > i + 1]
        if (number, mask.shape) in layers:
            before, other = layers[number, mask.shape]
            pairs.append((f"{before} and {name}", other, mask))
        layers[number, mask.shape] = (name, mask)
        pairs += [(f"{name} in steps {number} and {n}", mask, m) for (n, o), m in values if o == name and n > number]
    for words, one, other in pairs:
        both = ~(one + other).isnan()
        a, b = one[both].double(), other[both].double()
        if abs(float(((a - p) * (b - p)).sum())) > most_by_chance(len(a) * (p * (1 - p)) ** 2, max(p, 1 - p) ** 2):
            usual = p**2 + (1 - p) ** 2
            return f"{words} agree in {float((a == b).double().mean()):.0%} of all places, not {usual:.0%}"
    return ""
