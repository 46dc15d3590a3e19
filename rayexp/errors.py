"""The ways in which a command ends badly; the command line turns them into exit codes."""

from __future__ import annotations

import difflib
import errno
import signal
from collections.abc import Iterable

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})  # what the system answers where there is no room left


class _LineError(Exception):
    """An error that is told in one line.

    Attributes:
        fault: what is wrong.
        advice: how to go on or where more is written, as the line goes on with it (`; --resume X goes on`,
            ` (see FILE)`). It holds only while the run's directory stays.
    """

    def __init__(self, fault: object = "", advice: str = "") -> None:
        super().__init__(str(fault), advice)
        self.fault, self.advice = str(fault), advice

    def __str__(self) -> str:
        return self.fault + self.advice


class UserError(_LineError):
    """The input was wrong: one line that names the key, the file or the reference, and what is allowed.

    The command line prints it in red and exits with 2. Never retried: the same input fails the same way.
    """


class RunError(_LineError):
    """The run or the check itself failed. The command line prints it and exits with 1."""


class HeadLostError(RunError):
    """The Ray of a run is gone, and nothing more can be asked of it."""


class Stopped(KeyboardInterrupt):
    """A signal has asked to stop. The command line prints the line, if there is one, and exits with 128 + its number.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int = signal.SIGINT, line: str = "") -> None:
        super().__init__(line)
        self.number = number


class WriteError(OSError):
    """The system refuses to write; `filename` is what the user knows of, not a temporary name.

    The command line prints it and exits with 2 where the path is wrong, else with 1.
    """

    WRONG_PATH = frozenset(
        {
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOENT,
            errno.ENOTDIR,
            errno.EISDIR,
            errno.ENAMETOOLONG,
            errno.ELOOP,
        }
    )

    def __str__(self) -> str:
        full = self.errno in FULL
        advice = "; free some space there, or choose another folder" if full else ""
        return f"{self.filename}: cannot be written ({self.strerror}){advice}"

    @property
    def wrong_path(self) -> bool:
        """Whether another path, or other rights, would help."""
        return self.errno in self.WRONG_PATH


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`' (did you mean X?)'` for the closest allowed word, or an empty string where none is close."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
