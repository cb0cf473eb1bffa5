"""Process settings that can only be made before Python starts."""

import os
import sys

NEVER = 1 << 40
"""Bytes: more than is ever asked for at once, or left unused at the heap's end."""
TUNABLES = f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={NEVER}:glibc.malloc.trim_threshold={NEVER}"


def with_tuned_malloc() -> None:
    """Starts this program again, on Linux, with huge pages and a heap that does not shrink, unless GLIBC_TUNABLES is set.

    XLA's CPU backend asks for the temporary memory of every call anew. Its first touch, 4 kB at a time, costs a tenth and more of a
    training step, in huge pages a twentieth where they are found, and nothing where the last call's memory was kept. glibc reads
    these settings only when a process starts; other C libraries ignore them.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, sys.orig_argv)
