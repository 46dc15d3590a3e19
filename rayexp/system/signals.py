"""The signals that ask a command to stop: Ctrl-C, a batch system's SIGTERM and its notice SIGUSR1, a closed terminal.

A command that one of them has ended exits with 128 + its number: 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1, 129 SIGHUP.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from rayexp.errors import Stopped

# Not every system has all of them.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


@contextlib.contextmanager
def handled(handler: Callable[[signal.Signals], None]) -> Iterator[None]:
    """While this lasts, the signals call the handler. Outside the main thread they are left alone.

    SIGHUP stays ignored where it was: that is what `nohup` asks for. A signal whose handler was not set by Python stays
    with that handler, which could not be put back.
    """

    def call(number: int, frame: FrameType | None) -> None:
        handler(signal.Signals(number))

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            present = signal.getsignal(number)
            if present is not None and (number is signal.SIGINT or present is not signal.SIG_IGN):
                before[number] = signal.signal(number, call)
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


@contextlib.contextmanager
def ending() -> Iterator[Callable[[signal.Signals], None]]:
    """For what has nothing to save: while this lasts, the signals raise Stopped. Gives the handler that does it.

    Ray makes a plain KeyboardInterrupt of it where it comes within a call to Ray; here it is Stopped again.
    """
    heard: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        heard.append(number)
        raise Stopped(number)

    try:
        with handled(stop):
            yield stop
    except KeyboardInterrupt as error:
        if heard and not isinstance(error, Stopped):
            raise Stopped(heard[0]) from error
        raise


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Processes that are started within do not hear the signals, nor do those that these start.

    A batch system sends its signal to every process at once. It is this one that answers it: Ray and the workers must
    live on until the step is saved. (Ray itself does the same with SIGINT.)
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def own_sigterm() -> Iterator[None]:
    """The handler of SIGTERM stays what it is, whatever the block makes of it.

    ray.init sets one of its own, which would end the command in the middle of its work, and ray.shutdown goes back to
    the system's, unseen by Python's getsignal.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
