"""How bench/ times: clocks, rounds in turns, medians and ratios, and what a time is divided into."""

import ast
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bench.timing import clock as clocks
from bench.timing.clock import Clock, CudaClock, clock_for, interleave, measure, warm_up
from bench.timing.energy import EnergyMeter, energy_meter
from bench.timing.machine import folder_name, machine
from bench.timing.timings import Timings, ratio
from bench.work import parts
from bench.work.figures import Ceilings, copy_rate, matrix_rate, rates

CPU = torch.device("cpu")
KERNELS = Path(__file__).parents[2] / "kernels"


class ManualClock(Clock):
    """A clock that only moves when told: work says how long it took."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def working(self, seconds: float, log: list[str] | None = None, name: str = "") -> Callable[[], None]:
        def work() -> None:
            self.time += seconds
            if log is not None:
                log.append(name)

        return work


@pytest.fixture
def manual(monkeypatch):
    clock = ManualClock()
    monkeypatch.setattr(clocks.time, "monotonic", lambda: clock.time)
    return clock


def test_samples_are_told_by_median_and_quartiles():
    samples = Timings((5.0, 1.0, 2.0, 4.0, 3.0))
    assert (samples.median, samples.low, samples.high, samples.n) == (3, 2, 4, 5)
    assert samples.map(lambda value: 2 * value).to_json() == {"median": 6, "low": 4, "high": 8, "n": 5}
    assert (Timings((7.0,)).low, Timings((7.0,)).high) == (7, 7)
    with pytest.raises(ValueError, match="no samples"):
        Timings(())


def test_ratios_are_taken_round_by_round():
    # The machine was ten times slower in the second round: each side saw it, and their ratio did not.
    theirs, ours = Timings((4.0, 40.0, 4.0)), Timings((2.0, 20.0, 1.0))
    assert ratio(theirs, ours).values == (2, 2, 4)
    with pytest.raises(ValueError, match="3 rounds cannot be paired with 1"):
        ratio(theirs, Timings((1.0,)))


def test_rounds_go_in_turns_forwards_and_backwards_until_the_time_is_spent(manual):
    order: list[str] = []
    works = {name: manual.working(1.0, order, name) for name in ("a", "b")}
    taken = interleave(works, manual, seconds=9.0, least=2)
    assert order == list("ab" + "abba" + "abba")  # one call each to learn how long it takes, then four rounds
    assert taken["a"].values == (1.0,) * 4


def test_at_least_the_asked_rounds_are_made(manual):
    assert measure(manual.working(100.0), manual, seconds=1.0, least=3).n == 3


def test_short_work_is_repeated_within_a_sample(manual):
    calls: list[str] = []
    measure(manual.working(clocks.SHORTEST_SECONDS / 8, calls, "x"), manual, seconds=0.0, least=1)
    assert len(calls) == 1 + 8


def test_warming_up_tells_the_first_call(manual):
    seconds = iter((5.0, 1.0, 1.0))
    first = warm_up(lambda: setattr(manual, "time", manual.time + next(seconds)), manual, calls=3)
    assert first == 5.0
    assert next(seconds, None) is None


def test_a_cuda_clock_reads_events_after_waiting(monkeypatch):
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, other: "Event") -> float:
            log.append("elapsed")
            return 30.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    assert CudaClock(torch.device("cuda")).seconds(lambda: log.append("work"), calls=3) == pytest.approx(0.01)
    assert log == ["wait", "record", "work", "work", "work", "record", "wait", "elapsed"]
    assert isinstance(clock_for(torch.device("cuda")), CudaClock)


@pytest.mark.gpu
def test_a_captured_graph_does_the_work_again():
    clock = clock_for(torch.device("cuda"))
    x = torch.zeros(8, device="cuda")
    replay = clock.captured(lambda: x.add_(1))
    before = x.clone()
    replay()
    assert torch.equal(x, before + 1)
    assert measure(replay, clock, 0.01).median > 0


def test_a_cpu_clock_knows_memory_and_cache():
    clock = clock_for(CPU)
    clock.start_afresh()
    before = clock.peak_bytes()
    block = torch.ones(2**24)  # 64 MiB
    peak = clock.peak_bytes()
    assert before
    assert peak
    assert peak - before > 0.8 * block.nbytes
    assert clock.cache_bytes() >= 2**18


def test_ceilings_and_shares_of_them():
    clock = clock_for(CPU)
    assert copy_rate(clock, 0.0, megabytes=8).median > 0.1
    assert matrix_rate(clock, 0.0, torch.float32, side=128).median > 1e-4
    figures = rates(2.0, flop=4e12, moved=1e9, ceilings=Ceilings(1.0, 8.0, "float32"))
    expected = {"tflop_per_s": 2.0, "share_of_matrix_rate": 0.25, "gb_per_s": 0.5, "share_of_copy_rate": 0.5}
    assert figures == pytest.approx(expected)
    assert rates(2.0, flop=0, moved=1e9, ceilings=None) == {"gb_per_s": 0.5}


def test_energy_is_the_counters_difference_or_a_reason(manual, monkeypatch):
    monkeypatch.setattr("bench.timing.energy.time.monotonic", lambda: manual.time)
    meter = EnergyMeter(lambda: 100.0 + 50.0 * manual.time)  # 50 W
    assert meter.joules_per_call(manual.working(0.25), manual, seconds=1.0) == pytest.approx(12.5)
    none = energy_meter(CPU)
    assert none.joules_per_call(manual.working(0.25), manual) is None
    assert none.reason == "NVML measures NVIDIA GPUs only"


def test_a_machine_is_told_by_name_and_versions():
    facts = machine(CPU)
    assert facts["versions"]["torch"] == str(torch.__version__)
    assert "threads" in facts["device"]
    assert folder_name(facts | {"device": "A CPU (R) 9000, 2 threads"}) == "cpu-a-cpu-r-9000-2-threads"
    assert folder_name({"device": "NVIDIA A100 80GB", "type": "cuda"}) == "nvidia-a100-80gb"


GPU_KERNELS = {
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64": "convolution",
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized>": "convolution",
    "void cudnn::engines_precompiled::nchwToNhwcKernel<float>": "convolution",
    "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN": "matrix product",
    "sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64": "matrix product",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob": "attention",
    "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16>": "GroupNorm and SiLU",
    "reverse_step_kernel": "noise and the reverse step",
    "noise_mse_backward_kernel": "noise and the loss",
    "triton_poi_fused_add_convolution_3": "fused by the compiler",
    "triton_tem_fused_convolution_1": "convolution",
    "triton_tem_fused_mm_0": "matrix product",
    "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "update of the weights",
    "Memcpy DtoD (Device -> Device)": "copies and elementwise",
}


@pytest.mark.parametrize(("name", "part"), GPU_KERNELS.items())
def test_gpu_kernels_are_sorted_by_name(name, part):
    assert parts.part_of(name) == part


def jitted_kernels() -> list[str]:
    trees = [ast.parse(path.read_text()) for path in KERNELS.glob("*.py")]
    names = [node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [name for name in names if name.endswith("_kernel")]


def test_every_kernel_of_the_engine_has_its_part():
    assert len(jitted_kernels()) >= 5
    engines = {"GroupNorm and SiLU", "noise and the loss", "noise and the reverse step", "time embedding"}
    engines |= {"update of the weights"}
    assert {name: parts.part_of(name) for name in jitted_kernels() if parts.part_of(name) not in engines} == {}


def test_parts_come_longest_first_and_name_what_took_the_time():
    x = torch.randn(64, 64)
    taken = parts.time_by_part(lambda: [x @ x for _ in range(200)], clock_for(CPU))
    assert taken["matrix product"].seconds > 0
    name, seconds, runs = taken["matrix product"].heaviest[0]
    assert (name, runs) == ("aten::mm", 200)
    assert 0 < seconds <= taken["matrix product"].seconds
    assert taken[parts.OUTSIDE].heaviest == []
    seconds = [part.seconds for part in taken.values()]
    assert seconds == sorted(seconds, reverse=True)


def test_on_a_gpu_kernels_count_and_operators_do_not():
    def event(name: str, kind: DeviceType, microseconds: float, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, device_type=kind, self_device_time_total=microseconds, is_user_annotation=annotation
        )

    events = [
        event("aten::mm", DeviceType.CPU, 70.0),
        event("nvjet_hsh_128x256", DeviceType.CUDA, 70.0),
        event("op::reverse_step", DeviceType.CUDA, 90.0, annotation=True),
        event("reverse_step_kernel", DeviceType.CUDA, 20.0),
        event("x" * 1000, DeviceType.CUDA, 5.0),
        event("pytorch_flash::flash_fwd_kernel", DeviceType.CUDA, 1.0),
        event("cudnn_generated_fort_native_sdpa_sm90", DeviceType.CUDA, 2.0),
        event("cudnn_generated_fort_native_sdpa_sm90", DeviceType.CUDA, 3.0),
    ]
    found = parts._by_part(events, on_gpu=True)  # pyright: ignore[reportArgumentType]
    seconds = {name: part.seconds for name, part in found.items()}
    expected = {"matrix product": 70e-6, "noise and the reverse step": 20e-6, parts.OTHER: 5e-6, "attention": 6e-6}
    assert seconds == pytest.approx(expected)
    sdpa, flash = found["attention"].heaviest
    assert sdpa == ("cudnn_generated_fort_native_sdpa_sm90", pytest.approx(5e-6), 2)
    assert flash[0] == "pytorch_flash::flash_fwd_kernel"
    assert found[parts.OTHER].heaviest[0][0] == "x" * parts.LONGEST
