"""Ray's authentication token: where it is kept, and what is sent with a request. Knows no Ray itself.

Whoever reaches a Ray cluster without authentication can run code on it. So every cluster that rayexp starts asks for
Ray's token. It lies in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token, readable by
its owner only. The token says who may use the cluster; it encrypts nothing: use an SSH tunnel over a foreign network.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from pathlib import Path
from typing import NoReturn

from rayexp.cluster.home import user_home
from rayexp.errors import UserError


def disabled() -> bool:
    """Whether the user has switched authentication off (RAY_AUTH_MODE=disabled)."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled"


def token_path() -> Path:
    """The token's file (UserError where there is no home for it)."""
    if given := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return Path(given)
    home = user_home()
    if home is None:
        raise UserError(
            "this user has no home directory for Ray's token; set HOME, RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
        )
    return home / ".ray" / "auth_token"


def token() -> str | None:
    """The token; None where there is none or authentication is `disabled`.

    Raises:
        UserError: its file cannot be read.
    """
    if disabled():
        return None
    if given := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return given
    try:
        return token_path().read_text().strip() or None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{token_path()}: the cluster's token cannot be read ({error.strerror})") from error


def make_token() -> None:
    """Make a token if there is none, in a file that only its owner can read; call it before a Ray is started here.

    Ray would make one too, but readable by everyone. RAY_AUTH_MODE=disabled and RAY_AUTH_TOKEN are respected.

    Raises:
        UserError: its file cannot be written.
    """
    if disabled() or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = token_path()
    try:
        if token() is None:
            _keep(path, secrets.token_hex(32))
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)
    except OSError as error:
        raise UserError(
            f"{path}: Ray's token cannot be kept there ({error.strerror}); set HOME, or RAY_AUTH_TOKEN_PATH to a file"
        ) from error


def _keep(path: Path, made: str) -> None:
    """Write a token whole, in a file for its owner only. Of two processes that make one at once the first's stays: a
    Ray may have begun with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # which nobody else can read
    try:
        with os.fdopen(handle, "w") as file:
            file.write(made)
        if path.exists() and token() is None:
            path.unlink()  # an empty one
        try:
            path.hardlink_to(name)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def headers() -> dict[str, str]:
    """The HTTP headers that every request to the cluster carries."""
    found = token()
    return {"Authorization": f"Bearer {found}"} if found else {}


def raise_refused(address: str) -> NoReturn:
    """Explain an answer 401 or 403 of the cluster at `address` (UserError)."""
    if disabled():
        raise UserError(f"{address} wants its token, and RAY_AUTH_MODE=disabled holds it back")
    why = "does not know the token in" if token() else "wants its token, and none is in"
    raise UserError(f"{address} {why} RAY_AUTH_TOKEN or {token_path()}; copy ~/.ray/auth_token of the head there")
