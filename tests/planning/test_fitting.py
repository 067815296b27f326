"""--batch-size auto: a number that memory allows, said, stored as any other, and never settled anew."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")
import ddpm_fast
from ddpm_fast.cli import main as cli
from ddpm_fast.config import Config, with_training
from ddpm_fast.errors import InputError
from ddpm_fast.planning import fitting
from ddpm_fast.planning.cost import memory
from ddpm_fast.presets import PRESETS
from tests.cli.test_cli import TINY_RUN, run

AUTO_RUN = TINY_RUN.replace("--batch-size 4", "--batch-size auto")


def room_for(monkeypatch: pytest.MonkeyPatch, config: Config, images: float, kind: str = "cpu") -> None:
    """Let so many images of a configuration fit the memory, in the estimate that a plan relies on."""
    free = memory(config.unet, 1, kind) + (images - 1) * (memory(config.unet, 2, kind) - memory(config.unet, 1, kind))
    monkeypatch.setattr(fitting, "free_bytes", lambda device: free / fitting.MEMORY_SHARE)
    monkeypatch.setattr(fitting, "prepare_device", lambda name, precision: torch.device(kind))


@pytest.mark.parametrize(
    ("kind", "images", "accumulate", "size"),
    [
        ("cpu", 1e6, 1, 128),  # as the configuration has it
        ("cpu", 127, 1, 64),
        ("cpu", 63, 2, 64),
        ("cpu", 0.5, 8, 8),  # nothing smaller can be taken in 8 parts
        ("cuda", 1e6, 1, 256),
        ("cuda", 65, 1, 64),
        ("cuda", 65, 4, 256),
        ("cuda", 33, 3, 96),
        ("cuda", 0.5, 1, 1),
    ],
)
def test_as_many_images_are_taken_as_memory_holds(kind, images, accumulate, size, monkeypatch, capsys):
    room_for(monkeypatch, PRESETS["digits"], images, kind)
    config = with_training(PRESETS["digits"], batch_size=128 if accumulate != 3 else 129, accumulate=accumulate)
    assert fitting.with_fitting_batch(config) == with_training(config, batch_size=size)
    out = capsys.readouterr().out
    assert out.startswith(f"--batch-size auto: {size}, for about ")
    assert ("memory may not suffice" in out) == (images < 1)


@pytest.mark.slow
def test_a_run_stores_the_number_and_keeps_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = cli.parse_train(TINY_RUN.split()).config
    room_for(monkeypatch, tiny, 9)
    status, out, _ = run(f"train --out run {AUTO_RUN}", capsys)
    assert status == 0
    assert "--batch-size auto: 8, for about" in out
    assert json.loads(Path("run/config.json").read_text())["config"]["training"]["batch_size"] == 8
    room_for(monkeypatch, tiny, 3)
    status, out, _ = run("train --out run --resume --batch-size auto --steps 4", capsys)
    assert status == 0
    assert "--batch-size auto: 8, as the run has it" in out
    again = ddpm_fast.train(out="run", resume=True, batch_size="auto", steps=5, progress=False)
    assert again.metrics[-1]["step"] == 5


def test_every_way_to_ask_for_it_means_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    room_for(monkeypatch, PRESETS["digits"], 9)
    Path("mine.toml").write_text('batch_size = "auto"')
    for asked in ("--batch-size auto", "--batch-size=auto", "--batch_size auto", "--config mine.toml"):
        assert cli.parse_train(asked.split()).config == with_training(PRESETS["digits"], batch_size=8)
        assert cli.parse_check(asked.split()).config == with_training(PRESETS["digits"], batch_size=8)
    assert cli.parse_train(["--config", "mine.toml", "--batch-size", "32"]).config == PRESETS["digits"]
    status, out, _ = run("train --batch-size auto --dry-run", capsys)
    assert status == 0
    assert "ddpm-fast train --preset digits --batch-size 8\n" in out
    seen = list[Config]()
    monkeypatch.setattr("ddpm_fast.api.train_config", lambda config, *_: seen.append(config))
    ddpm_fast.train(batch_size="auto")
    assert seen == [with_training(PRESETS["digits"], batch_size=8)]
    with pytest.raises(InputError, match="cannot change runs/digits-1"):
        cli.parse_check(["runs/digits-1", "--batch-size", "auto"])
    with pytest.raises(InputError, match="--batch-size is 'all': it must be a whole number"):
        cli.parse_train(["--batch-size", "all"])


def test_a_plan_has_a_number_already(monkeypatch, capsys):
    monkeypatch.setattr(
        "ddpm_fast.planning.auto.this_machine", lambda *_: ddpm_fast.engine.speed.Machine("cpu", 6e9, 1e11)
    )
    flags = ["--preset", "auto", "--data", "digits", "--minutes", "1"]
    assert cli.parse_train([*flags, "--batch-size", "auto"]) == cli.parse_train(flags)
    assert "--batch-size auto: 32, as the plan has it" in capsys.readouterr().out
