"""How a signal ends work: at once, after what must be whole, or that as well when it comes twice."""

import os
import signal
import threading

import pytest

from ddpm_fast.runs.signals import NUMBERS, InterruptedRunError, Signals


def send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def send_and_note(reached: list[str], place: str, number: int = signal.SIGINT) -> None:
    send(number)
    reached.append(place)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_ends_the_work_where_it_arrives(number):
    reached: list[str] = []
    with Signals(), pytest.raises(InterruptedRunError) as interrupted:
        send_and_note(reached, "the next line", number)
    assert reached == []
    assert (interrupted.value.number, interrupted.value.exit_status) == (number, 128 + number)


def hold_and_send(signals: Signals, reached: list[str], times: int) -> None:
    with signals.held():
        with signals.held():
            for time in range(1, times + 1):
                send_and_note(reached, f"after {time}")
        reached.append("held")
    reached.append("behind")


def test_what_is_held_is_finished_first():
    reached: list[str] = []
    with Signals() as signals, pytest.raises(InterruptedRunError):
        hold_and_send(signals, reached, times=1)
    assert reached == ["after 1", "held"]


def test_a_second_signal_ends_what_is_held_and_a_third_the_process():
    reached: list[str] = []
    with Signals() as signals:
        with pytest.raises(InterruptedRunError):
            hold_and_send(signals, reached, times=2)
        handlers = {signal.getsignal(number) for number in NUMBERS}
    assert reached == ["after 1"]
    assert handlers == {signal.SIG_DFL}


def test_after_a_signal_what_is_left_to_do_can_be_held():
    with Signals() as signals:
        with pytest.raises(InterruptedRunError):
            send()
        with signals.held():
            saved = True
    assert saved


def test_no_except_exception_stops_it():
    assert not issubclass(InterruptedRunError, Exception)


def test_handlers_are_restored_and_other_threads_set_none():
    before = [signal.getsignal(number) for number in NUMBERS]
    with Signals():
        during = [signal.getsignal(number) for number in NUMBERS]
        assert during != before
        found = []

        def enter() -> None:
            with Signals():
                found.extend(signal.getsignal(number) for number in NUMBERS)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        assert found == during
    assert [signal.getsignal(number) for number in NUMBERS] == before
