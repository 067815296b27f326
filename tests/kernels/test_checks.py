"""kernels/checks.py: sizes, grids and layouts."""

import pytest
import torch

pytest.importorskip("triton")
from ddpm_fast.kernels import checks


def image(device, channels=8):
    return torch.zeros(2, 4, 4, channels, device=device).permute(0, 3, 1, 2)


def test_images_whose_offsets_would_overflow_are_refused(device):
    vast = torch.zeros(1, device=device).expand(2, 3, 2**15, 2**15)
    with pytest.raises(ValueError, match=r"x has shape .* in 1\.\.2\*\*31"):
        checks.image_shape("x", vast)
    assert checks.image_shape("x", vast[:, :1, :2]) == (2, 1, 2, 2**15)


def test_a_grid_too_large_is_refused(device):
    assert checks.grid("x", image(device), 2**31 - 1) == (2**31 - 1,)
    with pytest.raises(ValueError, match="x has shape"):
        checks.grid("x", image(device), 2**31)


def test_any_layout_but_dense_nhwc_is_refused(device):
    nhwc, kinds = image(device), (torch.float32,)
    checks.check_images("x", nhwc, nhwc.shape, kinds, nhwc.device)
    for other in (nhwc.contiguous(), nhwc[..., ::2], nhwc[:, ::2]):
        with pytest.raises(ValueError, match=r"x has strides .*: it takes dense NHWC"):
            checks.check_images("x", other, other.shape, kinds, nhwc.device)
