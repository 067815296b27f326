"""Is what is random what it claims to be? Judged on the numbers that training and sampling really draw (`draws`).

Shapes: N examples or images, C = 4 channels, H x W pixels, T timesteps, S sampling steps.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm_fast import textbook
from ddpm_fast.checks.chance import (
    MOST_REPEATED,
    classes_of_integers,
    classes_of_normal,
    likely,
    of_counts,
    of_independence,
    of_normal,
    share_repeated,
    shares_of_integers,
)
from ddpm_fast.checks.draws import CHANNELS, IMAGE, OTHER_SEEDS, SamplingProbe, TrainingDraws, TrainingProbe
from ddpm_fast.checks.results import CheckResult, judged
from ddpm_fast.config import Config
from ddpm_fast.constants import Stream
from ddpm_fast.diffusion import noise

PIXELS = {False: 2**13, True: 2**18}
"""Pixels of noise that are drawn, in the quick part and in full."""
DRAWS_PER_TIMESTEP = 24
"""Then a given t is missed once in exp(24), or 3e10."""
LEAST_EXAMPLES, MOST_EXAMPLES = 2**12, 2**19
NOISE, REFERENCE = "ddpm_fast/diffusion/noise.py", "ddpm_fast/ops/reference.py"
SAMPLING, BOTH = "ddpm_fast/engine/sampling.py", "ddpm_fast/engine/sampling.py or ddpm_fast/ops/reference.py"

KNOWN_WORDS = {
    (0, 0, 0, 0, 0, 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    (0xFFFFFFFF,) * 6: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0): (
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ),
}
"""Philox4x32-10's known answers (Random123's kat_vectors): counter and key to words."""


def check_randomness(config: Config, device: torch.device, full: bool = False) -> Iterator[CheckResult]:
    """Check everything random but the order of the data (`examples`), initial weights and dropout.

    Args:
        config: the run's, with a network as small as can be.
        device: to draw on, with the ops that the run uses there.
        full: draw 32 times as many numbers.
    """
    yield check_philox(device)
    yield check_extremes(device)
    yield check_every_bit(device)
    size = (config.unet.height, config.unet.width)
    count = max(4, PIXELS[full] // (size[0] * size[1]) // 4 * 4)  # two batches, and half as many again
    probes = {more: TrainingProbe(config, device, more) for more in (0, *OTHER_SEEDS)}
    sampler = SamplingProbe(config, device)
    few = {more: probe.draw((1, 1), LEAST_EXAMPLES if more else _examples(config)) for more, probe in probes.items()}
    trained = {more: probe.draw(size, count) for more, probe in probes.items()}
    sampled = {more: sampler.draw(count, more) for more in probes}
    half = count // 2
    yield _check_addresses(probes[0].draw(size, half), sampler.draw(half), trained[0], sampled[0])
    yield check_timesteps(config, few)
    yield from check_flips(config, few)
    yield _check_flips_of_noise(probes[0])
    yield from check_training_noise(config, trained, few[0])
    yield from check_sampling_noise(sampled, trained[0].eps)


def check_philox(device: torch.device) -> CheckResult:
    """Check the generator against Random123's known answers."""
    right = 0
    for (*counter, key0, key1), words in KNOWN_WORDS.items():
        c0, c1, c2, c3 = (torch.tensor([word], device=device) for word in counter)
        found = noise.philox((c0, c1, c2, c3), torch.tensor([key0, key1], device=device))
        right += tuple(int(word) for word in found) == words
    name, expected = "Philox4x32-10 gives Random123's known answers", f"{len(KNOWN_WORDS)} of {len(KNOWN_WORDS)}"
    return CheckResult(
        "noise", name, judged(right == len(KNOWN_WORDS)), expected, f"{right} of {len(KNOWN_WORDS)}", NOISE
    )


def check_extremes(device: torch.device) -> CheckResult:
    """Check what becomes of the smallest and the largest word, which no test ever draws."""
    words = torch.tensor([0, 2**32 - 1], device=device)
    z = torch.stack([part for other in words for part in noise.box_muller(words, other.expand(2))])
    right, found = bool(z.isfinite().all()) and float(z.abs().max()) < 8, f"up to {float(z.abs().max()):.3g}"
    name = "the rarest words give numbers"
    return CheckResult("noise", name, judged(right), "normals below 8 in size", found, NOISE)


def check_every_bit(device: torch.device) -> CheckResult:
    """Check that each bit of an address makes another number, also bits that no check draws, and the pixels' order."""
    address = noise.NoiseAddress(*torch.zeros(2, 2, dtype=torch.int64, device=device))
    address = address._replace(sample_index=torch.tensor([0, *(1 << bit for bit in range(32))], device=device))
    steps = torch.tensor([0, *(1 << bit for bit in range(0, 30, 3))], device=device)

    def draw(step: Tensor, stream: Stream, height: int, width: int) -> Tensor:
        return noise.normal(address, step, stream, (2 * CHANNELS, height, width), torch.float64)

    drawn = torch.stack([draw(step, Stream.SAMPLING, 2, 3) for step in steps] + [draw(steps[0], Stream.TRAINING, 2, 3)])
    words = torch.stack(
        [noise.example_word(address, stream) for stream in (Stream.TIMESTEP, Stream.FLIP, Stream.LABEL)]
    )
    keys = torch.stack([noise.key_from_seed(seed) for seed in (0, *(1 << bit for bit in range(64)))])
    in_one_row = draw(steps[0], Stream.TRAINING, 1, 6).reshape(-1, 2 * CHANNELS, 2, 3)
    wrong = {
        "pixels are not numbered row by row": not torch.equal(drawn[-1], in_one_row),
        "two seeds have one key": len(keys.unique(dim=0)) < len(keys),
        "two addresses have one number": len(drawn.unique()) < drawn.numel(),
        "two examples have one word": len(words.unique()) < words.numel(),
    }
    name, expected = "each bit of an address counts", "other numbers by each"
    found = next((fault for fault, is_so in wrong.items() if is_so), expected)
    return CheckResult("noise", name, judged(found == expected), expected, found, NOISE)


def _examples(config: Config) -> int:
    return min(MOST_EXAMPLES, max(LEAST_EXAMPLES, DRAWS_PER_TIMESTEP * config.diffusion.timesteps))


def _name(more_seed: int) -> str:
    return f"two seeds, {more_seed} apart"


def _is_uniform(config: Config) -> bool:
    return config.training.timestep_density == "uniform" or config.diffusion.timesteps == 1


def _shares_of_t(config: Config) -> Tensor:
    """Return how likely each class of t is."""
    shares = None if _is_uniform(config) else textbook.laplace_shares(config.diffusion)
    return shares_of_integers(config.diffusion.timesteps, shares)


def check_timesteps(config: Config, draws: dict[int, TrainingDraws]) -> CheckResult:
    """Check that t is from exactly 0..T-1, as often as configured, and independent over examples and seeds."""
    total, t = config.diffusion.timesteps, draws[0].t
    uniform = _is_uniform(config)
    density = "uniform" if uniform else "Laplace's"
    name, expected = f"t is {density} and independent", f"all of 0..{total - 1}, as often as that, in no pattern"
    rarest = noise.integer_below(torch.tensor([0, 2**32 - 1], device=t.device), total)
    low, high = min(int(t.min()), int(rarest[0])), max(int(t.max()), int(rarest[1]))
    often = uniform and len(t) >= DRAWS_PER_TIMESTEP * total
    if low < 0 or high >= total or (often and (low, high) != (0, total - 1)):
        return CheckResult("timesteps", name, judged(False), expected, f"{low}..{high}", NOISE)
    classes = {more: classes_of_integers(d.t, total) for more, d in draws.items()}
    shares = _shares_of_t(config)
    first = classes[0]
    chances = {"how often each class of t occurs": of_counts(first.bincount(minlength=len(shares)).cpu(), shares)}
    if often:
        counts = t.bincount(minlength=total).cpu()
        chances = {"how often each t occurs": of_counts(counts, torch.full((total,), 1 / total))}
    for apart in {1, 2, config.training.batch_size, config.training.batch_size // config.training.accumulate}:
        if apart < len(t) // 2:
            both = of_independence(first[apart:], first[:-apart], shares, shares)
            chances[f"the likeness of t of examples {apart} apart"] = both
    for more in OTHER_SEEDS:
        chances[f"the likeness of t of {_name(more)}"] = of_independence(
            first[:LEAST_EXAMPLES], classes[more], shares, shares
        )
    return likely("timesteps", name, expected, chances, NOISE)


def check_flips(config: Config, draws: dict[int, TrainingDraws]) -> Iterator[CheckResult]:
    """Check that images reach the network in [-1, 1], and that half of them are mirrored, if that is asked for."""
    x_start, flip, total = draws[0].x_start, config.data.flip, config.diffusion.timesteps
    image = (IMAGE.to(x_start.device).float() / 127.5 - 1)[None]
    plain, mirrored = (((x_start - each).abs() < 1e-5).all(dim=(1, 2, 3)) for each in (image, image.flip(-1)))
    name, expected = "an image reaches the network in [-1, 1]", "pixel / 127.5 - 1, each in its place"
    other = int((~(plain | mirrored)).sum())
    low, high = float(x_start.min()), float(x_start.max())
    found = f"{other} of {len(x_start)} otherwise, {low:.2f}..{high:.2f} for {image.min():.2f}..{image.max():.2f}"
    yield CheckResult("data", name, judged(not other), expected, found if other else "just that", REFERENCE)
    share = float(mirrored.float().mean())
    if not flip:
        found = f"{share:.0%}"
        yield CheckResult("flip", "no image is mirrored (--no-flip)", judged(share == 0), "none", found, REFERENCE)
        return
    halves, first = torch.tensor([0.5, 0.5]), mirrored.long()
    others = {more: ((draws[more].x_start - image.flip(-1)).abs() < 1e-5).all(dim=(1, 2, 3)) for more in OTHER_SEEDS}
    t_classes, t_shares = classes_of_integers(draws[0].t[: len(first)], total), _shares_of_t(config)
    chances = {f"{share:.1%} mirrored": of_counts(first.bincount(minlength=2).cpu(), halves)}
    chances["the likeness of one example and the next"] = of_independence(first[1:], first[:-1], halves, halves)
    chances["the likeness of flips and t"] = of_independence(first, t_classes, halves, t_shares)
    for more, those in others.items():
        chances[f"the likeness of {_name(more)}"] = of_independence(
            first[:LEAST_EXAMPLES], those.long(), halves, halves
        )
    yield likely("flip", "half of the images are mirrored", "50%, in no pattern", chances, NOISE)


def _check_flips_of_noise(probe: TrainingProbe) -> CheckResult:
    """Check that flips mirror the image and not the noise: eps is the same with and without."""
    with_flips, without = (probe.with_flip(flip).draw((2, 3), 64).eps for flip in (True, False))
    right, name = torch.equal(with_flips, without), "flips leave the noise alone"
    found = "the same eps" if right else "another eps"
    return CheckResult("flip", name, judged(right), "the same eps with and without", found, REFERENCE)


def _likenesses(classes: Tensor) -> dict[str, float]:
    """Return the chances of what neighbours in [..., N, C, H, W] tell about each other."""
    pairs = {
        f"channels {i} and {j}": (classes[..., i, :, :], classes[..., j, :, :])
        for j in range(CHANNELS)
        for i in range(j)
    }
    pairs["rows"] = classes[..., 1:, :], classes[..., :-1, :]
    pairs["columns"] = classes[..., 1:], classes[..., :-1]
    pairs["images"] = classes[..., 1:, :, :, :], classes[..., :-1, :, :, :]
    return {f"the likeness of {what}": of_independence(*both) for what, both in pairs.items() if both[0].numel()}


def _is_normal(z: Tensor, what: str, file: str) -> CheckResult:
    return likely("noise", f"{what} is N(0, 1)", "a normal distribution of mean 0 and variance 1", of_normal(z), file)


def check_training_noise(config: Config, draws: dict[int, TrainingDraws], few: TrainingDraws) -> Iterator[CheckResult]:
    """Check eps: N(0, 1), independent of everything, never drawn twice, and the same in x_t and in the loss."""
    eps, total = draws[0].eps, config.diffusion.timesteps
    repeated = share_repeated(each.eps for each in draws.values())
    name, found = "no noise in training is drawn twice", f"{repeated:.1%}"
    yield CheckResult("noise", name, judged(repeated < MOST_REPEATED), "0.0%", found, NOISE)
    yield _is_normal(eps, "the noise in training", NOISE)
    classes = {more: classes_of_normal(each.eps) for more, each in draws.items()}
    chances = _likenesses(classes[0])
    for more in OTHER_SEEDS:
        chances[f"the likeness of {_name(more)}"] = of_independence(classes[0], classes[more])
    t_classes, t_shares = classes_of_integers(few.t, total), _shares_of_t(config)
    for channel, values in enumerate(classes_of_normal(few.eps[:, :, 0, 0]).unbind(1)):
        chances[f"the likeness of t and channel {channel}"] = of_independence(t_classes, values, t_shares)
    name = "the noise in training is independent"
    yield likely("noise", name, "no pattern over pixels, channels, examples, t and seeds", chances, NOISE)
    off = float((draws[0].losses - eps.square().mean(dim=(1, 2, 3))).abs().max())
    name = "the loss sees the noise that x_t has"
    yield CheckResult("noise", name, judged(off < 1e-4), "eps of one address", f"{off:.1e} off", REFERENCE)


def check_sampling_noise(sampled: dict[int, Tensor], training: Tensor) -> Iterator[CheckResult]:
    """Check x_T and each step's noise: N(0, 1), independent of everything, never drawn twice."""
    z = sampled[0]
    repeated = share_repeated([*sampled.values(), training])
    name, expected = "no noise in sampling is drawn twice", "0.0%, nor training's again"
    yield CheckResult("noise", name, judged(repeated < MOST_REPEATED), expected, f"{repeated:.1%}", BOTH)
    yield _is_normal(z[0], "x_T", SAMPLING)
    yield _is_normal(z[1:], "the noise of each sampling step", REFERENCE)
    classes = {more: classes_of_normal(each) for more, each in sampled.items()}
    chances = _likenesses(classes[0])
    pairs = {f"x_T and step {step}'s noise": (classes[0][0], classes[0][step]) for step in range(1, len(z))}
    pairs["one step's noise and the next"] = classes[0][2:], classes[0][1:-1]
    pairs |= {_name(more): (classes[0], classes[more]) for more in OTHER_SEEDS}
    of_training = classes_of_normal(training)
    pairs |= {f"training's noise and row {k} of sampling's": (of_training, each) for k, each in enumerate(classes[0])}
    chances |= {f"the likeness of {what}": of_independence(*both) for what, both in pairs.items()}
    name = "the noise in sampling is independent"
    yield likely("noise", name, "no pattern over pixels, channels, images, steps and seeds", chances, BOTH)


def _check_addresses(again: TrainingDraws, resampled: Tensor, drawn: TrainingDraws, sampled: Tensor) -> CheckResult:
    """Check that a number follows from its address alone: drawn again, in other company, it is the same."""
    half = len(again.t)
    few = min(len(again.x_start), len(drawn.x_start))
    same = torch.equal(again.t, drawn.t[:half]) and torch.equal(again.x_start[:few], drawn.x_start[:few])
    same &= torch.equal(again.eps, drawn.eps[:half]) and torch.equal(resampled, sampled[:, :half])
    name, expected = "the same address gives the same number", "t, flips, eps, x_T and each step's noise again"
    return CheckResult("noise", name, judged(same), expected, expected if same else "other numbers", NOISE)
