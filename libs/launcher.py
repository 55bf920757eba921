"""`accelerate launch` for the shell scripts: one line about a failure, where the trainers have not said it already.

torchrun's own report is a traceback of the launcher, longer than the trainer's error and after it.
"""

import logging
import signal
import sys

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError


def main(argv=None):
    logging.disable()  # the launchers' only, which also complain when the first machine ends before they do
    try:
        launch_command(launch_command_parser().parse_args(argv))
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode < 0:
            name = signal.Signals(-first.exitcode).name
            cause = "out of memory, or killed by hand" if name == "SIGKILL" else "see the lines above"
            fail(f"process {rank} was ended by {name} ({cause}): run the same command to resume")
        raise SystemExit(1) from None
    except (ConnectionError, DistError, RendezvousError) as error:
        reason = str(error).strip().splitlines()[0]
        fail(f"the machines did not find each other ({reason}): check MAIN_ADDRESS, MAIN_PORT and that all are started")


def fail(line):
    print(f"error: {line}", file=sys.stderr, flush=True)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
