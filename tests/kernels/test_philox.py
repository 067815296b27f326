"""kernels/philox.py against ddpm_fast.noise: integers bit for bit, normals to float32 rounding."""

import pytest
import torch

from ddpm_fast.diffusion import noise

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from ddpm_fast.kernels import philox  # noqa: E402


@triton.jit
def words_kernel(words_ptr, normals_ptr, uniforms_ptr, key_ptr, counter_ptr, N, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = place < N
    k0, k1 = philox.load_key(key_ptr)  # pyright: ignore[reportGeneralTypeIssues]
    c0 = tl.load(counter_ptr + place, mask=real, other=0).to(tl.uint32)
    c1 = tl.load(counter_ptr + N + place, mask=real, other=0).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2 * N + place, mask=real, other=0).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3 * N + place, mask=real, other=0).to(tl.uint32)
    words = philox.philox4x32(c0, c1, c2, c3, k0, k1)
    normals = philox.normals4(c0, c1, c2, c3, k0, k1)
    for i in tl.static_range(4):
        tl.store(words_ptr + i * N + place, words[i].to(tl.int64), mask=real)
        tl.store(normals_ptr + i * N + place, normals[i], mask=real)
        tl.store(uniforms_ptr + i * N + place, philox.uniform(words[i]), mask=real)


@triton.jit
def box_muller_kernel(z_ptr, words_ptr, N, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    real = place < N
    word0 = tl.load(words_ptr + place, mask=real, other=0).to(tl.uint32)
    word1 = tl.load(words_ptr + N + place, mask=real, other=0).to(tl.uint32)
    z0, z1 = philox.box_muller(word0, word1)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(z_ptr + place, z0, mask=real)
    tl.store(z_ptr + N + place, z1, mask=real)


def run(counter, key):
    N = counter.shape[1]
    words = torch.zeros_like(counter)
    normals, uniforms = (torch.full(counter.shape, torch.nan, device=counter.device) for _ in range(2))
    words_kernel[(triton.cdiv(N, 512),)](words, normals, uniforms, key, counter, N, BLOCK=512)
    return words, normals, uniforms


def assert_normals(found, words0, words1):
    """|z - z64| <= 4 * 2**-23 * radius, philox.py's bound."""
    radius = torch.sqrt(-2 * torch.log(noise.uniform(words0).double()))
    for z, truth in zip(found, noise.box_muller(words0, words1, torch.float64), strict=True):
        assert ((z.double() - truth).abs() <= 4 * 2.0**-23 * radius).all()


KNOWN = [  # Random123's known answers
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_words_are_the_published_ones(counter, key, answer, device):
    words, _, _ = run(torch.tensor(counter, device=device).view(4, 1), torch.tensor(key, device=device))
    assert tuple(words[:, 0].tolist()) == answer


def test_integers_equal_the_reference_and_normals_are_within_their_bound(device):
    generator = torch.Generator().manual_seed(0)
    counter = torch.randint(0, 2**32, (4, 20011), generator=generator).to(device)
    key = noise.key_from_seed(0x299F31D0_A4093822, device)
    words, normals, uniforms = run(counter, key)
    truth = torch.stack(noise.philox((counter[0], counter[1], counter[2], counter[3]), key))
    assert torch.equal(words, truth)
    assert torch.equal(uniforms, noise.uniform(truth))
    assert_normals(normals[:2], truth[0], truth[1])
    assert_normals(normals[2:], truth[2], truth[3])


def test_normals_at_the_ends_of_the_range_and_at_every_quarter_turn(device):
    ends = [0, 1, 2**7, 2**31, 0xFFFFFF7F, 0xFFFFFF80, 0xFFFFFFFF]
    turns = [*ends, *(k * 2**29 + d for k in range(1, 8) for d in (-64, -1, 0, 1, 64))]
    words = torch.cartesian_prod(torch.tensor(ends), torch.tensor(turns)).T.contiguous().to(device)
    z = torch.full(words.shape, torch.nan, device=device)
    box_muller_kernel[(1,)](z, words, words.shape[1], BLOCK=512)
    assert_normals(z, words[0], words[1])
