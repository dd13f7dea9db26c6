"""Ctrl-C: held back where a step would be torn, and at once everywhere else."""

import os
import signal
import threading

import pytest

from labkit.training.interrupts import held_back


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt), held_back():
        press_ctrl_c()
        press_ctrl_c()
        done.append("all of it")
    assert done == ["all of it"]
    with pytest.raises(KeyboardInterrupt):
        press_ctrl_c()
        done.append("what comes after an interrupt outside")
    assert done == ["all of it"]


def test_the_handler_of_the_caller_is_called_and_stays():
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with held_back(), held_back():
            press_ctrl_c()
            assert heard == []
        assert heard == [signal.SIGINT]
        press_ctrl_c()
        assert len(heard) == 2
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_in_the_block_is_not_lost():
    with pytest.raises(KeyboardInterrupt) as raised, held_back():
        press_ctrl_c()
        raise ValueError("a full disk")
    assert isinstance(raised.value.__context__, ValueError)


def test_other_threads_are_left_alone():
    done = []

    def work():
        with held_back():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.getsignal(signal.SIGINT)]
