"""Stopping early: a signal, or a file named "stop" in the output folder, asks a run to finish its step and save."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

STOP_FILE = "stop"  # holds the name of the signal that the launcher got; `touch` makes one too
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST = 1.0  # seconds: torch's launchers pass a signal on that the shell has sent to everyone already


class StopRequest:
    """Context in which signals ask to stop; a second one ends the process at once, as if there were no handler.

    Attributes:
        signal: what asked, in words, such as "SIGTERM"; None while nothing did.
    """

    def __init__(self, output_dir):
        self.file, self.pid = Path(output_dir, STOP_FILE), os.getpid()
        self.received = self.signalled_at = None
        self.previous = {}

    def __enter__(self):
        self.remove_file()  # of an earlier run
        self.previous = {number: signal.signal(number, self.handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.remove_file()

    def remove_file(self):
        if int(os.environ.get("RANK", 0)) == 0:  # the machines of a run share its folder
            self.file.unlink(missing_ok=True)

    @property
    def signal(self):
        if self.received is None:
            with suppress(OSError):  # not there, or network storage stumbled: the next step asks again
                self.received = self.file.read_text().strip() or f"the file {self.file}"
        return self.received

    def handle(self, number, frame):
        if os.getpid() != self.pid:  # a loader worker: a job's SIGTERM goes to all, the trainer's own comes next
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
        elif self.signalled_at is None:
            self.received, self.signalled_at = self.received or signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self.signalled_at > SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(self.pid, number)
