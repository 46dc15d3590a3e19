"""The command that resumes a run or a comparison, as it can be typed where this one was."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path

from rayexp.cluster.job_context import job_id
from rayexp.errors import GO_ON, RunError, Stopped, UserError

RUNS = Path("runs")  # where `--resume` looks without --runs


def go_on(root: Path, command: str = "train") -> str:
    """The end of a line that says why a run (or comparison) has ended: `; go on with: rayexp train --resume RUN`.

    Args:
        root: its directory.
        command: `train` or `compare`.
    """
    if job_id() is not None and command == "train":
        return f"{GO_ON}rayexp submit CONFIG --resume {shlex.quote(root.name)}"
    words = ["rayexp", command, "--resume", root.name]
    if root.parent.resolve() != RUNS.resolve():
        words += ["--runs", str(here(root.parent))]
    return GO_ON + shlex.join(words)


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """For a run whose directory is thrown away when it ends: its errors say what is wrong, and neither how to go on nor
    where to read more."""
    try:
        yield
    except Stopped as stopped:
        raise Stopped(stopped.number) from stopped
    except UserError as error:
        raise UserError(error.fault) from error
    except RunError as error:
        raise RunError(error.fault) from error


def here(path: Path) -> Path:
    """The path as it is shortest from the working directory: relative where it lies below, else absolute."""
    whole, folder = path.resolve(), Path.cwd()
    return whole.relative_to(folder) if whole.is_relative_to(folder) else whole
