"""A cluster over HTTP: the address of its dashboard, and requests to it that carry the token. Knows no Ray itself.

The token is sent only to an address that the user has named, or to one where a process of the same user listens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from rayexp.cluster import auth, ports
from rayexp.errors import RunError, UserError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TIMEOUT_S = 30.0  # for one answer
CHUNK = 1 << 20  # bytes
EXPECTED = "expected the head's dashboard, for example http://HEAD:8265"


def address(given: str | None) -> str:
    """The dashboard's address, such as `http://127.0.0.1:8265`.

    As given, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS where that is an http address, else this machine's port 8265
    where a process of this user listens.

    Raises:
        UserError: it is not an http address; or none is named and no process of this user listens here.
    """
    named = given or os.environ.get("RAY_API_SERVER_ADDRESS")
    joined = os.environ.get("RAY_ADDRESS", "")  # may also be the address at which a Ray is joined
    if not named and joined.startswith(("http://", "https://")):
        named = joined
    found = named or DEFAULT_ADDRESS
    if "://" not in found:
        found = f"http://{found}"
    try:
        parts = urlsplit(found)
    except ValueError:
        raise UserError(f"--address: {EXPECTED}") from None  # whatever it is, a password may be in it
    if parts.username or parts.password:
        raise UserError("--address: no name or password in it; the token belongs into ~/.ray/auth_token")
    try:
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host, port = None, 0
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"--address {found}: {EXPECTED}")
    _bypass_proxies(host)
    if not named:
        ours = ports.is_ours(host, port)
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


def _bypass_proxies(host: str) -> None:
    """Send nothing that goes to this machine through a proxy, which would see the token."""
    excluded = [name for name in os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")).split(",") if name]
    if host in ("127.0.0.1", "localhost", "::1") and host not in excluded:
        os.environ["no_proxy"] = ",".join([*excluded, host])


def get(address: str, path: str, **query: Any) -> Any:
    """GET JSON from Ray's state API; returns the answer's `result`.

    Raises:
        UserError: there is no cluster, or it refuses the token.
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
    """GET a file in pieces of at most `CHUNK` bytes.

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


def is_open(address: str) -> bool:
    """Whether the cluster answers without a token, too: then anyone who reaches it can run programs there."""
    import requests

    try:
        return bool(requests.get(f"{address}/api/jobs/", timeout=TIMEOUT_S).status_code == 200)
    except requests.RequestException:
        return False


def _request(address: str, path: str, query: dict[str, Any]) -> Any:
    import requests

    try:
        answer = requests.get(address + path, params=query, headers=auth.headers(), timeout=TIMEOUT_S, stream=True)
    except requests.RequestException as error:
        raise UserError(f"no Ray cluster answers at {address} ({type(error).__name__})") from error
    if answer.status_code in (401, 403):
        auth.raise_refused(address)
    if answer.status_code != 200:
        said = answer.text.strip().splitlines() or [f"it answered with status {answer.status_code} and no word"]
        raise RunError(f"{address}{path}: {said[-1]}")
    return answer
