"""What a start needs of what is around the process: a home, a short temporary folder, a Ray that answers."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from rayexp.errors import UserError

CONNECT_S = 10.0
# AF_UNIX allows 107 bytes; below its folder Ray has sockets of this form.
SOCKET = len("/ray/session_2026-11-26_08-03-31_216672_1234567/sockets/plasma_store")
SHORT = 107 - SOCKET
COMMON = "/tmp"


def home() -> Path | None:
    """The user's home directory; None for a user who has none (no HOME, and no entry in the table of users)."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def stand_in() -> Path:
    """What stands in for a home that is missing or cannot be written: a folder that only this user can enter."""
    return Path(tempfile.gettempdir()) / f"rayexp-{os.getuid()}"


def settle_home(say: Callable[[str], None]) -> None:
    """For this process and those that it starts: where there is no home that can be written, caches and Ray's token
    lie in `stand_in`.

    Raises:
        UserError: that folder cannot be made, or belongs to someone else.
    """
    real, folder = home(), stand_in()
    if real == folder or (real is not None and writable(real)):
        return
    new = not folder.exists()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise UserError(f"there is no home and {folder} cannot be made ({error.strerror}); set HOME") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise UserError(f"there is no home, and {folder} is not this user's alone; set HOME or TMPDIR")
    if real is None:
        os.environ["HOME"] = str(folder)
    else:
        os.environ.setdefault("XDG_CACHE_HOME", str(folder / ".cache"))
        os.environ.setdefault("XDG_CONFIG_HOME", str(folder / ".config"))
        if not (real / ".ray" / "auth_token").is_file():
            os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(folder / ".ray" / "auth_token"))
    if new:
        why = f"the home directory {real} cannot be written" if real else "this user has no home directory"
        say(f"warning: {why}: caches and Ray's token go to {folder}; HOME=DIR chooses another place")


def writable(folder: Path) -> bool:
    """Whether files can be made in there, or the folder itself where it is missing."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def ray_folder() -> Path:
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
    for place in (folder, folder / "ray"):
        if not writable(place):
            raise UserError(f"{place}: Ray cannot write there; set RAY_TMPDIR to a folder of at most {SHORT} bytes")
    return folder


def ray_address(address: str | None) -> str | None:
    """The address of the running Ray that the user names: as given, else RAY_ADDRESS; None where none is named.

    Raises:
        UserError: nobody answers there, or it is no address that can be joined.
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
    """Whether anyone listens at host:port: Ray itself would try for many minutes, silently.

    Args:
        patience: seconds for a connection to be taken up.
    """
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=patience):
            return True
    except (OSError, ValueError, OverflowError):
        return False


def left_here() -> str | None:
    """The Ray that `ray start` of this user has left on this machine.

    Its address stays behind where it was killed, and the folder is everybody's: anyone could put an address there, or
    listen where a Ray of this user has been, and would be shown the token.
    """
    from rayexp.cluster import listeners

    file = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or COMMON) / "ray" / "ray_current_cluster"
    try:
        if file.lstat().st_uid != os.getuid():
            return None
        address = file.read_text().strip()
    except (OSError, ValueError):
        return None
    host, _, port = address.rpartition(":")
    if not answers(address) or listeners.ours(host, int(port)) is False:
        return None
    return address
