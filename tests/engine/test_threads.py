"""The number of threads is the one that a measurement finds clearly fastest, and the user's own choice wins."""

from collections.abc import Iterator

import pytest
import torch

from ddpm_fast.engine import threads
from ddpm_fast.engine.threads import candidates, choose_threads, fastest


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Machine:
    """Whose work takes a time that depends on the number of threads, and now and then much longer."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds, self.now, self.calls = seconds, 0.0, 0

    def work(self) -> None:
        self.calls += 1
        self.now += self.seconds[torch.get_num_threads()] * (10 if self.calls % 5 == 0 else 1)

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({2: 0.01, 1: 0.017}, 2),  # a quiet machine
        ({2: 0.01, 1: 0.009}, 2),  # no clear difference
        ({2: 0.2, 1: 0.02}, 1),  # another process holds a core
        ({8: 0.01, 4: 0.005, 1: 0.02}, 4),
        ({1: 0.02}, 1),
    ],
)
def test_fewer_threads_are_taken_where_they_are_clearly_faster(seconds, best):
    machine = Machine(seconds)
    assert fastest(list(seconds), machine.work, machine.clock) == best
    assert machine.now < 5 * threads.SECONDS or best == 1


def test_all_a_half_and_one_are_tried():
    assert [candidates(number) for number in (1, 2, 3, 64)] == [[1], [2, 1], [3, 1], [64, 32, 1]]


def test_the_choice_is_set(monkeypatch):
    for name in threads.USERS:
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "fastest", lambda numbers, work: numbers[-1])
    assert choose_threads() == torch.get_num_threads() == 1


@pytest.mark.parametrize("name", threads.USERS)
def test_the_users_number_stays(monkeypatch, name):
    torch.set_num_threads(2)
    monkeypatch.setenv(name, "2")
    monkeypatch.setattr(threads, "fastest", lambda numbers, work: 1)
    assert choose_threads() == torch.get_num_threads() == 2


def test_measuring_leaves_no_gradient_and_draws_no_number():
    state = torch.get_rng_state()
    work = threads._block_of_digits()
    work()
    assert torch.equal(torch.get_rng_state(), state)
