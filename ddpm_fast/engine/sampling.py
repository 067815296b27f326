"""Running a sampler's K steps: eager, compiled or captured, by one interface.

A step is the U-Net and one reverse step. All that it reads and writes has a fixed address, and its number is in device
memory, advanced by the step itself: so it can be captured once as a CUDA graph and replayed for any seed, any images
and any row of the table. A captured loop replays a graph of several steps; the host does nothing in between but launch.
Shapes: N images, C channels, H x W pixels, K steps, S the U-Net's time shifts.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ddpm_fast.constants import SAMPLER_COLUMN
from ddpm_fast.diffusion.guidance import guided
from ddpm_fast.diffusion.noise import NoiseAddress, key_from_seed
from ddpm_fast.diffusion.samplers import Row, SamplerTable
from ddpm_fast.engine.buffers import GUIDANCE, NOTHING, Buffers, Condition, ImageRange
from ddpm_fast.engine.cuda_graphs import CudaGraphs, GraphBackend, InFlight, memory_of
from ddpm_fast.engine.execution import EAGER, Execution
from ddpm_fast.engine.memory import in_batches_that_fit
from ddpm_fast.engine.networks import SampledNetwork, StepFunctions
from ddpm_fast.errors import InputError, MathematicsError
from ddpm_fast.model.unet import UNet
from ddpm_fast.progress import Progress, say

GRAPH_STEPS = 20
"""Steps in the replayed graph: few launches, and few nodes (some 10 KB of memory each). Not tuned on a GPU yet."""
MOST_BUFFERS = 4
"""Batch sizes whose tensors and graphs are kept; the one used longest ago is freed first."""
COMPARED_STEPS = 3
"""Steps, from the middle of the table, over which a captured loop is compared with the eager one on first use."""
DIFFERENCE = {torch.float32: 5e-3, torch.bfloat16: 3e-2}
"""Relative difference of outputs that is still rounding: other algorithms, fused ones and TF32 round otherwise."""

OnStep = Callable[[int, Tensor], None]
OnProgress = Callable[[int], object]


class SamplingLoop:
    """A sampler's loop over one U-Net; what all batches share is computed once, and graphs are kept for reuse."""

    def __init__(
        self,
        unet: UNet,
        table: SamplerTable,
        dtype: torch.dtype = torch.float32,
        execution: Execution = EAGER,
        graphs: GraphBackend | None = None,
        graph_steps: int = GRAPH_STEPS,
        guide: UNet | None = None,
    ) -> None:
        """Prepare the loop, on a copy of the U-Net.

        Args:
            unet: whose weights to sample from, on the device to run on.
            table: the sampler.
            dtype: of the U-Net's arithmetic.
            execution: how to run the steps.
            graphs: what captures them, CUDA graphs if left out.
            graph_steps: steps in the graph that is replayed as long as it fits.
            guide: what it is guided by, if it is: another U-Net for the same images; or the same one, without label.
        """
        self.graph_steps = graph_steps
        self.table, self.dtype, self.execution = table, dtype, execution
        self.device = unet.conv_in.weight.device
        self.rows = table.rows.to(self.device, torch.float32)
        t = self.rows[:, SAMPLER_COLUMN.t].contiguous()
        self.network = SampledNetwork(unet, t, dtype)
        self.guide = self.network if guide is unet else None if guide is None else SampledNetwork(guide, t, dtype)
        self.unet, ops = self.network.unet, self.network.unet.ops
        self.no_label = max(network.unet.config.classes for network in (self.network, self.guide or self.network))
        by_guide = (self.guide or self.network).unet.denoise
        self.eager = StepFunctions(self.unet.denoise, ops.reverse_step, by_guide, guided)
        self.functions = StepFunctions._make(execution.compile(function) for function in self.eager)
        if ops.fused:
            self.functions = self.functions._replace(reverse_step=ops.reverse_step)
        self.graphs = graphs or (CudaGraphs(self.device) if execution.captured else None)
        self.graph_bytes = 0  # that captures took, all batch sizes together
        self.buffers_by_size: OrderedDict[int, Buffers] = OrderedDict()
        self._lock, self._in_use = threading.RLock(), False
        self.most_images = 2**32  # at once, of which memory was not seen to be too small

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one thread at a time write to the weights and buffers.

        Raises:
            InputError: this thread is in the middle of that: on_step was called, and samples from the same loop.
        """
        with self._lock:
            if self._in_use:
                raise InputError("on_step samples from the model that calls it: load that a second time")
            self._in_use = True
            try:
                yield
            finally:
                self._in_use = False

    def load_weights(self, unet: UNet, guide: UNet | None = None) -> None:
        """Sample from other weights from now on, the guide's too; what was compiled and captured stays valid."""
        with self._alone():
            self.network.load_weights(unet)
            if self.guide is not None and guide is not None and self.guide is not self.network:
                self.guide.load_weights(guide)

    def take_step(self, buffers: Buffers, functions: StepFunctions) -> None:
        """Take the step whose number lies in device memory, and advance that."""
        prediction = self._predict(buffers, functions)
        options = {"clip": self.table.clip, "noisy": self.table.noisy}
        noise = (self.rows, buffers.step, buffers.key, buffers.sample_index)
        functions.reverse_step(
            buffers.x, prediction, *noise, x0=buffers.x0, model_input=buffers.x_low_precision, **options
        )
        buffers.step += 1

    def _predict(self, buffers: Buffers, functions: StepFunctions) -> Tensor:
        """Return what the U-Net predicts [N, C, H, W], guided if the loop is."""
        x, step = buffers.model_input, buffers.step
        if self.guide is self.network:  # with and without label, in one batch
            labels = torch.cat([buffers.labels, buffers.no_labels])
            own, other = functions.denoise(torch.cat([x, x]), self.network.shifts(step, labels)).chunk(2)
            return functions.guided(own, other, buffers.guidance)
        own = functions.denoise(x, self.network.shifts(step, buffers.labels))
        if self.guide is None:
            return own
        other = functions.guide(x, self.guide.shifts(step, buffers.labels))
        return functions.guided(own, other, buffers.guidance)

    def buffers(self, images: int) -> Buffers:
        """Return the tensors for batches of this size, and the graphs if steps are captured; made on first use."""
        if images not in self.buffers_by_size:
            while len(self.buffers_by_size) >= MOST_BUFFERS:
                self.buffers_by_size.popitem(last=False)
            buffers = Buffers(images, self.unet, self.table, self.dtype, self.device, self.no_label)
            if self.graphs is not None:
                self._capture(buffers, self.graphs)
            self.buffers_by_size[images] = buffers
        self.buffers_by_size.move_to_end(images)
        return self.buffers_by_size[images]

    def _capture(self, buffers: Buffers, graphs: GraphBackend) -> None:
        before = memory_of(self.device)

        def take(steps: int) -> None:
            for _ in range(steps):
                self.take_step(buffers, self.functions)

        graphs.warm_up(lambda: take(1))
        buffers.one_step = graphs.capture(lambda: take(1))
        if len(self.rows) >= self.graph_steps:
            buffers.many_steps = graphs.capture(lambda: take(self.graph_steps))
        self._compare(buffers)
        self.graph_bytes += memory_of(self.device) - before

    def _compare(self, buffers: Buffers) -> None:
        """Compare the captured loop with the eager one over a few steps.

        From the middle of the table, where the network's output counts most.

        Raises:
            MathematicsError: they differ by more than rounding.
        """
        device, images = self.device, len(buffers.x)
        address = NoiseAddress(torch.zeros(2, dtype=torch.int64, device=device), torch.arange(images, device=device))
        steps = min(COMPARED_STEPS, len(self.rows))
        first, results = (len(self.rows) - steps) // 2, []
        for run in (buffers.one_step, lambda: self.take_step(buffers, self.eager)):
            assert run is not None
            buffers.start(address, first)
            for _ in range(steps):
                run()
            results.append(buffers.x.clone())
        captured, eager = results
        # How much the steps amplify a difference in the network's output: a lot when there are few.
        row = Row(*self.table.rows[first : first + steps].unbind(1))
        gain = row.next_from_prediction - row.next_from_x0 * row.x0_from_prediction
        gain *= 1 if self.guide is None else 2 * GUIDANCE - 1
        allowed = DIFFERENCE[self.dtype] * max(1.0, float(gain.abs().sum()))
        difference = float((captured - eager).norm() / eager.norm())
        if not difference <= allowed:
            raise MathematicsError(
                f"the captured loop differs from the eager one by {difference:.1e} of its size after {steps} steps "
                f"({allowed:.0e} would be rounding): sample with --no-capture, or --no-compile"
            )

    def run(
        self,
        address: NoiseAddress,
        on_step: OnStep | None = None,
        on_progress: OnProgress | None = None,
        condition: Condition = NOTHING,
    ) -> Tensor:
        """Sample one batch (Ho et al. 2020, Algorithm 2).

        Args:
            address: key and image numbers [N], on the loop's device.
            on_step: called after each step with its number 0..K-1 and x; then steps are launched one by one.
            on_progress: called now and then with the number of steps that the device has done since the last call.
            condition: what is asked of the images.

        Returns:
            [N, C, H, W] float32, a copy.
        """
        with self._alone(), torch.no_grad():
            return self._run(address, on_step, on_progress, condition)

    def _run(
        self, address: NoiseAddress, on_step: OnStep | None, on_progress: OnProgress | None, condition: Condition
    ) -> Tensor:
        # x_T is pure noise: Algorithm 2, line 1.
        buffers = self.buffers(len(address.sample_index))
        buffers.ask(condition)
        buffers.start(address)
        one_step = buffers.one_step or (lambda: self.take_step(buffers, self.functions))
        done, total, launched = 0, len(self.rows), InFlight(self.device, on_progress)
        # Whole graphs of steps as long as they fit, then single steps: lines 2 to 5.
        while done < total:
            many = buffers.many_steps if on_step is None and total - done >= self.graph_steps else None
            steps = 1 if many is None else self.graph_steps
            (many or one_step)()
            launched.add(steps)
            if on_step is not None:
                on_step(done, buffers.x)
            done += steps
        launched.finish()
        return buffers.x.clone()


def stream(
    loop: SamplingLoop,
    images: ImageRange,
    largest_batch: int = 64,
    progress: bool | None = None,
    on_step: OnStep | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Make images of a seed, in equal batches, one after the other: memory holds one, however many are asked for.

    Args:
        loop: of the sampler.
        images: which.
        largest_batch: images made at once.
        progress: show a bar, or say a line now and then; None for neither.
        on_step: see `SamplingLoop.run`.

    Yields:
        The number of a batch's first image, and the batch, [N, C, H, W] float32 on the CPU.

    Raises:
        MathematicsError: a value is not finite.
    """
    key, end = key_from_seed(images.seed, loop.device), images.first + images.count
    batches = images.batches(min(largest_batch, loop.most_images))
    what = "compiling, then sampling" if loop.execution.compiled else "sampling"
    with Progress(what, len(loop.rows) * len(batches), "step", progress, leave=False) as shown:

        def advance(steps: int) -> None:
            shown.rename("sampling")
            shown.advance(steps)

        def make(sample_index: Tensor) -> Tensor:
            address = NoiseAddress(key, sample_index.to(loop.device))
            return loop.run(address, on_step, advance, images.condition(sample_index)).cpu()

        def take_less(left: int, size: int) -> None:
            loop.buffers_by_size.clear()
            loop.most_images = size
            shown.expect(len(loop.rows) * left)
            say(f"memory did not suffice for more: images are made {size} at a time from here on, and are the same")

        for first, x in in_batches_that_fit(batches, make, take_less):
            if not torch.isfinite(x[: end - first]).all():
                raise MathematicsError("a sampled value is not finite: the weights are broken, or bf16 overflowed")
            yield first, x[: end - first]


def sample(loop: SamplingLoop, images: ImageRange, largest_batch: int = 64, progress: bool | None = None) -> Tensor:
    """Make images of a seed, all of them: [count, C, H, W] float32 on the CPU; see `stream`."""
    return torch.cat([x for _, x in stream(loop, images, largest_batch, progress)])
