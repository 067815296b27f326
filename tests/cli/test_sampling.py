"""Images on disk as a user finds them: what is there is not made again, and no two kinds are in one directory."""

import json
import os
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("tyro")
from ddpm_fast.cli import main as cli
from ddpm_fast.config import Config, DiffusionConfig, TrainingConfig, UNetConfig
from ddpm_fast.engine.sampling import SamplingLoop
from ddpm_fast.errors import InputError
from ddpm_fast.model.unet import UNet
from ddpm_fast.options import SamplingOptions
from ddpm_fast.runs import checkpoint, origin
from ddpm_fast.runs.archives import Parts
from ddpm_fast.runs.samples import GRID_IMAGES, ranges
from ddpm_fast.runs.trained_model import options_from

TINY = Config(
    unet=UNetConfig(1, 8, 8, channels=8, channel_multipliers=(1,), res_blocks=1, attention_resolutions=(), groups=4),
    diffusion=DiffusionConfig(timesteps=20, beta_end=0.5),
    training=TrainingConfig(steps=9, batch_size=4, device="cpu"),
)
QUICK = "--sampler ddim --steps 2 --device cpu"


def save(run: Path, step: int) -> None:
    parts = {}
    for seed, part in enumerate(checkpoint.TENSOR_FILES, start=10 * step):
        torch.manual_seed(seed)
        weights = UNet(TINY.unet).named_parameters()
        parts[part] = {name: p.detach() + 0.1 * torch.randn(p.shape) for name, p in weights}
    checkpoint.save(run, step, TINY, "", parts)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    save(tmp_path / "run", 7)
    return tmp_path / "run"


def sample(arguments: str, capsys: pytest.CaptureFixture[str], status: int = 0) -> str:
    """Sample in this process; return what was said, in one line where it was refused."""
    capsys.readouterr()
    assert cli.run(["sample", *arguments.split(), *QUICK.split()]) == status
    out, err = capsys.readouterr()
    assert status == 0 or err.count("\n") == 1
    return out + err


def facts(directory: Path) -> dict:
    return json.loads((directory / "samples.json").read_text())


def pngs(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.glob("0*.png"))}


class Killed(BaseException):
    """The process ends here: nothing that follows is done."""


def kill_at_batch(number: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have the process end in a batch; return the sizes of the batches that were begun, as they begin."""
    run, begun = SamplingLoop.run, list[int]()

    def run_or_end(loop, address, *rest):
        begun.append(len(address.sample_index))
        if len(begun) == number:
            raise Killed
        return run(loop, address, *rest)

    monkeypatch.setattr(SamplingLoop, "run", run_or_end)
    return begun


@pytest.mark.parametrize("format", ["png", "npz", "tar"])
def test_after_a_kill_the_same_command_makes_the_rest_to_the_byte(trained, tmp_path, format, monkeypatch, capsys):
    asked = f"{trained} -n 11 --first-index 5 --batch-size 4 --format {format}"
    sample(f"{asked} --out {tmp_path}/whole", capsys)
    begun = kill_at_batch(3, monkeypatch)
    with pytest.raises(Killed):
        cli.run(["sample", *asked.split(), *QUICK.split(), "--out", f"{tmp_path}/killed"])
    assert facts(tmp_path / "killed")["complete"] is False
    assert begun == [4, 4, 4]
    assert "11 images (8 of them were there)" in sample(f"{asked} --out {tmp_path}/killed", capsys)
    assert begun == [4, 4, 4, 4]
    whole, again = ({file.name: file for file in (tmp_path / name).iterdir()} for name in ("whole", "killed"))
    assert whole.keys() == again.keys()
    for name in whole.keys() - {"samples.json"}:
        assert whole[name].read_bytes() == again[name].read_bytes(), name
    found = facts(tmp_path / "killed")
    assert (found["complete"], found["images"]) == (True, [[5, 15]])
    assert "(11 of them were there)" in sample(f"{asked} --out {tmp_path}/killed", capsys)
    assert begun == [4, 4, 4, 4]


@pytest.mark.parametrize("format", ["npz", "tar"])
def test_an_archive_killed_while_it_is_packed_is_packed_again(trained, tmp_path, format, monkeypatch, capsys):
    out = tmp_path / "out"

    def killed(parts: Parts, *which: int):
        raise Killed

    monkeypatch.setattr(Parts, "batches", killed)
    with pytest.raises(Killed):
        sample(f"{trained} -n 5 --batch-size 2 --format {format} --out {out}", capsys)
    assert {file.name for file in out.iterdir()} == {"parts", "samples.json"}
    monkeypatch.undo()
    next((out / "parts").iterdir()).write_bytes(b"torn")
    assert "(3 of them were there)" in sample(f"{trained} -n 5 --batch-size 2 --format {format} --out {out}", capsys)
    assert {file.name for file in out.iterdir()} == {f"images.{format}", "grid.png", "samples.json"}


def test_archives_hold_what_the_files_hold(trained, tmp_path, capsys):
    for format in ("png", "npz", "tar"):
        sample(f"{trained} -n 5 --batch-size 2 --first-index 98 --format {format} --out {tmp_path}/{format}", capsys)
    files = pngs(tmp_path / "png")
    with np.load(tmp_path / "npz/images.npz") as archive:
        assert archive.files == ["arr_0"]
        images = archive["arr_0"]
    assert (images.shape, images.dtype) == ((5, 8, 8, 1), np.uint8)
    with tarfile.open(tmp_path / "tar/images.tar") as archive:
        assert archive.getnames() == list(files)
        for image, member in zip(images, archive.getmembers(), strict=True):
            read = archive.extractfile(member)
            assert read is not None
            assert read.read() == files[member.name]
            assert np.array_equal(np.asarray(Image.open(tmp_path / "png" / member.name)), image[..., 0])


def test_parts_of_other_batches_overlap(tmp_path):
    parts, pixels = Parts(tmp_path), np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1)
    for first, count in ((0, 5), (3, 1), (3, 4), (7, 5)):
        parts.add(first, pixels[first : first + count])
    assert np.concatenate(list(parts.batches(2, 9))).ravel().tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert parts.numbers() == set(range(12))


def test_fewer_and_more_images_agree_with_the_files(trained, capsys):
    made = trained / "samples/ddim-2-seed0"
    for arguments, said, there in (
        ("-n 4", "4 images in", [[0, 3]]),
        ("-n 2", "2 images (2 of them", [[0, 3]]),
        ("-n 2 --first-index 6", "2 images in", [[0, 3], [6, 7]]),
        ("-n 7", "7 images (5 of them", [[0, 7]]),
    ):
        before = pngs(made)
        assert said in sample(f"{trained} {arguments}", capsys)
        assert facts(made)["images"] == there
        assert pngs(made).items() >= before.items()
        assert len(pngs(made)) == sum(last - first + 1 for first, last in there)
    with Image.open(made / "grid.png") as grid:  # 8 images, in 3 columns and 3 rows
        assert grid.width == grid.height == (3 * 10 + 2) * (grid.width // 32)
    assert [entry.name for entry in (trained / "samples").iterdir()] == [made.name]


def test_what_is_torn_is_made_again_and_others_files_stay(trained, capsys):
    made = trained / "samples/ddim-2-seed0"
    sample(f"{trained} -n 4", capsys)
    before = pngs(made)
    (made / "mine.txt").write_text("keep")
    (made / "000002.png").write_bytes(before["000002.png"][:-5])
    assert "(3 of them were there)" in sample(f"{trained} -n 4", capsys)
    assert pngs(made) == before
    assert (made / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("arguments", "directory"),
    [
        ("--weights raw", "ddim-2-raw-seed0"),
        ("--seed 3", "ddim-2-seed3"),
        ("--eta 0.5 --spacing leading", "ddim-2-eta0.5-leading-seed0"),
        ("--precision bf16", "ddim-2-bf16-seed0"),
        ("--precision fp32", "ddim-2-seed0"),
        ("--format tar -n 3", "ddim-2-seed0-0to2-tar"),
        ("--format npz -n 3 --first-index 7", "ddim-2-seed0-7to9-npz"),
    ],
)
def test_each_kind_has_a_directory(trained, arguments, directory, capsys):
    sample(f"{trained} -n 1", capsys)
    kept = pngs(trained / "samples/ddim-2-seed0")
    sample(f"{trained} -n 2 {arguments}", capsys)
    assert {entry.name for entry in (trained / "samples").iterdir()} == {"ddim-2-seed0", directory}
    assert pngs(trained / "samples/ddim-2-seed0").items() >= kept.items()
    other = f"{trained} -n 2 --out {trained}/samples/{directory}"
    if directory != "ddim-2-seed0":
        assert "holds other images" in sample(other, capsys, status=2)


def test_other_steps_and_other_code_have_directories_of_their_own(trained, monkeypatch, capsys):
    def made() -> set[str]:
        return {entry.name for entry in (trained / "samples").iterdir()}

    sample(f"{trained} -n 1", capsys)
    save(trained, 8)
    sample(f"{trained} -n 1", capsys)
    assert made() == {"ddim-2-seed0", "ddim-2-seed0-2"}
    assert [facts(trained / f"samples/{name}")["checkpoint_step"] for name in sorted(made())] == [7, 8]
    sample(f"{trained}/checkpoints/step-0000007 -n 1", capsys)
    assert made() == {"ddim-2-seed0", "ddim-2-seed0-2", "ddim-2-seed0-step0000007"}
    monkeypatch.setattr(origin, "images_digest", lambda: "another")
    sample(f"{trained} -n 1", capsys)
    assert made() >= {"ddim-2-seed0-3"}
    said = sample(f"{trained} -n 1 --out {trained}/samples/ddim-2-seed0-2", capsys, status=2)
    assert f"--out {trained}/samples/ddim-2-seed0-2 holds other images (other code): name another --out" in said


@pytest.mark.parametrize("torn", [None, "", "[]", '{"seed": 0}'])
def test_images_of_unknown_making_are_never_mixed_with(trained, torn, capsys):
    made = trained / "samples/ddim-2-seed0"
    sample(f"{trained} -n 1", capsys)
    (made / "samples.json").unlink()
    if torn is not None:
        (made / "samples.json").write_text(torn)
    before = sorted(trained.rglob("*"))
    assert "holds other images" in sample(f"{trained} -n 2 --out {made}", capsys, status=2)
    assert sorted(trained.rglob("*")) == before
    sample(f"{trained} -n 2", capsys)
    assert sorted(pngs(trained / "samples/ddim-2-seed0-2")) == ["000000.png", "000001.png"]


def test_a_grid_shows_the_first_of_many(trained, capsys):
    said = sample(f"{trained} -n {GRID_IMAGES + 1} --batch-size 200", capsys)
    assert f"grid.png shows the first {GRID_IMAGES})" in said
    with Image.open(trained / "samples/ddim-2-seed0/grid.png") as grid:
        assert grid.width == grid.height


def test_an_animation_can_be_asked_for_later(trained, capsys):
    made = trained / "samples/ddim-2-seed0"
    sample(f"{trained} -n 3", capsys)
    before = pngs(made)
    assert "(3 of them were there)" in sample(f"{trained} -n 3 --animate", capsys)
    assert (made / "animation.gif").exists()
    assert pngs(made) == before


def test_a_signal_says_how_many_are_missing(trained, tmp_path, monkeypatch, capsys):
    run, calls = SamplingLoop.run, list[int]()

    def run_and_signal(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return run(*arguments)

    monkeypatch.setattr(SamplingLoop, "run", run_and_signal)
    out = tmp_path / "out"
    said = sample(f"{trained} -n 4 --batch-size 2 --out {out}", capsys, status=130)
    assert f"SIGINT: interrupted; {out}: 2 of 4 images are missing; the same command goes on" in said
    assert list(pngs(out)) == ["000000.png", "000001.png"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--precision tf32", "--precision tf32 is an NVIDIA GPU's, and this is computed on cpu: leave it out, or say"),
        ("--format zip", "'png', 'npz', 'tar'"),
    ],
)
def test_what_would_be_ignored_is_refused(trained, arguments, says, capsys):
    assert says in sample(f"{trained} {arguments}", capsys, status=2)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++"])
def test_eta_is_ddims(sampler):
    with pytest.raises(InputError, match=rf"--eta is 0.5: {sampler.replace('+', '.')} has no use for it"):
        options_from(SamplingOptions, {"sampler": sampler, "eta": 0.5})


def test_ranges():
    assert ranges(set()) == []
    assert ranges({7, 0, 2, 1, 9, 8}) == [(0, 2), (7, 9)]


def test_a_copied_checkpoint_is_sampled_beside_itself(trained, tmp_path, capsys):
    shutil.copytree(trained / "checkpoints/step-0000007", tmp_path / "model")
    sample(f"{tmp_path}/model -n 1", capsys)
    assert (tmp_path / "model/samples/ddim-2-seed0/000000.png").exists()
