"""Labels: of the built-in digits, of an .npz, of folders, and in the order of the images that are left."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn")
from sklearn.datasets import load_digits

from ddpm_fast.config import DataConfig, UNetConfig
from ddpm_fast.data.dataset import Dataset, open_dataset
from ddpm_fast.data.labels import from_values
from ddpm_fast.errors import InputError

IMAGES = np.arange(5 * 8 * 8, dtype=np.uint8).reshape(5, 8, 8)
UNET = UNetConfig(1, 8, 8, 8, (1,), attention_resolutions=(), groups=4)


def opened(path: Path | str, **options) -> Dataset:
    return open_dataset(DataConfig(data=str(path), **options), UNET)


def labels_of(dataset: Dataset) -> list[int]:
    assert dataset.labels is not None
    assert dataset.labels.dtype == np.int64
    return dataset.labels.tolist()


def test_digits_have_scikit_learns():
    digits = opened("digits")
    np.testing.assert_array_equal(labels_of(digits), load_digits(return_X_y=True)[1])
    assert digits.classes == tuple("0123456789")


def test_an_npz_may_have_some_and_its_images_are_found_beside_them(tmp_path):
    np.savez(tmp_path / "with.npz", labels=np.array([3, 1, 4, 1, 5], np.uint16), images=IMAGES)
    np.savez(tmp_path / "named.npz", labels=np.array([0, 1, 0, 1, 1]), classes=["cat", "dog"], images=IMAGES)
    np.savez(tmp_path / "without.npz", IMAGES)
    dataset = opened(tmp_path / "with.npz")
    assert (labels_of(dataset), dataset.classes) == ([3, 1, 4, 1, 5], ())
    np.testing.assert_array_equal(dataset.images[..., 0], IMAGES)
    assert opened(tmp_path / "named.npz").classes == ("cat", "dog")
    assert opened(tmp_path / "without.npz").labels is None


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
        opened(tmp_path / "a.npz")


def folders(root: Path, *names: str) -> None:
    """Write one grey picture a name, whose grey is the number of its place in the order of names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), sorted(names).index(name)).save(root / name)


def test_class_folders_are_the_classes_in_alphabetical_order(tmp_path):
    folders(tmp_path, "dog/b.png", "cat/z.png", "cat/deep/er/y.png", "10/a.png", "dog/a.png")
    (tmp_path / "10/.hidden.png").write_bytes(b"")
    (tmp_path / "cat/a broken one.png").write_bytes(b"no picture")
    for _ in range(2):  # decoded, then from the cache
        dataset = opened(tmp_path, skip_bad=True)
        assert dataset.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
        assert labels_of(dataset) == [0, 1, 1, 2, 2]  # the broken one is left out of both
        assert dataset.classes == ("10", "cat", "dog")


@pytest.mark.parametrize("names", [("a.png", "cat/b.png", "dog/c.png"), ("2024/a.png", "2024/b.png"), ("a.png",)])
def test_other_folders_are_no_classes(tmp_path, names):
    folders(tmp_path, *names)
    dataset = opened(tmp_path)
    assert (dataset.labels, dataset.classes) == (None, ())


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [
        ([3, 1, 3], [3, 1, 3], ()),
        (["7", "-2"], [7, -2], ()),
        (["dog", "cat", "dog"], [1, 0, 1], ("cat", "dog")),
        (["2", "dog"], [0, 1], ("2", "dog")),
        ([True, False], [1, 0], ("False", "True")),
        ([1, None], None, ()),
        ([], None, ()),
    ],
)
def test_values_of_a_column_become_labels(values, labels, classes):
    found = from_values(values)
    assert (None if found.values is None else found.values.tolist(), found.classes) == (labels, classes)


def test_an_unknown_class_among_named_ones_is_no_class():
    assert from_values([0, -1], ["cat", "dog"]).values is None
    assert from_values([0, 1], ["cat", "dog"]).classes == ("cat", "dog")
