"""Asking about jobs where there is no cluster, and their exit codes."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from rayexp.cluster import dashboard, jobs
from rayexp.errors import UserError

pytestmark = pytest.mark.usefixtures("empty_home")


def test_nobody_at_the_address() -> None:
    for ask in (lambda a: jobs.jobs(a), lambda a: dashboard.get(a, "/api/v0/nodes"), lambda a: jobs.stop(a, "x")):
        with pytest.raises(UserError, match=r"no Ray cluster answers at http://127.0.0.1:1"):
            ask("http://127.0.0.1:1")


def test_another_server_at_the_address() -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        place = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match="not a Ray dashboard"):
            dashboard.get(place, "/api/v0/nodes")
        with pytest.raises(UserError, match="no Ray cluster answers"):
            jobs.jobs(place)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("succeeded", 0, 0), ("failed", 2, 2), ("failed", 1, 1), ("failed", None, 1), ("stopped", None, 130)],
)
def test_exit_codes(status: str, code: int | None, expected: int) -> None:
    assert jobs.exit_code(jobs.Job("j", "n", status, code, None, None)) == expected
