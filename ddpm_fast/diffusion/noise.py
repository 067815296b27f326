"""Addressable randomness: every random number is a pure function of where it is used.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a 64-bit key (the
seed) and a 128-bit counter (the address) into four 32-bit words:

    c0  pixel index h * W + w
    c1  sample index: the number of the image, or of the training example since the run began
    c2  step: 0 for x_T, k for the noise of the k-th update; in training 0, for dropout the layer's number
    c3  stream + 256 * (channel // 4); the four words are channels 4j .. 4j + 3

So the noise does not depend on batch size, layout, device count or history, and nothing needs saving.
Words are int64 holding 0 .. 2**32 - 1, since PyTorch has no full set of uint32 operations.
Shapes: N images, C channels, H x W pixels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.constants import CHANNEL_STEP, Stream, drop_threshold

MASK = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1, as 32-bit fractions


class NoiseAddress(NamedTuple):
    """Where a batch's random numbers live; device tensors, so that a captured graph can change them."""

    key: Tensor  # [2] int64 words, low then high, of the seed
    sample_index: Tensor  # [N] int64 numbers of the images or training examples


def key_from_seed(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Split a seed in 0..2**64-1 into Philox's key: [2] int64 words, low then high."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} lies outside 0..2**64-1")
    return torch.tensor([seed & MASK, seed >> 32], dtype=torch.int64, device=device)


def _multiply_high_low(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low words of a 32 x 32 bit product; int64 wraps, but its bits stay right."""
    if torch.compiler.is_compiling():
        # For a CPU this becomes C++, where an int64 that wraps is undefined: GCC then drops the mask, and words are
        # wrong. So no product here exceeds 48 bits.
        low, high = word * (factor & 0xFFFF), word * (factor >> 16)
        return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & MASK
    product = word * factor
    return (product >> 32) & MASK, product & MASK


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox4x32-10 (Salmon et al. 2011).

    Args:
        counter: four int64 tensors of words, of shapes that broadcast together.
        key: [2] int64 words.

    Returns:
        Four int64 tensors of words, of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key[0], key[1]
    for _ in range(ROUNDS):
        high0, low0 = _multiply_high_low(MULTIPLIERS[0], c0)
        high1, low1 = _multiply_high_low(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK, (k1 + KEY_INCREMENTS[1]) & MASK
    return c0, c1, c2, c3


def uniform(words: Tensor) -> Tensor:
    """Map words to float32 in (0, 1]; words from 0xffffff80 up give 1.0 exactly."""
    return words.to(torch.float32) * 2.0**-32 + 2.0**-33


def integer_below(words: Tensor, n: int) -> Tensor:
    """Map words to integers in 0..n-1 as (word * n) >> 32, never through a float; n at most 2**31."""
    return (words * n) >> 32


def box_muller(words0: Tensor, words1: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Turn two words into two independent normals (Box and Muller 1958), computed in `dtype`."""
    u1, u2 = uniform(words0).to(dtype), uniform(words1).to(dtype)
    radius, angle = torch.sqrt(-2.0 * torch.log(u1)), (2.0 * math.pi) * u2
    return radius * torch.cos(angle), radius * torch.sin(angle)


def pixel_words(address: NoiseAddress, step: Tensor | int, stream: Stream, shape: tuple[int, int, int]) -> Tensor:
    """Return the words at every channel and pixel of N images.

    Args:
        address: key and [N] sample indices.
        step: the counter's c2; [1] int64 tensor or int.
        stream: what the numbers are for.
        shape: C, H, W.

    Returns:
        [4, N, ceil(C / 4), H * W] int64: word i of group j belongs to channel 4j + i.
    """
    channels, height, width = shape
    key, sample_index = address
    c0 = torch.arange(height * width, device=sample_index.device).view(1, 1, -1)
    c1 = (sample_index & MASK).view(-1, 1, 1)
    # Fill on the device: a host-to-device copy would synchronise, which is illegal during graph capture.
    c2 = step if isinstance(step, Tensor) else torch.full((1,), step, dtype=torch.int64, device=sample_index.device)
    c2 = c2.view(1, 1, 1)
    c3 = (int(stream) + CHANNEL_STEP * torch.arange((channels + 3) // 4, device=sample_index.device)).view(1, -1, 1)
    return torch.stack(philox((c0, c1, c2, c3), key))


def _channels_first(by_word: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Rearrange [4, N, J, H * W] into [N, C, H, W], leaving out the words past the last channel."""
    _, images, groups, _ = by_word.shape
    channels, height, width = shape
    return by_word.permute(1, 2, 0, 3).reshape(images, groups * 4, height, width)[:, :channels]


def normal(
    address: NoiseAddress,
    step: Tensor | int,
    stream: Stream,
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return standard normal noise [N, C, H, W] in `dtype`; arguments as for `pixel_words`."""
    words = pixel_words(address, step, stream, shape)
    pairs = (*box_muller(words[0], words[1], dtype), *box_muller(words[2], words[3], dtype))
    return _channels_first(torch.stack(pairs), shape)


def random_words_below(
    address: NoiseAddress, step: Tensor | int, stream: Stream, shape: tuple[int, int, int], threshold: int
) -> Tensor:
    """Return [N, C, H, W] bool: is the word below `threshold`, i.e. an event of probability threshold / 2**32."""
    return _channels_first(pixel_words(address, step, stream, shape) < threshold, shape)


def example_word(address: NoiseAddress, stream: Stream) -> Tensor:
    """Return [N] int64: the first word at pixel 0, step 0 of each sample."""
    zero = torch.zeros_like(address.sample_index)
    return philox((zero, address.sample_index & MASK, zero, zero + int(stream)), address.key)[0]


def random_timesteps(address: NoiseAddress, total: int, thresholds: Tensor | None = None) -> Tensor:
    """Draw t from 0..total-1 for each training example: [N] int64.

    Args:
        address: of the examples.
        total: timesteps.
        thresholds: words from which on t is one more, [total - 1] int64 ascending; None: uniform.
    """
    word = example_word(address, Stream.TIMESTEP)
    return integer_below(word, total) if thresholds is None else torch.bucketize(word, thresholds, right=True)


def random_flips(address: NoiseAddress) -> Tensor:
    """Decide with probability 1/2 for each training example whether it is mirrored: [N] bool."""
    return example_word(address, Stream.FLIP) >= 2**31


def random_label_drops(address: NoiseAddress, probability: float) -> Tensor:
    """Decide with that probability for each training example whether its label is withheld: [N] bool."""
    return example_word(address, Stream.LABEL) < drop_threshold(probability)


def permutation(key: Tensor, epoch: int, n: int) -> Tensor:
    """Return the order in which an epoch visits n examples: a permutation [n] int64, on the key's device.

    Positions are sorted by 63 random bits each (the first two words at c0 = position, c1 = epoch), ties by
    position: a pure function of (seed, epoch, n).
    """
    position = torch.arange(n, device=key.device)
    zero = torch.zeros_like(position)
    words = philox((position, zero + epoch, zero, zero + int(Stream.DATA_ORDER)), key)
    return torch.argsort((words[0] << 31) | (words[1] >> 1), stable=True)
