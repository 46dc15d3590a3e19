"""Collecting over HTTP from a dashboard that is none of Ray's: what it says is not believed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from typer.testing import CliRunner

from rayexp.cli import app
from rayexp.errors import RunError
from rayexp.runs.run import Run


class Dashboard:
    """Serves a folder of runs as Ray's dashboard does; `lies` are listed in every run's logs/ too."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.lies: Callable[[str], Any] = lambda folder: []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                words = {name: values[0] for name, values in parse_qs(parts.query).items()}
                status, body = outer.answer(parts.path, words)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, path: str, words: dict[str, str]) -> tuple[int, bytes]:
        if path == "/api/v0/nodes":
            result: Any = {"result": [{"node_id": "a" * 56}]}
        elif path == "/api/v0/logs":
            found = sorted(self.tree.glob(words["glob"]))
            listed: Any = [f"{file.relative_to(self.tree)}{'/' * file.is_dir()}" for file in found]
            if words["glob"].endswith("/logs/*"):
                lies = self.lies(words["glob"].removesuffix("*"))
                listed = listed + lies if isinstance(lies, list) else lies
            result = {"all": listed}
        elif path == "/api/v0/logs/file":
            file = self.tree / words["filename"]
            return 200, file.read_bytes() if file.is_file() else b"outside"
        else:
            return 404, b"nothing"
        return 200, json.dumps({"result": True, "msg": "", "data": {"result": result}}).encode()


@pytest.fixture
def dashboard(made_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    offered = tmp_path / "session" / "rayexp" / "runs"
    offered.mkdir(parents=True)
    (offered / made_run.id).symlink_to(made_run.root)
    served = Dashboard(tmp_path / "session")
    yield served
    served.server.shutdown()
    served.server.server_close()


def collect(dashboard: Dashboard, run: Run, to: Path) -> Any:
    words = ["collect", run.id, "--to", str(to), "--address", dashboard.url]
    return CliRunner().invoke(app, words, catch_exceptions=False)


def test_an_honest_one(dashboard: Dashboard, made_run: Run, tmp_path: Path) -> None:
    assert collect(dashboard, made_run, tmp_path / "home").exit_code == 0
    assert Run(tmp_path / "home" / made_run.id).records() == made_run.records()


@pytest.mark.parametrize("lie", ["{folder}/{away}", "{folder}x/../../../../escaped", "{away}", "{folder}../escaped"])
def test_names_that_lead_outside_are_refused(dashboard: Dashboard, made_run: Run, tmp_path: Path, lie: str) -> None:
    dashboard.lies = lambda folder: [lie.format(folder=folder, away=tmp_path / "escaped")]
    with pytest.raises(RunError, match=r"logs/: .*refused"):
        collect(dashboard, made_run, tmp_path / "home")
    assert not list(tmp_path.rglob("*escaped*"))


def test_a_listing_that_contains_itself_is_refused(dashboard: Dashboard, made_run: Run, tmp_path: Path) -> None:
    (made_run.logs / "itself").symlink_to(made_run.logs)
    with pytest.raises(RunError, match="contains itself; refused"):
        collect(dashboard, made_run, tmp_path / "home")


@pytest.mark.parametrize("lie", [3, None, {"a": 1}, [3], [["x"]]])
def test_what_is_no_listing_is_one_line(dashboard: Dashboard, made_run: Run, tmp_path: Path, lie: Any) -> None:
    dashboard.lies = lambda folder: lie
    with pytest.raises(RunError) as caught:
        collect(dashboard, made_run, tmp_path / "home")
    assert "\n" not in str(caught.value)
