"""The home directory, where caches and Ray's token lie, and what stands in where there is none."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from rayexp.errors import UserError


def user_home() -> Path | None:
    """The user's home directory; None for a user without one (no HOME, and no entry in the table of users)."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def fallback_home() -> Path:
    """The folder used where the home directory is missing or not writable; only this user can enter it."""
    return Path(tempfile.gettempdir()) / f"rayexp-{os.getuid()}"


def ensure_home(say: Callable[[str], None]) -> None:
    """Give this process and its children a place for caches and Ray's token: `fallback_home` where home is no use.

    Raises:
        UserError: that folder cannot be made, or belongs to someone else.
    """
    real, folder = user_home(), fallback_home()
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
    """Whether files can be created in the folder, or the folder itself where it is missing."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
