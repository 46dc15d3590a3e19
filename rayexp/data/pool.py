"""A function run by several Python processes: JSON arguments in, bytes out, results in order.

Why not multiprocessing: its children run the caller's main module again (a script or notebook without a guard would
start itself over), and a fork copies locks that other threads hold. These children import one function and nothing
of the caller. They leave when the caller does, however it ends: their input closes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import rayexp
from rayexp.errors import RunError, UserError
from rayexp.system.cores import cores as cores

HEAD = struct.Struct("<cQ")  # R(esult), U(ser error) or F(ailure); bytes that follow


def ordered(function: str, calls: Iterable[list[Any]], processes: int | None = None) -> Generator[bytes]:
    """The results of `module:name` for each list of JSON arguments, in the order of the calls.

    At most two calls per process are under way, so memory stays bounded. Closing the iterator ends the processes.

    Raises:
        UserError: the function raised it.
        RunError: the function failed otherwise, or a process died.
    """
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
    children: list[subprocess.Popen[bytes]] = []
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
            child.kill()
        threads.shutdown(cancel_futures=True)
        for child in children:
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe:
                    with contextlib.suppress(OSError):  # what was still to be sent goes nowhere
                        pipe.close()


def _start(function: str) -> subprocess.Popen[bytes]:
    paths, home = _paths(), str(Path(rayexp.__file__).parents[1])
    code = f"import sys; sys.path[:] = {[home, *paths]!r}; import rayexp; sys.path[:] = {paths!r}; " + (
        f"from rayexp.data.pool import serve; serve({function!r})"
    )
    # A session of its own: Ctrl-C goes to the parent alone, which then ends its children.
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def _paths() -> list[str]:
    """The caller's sys.path, the working directory last: it must not stand before the standard library (with a
    random.py or a queue.py in it). While a child starts, `-P` leaves it out."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return [path for path in sys.path if path]
    there = [path for path in sys.path if path and not (Path(path).exists() and here.samefile(path))]
    return [*there, str(here)] if len(there) < len(sys.path) else there


def _ask(child: subprocess.Popen[bytes], arguments: list[Any]) -> bytes:
    """Send one call and wait for its answer."""
    if child.stdin is None or child.stdout is None:
        raise RunError("a helper process has no pipes")
    with contextlib.suppress(OSError):  # where it died, reading says so
        child.stdin.write(json.dumps(arguments).encode() + b"\n")
        child.stdin.flush()
    head = child.stdout.read(HEAD.size)
    kind, size = HEAD.unpack(head) if len(head) == HEAD.size else (b"", 0)
    body = child.stdout.read(size)
    if not kind or len(body) < size:
        raise RunError(f"a helper process ended early (exit code {child.wait()}; -9 may mean: out of memory)")
    if kind == b"U":
        raise UserError(body.decode())
    if kind == b"F":
        raise RunError(f"a helper process failed: {body.decode()}")
    return body


def serve(function: str) -> None:
    """The child: answer calls until the input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever prints goes to stderr: stdout carries the answers.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    module, _, name = function.partition(":")
    target = getattr(importlib.import_module(module), name)
    for line in sys.stdin.buffer:
        try:
            kind, body = b"R", target(*json.loads(line))
        except UserError as error:
            kind, body = b"U", str(error).encode("utf-8", "backslashreplace")
        except Exception as error:
            kind, body = b"F", f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace")
        try:
            out.write(HEAD.pack(kind, len(body)))
            out.write(body)
            out.flush()
        except BrokenPipeError:  # the caller is gone, and so is everybody who would want to hear of it
            os._exit(0)
