"""Addressable randomness inside kernels, as in `ddpm_fast.diffusion.noise`.

Counter and key as there: c0 pixel h * W + w, c1 sample index, c2 step, c3 stream + CHANNEL_STEP * (channel // 4). The
integers equal the reference's bit for bit, so do the uniforms (their scale is a power of two); the normals agree to
float32 rounding: |z - z64| <= 4 * 2**-23 * radius, where z64 and the radius sqrt(-2 ln u1) are taken in float64 from
the same float32 uniforms.

Ten rounds are 20 multiplications 32 x 32 -> 64, written as such: each becomes one IMAD.WIDE, where `tl.umulhi` beside
a low product would take two instructions. A sine and a cosine of a turn need no range reduction but a subtraction
that is exact; `tl.cos` would keep Payne-Hanek's table in local memory.
"""

import triton
import triton.language as tl

from ddpm_fast import constants

TRAINING = tl.constexpr(int(constants.Stream.TRAINING))
SAMPLING = tl.constexpr(int(constants.Stream.SAMPLING))
FLIP = tl.constexpr(int(constants.Stream.FLIP))
DROPOUT = tl.constexpr(int(constants.Stream.DROPOUT))
CHANNEL_STEP = tl.constexpr(constants.CHANNEL_STEP)

_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_INCREMENT_0 = tl.constexpr(0x9E3779B9)
_INCREMENT_1 = tl.constexpr(0xBB67AE85)
_TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit
def load_word(pointer):
    """Load one int64 word, of which the low 32 bits count, as uint32."""
    return tl.load(pointer).to(tl.uint32)


@triton.jit
def load_key(key_ptr):
    """Load the seed's two words (key_ptr: [2] int64, low then high)."""
    return load_word(key_ptr), load_word(key_ptr + 1)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Return Philox4x32-10's four uint32 words (Salmon et al. 2011); counters broadcast together."""
    c0, c1, c2, c3 = tl.cast(c0, tl.uint32), tl.cast(c1, tl.uint32), tl.cast(c2, tl.uint32), tl.cast(c3, tl.uint32)
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * _MULTIPLIER_0
        product1 = c2.to(tl.uint64) * _MULTIPLIER_1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 = k0 + _INCREMENT_0
        k1 = k1 + _INCREMENT_1
    return c0, c1, c2, c3


@triton.jit
def first_word(sample_index, stream, k0, k1):
    """Return the first word at pixel 0, step 0 of a sample: what timesteps and flips are made from."""
    word, _, _, _ = philox4x32(0, sample_index, 0, stream, k0, k1)
    return word


@triton.jit
def uniform(word):
    """Map words to float32 in (0, 1]; words from 0xffffff80 up give 1.0 exactly."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2**-32, 2**-33


@triton.jit
def sin_cos_octant(x):
    """Return sin(x) and cos(x) for |x| <= pi/4: minimax fits in x^2, by Lawson's iteration.

    Relative error of the polynomials 2e-9 and 2e-10, then float32 rounding.
    """
    z = x * x
    sine = x + x * (z * (-0.1666665543 + z * (0.0083321607 + z * -0.0001951529)))
    cosine = 1.0 + z * (-0.5 + z * (0.0416666457 + z * (-0.0013887316 + z * 2.44331570e-05)))
    return sine, cosine


@triton.jit
def rotate_quadrants(sine, cosine, quadrants):
    """Return sine and cosine of an angle that is larger by `quadrants` (int32) times pi/2."""
    swap = (quadrants & 1) != 0
    rotated_sine = tl.where(swap, cosine, sine)
    rotated_cosine = tl.where(swap, sine, cosine)
    rotated_sine = tl.where((quadrants & 2) != 0, -rotated_sine, rotated_sine)
    rotated_cosine = tl.where(((quadrants + 1) & 2) != 0, -rotated_cosine, rotated_cosine)
    return rotated_sine, rotated_cosine


@triton.jit
def sin_cos_turn(turn):
    """Return the sine and the cosine of 2 pi * turn, for turns in [0, 1]; the range reduction is exact."""
    quadrants = (turn * 4.0 + 0.5).to(tl.int32)  # truncated: the nearest quarter turn
    rest = turn - quadrants.to(tl.float32) * 0.25  # within [-1/8, 1/8], a multiple of turn's last place
    sine, cosine = sin_cos_octant(rest * _TWO_PI)
    return rotate_quadrants(sine, cosine, quadrants)


@triton.jit
def box_muller(word0, word1):
    """Turn two words into two independent normals (Box and Muller 1958): r cos, r sin."""
    radius = tl.sqrt(-2.0 * tl.log(uniform(word0)))
    sine, cosine = sin_cos_turn(uniform(word1))
    return radius * cosine, radius * sine


@triton.jit
def normals4(c0, c1, c2, c3, k0, k1):
    """Return the standard normals of the four channels 4j .. 4j + 3 at an address, float32."""
    word0, word1, word2, word3 = philox4x32(c0, c1, c2, c3, k0, k1)
    z0, z1 = box_muller(word0, word1)
    z2, z3 = box_muller(word2, word3)
    return z0, z1, z2, z3
