"""What travels with a job, and the locked door, without a cluster."""

from __future__ import annotations

import stat
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

import rayexp
from rayexp.cluster import as_job, auth, jobs
from rayexp.config import ExperimentConfig, load
from rayexp.errors import UserError


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


def test_the_package_is_the_source_and_the_configuration(tmp_path: Path) -> None:
    config = ExperimentConfig(name="x", epochs=3)
    package = jobs.pack(config, tmp_path / "package")
    assert load(tmp_path / "package" / "config.yaml") == config
    for name in ("rayexp/__main__.py", "rayexp/launch/driver.py", "rayexp/pages/templates/diff_base.html.j2"):
        assert package.files[name] > 0
    tops = {Path(name).parts[0] for name in package.files}
    assert tops == {"rayexp", "config.yaml"}
    assert not [n for n in package.files if "__pycache__" in n or n.endswith(".pyc") or "/." in n]
    assert package.size == sum(p.stat().st_size for p in (tmp_path / "package").rglob("*") if p.is_file())
    assert package.size < 3_000_000


def test_too_large_a_package_names_the_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "rayexp"
    source.mkdir()
    (source / "__init__.py").write_text("")
    for name, size in (("a.bin", 60), ("b.bin", 41), ("c.bin", 2)):
        with (source / name).open("wb") as file:
            file.truncate(size * 2**20)
    monkeypatch.setattr(rayexp, "__file__", str(source / "__init__.py"))
    with pytest.raises(UserError, match=r"103\.0 MiB, Ray takes 100; largest: rayexp/a\.bin \(60\.0 MiB\), rayexp/b"):
        jobs.pack(ExperimentConfig(), tmp_path / "package")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://head:8265/", "http://head:8265"),
        ("head:8265", "http://head:8265"),
        ("https://ray.lab/cluster", "https://ray.lab/cluster"),
    ],
)
def test_addresses(given: str | None, expected: str) -> None:
    assert auth.address(given) == expected


@pytest.mark.parametrize("given", ["ray://head:10001", "http://", "http://me:secret@head:8265", "auto://x"])
def test_addresses_that_are_none(given: str) -> None:
    with pytest.raises(UserError, match="--address") as error:
        auth.address(given)
    assert "secret" not in str(error.value) or given != "http://me:secret@head:8265"


def test_where_the_token_is_looked_for(empty_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert auth.token() is None
    assert auth.headers() == {}
    (empty_home / ".ray").mkdir()
    (empty_home / ".ray" / "auth_token").write_text("from-home\n")
    assert auth.token() == "from-home"
    (tmp_path / "elsewhere").write_text("from-path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "elsewhere"))
    assert auth.token() == "from-path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from-env")
    assert auth.headers() == {"Authorization": "Bearer from-env"}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert auth.token() is None


def test_a_new_token_is_closed_to_others(empty_home: Path) -> None:
    auth.make_token()
    path = empty_home / ".ray" / "auth_token"
    first = path.read_text()
    assert len(first) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)  # as Ray writes it
    auth.make_token()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == first


def test_no_token_is_made_where_doors_are_open(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    auth.make_token()
    assert not (empty_home / ".ray").exists()


def test_nobody_at_the_address() -> None:
    for ask in (lambda a: jobs.jobs(a), lambda a: auth.get(a, "/api/v0/nodes"), lambda a: jobs.stop(a, "x")):
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
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        place = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match="not a Ray dashboard"):
            auth.get(place, "/api/v0/nodes")
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


def test_relative_paths_of_a_job_count_from_home(
    empty_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExperimentConfig.model_validate({"data": {"name": "folder", "root": "pictures"}, "storage_path": "runs"})
    monkeypatch.chdir(tmp_path)
    assert as_job.at_home(config) == config  # no job
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "j1"}}')
    assert as_job.job_id() == "j1"
    assert as_job.at_home(config).data.root == empty_home / "pictures"
    assert as_job.at_home(config).storage_path == empty_home / "runs"
    (tmp_path / "pictures").mkdir()  # travelled with the job
    assert as_job.at_home(config).absolute().data.root == tmp_path / "pictures"
    absolute = config.model_copy(update={"storage_path": Path("/nfs/runs")})
    assert as_job.at_home(absolute).storage_path == Path("/nfs/runs")


@pytest.mark.parametrize(("status", "expected"), [(200, True), (401, False)])
def test_an_unlocked_cluster_is_noticed(status: int, expected: bool) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert auth.unlocked(f"http://127.0.0.1:{server.server_port}") is expected
    finally:
        server.shutdown()
        server.server_close()
