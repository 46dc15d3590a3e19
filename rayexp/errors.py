"""The errors that end a command; the command line turns them into exit codes."""

from __future__ import annotations

import difflib
import errno
import signal
from collections.abc import Iterable

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})  # the system's errors for a disk or a quota that is full


GO_ON = "; go on with: "  # before the command that resumes what has ended, at the end of a line


def last_words(line: str) -> list[str]:
    """How a command ends, as lines to print: the command that goes on is on a line of its own, to be copied."""
    fault, mark, command = line.partition(GO_ON)
    return [fault, mark.removeprefix("; ") + command] if mark else [fault]


class _LineError(Exception):
    """An error that is printed as one line.

    Attributes:
        fault: what is wrong.
        advice: how to go on, or where to read more; the end of the line (`; go on with: rayexp train --resume X`,
            ` (see FILE)`). Valid only as long as the run's directory exists.
    """

    def __init__(self, fault: object = "", advice: str = "") -> None:
        super().__init__(str(fault), advice)
        self.fault, self.advice = str(fault), advice

    def __str__(self) -> str:
        return self.fault + self.advice


class UserError(_LineError):
    """The user's input is wrong: one line that names the key, the file or the reference, and what is allowed.

    The command line prints it in red and exits with 2. It is never retried, since the same input fails the same way.
    """


class RunError(_LineError):
    """The run or the check itself failed. The command line prints it and exits with 1."""


class HeadLostError(RunError):
    """The Ray cluster of a run is lost and no longer answers."""


class Stopped(KeyboardInterrupt):
    """A signal asked the command to stop. The command line prints the line, if any, and exits with 128 + the signal's
    number.

    Attributes:
        number: the number of the signal.
    """

    def __init__(self, number: int = signal.SIGINT, line: str = "") -> None:
        super().__init__(line)
        self.number = number


class WriteError(OSError):
    """The system refuses to write; `filename` is the path that the user knows, not a temporary one.

    The command line prints it and exits with 2 if the path is wrong, else with 1.
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
        """Whether another path, or other permissions, would help."""
        return self.errno in self.WRONG_PATH


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`' (did you mean X?)'` with the closest allowed name, or an empty string where none is close."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
