"""Ctrl-C at the right moment: not between two halves of a step.

A step of an optimizer changes one parameter after the other, and a checkpoint says how many steps were taken.
An interrupt between the two would leave weights that no whole number of steps leads to. So it is held back
until the block is done. Everywhere else it comes at once, for a forward pass may take minutes.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_back() -> Iterator[None]:
    """Within the block an interrupt waits; it comes at the end. (Other threads than the main one get none.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if before is None:  # it was set from C, and could not be put back
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)
