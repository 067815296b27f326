"""One training step, and the state that it moves (Ho et al. 2020, Algorithm 1).

Nothing here waits for the device: the loss, the gradient norm and whether a value was not finite stay on it until
somebody reads them. A step reads its batch and its number from tensors at fixed addresses, so that all of it, from
q_sample to the moving average, can be captured as one CUDA graph. Shapes: N images, C channels, H x W pixels.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_fast.config import Config, TrainingConfig
from ddpm_fast.diffusion.noise import NoiseAddress, key_from_seed, timesteps
from ddpm_fast.diffusion.schedule import TrainingTable, training_table
from ddpm_fast.engine.cuda_graphs import CudaGraphs, Graphs, Work
from ddpm_fast.engine.execution import EAGER, Execution, choose_dtype
from ddpm_fast.model.unet import UNet
from ddpm_fast.ops import choose_ops

BatchFunction = Callable[[int, int], tuple[Tensor, Tensor]]
"""(first example, n) -> images [n, C, H, W] uint8 and sample_index [n] int64, on the device."""


WARM_UP_STEPS = 3
"""Steps of a run that are not captured yet: PyTorch's advice for graphs over several streams."""


def learning_rate(step: Tensor, config: TrainingConfig) -> Tensor:
    """Return the rate of the step-th update (from 0): a linear rise over the warm-up, then constant; [] float64."""
    return config.learning_rate * ((step + 1).double() / max(config.warmup_steps, 1)).clamp(max=1.0)


def ema_decay(step: Tensor, config: TrainingConfig) -> Tensor:
    """Return the average's decay at a step: small at first, so that it forgets the initial weights; [] float64."""
    return ((1 + step).double() / (10 + step)).clamp(max=config.ema_decay)


def new_unet(config: Config, device: torch.device) -> UNet:
    """Build a U-Net with initial weights that follow from the seed alone, without touching the global generator.

    It computes with the ops that --kernels or --no-kernels means on the device.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        unet = UNet(config.unet)
    unet.use(choose_ops(config.training.kernels, device))
    return unet.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


class Trainer:
    """A U-Net in training: weights, their moving average, Adam, and the step number."""

    def __init__(
        self,
        config: Config,
        batch: BatchFunction,
        device: torch.device,
        execution: Execution = EAGER,
        graphs: Graphs | None = None,
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
        self.dtype = choose_dtype(config.training.precision, device)
        self.graphs = graphs or (CudaGraphs(device) if execution.captured else None)
        self._compiled_losses = execution.compile(self._losses_of_batch)
        self._warm_ups = 0
        self._replay: Work | None = None
        self.unet = new_unet(config, device)
        self.parameters = dict(self.unet.named_parameters())
        self.ema = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        # Fused Adam skips its update where found_inf is 1 and divides gradients by grad_scale: that masks bad
        # steps and clips gradients on the device, without a pass of their own.
        self.rate = torch.zeros((), device=device)
        options: dict[str, Any] = {"fused": True, "capturable": self.graphs is not None and device.type == "cuda"}
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=self.rate, **options)
        # Its first steps, warming up, are not captured: that needs no warning.
        self.optimizer._warned_capturable_if_run_uncaptured = True  # pyright: ignore[reportAttributeAccessIssue]
        self.table = training_table(config.diffusion, config.training.min_snr_gamma).to(device)
        self.key = key_from_seed(config.training.seed, device)
        self.step = 0
        unet, size = config.unet, config.training.batch_size
        self.device_step = torch.zeros((), dtype=torch.int64, device=device)
        self.images = torch.zeros(size, unet.height, unet.width, unet.image_channels, dtype=torch.uint8, device=device)
        self.images = self.images.permute(0, 3, 1, 2)
        self.sample_index = torch.zeros(size, dtype=torch.int64, device=device)
        self.bad_step = torch.full((), -1, device=device)  # latches the first step that was not finite
        self.loss_sum = torch.zeros((), device=device)  # of the steps since it was last read,
        self.loss_steps = torch.zeros((), dtype=torch.int64)  # and how many they are; a tensor to be saved with it
        self.gradient_norm = torch.zeros((), device=device)

    def losses(self, first_example: int, n: int) -> Tensor:
        """Compute the weighted squared errors of n training examples, eagerly: [n] float32."""
        with self._autocast():
            return self._losses_of_batch(*self.batch(first_example, n))

    def _autocast(self) -> torch.autocast:
        # Around what is compiled, not in it: PyTorch 2.13 caches no gradient's graph that enters autocast itself.
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _losses_of_batch(self, images: Tensor, sample_index: Tensor) -> Tensor:
        """Compute the weighted squared errors of a batch: [N] float32 (Algorithm 1, line 5)."""
        t = timesteps(NoiseAddress(self.key, sample_index), self.config.diffusion.timesteps)
        ops, flip = self.unet.ops, self.config.data.flip
        example = (images, t, self.table, self.key, sample_index)
        x_t = ops.q_sample(*example, flip=flip, dtype=self.dtype)
        prediction = self.unet(x_t, t, dropout_address=NoiseAddress(self.key, sample_index))
        return ops.noise_mse(prediction, *example, flip=flip)

    def load_batch(self) -> None:
        """Write this step's number and batch to where the step reads them."""
        self.device_step.fill_(self.step)
        images, sample_index = self.batch(self.step * len(self.images), len(self.images))
        self.images.copy_(images)
        self.sample_index.copy_(sample_index)

    def backward(self) -> Tensor:
        """Compute the loaded batch's loss and leave its gradients in the parameters, part by part."""
        training = self.config.training
        part = training.batch_size // training.accumulate
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for images, sample_index in zip(self.images.split(part), self.sample_index.split(part), strict=True):
            with self._autocast():
                losses = self._compiled_losses(images, sample_index)
            loss = losses.sum() / training.batch_size
            loss.backward()
            total += loss.detach()
        return total

    def train_step_no_sync(self) -> None:
        """Take one optimizer step; a step whose loss or gradient is not finite changes no weight, nor do later ones."""
        self.load_batch()
        if self.graphs is None:
            self._move()
        elif self._warm_ups < WARM_UP_STEPS:
            self.graphs.warm_up(self._move)
            self._warm_ups += 1
        else:
            self._replay = self._replay or self.graphs.capture(self._move)
            self._replay()
        self.loss_steps += 1
        self.step += 1

    def _move(self) -> None:
        """Do all of a step's work on the device; what is captured."""
        training = self.config.training
        loss = self.backward()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self.bad_step.copy_(torch.where((self.bad_step < 0) & bad, self.device_step, self.bad_step))
        latched = self.bad_step >= 0
        self.rate.copy_(learning_rate(self.device_step, training))
        self.optimizer.found_inf = latched.float()  # pyright: ignore[reportAttributeAccessIssue]
        scale = (norm / training.clip_norm).clamp(min=1.0) if training.clip_norm else torch.ones_like(norm)
        self.optimizer.grad_scale = scale  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self._follow_no_sync(torch.where(latched, 1.0, ema_decay(self.device_step, training).float()))
        self.loss_sum += loss
        self.gradient_norm.copy_(norm)

    @torch.no_grad()
    def _follow_no_sync(self, decay: Tensor) -> None:
        """Move the average: ema = (ema - w) * decay + w, three passes over all weights and no memory of its own."""
        averages, weights = list(self.ema.values()), [p.detach() for p in self.parameters.values()]
        torch._foreach_sub_(averages, weights)
        torch._foreach_mul_(averages, decay)
        torch._foreach_add_(averages, weights)

    def read_loss(self) -> float:
        """Return the mean loss since it was last read. Waits for the device."""
        mean = float(self.loss_sum) / int(self.loss_steps)
        self.loss_sum.zero_()
        self.loss_steps.zero_()
        return mean

    def loss_of_predicting_nothing(self, images: int = 256) -> float:
        """Return the expected loss of a network that returns zeros, for the mean square of the first images.

        With independent eps of variance 1 it is the mean over t of
        weight * (target_eps**2 + target_x_start**2 * E[x_start**2]).
        """
        sample, _ = self.batch(0, images)
        mean_square = (sample.float() / 127.5 - 1).square().mean()
        row = TrainingTable(*self.table.unbind(1))
        return float((row.weight * (row.target_eps**2 + row.target_x_start**2 * mean_square)).mean())

    @contextmanager
    def averaged(self) -> Iterator[UNet]:
        """Lend the U-Net with the averaged weights in place of the trained ones."""
        trained = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.ema[name]
            yield self.unet
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = trained[name]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return all that a checkpoint needs: with the step number, the run continues bit for bit."""
        optimizer = {"loss_sum": self.loss_sum, "loss_steps": self.loss_steps}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                optimizer[f"{key}.{name}"] = value
        return {"model": dict(self.parameters), "ema": self.ema, "optimizer": optimizer}

    @torch.no_grad()
    def load_state(self, step: int, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from a checkpoint's tensors, in the form of `state`.

        Raises:
            ValueError: a name or a shape does not fit this U-Net.
        """
        _copy_all("model", self.parameters, parts["model"])
        _copy_all("ema", self.ema, parts["ema"])
        moments = {f"{k}.{n}": v for n, p in self.parameters.items() for k, v in _new_moments(p).items()}
        logged = {"loss_sum": self.loss_sum, "loss_steps": self.loss_steps}
        _copy_all("optimizer", moments | logged, parts["optimizer"])
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = {key: moments[f"{key}.{name}"] for key in _new_moments(parameter)}
        self.step = step

    def name_the_bad_layer(self) -> str:
        """Run the latched step again (its noise has an address) and say where a value stops being finite."""
        self.step = int(self.bad_step)
        self.load_batch()
        self._compiled_losses = self._losses_of_batch  # hooks are not seen in compiled code
        found: list[str] = []
        hooks = [
            module.register_forward_hook(_finite_hook(name, found))
            for name, module in self.unet.named_modules()
            if name and not isinstance(module, nn.ModuleList)
        ]
        try:
            loss = self.backward()
        finally:
            for hook in hooks:
                hook.remove()
        if found:
            return f"the output of {found[0]} is not finite"
        gradients = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        broken = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
        if broken:
            return f"the gradient of {broken[-1]} is not finite"  # the last is the first in backward order
        return f"the loss is {float(loss)} and the gradient's norm overflowed"


def _finite_hook(name: str, found: list[str]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not torch.isfinite(output).all():
            found.append(name)

    return look


def _new_moments(parameter: Tensor) -> dict[str, Tensor]:
    """Return fused Adam's state of one parameter, as its first step makes it."""
    zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": zeros,
        "exp_avg_sq": zeros.clone(),
    }


def _copy_all(part: str, into: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    differing = sorted(set(into) ^ set(source))
    if differing:
        raise ValueError(f"{part}: {differing[0]} and {len(differing) - 1} more names are on one side only")
    for name, tensor in into.items():
        if tensor.shape != source[name].shape:
            raise ValueError(f"{part}: {name} is {tuple(source[name].shape)}, not {tuple(tensor.shape)}")
        tensor.copy_(source[name])
