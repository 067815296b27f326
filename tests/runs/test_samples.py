"""A directory of samples that something else has been at."""


import pytest

from ddpm_fast.errors import InputError
from ddpm_fast.runs.samples import require_same_kind

KIND = {"seed": 0, "format": "png"}


@pytest.mark.parametrize("name", ["000000.png", "grid.png", "images.npz", "parts"])
def test_somebodys_own_file_of_a_name_that_is_written_is_not_replaced(tmp_path, name):
    require_same_kind(tmp_path, KIND)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="holds other samples"):
        require_same_kind(tmp_path, KIND)
