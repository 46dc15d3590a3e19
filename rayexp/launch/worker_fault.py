"""Errors of a worker on their way to the driver.

A worker's process prints what it raises, and Ray Train wraps it: only the text arrives. So kind and line travel in the
text, as JSON, where people who look at the logs can read them too.
"""

from __future__ import annotations

import json
import re

from rayexp.errors import RunError, UserError
from rayexp.launch.faults import LostError

_KINDS = (UserError, RunError, LostError)
_MARK = "rayexp fault: "
_FOUND = re.compile(rf"{_MARK}(\{{.*\}})\s*$", re.MULTILINE)


class WorkerFaultError(Exception):
    """What a worker's process raises in the place of an error of ours."""

    def __init__(self, text: str) -> None:
        super().__init__(text)

    @classmethod
    def of(cls, error: UserError | RunError | LostError) -> WorkerFaultError:
        """The error, ready to travel."""
        kind = next(kind.__name__ for kind in _KINDS if isinstance(error, kind))
        fault, advice = (str(error), "") if isinstance(error, LostError) else (error.fault, error.advice)
        return cls(_MARK + json.dumps({"kind": kind, "fault": fault, "advice": advice}))


def find(text: str) -> UserError | RunError | LostError | None:
    """The error of ours that the text of a failure, or what a process has printed, tells of last; None where a worker
    ended in another way."""
    found = _FOUND.findall(text)
    if not found:
        return None
    fields = json.loads(found[-1])
    if fields["kind"] == LostError.__name__:
        return LostError(fields["fault"])
    return (UserError if fields["kind"] == UserError.__name__ else RunError)(fields["fault"], fields["advice"])
