"""Files that were cut, exchanged or lie, data that changes, clocks that go back: a sentence, or a run that goes on."""

import json
import shutil
import struct
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig, with_training
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.runs import checkpoint, decisions, evaluation, origin
from ddpm_fast.runs.directory import check_resumable, find_start, read_config, read_metrics, recorded, where_data_is
from ddpm_fast.runs.guards import Guards
from ddpm_fast.runs.run import Run
from tests.refusals import refused

TINY = Config(
    unet=UNetConfig(1, 8, 8, channels=8, channel_multipliers=(1,), res_blocks=1, attention_resolutions=(), groups=4),
    diffusion=DiffusionConfig(timesteps=20, beta_end=0.5),
    data=DataConfig(data="digits"),
    training=TrainingConfig(steps=4, batch_size=4, log_every=1, save_every=2, sample_every=0, device="cpu"),
)
DATA = open_dataset(TINY.data, TINY.unet)


def run(directory: Path, config: Config = TINY, resume: bool = False) -> Run:
    data = DATA if config.data == TINY.data else open_dataset(config.data, config.unet)
    return Run(directory, config, data, find_start(directory, config, data.fingerprint, resume), progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    run(directory).train()
    return directory


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def lengths(data: bytes) -> list[int]:
    """Return 0, 1, all but 1, and a cut in the middle and at each end of some lines."""
    ends = [at + 1 for at, byte in enumerate(data) if byte == ord("\n")]
    near = {at + off for at in (*ends[:3], *ends[-3:]) for off in (-1, 0, 1)}
    return sorted({0, 1, len(data) // 2, len(data) - 1, *near} & set(range(len(data))))


def test_metrics_that_were_cut_anywhere_give_whole_lines_and_a_run_that_goes_on(copy):
    file = copy / "metrics.jsonl"
    data = file.read_bytes()
    assert len(lengths(data)) > 10
    for length in lengths(data):
        file.write_bytes(data[:length])
        kept = [line["step"] for line in read_metrics(copy)]
        assert kept == list(range(1, 1 + len(kept)))
        assert len(kept) in (data[:length].count(b"\n"), data[:length].count(b"\n") + 1)
        run(copy, with_training(TINY, steps=9), resume=True)  # sets everything up from what is left
        (copy / "config.json").write_bytes((copy / "config.json").read_bytes().replace(b'"steps": 9', b'"steps": 4'))
    file.write_bytes(data[: len(data) // 2])
    run(copy, with_training(TINY, steps=6), resume=True).train()
    assert [line["step"] for line in read_metrics(copy)][-2:] == [5, 6]


def test_a_configuration_that_was_cut_anywhere_is_the_checkpoints_and_a_run_that_goes_on(copy):
    file = copy / "config.json"
    data = file.read_bytes()
    for length in lengths(data)[:-1]:  # the last misses nothing but the final line break
        file.write_bytes(data[:length])
        assert recorded(copy) == (TINY, DATA.fingerprint)
        assert decisions.read(copy) is None
    run(copy, with_training(TINY, steps=5), resume=True).train()
    assert recorded(copy)[0].training.steps == 5
    shutil.rmtree(copy / "checkpoints")
    for length in lengths(data)[:-1]:
        file.write_bytes(data[:length])
        assert "config.json is torn" in refused(lambda: recorded(copy))


WRONG: list[Any] = [None, True, -1, 10**400, 1.5, float("nan"), float("inf"), "x", "", [], [[]], {}, {"x": {}}]


def exchanged(value: Any) -> Iterator[Any]:
    """Yield JSON with each part, the whole and each leaf, exchanged for others."""
    yield from WRONG
    if isinstance(value, dict):
        for key, part in value.items():
            yield from ({**value, key: other} for other in exchanged(part))
            yield {name: other for name, other in value.items() if name != key}
        yield {**value, "unknown": 1}


THINNED = pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.slow)])
"""Try one in so many, or all."""


@THINNED
def test_json_of_wrong_types_in_a_configuration_is_a_sentence(copy, every):
    file, count, refusals = copy / "config.json", 0, 0
    right = json.loads(file.read_text())
    for values in islice(exchanged(right), 0, None, every):
        file.write_text(json.dumps(values))
        count += 1
        refusals += bool(refused(lambda: read_config(copy)))
        refused(lambda: check_resumable(copy, TINY, DATA.fingerprint))
        refused(lambda: where_data_is(copy, TINY))
        decisions.read(copy)
    assert count > 800 // every
    assert refusals > 500 // every


@THINNED
def test_json_of_wrong_types_in_a_checkpoint_is_a_sentence(copy, every):
    path = checkpoint.path_of(copy, 4)
    file, refusals = path / "state.json", 0
    right = json.loads(file.read_text())
    for values in islice(exchanged(right), 0, None, every):
        file.write_text(json.dumps(values))
        refusals += bool(refused(lambda: checkpoint.read(path).verify()))
        newest = checkpoint.newest(copy)
        assert newest is not None
        assert newest.step in (2, 4)
    assert refusals > 500 // every


def test_json_of_wrong_types_in_metrics_and_origin_is_passed_over(copy):
    metrics, facts = copy / "metrics.jsonl", next((copy / "origin").glob("*.json"))
    line = metrics.read_text().splitlines()[0]
    running = run(copy, with_training(TINY, steps=9), resume=True)
    for values in islice(exchanged(json.loads(line)), 0, None, 2):
        metrics.write_text(f"{json.dumps(values)}\n")
        assert len(read_metrics(copy)) <= 1
        Guards(TINY, copy, running.trainer)
    for values in islice(exchanged(json.loads(facts.read_text())), 0, None, 197):  # each hashes all sources
        facts.write_text(json.dumps(values))
        origin.read(copy)
        origin.changed_since(copy)


@pytest.mark.parametrize("length", [0, 7, 2**20, 2**40, 2**63, 2**64 - 1])
def test_a_safetensors_header_that_lies_about_its_length_is_refused_by_the_files_name(copy, length):
    file = checkpoint.path_of(copy, 4) / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    assert str(file) in refused(lambda: checkpoint.read(file.parent).tensors("model"))


@pytest.mark.parametrize(
    ("truth", "lie"),
    [
        (b'"data_offsets":[0,', b'"data_offsets":[9,'),
        (b'"dtype":"F32"', b'"dtype":"F64"'),
        (b'"shape":[', b'"shape":[9'),
    ],
)
def test_a_safetensors_header_that_lies_about_a_tensor_is_refused_by_the_files_name(copy, truth, lie):
    file = checkpoint.path_of(copy, 4) / "model.safetensors"
    data, length = file.read_bytes(), struct.unpack("<Q", file.read_bytes()[:8])[0]
    header = data[8 : 8 + length].replace(truth, lie, 1)
    assert header != data[8 : 8 + length]
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    assert str(file) in refused(lambda: checkpoint.read(file.parent).tensors("model"))


def test_an_evaluation_that_is_damaged_is_made_again(copy):
    file = next((copy / "evaluation").glob("*.safetensors"))
    step, data = int(file.stem[5:]), file.read_bytes()
    for length in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        assert evaluation.read(copy, step) is None
    file.write_bytes(struct.pack("<Q", 2**62) + data[8:])
    assert evaluation.read(copy, step) is None


@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy's, on its way to the error
@pytest.mark.parametrize("shape", [(10**12, 8, 8), (2**62, 8, 8), (-1, 8, 8), (10, 8, 9)])
def test_an_array_whose_header_lies_about_its_size_is_one_line(tmp_path, shape):
    np.save(tmp_path / "images.npy", np.zeros((10, 8, 8), np.uint8))
    data = (tmp_path / "images.npy").read_bytes()
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': %s, }" % repr(shape).encode()
    header = text.ljust(128 - 10 - 1) + b"\n"
    (tmp_path / "images.npy").write_bytes(data[:10] + header + data[128:])
    wanted = DataConfig(data=str(tmp_path / "images.npy"))
    assert f"--data {tmp_path}/images.npy is" in refused(lambda: open_dataset(wanted, TINY.unet))


def test_a_folder_that_changes_under_a_run_changes_nothing_until_it_is_resumed(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(8):
        Image.fromarray(np.full((8, 8), 30 * i, np.uint8)).save(photos / f"{i}.png")
    config = Config(unet=TINY.unet, diffusion=TINY.diffusion, data=DataConfig(str(photos)), training=TINY.training)
    running, undisturbed = run(tmp_path / "a", config), run(tmp_path / "b", config)
    undisturbed.train()
    take_step = running.trainer.train_step_no_sync

    def change_and_step() -> None:
        if running.trainer.step == 1:
            (photos / "0.png").unlink()
            (photos / "1.png").write_bytes(b"\x89PNG")
            Image.fromarray(np.full((8, 8), 99, np.uint8)).save(photos / "2.png")
        take_step()

    running.trainer.train_step_no_sync = change_and_step
    running.train()
    for part in checkpoint.TENSOR_FILES:
        files = [checkpoint.path_of(tmp_path / name, 4) / f"{part}.safetensors" for name in "ab"]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert "1 of 7 images cannot be used: 1.png" in refused(lambda: run(tmp_path / "a", config, resume=True))
    (photos / "1.png").unlink()
    assert "was trained on other data" in refused(lambda: run(tmp_path / "a", config, resume=True))


def test_a_clock_that_goes_back_disturbs_no_run(tmp_path, whole, monkeypatch):
    now = iter(range(2_000_000_000, 0, -86_400))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    run(tmp_path / "run").train()
    for part in checkpoint.TENSOR_FILES:
        file = f"checkpoints/step-0000004/{part}.safetensors"
        assert (tmp_path / "run" / file).read_bytes() == (whole / file).read_bytes()
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert min(line["wall"]["seconds"] for line in lines) > 0
    newest = checkpoint.newest(tmp_path / "run")
    assert newest is not None
    assert newest.step == 4
