"""What a user can mend, said in one sentence."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a config, a file or the machine's set-up, worded for the person who can mend it.

    The message is one sentence that names the key, file or value and says what to do; `main.py` prints it without a
    traceback and exits with status 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known name closest to `name`, or the empty string when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a `name` that is not among the `known` names of its `kind` (a key of the config)."""
    known, name = sorted(known), name if len(name) <= 60 else f"{name[:57]}..."
    return UserError(f"{kind}: '{name}' is not known; choose one of {', '.join(known)}.{nearest(name, known)}")
