"""What bench/ counts and compares: FLOPs and bytes, ops in all forms, variants, and peers with the same U-Net."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from time import sleep

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.peers import comparison
from bench.peers import diffusers as peer_diffusers
from bench.peers.comparison import OURS, compare, peers_on
from bench.report.measurements import prepare
from bench.timing.clock import clock_for
from bench.work.amounts import parameters, unet_bytes, unet_elements, unet_flop
from bench.work.ops import MOST_SETS, builders, forms
from bench.work.scenarios import (
    CONFIGURATIONS,
    Scenario,
    Variant,
    default_variant,
    sampling,
    train_step,
    variants,
    with_image_size,
)
from ddpm_fast.checks.norms import norms
from ddpm_fast.engine.sampling import SamplingLoop
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.model.unet import UNet
from ddpm_fast.presets import PRESETS

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CIFAR = CONFIGURATIONS["cifar10"].unet
TINY = CONFIGURATIONS["tiny"]


def test_the_papers_unet_is_counted_as_published():
    assert round(unet_flop(CIFAR, training=False) / 1e9, 2) == 12.44
    assert unet_flop(CIFAR, training=True) / unet_flop(CIFAR, training=False) == pytest.approx(3, rel=0.01)
    assert parameters(CIFAR) == 35_746_307
    shapes = norms(CIFAR)
    assert sum(shapes.values()) == 51
    assert sum(n * s.channels * s.height * s.width for s, n in shapes.items()) == pytest.approx(3.37e6, rel=0.01)
    assert sum(n for s, n in shapes.items() if s.shift) == 22


@pytest.mark.parametrize("preset", PRESETS)
def test_the_engines_estimate_of_flop_is_near_the_count(preset):
    with torch.device("meta"):
        unet = UNet(PRESETS[preset].unet)
    assert unet.estimate_flop() == pytest.approx(unet_flop(unet.config, training=False), rel=0.1)


def test_weights_are_read_once_a_batch_and_activations_once_an_image():
    activations, weights = unet_elements(CIFAR)
    # The blocks' projections of the time embedding are not layers of a step: the loop has computed them before.
    projections = sum((4 * CIFAR.channels + 1) * shape.channels * n for shape, n in norms(CIFAR).items() if shape.shift)
    assert weights == parameters(CIFAR) - projections
    one, two = (unet_bytes(CIFAR, n, training=False, dtype=torch.bfloat16) for n in (1, 2))
    assert two - one == 2 * activations


@pytest.mark.parametrize("name", ["digits", "digits-16x16", "cifar10"])
def test_diffusers_runs_the_same_unet(name):
    diffusers = pytest.importorskip("diffusers.models.unets.unet_2d")
    config = CONFIGURATIONS[name].unet
    with torch.device("meta"):
        theirs = peer_diffusers.unet(config).eval()
        x = torch.empty(1, config.image_channels, config.height, config.width)
    assert isinstance(theirs, diffusers.UNet2DModel)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs(x, torch.zeros(1, dtype=torch.int64, device="meta"))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == parameters(config)
    assert counter.get_total_flops() == unet_flop(config, training=False)


def test_every_op_runs_at_its_shapes_and_moves_what_it_says():
    built = {name: build() for name, build in builders(TINY, 2, torch.float32, clock_for(CPU), norms=2).items()}
    assert {op.name.partition(",")[0] for op in built.values()} >= {
        "q_sample",
        "noise_mse",
        "timestep_embedding",
        "reverse_step",
        "group_norm_silu",
        "adam_ema",
    }
    for op in built.values():
        assert 1 <= len(op.sets) <= MOST_SETS
        op.work(forms(op.op, kernels=False, compiled=False)["reference"])()
    pixels = 2 * 8 * 8
    assert built["q_sample"].moved == pixels * (1 + 4)  # uint8 in, float32 out
    assert built["adam_ema"].moved == parameters(TINY.unet) * (2 * 4 + 4 * 8)  # the gradient twice, the rest in and out
    assert built["reverse_step"].moved == pixels * (4 + 4 + 4)  # x in and out, prediction in; x is the next input


def test_kernels_and_compiled_references_are_forms_of_an_op_on_a_gpu():
    op = builders(TINY, 2, torch.float32, clock_for(CPU))["q_sample"]().op
    assert list(forms(op, kernels=False, compiled=True)) == ["reference", "compiled reference"]
    pytest.importorskip("triton")
    assert list(forms(op, kernels=True, compiled=True)) == ["reference", "compiled reference", "kernel"]


def test_a_cpu_runs_the_eager_reference_and_a_gpu_everything():
    assert default_variant(CPU) == Variant(kernels=False, mode="eager")
    assert default_variant(GPU).kernels
    assert all(not variant.kernels and variant.mode != "captured" for variant in variants(CPU))
    assert str(Variant(kernels=True, mode="captured")) == "captured-kernels"
    assert variants(GPU)[-1] == default_variant(GPU)


@pytest.mark.parametrize("variant", variants(CPU)[:1], ids=str)
def test_scenarios_train_and_sample(variant):
    trained = train_step(TINY, 2, variant, CPU)
    trained.work()
    assert (trained.images, trained.steps, trained.training) == (2, 1, True)
    sampled = sampling(TINY, 2, 3, variant, CPU)
    first, second = sampled.work(), sampled.work()
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    assert not torch.equal(first, second)


def test_cudnn_chooses_by_timing_only_where_a_variant_asks_for_it(monkeypatch):
    seen = []
    monkeypatch.setattr(Trainer, "train_step_no_sync", lambda self: seen.append(torch.backends.cudnn.benchmark))
    monkeypatch.setattr(SamplingLoop, "run", lambda self, address: seen.append(torch.backends.cudnn.benchmark))
    for wanted in (True, False):
        variant = Variant(False, "eager", cudnn_benchmark=wanted)
        train_step(TINY, 2, variant, CPU).work()
        sampling(TINY, 2, 2, variant, CPU).work()
    assert seen == [True, True, False, False]
    assert not torch.backends.cudnn.benchmark
    assert str(Variant(True, "captured", cudnn_benchmark=True)) == "captured-kernels-cudnn-benchmark"


def test_memory_is_told_apart_for_building_and_for_running():
    def build() -> Scenario:
        kept.append(torch.ones(2**24))  # 64 MiB, in use only while building
        kept.clear()
        return Scenario(lambda: None, 1, 1, TINY.unet, training=False)

    kept: list[torch.Tensor] = []
    clock = clock_for(CPU)
    clock.start_afresh()
    before = clock.peak_bytes()
    prepared = prepare(build, Variant(False, "eager"), clock)
    after = clock.peak_bytes()
    assert before and after and prepared.build_peak  # noqa: PT018
    assert prepared.build_peak - before > 50e6
    assert after - before < 30e6


def test_an_image_size_keeps_attention_at_its_level():
    assert with_image_size(TINY, 16).unet.attention_resolutions == (8,)


@pytest.mark.parametrize("who", [one for one in peers_on(CPU) if "diffusers" in one.name and not one.compiles])
def test_diffusers_trains_and_samples(who):
    pytest.importorskip("diffusers")
    who.train_step(TINY, 2, CPU)()
    images = who.sampling(TINY, 2, 2, CPU)().images
    assert images.shape == (2, 8, 8, 1)


def test_tuned_diffusers_trains_and_samples():
    pytest.importorskip("diffusers")
    tuning = peer_diffusers.Tuning(channels_last=True, half=True, fused=True)
    peer_diffusers.train_step(TINY, 2, CPU, tuning)()
    images = peer_diffusers.tuned_loop(TINY, 2, 2, CPU, tuning)()
    assert isinstance(images, torch.Tensor)
    assert images.shape == (2, 1, 8, 8)


def test_a_peer_that_cannot_run_says_why_and_the_others_go_on():
    def missing() -> comparison.Work:
        raise ImportError("No module named 'torchvision'\nand more")

    def breaks() -> None:
        raise RuntimeError("out of memory")

    builds = {
        OURS: lambda: partial(sleep, 0.001),
        "a": missing,
        "b": lambda: breaks,
        "c": lambda: partial(sleep, 0.005),
    }
    calls = dict.fromkeys(builds, 1)
    rows = {row["name"]: row for row in compare(builds, clock_for(CPU), 0.02, calls)}
    assert rows["a"]["reason"] == "ImportError: No module named 'torchvision'"
    assert rows["b"]["reason"] == "RuntimeError: out of memory"
    assert rows[OURS]["times_as_long"]["median"] == 1
    assert rows["c"]["times_as_long"]["median"] > 1
    assert rows["c"]["times_as_long"]["n"] == rows[OURS]["seconds"]["n"] >= 3
    with pytest.raises(ImportError):
        compare({OURS: missing}, clock_for(CPU), 0.02, calls)


@pytest.mark.slow
def test_benchmarks_run_and_say_what_a_time_means(tmp_path):
    json_path = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-q", "-k", "test_op and timestep"]
    command += [f"--benchmark-json={json_path}", f"--benchmark-storage={tmp_path}", "-p", "no:cacheprovider"]
    # pytest-benchmark measures nothing where it sees a worker of pytest-xdist, which this process may be.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    root = Path(__file__).parents[2]
    result = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    text = json_path.read_text()
    for key in ("gb_per_s", "share_of_copy_rate", "device", "versions", "commit"):
        assert f'"{key}"' in text
