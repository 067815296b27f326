"""The Python interface: README's lines run as they stand, images are the command line's, errors are one line."""

import dataclasses
import io
import json
import re
import subprocess
import sys
import threading
import typing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("tyro")
import ddpm_fast
from ddpm_fast.cli import main as cli
from ddpm_fast.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    SamplerConfig,
    TrainingConfig,
    UNetConfig,
    with_training,
)
from ddpm_fast.model.unet import UNet
from ddpm_fast.options import LoadOptions, SamplingOptions
from ddpm_fast.presets import PRESETS
from ddpm_fast.runs import checkpoint
from ddpm_fast.runs.grids import grid, to_uint8
from ddpm_fast.runs.trained_model import LoadKeywords, SamplingKeywords

ROOT = Path(__file__).parents[1]
TINY = Config(
    preset="digits",
    unet=UNetConfig(1, 8, 8, channels=8, channel_multipliers=(1,), res_blocks=1, attention_resolutions=(), groups=4),
    diffusion=DiffusionConfig(timesteps=60, beta_end=0.3),
    data=DataConfig(data="digits"),
    training=TrainingConfig(steps=3, batch_size=4, log_every=1, sample_every=0, device="cpu"),
)


@pytest.fixture(autouse=True)
def digits_are_tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the preset "digits" be a run of a second, and runs/ lie in a directory of the test's own."""
    monkeypatch.setitem(PRESETS, "digits", TINY)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("api"), TINY)


def untrained(run: Path, config: Config) -> Path:
    """Write a checkpoint with weights drawn at random: other ones as averaged than as last trained."""
    parts = {}
    for seed, part in enumerate(checkpoint.TENSOR_FILES):
        torch.manual_seed(seed)
        parts[part] = {
            name: p.detach() + 0.02 * torch.randn(p.shape) for name, p in UNet(config.unet).named_parameters()
        }
    checkpoint.save(run, 7, config, "", parts)
    return run


def test_the_readmes_lines_run_as_they_stand(capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, typing.Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert isinstance(names["run"], ddpm_fast.TrainedRun)
    assert [len(names["images"]), names["x"].shape, names["x"].dtype] == [16, (4, 1, 8, 8), torch.float32]
    saved = sorted(path.name for path in Path().glob("*.png"))
    assert saved == sorted(re.findall(r"save\(\"(.*?)\"\)", code)) != []
    assert "checks passed" in capsys.readouterr().out


def test_every_public_name_is_there_and_no_other():
    for name in ddpm_fast.__all__:
        assert getattr(ddpm_fast, name) is not None
    assert set(dir(ddpm_fast)) == set(ddpm_fast.__all__)
    with pytest.raises(AttributeError, match="module 'ddpm_fast' has no attribute 'trian'"):
        ddpm_fast.trian  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_the_package_imports_nothing_else_of_it():
    code = "import ddpm_fast, sys; print([name for name in sys.modules if name.startswith('ddpm_fast.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("keywords", "options", "others"),
    [(LoadKeywords, LoadOptions, set()), (SamplingKeywords, SamplingOptions, {"count"})],
)
def test_keywords_are_the_options_fields(keywords, options, others):
    fields = {f.name: f.type for f in dataclasses.fields(options) if f.name not in others}
    hints = typing.get_type_hints(keywords)
    assert hints.keys() == fields.keys()
    wider = {"label", "guide"}  # one label is a list of one, a path its text
    assert [name for name in fields if hints[name] != fields[name] and name not in wider] == []


def test_images_are_those_of_the_command_line(trained, tmp_path):
    images = ddpm_fast.load(trained).sample(3, seed=5, first_index=17, progress=False)
    with pytest.raises(SystemExit, match="0"):
        cli.main(f"sample {trained} -n 3 --seed 5 --first-index 17 --out {tmp_path}/out".split())
    for number, image in enumerate(images, start=17):
        with Image.open(tmp_path / f"out/{number:06d}.png") as written:
            assert (written.mode, written.size) == (image.mode, image.size)
            assert written.tobytes() == image.tobytes()


def test_a_tensor_is_what_the_pictures_show(trained):
    model = ddpm_fast.load(str(trained))
    options: SamplingKeywords = {"seed": 3, "sampler": "ddim", "steps": 5, "batch_size": 2}
    x = model.sample(4, return_tensor=True, progress=False, **options)
    images = model.sample(4, progress=False, **options)
    assert (x.shape, x.dtype, x.device.type) == ((4, 1, 8, 8), torch.float32, "cpu")
    for values, image in zip(x, images, strict=True):
        expected = ((values[0].numpy().astype(np.float64).clip(-1, 1) + 1) * 127.5).round()
        assert np.abs(np.asarray(image) - expected).max() <= 1


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_images_have_the_models_mode_and_resolution(tmp_path, channels, mode):
    unet = replace(TINY.unet, image_channels=channels, height=6, width=10)
    model = ddpm_fast.load(untrained(tmp_path, replace(TINY, unet=unet)))
    (image,) = model.sample(1, steps=2, progress=False)
    assert (image.mode, image.size) == (mode, (10, 6))


def test_a_notebook_shows_a_grid(trained):
    images = ddpm_fast.load(trained).sample(5, steps=2, progress=False)
    png = images._repr_png_()
    assert png is not None
    with Image.open(io.BytesIO(png)) as shown:
        pixels = np.stack([np.asarray(image)[..., None] for image in images])
        assert np.array_equal(np.asarray(shown), np.asarray(grid(pixels)))
    images.clear()
    assert images._repr_png_() is None


def test_weights_are_those_that_were_asked_for(trained):
    saved = {part: checkpoint.resolve(trained).tensors(part) for part in ("ema", "model")}
    models = {"ema": ddpm_fast.load(trained), "model": ddpm_fast.load(trained, weights="raw")}
    for part, model in models.items():
        assert (model.step, model.config) == (7, TINY)
        for name, p in model.unet.named_parameters():
            torch.testing.assert_close(p, saved[part][name], rtol=0, atol=0)


def test_a_stream_yields_batches_of_samples_images(trained):
    model = ddpm_fast.load(trained)
    options: SamplingKeywords = {"seed": 3, "steps": 5, "first_index": 4, "batch_size": 2}
    images = model.sample(5, progress=False, **options)
    batches = list(model.stream(5, progress=False, **options))
    assert [(first, len(batch)) for first, batch in batches] == [(4, 2), (6, 2), (8, 1)]
    streamed = [image for _, batch in batches for image in batch]
    assert [image.tobytes() for image in streamed] == [image.tobytes() for image in images]
    with pytest.raises(ddpm_fast.InputError, match="--steps is 61"):
        model.stream(1, steps=61)


def test_the_loop_is_kept_for_a_sampler_and_follows_the_weights(trained):
    model = ddpm_fast.load(trained)
    first = model.sample(2, steps=3, return_tensor=True, progress=False)
    loop = model.loop
    assert torch.equal(first, model.sample(2, steps=3, return_tensor=True, progress=False))
    assert model.loop is loop
    model.unet.conv_out.weight.add_(0.3)
    changed = model.sample(2, steps=3, return_tensor=True, progress=False)
    assert model.loop is loop
    assert (first - changed).abs().max() > 0.01
    model.sample(2, steps=4, progress=False)
    assert model.loop is not loop


QUICK = replace(TINY, sampling=SamplerConfig("dpm++", 5))


def test_a_sampler_that_is_left_out_is_the_runs_own(tmp_path, capsys):
    model = ddpm_fast.load(untrained(tmp_path / "run", QUICK))
    for asked, meant in ((0, 5), (3, 3)):
        own = model.sample(2, return_tensor=True, progress=False, steps=asked)
        assert torch.equal(own, model.sample(2, return_tensor=True, progress=False, sampler="dpm++", steps=meant))
    own = model.sample(2, return_tensor=True, progress=False, sampler="ddim")
    assert torch.equal(own, model.sample(2, return_tensor=True, progress=False, sampler="ddim", steps=60))
    for arguments, name in (([], "dpm++-5"), (["--steps", "3"], "dpm++-3"), (["--sampler", "ddpm"], "ddpm-60")):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["sample", str(tmp_path / "run"), "-n", "1", *arguments])
        facts = json.loads((tmp_path / f"run/samples/{name}-seed0/samples.json").read_text())
        assert f"{facts['sampler']}-{facts['steps']}" == name


@pytest.mark.slow
def test_a_presets_sampler_goes_into_the_run_whatever_flags_are_given(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "digits", QUICK)
    assert cli.parse_train(["--steps", "2"]).config == with_training(QUICK, steps=2)
    made = ddpm_fast.train(steps=2, progress=False)
    assert json.loads((made.directory / "config.json").read_text())["config"]["sampling"]["sampler"] == "dpm++"
    assert made.load().config.sampling == QUICK.sampling
    monkeypatch.setitem(PRESETS, "digits", TINY)  # a later version's
    continued = ddpm_fast.train(out=made.directory, resume=True, steps=3, progress=False)
    assert continued.load().config == with_training(QUICK, steps=3)


def wrong(run: Path, method: str, *arguments: typing.Any, **keywords: typing.Any) -> None:
    """Call what a type checker would refuse: `load`, `train`, or `sample` of a loaded run."""
    function = ddpm_fast.load(run).sample if method == "sample" else getattr(ddpm_fast, method)
    function(*arguments, **keywords)


@pytest.mark.parametrize(
    ("method", "arguments", "keywords", "says"),
    [
        ("load", ["nowhere"], {}, "nowhere does not exist"),
        ("load", [Path(__file__)], {}, "name a run directory"),
        ("load", ["."], {"wieghts": "raw"}, "unknown keyword 'wieghts'. Did you mean 'weights'?"),
        ("load", ["."], {"device": "gpu"}, "Did you mean 'cuda'?"),
        ("sample", [0], {}, "--count is 0: it must lie in 1..4294967296"),
        ("sample", [2], {"sede": 1}, "unknown keyword 'sede'. Did you mean 'seed'?"),
        ("sample", [2], {"steps": 61}, "--steps is 61: it must lie in 1..60"),
        ("sample", [2], {"sampler": "heun"}, "'ddpm', 'ddim', 'dpm++'"),
        ("train", ["digit"], {}, "Did you mean 'digits'?"),
        ("train", [], {"lr": 1e-3}, "unknown keyword 'lr'. Did you mean 'learning_rate'?"),
        ("train", [3], {}, "unknown preset 3: the presets are digits"),
        ("train", [], {"data": np.zeros((4, 8, 8))}, "--data is array("),
        ("train", [], {"learning_rate": np.float32(np.inf)}, "--learning-rate is inf: it must be finite"),
        ("train", [], {"steps": 0}, "--steps is 0: it must be at least 1"),
        ("train", [], {"steps": "many"}, "--steps is 'many': it must be a whole number"),
        ("train", [], {"resume": True}, "--resume needs --out"),
        ("train", [], {"out": ROOT}, "exists and is not empty"),
        ("train", [], {"data": Path("nowhere")}, "nowhere does not exist"),
    ],
)
def test_errors_are_the_command_lines_and_write_nothing(trained, method, arguments, keywords, says):
    with pytest.raises(ddpm_fast.InputError, match=re.escape(says)) as caught:
        wrong(trained, method, *arguments, **keywords)
    assert "\n" not in str(caught.value)
    assert list(Path().iterdir()) == []


def test_training_returns_the_run_and_resuming_continues_it():
    run = ddpm_fast.train(learning_rate=1e-3, steps=np.int64(3), progress=False)
    assert run.directory == Path("runs/digits-1")
    assert ddpm_fast.train(steps=1, progress=False).directory == Path("runs/digits-2")
    assert [line["step"] for line in run.metrics] == [1, 2, 3]
    again = ddpm_fast.train(out=run.directory, resume=True, steps=4, progress=False)
    assert [line["step"] for line in again.metrics] == [1, 2, 3, 4]
    assert again.load().config.training == replace(TINY.training, learning_rate=1e-3, steps=4)
    with pytest.raises(ddpm_fast.InputError, match="--preset digits -> mnist"):
        ddpm_fast.train("mnist", out=run.directory, resume=True)


def test_a_failed_check_raises_and_nothing_is_trained():
    with pytest.raises(ddpm_fast.MathematicsError, match="nothing was trained"):
        ddpm_fast.train(learning_rate=1e3)
    assert list(Path().iterdir()) == []


def test_training_works_outside_the_main_thread():
    runs: list[ddpm_fast.TrainedRun] = []
    thread = threading.Thread(target=lambda: runs.append(ddpm_fast.train(steps=1, progress=False)))
    thread.start()
    thread.join()
    assert [run.load().step for run in runs] == [1]


def test_pixels_of_images_survive_a_round_trip():
    pixels = to_uint8(torch.linspace(-1, 1, 2 * 3 * 4 * 5).view(2, 3, 4, 5))
    assert np.array_equal(np.stack([np.asarray(image) for image in ddpm_fast.Images(pixels)]), pixels)
