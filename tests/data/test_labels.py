"""Labels: of the built-in digits, of an .npz, and of nothing else."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ddpm_fast.config import DataConfig, UNetConfig
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.data.labels import read_labels
from ddpm_fast.errors import InputError

IMAGES = np.arange(5 * 8 * 8, dtype=np.uint8).reshape(5, 8, 8)
UNET = UNetConfig(1, 8, 8, 8, (1,), attention_resolutions=(), groups=4)


def test_digits_have_scikit_learns():
    labels = read_labels(DataConfig(data="digits"), 1797)
    assert labels is not None
    np.testing.assert_array_equal(labels, load_digits(return_X_y=True)[1])


def test_an_npz_may_have_some_and_its_images_are_found_beside_them(tmp_path):
    np.savez(tmp_path / "with.npz", labels=np.array([3, 1, 4, 1, 5], np.uint16), images=IMAGES)
    np.savez(tmp_path / "without.npz", IMAGES)
    data = DataConfig(data=str(tmp_path / "with.npz"))
    labels = read_labels(data, 5)
    assert labels is not None
    assert (labels.dtype, labels.tolist()) == (np.int64, [3, 1, 4, 1, 5])
    np.testing.assert_array_equal(open_dataset(data, UNET).images[..., 0], IMAGES)
    assert read_labels(DataConfig(data=str(tmp_path / "without.npz")), 5) is None
    assert read_labels(DataConfig(data=str(tmp_path)), 5) is None


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (
            np.zeros(4, int),
            r"'labels' is int64 of shape \(4,\): it must hold one whole number for each of the 5 images",
        ),
        (np.zeros(5), r"'labels' is float64 of shape \(5,\)"),
        (np.array([{}] * 5), "holds pickled objects, which are never loaded"),
    ],
)
def test_other_labels_are_refused(tmp_path, labels, says):
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=labels)
    with pytest.raises(InputError, match=says):
        read_labels(DataConfig(data=str(tmp_path / "a.npz")), 5)
