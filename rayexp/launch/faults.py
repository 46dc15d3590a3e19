"""Faults of workers that are nobody's mistake: they are worth another attempt."""

from __future__ import annotations

from types import TracebackType

# Files in which workers exchange data.
_EXCHANGE = ("torch/distributed/", "rayexp/engine/group.py", "rayexp/engine/exchange.py")


class LostError(Exception):
    """Workers were lost (killed, disconnected, on a node that is gone) or could not be started."""


def peer_lost(error: BaseException) -> bool:
    """Whether an exception came out of the exchange between workers: in a healthy worker it means that another one is
    gone.

    A bug of ours in the exchange looks the same, and is tried again `max_failures` times.
    """
    text = str(error)
    if "gloo/transport" in text or "NCCL error" in text:
        return True
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename.replace("\\", "/")
        if any(part in file for part in _EXCHANGE):
            return True
        trace = trace.tb_next
    return False
