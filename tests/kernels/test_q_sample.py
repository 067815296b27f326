"""kernels/q_sample.py against the float64 reference."""

import pytest
import torch

from ddpm_fast.config import DiffusionConfig
from ddpm_fast.diffusion.noise import Stream, key_from_seed
from ddpm_fast.diffusion.schedule import TrainingTable, training_table
from ddpm_fast.ops import reference

pytest.importorskip("triton")
from ddpm_fast.kernels import training_tiles as module
from ddpm_fast.kernels.q_sample import q_sample

TABLE = training_table(DiffusionConfig(), dtype=torch.float64)
LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}


def make(shape, device, image_dtype=torch.uint8, images_last=False):
    N = shape[0]
    generator = torch.Generator().manual_seed(sum(shape))
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if image_dtype != torch.uint8:
        images = (images.float() / 100 - 1).to(image_dtype)
    images = images.to(device).to(memory_format=LAYOUTS[images_last])
    t = torch.tensor([0, 999, 500, 1, 250], device=device)[:N]
    index = torch.tensor([3, 2**32 - 1, 2**33 + 7, 0, 11], device=device)[:N]
    return images, t, key_from_seed(2**40 + 5, device), index


def derive(images, t, table, key, index, noise_and_error):
    """Return how far the kernel's x_t may lie from the truth before it is stored.

    b times the error of its normals, and roundings of half of float32's eps: of a, 1/127.5, two products and the sum on
    the image's part, of b, its product and the sum on the noise's.
    """
    a, b = (table[t, column].view(-1, 1, 1, 1) for column in (0, 1))
    eps, error = noise_and_error(key, index, 0, Stream.TRAINING, images.shape)
    x_start = images.double() / 127.5 - 1 if images.dtype == torch.uint8 else images.double()
    return (b * error + 2.0**-24 * (5 * (a * x_start).abs().amax(3, True) + 3 * (b * eps).abs())).max().item()


def compare(shape, device, assert_within, noise_and_error, *, image_dtype, images_last, flip, dtype, channels_last):
    images, t, key, index = make(shape, device, image_dtype, images_last)
    table = TABLE.to(device)
    found = q_sample(images, t, table.float(), key, index, flip, dtype, channels_last)
    plain = reference.q_sample(images, t, table.float(), key, index, flip, dtype, channels_last)
    truth = reference.q_sample(images, t, table, key, index, flip, torch.float64)
    derived = derive(images, t, table, key, index, noise_and_error) if shape[0] else 0.0
    assert_within(found, plain, truth, derived)
    assert found.is_contiguous(memory_format=LAYOUTS[channels_last])


SHAPES = [
    (1, 1, 1, 1),  # the least
    (3, 1, 8, 8),  # digits
    (2, 3, 31, 77),  # primes, several tiles
    (5, 2, 7, 11),
    (2, 4, 16, 32),  # a tile exactly
    (2, 4, 27, 19),  # one pixel over a tile
    (2, 5, 7, 5),  # two groups of channels
    (4, 1, 3, 3),
    (0, 3, 8, 8),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("images_last", [False, True])
def test_x_t_equals_the_reference(shape, channels_last, images_last, device, assert_within, noise_and_error):
    options = {"image_dtype": torch.uint8, "flip": True, "dtype": torch.float32}
    compare(
        shape, device, assert_within, noise_and_error, channels_last=channels_last, images_last=images_last, **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flip", [False, True])
def test_dtypes_and_flips(dtype, image_dtype, flip, device, assert_within, noise_and_error):
    options = {"image_dtype": image_dtype, "flip": flip, "dtype": dtype}
    compare((5, 3, 5, 7), device, assert_within, noise_and_error, channels_last=True, images_last=False, **options)


def test_any_shape(draw, device, assert_within, noise_and_error):
    shape = tuple(draw.randint(1, most) for most in (3, 9, 12, 12))
    images_last, channels_last, flip = (draw.choice([False, True]) for _ in range(3))
    options = {"image_dtype": torch.uint8, "flip": flip, "dtype": torch.float32}
    compare(
        shape, device, assert_within, noise_and_error, channels_last=channels_last, images_last=images_last, **options
    )


def test_a_t_outside_the_table_gives_nan_and_no_other_memory(device):
    images, _, key, index = make((2, 3, 4, 4), device)
    t = torch.tensor([-1, 1000], device=device)
    assert q_sample(images, t, TABLE.float().to(device), key, index).isnan().all()


@pytest.mark.parametrize("channels", [96, 384, 512])
def test_many_channels(channels, device, assert_within, noise_and_error):
    options = {"image_dtype": torch.uint8, "images_last": False, "flip": True, "dtype": torch.float32}
    compare((1, channels, 1, 2), device, assert_within, noise_and_error, channels_last=True, **options)


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


def test_columns_are_those_of_the_table():
    assert (module.COLUMN_A.value, module.COLUMN_B.value) == tuple(map(TrainingTable._fields.index, "ab"))
    assert module.COLUMNS.value == len(TrainingTable._fields)
