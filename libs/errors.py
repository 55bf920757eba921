"""Errors that a user can mend."""

import os
import sys
from functools import wraps

from accelerate.state import PartialState


class InputError(ValueError):
    """A wrong input: one line that says what was found, what was needed, and which flag or file mends it."""


def one_line_errors(main):
    """Let `main` end with exit status 1 and one line on stderr where an input is wrong, without a traceback."""

    @wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except InputError as error:
            # A loader worker's error arrives with its traceback as text; its last line is the error.
            line = str(error).strip().splitlines()[-1].removeprefix("libs.errors.InputError: ")
            rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
            # Before training all processes find the same: one on every machine says so, as each has its own log.
            if local_rank == 0 or PartialState._shared_state:
                who = f"error in process {rank}" if rank else "error"
                print(f"{who}: {line}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None

    return wrapped
