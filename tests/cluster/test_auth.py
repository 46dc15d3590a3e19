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


@pytest.mark.parametrize("there", [None, "", "\n"])
def test_of_two_that_are_made_at_once_the_first_stays(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch, there: str | None
) -> None:
    path = empty_home / ".ray" / "auth_token"
    path.parent.mkdir()
    if there is not None:
        path.write_text(there)  # which a full disk has left
    draw = auth.secrets.token_hex

    def meanwhile(size: int) -> str:
        path.write_text("first")  # by another process
        return draw(size)

    with monkeypatch.context() as patched:
        patched.setattr(auth.secrets, "token_hex", meanwhile)
        auth.make_token()
    assert auth.token() == "first"
    path.write_text("")
    auth.make_token()
    assert len(auth.token() or "") == 64
    assert [file.name for file in path.parent.iterdir()] == ["auth_token"]


def test_no_token_is_made_where_authentication_is_off(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    auth.make_token()
    assert not (empty_home / ".ray").exists()
