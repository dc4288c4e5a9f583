"""What a user can mend, said in one sentence, and how a command ends with it."""

import difflib
import io
import os
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A mistake in a config, a file or the machine's set-up, worded for the person who can mend it.

    The message is one sentence that names the key, file or value and says what to do; `main.py` prints it without a
    traceback and exits with status 2.
    """


def sentence_of(error: UserError | OSError) -> str | None:
    """What to say of a mistake, or of what the operating system has against a path; None where it names no path."""
    if isinstance(error, UserError):
        return str(error)
    if error.filename is None or error.strerror is None:
        return None
    name = str(error.filename)
    shown = name if len(name) <= 120 else f"{name[:117]}..."
    return f"'{shown}': {error.strerror[:1].lower()}{error.strerror[1:]}; check the path and who may use it."


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known name closest to `name`, or the empty string when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a `name` that is not among the `known` names of its `kind` (a key of the config)."""
    known, name = sorted(known), name if len(name) <= 60 else f"{name[:57]}..."
    return UserError(f"{kind}: '{name}' is not known; choose one of {', '.join(known)}.{nearest(name, known)}")


def status_of(work: Callable[[], None]) -> int:
    """Does the work of a command; returns its exit status: 0, 2 for bad input, which is one line on stderr, 130 when
    interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the sign ± shows a question mark
    try:
        work()
    except BrokenPipeError:  # the reader of `| head` has gone; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        if (sentence := sentence_of(error)) is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
