"""How a command of this room ends."""

import os
import sys
from collections.abc import Callable

from utils.errors import UserError


def status_of(work: Callable[[], None]) -> int:
    """Does the work of a command; returns its exit status: 0, 2 for bad input, which is one line on stderr, 130 when
    interrupted."""
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of `| head` has gone; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0
