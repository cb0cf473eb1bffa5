"""Process settings that can only be made before Python starts."""

import os
import sys

MEGABYTE = 1 << 20
TUNABLES = (
    f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={32 * MEGABYTE}:glibc.malloc.trim_threshold={64 * MEGABYTE}"
)
"""Huge pages (glibc 2.35 and later), and the greatest thresholds that glibc would come to by itself."""


def with_tuned_malloc() -> None:
    """Starts this program again, on Linux, with huge pages and heaps that keep their ends, unless GLIBC_TUNABLES is set.

    XLA's CPU backend asks for the temporary memory of every call anew, whose first touch, 4 kB at a time, costs a tenth and more of
    a training step. Its threads also ask for scratch of some 10 MB in every large product, which with glibc's own settings goes
    back to the system after each: another 2 to 4 % with rows of 4096 tokens. A thread keeps at most 64 MB. glibc reads these settings
    only when a process starts; other C libraries ignore them. `GLIBC_TUNABLES= python ...` goes without.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, sys.orig_argv)
