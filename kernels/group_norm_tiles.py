"""How `group_norm_silu`'s work is divided over programs, and the device functions that both passes share.

A program owns whole groups of one image: enough of them that a pixel's row of them is a multiple of 16 bytes and at
least 32 long (12 channels a group are taken in pairs: 24 of 32 lanes). `plan` chooses between
  one tile   the block fits in registers: everything is read once and written once;
  loop       it fits in L2 (128 KiB a program): read once from memory and once more from L1 or L2;
  split      it does not: one kernel gathers sums over slices of pixels, a second combines them in a fixed order and
             writes, backwards, so that it starts on what L2 still holds: everything is read twice.

Layout: tensors of images [N, C, H, W] in channels_last memory, i.e. rows of C channels, one a pixel. Offsets within an
image are 32 bits, which `checks.image_shape` makes sure of; an image's own offset is 64 bits.
Shapes: N image, C channel, H x W pixels, G group, D = C / G channels a group, S slice of pixels.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.constants import drop_threshold
from ddpm_fast.kernels import checks
from ddpm_fast.kernels.philox import CHANNEL_STEP, DROPOUT, load_key, load_word, philox4x32

REGISTER_TILE = 16384  # elements of all inputs together that a program keeps in registers
WIDE_TILE = 8192  # of them where rows may be wider than they must: 8 warps, three times a multiprocessor; 16 are alone
WARP_TILE = 1024  # of them a warp's, 32 a thread: with 64, ptxas took 130 to 240 registers, or spilt a few
LOOP_TILE_BYTES = 8 * 1024  # of all inputs together, at a time, of a program that loops: two vectors per thread
LOOP_BYTES = 128 * 1024  # what a program may read twice: four a multiprocessor then still fit in an H100's 50 MB of L2
SLICE_BYTES = 32 * 1024
ROW_BYTES = (32, 64)  # of a pixel's row in a block: at least a memory sector, and two where there is room
LARGEST_ROW = 16384  # channels of a block: one pixel of them must fit in registers


@triton.jit
def locate(SLICES: tl.constexpr, BLOCKS: tl.constexpr, REVERSE: tl.constexpr):
    """Return this program's image (64 bits), slice and block of channels; channels vary fastest."""
    program = tl.program_id(0)
    if REVERSE:
        program = tl.num_programs(0) - 1 - program
    row = program // BLOCKS
    return (row // SLICES).to(tl.int64), row % SLICES, program % BLOCKS


@triton.jit
def channel_block(
    block,
    C: tl.constexpr, G: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Return channel, whether it is real and its group's place [BLOCK_C], group and whether it is real [BLOCK_G]."""
    D: tl.constexpr = C // G
    lane, place = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_G)
    channel, group = block * (BLOCK_GROUPS * D) + lane, block * BLOCK_GROUPS + place
    real, real_group = (lane < BLOCK_GROUPS * D) & (channel < C), (place < BLOCK_GROUPS) & (group < G)
    return channel, real, lane // D, group, real_group


@triton.jit
def by_group(per_channel, place, BLOCK_G: tl.constexpr):
    """Sum [BLOCK_C] over the channels of each group: [BLOCK_G]."""
    member = place[None, :] == tl.arange(0, BLOCK_G)[:, None]
    return tl.sum(tl.where(member, per_channel[None, :], 0.0), axis=1)


@triton.jit
def by_channel(per_group, place):
    """Hand each channel its group's value: [BLOCK_G] -> [BLOCK_C]; past the groups, the last one's."""
    return tl.gather(per_group, tl.minimum(place, per_group.shape[0] - 1), 0)


@triton.jit
def load_shift(shift, row, channel, real):
    """Load a row of the shift [BLOCK_C] float32, or zeros where there is no shift."""
    value = tl.full([channel.shape[0]], 0.0, tl.float32)
    if shift is not None:
        value = tl.load(shift + row + channel, mask=real, other=0.0).to(tl.float32)
    return value


@triton.jit
def load_affine(weight, bias, channel, real):
    """Return weight and bias [BLOCK_C] float32."""
    w = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    return w, tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)


@triton.jit
def tile_mask(start, area, BLOCK_P: tl.constexpr):
    """Return what of a tile [BLOCK_P, BLOCK_C] from pixel `start` of a slice on lies within its area.

    area: the slice's pixels, channel and whether it is real [BLOCK_C], and WHOLE: no tile reaches beyond. The compiler
    drops a mask that is always true, and the registers that it took.
    """
    pixels, channel, real, WHOLE = area
    if WHOLE:
        mask = tl.full([BLOCK_P, channel.shape[0]], True, tl.int1)
    else:
        mask = (tl.arange(0, BLOCK_P) < pixels - start)[:, None] & real[None, :]
    return mask


@triton.jit
def load_tile(base, start, area, C: tl.constexpr, BLOCK_P: tl.constexpr, POLICY: tl.constexpr):
    """Load [BLOCK_P, BLOCK_C] float32 from pixel `start` of a slice, zero outside of its area, and `tile_mask`."""
    _, channel, _, _ = area
    mask = tile_mask(start, area, BLOCK_P)
    offsets = tl.arange(0, BLOCK_P)[:, None] * C + channel[None, :]
    tile = tl.load(base + start * C + offsets, mask=mask, other=0.0, eviction_policy=POLICY)
    return tile.to(tl.float32), mask


@triton.jit
def store_tile(base, start, value, mask, channel, C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Store [BLOCK_P, BLOCK_C] at pixel `start` of a slice."""
    offsets = tl.arange(0, BLOCK_P)[:, None] * C + channel[None, :]
    tl.store(base + start * C + offsets, value, mask=mask)


@triton.jit
def drop(value, noise, first_pixel):
    """Apply dropout to [BLOCK_P, BLOCK_C] if there is a key: zero where the random word is low, scale the others.

    One Philox call serves four neighbouring channels.
    noise: key, sample_index, layer, image, first channel, which divides by 4, threshold and scale.
    """
    key, sample_index, layer, image, first_channel, THRESHOLD, KEEP_SCALE = noise
    if key is not None:
        BLOCK_P: tl.constexpr = value.shape[0]
        BLOCK_C: tl.constexpr = value.shape[1]
        k0, k1 = load_key(key)
        pixel = (first_pixel + tl.arange(0, BLOCK_P))[:, None]
        quad = (first_channel // 4 + tl.arange(0, BLOCK_C // 4))[None, :]
        c3 = quad * CHANNEL_STEP + DROPOUT
        w0, w1, w2, w3 = philox4x32(pixel, load_word(sample_index + image), layer, c3, k0, k1)
        threshold = tl.full([1, 1], THRESHOLD, tl.uint32)
        even, odd = tl.join(w0 >= threshold, w2 >= threshold), tl.join(w1 >= threshold, w3 >= threshold)
        kept = tl.reshape(tl.join(even, odd), [BLOCK_P, BLOCK_C])
        value = tl.where(kept, value * KEEP_SCALE, 0.0)
    return value


class Plan(NamedTuple):
    """How one launch divides the work: see the top of this file."""

    groups: int  # whole groups a program owns
    block_channels: int  # their channels, up to a power of two
    block_pixels: int  # pixels in registers at a time
    slices: int  # programs that share an image's groups
    slice_pixels: int
    num_warps: int

    @property
    def one_tile(self) -> bool:
        """Whether a program holds all its pixels in registers."""
        return self.slices == 1 and self.slice_pixels <= self.block_pixels


def plan(pixels: int, channels: int, groups: int, itemsize: int, inputs: int = 1) -> Plan:
    """Choose one tile, loop or split by size alone, so that one shape always takes one path.

    Args:
        pixels, channels, groups: H * W, C and G.
        itemsize: bytes per element.
        inputs: tensors read: 1 forward, 2 backward.

    Raises:
        ValueError: groups are too wide.
    """
    size, vector = channels // groups, 16 // itemsize
    blocked = next((b for b in range(1, groups + 1) if b * size % vector == 0), groups)
    while 2 * blocked <= groups and blocked * size * itemsize < ROW_BYTES[0]:
        blocked *= 2

    def block_channels(blocked: int) -> int:
        return max(4, triton.next_power_of_2(blocked * size))

    def tile(blocked: int) -> int:
        return triton.next_power_of_2(pixels) * block_channels(blocked) * inputs

    def may_double(blocked: int) -> bool:
        return 2 * blocked <= groups and 2 * blocked * size * itemsize <= ROW_BYTES[1]

    if block_channels(blocked) > LARGEST_ROW:
        raise ValueError(
            f"groups is {groups}: it takes enough of them that {blocked} have at most {LARGEST_ROW} channels"
        )
    if tile(blocked) <= REGISTER_TILE:
        while may_double(blocked) and tile(2 * blocked) <= WIDE_TILE:
            blocked *= 2
        block_pixels, slice_pixels = triton.next_power_of_2(pixels), pixels
        num_warps = max(1, tile(blocked) // WARP_TILE)
    else:
        data = pixels * blocked * size * itemsize * inputs
        while data > LOOP_BYTES and may_double(blocked):
            blocked *= 2
            data *= 2
        block_pixels = max(1, LOOP_TILE_BYTES // itemsize // inputs // block_channels(blocked))
        slices = 1 if data <= LOOP_BYTES else min(64, triton.cdiv(data, SLICE_BYTES))
        slice_pixels = triton.cdiv(triton.cdiv(pixels, slices), block_pixels) * block_pixels
        num_warps = 8
    slices = triton.cdiv(pixels, slice_pixels)
    return Plan(blocked, block_channels(blocked), block_pixels, slices, slice_pixels, num_warps)


def register_limit(chosen: Plan, inputs: int, whole: bool, shift: bool, more: bool, joined: bool) -> int | None:
    """Return how many registers a thread may have, or None for the compiler's own choice, which is not always wise.

    Of 64 a multiprocessor has room for two blocks of 16 warps, of 80 for three of 8: some compute while others wait for
    memory. Limited are those kernels that do not spill then on any architecture (tests/kernels/compile_all.py): what
    masks, shifts, drops or adds needs more (more: whether it drops or adds). What reads two maps side by side (joined)
    spills a few under the compiler's own choice, too, and none under 128, or 112 in the backward pass.
    """
    if joined:
        return 128 if inputs == 1 else 112
    if inputs == 1:
        return 64 if chosen.num_warps == 16 and whole and not more else None
    return 80 if chosen.one_tile and chosen.num_warps in (4, 8) and not (shift or more) else None


def more_warps(chosen: Plan, itemsize: int, more: bool, joined: bool) -> Plan:
    """Return the plan with twice the warps, 16 at most, where a thread would hold too much of one tile.

    A forward pass that joins two float32 maps and adds a third keeps three addresses for every 4 elements of a thread.
    With 32 elements it took all 128 registers, and spilt some where pixels are masked, too; with 16 it takes some 80.
    """
    if joined and more and itemsize == 4 and chosen.one_tile:
        return chosen._replace(num_warps=min(16, 2 * chosen.num_warps))
    return chosen


def divide(
    x: Tensor, groups: int, inputs: int = 1, *, shift: bool = False, more: bool = False, joined: bool = False
) -> tuple[Plan, dict[str, Any]]:
    """Return the plan for x [N, C, H, W], and the sizes and options that all these kernels take.

    inputs: as for `plan`. shift, more, joined: as for `register_limit`.
    """
    C, HW = x.shape[1], x.shape[2] * x.shape[3]
    chosen = more_warps(plan(HW, C, groups, x.element_size(), inputs), x.element_size(), more, joined)
    blocks = triton.cdiv(groups, chosen.groups)
    whole = chosen.slices * chosen.slice_pixels == HW and chosen.slice_pixels % chosen.block_pixels == 0
    whole = whole and blocks * chosen.block_channels == C
    assert chosen.groups * (C // groups) % 4 == 0 or chosen.groups >= groups, "a block starts within four words"
    return chosen, {
        "HW": HW,
        "slice_pixels": chosen.slice_pixels,
        "C": C,
        "G": groups,
        "SLICES": chosen.slices,
        "BLOCKS": blocks,
        "BLOCK_GROUPS": chosen.groups,
        "BLOCK_G": triton.next_power_of_2(chosen.groups),
        "BLOCK_C": chosen.block_channels,
        "BLOCK_P": chosen.block_pixels,
        "WHOLE": whole,
        "num_warps": chosen.num_warps,
        "maxnreg": register_limit(chosen, inputs, whole, shift, more, joined),
    }


def check_inputs(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, channels: int | None = None
) -> None:
    """Raise ValueError, naming the argument, for what the kernels cannot take; channels: all, if x has not all."""
    N, C, _, _ = checks.image_shape("x", x)
    checks.check_images("x", x, x.shape, checks.FLOATS, x.device)
    channels = channels or C
    if groups < 1 or channels % groups:
        raise ValueError(f"groups is {groups}: it takes a divisor of {channels} channels")
    checks.check_dense("weight", weight, (channels,), checks.FLOATS, x.device)
    checks.check_dense("bias", bias, (channels,), checks.FLOATS, x.device)
    if shift is not None:
        checks.check("shift", shift, (N, C), checks.FLOATS, x.device)
        if C > 1 and shift.stride(1) != 1:
            raise ValueError(f"shift has strides {shift.stride()}: it takes rows whose channels lie side by side")


def shift_arguments(shift: Tensor | None) -> dict[str, Any]:
    """Return the shift as the kernels take it: rows may lie apart, as those of one block in a table of all do."""
    return {"shift": shift, "shift_stride": 0 if shift is None else shift.stride(0)}


def dropout_arguments(
    x: Tensor, key: Tensor | None, sample_index: Tensor | None, probability: float, layer: int
) -> dict[str, Any]:
    """Return dropout as the kernels take it, or raise ValueError: a word below THRESHOLD drops its activation."""
    if key is not None and sample_index is not None:
        checks.check_address(key, sample_index, len(x), x.device)
    if not 0 <= probability < 1:
        raise ValueError(f"dropout's probability is {probability}: it takes one in [0, 1)")
    if probability == 0:
        key = sample_index = None
    scales = {"THRESHOLD": drop_threshold(probability), "KEEP_SCALE": 1 / (1 - probability)}
    return {"key": key, "sample_index": sample_index, "layer": layer, **scales}
