"""A directory of samples that something else has been at."""

import numpy as np
import pytest

from ddpm_fast.errors import InputError
from ddpm_fast.options import SamplingOptions
from ddpm_fast.runs.samples import Samples, require_same_kind

KIND = {"seed": 0, "format": "png"}


@pytest.mark.parametrize("name", ["000000.png", "cat.jpg", "grid.png", "images.npz", "parts"])
def test_somebodys_own_file_of_a_name_that_is_written_is_not_replaced(tmp_path, name):
    require_same_kind(tmp_path, KIND)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="holds other images"):
        require_same_kind(tmp_path, KIND)


@pytest.mark.parametrize("place", [20, 60])  # in the header, and in the pixels
def test_an_image_that_was_damaged_is_named_and_made_again_once_it_is_deleted(tmp_path, place):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)

    def made_again() -> None:
        samples = Samples(tmp_path, KIND, SamplingOptions("ddim", 2, count=3))
        samples.add(0, pixels)
        samples.finish({}, None)

    made_again()
    file = tmp_path / "000001.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:place] + b"XXXX" + whole[place + 4 :])
    with pytest.raises(InputError, match=r"000001.png is damaged .*: delete it"):
        made_again()
    file.unlink()
    made_again()
    assert file.read_bytes() == whole
