"""What the C library does with freed memory: give it back, or keep it for the next one who asks.

A tokenizer is tens of megabytes of small pieces, built in one of several threads, and should go back. The
buffers of a step come again with the next one, and should stay. Where the C library has no such functions,
nothing is done.
"""

from __future__ import annotations

import ctypes
import gc
from typing import Final

_libc: Final = ctypes.CDLL(None)
# glibc, malloc.h:
_M_ARENA_MAX: Final = -8
"""How many heaps there may be for threads to spread over."""
_M_MMAP_MAX: Final = -4
"""How many large pieces may be mapped from the system one by one, and go back when they are freed."""
_M_TRIM_THRESHOLD: Final = -1
"""Bytes at the end of the heap from which on they go back."""


def keep_to_one_arena() -> None:
    """For a process whose threads take turns anyway; otherwise each thread's heap keeps its own peak."""
    _mallopt(_M_ARENA_MAX, 1)


def settle() -> None:
    """For a process that has all that it will keep: Python's collector no longer looks through what is there
    now, which would stop a step for a quarter of a second again and again.
    """
    gc.collect()
    gc.freeze()


def keep_buffers() -> None:
    """From now on freed memory stays with this process: fetching a page anew costs more than filling it."""
    _mallopt(_M_MMAP_MAX, 0)
    _mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def trim() -> None:
    """Takes tens of milliseconds."""
    gc.collect()
    malloc_trim = getattr(_libc, "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def _mallopt(option: int, value: int) -> None:
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)
