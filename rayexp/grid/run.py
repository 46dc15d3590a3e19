"""Ray Tune runs a device grid: one cell at a time, each an ordinary run, each row on disk as soon as it is there.

Tune's own state is thrown away: compare.json says what is done and what is missing, so a comparison that was
killed goes on without Tune's pickled state.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rayexp.config import CompareConfig, ExperimentConfig, parse
from rayexp.errors import RunError, UserError
from rayexp.grid.comparison import PLAIN, Cell, CellResult, Comparison
from rayexp.grid.plan import base_of, plan, with_overrides
from rayexp.grid.screen import Follower, callback
from rayexp.launch import starting
from rayexp.launch.job import WorkerJob
from rayexp.launch.placement import Node
from rayexp.launch.screen import chatter_to
from rayexp.runs.run import Run
from rayexp.system import spawn
from rayexp.system.busy import others
from rayexp.system.clock import mark
from rayexp.system.disk import now
from rayexp.system.locks import only_driver
from rayexp.system.signals import ending, handled
from rayexp.system.threads import PATIENT

if TYPE_CHECKING:
    from rich.console import Console

# For the processes that Tune starts from here: no result files, no signal handlers of its own, no working directories.
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
ORPHANS_S = 30.0
SHARE = 0.001  # of the driver's node: a trial that starts workers must hold nothing that they need


def planned(config: CompareConfig, folder: Path, address: str | None = None) -> tuple[ExperimentConfig, list[Cell]]:
    """The base experiment with paths made absolute, and the cells, as this machine or that cluster allows.

    Args:
        config: the grid.
        folder: where its file lies.
        address: of a running Ray.

    Raises:
        UserError: grid, base or overrides are wrong, or there is no Ray at that address.
    """
    base = base_of(config, folder).absolute()
    changed = starting.resolved(with_overrides(base, config.overrides, folder).absolute())
    return base, list(plan(config, changed, machines(address)))


def machines(address: str | None) -> list[Node]:
    """What there is to compute on: the cluster where one runs, else this machine (no Ray is started)."""
    from rayexp.launch.on_ray import session

    if session.running(address):
        with session.session(address):
            return session.nodes()
    from rayexp.launch.local import here

    return [here()]


def start(config: CompareConfig, base: ExperimentConfig, cells: Sequence[Cell], *, argv: Sequence[str]) -> Comparison:
    """Make the comparison's directory.

    Raises:
        UserError: no cell can run, or its data or model is wrong (found out before the first cell runs; data that
            is not packed yet is packed here, so that no cell's start-up has it).
    """
    first = next((cell for cell in cells if cell.skip is None and cell.reduction != PLAIN), None)
    if first is None:
        reasons = "; ".join(f"{cell.id}: {cell.skip}" for cell in cells if cell.skip)
        raise UserError(f"scaling: no cell of the grid can run here ({reasons})")
    from rayexp.workloads import open_workload

    open_workload(parse(first.config, ExperimentConfig, first.id))
    return Comparison.create(config, base, tuple(cells), {"argv": list(argv), "environment": environment()})


def environment() -> dict[str, Any]:
    """The machine and the versions, for the report."""
    import platform

    import psutil

    from rayexp.engine.runtime import cpu_capability, gpu_names
    from rayexp.launch.doctor import version
    from rayexp.system.cores import cores

    packages = ("rayexp", "torch", "torchvision", "ray", "numpy")
    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "cpu_capability": cpu_capability(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpu_names(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _cpu_name() -> str:
    import platform

    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------------- running


def go(
    comparison: Comparison, *, address: str | None = None, console: Console | None = None, guest: bool = False
) -> None:
    """Run what is missing. Failed cells are rows with their error; the others go on.

    Args:
        comparison: new or interrupted.
        address: of a running Ray; None: as for `train`.
        console: where progress is shown; None: nowhere. What Ray says goes to logs/driver.log.
        guest: whether the process is another program's, whose stdout and stderr stay where they are.

    Raises:
        UserError: another process is at it.
        KeyboardInterrupt: Ctrl-C; what is done stays.
    """
    with only_driver(comparison.root):
        _stop_orphans(comparison)
        session = comparison.begin()
        try:
            jobs = [
                {"comparison": str(comparison.root), "session": session, "cell": cell.id, "repeat": repeat}
                for cell, repeat in comparison.missing()
            ]
            if jobs:
                # Before Ray starts: what others do to this machine.
                comparison.update(others=[*comparison.meta().get("others", ()), others()])
                log = comparison.root / "logs" / "driver.log"
                with contextlib.nullcontext() if guest else chatter_to(log, console):
                    _tune(comparison, jobs, address, Follower(comparison, console, len(jobs)))
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            line = "interrupted" if stopped else " ".join(str(error).split()) or type(error).__name__
            comparison.update(status="stopped" if stopped else "failed", error=line, finished=now())
            _stop_orphans(comparison)
            raise
        comparison.update(status="done", finished=now())


def _stop_orphans(comparison: Comparison) -> None:
    """Runs of a killed driver say so; they are measured anew, because half a cell is no measurement.

    What a killed driver started ends by itself within seconds; it must not disturb the next cell until then.
    """
    until = time.monotonic() + ORPHANS_S
    for run in Run.readable(comparison.cells_path):
        while run.status() == "running" and time.monotonic() < until:
            time.sleep(0.5)
        if run.status() in ("died", "running"):
            run.update(status="stopped", error="the comparison was interrupted; the cell is measured anew")


def _tune(comparison: Comparison, jobs: list[dict[str, Any]], address: str | None, follower: Follower) -> None:
    from rayexp.launch.on_ray import session as on_ray

    on_ray.prepare(address)  # before Ray is imported: a comparison that is resumed has planned nothing by then
    from ray import tune

    # Tune warns of the result files that it was told not to write.
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    cells = {cell.id: cell for cell in comparison.cells()}
    state = comparison.root / "tune"
    with on_ray.environment(_ENVIRONMENT), on_ray.session(address, for_tune=True):
        host = f"node:{on_ray.nodes()[0].name}"
        cores = on_ray.nodes()[0].cpus

        def held(sample: dict[Any, Any]) -> tune.PlacementGroupFactory:
            return tune.PlacementGroupFactory([resources(cells[sample["job"]["cell"]], host, cores)])

        tuner = tune.Tuner(
            tune.with_resources(trial, held),
            param_space={"job": tune.grid_search(jobs)},
            tune_config=tune.TuneConfig(max_concurrent_trials=1, reuse_actors=False),
            run_config=tune.RunConfig(name="tune", storage_path=str(state), verbose=0, callbacks=[callback(follower)]),
        )
        try:
            with ending() as stop, contextlib.ExitStack() as begun:
                # Tune sets a handler of its own for SIGUSR1, after which an interrupted grid would pass for a done one.
                follower.begun = lambda: begun.enter_context(handled(stop))
                results = tuner.fit()
        finally:
            follower.close()
            shutil.rmtree(state, ignore_errors=True)
    for result in (results[i] for i in range(len(results))):
        _record_death(comparison, (result.config or {})["job"], result.error)


def _record_death(comparison: Comparison, job: Mapping[str, Any], error: Exception | None) -> None:
    """The row of a trial whose process died before it could write one."""
    from ray.exceptions import RayActorError

    cell, repeat = job["cell"], job["repeat"]
    if any((row.cell, row.repeat) == (cell, repeat) and row.status == "done" for row in comparison.rows()):
        return
    if error is None:
        return  # the trial has written its failure itself
    line = "its process died: killed, or out of memory" if isinstance(error, RayActorError) else _line(error)
    mine = [run for run in Run.readable(comparison.cells_path) if run.meta().get("name") == f"{cell}-r{repeat}"]
    for run in mine:
        if run.status() == "died":
            run.update(status="failed", error=line, finished=now())
    comparison.add(CellResult(cell, repeat, "failed", line, mine[-1].id if mine else None, 0.0, now()), job["session"])


def resources(cell: Cell, host: str, cores: float) -> dict[str, float]:
    """What the trial itself holds: in-process cells compute in it, on the driver's machine; the others only start
    workers, and a trial that held a core would starve them."""
    if cell.workers:
        return {host: SHARE}
    if cell.kind == "gpu":
        return {host: SHARE, "CPU": 1.0, "GPU": max(1.0, cell.devices)}
    return {host: SHARE, "CPU": max(1.0, cores)}


# ---------------------------------------------------------------------- one cell, in a trial


def trial(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Run one repeat of one cell, and write its row. Tune calls it in a process of its own."""
    job = sample["job"]
    comparison = Comparison(Path(job["comparison"]))
    cell = next(cell for cell in comparison.cells() if cell.id == job["cell"])
    row = measure(comparison, cell, job["repeat"])
    comparison.add(row, job["session"])
    return {"line": f"failed: {row.error}" if row.error else f"done in {row.wall_seconds:.0f} s"}


def measure(comparison: Comparison, cell: Cell, repeat: int) -> CellResult:
    """Run one repeat of a cell here, and say what came of it."""
    fields = {"storage_path": str(comparison.cells_path), "name": f"{cell.id}-r{repeat}", "max_failures": 0}
    before = {run.id for run in Run.all(comparison.cells_path)}
    began = time.monotonic()
    error = None
    try:
        # A worker that is replaced would be timed with its restart, so a lost worker fails the cell.
        # A comparison of before this key had one thread a shard.
        config = comparison.with_copy(
            parse({"threads_per_shard": 1, **cell.config, **fields}, ExperimentConfig, cell.id)
        )
        argv = [*comparison.meta()["argv"], f"# {cell.id}, repeat {repeat}"]
        if cell.reduction == PLAIN:
            plain(config, "cuda" if cell.kind == "gpu" else "cpu", argv, began, comparison.id)
        else:
            from rayexp.launch.driver import run

            run(config, argv=argv, started=began, parent=comparison.id)
    except (UserError, RunError) as failure:
        error = _line(failure)
    except Exception as failure:
        error = f"{type(failure).__name__}: {_line(failure)}"
    wall = time.monotonic() - began
    mine = [run.id for run in Run.all(comparison.cells_path) if run.id not in before]
    return CellResult(cell.id, repeat, "failed" if error else "done", error, mine[-1] if mine else None, wall, now())


def plain(
    config: ExperimentConfig, device: Literal["cpu", "cuda"], argv: Sequence[str], started: float, parent: str
) -> Run:
    """The plain PyTorch script as a process of its own, its record in an ordinary run directory.

    Raises:
        RunError: it failed; the line is the last that it printed.
    """
    made = Run.create(config, argv=list(argv), parent=parent)
    with only_driver(made.root):
        return _plain(made, config, device, started)


def _plain(made: Run, config: ExperimentConfig, device: Literal["cpu", "cuda"], started: float) -> Run:
    made.logs.mkdir()
    job = WorkerJob(run=made.root, config=config, device=device, started=mark(started))
    path, out = job.write(), made.logs / "plain.out"
    # Set for processes of Ray and of ours; a script from the shell would have neither.
    ours = ("OMP_NUM_THREADS", *PATIENT)
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    with out.open("wb") as file:
        command = spawn.command("rayexp.grid.baseline", str(path))
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=inherited, check=False).returncode
    startup = json.loads((made.root / "startup.json").read_text()) if (made.root / "startup.json").is_file() else {}
    if code:
        lines = out.read_text(errors="replace").strip().splitlines() or ["no output"]
        made.update(status="failed", error=lines[-1], finished=now())
        raise RunError(f"the plain script ended with {code}: {lines[-1]} (see {out})")
    made.update(status="done", finished=now(), world_size=0, device=device, **startup)
    return made


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
