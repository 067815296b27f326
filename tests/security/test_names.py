"""Names and texts from elsewhere: they lead out of no folder, are executed by nothing, and reach no page unescaped."""

import io
import json
import shlex
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_fast.runs import checkpoint, origin
from ddpm_fast.runs.compare import open_run
from ddpm_fast.runs.grids import grid
from ddpm_fast.runs.page import Picture, write_comparison
from tests.runs.test_compare import recorded
from tests.runs.test_page import Tree
from tests.runs.test_run import signal_when_called
from tests.security.commands import TINY, command, refused


@pytest.mark.parametrize("name", ["../up.png", "/tmp/up.png", "a/../../up.png"])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_tar_writes_nothing_whatever_its_members_are_called(name, kind, tmp_path, capsys):
    picture, folder = io.BytesIO(), tmp_path / "in"
    Image.new("L", (8, 8)).save(picture, "png")
    folder.mkdir()
    with tarfile.open(folder / "images.tar", "w") as archive:
        for called, type_ in (("ok.png", tarfile.REGTYPE), (name, kind)):
            member = tarfile.TarInfo(called)
            member.type, member.linkname, member.size = type_, "../../secret.png", len(picture.getvalue())
            archive.addfile(member, io.BytesIO(picture.getvalue()))
    assert "images.tar holds" in refused(capsys, "data", folder / "images.tar", "--out", tmp_path / "x.png")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["images.tar", "in"]


def test_a_run_s_code_archive_is_read_and_never_unpacked(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "in/run")
    (archive,) = (run / "origin").glob("*.zip")
    before = sorted(tmp_path.rglob("*"))
    with zipfile.ZipFile(archive, "w") as opened:
        for name in ("../../up.py", "/tmp/up-of-ddpm-fast.py", "engine/../../../up.py"):
            opened.writestr(name, "raise SystemExit(9)")
    found = origin.read(run)
    assert found is not None
    assert "../../up.py" in found.sources
    assert command(capsys, "compare", run, trained)[0] == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/up-of-ddpm-fast.py").exists()


@pytest.mark.parametrize("named", ["../../other/checkpoints/step-0000009", "/etc", "a\0b", "..", "", "x" * 5000])
def test_latest_leads_nowhere_else(named, trained, tmp_path, monkeypatch):
    run, other = shutil.copytree(trained, tmp_path / "run"), shutil.copytree(trained, tmp_path / "other")
    checkpoint.path_of(other, 3).rename(checkpoint.path_of(other, 9))
    (run / "checkpoints/latest").write_text(f"{named}\n")
    opened, read = list[Path](), checkpoint.read
    monkeypatch.setattr(checkpoint, "read", lambda path, *rest: opened.append(path) or read(path, *rest))
    newest = checkpoint.newest_whole(run)
    assert newest is not None
    assert newest.path == checkpoint.path_of(run, 3)
    assert {path.parent for path in opened} <= {run / "checkpoints", run}


EVIL = """<script>alert(1)</script>"'&<img src=x onerror=alert(1)>"""


def test_no_name_or_text_reaches_a_page_unescaped(tmp_path):
    called = EVIL.replace("/", "\N{DIVISION SLASH}")  # which no file's name may hold
    base, other = (
        open_run(recorded(tmp_path / f"{name}{called}", shift=shift)) for name, shift in (("a", 0), ("b", 1))
    )
    assert other.origin is not None
    other.origin.sources[f"{EVIL}.py"] = f"{EVIL}\n"
    other.origin.facts[EVIL] = EVIL
    picture = Picture(grid(np.zeros((4, 8, 8, 1), np.uint8)), 3)
    write_comparison(tmp_path / "page.html", base, [other], {base.path: picture, other.path: picture}, EVIL)
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text
    assert "<img src=x" not in text
    tags = Tree()
    tags.feed(text)  # which fails on a tag that is not closed
    assert all(source.startswith("data:image/png;base64,") for source in tags.fetched)
    assert text.count("&lt;script&gt;") > 10


def test_the_line_that_continues_a_run_means_its_directory_to_a_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = "a run; touch hacked $(touch hacked) `touch hacked` 'and \"more"
    signal_when_called(monkeypatch, "ddpm_fast.runs.origin.describe")
    status, said = command(capsys, "train", "--out", out, *TINY, "--sample-every", 0)
    assert status == 143
    assert shlex.split(said.partition("continue by ")[2]) == ["ddpm-fast", "train", "--out", out, "--resume"]


def test_a_configuration_that_is_code_is_text(trained, tmp_path, capsys, marker):
    run = shutil.copytree(trained, tmp_path / "run")
    values = json.loads((run / "config.json").read_text())
    values["config"]["preset"] = f"{{{{ cycler.__init__.__globals__.os.system('touch {marker}') }}}} $(touch {marker})"
    (run / "config.json").write_text(json.dumps(values))
    assert command(capsys, "compare", run, trained, "--out", tmp_path / "page.html", "--images", 0)[0] == 0
    assert command(capsys, "ls", run)[0] == 0
    assert not marker.exists()
