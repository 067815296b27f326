"""The U-Net against diffusers' UNet2DModel with copied weights, and what it promises by itself."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers import diffusers as peer
from ddpm_fast.config import UNetConfig
from ddpm_fast.diffusion.noise import NoiseAddress, key_from_seed
from ddpm_fast.model import blocks
from ddpm_fast.model.blocks import FEWEST_PIXELS, Upsample
from ddpm_fast.model.forms import Forms
from ddpm_fast.model.sums import Sum, value_of
from ddpm_fast.model.unet import UNet
from ddpm_fast.ops import REFERENCE
from ddpm_fast.presets import PRESETS

CONFIGS = {
    "non-square": UNetConfig(3, 8, 12, 16, (1, 2), 2, (4,), groups=4),
    "grey": UNetConfig(1, 8, 8, 8, (1, 1, 2), 1, (8,), groups=4),
    "diffusers": UNetConfig(3, 8, 8, 16, (1, 2), 1, (8, 4), groups=4, head_channels=8, details="diffusers"),
    "attention-at-three": UNetConfig(2, 16, 16, 12, (1, 2, 1), 1, (16, 8, 4), groups=3),
}
SMALL = UNetConfig(3, 8, 8, 16, (1, 2), 1, (4,), groups=4)


def diffusers_unet(config: UNetConfig) -> nn.Module:
    """diffusers' model with the arguments of google/ddpm-cifar10-32, whose U-Net is the paper's."""
    pytest.importorskip("diffusers.models.unets.unet_2d")
    return peer.unet(config)


def randomized(config: UNetConfig) -> UNet:
    """A U-Net whose every parameter matters: the initial one's last layers are next to nothing."""
    torch.manual_seed(0)
    unet = UNet(config)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            spread = 0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.normal_(std=spread).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return unet


def batch(config: UNetConfig, images: int = 2) -> tuple[Tensor, Tensor]:
    x = torch.randn(images, config.image_channels, config.height, config.width, generator=torch.manual_seed(1))
    return x, torch.tensor([999, 3, 250, 0])[:images]


def relative(found: Tensor, truth: Tensor) -> float:
    return ((found - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize(
    ("preset", "parameters", "keys"), [("cifar10", 35_746_307, 328), ("church256", 113_673_219, None)]
)
def test_state_dict_is_diffusers_with_the_published_size(preset, parameters, keys):
    with torch.device("meta"):
        ours, theirs = UNet(PRESETS[preset].unet), diffusers_unet(PRESETS[preset].unet)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    shapes = [{name: tuple(value.shape) for name, value in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert keys is None or len(shapes[0]) == keys


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_gradients_are_diffusers(name):
    config = CONFIGS[name]
    ours, theirs = randomized(config), diffusers_unet(config)
    theirs.load_state_dict(ours.state_dict())
    (x, t), outs, inputs = batch(config), [], []
    for net in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = net(leaf, t)
        out = out if isinstance(out, Tensor) else out.sample
        (out * torch.sin(torch.arange(out.numel()).view_as(out))).sum().backward()
        outs.append(out.detach())
        inputs.append(leaf.grad)
    assert relative(*outs) < 1e-5
    assert relative(*inputs) < 1e-4
    expected = dict(theirs.named_parameters())
    largest = max(p.grad.abs().max().item() for p in expected.values() if p.grad is not None)
    for parameter_name, parameter in ours.named_parameters():
        found, truth = parameter.grad, expected[parameter_name].grad
        assert found is not None, parameter_name
        assert truth is not None, parameter_name
        # A key's bias shifts all scores of a softmax alike: its gradient is 0 but for rounding of the others.
        scale = largest if "to_k.bias" in parameter_name else truth.abs().max().item()
        assert (found - truth).abs().max().item() <= 1e-4 * scale, parameter_name


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_and_runs_a_step(preset):
    config = PRESETS[preset].unet
    device = "cpu" if preset == "digits" else "meta"
    with torch.device(device):
        unet = UNet(config)
        x, t = torch.randn(2, config.image_channels, config.height, config.width), torch.tensor([0, 999])
        out = unet(x, t, NoiseAddress(torch.tensor([1, 2]), torch.tensor([0, 1])))
    assert out.shape == x.shape
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in unet.parameters())
    if device == "cpu":
        assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_of_one_to_four_channels_pass(channels):
    config = dataclasses.replace(SMALL, image_channels=channels)
    out = randomized(config)(*batch(config))
    assert out.shape == (2, channels, 8, 8)
    assert out.isfinite().all()


def test_output_begins_near_zero():
    torch.manual_seed(0)
    out = UNet(SMALL)(*batch(SMALL))
    # The last convolution's weights are 1e-5 of Xavier's, and its inputs of order one.
    assert 0 < out.abs().max() < 1e-3


def test_output_depends_on_t_and_each_image_on_its_own():
    unet, (x, t) = randomized(SMALL), batch(SMALL, 4)
    whole = unet(x, t)
    assert relative(unet(x, t.flip(0)), whole) > 1e-2
    # Convolutions of another batch size may choose another algorithm, to float32 rounding.
    assert relative(torch.cat([unet(x[i : i + 1], t[i : i + 1]) for i in range(4)]), whole) < 1e-5


def test_forward_is_denoise_of_the_time_shifts():
    unet, (x, t) = randomized(SMALL), batch(SMALL)
    shifts = unet.time_shifts(t)
    assert shifts.shape == (2, sum(block.conv1.out_channels for block in unet.res_blocks()))
    assert torch.equal(unet(x, t), unet.denoise(x, shifts))
    # In sampling they are computed for all steps at once, and looked up.
    everything = unet.time_shifts(torch.arange(1000))
    assert relative(everything[t], shifts) < 1e-6


def test_channels_last_gives_the_same():
    unet, (x, t) = randomized(SMALL), batch(SMALL)
    expected = unet(x, t)
    found = unet.to(memory_format=torch.channels_last)(  # pyright: ignore[reportCallIssue]
        x.contiguous(memory_format=torch.channels_last), t
    )
    assert relative(found, expected) < 1e-5


def address(*examples: int) -> NoiseAddress:
    return NoiseAddress(key_from_seed(4), torch.tensor(examples))


def test_dropout_follows_from_the_examples_number_alone():
    unet, (x, t) = randomized(dataclasses.replace(SMALL, dropout=0.3)), batch(SMALL, 4)
    whole = unet(x, t, address(5, 6, 7, 8))
    assert torch.equal(unet(x, t, address(5, 6, 7, 8)), whole)
    turned = unet(x.flip(0), t.flip(0), address(8, 7, 6, 5)).flip(0)
    assert relative(turned, whole) < 1e-5
    assert relative(unet(x[1:2], t[1:2], address(6)), whole[1:2]) < 1e-5
    assert relative(unet(x, t, address(15, 16, 17, 18)), whole) > 1e-2


def test_there_is_no_dropout_without_noise_or_probability():
    dropping, (x, t) = randomized(dataclasses.replace(SMALL, dropout=0.3)), batch(SMALL)
    plain = randomized(SMALL)
    assert torch.equal(dropping(x, t), plain(x, t))
    assert torch.equal(plain(x, t, address(5, 6)), plain(x, t))
    assert relative(dropping(x, t, address(5, 6)), plain(x, t)) > 1e-2


def test_every_block_drops_other_places():
    unet = randomized(dataclasses.replace(SMALL, dropout=0.3))
    assert [block.layer for block in unet.res_blocks()] == list(range(len(unet.res_blocks())))


def test_added_up_weights_upsample_as_repeated_pixels_do():
    torch.manual_seed(0)
    layer, x = Upsample(6).double(), torch.randn(7, 6, 8, 10, dtype=torch.float64, requires_grad=True)
    assert len(x) * 8 * 10 >= FEWEST_PIXELS
    results = []
    for found in (layer(x), layer.conv(F.interpolate(x, scale_factor=2))):
        weights = torch.sin(torch.arange(found.numel(), dtype=torch.float64)).view_as(found)
        results.append([found, *torch.autograd.grad((found * weights).sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("transposed", [True, False])
def test_a_frozen_unet_computes_the_same(name, transposed):
    forms = Forms(transposed_upsampling=transposed)
    plain, frozen = randomized(CONFIGS[name]), UNet(CONFIGS[name], forms)
    frozen.load_state_dict(plain.state_dict())
    frozen.freeze()
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    x, t = batch(CONFIGS[name])
    expected = plain(x, t).detach()
    with torch.no_grad():
        assert relative(frozen(x, t), expected) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("other", [True, False])
def test_a_frozen_unet_whose_norms_add_up_computes_the_same(name, left, other):
    """By the reference, which adds up, too: all that is left out in one place is there in another."""
    plain = randomized(CONFIGS[name])
    frozen = UNet(
        CONFIGS[name], Forms(transposed_upsampling=other, sums_left_to_norms=left, skips_joined_by_norms=other)
    )
    frozen.load_state_dict(plain.state_dict())
    frozen.use(dataclasses.replace(REFERENCE, fused=True)).freeze()
    assert all((block.sum_bias is None) != left for block in frozen.res_blocks())
    x, t = batch(CONFIGS[name])
    with torch.no_grad():
        assert relative(frozen(x, t), plain(x, t)) < 1e-5


def test_a_sum_is_what_its_terms_add_up_to():
    x, added, bias = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(3)
    assert value_of(x) is x
    terms = Sum(x, added, bias)
    torch.testing.assert_close(value_of(terms), x + added + bias[:, None, None])
    assert value_of(terms) is value_of(terms)
    assert torch.equal(value_of(Sum(x)), x)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_is_the_same_in_all_forms(name, monkeypatch):
    monkeypatch.setattr(blocks, "FEWEST_PIXELS", 1)
    (x, t), results, names = batch(CONFIGS[name], 4), [], []
    for forms in (Forms(), Forms(transposed_upsampling=False, skips_joined_by_norms=False)):
        unet = UNet(CONFIGS[name], forms)
        unet.load_state_dict(randomized(CONFIGS[name]).state_dict())
        out = unet(x, t)
        results.append([out, *torch.autograd.grad(out.sin().sum(), list(unet.parameters()))])
        names = ["output", *dict(unet.named_parameters())]
    for parameter_name, found, truth in zip(names, *results, strict=True):
        if "to_k.bias" not in parameter_name:  # whose gradient is 0 but for rounding
            assert relative(found, truth) < 1e-4, parameter_name
