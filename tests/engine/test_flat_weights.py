"""Weights side by side in memory: what lies where, what computes in bfloat16, and what a checkpoint is told."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ddpm_fast.config import Config, DiffusionConfig, UNetConfig, with_training
from ddpm_fast.engine import flat_weights
from ddpm_fast.engine.flat_weights import ALIGNMENT, FlatWeights
from ddpm_fast.engine.trainer import Trainer, new_unet
from ddpm_fast.model.blocks import Attention
from ddpm_fast.model.unet import UNet
from ddpm_fast.presets import PRESETS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = UNetConfig(3, 8, 8, 8, (1, 2), res_blocks=1, attention_resolutions=(4,), groups=4)


def configuration(**changes: object) -> Config:
    config = replace(PRESETS["cifar10"], unet=SMALL, diffusion=DiffusionConfig(timesteps=20, beta_end=0.4))
    return with_training(config, **{"batch_size": 4, "warmup_steps": 2, "learning_rate": 1e-3, **changes})


def batch(first: int, n: int) -> tuple[Tensor, Tensor]:
    number, pixel = torch.arange(first, first + n, device=DEVICE), torch.arange(192, device=DEVICE)
    images = (number[:, None] * 37 + pixel * 5 + pixel**2 * number[:, None] % 61) % 256
    return images.to(torch.uint8).view(n, 8, 8, 3).permute(0, 3, 1, 2), number


def trainer(precision: str = "bf16", **changes: object) -> Trainer:
    """Return a trainer whose branches all matter: the initial weights of many are near zero."""
    made = Trainer(configuration(precision=precision, **changes), batch, DEVICE)
    state, generator = made.state(), torch.Generator().manual_seed(0)
    for part in ("model", "ema"):
        for weights in state[part].values():
            weights.add_(0.1 * torch.randn(weights.shape, generator=generator).to(DEVICE))
    made.load_state(0, copy.deepcopy(state))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_keep_values_and_layout_and_do_not_overlap(dtype):
    before, unet = new_unet(configuration(), DEVICE), new_unet(configuration(), DEVICE)
    flat = FlatWeights(unet, dtype)
    for (name, old), new in zip(before.named_parameters(), unet.parameters(), strict=True):
        assert torch.equal(new, old), name
        assert new.stride() == old.stride(), name
        assert torch.equal(flat.named(flat.ema)[name], old), name
    parameters = sorted(unet.parameters(), key=Tensor.storage_offset)
    starts = [parameter.storage_offset() for parameter in parameters]
    ends = [start + parameter.numel() for start, parameter in zip(starts, parameters, strict=True)]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    assert all(a < b and a % ALIGNMENT == 0 for a, b in pairwise(starts))
    assert len({p.untyped_storage().data_ptr() for p in unet.parameters()}) == 1
    assert len(flat.weights) % ALIGNMENT == 0


def test_in_float32_the_unet_itself_computes():
    made = trainer("fp32")
    assert made.flat.network is made.unet
    assert made.flat.low_precision is None


def autocast_losses(made: Trainer) -> Tensor:
    """Return the losses of the first batch as PyTorch computes them with float32 parameters under autocast."""
    network, made.flat.network = made.flat.network, made.unet
    with torch.autocast(DEVICE.type, torch.bfloat16):
        losses = made.losses(0, 4)
    made.flat.network = network
    return losses


@pytest.mark.parametrize("alignment", [ALIGNMENT, 8])
def test_in_bfloat16_losses_and_gradients_are_those_of_autocast(alignment, monkeypatch):
    """The same roundings in the same places: shifts with conv1's bias in float32, norms' parameters in float32.

    Where 8 numbers are a place's multiple, q, k and v have no gaps between them, and are one layer.
    """
    monkeypatch.setattr(flat_weights, "ALIGNMENT", alignment)
    made = trainer()
    joined = [module.joined is not None for module in made.flat.network.modules() if isinstance(module, Attention)]
    assert joined == [alignment == 8] * 4
    made.load_batch()
    loss = made.backward()
    ours = [gradient.clone() for gradient in made.gradients.values()]
    theirs = autocast_losses(made)
    expected = torch.autograd.grad(theirs.mean(), list(made.unet.parameters()))
    assert torch.equal(loss, theirs.mean())
    assert torch.equal(made.losses(0, 4), theirs)
    for name, a, b in zip(made.gradients, ours, expected, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
def test_in_bfloat16_the_loss_compiles_whole():
    made = trainer(accumulate=2)
    made.load_batch()
    made.backward()
    eager = made.flat.gradient.clone()
    made.flat.gradient.fill_(torch.nan)
    torch._dynamo.reset()
    made._compiled_loss = torch.compile(made._loss_of_batch, dynamic=False, fullgraph=True, backend="aot_eager")
    made.backward()
    for name, gradient in made.flat.named(eager).items():
        torch.testing.assert_close(made.gradients[name], gradient, rtol=0, atol=0.02 * float(gradient.abs().max()))


def test_the_copy_in_bfloat16_is_rounded_from_the_weights_after_every_step():
    made = trainer()
    computing, low = dict(made.flat.network.named_parameters()), made.unet.low_precision_parameters()
    for _ in range(3):
        before = made.flat.weights.clone()
        made.train_step_no_sync()
        assert not torch.equal(before, made.flat.weights)
        for name, parameter in made.parameters.items():
            assert torch.equal(computing[name], parameter.bfloat16() if name in low else parameter), name
    assert {p.dtype for name, p in computing.items() if ".norm" in name or "conv1.bias" in name} == {torch.float32}


def test_q_k_and_v_learn_as_one_layer_what_they_learn_as_three(monkeypatch):
    """In several steps, with gradients added up from parts: the copy that computes moves with the weights."""
    apart = trainer(accumulate=2)
    monkeypatch.setattr(flat_weights, "ALIGNMENT", 8)
    joined = trainer(accumulate=2)
    for _ in range(3):
        apart.train_step_no_sync()
        joined.train_step_no_sync()
    for name, weight in joined.parameters.items():  # the norm of all gradients is added up in another order
        torch.testing.assert_close(weight, apart.parameters[name], rtol=1e-3, atol=1e-4, msg=name)


def test_parts_gradients_are_added_in_float32():
    """Against the parts' own gradients, added in float64; in bfloat16 the sum would be off by 2**-9 of itself."""
    made, one = trainer(accumulate=4), trainer()
    made.load_batch()
    made.backward()
    total = dict.fromkeys(made.gradients, torch.zeros((), dtype=torch.float64))
    for images, index in zip(made.images.split(1), made.sample_index.split(1), strict=True):
        one._loss_of_batch(images, index).backward()
        one.flat.collect_gradients(add=False)
        total = {name: total[name] + gradient.double() for name, gradient in one.gradients.items()}
    for name, gradient in made.gradients.items():
        torch.testing.assert_close(
            gradient.double(), total[name], rtol=1e-6, atol=1e-6 * float(total[name].abs().max())
        )
    assert float(made.flat.gradient.abs().max()) > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_frozen_stays_and_the_rest_trains(monkeypatch, precision):
    """On a CPU this ended the process: see `cpu_group_norm.ends_pytorch`."""
    build = UNet.__init__

    def frozen(self: UNet, config: UNetConfig) -> None:
        build(self, config)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not is_frozen(name))

    def is_frozen(name: str) -> bool:
        kept_in_float32 = "norm" in name or name.endswith("conv1.bias")  # where the rest computes in bfloat16
        return name.startswith("conv_in") or kept_in_float32

    monkeypatch.setattr(UNet, "__init__", frozen)
    made = trainer(precision)
    before = {name: parameter.detach().clone() for name, parameter in made.parameters.items()}
    made.train_step_no_sync()
    for name, parameter in made.parameters.items():
        assert torch.equal(parameter, before[name]) == is_frozen(name) or name.endswith("to_k.bias"), name


def test_a_gradient_is_not_counted_twice_where_a_step_leaves_its_layer_out():
    made = trainer("fp32")
    made.train_step_no_sync()
    assert made.gradients["conv_in.weight"].any()
    made.unet.conv_in.requires_grad_(False)
    made.load_batch()
    made.backward()
    assert not made.gradients["conv_in.weight"].any()
    assert made.gradients["conv_out.weight"].any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_continues_bit_for_bit(precision):
    whole, stopped = trainer(precision), trainer(precision)
    for made, steps in ((whole, 4), (stopped, 2)):
        for _ in range(steps):
            made.train_step_no_sync()
    resumed = Trainer(configuration(precision=precision), batch, DEVICE)
    resumed.load_state(2, copy.deepcopy(stopped.state()))
    for _ in range(2):
        resumed.train_step_no_sync()
    for part, tensors in whole.state().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, resumed.state()[part][name]), f"{part} {name}"


def test_a_checkpoints_names_and_shapes_are_those_of_pytorchs_optimizer():
    made = trainer("fp32")
    for _ in range(3):
        made.train_step_no_sync()
    optimizer = torch.optim.Adam(made.unet.parameters())
    for parameter in made.unet.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    expected = {"loss_sum": torch.zeros(()), "loss_steps": torch.zeros((), dtype=torch.int64)}
    for name, parameter in made.unet.named_parameters():
        expected |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    found = made.state()["optimizer"]
    assert found.keys() == expected.keys()
    assert all(found[k].shape == v.shape and found[k].dtype == v.dtype for k, v in expected.items())
    assert {float(value) for name, value in found.items() if name.startswith("step.")} == {3.0}


def test_a_checkpoint_that_does_not_fit_is_refused():
    state = trainer("fp32").state()
    name = next(iter(state["model"]))
    for wrong, message in (({}, "one side only"), ({name: torch.zeros(3)}, rf"model: {name} is \(3,\)")):
        with pytest.raises(ValueError, match=message):
            trainer("fp32").load_state(0, {**state, "model": {**state["model"], **wrong} if wrong else {}})
