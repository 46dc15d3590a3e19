"""Where the token goes, and where it does not, without a cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from rayexp.cluster import dashboard, follow, jobs, ports, sources
from rayexp.errors import RunError, UserError

NOBODY = 65534
SECRET = "secret-of-this-test"
ENVIRONMENT = (
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_API_SERVER_ADDRESS",
    "RAY_ADDRESS",
    "http_proxy",
    "no_proxy",
)


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ENVIRONMENT, *map(str.upper, ENVIRONMENT)):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile goes with the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    monkeypatch.setenv("HOME", str(tmp_path))


class Server(HTTPServer):
    """Answers everything with one status, and keeps what it was sent."""

    def __init__(self, status: int = 404, **headers: str) -> None:
        seen: list[tuple[str, str | None]] = []

        class Page(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                seen.append((self.path, self.headers.get("Authorization")))
                assert "secret" not in str(self.headers).replace(str(self.headers.get("Authorization")), "")
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_POST = do_CONNECT = do_GET  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        self.seen = seen
        super().__init__(("127.0.0.1", 0), Page)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(*args: int, **headers: str) -> Server:
        started.append(Server(*args, **headers))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def of_another_user() -> Iterator[tuple[int, Callable[[], int]]]:
    """A port at which another user listens, and a function that ends it and gives the connections it has seen."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setuid(NOBODY)
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        with socket.create_server(("127.0.0.1", 0)) as listener:
            os.write(write, b"%d\n" % listener.getsockname()[1])
            listener.settimeout(0.05)
            count = 0
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    listener.accept()[0].close()
                    count += 1
        os._exit(count)
    try:
        with os.fdopen(read) as lines:
            port = int(lines.readline())

        def seen() -> int:
            os.kill(child, signal.SIGTERM)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        yield port, seen
    finally:
        os.close(write)
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


ASK: list[Callable[[], object]] = [
    lambda: jobs.jobs(),
    lambda: jobs.find(None, None),
    lambda: jobs.logs(None, "x"),
    lambda: jobs.stop(None, "x"),
    lambda: follow.follow(None, "x", print),
    lambda: sources.find("some-run", None),
]


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to listen as another user")
@pytest.mark.parametrize("ask", ASK)
def test_another_users_port_is_shown_no_token(ask: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    with of_another_user() as (port, seen):
        monkeypatch.setattr(dashboard, "DEFAULT_ADDRESS", f"http://127.0.0.1:{port}")
        assert ports.is_ours("127.0.0.1", port) is False
        with pytest.raises(UserError, match=rf"served by another user.* --address http://127.0.0.1:{port} names it"):
            ask()
        assert dashboard.address(f"127.0.0.1:{port}") == f"http://127.0.0.1:{port}"  # named is named
        assert seen() == 0


def test_a_port_is_ours_only_if_its_process_is(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    monkeypatch.setattr(dashboard, "DEFAULT_ADDRESS", server.url)
    assert ports.is_ours("127.0.0.1", server.server_port) is True
    assert dashboard.address(None) == server.url
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(UserError, match="served by another user"):
        dashboard.address(None)
    assert server.seen == []


def test_a_port_that_someone_shares_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = ("127.0.0.1", 8265, os.getpid()), ("0.0.0.0", 8265, None)
    for found, expected in (([mine], True), ([other], False), ([mine, other], False), ([], None)):
        monkeypatch.setattr(ports, "_listening", lambda found=found: iter(found))
        assert ports.is_ours("127.0.0.1", 8265) is expected
        assert ports.is_ours("127.0.0.1", 8266) is None
    monkeypatch.setattr(ports, "_listening", lambda: iter([("192.0.2.7", 8265, None)]))
    assert ports.is_ours("127.0.0.1", 8265) is None
    assert ports.is_ours("192.0.2.7", 8265) is False


def test_nobody_at_the_default_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setattr(dashboard, "DEFAULT_ADDRESS", f"http://127.0.0.1:{bound.getsockname()[1]}")
        with pytest.raises(UserError, match=r"no Ray cluster answers at .*; --address http://HEAD:8265"):
            dashboard.address(None)


def test_what_names_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "is_ours", lambda host, port: False)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        with pytest.raises(UserError, match="another user"):
            dashboard.address(None)
        monkeypatch.setenv(name, f"http://{name.lower()}:8265")
        assert dashboard.address(None) == f"http://{name.lower()}:8265"
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_ADDRESS", "http://ray-address:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "api:1")
    assert dashboard.address(None) == "http://api:1"
    assert dashboard.address("given:1") == "http://given:1"
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    for joined in ("10.0.0.1:6379", "auto", "ray://head:10001"):  # says where a Ray is joined, not its dashboard
        monkeypatch.setenv("RAY_ADDRESS", joined)
        with pytest.raises(UserError, match="another user"):
            dashboard.address(None)


def test_asking_names_nothing_for_the_next_time(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    for before in (None, "http://before:1"):
        if before:
            monkeypatch.setenv("RAY_API_SERVER_ADDRESS", before)
        with pytest.raises((UserError, RunError)):
            jobs.jobs(server.url)
        assert os.environ.get("RAY_API_SERVER_ADDRESS") == before
    assert server.seen
    assert {found for _, found in server.seen} == {f"Bearer {SECRET}"}


@pytest.mark.parametrize("given", ["http://me:pass@head:99999", "http://head:99999", "http://head:x", "http://:1"])
def test_ports_that_are_none(given: str) -> None:
    with pytest.raises(UserError, match="--address") as caught:
        dashboard.address(given)
    assert "pass@" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://head:8265/", "http://head:8265"),
        ("head:8265", "http://head:8265"),
        ("https://ray.lab/cluster", "https://ray.lab/cluster"),
    ],
)
def test_addresses(given: str | None, expected: str) -> None:
    assert dashboard.address(given) == expected


@pytest.mark.parametrize(
    "given", ["ray://head:10001", "http://", "http://me:secret@head:8265", "auto://x", "http://[::1", "me:secret@[::1"]
)
def test_addresses_that_are_none(given: str) -> None:
    with pytest.raises(UserError, match="--address") as error:
        dashboard.address(given)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(("status", "expected"), [(200, True), (401, False)])
def test_an_open_cluster_is_noticed(serve: Callable[..., Server], status: int, expected: bool) -> None:
    server = serve(status)
    assert dashboard.is_open(server.url) is expected
    assert [token for _, token in server.seen] == [None]
    assert dashboard.is_open("http://127.0.0.1:1") is False


# ---------------------------------------------------------------------- led elsewhere


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_carries_the_token_nowhere_else(serve: Callable[..., Server], status: int) -> None:
    thief = serve()
    redirecting = serve(status, Location=f"{thief.url}/stolen")
    for ask in (
        lambda: dashboard.get(redirecting.url, "/api/v0/nodes"),
        lambda: list(dashboard.stream(redirecting.url, "/api/v0/logs/file")),
        lambda: jobs.jobs(redirecting.url),
        lambda: follow._run(follow._tail(redirecting.url, "x", 0, print)),
    ):
        thief.seen.clear()
        with pytest.raises((UserError, RunError, OSError)):
            ask()
        assert thief.seen, "it was not followed, so nothing was tried"
        assert [found for _, found in thief.seen if found] == []
    assert all(found == f"Bearer {SECRET}" for _, found in redirecting.seen)


def test_no_proxy_is_shown_what_goes_to_this_machine(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, redirecting = serve(), serve()
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("no_proxy", "intern.lab")
    monkeypatch.setattr(dashboard, "DEFAULT_ADDRESS", redirecting.url)
    with pytest.raises((UserError, RunError)):
        jobs.jobs()
    with pytest.raises((UserError, RunError)):
        sources.find("some-run", None)
    assert len(redirecting.seen) > 1
    assert proxy.seen == []
    assert os.environ["no_proxy"] == "intern.lab,127.0.0.1"


def test_the_command_says_one_line(
    typed: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "is_ours", lambda host, port: False)
    for words in (["jobs"], ["logs"], ["stop", "x"], ["collect", "some-run"]):
        done = typed(*words)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: http://127.0.0.1:8265 is served by another user")
        assert SECRET not in line
