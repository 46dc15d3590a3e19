"""Faults of workers that are nobody's mistake: they are worth another attempt."""

from __future__ import annotations

import re
from types import TracebackType

_NCCL = re.compile(r"NCCL error in: .*?:\d+, ([^,(]+?) *(?:\(.*?\))?, NCCL version ([\w.]+)")
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


def why_lost(error: BaseException) -> str:
    """Why a worker could not go on, in a line, where `peer_lost`. NCCL has its reason on the last of several lines;
    gloo knows no more than that a connection has ended."""
    text = str(error).strip()
    if (found := _NCCL.search(text)) is None:
        return "lost touch with a peer"
    return f"NCCL {found[2]}: {found[1]}: {text.splitlines()[-1][:200]} (NCCL_DEBUG=INFO tells more)"
