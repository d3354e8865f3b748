"""Keeps freed memory in the process, so that temporaries do not fault their pages in anew every time

By default glibc returns tensors above 128 kB to the kernel when they are freed and gets fresh pages for the
next one; the reference, which dequantises weights again and again, then spends half its time in the
kernel.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_MMAP_BYTES = 64 << 20  # larger tensors are still given back at once
_KEPT_BYTES = 512 << 20  # free memory at the end of the heap that may stay


def keep_freed_memory() -> bool:
    """Set the thresholds for the rest of the process; False where the C library has none."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
