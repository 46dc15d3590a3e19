"""Run a function in several Python processes, with results in order. Calls and results are sent over connections of
multiprocessing.

Why not ProcessPoolExecutor: with spawn it runs the caller's main module again (a script without a guard would start
itself again), and with fork it copies locks that other threads hold. loky does neither, but its workers survive if the
caller is killed, and its resource tracker imports from the working directory. The children here import the function and
nothing from the caller. They end when the caller ends, even if it is killed, because their connection is closed.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import rayexp
from rayexp.errors import RunError, UserError
from rayexp.system.cores import cores as cores


@dataclass(frozen=True, slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    connection: Connection


def ordered(function: str, calls: Iterable[list[Any]], processes: int | None = None) -> Generator[bytes]:
    """The results of the function `module:name` for each list of arguments, in the order of the calls.

    At most two calls per process are pending, so that memory is bounded. Closing the iterator ends the processes.

    Raises:
        UserError: the function raised it.
        RunError: the function failed otherwise, or a process died.
    """
    idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
    children: list[_Child] = []
    processes = processes or cores()

    def call(arguments: list[Any]) -> bytes:
        child = idle.get()
        try:
            return _ask(child, arguments)
        finally:
            idle.put(child)

    threads = ThreadPoolExecutor(processes, thread_name_prefix="rayexp-pool")
    waiting: deque[Future[bytes]] = deque()
    try:
        for arguments in calls:
            if len(children) < processes:
                children.append(_start(function))
                idle.put(children[-1])
            waiting.append(threads.submit(call, arguments))
            if len(waiting) >= 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for child in children:
            child.process.kill()
        threads.shutdown(cancel_futures=True)
        for child in children:
            child.process.wait()
            child.connection.close()


def _start(function: str) -> _Child:
    paths, home = _paths(), str(Path(rayexp.__file__).parents[1])
    ours, theirs = Pipe()
    code = f"import sys; sys.path[:] = {[home, *paths]!r}; import rayexp; sys.path[:] = {paths!r}; " + (
        f"from rayexp.data.pool import serve; serve({function!r}, {theirs.fileno()})"
    )
    with theirs:
        # In its own session, so that Ctrl-C goes only to the parent, which then ends its children.
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=2,  # prints go to stderr, because the command's stdout may be JSON
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    return _Child(process, ours)


def _paths() -> list[str]:
    """The caller's sys.path with the working directory last: it must not precede the standard library, since it may
    contain a random.py or a queue.py. While a child starts, `-P` leaves it out."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return [path for path in sys.path if path]
    there = [path for path in sys.path if path and not (Path(path).exists() and here.samefile(path))]
    return [*there, str(here)] if len(there) < len(sys.path) else there


def _ask(child: _Child, arguments: list[Any]) -> bytes:
    """Send one call and wait for its result."""
    try:
        child.connection.send(arguments)
        answer: bytes | Exception = child.connection.recv()
    except (EOFError, OSError):
        code = child.process.wait()
        raise RunError(f"a helper process ended early (exit code {code}; -9 may mean: out of memory)") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def serve(function: str, descriptor: int) -> None:
    """The main function of a child: answer calls until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(descriptor)
    module, _, name = function.partition(":")
    target = getattr(importlib.import_module(module), name)
    with contextlib.suppress(EOFError, ConnectionError):  # the caller is gone
        while True:
            arguments = connection.recv()
            answer: bytes | Exception
            try:
                answer = target(*arguments)
            except UserError as error:
                answer = UserError(str(error))
            except Exception as error:
                answer = RunError(f"a helper process failed: {type(error).__name__}: {error}")
            connection.send(answer)
