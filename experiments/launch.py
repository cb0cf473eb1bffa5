"""Process settings that can only be made before Python starts."""

import os
import sys

NEVER = 1 << 40
"""Bytes: more than is ever asked for at once, or left unused at the heap's end."""
TUNABLES = f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={NEVER}:glibc.malloc.trim_threshold={NEVER}"


def with_tuned_malloc() -> None:
    """Starts this program again, on Linux, with huge pages and a heap that does not shrink, unless GLIBC_TUNABLES is set.

    XLA's CPU backend asks for the temporary memory of every call anew, whose first touch, 4 kB at a time, costs a tenth and more of
    a training step; and its threads give the scratch of every large product back, to touch it anew in the next, another 4 % with
    rows of 4096 tokens. glibc reads these settings only when a process starts; other C libraries ignore them.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, sys.orig_argv)
