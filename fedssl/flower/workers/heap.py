"""Memory that training frees is training's next memory."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of mallopt(3)
_LARGE = (1 << 28, 1 << 25)  # bytes; the first that is accepted: older versions of glibc take 32 MiB at most
_NEVER = (1 << 31) - 1


@cache
def keep_freed() -> bool:
    """Let this process keep the memory that it frees, in one heap for all of its threads; whether it does.

    By default glibc hands freed blocks above some hundred kilobytes back to the system, which clears each page of
    theirs again at the next step: up to a tenth of a step's time, with thousands of pages a step. And it gives each
    thread a heap of its own, so sixteen clients that train at once hold the memory of many. Values do not change.
    Elsewhere than on Linux with glibc nothing is done.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    large = any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGE)
    return bool(large and mallopt(_TRIM_THRESHOLD, _NEVER) and mallopt(_ARENA_MAX, 1))
