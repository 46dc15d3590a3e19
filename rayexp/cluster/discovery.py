"""Which running Ray a command joins, and where a Ray that it starts puts its files. Knows no Ray itself."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from rayexp.cluster import ports
from rayexp.cluster.home import writable
from rayexp.errors import UserError

CONNECT_S = 10.0
# AF_UNIX allows 107 bytes; below its folder Ray has sockets of this form.
SOCKET = len("/ray/session_2026-11-26_08-03-31_216672_1234567/sockets/plasma_store")
SHORT = 107 - SOCKET
COMMON = "/tmp"


def temp_folder() -> Path:
    """The folder under which a Ray that is started here puts its sockets and logs.

    RAY_TMPDIR, else TMPDIR, else /tmp, as Ray itself; but /tmp where TMPDIR is too long for a socket's path.

    Raises:
        UserError: it is too long or cannot be written; the line names RAY_TMPDIR.
    """
    given = os.environ.get("RAY_TMPDIR")
    folder = Path(given or os.environ.get("TMPDIR") or COMMON)
    if not given and len(os.fsencode(folder)) > SHORT:
        folder = Path(COMMON)
    if len(os.fsencode(folder)) > SHORT:
        raise UserError(f"RAY_TMPDIR={folder}: too long for Ray's sockets; allowed are paths of {SHORT} bytes at most")
    for needed in (folder, folder / "ray"):
        if not writable(needed):
            raise UserError(f"{needed}: Ray cannot write there; set RAY_TMPDIR to a folder of at most {SHORT} bytes")
    return folder


def named_address(address: str | None) -> str | None:
    """The address of the running Ray that the user names: as given, else RAY_ADDRESS; None where none is named.

    Raises:
        UserError: nobody answers there, or it is not an address that can be joined.
    """
    named = address or os.environ.get("RAY_ADDRESS")
    if not named or named == "local":
        return None
    said, instead = (
        (f"--address {named}", "without one") if address else (f"RAY_ADDRESS={named}", "where it is not set")
    )
    if named.startswith("ray://"):
        raise UserError(f"{said}: Ray Client is not supported; `rayexp submit` sends a run to a cluster")
    if "://" in named:
        raise UserError(f"{said}: a dashboard, to which `rayexp submit` sends a run; a Ray is joined at HEAD:6379")
    if ":" in named and not answers(named):
        raise UserError(f"{said}: no Ray answers there; {instead}, a Ray is started here for the run")
    return named


def answers(address: str, patience: float = CONNECT_S) -> bool:
    """Whether anyone listens at host:port. Ray itself would try for many minutes, silently.

    Args:
        patience: seconds for the connection to be accepted.
    """
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=patience):
            return True
    except (OSError, ValueError, OverflowError):
        return False


def started_here() -> str | None:
    """The address of the Ray that this user has started on this machine with `ray start`; None where none answers.

    Ray leaves the address in a folder that everybody can write, and leaves it there when it is killed. So both the file
    and the process that listens must be this user's: another one would be sent the token.
    """
    file = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or COMMON) / "ray" / "ray_current_cluster"
    try:
        if file.lstat().st_uid != os.getuid():
            return None
        address = file.read_text().strip()
    except (OSError, ValueError):
        return None
    host, _, port = address.rpartition(":")
    if not answers(address) or ports.is_ours(host, int(port)) is False:
        return None
    return address
