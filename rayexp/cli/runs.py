"""`rayexp runs`, and its second form `rayexp runs rm`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from rayexp.cli import _complete
from rayexp.cli._app import RUNS, Command, JsonOption, RunsOption, app
from rayexp.cli._output import print_json, print_table, say, tell
from rayexp.cli._runs_du import show_disk_use
from rayexp.cli.runs_rm import rm_app
from rayexp.display import NOT_FINITE, counted, figure, short

if TYPE_CHECKING:
    from pathlib import Path

    from rayexp.config import ExperimentConfig
    from rayexp.grid.comparison import Comparison
    from rayexp.runs.run import Run


class _RunsCommand(Command):
    """`runs [RUN]`, and `runs rm RUN...`, which is a command of its own."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """See click, which runs the command of the context that it gets."""
        if args[:1] == ["rm"]:
            command = typer.main.get_command(rm_app)
            return command.make_context(f"{info_name} rm", args[1:], parent=parent, **extra)
        return super().make_context(info_name, args, parent=parent, **extra)


@app.command("runs", cls=_RunsCommand, short_help="List the runs, show one with its epochs, check or remove them.")
def runs_command(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="Show this one with its epochs.",
            autocompletion=_complete.runs,
            show_default=False,
        ),
    ] = None,
    runs: RunsOption = RUNS,
    check: Annotated[
        bool, typer.Option("--check", help="Check every file against its hash (of all runs, where none is named).")
    ] = False,
    comparisons: Annotated[
        bool, typer.Option("--comparisons", help="List the comparisons that `rayexp compare` made, not the runs.")
    ] = False,
    du: Annotated[bool, typer.Option("--du", help="How much room they take on disk, the largest first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the runs, oldest first; or show one with its epochs. --check exits with 1 where something is damaged.

    `rayexp runs rm RUN...` removes runs.

    RUN is a directory, its name, or any part of the name that fits one run alone; a run's own name comes first, and
    @newest is the run that was made last.
    """
    from rayexp.errors import UserError
    from rayexp.grid.comparison import Comparison
    from rayexp.runs.run import Run

    if comparisons:
        if run is not None or check or du:
            raise UserError("--comparisons lists all comparisons; `rayexp report NAME` shows one")
        _list_comparisons(Comparison.all(runs), runs, as_json)
        return

    if du:
        every = [*(one.root for one in Run.all(runs)), *(one.root for one in Comparison.all(runs))]
        show_disk_use([Run.locate(run, runs).root] if run is not None else every, runs, as_json)
        return
    if check:
        found = [Run.locate(run, runs)] if run is not None else Run.all(runs)
        if not found and not as_json:
            tell(f"no runs in {runs}")
        _check(found, as_json)
        return
    if run is not None:
        _show(Run.find(run, runs), as_json)
        return
    rows = [_fields(one) for one in Run.all(runs)]
    if as_json:
        print_json(rows)
        return
    if rows:
        drop = ("workload", "device", "other metrics", "workers", "best", "epochs")
        print_table([_row(one) for one in rows], drop=drop)
        for one in rows:
            if one["status"] == "damaged":
                tell(f"{one['run']}: {one['metric']}")
    else:
        tell(f"no runs in {runs}")
    if more := len(Comparison.all(runs)):
        say(f"{counted(more, 'comparison')} there, too: rayexp runs --comparisons")


def _list_comparisons(found: list[Comparison], runs: Path, as_json: bool) -> None:
    rows = [_comparison_fields(one) for one in found]
    if as_json:
        print_json(rows)
    elif rows:
        print_table(rows)
    else:
        tell(f"no comparisons in {runs}")


def _comparison_fields(made: Comparison) -> dict[str, Any]:
    """A comparison's line of the table."""
    from rayexp.errors import UserError

    fields: dict[str, Any] = dict.fromkeys(["comparison", "status", "cells", "skipped", "runs", "failed"])
    fields["comparison"] = made.id
    try:
        cells, rows, config = made.cells(), made.rows(), made.config()
        planned = [cell for cell in cells if cell.skip is None]
        return fields | {
            "status": made.status(),
            "cells": len(planned),
            "skipped": len(cells) - len(planned),
            "runs": f"{sum(row.status == 'done' for row in rows)}/{len(planned) * config.repeats}",
            "failed": sum(row.status != "done" for row in rows),
        }
    except UserError as error:
        return fields | {"status": f"damaged: {error}"}


def _check(found: list[Run], as_json: bool) -> None:
    from rayexp.runs.integrity import examine

    checked = {run.id: examine(run) for run in found}
    damaged = {name: [f for f in findings if f.state == "damaged"] for name, findings in checked.items()}
    if as_json:
        print_json(
            [
                {
                    "run": name,
                    "ok": not damaged[name],
                    "checked": [{"what": f.what, "state": f.state, "detail": f.detail} for f in findings],
                }
                for name, findings in checked.items()
            ]
        )
    elif len(checked) == 1:
        print_table([{"what": f.what, "state": f.state, "detail": f.detail} for f in next(iter(checked.values()))])
    for name, findings in {} if as_json else checked.items():
        covered = sum(f.state == "ok" for f in findings)
        without = sum(f.state == "not covered" for f in findings)
        removed = sum(f.state == "not kept" for f in findings)
        bare = f", {without} not covered by one" if without else ""
        gone = f"; {counted(removed, 'checkpoint')} not kept" if removed else ""
        tell(
            f"{name}: {'damaged: ' + '; '.join(map(str, damaged[name])) if damaged[name] else 'ok'} "
            f"({covered} of {len(findings) - removed} by their hashes{bare}{gone})"
        )
    raise typer.Exit(1 if any(damaged.values()) else 0)


def _fields(run: Run) -> dict[str, Any]:
    """A run's line of the table."""
    from rayexp.errors import UserError
    from rayexp.runs.records import best

    fields: dict[str, Any] = dict.fromkeys(
        ["run", "status", "workload", "workers", "device", "epochs", "best", "metric", "last weights"]
    )
    fields["run"] = run.id
    try:
        meta, config, records = run.meta(), run.config(), run.records()
        fields |= {
            "status": run.status(),
            "workload": config.workload,
            "workers": meta.get("world_size"),
            "device": meta.get("device"),
            "epochs": f"{len(records)}/{config.epochs}",
        }
        if records:
            fields |= {"metric": NOT_FINITE, "last weights": records[-1].weights_sha[:12]}
        if found := best(records, run.goals()):
            metrics = ", ".join(f"{name} {figure(value, '.2f')}" for name, value in found.metrics.items())
            fields |= {"best": found.epoch, "metric": metrics}
    except UserError as error:
        fields |= {"status": "damaged", "metric": str(error)}
    return fields


def _row(fields: dict[str, Any]) -> dict[str, Any]:
    """The same for the table: of several metrics the first has a column of its own, hashes are short, and what is
    damaged is said below."""
    metric = "" if fields["status"] == "damaged" else str(fields["metric"] or "")
    first, _, others = metric.partition(", ")
    row = {name: value for name, value in fields.items() if name != "last weights"}
    return row | {"metric": first, "other metrics": others, "weights": short(fields["last weights"] or "")}


def _show(run: Run, as_json: bool) -> None:
    from rayexp.runs.records import best, ranges
    from rayexp.runs.residency import residency_of, steps_of
    from rayexp.runs.retention import not_kept

    meta, records = run.meta(), run.records()
    if as_json:
        fields = {**meta, "status": run.status(), "path": str(run.root)}
        print_json({**fields, "epochs": [r.to_json() for r in records], "checkpoints": run.epochs()})
        return
    gone = not_kept(run)
    shown = {
        "path": run.root,
        "status": run.status(),
        "error": meta.get("error"),
        "workload": _workload(run.config()),
        "where": _where(meta),
        "samples": residency_of(meta),
        "steps": steps_of(meta) or None,
        "created": meta.get("created"),
        "finished": meta.get("finished"),
        "kept": f"checkpoints of {ranges(run.epochs())} (checkpoint.keep: {gone[max(gone)]})" if gone else None,
    }
    for name, value in shown.items():
        if value is not None:
            tell(f"{name:<9} {value}")
    if not records:
        return
    found, names = best(records, run.goals()), dict.fromkeys(name for r in records for name in r.metrics)
    tell()
    print_table(
        [
            {
                "epoch": f"{r.epoch}{' best' if r is found else ''}",
                "step": r.step,
                "train_loss": figure(r.train_loss, ",.4g"),
                "val_loss": figure(r.val_loss, ",.4g"),
                **{name: figure(r.metrics.get(name), ".2f") for name in names},
                "lr": figure(r.lr, ".3g"),
                "samples/s": figure(r.samples_per_second, ",.1f"),
                "seconds": figure(r.seconds.get("total"), ",.1f"),
                "workers": r.world_size,
                "weights": short(r.weights_sha),
            }
            for r in records
        ],
        drop=("workers", "samples/s", "lr", "step", "seconds", *list(names)[:0:-1]),
    )


def _workload(config: ExperimentConfig) -> str:
    """`image_classification, resnet18, data shapes`; a workload of the user's own may have neither model nor data."""
    names = [config.workload, config.subject, f"data {config.data.name}"]
    return ", ".join(names if config.subject != config.workload else names[:1])


def _where(meta: dict[str, Any]) -> str | None:
    """`2 workers, cpu, 1 replica`; None for a run that has not begun."""
    if (workers := meta.get("world_size")) is None:
        return None
    place = counted(workers, "worker") if workers else "in one process"
    replicas = [counted(meta["lanes"], "replica")] if meta.get("lanes") else []
    return ", ".join([place, str(meta.get("device")), *replicas])
