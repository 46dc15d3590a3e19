"""What can go wrong with workers that is nobody's mistake."""

from __future__ import annotations

from types import TracebackType

# Where workers speak to each other.
_ROOMS = ("torch/distributed/", "rayexp/engine/group.py", "rayexp/engine/exchange.py")


class LostError(Exception):
    """Workers were lost (killed, disconnected, their node gone), or could not be started: worth another attempt."""


def peer_lost(error: BaseException) -> bool:
    """Whether an exception came out of the exchange between workers: the sign, in a healthy one, that another is gone.

    A mistake of ours there would look the same and be tried again, `max_failures` times.
    """
    text = str(error)
    if "gloo/transport" in text or "NCCL error" in text:
        return True
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename.replace("\\", "/")
        if any(room in file for room in _ROOMS):
            return True
        trace = trace.tb_next
    return False
