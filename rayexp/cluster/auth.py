"""Locked doors: Ray's token, and how a cluster is reached over HTTP. Knows no Ray itself.

Whoever reaches an open Ray cluster runs code on it. So every cluster that rayexp starts wants Ray's token, which lies
in RAY_AUTH_TOKEN, in the file named by RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token, readable by its owner only.
The token proves who may come in; it encrypts nothing: over a foreign network use an SSH tunnel. It is shown only at an
address that the user has named, or where a Ray of the same user listens.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from rayexp.cluster import listeners, surroundings
from rayexp.errors import RunError, UserError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TIMEOUT_S = 30.0  # for one answer of the cluster
CHUNK = 1 << 20


def token_path() -> Path:
    """The token's file (UserError where there is no home for it)."""
    if given := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return Path(given)
    home = surroundings.home()
    if home is None:
        raise UserError(
            "this user has no home directory for Ray's token; set HOME, RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
        )
    return home / ".ray" / "auth_token"


def token() -> str | None:
    """The token where there is one and it is not switched off (RAY_AUTH_MODE=disabled)."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
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
    """Before a Ray is started here: a token, in a file that is closed to others.

    Ray would make one too, but readable by everyone. RAY_AUTH_MODE=disabled and RAY_AUTH_TOKEN are respected.

    Raises:
        UserError: its file cannot be written.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = token_path()
    try:
        if token() is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)
    except OSError as error:
        raise UserError(
            f"{path}: Ray's token cannot be kept there ({error.strerror}); set HOME, or RAY_AUTH_TOKEN_PATH to a file"
        ) from error


def address(given: str | None) -> str:
    """The cluster's HTTP address: as given, else RAY_API_SERVER_ADDRESS or RAY_ADDRESS (where that is one), else this
    machine's port 8265 if a Ray of this user listens there. To no other address is the token shown.

    Raises:
        UserError: it is no http address; none is named and no Ray of this user's is here.
    """
    named = given or os.environ.get("RAY_API_SERVER_ADDRESS")
    joined = os.environ.get("RAY_ADDRESS", "")  # which may also say where a Ray is joined
    if not named and joined.startswith(("http://", "https://")):
        named = joined
    found = named or DEFAULT_ADDRESS
    if "://" not in found:
        found = f"http://{found}"
    parts = urlsplit(found)
    if parts.username or parts.password:
        raise UserError("--address: no name or password in it; the token belongs into ~/.ray/auth_token")
    try:
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host, port = None, 0
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"--address {found}: expected the head's dashboard, for example http://HEAD:8265")
    _past_proxies(host)
    if not named:
        ours = listeners.ours(host, port)
        if ours is None:
            raise UserError(
                f"no Ray cluster answers at {found}; --address http://HEAD:8265 (or RAY_API_SERVER_ADDRESS) names one"
            )
        if not ours:
            raise UserError(
                f"{found} is served by another user, and what you have not named is not shown your token; "
                f"--address {found} names it"
            )
    return found.rstrip("/")


def _past_proxies(host: str) -> None:
    """What goes to this machine goes through no proxy, which would be shown the token."""
    around = [name for name in os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")).split(",") if name]
    if host in ("127.0.0.1", "localhost", "::1") and host not in around:
        os.environ["no_proxy"] = ",".join([*around, host])


def headers() -> dict[str, str]:
    """What every request to the cluster carries."""
    found = token()
    return {"Authorization": f"Bearer {found}"} if found else {}


def refused(address: str) -> NoReturn:
    """The cluster said 401 or 403 (UserError)."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        raise UserError(f"{address} wants its token, and RAY_AUTH_MODE=disabled holds it back")
    why = "does not know the token in" if token() else "wants its token, and none is in"
    raise UserError(f"{address} {why} RAY_AUTH_TOKEN or {token_path()}; copy ~/.ray/auth_token of the head there")


def get(address: str, path: str, **query: Any) -> Any:
    """GET JSON from Ray's state API; returns what stands in `result`.

    Raises:
        UserError: no cluster there, or the token is refused.
        RunError: the cluster cannot answer.
    """
    with _request(address, path, query) as answer:
        try:
            body = answer.json()
            if not body["result"]:
                raise RunError(f"{address}: {body['msg'] or 'the question failed, and there is no word of why'}")
            return body["data"]["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{address}: not a Ray dashboard ({type(error).__name__} in its answer)") from error


def stream(address: str, path: str, **query: Any) -> Iterator[bytes]:
    """GET a file in pieces.

    Raises:
        UserError, RunError: as `get`; RunError also where the connection breaks off in the middle.
    """
    import requests

    with _request(address, path, query) as answer:
        try:
            yield from answer.iter_content(CHUNK)
        except requests.RequestException as error:
            raise RunError(
                f"{address}: the connection broke off ({type(error).__name__}); the same command goes on"
            ) from error


def unlocked(address: str) -> bool:
    """Whether the cluster answers without a token, too: then anyone who reaches it runs programs there."""
    import requests

    try:
        return bool(requests.get(f"{address}/api/jobs/", timeout=TIMEOUT_S).status_code == 200)
    except requests.RequestException:
        return False


def _request(address: str, path: str, query: dict[str, Any]) -> Any:
    import requests

    try:
        answer = requests.get(address + path, params=query, headers=headers(), timeout=TIMEOUT_S, stream=True)
    except requests.RequestException as error:
        raise UserError(f"no Ray cluster answers at {address} ({type(error).__name__})") from error
    if answer.status_code in (401, 403):
        refused(address)
    if answer.status_code != 200:
        said = answer.text.strip().splitlines() or [f"it answered with status {answer.status_code} and no word"]
        raise RunError(f"{address}{path}: {said[-1]}")
    return answer
