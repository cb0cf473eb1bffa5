"""Process settings that can only be made before Python starts."""

import os
import sys

HUGE_PAGES = "glibc.malloc.hugetlb=1"


def with_huge_pages() -> None:
    """Starts this program again with huge pages for malloc, on Linux, unless GLIBC_TUNABLES is set.

    XLA's CPU backend allocates the temporary memory of every call anew, and its first touch, 4 kB at a time, costs a tenth and more
    of a training step. glibc reads the setting only when a process starts; other C libraries ignore it.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, sys.orig_argv)
