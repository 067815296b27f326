"""The order of examples, and batches of them on the device."""

import numpy as np
import pytest
import torch

from ddpm_fast.data.batches import BatchSource, CopyAhead, ExampleOrder, split
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.diffusion.noise import key_from_seed
from ddpm_fast.errors import InputError


@pytest.mark.parametrize("count", [1, 3, 10])
def test_every_epoch_visits_every_image_once_however_it_is_split(count):
    order = ExampleOrder(key_from_seed(5), count)
    whole = order.indices(0, 4 * count)
    epochs = whole.view(4, count)
    assert all(sorted(epoch.tolist()) == list(range(count)) for epoch in epochs)
    if count == 10:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
    fresh = ExampleOrder(key_from_seed(5), count)
    split = torch.cat([fresh.indices(i, min(7, 4 * count - i)) for i in range(0, 4 * count, 7)])
    assert torch.equal(whole, split)
    assert torch.equal(ExampleOrder(key_from_seed(5), count).indices(2 * count, count), epochs[2])


def test_a_batch_is_a_channels_last_view_of_the_store():
    images = np.arange(5 * 4 * 6 * 3, dtype=np.uint8).reshape(5, 4, 6, 3)
    images.flags.writeable = False
    source = BatchSource(Dataset(images, "", ""), key_from_seed(0), torch.device("cpu"))
    batch, numbers = source.batch(3, 4)
    assert batch.shape == (4, 3, 4, 6)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert numbers.tolist() == [3, 4, 5, 6]
    rows = source.order.indices(3, 4)
    assert np.array_equal(batch.permute(0, 2, 3, 1).numpy(), images[rows.numpy()])


@pytest.mark.parametrize("holdout", [0.1, 0.5, 0.94])
def test_what_is_held_out_never_comes_whatever_the_seed(holdout):
    images = np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1)
    trained, held_out = split(50, holdout)
    assert len(held_out) == round(50 * holdout)
    assert sorted([*trained.tolist(), *held_out.tolist()]) == list(range(50))
    for seed in (0, 1):
        source = BatchSource(Dataset(images, "", ""), key_from_seed(seed), torch.device("cpu"), holdout)
        two_epochs, _ = source.batch(0, 2 * len(trained))
        assert sorted(two_epochs.flatten().tolist()) == sorted(2 * trained.tolist())


def test_a_share_that_leaves_nothing_is_refused():
    assert len(split(50, 0)[1]) == 0
    for holdout in (0.001, 0.999):
        with pytest.raises(InputError, match=r"--holdout 0\.\d+ of 50 images leaves none on one side"):
            split(50, holdout)


def test_rows_copied_ahead_are_those_asked_for():
    store = torch.arange(20 * 12, dtype=torch.uint8).view(20, 2, 2, 3)
    ahead = CopyAhead(store, torch.device("cpu"))
    first, second, third = (torch.tensor(rows) for rows in ([3, 1], [19, 0], [7, 7]))
    assert torch.equal(ahead.take(first), store[first])  # nothing was prepared
    ahead.prepare(second)
    assert torch.equal(ahead.take(second), store[second])
    ahead.prepare(second)
    assert torch.equal(ahead.take(third), store[third])  # other rows than those prepared


@pytest.mark.gpu
def test_batches_are_the_same_from_the_device_and_copied_ahead(monkeypatch):
    images = np.arange(50 * 12, dtype=np.uint8).reshape(50, 2, 2, 3)
    device, key = torch.device("cuda"), key_from_seed(0)
    resident = BatchSource(Dataset(images, "", ""), key, device)
    monkeypatch.setattr("ddpm_fast.data.batches.DEVICE_SHARE", 2**62)
    copied = BatchSource(Dataset(images, "", ""), key, device)
    assert copied.ahead is not None
    for first in (0, 8, 16, 48):
        assert all(torch.equal(a, b) for a, b in zip(resident.batch(first, 8), copied.batch(first, 8), strict=True))
