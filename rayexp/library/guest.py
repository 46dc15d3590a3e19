"""A guest in another program's process: what a call changes there for its own time is as before when it returns."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rayexp.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

_ALONE = threading.Lock()
_present = ""  # the call that holds the lock, for the error of the other one


@contextlib.contextmanager
def guest(call: str) -> Iterator[None]:
    """Restore after the block: PyTorch's settings (see engine/settings.py), the states of the global random generators
    (torch, numpy, random), environment variables, the working directory, warning filters and exception hooks.

    Args:
        call: what is called, for errors.

    Raises:
        UserError: another thread, or a callback, is inside such a block: these settings belong to the process, so that
            two calls at once would train with each other's.
    """
    global _present
    if not _ALONE.acquire(blocking=False):
        raise UserError(f"{call}: {_present} is at work in this process; allowed: one after the other")
    try:
        _present = call
        with _environment_kept():
            # What comes with PyTorch is imported before, so that no filter that it sets for itself is taken away.
            from rayexp.engine import settings
            from rayexp.launch import worker  # noqa: F401

            with settings.kept(), _process_kept():
                yield
    finally:
        _ALONE.release()


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    environment = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


@contextlib.contextmanager
def _process_kept() -> Iterator[None]:
    folder = Path.cwd()
    filters, hooks = list(warnings.filters), (sys.excepthook, threading.excepthook)
    draws, arrays = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        os.chdir(folder)
        warnings.filters[:] = filters  # type: ignore[index]
        sys.excepthook, threading.excepthook = hooks
        random.setstate(draws)
        np.random.set_state(arrays)


def console(progress: bool) -> Console | None:
    """Where progress is shown: stderr, whatever that is now (a terminal, a notebook's, a file); None: nowhere."""
    from rich.console import Console

    return Console(stderr=True, force_jupyter=False) if progress else None
