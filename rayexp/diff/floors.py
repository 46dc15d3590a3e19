"""Where noise floors come from: runs that a user names, or a file that `rayexp noise` has written.

runs/noise/<16 hex of the configuration's identity>-<epochs>.json
  layout   1
  key      sha256 of `identity`, see config/identity.py
  identity the configuration's keys that differ from their defaults, without seed, scaling, names and places
  epochs   that the runs were trained for
  kind, data_sha, n, tolerance    of the predictions, see NoiseFloor
  seeds, runs
  floors   a list, one an epoch: `epoch`, `changed` (m x m counts), `values` (acc1 or mean loss of each seed)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rayexp.config.identity import identity, identity_key
from rayexp.diff.changes import default_tolerance
from rayexp.diff.noise import NoiseComparison, NoiseFloor, floor_of, measure_of
from rayexp.diff.pair import Checkpoint, check, read
from rayexp.errors import UserError
from rayexp.runs.records import one_line
from rayexp.runs.run import Run
from rayexp.system.disk import write_json

LAYOUT = 1
FOLDER = "noise"

Floors = Callable[[Checkpoint, Checkpoint, float], NoiseFloor | None]
"""The floor for A, B and a tolerance; None where there is none."""


class OtherConfigurationError(UserError):
    """The runs of a floor have another configuration than both sides."""


def named(places: Callable[[int], Sequence[tuple[Run, int]]]) -> Floors:
    """The floor of runs that the user has named; `places` says at which epochs, given that of B."""
    return lambda a, b, tolerance: baseline(places(b.epoch), a, b, tolerance)


def stored(storage: Path, note: Callable[[str], None]) -> Floors:
    """The floor that is stored beside the runs or in `storage` (see `find`)."""
    return lambda a, b, tolerance: find(a, b, storage, tolerance, note)


def baseline(refs: Sequence[tuple[Run, int]], a: Checkpoint, b: Checkpoint, tolerance: float) -> NoiseFloor:
    """The floor of runs that the user has named.

    Raises:
        UserError: they are fewer than two; they differ by more than the seed, or do not differ by it; they are of
            other data than A and B; A and B are both of other configurations (OtherConfigurationError).
    """
    if len(refs) < 2:
        raise UserError("--baseline: two or more runs of one configuration with other seeds are expected, RUN RUN ...")
    checkpoints = [read(*ref) for ref in refs]
    first = checkpoints[0]
    for c in checkpoints:
        check(a, c)
        if c.epoch != first.epoch:
            raise UserError(f"--baseline: {first.name} and {c.name} are of different epochs")
    _only_seeds([c.run for c in checkpoints], "--baseline: ")
    if (differ := _differing(a.run, first.run)) and _differing(b.run, first.run):
        raise OtherConfigurationError(
            f"--baseline: {first.run.id} has another configuration than A and than B; it differs from A in {differ}"
        )
    return floor_of(checkpoints, first.run.config().epochs, tolerance)


def _only_seeds(runs: Sequence[Run], who: str) -> None:
    """Refuse (UserError) runs that differ by more than their seed, or do not differ by it."""
    seeds: dict[int, str] = {}
    for run in runs:
        if differ := _differing(runs[0], run, epochs=True):
            raise UserError(f"{who}{runs[0].id} and {run.id} differ by more than their seed: {differ}")
        seed = run.config().seed
        if seed in seeds:
            raise UserError(f"{who}{seeds[seed]} and {run.id} have the same seed, {seed}")
        seeds[seed] = run.id


def _differing(first: Run, second: Run, *, epochs: bool = False) -> str:
    """`lr (0.1 and 0.01), optimizer.name (sgd and adamw)`; empty where only the seed and places differ."""
    one, two = first.config(), second.config()
    a, b = identity(one), identity(two)
    if epochs:
        a["epochs"], b["epochs"] = one.epochs, two.epochs
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return ", ".join(f"{key} ({a.get(key, 'the default')} and {b.get(key, 'the default')})" for key in keys)


def beside(floor: NoiseFloor | None, a: Checkpoint, b: Checkpoint, changed: int) -> NoiseComparison | None:
    """A and B, of which so many judgements changed, beside a floor."""
    if floor is None:
        return None
    difference = measure_of(b.predictions) - measure_of(a.predictions)
    return NoiseComparison(floor, changed, difference, a.run.config().epochs)


def measured(runs: Sequence[Run]) -> list[NoiseFloor]:
    """The floors of finished runs that differ by their seed, one for each epoch.

    Raises:
        UserError: they differ by more; predictions are missing or of different data.
    """
    _only_seeds(runs, "")
    epochs = sorted(set.intersection(*({r.epoch for r in run.records()} for run in runs)))
    if not epochs:
        raise UserError("no epoch has finished in each of these runs")
    trained = runs[0].config().epochs
    last = [read(run, epochs[-1]) for run in runs]
    tolerance = default_tolerance(last[0].predictions, last[1].predictions)
    floors = []
    for epoch in epochs:
        checkpoints = [read(run, epoch) for run in runs] if epoch != epochs[-1] else last
        for c in checkpoints:
            check(checkpoints[0], c)
        floors.append(floor_of(checkpoints, trained, tolerance))
    return floors


def path_of(run: Run) -> Path:
    """Where the floor of a run's configuration and epochs is kept."""
    config = run.config()
    return run.root.parent / FOLDER / f"{identity_key(config)[:16]}-{config.epochs}.json"


def store(run: Run, floors: Sequence[NoiseFloor]) -> Path:
    """Write the floors of one configuration, that of a run among them; an older file is replaced."""
    first, path = floors[0], path_of(run)
    write_json(
        path,
        {
            "layout": LAYOUT,
            "key": identity_key(run.config()),
            "identity": identity(run.config()),
            "epochs": first.epochs,
            "kind": first.kind,
            "data_sha": first.data_sha,
            "n": first.n,
            "tolerance": first.tolerance,
            "seeds": first.seeds,
            "runs": first.runs,
            "floors": [
                {"epoch": f.epoch, "changed": f.changed.tolist(), "values": [_number(v) for v in f.values]}
                for f in floors
            ],
        },
    )
    return path


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def find(
    a: Checkpoint, b: Checkpoint, storage: Path, tolerance: float, note: Callable[[str], None]
) -> NoiseFloor | None:
    """The stored floor for a comparison: of A's configuration, else of B's; beside their runs, else in `storage`; from
    runs as long as the side's own, else from the longest; at B's epoch, or the last before it.

    Args:
        tolerance: of the comparison; a floor of another one is counted anew from its runs.
        note: is told why a floor that is there cannot be used.

    Raises:
        UserError: a file that bears the configuration's key is damaged.
    """
    for side in (a, b):
        config = side.run.config()
        key = identity_key(config)
        for folder in dict.fromkeys((side.run.root.parent, storage)):
            found = [_load(path, key) for path in sorted((folder / FOLDER).glob(f"{key[:16]}-*.json"))]
            same = (side.predictions.kind, side.predictions.data_sha, len(side.predictions))
            trees = [t for t in found if t and (t["kind"], t["data_sha"], t["n"]) == same]
            if trees:
                floor = _at(max(trees, key=lambda t: (t["epochs"] == config.epochs, t["epochs"])), b.epoch)
                return floor if floor.tolerance == tolerance else _anew(floor, folder, tolerance, note)
    return None


def _anew(floor: NoiseFloor, folder: Path, tolerance: float, note: Callable[[str], None]) -> NoiseFloor | None:
    try:
        checkpoints = [read(Run(folder / name), floor.epoch) for name in floor.runs]
    except UserError as error:
        counted = f"the noise floor was counted with a tolerance of {floor.tolerance:g}"
        note(f"{counted}, and its runs cannot be read: {error}")
        return None
    return replace(floor_of(checkpoints, floor.epochs, tolerance), source=floor.source)


def _load(path: Path, key: str) -> dict[str, Any] | None:
    """A file's content, checked; None where it is of another key, or of a newer layout."""
    try:
        tree = json.loads(path.read_bytes())
        if tree["layout"] > LAYOUT or tree["key"] != key:
            return None
        m = len(tree["seeds"])
        shapes = {np.shape(f["changed"]) for f in tree["floors"]} | {(len(f["values"]), m) for f in tree["floors"]}
        if shapes != {(m, m)} or m < 2 or not all(isinstance(tree[name], int) for name in ("epochs", "n")):
            raise ValueError("the counts do not fit the seeds")
        return dict(tree)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a noise floor ({one_line(error)}); `rayexp noise` writes it anew, without it there is none"
        ) from error


def _at(tree: dict[str, Any], epoch: int) -> NoiseFloor:
    floors: Iterable[dict[str, Any]] = sorted(tree["floors"], key=lambda f: f["epoch"])
    chosen = [f for f in floors if f["epoch"] <= epoch] or [next(iter(floors))]
    at = chosen[-1]
    return NoiseFloor(
        kind=tree["kind"],
        data_sha=tree["data_sha"],
        n=tree["n"],
        epochs=tree["epochs"],
        epoch=at["epoch"],
        tolerance=tree["tolerance"],
        seeds=tuple(tree["seeds"]),
        runs=tuple(tree["runs"]),
        changed=np.array(at["changed"], np.int64),
        values=np.array([np.nan if v is None else v for v in at["values"]], np.float64),
        source="stored by rayexp noise",
    )
