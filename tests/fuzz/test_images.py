"""Damaged images of every format that is read: pixels, or a sentence that names the file; no crash and no flood."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from ddpm_fast.config import DataConfig, UNetConfig
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.data.image_files import Unusable, decode, fit, is_encoded
from ddpm_fast.data.survey import survey
from tests.fuzz.amounts import little_memory, often
from tests.fuzz.mutations import damaged
from tests.refusals import refused

UNET = UNetConfig(3, 8, 8, channels=32, channel_multipliers=(1,), attention_resolutions=())
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)


def encoded(format: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[0]).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


FORMATS = {
    "PNG": encoded("PNG"),
    "PNG of 1 bit": encoded("PNG", "1"),
    "PNG with a palette": encoded("PNG", "P", transparency=3),
    "PNG of 16 bits": encoded("PNG", "I;16"),
    "animated PNG": encoded("PNG", save_all=True, append_images=[Image.fromarray(PIXELS[1])]),
    "JPEG": encoded("JPEG"),
    "progressive JPEG": encoded(
        "JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
    ),
    "JPEG in CMYK": encoded("JPEG", "CMYK"),
    "GIF": encoded("GIF", "P"),
    "animated GIF": encoded("GIF", "P", save_all=True, append_images=[Image.fromarray(PIXELS[1]).convert("P")]),
    "TIFF": encoded("TIFF"),
    "TIFF by LZW": encoded("TIFF", compression="tiff_lzw"),
    "TIFF of floats": encoded("TIFF", "F"),
    "BMP": encoded("BMP"),
    "PPM": encoded("PPM"),
    "ICO": encoded("ICO"),
    "ICNS": encoded("ICNS"),
    "TGA": encoded("TGA", compression="tga_rle"),
    "PCX": encoded("PCX"),
    "SGI": encoded("SGI"),
    "DDS": encoded("DDS"),
    "DIB": encoded("DIB"),
    "MSP": encoded("MSP", "1"),
    "XBM": encoded("XBM", "1"),
    "QOI": encoded("QOI") if "QOI" in Image.SAVE else b"",
}
FORMATS |= {
    name: encoded(name)
    for name, part in (("WEBP", "webp"), ("AVIF", "avif"), ("JPEG2000", "jpg_2000"))
    if features.check(part)
}
FORMATS = {name: data for name, data in FORMATS.items() if data}


@often(fast=150, slow=4000)
def test_a_damaged_image_is_pixels_or_unusable(examples):
    seen = {"pixels": 0, "unusable": 0}

    @examples
    @given(st.sampled_from(sorted(FORMATS)).flatmap(lambda name: damaged(FORMATS[name])))
    def check(data: bytes) -> None:
        is_encoded(data)
        try:
            pixels = fit(decode(data, (8, 8, 3)), (8, 8, 3))
        except Unusable:
            seen["unusable"] += 1
        else:
            assert (pixels.shape, pixels.dtype) == ((8, 8, 3), np.uint8)
            seen["pixels"] += 1

    with little_memory():
        check()
    assert min(seen.values()) > 20, seen


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=PIXELS, labels=np.arange(6), classes=np.array(list("abcdef")))
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def tar(format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in (
            ("a.png", FORMATS["PNG"]),
            ("a.cls", b"1"),
            ("b.jpg", FORMATS["JPEG"]),
            ("b.json", b'{"label": 2}'),
            ("c" * 60 + "/" + "d" * 60 + ".png", FORMATS["PNG"]),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def parquet() -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    images = [{"bytes": FORMATS["PNG"], "path": "a.png"}, {"bytes": FORMATS["JPEG"], "path": "b.jpg"}]
    pq.write_table(pa.table({"image": images, "label": ["a", "b"]}), buffer)
    return buffer.getvalue()


SOURCES = {
    "images.npy": [npy(PIXELS), npy(PIXELS[..., 0] / np.float32(255))],
    "images.npz": [npz()],
    "images.tar": [tar(tarfile.USTAR_FORMAT), tar(tarfile.PAX_FORMAT), tar(tarfile.GNU_FORMAT)],
}


def tried(path: Path, data: bytes) -> bool:
    """Look at and open a file as images; return whether that is done, and not refused in one line."""
    path.write_bytes(data)
    wanted = DataConfig(str(path), "0..1" if b"<f4" in data[:80] else "none")
    done = 0
    for work in (survey, lambda data: open_dataset(data, UNET)):
        line = refused(lambda work=work: work(wanted))
        assert not line or path.name in line
        done += not line
    return done == 2


@pytest.mark.parametrize("name", sorted(SOURCES))
@often(fast=40, slow=300)
def test_a_damaged_file_of_many_images_is_a_data_set_or_a_sentence(name, examples, tmp_path):
    for data in SOURCES[name]:
        assert tried(tmp_path / name, data)
    seen = {True: 0, False: 0}

    @examples
    @given(st.sampled_from(SOURCES[name]).flatmap(damaged))
    def check(data: bytes) -> None:
        seen[tried(tmp_path / name, data)] += 1

    with little_memory():
        check()
    assert seen[False] > 5, seen


@often(fast=40, slow=300)
def test_a_damaged_parquet_file_is_a_data_set_or_a_sentence(examples, tmp_path):
    whole = parquet()
    assert tried(tmp_path / "images.parquet", whole)

    @examples
    @given(damaged(whole))
    def check(data: bytes) -> None:
        tried(tmp_path / "images.parquet", data)

    with little_memory():
        check()
