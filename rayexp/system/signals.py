"""The signals that ask a command to stop: Ctrl-C, SIGTERM or a warning (SIGUSR1) from a batch system, a closed
terminal.

A command ended by one of them exits with 128 + its number: 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1, 129 SIGHUP.
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
    """Handle the signals with `handler` inside the `with` block. Does nothing outside the main thread.

    A signal that is ignored stays ignored, which is what `nohup` asks for (except SIGINT). A signal with a handler that
    Python did not set keeps it, because it could not be restored.
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
    """Let the signals raise Stopped inside the `with` block, for commands with nothing to save. Yields the handler.

    A Stopped that is raised within a call to Ray becomes a plain KeyboardInterrupt there; it is turned back here.
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
    """Block the signals for processes that are started inside the `with` block, and for their children.

    A batch system sends its signal to every process at once. Only this process responds to it; Ray and the workers must
    live until the step is saved. (Ray itself does the same with SIGINT.)
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def own_sigterm() -> Iterator[None]:
    """Restore the handler of SIGTERM after the `with` block.

    ray.init installs a handler that would end the command in the middle of its work, and ray.shutdown restores the
    system's default, which Python's getsignal does not show.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
