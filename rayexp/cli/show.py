"""`rayexp runs`, `rayexp summary`, `rayexp doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rayexp.cli._shell import RUNS, JsonOption, RunsOption, app, print_json, print_table, tell
from rayexp.display import NOT_FINITE, figure

if TYPE_CHECKING:
    from rayexp.runs.run import Run

# ---------------------------------------------------------------------- runs


@app.command("runs")
def runs_command(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="Show this one with its epochs.", show_default=False)
    ] = None,
    runs: RunsOption = RUNS,
    check: Annotated[
        bool, typer.Option("--check", help="Check every file against its hash (of all runs, where none is named).")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the runs, oldest first; or show one with its epochs. --check exits with 1 where something is damaged."""
    from rayexp.runs.run import Run

    if check:
        _check([Run.locate(run, runs)] if run is not None else Run.all(runs), as_json)
        return
    if run is not None:
        _one(Run.find(run, runs), as_json)
        return
    found = [_row(one) for one in Run.all(runs)]
    if as_json:
        print_json(found)
    elif found:
        print_table(found)
    else:
        tell(f"no runs in {runs}")


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
        tell(
            f"{name}: {'damaged: ' + '; '.join(map(str, damaged[name])) if damaged[name] else 'ok'} "
            f"({covered} of {len(findings)} by their hashes, {without} not covered by one)"
        )
    raise typer.Exit(1 if any(damaged.values()) else 0)


def _row(run: Run) -> dict[str, Any]:
    from rayexp.errors import UserError
    from rayexp.runs.records import best

    row: dict[str, Any] = dict.fromkeys(
        ["run", "status", "workload", "workers", "device", "epochs", "best", "metric", "last weights"]
    )
    row["run"] = run.id
    try:
        meta, config, records = run.meta(), run.config(), run.records()
        row |= {
            "status": run.status(),
            "workload": config.workload,
            "workers": meta.get("world_size"),
            "device": meta.get("device"),
            "epochs": f"{len(records)}/{config.epochs}",
        }
        if records:
            row |= {"metric": NOT_FINITE, "last weights": records[-1].weights_sha[:12]}
        if found := best(records):
            metrics = ", ".join(f"{name} {figure(value, '.2f')}" for name, value in found.metrics.items())
            row |= {"best": found.epoch, "metric": metrics}
    except UserError as error:
        row |= {"status": "damaged", "metric": str(error)}
    return row


def _one(run: Run, as_json: bool) -> None:
    from rayexp.runs.records import best

    meta, records = run.meta(), run.records()
    if as_json:
        words = {**meta, "status": run.status(), "path": str(run.root)}
        print_json({**words, "epochs": [r.to_json() for r in records], "checkpoints": run.epochs()})
        return
    shown = {
        "path": run.root,
        "status": run.status(),
        "error": meta.get("error"),
        "workload": f"{meta.get('workload')}, {run.config().model.name}, data {run.config().data.name}",
        "where": f"{meta.get('world_size')} workers, {meta.get('device')}, {meta.get('lanes')} lanes",
        "created": meta.get("created"),
        "finished": meta.get("finished"),
    }
    for name, value in shown.items():
        if value is not None:
            tell(f"{name:<9} {value}")
    if not records:
        return
    found, names = best(records), dict.fromkeys(name for r in records for name in r.metrics)
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
                "weights": r.weights_sha[:12],
            }
            for r in records
        ]
    )


# ---------------------------------------------------------------------- summary


@app.command()
def summary(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML of the experiment.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    depth: Annotated[int, typer.Option(metavar="N", min=0, help="Levels of nested modules; 0: all.")] = 2,
    as_json: JsonOption = False,
) -> None:
    """The model layer by layer: output size, parameters, and FLOPs of a forward pass for one sample.

    Sizes of maps read height x width x channels. A multiply-add counts as two FLOPs.
    """
    import dataclasses

    from rayexp.config import load

    settled = load(config, overrides or [])

    from rayexp import workloads
    from rayexp.engine.summary import layers

    workload = workloads.open_workload(settled)
    *inner, whole = layers(workload)
    if as_json:
        print_json({"layers": [dataclasses.asdict(layer) for layer in inner], "total": dataclasses.asdict(whole)})
        return
    example = workload.example()[0]
    tell(f"{settled.model.name}, input {_input(tuple(example.shape), workload.batch_dim)}")
    print_table(
        [
            {
                "layer": layer.name,
                "kind": layer.kind,
                "output": layer.output,
                "parameters": f"{layer.parameters:,}" if layer.parameters else "",
                "FLOPs": f"{layer.flops:,}" if layer.flops else "",
            }
            for layer in inner
            if not depth or layer.depth <= depth
        ]
    )
    tell(
        f"{whole.parameters:,} parameters ({4 * whole.parameters / 1e6:.1f} MB), {whole.flops / 1e9:.3f} GFLOP "
        f"forward, about {3 * whole.flops / 1e9:.3f} with backward"
    )


def _input(shape: tuple[int, ...], batch_dim: int) -> str:
    sizes = [n for i, n in enumerate(shape) if i != batch_dim]
    return "x".join(map(str, [*sizes[1:], sizes[0]] if len(sizes) == 3 else sizes))


# ---------------------------------------------------------------------- doctor


@app.command()
def doctor(runs: RunsOption = RUNS, as_json: JsonOption = False) -> None:
    """Check this machine: versions that fit together, devices, Ray, room on the disk. Exits 1 where one is wrong."""
    from rayexp.launch.doctor import examine

    findings = examine(runs)
    if as_json:
        print_json([{"what": f.what, "found": f.found, "ok": f.ok} for f in findings])
    else:
        print_table([{"": "ok" if f.ok else "WRONG", "what": f.what, "found": f.found} for f in findings])
    raise typer.Exit(0 if all(f.ok for f in findings) else 1)
