"""The race between training loops: turns, clocks, what counts as reached, and that the loops train the same network."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench.speedrun import race as racing
from bench.speedrun import record
from bench.speedrun.loops import OURS, PLAIN, RECIPE, Diffusers, build
from bench.speedrun.race import Standing
from bench.speedrun.tracks import TRACKS, Target, track_named
from ddpm_fast.config import Config, DataConfig, DiffusionConfig, SamplerConfig, TrainingConfig, UNetConfig
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.errors import InputError
from ddpm_fast.textbook import ForwardProcess

pytest.importorskip("tyro", reason="the race's flags are parsed by it")
from bench.speedrun import __main__ as command

TINY = Config(
    unet=UNetConfig(1, 8, 8, 8, (1, 2), res_blocks=1, attention_resolutions=(4,), groups=4),
    diffusion=DiffusionConfig(schedule="cosine", prediction="v"),
    training=TrainingConfig(steps=6, batch_size=4, warmup_steps=2, learning_rate=1e-3, device="cpu"),
)
TRACK = replace(TRACKS["digits"], sampler=SamplerConfig("ddim", 2), count=4)
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)


class Toy:
    """Takes so many seconds a step; what it draws is as good as it has taken steps."""

    def __init__(self, clock: Any, seconds: float, steps: int) -> None:
        self.config = replace(TINY, training=replace(TINY.training, steps=steps))
        self.clock, self.seconds, self.taken = clock, seconds, 0

    def step(self) -> None:
        self.clock.seconds += self.seconds
        self.taken += 1

    def weights(self):
        return {"steps": torch.tensor(self.taken)}


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have toys drawn as the number of steps that they took."""
    draw = racing.draw

    def either(config, weights, track):
        return weights["steps"] if "steps" in weights else draw(config, weights, track)

    monkeypatch.setattr(racing, "draw", either)


def judge_after(steps: int):
    """Judge as good enough from so many steps on."""

    def judge(drawn):
        good = float(drawn) >= steps
        return {"frechet_pixels_4": 0.1 if good else 9.0, "confident_4": 1.0 if good else 0.0, "nearest": 2.0}

    return judge


def test_loops_train_in_turns_and_the_clock_stands_while_they_are_judged(clock):
    loops = {OURS: Toy(clock, 0.5, 40), PLAIN: Toy(clock, 1.0, 10**9)}

    def judge(drawn):
        clock.seconds += 100
        return judge_after(40)(drawn)

    found = list(racing.race(loops, TRACK, judge))
    assert [(one.loop, one.seconds, one.steps, one.reached) for one in found] == [
        (OURS, 20.0, 40, True),
        (PLAIN, 20.0, 20, False),
        (PLAIN, 40.0, 40, True),  # and it is done
    ]
    assert found[0].images == 40 * 4
    assert found[0].scores["frechet_pixels"] == 0.1


def test_a_loop_that_does_not_get_there_is_judged_at_four_times_our_time_and_no_later(clock):
    loops = {PLAIN: Toy(clock, 1.0, 10**9), OURS: Toy(clock, 0.5, 8), RECIPE: Toy(clock, 1.0, 5)}
    found = [one for one in racing.race(loops, TRACK, judge_after(10**9)) if one.loop != OURS]
    assert [one.seconds for one in found if one.loop == PLAIN] == [4, 8, 12, 16]
    assert [one.seconds for one in found if one.loop == RECIPE] == [4, 5]  # its recipe ended


def test_targets():
    assert Target("frechet_pixels", 0.5).met(0.5)
    assert not Target("frechet_pixels", 0.5).met(0.51)
    assert Target("confident", 0.7, least=True).met(0.7)
    assert not Target("confident", 0.7, least=True).met(math.nan)
    assert not Target("frechet_pixels", 0.5).met(math.nan)
    with pytest.raises(InputError, match="Did you mean 'digits'"):
        track_named("digit")


def test_every_track_races_its_preset_on_given_data_and_keeps_a_tenth_back():
    for track in TRACKS.values():
        config = track.config("some.npz")
        assert (config.preset, config.data.data, config.data.holdout) == (track.preset, "some.npz", 0.1)
        if not track.own_data:
            with pytest.raises(InputError, match=f"track {track.name} needs --data"):
                track.config("")


def test_data_without_labels_are_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", IMAGES)
    config = replace(TINY, data=DataConfig("images.npy", holdout=0.1))
    with pytest.raises(InputError, match=r"track digits: the images have no labels.*give a \.npz"):
        command.run(config, TRACK, [OURS], [0])


def standing(seed: int, **scores: float) -> Standing:
    good = {"frechet_pixels": 0.4, "confident": 0.8, "frechet_features": 0.1, "nearest_training": 2.0}
    return Standing(OURS, seed, 20.0, 800, 25600, {**good, "nearest_training_held_out": 2.1} | scores, True)


def test_a_record_is_the_mean_of_its_seeds_and_copies_are_none(tmp_path):
    passed, line = record.verdict([standing(3, frechet_pixels=0.55), standing(4), standing(5)], TRACK)
    assert passed, line
    passed, line = record.verdict([standing(3, frechet_pixels=0.9), standing(4), standing(5)], TRACK)
    assert not passed
    assert "frechet pixels <= 0.5: 0.567 MISSED" in line
    assert not record.verdict([standing(3, nearest_training=1.0)], TRACK)[0]
    assert not record.verdict([standing(3, frechet_features=50.0)], TRACK)[0]  # nothing was chosen by it
    page = tmp_path / "speedrun.md"
    record.keep(page, ["first"] * len(record.HEAD))
    record.keep(page, ["a|b"] * len(record.HEAD))
    assert page.read_text().splitlines()[-2:] == ["| first " * 10 + "|", "| a/b " * 10 + "|"]
    assert "| ddpm-fast | 3 | 20.0 | 800 | 25,600 | 0.4 | 0.8 | 0.1 | 0.95 | yes |" in record.shown(
        [standing(3)], TRACK
    )


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_plain_loop_trains_towards_the_textbooks_target(prediction):
    """Where the network says nothing, the loss is the mean square of the target."""
    pytest.importorskip("diffusers")
    config = replace(TINY, diffusion=replace(TINY.diffusion, prediction=prediction))
    grey = np.full_like(IMAGES, 200)
    loop, seen = Diffusers(config, grey, decay=0.9), []

    class Nothing(torch.nn.Module):
        def forward(self, x_t, t):
            seen.append((x_t, t))
            return SimpleNamespace(sample=0 * x_t)

    loop.model = Nothing()
    loss = loop.loss()
    (x_t, t), x_start = seen[0], torch.tensor(200 / 127.5 - 1)
    alpha_bar = ForwardProcess(config.diffusion).alpha_bar[t].view(-1, 1, 1, 1).float()
    eps = (x_t - alpha_bar.sqrt() * x_start) / (1 - alpha_bar).sqrt()
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_start
    target = {"eps": eps, "x0": x_start.expand_as(eps), "v": v}[prediction]
    assert float(loss) == pytest.approx(float(target.square().mean()), rel=1e-3)


def test_the_plain_loops_rate_is_the_recipes():
    pytest.importorskip("diffusers")
    config = replace(TINY, training=replace(TINY.training, cooldown=0.5))
    loop, rates = Diffusers(config, IMAGES, decay=0.9), []
    for _ in range(6):
        rates.append(loop.optimizer.param_groups[0]["lr"])
        loop.step()
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-3, 2 / 3 * 1e-3, 1 / 3 * 1e-3])


@pytest.mark.parametrize("name", [OURS, PLAIN, RECIPE])
def test_every_loop_trains_the_same_network_and_is_sampled_alike(name):
    if name != OURS:
        pytest.importorskip("diffusers")
    loop = build(name, TINY, Dataset(IMAGES, "", ""), IMAGES)
    before = loop.weights()
    loop.step()
    after = loop.weights()
    assert set(before) == set(build(OURS, TINY, Dataset(IMAGES, "", ""), IMAGES).weights())
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert racing.draw(loop.config, after, TRACK).shape == (4, 8, 8, 1)
