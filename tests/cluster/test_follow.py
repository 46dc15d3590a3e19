"""A job that is followed, lost and asked about, against a cluster that answers as Ray does."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from rayexp.cluster import dashboard, follow, jobs
from rayexp.config import ExperimentConfig
from rayexp.errors import RunError, UserError


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


# ---------------------------------------------------------------------- following in any thread


def test_following_runs_beside_a_running_loop() -> None:
    """As in a notebook, whose thread has one."""
    seen = []

    async def work() -> None:
        await asyncio.sleep(0)
        seen.append(threading.current_thread())

    async def cell() -> None:
        follow._run(work())

    asyncio.run(cell())
    follow._run(work())
    assert len(seen) == 2
    assert threading.main_thread() not in seen


def test_what_following_meets_comes_to_the_caller() -> None:
    async def work() -> None:
        raise ConnectionError("cut")

    with pytest.raises(ConnectionError, match="cut"):
        follow._run(work())


@pytest.fixture
def heeding() -> Iterator[None]:
    """Ctrl-C is heard, also where the tests run in a background that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding")
def test_ctrl_c_ends_following_at_once() -> None:
    ended = []

    async def work() -> None:
        try:
            threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        follow._run(work())
    assert ended
    assert time.monotonic() - began < 30


# ---------------------------------------------------------------------- a cluster that answers as Ray does


class Cluster(HTTPServer):
    """Answers as Ray's dashboard does, from a table; a number is a status without a word."""

    def __init__(self, **answers: Any) -> None:
        table: dict[str, Any] = {
            "/api/version": {"version": "4", "ray_version": "2.60.0", "ray_commit": "x"},
            **answers,
        }
        self.table, self.asked = table, []
        asked: list[str] = self.asked

        class Page(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.partition("?")[0]
                asked.append(path)
                answer = table.get(f"{self.command} {path}", table.get(path, 200 if self.command == "PUT" else 404))
                status, body = (
                    answer if isinstance(answer, tuple) else (answer, "") if isinstance(answer, int) else (200, answer)
                )
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_PUT = do_GET  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Page)
        Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def job_info(status: str, node: str | None = "n1", code: int | None = None) -> dict[str, Any]:
    return {
        "type": "SUBMISSION",
        "submission_id": "j1",
        "status": status,
        "entrypoint": "x",
        "message": "Job is currently running.",
        "start_time": 1_795_681_924_613,
        "metadata": {},
        "driver_node_id": node,
        "driver_exit_code": code,
    }


def nodes(state: str, message: str | None = "missing too many heartbeats") -> dict[str, Any]:
    node = {"node_id": "n1", "node_ip": "192.0.2.7", "state": state, "state_message": message}
    return {"result": True, "msg": "", "data": {"result": {"result": [node]}}}


TRACE = (
    500,
    'Traceback (most recent call last):\n  File "x"\nClientConnectorError: Cannot connect to host 192.0.2.7\n',
)


@pytest.fixture
def cluster() -> Iterator[Callable[..., Cluster]]:
    started: list[Cluster] = []

    def start(info: dict[str, Any], nodes: Any, logs: Any) -> Cluster:
        table = {"/api/jobs/": [info], "/api/jobs/j1": info, "/api/jobs/j1/logs": logs, "/api/v0/nodes": nodes}
        started.append(Cluster(**table))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Following waits for nothing between two questions."""
    monkeypatch.setattr(follow, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: None))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("status", ["RUNNING", "PENDING"])
def test_a_job_whose_node_is_gone_has_failed(cluster: Callable[..., Cluster], status: str) -> None:
    place = cluster(job_info(status), nodes("DEAD"), TRACE).url
    (listed,) = jobs.jobs(place)
    found = {replace(job, seconds=0) for job in (listed, jobs.find(place, "j1"), jobs.find(place, None))}
    assert found == {replace(listed, seconds=0)}  # the clock may tick in between
    assert (listed.status, listed.ended) == ("failed", True)
    assert listed.message == "its node 192.0.2.7 is gone (missing too many heartbeats)"
    assert jobs.exit_code(listed) == 1
    assert jobs.stop(place, "j1") is False
    with pytest.raises(
        RunError, match=r"^job j1 failed: its node .* is gone .*; what it printed cannot be read any more$"
    ):
        jobs.logs(place, "j1")
    said: list[str] = []
    assert follow.follow(place, "j1", print, said.append).status == "failed"
    assert not [line for line in said if "goes on" in line]


@pytest.mark.parametrize(
    ("info", "there", "expected"),
    [
        (job_info("RUNNING"), nodes("ALIVE", None), "running"),
        (job_info("PENDING", None), nodes("DEAD"), "pending"),
        (job_info("RUNNING", "n2"), nodes("DEAD"), "running"),
        (job_info("SUCCEEDED", code=0), nodes("DEAD"), "succeeded"),
        (job_info("STOPPED"), nodes("DEAD"), "stopped"),
        (job_info("RUNNING"), (500, "no"), "running"),
        (job_info("RUNNING"), {"strange": 1}, "running"),
    ],
)
def test_other_jobs_are_as_ray_says(
    cluster: Callable[..., Cluster], info: dict[str, Any], there: Any, expected: str
) -> None:
    server = cluster(info, there, {"logs": ""})
    assert [job.status for job in jobs.jobs(server.url)] == [expected]
    assert jobs.find(server.url, "j1").status == expected
    assert ("/api/v0/nodes" in server.asked) == (expected in ("running", "pending"))


def test_a_job_that_had_ended_before_its_node_did_stays_as_it_was(cluster: Callable[..., Cluster]) -> None:
    server = cluster(job_info("RUNNING"), nodes("DEAD"), 500)
    server.table["/api/jobs/"] = [job_info("SUCCEEDED", code=0), job_info("RUNNING")]
    assert [job.status for job in jobs.jobs(server.url)] == ["succeeded", "failed"]


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (TRACE, "ClientConnectorError: Cannot connect to host 192.0.2.7"),
        (500, "it answered with status 500 and no word"),
        ((500, "\n\n"), "it answered with status 500 and no word"),
        ((503, "Out of order."), "Out of order."),
    ],
)
def test_an_answer_that_is_an_error_is_told_in_words(cluster: Callable[..., Cluster], answer: Any, line: str) -> None:
    place = cluster(job_info("RUNNING"), nodes("ALIVE"), answer).url
    with pytest.raises(RunError) as caught:
        jobs.logs(place, "j1")
    assert str(caught.value) == f"{place}: {line}"


def test_an_error_of_the_state_api_is_told_in_words(cluster: Callable[..., Cluster]) -> None:
    for answer, line in (((500, "\n"), "500"), ((500, "a\nb\n"), "b"), ({"result": False, "msg": ""}, "no word")):
        place = cluster(job_info("RUNNING"), answer, 500).url
        with pytest.raises(RunError, match=rf"^http.*: .*{line}"):
            dashboard.get(place, "/api/v0/nodes")


def test_an_unknown_job_is_the_users_mistake(cluster: Callable[..., Cluster]) -> None:
    place = cluster(job_info("RUNNING"), nodes("ALIVE"), 500)
    place.table["/api/jobs/j2"] = (404, "Job j2 does not exist")
    with pytest.raises(UserError, match=r"^http.*: Job j2 does not exist; `rayexp jobs` lists them$"):
        jobs.find(place.url, "j2")


def test_what_an_ended_job_printed_last_is_handed_on(cluster: Callable[..., Cluster]) -> None:
    server = cluster(job_info("SUCCEEDED", code=0), nodes("ALIVE"), {"logs": "one\ntwo\n"})
    shown: list[str] = []
    ended = follow.follow(server.url, "j1", shown.append)
    assert ("".join(shown), jobs.exit_code(ended)) == ("one\ntwo\n", 0)


def test_every_function_works_in_a_notebook(cluster: Callable[..., Cluster]) -> None:
    """Whose cells run in a thread with a running event loop."""
    server = cluster(job_info("SUCCEEDED", code=0), nodes("ALIVE"), {"logs": "one\ntwo\n"})
    server.table["POST /api/jobs/"] = {"job_id": "j1", "submission_id": "j1"}
    running = job_info("RUNNING")
    shown: list[str] = []

    async def cell() -> None:
        assert jobs.submit(ExperimentConfig(name="x"), server.url) == "j1"
        assert [job.job for job in jobs.jobs(server.url)] == ["j1"]
        assert jobs.logs(server.url, "j1") == "one\ntwo\n"
        assert follow.follow(server.url, "j1", shown.append).ended
        server.table |= {"/api/jobs/j1": running, "POST /api/jobs/j1/stop": {"stopped": True}}
        assert jobs.stop(server.url, "j1")

    asyncio.run(cell())
    assert "".join(shown) == "one\ntwo\n"
    assert "/api/jobs/j1/logs/tail" in server.asked


def test_following_gives_up_and_claims_nothing(
    cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = cluster(job_info("RUNNING"), nodes("ALIVE"), 500)
    said: list[str] = []
    with pytest.raises(
        RunError, match=r"^no word of job j1 for 0 s .*; the job goes on; `rayexp logs j1 -f` takes it up"
    ):
        follow.follow(server.url, "j1", print, said.append, patience_s=0.01)
    (line,) = said
    assert line.startswith("connection lost (")
    assert line.endswith("the job goes on; trying again")
    monkeypatch.setattr(follow, "_known", lambda address, job: None)
    with pytest.raises(RunError, match=r"whether the job goes on is not known"):
        follow.follow(server.url, "j1", print, said.append, patience_s=0.01)
    assert "the job does not depend on it; trying again" in said[1]


def test_a_reader_that_is_gone_ends_following(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "find", lambda address, job: jobs.Job("j1", "", "running", None, None, None))

    async def tail(place: str, job: str, skip: int, take: Callable[[str], None], ended: object) -> None:
        take("a line")

    def out(text: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(follow, "_tail", tail)
    with pytest.raises(BrokenPipeError):
        follow.follow("http://127.0.0.1:1", "j1", out)
