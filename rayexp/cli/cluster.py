"""`rayexp submit`, `jobs`, `logs`, `stop`, `collect`: runs on a cluster, over its one HTTP address."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, TextIO

import typer

from rayexp.cli._app import ConfigArgument, JsonOption, OverridesArgument, app
from rayexp.cli._output import print_json, print_table, say, tell
from rayexp.display import counted

Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The head's dashboard. [default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265]",
        show_default=False,
    ),
]
JobArgument = Annotated[str | None, typer.Argument(metavar="JOB", help="The job's id. [default: the newest job]")]


@app.command()
def submit(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    address: Address = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with that run of the cluster.")] = None,
    name: Annotated[str | None, typer.Option(metavar="N", help="The run's name.")] = None,
    python: Annotated[str, typer.Option(metavar="PATH", help="The cluster's Python.")] = "python",
    wait: Annotated[bool, typer.Option("--wait", help="Follow it; exit with the job's own code.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Send a run to a Ray cluster; prints the job's id.

    The package, the resolved configuration, your own code and a file of weights travel. Other paths are the cluster's;
    relative ones count from the home directory there. The job goes on when this command ends or loses its connection.
    """
    from rayexp.cluster import jobs
    from rayexp.config import load

    overrides = [*(overrides or []), *([f"name={name}"] if name else [])]
    job = jobs.submit(load(config, overrides), address, resume=resume, python=python, say=say)
    if as_json:
        print_json({"job": job})
    else:
        tell(job)
    if not wait:
        say(f"follow:     rayexp logs {job} -f\nstop:       rayexp stop {job}\nbring home: rayexp collect {job}")
        return
    _follow(address, job, sys.stderr)


@app.command("jobs")
def jobs_command(address: Address = None, as_json: JsonOption = False) -> None:
    """List the cluster's jobs, oldest first."""
    import dataclasses

    from rayexp.cluster import jobs

    rows = [{k: v for k, v in dataclasses.asdict(job).items() if k != "message"} for job in jobs.jobs(address)]
    if as_json:
        print_json(rows)
    elif rows:
        print_table(rows, drop=("code", "started", "seconds", "name"))
    else:
        say("no jobs")


@app.command(short_help="Print what a job has printed.")
def logs(
    job: JobArgument = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Until it ends; exit with its code.")] = False,
    address: Address = None,
) -> None:
    """Print what a job has printed; control sequences are shown, not obeyed."""
    from rayexp.cli._job_output import JobOutput
    from rayexp.cluster import jobs

    found = jobs.find(address, job)
    if follow:
        _follow(address, found.job, sys.stdout)
    output = JobOutput(sys.stdout)
    output.write(jobs.logs(address, found.job) or (found.message + "\n" if found.message else ""))
    output.close()


@app.command()
def stop(job: JobArgument = None, address: Address = None) -> None:
    """Ask a job to save its present step and end."""
    from rayexp.cluster import jobs

    found = jobs.find(address, job)
    if jobs.stop(address, found.job):
        say(f"{found.job}: stopping after its present step; --resume goes on from there")
    else:
        say(f"{found.job}: had ended ({found.status})")


@app.command(short_help="Bring a run home from a cluster or an object store.")
def collect(
    what: Annotated[
        str, typer.Argument(metavar="RUN|JOB", help="A run's name, path or URI, or a job's id.", show_default=False)
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="DIR|URI", help="Folder of run directories, or s3://, gs://.")
    ] = "runs",
    epochs: Annotated[
        str, typer.Option(metavar="LIST", help="Whose checkpoints: all, none, or such as 7,18 or 1-3,last.")
    ] = "all",
    address: Address = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a run home: records, predictions, and the checkpoints of the epochs asked for.

    From a cluster over its HTTP address, also when the job has ended; or from a path, s3://, gs://. Every file is
    checked; the same command goes on where it was cut off, and fetches only what is new.
    """
    from rayexp.cluster import collect as collecting
    from rayexp.cluster import sources

    source, name = sources.find(what, address)
    with tempfile.TemporaryDirectory(prefix="rayexp-") as between:
        got = collecting.collect(source, name, Path(between if "://" in to else to), epochs, say)
        place = collecting.upload(got.run, to, say) if "://" in to else str(got.run.root)
        status, records, kept = got.run.meta()["status"], len(got.run.records()), len(got.epochs)
    if as_json:
        print_json({"run": place, "epochs": got.epochs, "fetched": got.fetched, "bytes": got.size, "status": status})
        return
    tell(str(place))
    say(
        f"{status}; {counted(records, 'epoch')}, {counted(kept, 'checkpoint')}; "
        f"{got.size / 1e6:,.1f} MB fetched from {source.name}"
    )


def _follow(address: str | None, job: str, to: TextIO) -> None:
    """Show a job's output until it ends, and exit with its code."""
    from rayexp.cli._job_output import JobOutput
    from rayexp.cluster import follow as following
    from rayexp.cluster import jobs
    from rayexp.errors import RunError

    output = JobOutput(to)
    try:
        ended = following.follow(address, job, output.write, say)
    except KeyboardInterrupt:
        say(f"\nthe job goes on; `rayexp logs {job} -f` takes it up, `rayexp stop {job}` ends it")
        raise
    finally:
        output.close()
    code = jobs.exit_code(ended)
    if code:
        why = f": {ended.message}" if ended.message else ""
        raise RunError(f"job {job} {ended.status}{why}") if code == 1 and ended.code is None else typer.Exit(code)
    raise typer.Exit(0)
