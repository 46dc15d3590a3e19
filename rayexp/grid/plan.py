"""The plan of a device grid: which cells run here, which do not and why. Plain arithmetic, no torch, no Ray."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayexp.config import CompareConfig, ExperimentConfig, ScaleConfig, find_config, load, parse, refuse_contradictions
from rayexp.config.code import resolve
from rayexp.display import counted
from rayexp.errors import UserError, nearest
from rayexp.grid.comparison import PLAIN, Cell
from rayexp.launch import placement as planning
from rayexp.launch.placement import Node
from rayexp.system.threads import threads_per_shard

LOSSES = ("val_loss", "train_loss")  # of any workload, beside its own metrics


def base_of(config: CompareConfig, folder: Path) -> ExperimentConfig:
    """The base experiment, as its file says; `folder` is where the grid's file lies.

    Raises:
        UserError: there is no such file, or it is wrong.
    """
    return load(find_config(config.base, folder))


def with_overrides(
    base: ExperimentConfig, overrides: Mapping[str, Any], folder: Path | None = None
) -> ExperimentConfig:
    """The base with the grid's overrides on top, nested or with dotted keys (nested ones win).

    Args:
        base: its references are resolved.
        overrides: references to files in it are absolute.
        folder: where the grid's file lies; None: nowhere.

    Raises:
        UserError: a key is unknown, is part of the grid, or is not for this data, or its value is not allowed.
    """
    tree = base.model_dump(mode="json")
    dotted = {k: v for k, v in overrides.items() if "." in k}
    for keys, value in [*_leaves(dotted), *_leaves({k: v for k, v in overrides.items() if "." not in k})]:
        if keys[0] in ("scaling", "reduction", "precision", "storage_path", "name"):
            raise UserError(f"overrides.{'.'.join(keys)}: the grid itself says {keys[0]}; set it outside of overrides")
        inner = tree
        for key in keys[:-1]:
            if not isinstance(inner.get(key), dict):
                inner[key] = {}
            inner = inner[key]
        inner[keys[-1]] = value
    resolve(tree, folder or Path.cwd(), "overrides")
    experiment = parse(tree, ExperimentConfig, "overrides")
    refuse_contradictions(experiment, "overrides")
    return experiment


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Any]]:
    for key, value in tree.items():
        here = (*path, *key.split("."))
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, here)
        else:
            yield list(here), value


def plan(config: CompareConfig, base: ExperimentConfig, nodes: Sequence[Node]) -> tuple[Cell, ...]:
    """All cells of the grid, those that cannot run with the reason.

    Args:
        config: the grid.
        base: the base experiment with the overrides on top.
        nodes: what is there, the driver's machine first.

    Raises:
        UserError: an entry of the grid makes no sense anywhere, or nothing at all could run.
    """
    if not nodes:
        raise UserError("the cluster has no machine")
    if config.target:
        _refuse_unknown_metrics(config, base)
    bases = [_with_batch(base, batch) for batch in config.batch_size or (base.batch_size,)]
    asked = [
        (precision, _cell(one, scaling, modes, precision, reduction, nodes))
        for one, mode, scaling, precision, reduction in itertools.product(
            bases,
            config.mode,
            config.scaling,
            config.precision or (base.precision,),
            config.reduction or (base.reduction,),
        )
        if (modes := _modes(config, scaling, mode))
    ]
    # On a CPU, auto is fp32, which the grid may hold already.
    explicit = [cell for precision, cell in asked if precision == cell.precision]
    cells = [cell for precision, cell in asked if precision == cell.precision or cell not in explicit]
    cells = _with_threads(cells, base)
    if config.baseline:
        kinds = dict.fromkeys((cell.kind, cell.precision, cell.batch) for cell in cells)
        plain = [
            _plain(one, kind, precision, nodes)
            for one in bases
            for kind, precision, batch in kinds
            if batch == one.batch_size
        ]
        cells = plain + cells
    return _named(cells, config)


def _refuse_unknown_metrics(config: CompareConfig, base: ExperimentConfig) -> None:
    from rayexp.workloads import workload_class

    known = (*workload_class(base).goals, *LOSSES)
    for metric in config.target:
        if metric not in known:
            raise UserError(
                f"target: {base.workload} has no metric {metric!r}{nearest(metric, known)}; allowed: {', '.join(known)}"
            )


def _with_batch(base: ExperimentConfig, batch: int) -> ExperimentConfig:
    """The base with another batch, in as many of its shards as can be."""
    return base.model_copy(update={"batch_size": batch, "shards": math.gcd(base.shards, batch)})


def _modes(config: CompareConfig, scaling: ScaleConfig, mode: str) -> tuple[str, ...]:
    """Of what scaling a cell is a point; none where another cell of the grid is that point already: one worker has the
    same batch either way."""
    alone = isinstance(scaling.num_workers, int) and scaling.num_workers <= 1
    if not alone:
        return (mode,)
    return config.mode if mode == config.mode[0] else ()


def _cell(
    base: ExperimentConfig,
    scaling: ScaleConfig,
    modes: tuple[str, ...],
    precision: str,
    reduction: str,
    nodes: Sequence[Node],
) -> Cell:
    workers = scaling.num_workers
    if isinstance(workers, tuple):
        raise UserError(f"scaling.num_workers: [{workers[0]}, {workers[1]}] is elastic, a grid compares fixed numbers")
    times = max(1, workers) if "weak" in modes else 1
    tree = base.model_dump(mode="json") | {
        "scaling": scaling.model_dump(mode="json"),
        "precision": precision,
        "reduction": reduction,
        "batch_size": base.batch_size * times,
        "shards": base.shards * times,
    }
    kind, devices = _devices(scaling, workers, reduction, nodes)
    skip = _reason(kind, workers, devices, precision, nodes)
    try:
        if skip is None:
            cell = parse(tree, ExperimentConfig, "")
            refuse_contradictions(cell, "")
            placed = planning.make(cell, nodes[:1] if workers == 0 else nodes)
            kind = "gpu" if placed.gpu else "cpu"
            if kind == "cpu" and placed.cpus:
                devices = workers * placed.cpus
                # What was decided here is what every repeat uses.
                tree["scaling"] |= {"cpus_per_worker": placed.cpus, "use_gpu": False}
    except UserError as error:
        skip = str(error).removeprefix(": ")
    if kind == "cpu" and precision == "auto":
        precision = tree["precision"] = "fp32"
    return Cell("", kind, workers, float(devices), precision, reduction, skip, tree, modes, base.batch_size)


def _with_threads(cells: Sequence[Cell], base: ExperimentConfig) -> list[Cell]:
    """The cells with `threads_per_shard` decided: one number for all that compute on CPUs, since their bits are
    compared, and no more than the smallest of them has cores for."""
    cpu = [cell for cell in cells if cell.kind == "cpu" and cell.skip is None]
    fitting = [threads_per_shard(cell.devices, cell.config["shards"]) for cell in cpu]
    decided = {"threads_per_shard": base.threads_per_shard or min(fitting, default=1)}
    return [replace(cell, config={**cell.config, **decided}) if cell in cpu else cell for cell in cells]


def _devices(scaling: ScaleConfig, workers: int, reduction: str, nodes: Sequence[Node]) -> tuple[str, float]:
    """What kind of device is asked for, and how many."""
    gpus = sum(node.gpus for node in nodes)
    asked = max(1, workers) * scaling.gpus_per_worker
    if scaling.use_gpu is True or (scaling.use_gpu == "auto" and 0 < asked <= gpus):
        return "gpu", asked
    if workers == 0:
        cores = max(1.0, nodes[0].cpus)
        return "cpu", min(scaling.lanes or cores, cores) if reduction == "exact" else cores
    return "cpu", workers * (scaling.cpus_per_worker or 1)


def _reason(kind: str, workers: int, devices: float, precision: str, nodes: Sequence[Node]) -> str | None:
    gpus, cores = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    there = "this machine has" if len(nodes) == 1 else f"the {len(nodes)} machines have"
    if kind == "gpu" and devices > gpus + 1e-6:
        return f"{counted(devices, 'GPU')} asked, {there} {gpus:g}"
    if kind == "cpu" and precision == "tf32":
        return "tf32 is a format of NVIDIA GPUs"
    if kind == "cpu" and workers and devices > cores + 1e-6:
        return f"{counted(devices, 'CPU core')} asked, {there} {cores:g}"
    return None


def _plain(base: ExperimentConfig, kind: str, precision: str, nodes: Sequence[Node]) -> Cell:
    """The single-process script: all cores of one machine, or one GPU."""
    devices = 1.0 if kind == "gpu" else max(1.0, nodes[0].cpus)
    skip = _reason(kind, 0, devices, precision, nodes[:1])
    scaling = ScaleConfig(num_workers=0, use_gpu=kind == "gpu").model_dump(mode="json")
    tree = base.model_dump(mode="json") | {"scaling": scaling, "precision": precision}
    if base.model.freeze or base.model.weights:
        skip = "the plain script draws all weights and trains all: it has no model.weights and no model.freeze"
    return Cell("", kind, 0, devices, precision, PLAIN, skip, tree, (), base.batch_size)


def _named(cells: Sequence[Cell], config: CompareConfig) -> tuple[Cell, ...]:
    """Give every cell a name of its own."""
    named: dict[str, Cell] = {}
    several = len(config.precision) > 1
    for cell in cells:
        where = "inprocess" if not cell.workers else f"x{cell.workers}"
        parts = [cell.kind, *([] if cell.reduction == PLAIN else [where]), cell.reduction]
        parts += [cell.precision] if several else []
        parts += ["weak"] if len(config.mode) > 1 and cell.modes == ("weak",) else []
        parts += [f"b{cell.batch}"] if len(config.batch_size) > 1 else []
        name = "-".join(parts)
        of = (cell.reduction, cell.modes, cell.batch)
        twins = [other for other in named.values() if (other.reduction, other.modes, other.batch) == of]
        if any(cell.config == {**other.config, "name": cell.config["name"]} for other in twins):
            raise UserError(f"scaling: the grid holds the cell {name} twice")
        if name in named:
            name += f"-{cell.devices:g}{'gpus' if cell.kind == 'gpu' else 'cores'}"
        if name in named:
            name += f"-{len(named)}"
        tree = {**cell.config, "name": name}
        named[name] = replace(cell, id=name, config=tree)
    return tuple(named.values())
