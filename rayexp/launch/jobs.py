"""A run as a job of a Ray cluster: send it, list, follow and stop.

What travels is the package's source and the resolved configuration; data, runs and environments stay where they are.
All state is the cluster's: a job goes on when its sender is gone, and any machine with the token can follow it.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import re
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rayexp
from rayexp.config import ExperimentConfig
from rayexp.errors import RunError, UserError
from rayexp.launch import doors

LIMIT = 100 * 2**20  # bytes; Ray's dashboard refuses larger packages
NAMED = 3  # files in the refusal
STOP_SECONDS = 60  # for saving the present step; Ray's own 3 s are too short
PATIENCE_S = 300.0  # without a word from the cluster, then following is given up
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
    if doors.unlocked(client.get_address()):
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
    return [_job(job) for job in sorted(found, key=lambda job: job.start_time or 0)]


def find(address: str | None, job: str | None) -> Job:
    """The job of that id; None: the one started last.

    Raises:
        UserError: there is none.
    """
    if job is None:
        all_jobs = jobs(address)
        if not all_jobs:
            raise UserError(f"{doors.address(address)}: no job has been submitted there")
        return all_jobs[-1]
    client = _client(address)
    return _job(_ask(client, lambda: client.get_job_info(job)))


def logs(address: str | None, job: str) -> str:
    """All that the job has printed so far."""
    client = _client(address)
    return str(_ask(client, lambda: client.get_job_logs(job)))


def stop(address: str | None, job: str) -> bool:
    """Ask the job to save its present step and end; False where it had ended before."""
    client = _client(address)
    if _job(_ask(client, lambda: client.get_job_info(job))).ended:
        return False
    return bool(_ask(client, lambda: client.stop_job(job)))


def exit_code(job: Job) -> int:
    """A job's own exit code; 130 where it was stopped, 1 where it has none."""
    if job.status == "stopped":
        return 130
    return job.code if job.code is not None else int(job.status != "succeeded")


# ---------------------------------------------------------------------- following


def follow(
    address: str | None,
    job: str,
    out: Callable[[str], None],
    say: Callable[[str], None] = lambda text: None,
    patience_s: float = PATIENCE_S,
) -> Job:
    """Hand on what the job prints, from the beginning, until it ends; returns the ended job.

    A lost connection is taken up again and nothing is handed on twice; the job does not notice.

    Raises:
        UserError: no such job.
        RunError: the cluster was silent for `patience_s` seconds; the job goes on.
    """
    found = find(address, job)
    place, done, lost = doors.address(address), 0, 0.0

    def take(piece: str) -> None:
        nonlocal done, lost
        out(piece)
        done, lost = done + len(piece), 0.0

    while True:
        try:
            asyncio.run(_tail(place, job, done, take))
            found = find(address, job)
            if found.ended:
                take(logs(address, job)[done:])
                return found
            lost = 0.0
        except (OSError, TimeoutError, UserError, RunError) as error:
            if not lost:
                lost = time.monotonic()
                say(f"connection lost ({error}); the job goes on; trying again")
            if time.monotonic() - lost > patience_s:
                raise RunError(
                    f"{place}: no word for {patience_s:,.0f} s; job {job} goes on; `rayexp logs {job} -f` takes it up"
                ) from error
        time.sleep(1)


async def _tail(place: str, job: str, skip: int, take: Callable[[str], None]) -> None:
    """Hand on what the job prints, without the first `skip` characters, until the connection ends.

    JobSubmissionClient.tail_job_logs sends no heartbeat, so a silently cut link would hold it for ever.
    """
    import aiohttp

    limits = aiohttp.ClientTimeout(total=None, sock_connect=doors.TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(headers=doors.headers(), timeout=limits) as session,
            session.ws_connect(f"{place}/api/jobs/{job}/logs/tail", heartbeat=doors.TIMEOUT_S / 2) as socket,
        ):
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    break
                take(message.data[skip:])
                skip = max(0, skip - len(message.data))
    except aiohttp.ClientError as error:
        raise ConnectionError(str(error)) from error


# ---------------------------------------------------------------------- Ray's client


def _client(address: str | None) -> Any:
    place = doors.address(address)
    # Ray would otherwise prefer RAY_ADDRESS to the address it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = place
    from ray.job_submission import JobSubmissionClient

    for chatty in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return _ask(None, lambda: JobSubmissionClient(place, headers=doors.headers()), place)


def _ask(client: Any, question: Callable[[], Any], place: str = "") -> Any:
    """Ray's exceptions as ours."""
    import requests
    from ray.exceptions import AuthenticationError

    place = place or client.get_address()
    try:
        return question()
    except AuthenticationError:
        doors.refused(place)
    except (ConnectionError, requests.RequestException) as error:
        raise UserError(f"no Ray cluster answers at {place} ({type(error).__name__})") from error
    except RuntimeError as error:
        text = str(error)
        if "status code 404" in text:
            raise UserError(f"{place}: {re.sub(r'^.*404: ', '', text).rstrip('.')}; `rayexp jobs` lists them") from None
        raise RunError(f"{place}: {text.strip().splitlines()[-1]}") from error


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
