"""Stopping on a signal: finish the step, save, say how to go on."""

import os
import signal
import time

from torch._inductor.async_compile import AsyncCompile

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # USR1: what SLURM sends before a job's time runs out
SAME_REQUEST = 1.0  # seconds: launchers pass a signal on that the shell has sent to everyone already


class StopRequest:
    """Remembers the first signal; a second one stops at once, as if there were no handler."""

    def __init__(self):
        self.signal, self.time, self.pid = None, 0.0, os.getpid()
        self.previous = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGALRM)}
        self.take_signals()

    def take_signals(self, *_):
        for number in STOP_SIGNALS:
            signal.signal(number, self.handle)

    def hold_signals(self):
        """Take them again every second: LLVM, which Triton compiles with, puts a handler in USR1's place that drops it,
        when it is first used (InfoSigs in its lib/Support/Unix/Signals.inc)."""
        signal.signal(signal.SIGALRM, self.take_signals)
        signal.siginterrupt(signal.SIGALRM, False)
        signal.setitimer(signal.ITIMER_REAL, 1, 1)

    def handle(self, number, frame):
        if os.getpid() != self.pid:  # a loader worker: a job's SIGTERM goes to all, the trainer's own comes next
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
            return
        if self.signal is None:
            self.signal, self.time = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self.time > SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(self.pid, number)

    def restore(self):
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def start_compilers():
    """Start the processes that torch compiles in, so that they ignore USR1: it is sent to all processes of a job, would
    end these, and torch waits for them without an end."""
    handler = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    AsyncCompile.warm_pool()
    signal.signal(signal.SIGUSR1, handler)
