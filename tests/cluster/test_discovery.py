"""Which Ray is joined, and where a new one puts its files."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rayexp.cluster import discovery, ports
from rayexp.errors import UserError
from rayexp.launch import doctor

pytestmark = pytest.mark.usefixtures("own_environment")


# ---------------------------------------------------------------------- Ray's folder


def test_rays_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert discovery.temp_folder() == Path("/tmp")
    with tempfile.TemporaryDirectory(prefix="rx-", dir="/tmp") as short:
        monkeypatch.setenv("TMPDIR", short)
        assert discovery.temp_folder() == Path(short)
        fits = f"{short}/{'x' * (discovery.SHORT - len(short) - 1)}"
        Path(fits).mkdir()
        monkeypatch.setenv("RAY_TMPDIR", fits)
        assert discovery.temp_folder() == Path(fits)
        monkeypatch.setenv("RAY_TMPDIR", f"{fits}x")
        with pytest.raises(UserError, match=rf"^RAY_TMPDIR={fits}x: too long .* {discovery.SHORT} bytes at most"):
            discovery.temp_folder()
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", f"/tmp/{'x' * 120}")
    assert discovery.temp_folder() == Path("/tmp")  # simply right
    # A socket's path below the longest folder that is allowed still fits.
    session = f"/{'x' * (discovery.SHORT - 1)}/ray/session_2026-11-26_08-03-31_216672_4194304/sockets/plasma_store"
    assert len(session) == 107


def test_rays_folder_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nothing")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(
        UserError, match=r"^/proc/nothing: Ray cannot write there; set RAY_TMPDIR to a folder of at most"
    ):
        discovery.temp_folder()
    found = doctor._sockets(Path())
    assert not found.ok
    assert "set RAY_TMPDIR" in found.found


# ---------------------------------------------------------------------- a Ray that answers


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


def dead_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_who_named_an_address_is_said(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert discovery.named_address(None) is None
    assert discovery.named_address(f"127.0.0.1:{port}") == f"127.0.0.1:{port}"
    dead = f"127.0.0.1:{dead_port()}"
    with pytest.raises(
        UserError, match=rf"^--address {dead}: no Ray answers there; without one, a Ray is started here"
    ):
        discovery.named_address(dead)
    monkeypatch.setenv("RAY_ADDRESS", dead)
    with pytest.raises(UserError, match=rf"^RAY_ADDRESS={dead}: no Ray answers there; where it is not set, a Ray is"):
        discovery.named_address(None)
    assert discovery.named_address(f"127.0.0.1:{port}") == f"127.0.0.1:{port}"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert discovery.named_address(None) is None


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("ray://head:10001", "Ray Client is not supported; `rayexp submit`"),
        ("http://head:8265", "a dashboard, to which `rayexp submit` sends a run; a Ray is joined at HEAD:6379"),
        ("127.0.0.1:99999", "no Ray answers there"),
        ("127.0.0.1:x", "no Ray answers there"),
        (":", "no Ray answers there"),
    ],
)
def test_addresses_that_cannot_be_joined(address: str, expected: str) -> None:
    with pytest.raises(UserError, match=f"^--address {address}: {expected}"):
        discovery.named_address(address)


def test_only_a_ray_of_this_user_is_joined_unasked(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert discovery.started_here() is None
    file = tmp_path / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    file.write_text(f"127.0.0.1:{port}\n")
    assert discovery.started_here() == f"127.0.0.1:{port}"
    for owner in (False, None):  # another user listens there now; or it is another machine's
        monkeypatch.setattr(ports, "is_ours", lambda host, port, owner=owner: owner)
        assert discovery.started_here() == (None if owner is False else f"127.0.0.1:{port}")
    real = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: real + 1)  # the file is another user's
    assert discovery.started_here() is None
    monkeypatch.undo()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    for text in (f"127.0.0.1:{dead_port()}", "", "nonsense", "\udcff"):
        file.write_bytes(text.encode(errors="surrogateescape"))
        assert discovery.started_here() is None
    mine = tmp_path / "mine"
    mine.write_text(f"127.0.0.1:{port}")
    file.unlink()
    file.symlink_to(mine)
    assert discovery.started_here() == f"127.0.0.1:{port}"


def test_a_dead_address_is_one_line_and_leaves_nothing(
    tmp_path: Path, typed: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = f"127.0.0.1:{dead_port()}"
    monkeypatch.setenv("RAY_ADDRESS", dead)
    (tmp_path / "c.yaml").write_text("scaling: {num_workers: 2}")
    done = typed("train", "c.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"error: RAY_ADDRESS={dead}: no Ray answers there; where it is not set, a Ray is started here for the run"
    ]
    assert not list((tmp_path / "runs").iterdir())
