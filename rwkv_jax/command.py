"""What the commands have in common."""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def errors_in_words(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Ends the program with the message and status 2, and no traceback, for what a user can put right."""
    # As an exception, so that what is half-written is removed.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; nothing was left half-written\n")
    finally:
        signal.signal(signal.SIGTERM, before)
