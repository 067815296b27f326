"""A store stays as it was read: whatever its source's owner does, and however many write the same one at once."""

import os
import platform
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_fast.config import DataConfig, UNetConfig
from ddpm_fast.data import arrays, store
from ddpm_fast.data.dataset import Dataset, open_dataset
from ddpm_fast.errors import InputError
from ddpm_fast.files import cache_directory

ROOT = Path(__file__).parents[2]
UNET = UNetConfig(3, 4, 6, channels=32, channel_multipliers=(1,), attention_resolutions=())
PIXELS = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), dtype=np.uint8)


def opened(path: Path, **options) -> Dataset:
    return open_dataset(DataConfig(data=str(path), **options), UNET)


def test_an_array_that_its_owner_rewrites_in_place_does_not_change_under_a_run(tmp_path):
    np.save(tmp_path / "a.npy", PIXELS)
    first = opened(tmp_path / "a.npy")
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r+")
    mapped[3] ^= 255
    mapped.flush()
    np.testing.assert_array_equal(first.images, PIXELS)
    second = opened(tmp_path / "a.npy")
    np.testing.assert_array_equal(second.images[3], PIXELS[3] ^ 255)
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("shape", [(4, 6), (8, 12)])  # copied as it is, and resized
def test_an_array_that_changes_while_it_is_copied_is_refused(tmp_path, monkeypatch, shape):
    np.save(tmp_path / "a.npy", np.resize(PIXELS, (7, *shape, 3)))

    def rewrite(*arguments, **options):
        mapped = np.load(tmp_path / "a.npy", mmap_mode="r+")
        mapped[5] ^= 255
        mapped.flush()
        return store.in_parallel(*arguments, **options)

    monkeypatch.setattr(arrays, "in_parallel", rewrite)
    with pytest.raises(InputError, match="changed while it was read: try again"):
        opened(tmp_path / "a.npy")
    assert list(cache_directory().glob("*.npy")) == []


def test_a_mapped_store_outlives_its_file_and_its_successor(tmp_path):
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    first = opened(tmp_path)
    file = cache_directory() / f"{first.fingerprint}.npy"
    inode = file.stat().st_ino
    for damaged in (b"", file.read_bytes()):
        file.with_suffix(".other").write_bytes(damaged)
        file.with_suffix(".other").replace(file)
        (cache_directory() / f"{first.fingerprint}.json").unlink()  # so that it is made again
        opened(tmp_path)
        assert file.stat().st_ino != inode
        np.testing.assert_array_equal(first.images[0], PIXELS[0])


SLOWED_DOWN = """
import sys, time
import numpy as np
from ddpm_fast.config import DataConfig, UNetConfig
from ddpm_fast.data import pictures
from ddpm_fast.data.dataset import open_dataset

decode = pictures.decode
pictures.decode = lambda *given: (time.sleep(0.05), decode(*given))[1]
print("ready", flush=True)
sys.stdin.readline()
unet = UNetConfig(3, 4, 6, channels=32, channel_multipliers=(1,), attention_resolutions=())
print(np.asarray(open_dataset(DataConfig(data=sys.argv[1]), unet).images).tobytes().hex())
"""


def test_processes_that_decode_the_same_pictures_at_once_all_end_up_right(tmp_path):
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    command = [sys.executable, "-c", SLOWED_DOWN, str(tmp_path)]
    both = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True, cwd=ROOT) for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:  # together: neither has read what the other is writing
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[0].strip() for process in both] == 2 * [PIXELS.tobytes().hex()]
    assert sorted(file.suffix for file in cache_directory().iterdir()) == [".json", ".npy"]


@pytest.mark.parametrize(("shape", "count"), [((64, 64), 300), ((4, 6), 6000)])
@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_an_array_may_be_larger_than_memory(tmp_path, monkeypatch, kind, shape, count):
    """Of a mapped file no more than a part is ever copied to memory of ours, which is what is traced."""
    monkeypatch.setattr(arrays, "CHUNK", 16)
    monkeypatch.setattr(store, "AT_ONCE", 16)
    monkeypatch.setattr(arrays, "fit", lambda image, shape: image[:4, :6])  # of which nothing is asked here
    np.save(tmp_path / "first.npy", PIXELS)
    opened(tmp_path / "first.npy")  # imports what is imported late
    pixels = np.resize(PIXELS, (count, *shape, 3))
    np.save(tmp_path / "a.npy", pixels if kind == "uint8" else pixels / np.float32(255))
    del pixels
    tracemalloc.start()
    assert len(opened(tmp_path / "a.npy", float_range="none" if kind == "uint8" else "0..1")) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (tmp_path / "a.npy").stat().st_size / 4


@pytest.mark.skipif(os.name != "posix", reason="needs to ask whether a process runs")
def test_what_a_killed_process_left_is_removed_and_what_others_write_stays(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(100):
        Image.fromarray(PIXELS[i % 7]).save(tmp_path / f"images/{i}.png")
    killed = subprocess.Popen([sys.executable, "-c", SLOWED_DOWN, str(tmp_path / "images")], stdin=-1, cwd=ROOT)
    assert killed.stdin is not None
    killed.stdin.write(b"\n")
    killed.stdin.flush()
    while not (left := list(cache_directory().glob("*.npy"))):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    killed.stdin.close()
    assert [file.name for file in left] == [file.name for file in cache_directory().glob(".*.tmp.npy")]
    here, there = (left[0].name.replace(f".{killed.pid}.", other) for other in (f".{os.getpid()}.", ".1."))
    others = [here, there.replace(platform.node(), "elsewhere")]
    for name in others:
        (cache_directory() / name).write_bytes(b"half of one")
    np.save(tmp_path / "a.npy", PIXELS)
    key = opened(tmp_path / "a.npy").fingerprint
    assert {file.name for file in cache_directory().iterdir()} == {f"{key}.npy", *others}
