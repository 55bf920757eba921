"""Errors that a user can mend."""

import os
import sys
from functools import wraps


class InputError(ValueError):
    """A wrong input: one line that says what was found, what was needed, and which flag or file mends it."""


def one_line_errors(main):
    """Let `main` end with exit status 1 and one line on stderr where an input is wrong, without a traceback."""

    @wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except InputError as error:
            if int(os.environ.get("RANK", 0)) == 0:  # every process finds the same: one says so
                print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None

    return wrapped
