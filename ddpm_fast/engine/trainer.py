"""One training step, and the state that it moves (Ho et al. 2020, Algorithm 1).

Nothing here waits for the device: the loss, the gradient norm and whether a value was not finite stay on it until
somebody reads them. A step reads its batch and its number from tensors at fixed addresses, so that all of it, from
q_sample to the moving average, can be captured as one CUDA graph. Shapes: N images, C channels, H x W pixels.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from ddpm_fast.config import Config
from ddpm_fast.constants import StepFigures, StepNumbers
from ddpm_fast.diffusion.noise import (
    KEY_INCREMENTS,
    NoiseAddress,
    key_from_seed,
    random_label_drops,
    random_timesteps,
)
from ddpm_fast.diffusion.schedule import TrainingTable, timestep_shares, timestep_thresholds, training_table
from ddpm_fast.engine.cuda_graphs import CudaGraphs, GraphBackend, Work
from ddpm_fast.engine.execution import EAGER, Execution, choose_dtype
from ddpm_fast.engine.flat_weights import FlatWeights, Parts
from ddpm_fast.engine.inspection import X_T, FirstNotFinite, Largest, watched
from ddpm_fast.model.unet import UNet
from ddpm_fast.ops import choose_ops

BatchFunction = Callable[[int, int], tuple[Tensor, ...]]
"""(first example, n) -> images [n, C, H, W] uint8 and sample_index [n] int64, on the device, and their labels
[n] int64 for a conditional U-Net."""

WARM_UP_STEPS = 3
"""Steps of a run that are not captured yet: PyTorch's advice for graphs over several streams."""


def new_unet(config: Config, device: torch.device) -> UNet:
    """Build a U-Net with initial weights that follow from the seed alone, without touching the global generator.

    It computes with the ops that --kernels or --no-kernels means on the device.
    """
    low, high = key_from_seed(config.training.seed).tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((low + KEY_INCREMENTS[0] * high) % 2**32)  # a CPU's generator reads 32 bits and no more
        unet = UNet(config.unet)
    unet.use(choose_ops(config.training.kernels, device))
    return unet.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


class Trainer:
    """A U-Net in training: weights, their moving average, Adam, and the step number."""

    undivided: Callable[[], AbstractContextManager[object]]
    """Entered around what must not be interrupted half way, and nothing else: at any other line an exception may end
    the step, and the trainer stands where its last whole step left it."""
    accumulate: int
    """Parts that a batch is split into: those of the configuration, or more where memory did not suffice for them."""
    half_updated: bool
    """Whether an update of the weights began and did not end: then the trainer stands nowhere."""

    def __init__(
        self,
        config: Config,
        batch: BatchFunction,
        device: torch.device,
        execution: Execution = EAGER,
        graphs: GraphBackend | None = None,
    ) -> None:
        """Start at step 0.

        Args:
            config: the run's configuration.
            batch: where images come from.
            device: where to compute.
            execution: how to run a step.
            graphs: what captures it, CUDA graphs if left out.
        """
        self.config, self.batch, self.device, self.execution = config, batch, device, execution
        self.undivided = nullcontext
        self.dtype = choose_dtype(config.training.precision, device)
        self.graphs = graphs or (CudaGraphs(device) if execution.captured else None)
        self._compiled_loss = execution.compile(self._loss_of_batch)
        self.accumulate, self.half_updated = config.training.accumulate, False
        self._warm_ups = 0
        self._replay: Work | None = None
        self.unet = new_unet(config, device)
        self.flat = FlatWeights(self.unet, self.dtype)
        self.parameters, self.gradients = self.flat.parameters, self.flat.gradients
        self.ema = self.flat.named(self.flat.ema)
        self.numbers = StepNumbers(*self.flat.numbers.unbind())
        self.figures = StepFigures(*self.flat.figures.unbind())
        self.table = training_table(config.diffusion, config.training.min_snr_gamma).to(device)
        thresholds = timestep_thresholds(config.diffusion, config.training.timestep_density)
        self.thresholds = None if thresholds is None else thresholds.to(device)
        self.key = key_from_seed(config.training.seed, device)
        self.step = 0
        unet, size = config.unet, config.training.batch_size
        self.images = torch.zeros(size, unet.height, unet.width, unet.image_channels, dtype=torch.uint8, device=device)
        self.images = self.images.permute(0, 3, 1, 2)
        self.sample_index = torch.zeros(size, dtype=torch.int64, device=device)
        labels = (torch.zeros_like(self.sample_index),) if unet.classes else ()
        self.loaded = (self.images, self.sample_index, *labels)

    def losses(self, first_example: int, n: int) -> Tensor:
        """Compute the weighted squared errors of n training examples, eagerly: [n] float32."""
        return self._losses_of_batch(*self.batch(first_example, n))

    def _losses_of_batch(self, images: Tensor, sample_index: Tensor, labels: Tensor | None = None) -> Tensor:
        """Compute the weighted squared errors of a batch: [N] float32 (Algorithm 1, line 5)."""
        address = NoiseAddress(self.key, sample_index)
        t = random_timesteps(address, self.config.diffusion.timesteps, self.thresholds)
        if labels is not None:  # Ho and Salimans 2022, Algorithm 1: some are withheld, so that both can be predicted
            dropped = random_label_drops(address, self.config.training.label_dropout)
            labels = labels.masked_fill(dropped, self.config.unet.classes)
        network, flip = self.flat.network, self.config.data.flip
        example = (images, t, self.table, self.key, sample_index)
        x_t = network.ops.q_sample(*example, flip=flip, dtype=self.dtype)
        prediction = network(x_t, t, dropout_address=address, labels=labels)
        return network.ops.noise_mse(prediction, *example, flip=flip)

    def _loss_of_batch(self, *batch: Tensor) -> Tensor:
        """Compute what a batch, or a part of one, adds to the batch's mean loss: [] float32."""
        return self._losses_of_batch(*batch).sum() / self.config.training.batch_size

    def load_batch(self) -> None:
        """Write this step's number and batch to where the step reads them."""
        self.numbers.step.fill_(self.step)
        batch = self.batch(self.step * len(self.images), len(self.images))
        for place, values in zip(self.loaded, batch, strict=True):
            place.copy_(values)

    def backward(self) -> Tensor:
        """Compute the loaded batch's loss [], and its gradients into `gradients`, part by part."""
        part, total = self.config.training.batch_size // self.accumulate, None
        for batch in zip(*(values.split(part) for values in self.loaded), strict=True):
            loss = self._compiled_loss(*batch)
            loss.backward()
            self.flat.collect_gradients(add=total is not None)
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def compile(self) -> None:
        """Have compilers do their work in a pass whose gradients are thrown away: nothing that a step reads changes."""

        def work() -> None:
            self.backward()

        self.load_batch()
        self.graphs.warm_up(work) if self.graphs else work()

    def train_step_no_sync(self) -> None:
        """Take one optimizer step. After the first loss or gradient that is not finite, no step changes a weight."""
        self.load_batch()
        if self.graphs is None:
            loss = self.backward()
            with self.undivided():
                self._update(loss)
                self._count_step()
        else:
            with self.undivided():
                self._take_captured_step(self.graphs)
                self._count_step()

    def _update(self, loss: Tensor) -> None:
        self.half_updated = True
        self.flat.update(loss, self.config.training)

    def _count_step(self) -> None:
        self.step += 1
        self.half_updated = False

    def _take_captured_step(self, graphs: GraphBackend) -> None:
        if self._warm_ups < WARM_UP_STEPS:
            graphs.warm_up(self._device_step)
            self._warm_ups += 1
        else:
            if self._replay is None:
                try:
                    self._replay = graphs.capture(self._device_step)
                finally:
                    self.half_updated = False  # a capture updates nothing
            self.half_updated = True
            self._replay()

    def _device_step(self) -> None:
        """Do all of a step's work on the device (Algorithm 1, lines 2 to 5); what is captured."""
        self._update(self.backward())

    def split_further(self) -> bool:
        """Take batches in parts of half the size, or less where that leaves no equal ones, from the next step on.

        A step that ended before its update may be taken again so: it reads the same addresses. What was captured is
        dropped, and captured again.

        Returns:
            False where a part is one image already, or no step can be taken again.
        """
        size = self.config.training.batch_size
        parts = next((n for n in range(2 * self.accumulate, size + 1) if size % n == 0), None)
        if parts is None or self.half_updated:
            return False
        self.accumulate = parts
        self.flat.discard_gradients()
        self._replay, self._warm_ups = None, 0
        return True

    def mean_loss(self) -> float:
        """Return the mean loss since it was last read, without reading it. Waits for the device."""
        return float(self.figures.loss_sum.double() / self.numbers.loss_steps)

    def read_loss(self) -> float:
        """Return the mean loss since it was last read. Waits for the device."""
        mean = self.mean_loss()
        self.figures.loss_sum.zero_()
        self.numbers.loss_steps.zero_()
        return mean

    def zero_prediction_loss(self, images: int = 256) -> float:
        """Return the expected loss of a network that returns zeros, for the mean square of the first images.

        With independent eps of variance 1 it is the mean over the drawn t of
        weight * (target_eps**2 + target_x_start**2 * E[x_start**2]).
        """
        sample = self.batch(0, images)[0]
        mean_square = (sample.float() / 127.5 - 1).square().mean()
        row = TrainingTable(*self.table.unbind(1))
        shares = timestep_shares(self.config.diffusion, self.config.training.timestep_density).to(self.device)
        return float((shares * row.weight * (row.target_eps**2 + row.target_x_start**2 * mean_square)).sum())

    @contextmanager
    def ema_weights(self) -> Iterator[UNet]:
        """Lend the U-Net with the averaged weights in place of the trained ones."""
        trained = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            with self.undivided():
                self._put_in_place(self.ema)
            yield self.unet
        finally:
            with self.undivided():
                self._put_in_place(trained)

    def _put_in_place(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.data = weights[name]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return all that a checkpoint needs: with the step number, the run continues bit for bit."""
        return self.flat.state()

    def load_state(self, step: int, parts: Parts) -> None:
        """Continue from a checkpoint's tensors, in the form of `state`.

        Raises:
            ValueError: a name or a shape does not fit this U-Net.
        """
        self.flat.load_state(parts)
        self.step = step

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Begin with weights of one's own, the average with the same.

        Raises:
            ValueError: a name or a shape does not fit this U-Net.
        """
        self.flat.load_state({**self.state(), "model": weights, "ema": weights})

    def locate_nonfinite(self) -> str:
        """Run the latched step again (its noise has an address) and name what is the first not to be finite.

        Returns:
            As "the output of conv_in"; "" where all of it is finite this time.
        """
        self.step = int(self.numbers.bad_step)
        self.load_batch()
        self._compiled_loss = self._loss_of_batch  # hooks are not seen in compiled code
        first = FirstNotFinite()
        with watched(self.flat.network, first.look):
            loss = self.backward()
        if first.name:
            return "x_t, which the network reads," if first.name == X_T else f"the output of {first.name}"
        broken = [name for name, gradient in self.gradients.items() if not torch.isfinite(gradient).all()]
        if broken:
            return f"the gradient of {broken[-1]}"  # the last is the first in backward order
        if not torch.isfinite(loss):
            return "the loss"
        return "" if torch.isfinite(self.flat.gradient.square().sum()) else "the norm of the gradient"

    @torch.no_grad()
    def largest_output(self, images: int) -> tuple[str, float]:
        """Pass the last batch's first images through the network: the layer of the largest output, and how large."""
        largest = Largest()
        with watched(self.flat.network, largest.look):
            self._losses_of_batch(self.images[:images], self.sample_index[:images])
        return largest.found()
