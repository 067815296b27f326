"""Parquet files: which columns are meant, as `datasets` says it or by their content, and files that cannot be read."""

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pyarrow")
import pyarrow as pa
import pyarrow.parquet as pq

from ddpm_fast.config import DataConfig, UNetConfig
from ddpm_fast.data import parquet
from ddpm_fast.data.dataset import Dataset, open_dataset
from ddpm_fast.errors import InputError
from ddpm_fast.files import cache_directory

UNET = UNetConfig(3, 4, 6, channels=32, channel_multipliers=(1,), attention_resolutions=())
PIXELS = np.random.default_rng(0).integers(0, 256, (9, 4, 6, 3), dtype=np.uint8)
NAMES = ["cat", "dog", "eel"]
CLASSES = [2, 0, 1, 1, 0, 2, 2, 1, 0]
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": NAMES, "_type": "ClassLabel"},
    "width": {"dtype": "int64", "_type": "Value"},
}


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def as_datasets_writes(pixels: np.ndarray) -> list[dict[str, Any]]:
    return [{"bytes": encoded(image), "path": None} for image in pixels]


def columns(first: int = 0, last: int = 9) -> dict[str, list[Any]]:
    images, labels = as_datasets_writes(PIXELS[first:last]), CLASSES[first:last]
    return {"width": [6] * (last - first), "image": images, "label": labels}


def write(file: Path, content: dict[str, list[Any]], features: Any = None, rows: int = 4) -> Path:
    """Write a file of row groups of 4 rows; features as the library `datasets` says them in the metadata."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(content)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file, row_group_size=rows)
    return file


def opened(path: Path, **options) -> Dataset:
    return open_dataset(DataConfig(data=str(path), **options), UNET)


def check(dataset: Dataset, rows: list[int], classes: tuple[str, ...] = tuple(NAMES)) -> None:
    np.testing.assert_array_equal(dataset.images, PIXELS[rows])
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [CLASSES[row] for row in rows]
    assert dataset.classes == classes


@pytest.mark.parametrize("rows_at_once", [1, 3, 256])
def test_one_file_or_a_folder_of_them_in_their_order(tmp_path, monkeypatch, rows_at_once):
    monkeypatch.setattr(parquet, "ROWS_AT_ONCE", rows_at_once)
    write(tmp_path / "all.parquet", columns(), FEATURES)
    check(opened(tmp_path / "all.parquet"), list(range(9)))
    for number, (first, last) in enumerate([(0, 5), (5, 6), (6, 9)]):
        write(tmp_path / f"parts/{number}.parquet", columns(first, last), FEATURES)
    for _ in range(2):  # decoded, then from the cache
        check(opened(tmp_path / "parts"), list(range(9)))


def test_a_picture_that_cannot_be_used_takes_its_label_along(tmp_path):
    content = columns()
    content["image"][1]["bytes"], content["image"][4]["bytes"] = b"no picture", None
    write(tmp_path / "a.parquet", columns(0, 2), FEATURES)
    write(tmp_path / "b.parquet", content, FEATURES)
    with pytest.raises(
        InputError, match=r"2 of 11 .*row 1 of b.parquet \(not an image\); row 4 .*\(no bytes\); .*--skip-bad"
    ):
        opened(tmp_path)
    for _ in range(2):
        dataset = opened(tmp_path, skip_bad=True)
        check(dataset, [0, 1, 0, 2, 3, 5, 6, 7, 8])
        assert len(dataset.skipped) == 2


def test_columns_are_found_without_metadata_too(tmp_path):
    content = {"id": [b"bytes, but no picture"] * 9, "picture": [encoded(image) for image in PIXELS]}
    named = content | {"class": [NAMES[number] for number in CLASSES]}
    check(opened(write(tmp_path / "named.parquet", named)), list(range(9)))
    check(opened(write(tmp_path / "numbered.parquet", content | {"label": CLASSES})), list(range(9)), ())
    assert opened(write(tmp_path / "none.parquet", content)).labels is None


def test_columns_can_be_named_and_make_another_store(tmp_path):
    content = columns() | {"mask": as_datasets_writes(255 - PIXELS), "male": [number == 2 for number in CLASSES]}
    file = write(tmp_path / "a.parquet", content, FEATURES | {"mask": {"_type": "Image"}})
    check(opened(file), list(range(9)))  # of two images, the one that is called so
    masks = opened(file, image_column="mask", label_column="male")
    np.testing.assert_array_equal(masks.images, 255 - PIXELS)
    assert masks.labels is not None
    assert (masks.labels.tolist(), masks.classes) == ([int(number == 2) for number in CLASSES], ("False", "True"))


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        ({}, {"image_column": "label"}, r"--image-column label is int64, which is no image: name another of image"),
        ({}, {"image_column": "imgae"}, r"--image-column imgae is no column: .* Did you mean 'image'"),
        ({}, {"label_column": "image"}, r"--label-column image is struct, which is no class: name one of width, label"),
        ({"image": [0.5] * 9}, {}, r"no column is an image, of width \(int64\), image \(double\), label \(int64\)"),
        ({"image": [b"no picture"] * 9}, {"image_column": "image"}, r"9 of 9 images cannot be used: .*none is left"),
        ({"label": [1] * 8 + [None]}, {"label_column": "label"}, "--label-column label: a row of .* has no value"),
    ],
)
def test_columns_that_cannot_be_used_are_one_line(tmp_path, change, options, says):
    file = write(tmp_path / "a.parquet", columns() | change)
    with pytest.raises(InputError, match=says) as refused:
        opened(file, **options)
    assert "\n" not in str(refused.value)
    assert list(cache_directory().glob("*.npy")) == []


def test_several_images_without_a_usual_name_must_be_named(tmp_path):
    content = {"left": as_datasets_writes(PIXELS), "right": as_datasets_writes(PIXELS)}
    with pytest.raises(InputError, match="several images in a row: name one of left, right by --image-column"):
        opened(write(tmp_path / "a.parquet", content))


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "overwritten"])
def test_damaged_files_are_named(tmp_path, damage):
    file = write(tmp_path / "a.parquet", columns(), FEATURES)
    content = bytearray(file.read_bytes())
    content[len(content) // 8 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 8)
    damaged = {"empty": b"", "text": b"hello", "truncated": file.read_bytes()[:-20], "overwritten": bytes(content)}
    file.write_bytes(damaged[damage])
    with pytest.raises(
        InputError, match=r"a\.parquet is damaged or no parquet file|of 9 images cannot be used"
    ) as refused:
        opened(file)
    assert "\n" not in str(refused.value)
    assert list(cache_directory().glob("*.npy")) == []


@pytest.mark.parametrize("metadata", ["", "[]", '{"info": 3}', '{"info": {"features": {"image": 3, "label": []}}}'])
def test_strange_metadata_is_read_past(tmp_path, metadata):
    table = pa.table(columns()).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "a.parquet")
    check(opened(tmp_path / "a.parquet"), list(range(9)), ())


def test_files_of_other_columns_are_refused(tmp_path):
    write(tmp_path / "a.parquet", columns())
    write(tmp_path / "b.parquet", {"image": [1, 2]})
    with pytest.raises(InputError, match=r"b.parquet has other columns than a.parquet"):
        opened(tmp_path)


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"pip install 'ddpm-fast\[hub\]'"):
        opened(tmp_path / "a.parquet")


def test_no_more_is_held_than_three_times_a_row_group(tmp_path, monkeypatch):
    """A picture's file may go on after its end, so that large files are soon decoded."""
    monkeypatch.setattr(parquet, "BYTES_AT_ONCE", 1 << 20)
    noise, group = np.random.default_rng(1), 40 * (200 << 10)
    pictures = [{"bytes": encoded(PIXELS[i % 9]) + noise.bytes(200 << 10), "path": None} for i in range(120)]
    file = write(tmp_path / "large.parquet", {"image": pictures}, rows=40)
    del pictures
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        dataset = opened(file)
        held = pool.max_memory() + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    np.testing.assert_array_equal(dataset.images, PIXELS[np.arange(120) % 9])
    assert held < 3 * group
