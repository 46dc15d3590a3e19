"""The command that resumes a run or a comparison, as it can be typed where this one was."""

from __future__ import annotations

import shlex
from pathlib import Path

from rayexp.cluster.job_context import job_id
from rayexp.errors import GO_ON

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


def here(path: Path) -> Path:
    """The path as it is shortest from the working directory: relative where it lies below, else absolute."""
    whole, folder = path.resolve(), Path.cwd()
    return whole.relative_to(folder) if whole.is_relative_to(folder) else whole
