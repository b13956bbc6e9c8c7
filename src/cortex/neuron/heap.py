"""Gives this process's freed memory back to the system, which the C library by itself does late or never.

A tokenizer is tens of megabytes of small pieces, built in one of several threads. Where the C library has
no such functions, nothing is done.
"""

from __future__ import annotations

import ctypes
import gc
from typing import Final

_libc: Final = ctypes.CDLL(None)
_M_ARENA_MAX: Final = -8
"""glibc, malloc.h: how many heaps there may be for threads to spread over."""


def keep_to_one_arena() -> None:
    """For a process whose threads take turns anyway; otherwise each thread's heap keeps its own peak."""
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def trim() -> None:
    """Takes tens of milliseconds."""
    gc.collect()
    malloc_trim = getattr(_libc, "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
