"""`accelerate launch` for the shell scripts: one line about a failure, where the trainers have not said it already.

torchrun's own report is a traceback of the launcher, longer than the trainer's error and after it.
"""

import logging
import signal
import subprocess
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
        end_as(f"process {rank}", first.exitcode)
    except subprocess.CalledProcessError as error:
        end_as("the trainer", error.returncode)
    except (ConnectionError, DistError, RendezvousError) as error:
        reason = str(error).strip().splitlines()[0]
        fail(f"the machines did not find each other ({reason}): check MAIN_ADDRESS, MAIN_PORT and that all are started")


def end_as(who, exitcode):
    """End with a line that names the signal, where one ended a process: the trainers say everything else themselves."""
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        cause = "see the lines above"
        if name == "SIGKILL":
            cause = "the system killed it, most often for lack of memory: lower DATALOADER_NUM_WORKERS, or give it more"
        fail(f"{who} was ended by {name} ({cause}): run the same command to resume")
    raise SystemExit(1) from None


def fail(line):
    print(f"error: {line}", file=sys.stderr, flush=True)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
