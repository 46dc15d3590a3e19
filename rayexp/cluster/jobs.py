"""Runs as jobs of a Ray cluster, by Ray's Jobs API: submit, list, show, stop (`follow` follows one).

The cluster keeps all state: a job goes on when its sender is gone, and any machine with the token can ask about it.
`package` says what travels. Another way of sending runs (Slurm, a Kubernetes manifest) is a module like this one, with
`submit`, `jobs`, `find`, `logs` and `stop`, and `rayexp/cli/cluster.py` chooses between them.
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
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rayexp
from rayexp.cluster import auth, dashboard, package
from rayexp.config import ExperimentConfig
from rayexp.display import counted
from rayexp.errors import RunError, UserError

STOP_SECONDS = 60  # for saving the present step; Ray's own 3 s are too short
LABEL = "rayexp"  # metadata key of our jobs


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the cluster knows it.

    Attributes:
        job: its id.
        name: the run's name; empty for a job that rayexp did not submit.
        status: pending, running, succeeded, failed or stopped.
        code: its own exit code; None unless it has ended by itself.
        started: UTC, ISO 8601.
        seconds: how long it has run.
        message: what Ray says of its status.
    """

    job: str
    name: str
    status: str
    code: int | None
    started: str | None
    seconds: int | None
    message: str = ""

    @property
    def ended(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.status in ("succeeded", "failed", "stopped")


# ---------------------------------------------------------------------- sending


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
        address: see `dashboard.address`.
        resume, python: see `package.command`.
        say: told what is sent, and a warning where the cluster is open to anyone.

    Raises:
        UserError: no cluster, no valid token, or too much to send.
    """
    client = _client(address)
    if dashboard.is_open(client.get_address()):
        say(f"warning: {client.get_address()} takes jobs from anyone who reaches it (RAY_AUTH_MODE=token locks it)")
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    with tempfile.TemporaryDirectory(prefix="rayexp-") as folder:
        packed = package.pack(config, Path(folder))
        say(f"package: {counted(len(packed.files), 'file')}, {packed.size / 1e3:,.0f} kB")
        return str(
            _ask(
                client,
                lambda: client.submit_job(
                    entrypoint=shlex.join(package.command(python, resume)),
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
            raise UserError(f"{dashboard.address(address)}: no job has been submitted there")
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
    """Ask the job to save its current step and end; False where it had ended before."""
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
    url = dashboard.address(address)
    from ray.job_submission import JobSubmissionClient

    for chatty in ("ray", "ray.dashboard.modules.dashboard_sdk"):  # the second has a level of its own
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Ray would otherwise prefer RAY_ADDRESS to the address it is given.
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = url
    try:
        return _ask(None, lambda: JobSubmissionClient(url, headers=auth.headers()), url)
    finally:
        os.environ.pop("RAY_API_SERVER_ADDRESS")
        if before is not None:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def _ask(client: Any, question: Callable[[], Any], url: str = "") -> Any:
    """The answer to `question`; Ray's exceptions become ours."""
    import requests
    from ray.exceptions import AuthenticationError

    url = url or client.get_address()
    try:
        return question()
    except AuthenticationError:
        auth.raise_refused(url)
    except (ConnectionError, requests.RequestException) as error:
        raise UserError(f"no Ray cluster answers at {url} ({type(error).__name__})") from error
    except RuntimeError as error:
        code, body = _answer(str(error))
        if code == 404:
            raise UserError(f"{url}: {body.rstrip('.')}; `rayexp jobs` lists them") from None
        raise RunError(f"{url}: {body}") from error


def _answer(text: str) -> tuple[int, str]:
    """HTTP status (0: the error is not an HTTP answer) and the last line of the answer, whose text Ray's client ends
    with a full stop."""
    found = re.fullmatch(r"Request failed with status code (\d+): (.*)\.", text.strip(), re.DOTALL)
    code, body = (int(found[1]), found[2]) if found else (0, text)
    lines = body.strip().splitlines() or [f"it answered with status {code} and no word" if code else "no word of why"]
    return code, lines[-1].strip()


def _jobs(client: Any, infos: Sequence[Any]) -> list[Job]:
    """Ray's descriptions as ours. A job whose node is gone has failed, though Ray goes on listing it as running."""
    found = [_job(info) for info in infos]
    if all(job.ended for job in found):
        return found
    gone: dict[str, str] = {}
    with contextlib.suppress(UserError, RunError, KeyError, TypeError):
        for node in dashboard.get(client.get_address(), "/api/v0/nodes", limit=10_000)["result"]:
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
    """Seconds between the cluster's time stamps, in milliseconds; until now by this host's clock while a job runs (None
    where that is behind the cluster's)."""
    seconds = round(((end or time.time() * 1e3) - start) / 1e3) if start else None
    return seconds if seconds is None or seconds >= 0 else None
