"""kernels/q_sample.py against the float64 reference."""

import pytest
import torch

from ddpm_fast.config import DiffusionConfig
from ddpm_fast.constants import TRAINING_COLUMN
from ddpm_fast.diffusion.noise import Stream, key_from_seed
from ddpm_fast.diffusion.schedule import training_table
from ddpm_fast.ops import reference

pytest.importorskip("triton")
from ddpm_fast.kernels.q_sample import q_sample

TABLE = training_table(DiffusionConfig(), dtype=torch.float64)


def make(shape, device, image_dtype=torch.uint8):
    N = shape[0]
    generator = torch.Generator().manual_seed(sum(shape))
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if image_dtype != torch.uint8:
        images = (images.float() / 100 - 1).to(image_dtype)
    images = images.to(device).to(memory_format=torch.channels_last)
    t = torch.tensor([0, 999, 500, 1, 250], device=device)[:N]
    index = torch.tensor([3, 2**32 - 1, 2**33 + 7, 0, 11], device=device)[:N]
    return images, t, key_from_seed(2**40 + 5, device), index


def derive(images, t, table, key, index, noise_and_error):
    """Return how far the kernel's x_t may lie from the truth before it is stored.

    The noise's coefficient times the error of the normals, and roundings of half of float32's eps: of the signal's
    coefficient, 1/127.5, two products and the sum on the image's part, of the noise's, its product and the sum on the
    noise's.
    """
    a, b = (table[t, column].view(-1, 1, 1, 1) for column in (TRAINING_COLUMN.signal, TRAINING_COLUMN.noise))
    eps, error = noise_and_error(key, index, 0, Stream.TRAINING, images.shape)
    x_start = images.double() / 127.5 - 1 if images.dtype == torch.uint8 else images.double()
    return (b * error + 2.0**-24 * (5 * (a * x_start).abs().amax(3, True) + 3 * (b * eps).abs())).max().item()


def compare(shape, device, assert_within, noise_and_error, image_dtype=torch.uint8, **options):
    images, t, key, index = make(shape, device, image_dtype)
    table = TABLE.to(device)
    found, plain = (op(images, t, table.float(), key, index, **options) for op in (q_sample, reference.q_sample))
    options["dtype"] = torch.float64
    truth = reference.q_sample(images, t, table, key, index, **options)
    derived = derive(images, t, table, key, index, noise_and_error) if shape[0] else 0.0
    assert_within(found, plain, truth, derived)
    assert found.is_contiguous(memory_format=torch.channels_last)


SHAPES = [
    (1, 1, 1, 1),  # the least
    (3, 1, 8, 8),  # digits
    (2, 3, 31, 77),  # primes, several tiles
    (5, 2, 7, 11),
    (2, 4, 16, 32),  # a tile exactly
    (2, 4, 27, 19),  # one pixel over a tile
    (4, 1, 3, 3),
    (0, 3, 8, 8),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_x_t_equals_the_reference(shape, device, assert_within, noise_and_error):
    compare(shape, device, assert_within, noise_and_error, flip=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flip", [False, True])
def test_dtypes_and_flips(dtype, image_dtype, flip, device, assert_within, noise_and_error):
    compare((5, 3, 5, 7), device, assert_within, noise_and_error, image_dtype, flip=flip, dtype=dtype)


def test_any_shape(draw, device, assert_within, noise_and_error):
    shape = tuple(draw.randint(1, most) for most in (3, 4, 12, 12))
    compare(shape, device, assert_within, noise_and_error, flip=draw.choice([False, True]))


def test_a_t_outside_the_table_gives_nan_and_no_other_memory(device):
    images, _, key, index = make((2, 3, 4, 4), device)
    t = torch.tensor([-1, 1000], device=device)
    assert q_sample(images, t, TABLE.float().to(device), key, index).isnan().all()


def test_a_large_mean_with_small_variance(device, assert_within, noise_and_error):
    """Images taken as they are, near 1000, at the first timestep, of which next to all of them is left."""
    images, _, key, index = make((2, 3, 5, 7), device, torch.float32)
    images, t = 1000 + 1e-2 * images, torch.zeros(2, dtype=torch.int64, device=device)
    table = TABLE.to(device)
    plain = reference.q_sample(images, t, table.float(), key, index)
    truth = reference.q_sample(images, t, table, key, index, dtype=torch.float64)
    derived = derive(images, t, table, key, index, noise_and_error)
    assert_within(q_sample(images, t, table.float(), key, index), plain, truth, derived)


BAD = {
    "images has shape .* at most 4 channels": {"images": torch.zeros(2, 5, 8, 8)},
    "images is torch.int64": {"images": torch.zeros(2, 3, 8, 8, dtype=torch.int64)},
    "t is torch.int32": {"t": torch.zeros(2, dtype=torch.int32)},
    "table is torch.float64": {"table": TABLE},
    "dtype is torch.float64": {"dtype": torch.float64},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message, device):
    images, t, key, index = make((2, 3, 8, 8), device)
    good = {"images": images, "t": t, "table": TABLE.float().to(device), "key": key, "sample_index": index}
    wrong = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in BAD[message].items()}
    with pytest.raises(ValueError, match=message):
        q_sample(**{**good, **wrong})
