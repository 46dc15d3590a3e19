"""The token: where it is looked for, and who can read it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from rayexp.cluster import auth

pytestmark = pytest.mark.usefixtures("empty_home")


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


def test_no_token_is_made_where_authentication_is_off(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    auth.make_token()
    assert not (empty_home / ".ray").exists()
