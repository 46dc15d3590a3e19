"""Open the trackers that a configuration names, and make sure before a run begins that they can be."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from rayexp.errors import UserError
from rayexp.runs.run import Run
from rayexp.runs.trackers.background import BackgroundTracker
from rayexp.runs.trackers.tracker import VARIABLES, Tracker, environment, recall, remember

OUTSIDE = ("mlflow", "wandb")
"""Trackers that are extras, and not part of the run directory."""
_live: dict[tuple[Path, str], BackgroundTracker] = {}  # those that this process has opened and nobody has ended


def refuse_missing(names: Iterable[str]) -> None:
    """Refuse a tracker whose library is not installed (UserError)."""
    for name in names:
        if name in OUTSIDE and importlib.util.find_spec(name) is None:
            raise UserError(f"tracking: {name} is not installed; pip install 'rayexp[{name}]', or leave it out")


def hand_on(run: Run, names: Iterable[str]) -> None:
    """Note in the run directory what this process's environment says of where trackers are."""
    for name in names:
        found = {variable: os.environ[variable] for variable in VARIABLES.get(name, ()) if variable in os.environ}
        found = {variable: value for variable, value in found.items() if not _may_be_secret(value)}
        if found:
            remember(run, name, environment={**environment(run, name), **found})


def _may_be_secret(place: str) -> bool:
    """Whether a URL has a password in it, or is none that can be told."""
    try:
        return bool(urlsplit(place).password)
    except ValueError:
        return True


def opened(run: Run) -> list[Tracker]:
    """The trackers of a run, as its configuration names them."""
    made: list[Tracker] = []
    for name in run.config().tracking:
        if name == "tensorboard":
            from rayexp.runs.tensorboard import TensorBoard

            made.append(TensorBoard(run))
        else:
            for ended in [key for key, tracker in _live.items() if tracker.ended]:
                del _live[ended]
            _live[run.root, name] = found = BackgroundTracker(name, run)
            made.append(found)
    return made


def told(run: Run) -> list[Tracker]:
    """The trackers outside that have been told that this run trains, and not that it has ended."""
    under_way = [name for name in OUTSIDE if recall(run, name).get("under_way")]
    # A worker in this process has one that nobody has ended; a second one would be refused.
    live = {name: found for (root, name), found in _live.items() if root == run.root and not found.ended}
    return [live.get(name) or BackgroundTracker(name, run) for name in under_way]
