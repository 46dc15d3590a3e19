"""glibc keeps freed memory, because activations of the same sizes come back every step."""

from __future__ import annotations

import ctypes
import platform


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep freed memory (`mallopt`); does nothing under another allocator.

    Giving pages to the kernel and faulting them in again costs up to a fifth of a CPU step.

    Blocks of more than 64 MiB are kept in the first arena only, which a main thread uses; other threads, and so Ray's
    workers, do with MALLOC_ARENA_MAX=1 in the environment, at the price of waiting for each other where a process has
    several replicas.
    """
    libc = _glibc()
    if libc is None:
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    # Heaps of threads hold 64 MiB; an empty one is given back unless this much should stay spare.
    libc.mallopt(m_top_pad, 1 << 27)


def _glibc() -> ctypes.CDLL | None:
    """glibc, if it allocates this process's memory: a preloaded allocator (jemalloc, tcmalloc) has its own `malloc`,
    so the name has another address in the process than in the library. Only the addresses are compared."""
    if platform.libc_ver()[0] != "glibc":
        return None
    library, process = ctypes.CDLL("libc.so.6"), ctypes.CDLL(None)
    own, used = (ctypes.cast(where.malloc, ctypes.c_void_p).value for where in (library, process))
    return library if own == used else None
