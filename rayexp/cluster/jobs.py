"""A run as a job of a Ray cluster: send it, list and stop (`following` follows it).

What travels is the package's source and the resolved configuration; data, runs and environments stay where they are.
All state is the cluster's: a job goes on when its sender is gone, and any machine with the token can follow it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
import re
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rayexp
from rayexp.cluster import auth
from rayexp.config import ExperimentConfig
from rayexp.errors import RunError, UserError

LIMIT = 100 * 2**20  # bytes; Ray's dashboard refuses larger packages
NAMED = 3  # files in the refusal
STOP_SECONDS = 60  # for saving the present step; Ray's own 3 s are too short
CONFIG = "config.yaml"
LABEL = "rayexp"  # metadata key of our jobs


@dataclass(frozen=True, slots=True)
class Job:
    """One job as the cluster knows it: `started` in UTC, `seconds` it has run, `code` when it has ended by itself."""

    job: str
    name: str
    status: str
    code: int | None
    started: str | None
    seconds: int | None
    message: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.status in ("succeeded", "failed", "stopped")


@dataclass(frozen=True, slots=True)
class Package:
    """What travels: files (paths below `root`) with their sizes in bytes."""

    root: Path
    files: dict[str, int]

    @property
    def size(self) -> int:
        """Bytes, uncompressed."""
        return sum(self.files.values())


# ---------------------------------------------------------------------- sending


def pack(config: ExperimentConfig, into: Path) -> Package:
    """Lay the package's source and the configuration out in a folder.

    Raises:
        UserError: more than Ray takes; the largest files are named.
    """
    source = Path(rayexp.__file__).parent
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in inner.parts):
            target = into / source.name / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    (into / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
    files = {str(p.relative_to(into)): p.stat().st_size for p in sorted(into.rglob("*")) if p.is_file()}
    package = Package(into, files)
    if package.size > LIMIT:
        largest = sorted(files, key=lambda name: -files[name])[:NAMED]
        named = ", ".join(f"{name} ({files[name] / 2**20:,.1f} MiB)" for name in largest)
        raise UserError(
            f"the package has {package.size / 2**20:,.1f} MiB, Ray takes {LIMIT / 2**20:,.0f}; largest: {named}"
        )
    return package


def submit(
    config: ExperimentConfig,
    address: str | None = None,
    *,
    resume: str | None = None,
    python: str = "python",
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Send a run; returns the job's id.

    Args:
        config: paths in it are the cluster's; relative ones count from the home directory there.
        resume: the run on the cluster to go on with.
        python: the cluster's interpreter, with rayexp's dependencies.

    Raises:
        UserError: no cluster, no valid token, or too much to send.
    """
    client = _client(address)
    if auth.unlocked(client.get_address()):
        say(f"warning: {client.get_address()} takes jobs from anyone who reaches it (RAY_AUTH_MODE=token locks it)")
    words = [python, "-m", "rayexp", "train", CONFIG, *(["--resume", resume] if resume else [])]
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    with tempfile.TemporaryDirectory(prefix="rayexp-") as folder:
        package = pack(config, Path(folder))
        say(f"package: {len(package.files)} files, {package.size / 1e3:,.0f} kB")
        return str(
            _ask(
                client,
                lambda: client.submit_job(
                    entrypoint=shlex.join(words),
                    submission_id=f"{config.name}-{stamp}-{secrets.token_hex(2)}",
                    metadata={LABEL: rayexp.__version__, "name": config.name},
                    runtime_env={
                        "working_dir": folder,
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
                    },
                ),
            )
        )


# ---------------------------------------------------------------------- asking


def jobs(address: str | None = None) -> list[Job]:
    """All submitted jobs of the cluster, oldest first.

    Raises:
        UserError: no cluster, or no valid token.
    """
    client = _client(address)
    found = [job for job in _ask(client, client.list_jobs) if job.submission_id]
    return _jobs(client, sorted(found, key=lambda job: job.start_time or 0))


def find(address: str | None, job: str | None) -> Job:
    """The job of that id; None: the one started last.

    Raises:
        UserError: there is none.
    """
    if job is None:
        all_jobs = jobs(address)
        if not all_jobs:
            raise UserError(f"{auth.address(address)}: no job has been submitted there")
        return all_jobs[-1]
    client = _client(address)
    (only,) = _jobs(client, [_ask(client, lambda: client.get_job_info(job))])
    return only


def logs(address: str | None, job: str) -> str:
    """All that the job has printed so far.

    Raises:
        RunError: it cannot be read, as where the job's node is gone.
    """
    client = _client(address)
    try:
        return str(_ask(client, lambda: client.get_job_logs(job)))
    except RunError as error:
        found = find(address, job)
        if not found.ended:
            raise
        raise RunError(f"job {job} {found.status}: {found.message}; what it printed cannot be read any more") from error


def stop(address: str | None, job: str) -> bool:
    """Ask the job to save its present step and end; False where it had ended before."""
    client = _client(address)
    if find(address, job).ended:
        return False
    return bool(_ask(client, lambda: client.stop_job(job)))


def exit_code(job: Job) -> int:
    """A job's own exit code; 130 where it was stopped, 1 where it has none."""
    if job.status == "stopped":
        return 130
    return job.code if job.code is not None else int(job.status != "succeeded")


# ---------------------------------------------------------------------- Ray's client


def _client(address: str | None) -> Any:
    place = auth.address(address)
    from ray.job_submission import JobSubmissionClient

    for chatty in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Ray would otherwise prefer RAY_ADDRESS to the address it is given.
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = place
    try:
        return _ask(None, lambda: JobSubmissionClient(place, headers=auth.headers()), place)
    finally:
        os.environ.pop("RAY_API_SERVER_ADDRESS")
        if before is not None:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def _ask(client: Any, question: Callable[[], Any], place: str = "") -> Any:
    """Ray's exceptions as ours."""
    import requests
    from ray.exceptions import AuthenticationError

    place = place or client.get_address()
    try:
        return question()
    except AuthenticationError:
        auth.refused(place)
    except (ConnectionError, requests.RequestException) as error:
        raise UserError(f"no Ray cluster answers at {place} ({type(error).__name__})") from error
    except RuntimeError as error:
        code, body = _answer(str(error))
        if code == 404:
            raise UserError(f"{place}: {body.rstrip('.')}; `rayexp jobs` lists them") from None
        raise RunError(f"{place}: {body}") from error


def _answer(text: str) -> tuple[int, str]:
    """Status and last line of what the cluster answered (0 where the error is another); a server's traceback ends with
    an empty line and Ray's full stop."""
    found = re.fullmatch(r"Request failed with status code (\d+): (.*)\.", text.strip(), re.DOTALL)
    code, body = (int(found[1]), found[2]) if found else (0, text)
    lines = body.strip().splitlines() or [f"it answered with status {code} and no word" if code else "no word of why"]
    return code, lines[-1].strip()


def _jobs(client: Any, infos: Sequence[Any]) -> list[Job]:
    """Ray's descriptions as ours. A job whose node is gone has failed: nobody would tell Ray's own books any more."""
    found = [_job(info) for info in infos]
    if all(job.ended for job in found):
        return found
    gone: dict[str, str] = {}
    with contextlib.suppress(UserError, RunError, KeyError, TypeError):
        for node in auth.get(client.get_address(), "/api/v0/nodes", limit=10_000)["result"]:
            if node["state"] == "DEAD":
                why = f" ({node['state_message']})" if node.get("state_message") else ""
                gone[node["node_id"]] = f"its node {node['node_ip']} is gone{why}"
    return [
        dataclasses.replace(job, status="failed", message=gone[info.driver_node_id])
        if not job.ended and info.driver_node_id in gone
        else job
        for job, info in zip(found, infos, strict=True)
    ]


def _job(info: Any) -> Job:
    start, end = info.start_time, info.end_time
    started = start and datetime.datetime.fromtimestamp(start / 1e3, datetime.UTC).isoformat(timespec="seconds")
    return Job(
        job=info.submission_id,
        name=(info.metadata or {}).get("name", ""),
        status=str(info.status).lower(),
        code=info.driver_exit_code,
        started=started,
        seconds=_seconds(start, end),
        message=(info.message or "").strip(),
    )


def _seconds(start: float | None, end: float | None) -> int | None:
    """From the cluster's milliseconds. While a job runs, this host's clock must do: None where it is behind."""
    seconds = round(((end or time.time() * 1e3) - start) / 1e3) if start else None
    return seconds if seconds is None or seconds >= 0 else None
