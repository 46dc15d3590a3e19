"""What the shell offers for the words of a command: configurations, keys, runs, datasets. It must be quick, and never
fail: a shell shows what a completion prints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer

Words = Callable[[typer.Context, str], list[str]]


def _starting(words: Callable[[typer.Context, str], Iterable[str]]) -> Words:
    """Those of the words that begin as the user has; none where finding them fails."""

    @functools.wraps(words)
    def offered(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            return [word for word in words(ctx, incomplete) if word.startswith(incomplete)]
        except Exception:
            return []

    return offered


@_starting
def configs(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Names of shipped configurations, grids for `compare` and experiments for others, and YAML files of the present
    folder (the shell itself completes paths)."""
    from rayexp.config import is_grid, shipped_configs

    grids = ctx.info_name == "compare"
    known = (name for name, path in shipped_configs().items() if is_grid(path) is grids)
    return [*known, *sorted(path.name for path in Path().glob("*.yaml"))]


@_starting
def keys(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """`KEY=` of a configuration: of a grid for `compare`."""
    from rayexp.config import CompareConfig, ExperimentConfig

    return _keys(CompareConfig if ctx.info_name == "compare" else ExperimentConfig)


def _keys(kind: Any, prefix: str = "") -> Iterable[str]:
    from rayexp.config.fields import models_of

    for name, field in kind.model_fields.items():
        inner = models_of(field.annotation)
        if inner and not isinstance(field.default, tuple | dict) and not field.is_required():
            yield from _keys(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}="


@_starting
def runs(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Names and directories of runs, and `@newest`; behind an `@`, which checkpoints there are."""
    from rayexp.runs.run import Run
    from rayexp.system.disk import MADE, NEWEST, matching

    storage = Path(ctx.params.get("runs") or "runs")
    name, at, _ = incomplete.rpartition("@")
    if at and name:
        run = Run.find(name, storage)
        return [f"{name}@{word}" for word in ("best", "last", *map(str, run.epochs()))]
    directories = [run.id for run in Run.all(storage)]
    own = sorted({found["name"] for one in directories if (found := MADE.fullmatch(one))})
    return [*(one for one in own if len(matching(one, directories)) == 1), *directories, NEWEST]


@_starting
def datasets(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Names of datasets."""
    from rayexp.data import DATASETS

    return DATASETS
