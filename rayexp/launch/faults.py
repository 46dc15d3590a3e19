"""What can go wrong with workers that is nobody's mistake."""

from __future__ import annotations

from types import TracebackType


class LostError(Exception):
    """Workers were lost (killed, disconnected, their node gone), or could not be started: worth another attempt."""


def peer_lost(error: BaseException) -> bool:
    """Whether an exception came out of torch.distributed: the sign, in a healthy worker, that another one is gone."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        if "torch/distributed/" in trace.tb_frame.f_code.co_filename.replace("\\", "/"):
            return True
        trace = trace.tb_next
    return False
