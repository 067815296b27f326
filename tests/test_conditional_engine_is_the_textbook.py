"""The engine against the textbook where the U-Net is told labels, and where a prediction is guided."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from ddpm_fast import textbook
from ddpm_fast.config import UNetConfig
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.engine.execution import Execution
from ddpm_fast.engine.sampling import SamplingLoop, sample
from ddpm_fast.model.unet import UNet
from tests.engine.test_cuda_graphs import StandIn
from tests.test_engine_is_the_textbook import (
    IMAGES,
    SAMPLERS,
    SMALL,
    UNET,
    AotEager,
    TrainingNumbers,
    assert_are_the_textbooks,
    assert_trains_as_the_textbook,
    configuration,
    engine,
    sampling,
    textbook_unet,
)

CONDITIONAL = replace(UNET, num_classes=3)
LABELS = (2, 0, 1, 3, 0)
"""Of images 0, 1, ..., over and over: of 17 and 18, which are made, it is 1 and none."""
CAPTURED = Execution(captured=True)


@pytest.mark.parametrize("label_dropout", [0.0, 0.4])
def test_training_is_the_textbooks(label_dropout):
    config = configuration("v", CONDITIONAL, label_dropout=label_dropout)
    assert_trains_as_the_textbook(engine(config), steps=8)


@pytest.mark.slow
def test_compiled_training_is_the_textbooks():
    config = configuration("v", replace(SMALL, num_classes=3), label_dropout=0.4)
    assert_trains_as_the_textbook(engine(config, execution=AotEager(compiled=True)))


def perturbed(config: UNetConfig, seed: int) -> UNet:
    torch.manual_seed(seed)
    unet = UNet(config)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return unet


def book_of(unet: UNet) -> textbook.UNet:
    return textbook_unet(unet.config, unet.state_dict(), TrainingNumbers(0)).eval()


@pytest.mark.parametrize("execution", [Execution(), CAPTURED], ids=str)
@pytest.mark.parametrize("name", ["ddpm", "dpm++"])
def test_sampling_by_labels_is_the_textbooks(name, execution):
    sampler, config = replace(SAMPLERS[name], steps=25), sampling("v", True, unet=CONDITIONAL)
    unet, table = perturbed(CONDITIONAL, 0), sampler_table(config.diffusion, sampler)
    loop = SamplingLoop(unet, table, execution=execution, graphs=StandIn() if execution.captured else None)
    for labels in (LABELS, (0,)):  # again, other ones: nothing of the first is captured
        images = sample(loop, replace(IMAGES, labels=labels)).double()
        told = torch.tensor([labels[number % len(labels)] for number in (17, 18)])
        assert_are_the_textbooks(images, partial(book_of(unet), labels=told), config.diffusion, sampler)


@pytest.mark.parametrize("execution", [Execution(), CAPTURED], ids=str)
@pytest.mark.parametrize(("prediction", "name"), [("v", "ddpm"), ("eps", "ddim"), ("x0", "dpm++")])
def test_guidance_without_the_label_is_the_textbooks(prediction, name, execution):
    sampler, config = replace(SAMPLERS[name], steps=25), sampling(prediction, True, unet=CONDITIONAL)
    unet, table = perturbed(CONDITIONAL, 0), sampler_table(config.diffusion, sampler)
    graphs = StandIn() if execution.captured else None
    loop = SamplingLoop(unet, table, execution=execution, graphs=graphs, guide=unet)
    own = partial(book_of(unet), labels=torch.tensor([1, 3]))
    other = partial(book_of(unet), labels=torch.tensor([3, 3]))
    for strength in (2.5, 0.5):
        images = sample(loop, replace(IMAGES, labels=LABELS, guidance=strength)).double()
        guided = textbook.guided(own, other, strength)
        assert_are_the_textbooks(images, guided, config.diffusion, sampler)


@pytest.mark.parametrize("execution", [Execution(), CAPTURED], ids=str)
@pytest.mark.parametrize(("own_classes", "classes"), [(0, 0), (3, 0), (0, 3), (3, 3)])
def test_guidance_by_another_network_is_the_textbooks(own_classes, classes, execution):
    sampler, config = replace(SAMPLERS["dpm++"], steps=10), sampling("v", True)
    unet, guide = (
        perturbed(replace(UNET, num_classes=own_classes), 0),
        perturbed(replace(SMALL, num_classes=classes), 1),
    )
    table, graphs = sampler_table(config.diffusion, sampler), StandIn() if execution.captured else None
    loop = SamplingLoop(unet, table, execution=execution, graphs=graphs, guide=guide)
    labels = LABELS if own_classes else ()
    images = sample(loop, replace(IMAGES, labels=labels, guidance=2.0)).double()
    told = torch.tensor([1, 3] if own_classes else [3, 3])
    own, other = (partial(book_of(each), labels=told) for each in (unet, guide))
    assert_are_the_textbooks(images, textbook.guided(own, other, 2.0), config.diffusion, sampler)
    other_weights = perturbed(guide.config, 2)
    loop.load_weights(unet, other_weights)
    guided = textbook.guided(own, partial(book_of(other_weights), labels=told), 2.0)
    images = sample(loop, replace(IMAGES, labels=labels, guidance=2.0)).double()
    assert_are_the_textbooks(images, guided, config.diffusion, sampler)


@pytest.mark.parametrize("build", [UNet, textbook.UNet], ids=["engine", "textbook"])
def test_a_conditional_network_is_diffusers(build):
    pytest.importorskip("diffusers")
    from bench.peers.diffusers import unet as diffusers_unet

    config = replace(CONDITIONAL, dropout=0.0)
    weights, theirs = perturbed(config, 0).state_dict(), diffusers_unet(config)
    theirs.load_state_dict(weights)
    ours = build(config)
    ours.load_state_dict(weights)
    x, t, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 30, 99]), torch.tensor([2, 0, 1, 3])
    with torch.no_grad():
        expected = theirs(x, t, class_labels=labels).sample
        torch.testing.assert_close(ours(x, t, labels=labels), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours(x, t, labels=labels.flip(0)), expected, atol=1e-3)
