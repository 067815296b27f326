"""Tar files as WebDataset has them: examples by common names, classes, and members that no data set needs."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_fast.config import DataConfig, UNetConfig
from ddpm_fast.data.dataset import Dataset, open_dataset
from ddpm_fast.errors import InputError
from ddpm_fast.files import cache_directory

UNET = UNetConfig(3, 4, 6, channels=32, channel_multipliers=(1,), attention_resolutions=())
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[number]).save(buffer, "png")
    return buffer.getvalue()


def write(file: Path, *members: tuple[str | tarfile.TarInfo, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def opened(path: Path, **options) -> Dataset:
    return open_dataset(DataConfig(data=str(path), **options), UNET)


def check(dataset: Dataset, rows: list[int], labels: list[int] | None, classes: tuple[str, ...] = ()) -> None:
    np.testing.assert_array_equal(dataset.images, PIXELS[rows])
    assert (None if dataset.labels is None else dataset.labels.tolist()) == labels
    assert dataset.classes == classes


def test_examples_are_files_of_one_name_wherever_they_stand(tmp_path):
    file = write(
        tmp_path / "a.tar",
        ("./b.cls", b"7"),
        ("a.png", picture(1)),
        ("b.png", picture(0)),
        ("a.cls", b"3\n"),
        ("deep/er/a.PNG", picture(2)),
        ("deep/er/a.cls", b"7"),
        ("__MACOSX/._a.png", b"left by an archiver"),
        (".hidden.png", b""),
        ("notes.txt", b"of no example"),
    )
    for _ in range(2):  # decoded, then from the cache
        check(opened(file), [0, 1, 2], [7, 3, 7])


def test_shards_are_read_in_their_order_and_names_may_come_again(tmp_path):
    for shard, rows in ((0, (4, 0)), (1, (1,)), (2, (3, 2))):
        members = [
            (f"{place}.{ending}", content)
            for place, row in enumerate(rows)
            for ending, content in (("png", picture(row)), ("cls", b"cat" if row % 2 else b"dog"))
        ]
        write(tmp_path / f"shard-{shard}.tar", *members)
    check(opened(tmp_path), [4, 0, 1, 3, 2], [1, 1, 0, 0, 1], ("cat", "dog"))


def test_classes_in_json_or_in_a_text_that_is_named(tmp_path):
    members = [(f"{i}.json", f'{{"label": {i % 2}, "style": "s{i}"}}'.encode()) for i in range(3)]
    members += [(f"{i}.png", picture(i)) for i in range(3)] + [(f"{i}.txt", b"a caption") for i in range(3)]
    file = write(tmp_path / "a.tar", *members)
    check(opened(file), [0, 1, 2], [0, 1, 0])
    check(opened(file, label_column="style"), [0, 1, 2], [0, 1, 2], ("s0", "s1", "s2"))
    check(opened(file, label_column="txt"), [0, 1, 2], [0, 0, 0], ("a caption",))
    with pytest.raises(InputError, match=r"--label-column colour: an example of .* has neither such a file nor"):
        opened(file, label_column="colour")


def test_of_several_pictures_one_must_be_named(tmp_path):
    file = write(tmp_path / "a.tar", ("1.png", picture(0)), ("1.seg.png", picture(1)))
    with pytest.raises(InputError, match=r"1 has several images: name one of png, seg\.png by --image-column"):
        opened(file)
    check(opened(file, image_column="seg.png"), [1], None)
    with pytest.raises(InputError, match="holds no image of the ending jpg"):
        opened(file, image_column="jpg")


def test_a_broken_picture_takes_its_label_along(tmp_path):
    members = [(f"{i}.cls", b"%d" % i) for i in range(3)]
    members += [("0.png", picture(0)), ("1.png", picture(1)[:60]), ("2.png", picture(2)), ("3.png", b"")]
    file = write(tmp_path / "a.tar", *members, ("3.cls", b"9"))
    with pytest.raises(InputError, match=r"2 of 4 .*a\.tar: 1\.png \(.*a\.tar: 3\.png \(zero bytes\)"):
        opened(file)
    check(opened(file, skip_bad=True), [0, 2], [0, 2])


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("member", "says"),
    [
        ("../up.png", r"holds \.\./up\.png, a path that leads out of it"),
        ("a/../../up.png", r"holds a/\.\./\.\./up\.png, a path that leads out of it"),
        ("/etc/up.png", r"holds /etc/up\.png, a path that leads out of it"),
        ("line\nbreak/../a.png", r"holds line\?break"),
        (special("a.png", tarfile.SYMTYPE, "/etc/passwd"), r"holds a\.png, a link"),
        (special("a.png", tarfile.LNKTYPE, "b.png"), r"holds a\.png, a link"),
        (special("a.png", tarfile.CHRTYPE), r"holds a\.png, a device"),
        (special("a.png", tarfile.BLKTYPE), r"holds a\.png, a device"),
        (special("a.png", tarfile.FIFOTYPE), r"holds a\.png, a device"),
    ],
)
def test_members_that_reach_out_are_refused_by_name(tmp_path, member, says):
    file = write(tmp_path / "in/a.tar", ("ok.png", picture(0)), (member, b""))
    with pytest.raises(InputError, match=says) as refused:
        opened(file, skip_bad=True)
    assert "\n" not in str(refused.value)
    assert list(cache_directory().glob("*.npy")) == []
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "a.tar"]


def test_files_that_are_no_tars_and_tars_without_pictures_are_named(tmp_path):
    whole = write(tmp_path / "a.tar", ("1.png", picture(0)), ("2.png", picture(1))).read_bytes()
    for name, content in (("empty", b""), ("text", b"hello" * 200), ("cut", whole[:600]), ("cut-2", whole[:1100])):
        (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}\.tar is damaged, compressed or no tar file"):
            opened(tmp_path / f"{name}.tar")
    (tmp_path / "packed.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(InputError, match="compressed"):
        opened(tmp_path / "packed.tar")
    with pytest.raises(InputError, match="holds no image"):
        opened(write(tmp_path / "none.tar", ("1.txt", b"a")))
    with pytest.raises(InputError, match=r"holds 1\.png twice"):
        opened(write(tmp_path / "twice.tar", ("1.png", picture(0)), ("1.png", picture(1))))
    with pytest.raises(InputError, match=r"1\.json is no JSON"):
        opened(write(tmp_path / "json.tar", ("1.png", picture(0)), ("1.json", b"{")))
