"""Errors that a user can mend."""

import errno
import os
import re
import select
import signal
import sys
from functools import wraps

import torch
from accelerate.state import PartialState

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, of a user's share of it, of a file


class InputError(ValueError):
    """A wrong input: one line that says what was found, what was needed, and which flag or file mends it."""


def one_line_errors(main):
    """Let `main` end with exit status 1 and one line on stderr where an input is wrong, without a traceback; and with
    none, as other commands do, where whoever reads stdout has ended."""

    @wraps(main)
    def wrapped(*args, **kwargs):
        for stream in (sys.stdout, sys.stderr):  # names of files may be no UTF-8
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(*args, **kwargs)
        except (InputError, torch.OutOfMemoryError, MemoryError, OSError, UnicodeError) as error:
            if isinstance(error, BrokenPipeError) and stdout_is_closed():
                raise SystemExit(128 + signal.SIGPIPE) from None
            rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
            # Before training all processes find the same: one on every machine says so, as each has its own log.
            if local_rank == 0 or PartialState._shared_state:
                who = f"error in process {rank}" if rank else "error"
                print(f"{who}: {one_line(error)}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None
        finally:
            drop_unread_output()

    return wrapped


def stdout_is_closed():
    """Whether whoever read it has ended, such as `head`: other pipes break too, a tracker's for one."""
    poller = select.poll()
    poller.register(sys.stdout, 0)
    return bool(poller.poll(0))


def drop_unread_output():
    """What is left for a closed stdout, which the interpreter would complain of as it ends."""
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:  # such as a full disk: there its complaint is in place
        pass


def one_line(error):
    """What a user needs of an InputError, of memory that is full, and of files and names that the system or a library
    refuses where no check foresaw it."""
    if isinstance(error, InputError):
        # A loader worker's error arrives with its traceback as text, which ends with the error.
        return escape_lines(str(error).strip().rpartition("\ncommon.errors.InputError: ")[-1])
    if isinstance(error, MemoryError):
        return f"this machine's memory is full ({first_line(error)}): use a shorter or smaller clip, or --resolution"
    if isinstance(error, OSError):
        remedy = ": free some space, or write to another disk" if error.errno in FULL else ""
        found = f"{escape_lines(str(error.filename))}: {error.strerror}" if error.filename else first_line(error)
        return found + remedy
    if isinstance(error, UnicodeError):
        return f"a name or text that is no UTF-8 cannot be used here ({error}): rename it"
    found = ". ".join(str(error).split(". ")[:3])  # what failed, how much was asked for, how much the GPU has
    return (
        f"{found}: use fewer frames at once (--nframes), smaller ones (--resolution, --size) or, to train, "
        "LOW_MEMORY=1 or 2 in another output folder"
    )


def escape_lines(text):
    """On one line: names of files may have line breaks."""
    return "\\n".join(text.splitlines())


def first_line(error):
    """Of an error's message, for the log. A loader worker's arrives with its traceback as text: its last line is the
    error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if re.match("Caught .* in DataLoader worker", lines[0]) else 0]


def and_more(names):
    """What an error says behind the first of several."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
