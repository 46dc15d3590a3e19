"""In this process, without Ray."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

from rayexp.cores import cores
from rayexp.errors import RunError, UserError
from rayexp.launch.plan import Node
from rayexp.recorder import Recorder
from rayexp.runs import Run


def here() -> Node:
    """This machine."""
    from rayexp.engine import place

    return Node("this machine", cores(), place.gpus())


def attempt(run: Run, payload: Mapping[str, Any]) -> str:
    """Train from where the run stands; returns `done` or `stopped`.

    Raises:
        UserError, RunError: training cannot go on; unexpected errors are logged and become a RunError.
    """
    from rayexp.engine import place
    from rayexp.engine.group import Group
    from rayexp.launch.worker import work

    recorder = Recorder(run)
    try:
        return work(payload, Group, recorder, place.device(payload["device"]), world_size=0)
    except (UserError, RunError):
        raise
    except OSError as error:
        recorder.log(0, traceback.format_exc())
        raise RunError(f"{error}; --resume {run.id} goes on from the newest checkpoint") from error
    except Exception as error:
        recorder.log(0, traceback.format_exc())
        line = " ".join(str(error).split())[:500]
        raise RunError(f"{type(error).__name__}: {line} (see {run.logs / 'rank_0.log'})") from error
