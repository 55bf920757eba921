"""Start one stage: `python -m launch.launch STAGE [the trainer's flags]`, which finetune_stage1.sh and _stage2.sh run.

The trainer's flags come from environment variables (docs/settings.md), the processes from accelerate's configuration.
What the trainers print is the log; the terminal gets one line at the start and the end of the log after a failure.
"""

import fcntl
import logging
import math
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from common.command_line import Parser, require, variable
from common.errors import InputError, first_line, one_line_errors
from common.files import written_whole
from common.hardware import compiling_lacks, gpu_is_used
from common.run_files import read_starts
from dataset.folders import read_validation_names
from libs.training.config import flags_from_environment, switches, variables_that_look_misspelt
from libs.training.stopping import STOP_FILE

CONFIGS = Path("configs/accelerate")
FORMS = {  # of variables: what they must match, in words
    **dict.fromkeys(("NUM_PROCESSES", "NUM_MACHINES", "OMP_NUM_THREADS"), ("[1-9][0-9]*", "a number above 0")),
    "MACHINE_RANK": ("[0-9]+", "a number from 0 on"),
    **dict.fromkeys(switches(), ("[01]", "0 or 1")),
    "LOW_MEMORY": ("[012]", "0, 1 or 2"),
    "MIXED_PRECISION": ("no|fp16|bf16", "no (fp32), fp16 or bf16"),
}
CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE")  # signals of a fault in the process itself
LINES_SHOWN = 15  # of a failed run's log


# NVML is asked whether there are GPUs. CUDA itself, where the driver is too old for it, says that there are none, and
# the run would go on without them.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


@one_line_errors
def main(argv=None):
    stage, *extra = (sys.argv[1:] if argv is None else argv) or [""]
    require(stage in ("1", "2"), f"{stage or 'nothing'} is no stage: 1 or 2 was needed")
    given = read_flags(extra)
    check_variables()
    warnings = [f"warning: {line}" for line in variables_that_look_misspelt(int(stage), os.environ)]
    for line in warnings:
        print(line, file=sys.stderr, flush=True)
    engine = choose_engine(read_engine_config())
    flags, note = trainer_flags(int(stage), engine, given)
    arguments = [*engine.arguments, f"train_DiffuEraser_stage{stage}.py", *flags, *extra]
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch warns of hosts without a reverse name, for one
    if given.check_only or given.help:
        run_accelerate(arguments)
        return
    output_dir = given.output_dir or variable("OUTPUT_DIR", f"finetune-stage{stage}")
    log = Log(variable("LOG", f"finetune-stage{stage}{f'-machine{engine.rank}' if engine.rank else ''}.log"))
    if log.is_shared():
        warnings.append(f"warning: another run is writing to {log.path} too; LOG= names another log")
        print(warnings[-1], file=sys.stderr, flush=True)
    log.write(
        f"===== {time.strftime('%Y-%m-%d %H:%M:%S')} stage {stage}",
        f"command: {shlex.join(['accelerate', 'launch', *arguments])}",
        *warnings,
        *([note] if note else []),
    )
    follow = shlex.join(["tail", "-f", str(log.path)])
    words = f"stage {stage}: training, log in {log.path} ({follow}), checkpoints in {output_dir}/"
    print(f"{words}; {note}" if note else words, flush=True)
    trainers = Trainers(arguments, log, Path(output_dir))
    status = trainers.run()
    if trainers.stopped_early:
        print("stopped before training began: there was nothing to save")
        status = 128 + trainers.stopped_early
    elif status:
        words = f"stage {stage} failed with status {status}; the end of {log.path}:"
        print(words, *log.end(), sep="\n", file=sys.stderr)
    raise SystemExit(status)


def check_variables():
    """Raises InputError for a value that accelerate would answer with its usage, or take for something else; and for
    RECIPE, as the only recipe, the default, would be trained without a word."""
    for name, (form, words) in FORMS.items():
        value = variable(name)
        require(value is None or re.fullmatch(form, value), f"{name}={value}: {words} was needed")
    recipe = variable("RECIPE")
    require(
        recipe is None,
        f"RECIPE={recipe}: there is one recipe, the default, and no part beside it was shown to help "
        "(docs/training.md, Recipes); unset RECIPE, or choose parts by MASK_MIX, PASTE, PAIRED_ROOT, LOSS_WEIGHTS, "
        "EMA_DECAY",
    )


def read_flags(extra):
    """Those of the trainer's flags that concern the launcher too."""
    parser = Parser(add_help=False)
    parser.add_argument("--output_dir")
    parser.add_argument("--davis_root")
    parser.add_argument("--validation_image")
    parser.add_argument("--gradient_accumulation_steps")
    parser.add_argument("--check_only", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    return parser.parse_known_args(extra)[0]


# --- Processes: how many, where, and what they run on -----------------------------------------------------------------


@dataclass
class Engine:
    """What accelerate is told, and what follows from it."""

    arguments: list[str]  # of `accelerate launch`
    rank: int  # of this machine
    processes: int  # of all machines
    machines: int
    gpus: int  # of this machine that may be used
    compiles: bool  # whether these have all that torch.compile needs
    sharded: bool  # FSDP


def read_engine_config():
    """The user's own accelerate configuration, or one that says nothing. Raises InputError where it cannot be used."""
    path = variable("ACCELERATE_CONFIG")
    if path is None:
        return ClusterConfig("LOCAL_MACHINE", "NO", mixed_precision=None, use_cpu=False, debug=False)
    ours = " ".join(map(str, sorted(CONFIGS.glob("*.yaml"))))
    require(Path(path).is_file(), f"{path} is no file: ACCELERATE_CONFIG must be one of {ours}")
    read = ClusterConfig.from_json_file if path.endswith(".json") else ClusterConfig.from_yaml_file
    try:
        config = read(path)
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:  # TypeError: an empty file
        reason = " ".join(str(error).split())
        raise InputError(
            f"ACCELERATE_CONFIG={path} cannot be used ({reason}): make it anew with `accelerate config`, or use one of "
            f"{ours}"
        ) from None
    for name in ("num_processes", "num_machines", "machine_rank", "main_process_port"):
        value = getattr(config, name)
        if value is not None:
            require(re.fullmatch("-?[0-9]+", str(value)), f"{path} has {name}: {value}: a number was needed")
            setattr(config, name, int(value))
    precision = config.mixed_precision
    needed = "no, fp16 or bf16 was needed"
    require(precision in (None, False, "no", "fp16", "bf16"), f"{path} has mixed_precision: {precision}: {needed}")
    require(
        config.distributed_type != "DEEPSPEED",
        f"{path} asks for DeepSpeed, which is not supported: FSDP2 shards the same state with ACCELERATE_CONFIG="
        f"{CONFIGS}/fsdp.yaml",
    )
    return config


def ask_cuda():
    """(number of GPUs, whether torch.compile works on them). Raises InputError where there are some and CUDA fails."""
    try:
        compiles = compiling_lacks() is None
        return torch.cuda.device_count() if gpu_is_used() else 0, compiles
    except RuntimeError as error:
        raise InputError(
            f"CUDA does not work here ({first_line(error)}): mend it, or CUDA_VISIBLE_DEVICES= goes without GPUs"
        ) from None


def in_another_process(function):
    """What `function` returns. A process that has asked CUDA leaves a CUDA that does not work to those it forks later,
    as Trainers does; NVML, which torch asks instead, is not everywhere and knows no parts of GPUs (MIG)."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(function).result()
        except BrokenExecutor:
            raise InputError(
                "CUDA ended the process that asked it for GPUs: mend it, or CUDA_VISIBLE_DEVICES= goes without GPUs"
            ) from None


def choose_engine(config):
    """Variables come before the user's own configuration, and that before the defaults: one process, or all GPUs where
    a configuration was chosen that leaves their number open."""
    own = variable("ACCELERATE_CONFIG")
    gpus, compiles = (0, False) if config.use_cpu else in_another_process(ask_cuda)
    machines = int(variable("NUM_MACHINES", config.num_machines))
    if variable("NUM_PROCESSES") or config.num_processes < 1:
        processes = machines * int(variable("NUM_PROCESSES", max(1, gpus) if own else 1))
    else:
        processes = config.num_processes
    here = math.ceil(processes / max(1, machines))
    require(
        not gpus or here <= gpus,
        f"{here} processes on this machine need as many GPUs, and {gpus} were found: lower NUM_PROCESSES, or "
        "num_processes of ACCELERATE_CONFIG (CUDA_VISIBLE_DEVICES chooses GPUs)",
    )
    alone = not own and processes == 1 and machines == 1
    file = own or CONFIGS / ("one_gpu.yaml" if alone else "multi_gpu.yaml" if machines == 1 else "multi_node.yaml")
    configured = {False: "no"}.get(config.mixed_precision, config.mixed_precision)  # YAML takes a bare `no` for false
    arguments = [
        f"--config_file={file}", f"--num_processes={processes}", f"--num_machines={machines}", "--dynamo_backend=no",
    ]  # fmt: skip
    rank = 0  # a job on one machine of a cluster has a SLURM_NODEID too
    if machines > 1:
        rank = int(variable("MACHINE_RANK") or variable("SLURM_NODEID", config.machine_rank))
        address = variable("MAIN_ADDRESS", config.main_process_ip)
        require(address, f"NUM_MACHINES={machines} needs MAIN_ADDRESS, the first machine's name or address")
        words = f"a number from 0 to {machines - 1} was needed, another on every machine"
        require(rank < machines, f"MACHINE_RANK={rank}: {words}")
        arguments += [f"--machine_rank={rank}", f"--main_process_ip={address}"]
    if not alone:  # port 0: any that is free, so that two runs may share a machine
        port = variable("MAIN_PORT", config.main_process_port)
        arguments.append(f"--main_process_port={port or (0 if machines == 1 else 29500)}")
    if not gpus:
        threads = math.ceil(len(os.sched_getaffinity(0)) / max(1, processes // machines))
        arguments += ["--cpu"] * alone + [f"--num_cpu_threads_per_process={variable('OMP_NUM_THREADS', threads)}"]
    usual = "bf16" if variable("LOW_MEMORY") == "2" else "fp16" if gpus else "no"
    precision = variable("MIXED_PRECISION", configured or usual)
    arguments.append(f"--mixed_precision={precision}")
    sharded = config.distributed_type == "FSDP"
    if gpus:  # else the allocator's memory has holes that nothing fits: a step in one CUDA graph needs 8 GiB more, and
        # FSDP ran out of 80 GB with 25 GiB in use.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", variable("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"))
    return Engine(arguments, rank, processes, machines, gpus, compiles, sharded)


# --- The trainer's flags ----------------------------------------------------------------------------------------------


def trainer_flags(stage, engine, given):
    """(flags, a note for the user or None)."""
    flags = flags_from_environment(stage, os.environ)
    fastest = engine.gpus and not engine.sharded and variable("LOW_MEMORY", "0") == "0"
    compiles = variable("COMPILE", "1" if fastest and engine.compiles else "0") == "1"
    if compiles:
        flags.append("--compile")
    accumulates = (given.gradient_accumulation_steps or variable("GRADIENT_ACCUMULATION_STEPS", "1")) != "1"
    one_graph = engine.processes == 1 or (engine.machines == 1 and not accumulates)
    if variable("CUDA_GRAPH", "1" if compiles and fastest and one_graph else "0") == "1":
        flags.append("--cuda_graph")
    if given.validation_image is not None:  # DAVIS's masks, which may have the same names, are not these videos'
        return flags, None
    davis = os.environ.get("DAVIS_ROOT", "dataset/DAVIS") if given.davis_root is None else given.davis_root
    videos = find_validation_videos(Path(davis))
    if videos:
        images, masks = zip(*videos, strict=True)
        return [*flags, f"--validation_image={list(images)}", f"--validation_mask={list(masks)}"], None
    return flags, (
        f"validation is off: {davis or 'DAVIS_ROOT, which is empty,'} has no ImageSets/2017/val.txt that names videos "
        "with Annotations/480p/; add them, or pass --validation_image and --validation_mask"
    )


def find_validation_videos(davis):
    """[(folder of frames, folder of masks)] of the first two held-out DAVIS videos that have both."""
    names = read_validation_names(davis)
    pairs = [(davis / "JPEGImages/480p" / name, davis / "Annotations/480p" / name) for name in names]
    return [(str(frames), str(masks)) for frames, masks in pairs if frames.is_dir() and masks.is_dir()][:2]


# --- Running ----------------------------------------------------------------------------------------------------------


class Log:
    """The file that a run's output is added to. Raises InputError where it cannot be written to."""

    def __init__(self, path):
        self.path = Path(path)
        with self.refusing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                self.start = file.tell()  # of this run's lines

    def is_shared(self):
        """Whether another run, of this machine at least, is writing to it. A lock tells, which is held until this
        process, and the one that is forked for the trainers, have ended."""
        self.descriptor = os.open(self.path, os.O_WRONLY)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return self.path.is_file()  # and no /dev/null
        except OSError:  # a file system without locks
            pass
        return False

    def write(self, *lines):
        with self.refusing(), open(self.path, "a", errors="backslashreplace") as file:  # names may be no UTF-8
            file.writelines(f"{line}\n" for line in lines)

    @contextmanager
    def refusing(self):
        try:
            yield
        except OSError as error:
            raise InputError(f"LOG={self.path} cannot be written to: choose another ({error.strerror})") from None

    def end(self):
        """This run's last lines, and after them every error; logs may be emptied or moved away while a run goes on."""
        last, errors = deque(maxlen=LINES_SHOWN), []
        with suppress(FileNotFoundError), open(self.path, errors="replace") as file:
            if self.path.stat().st_size >= self.start:
                file.seek(self.start)
            for line in file:
                if not line.startswith(("===== ", "command: ")):  # which the terminal need not be told
                    (errors if line.startswith("error") else last).append(line.rstrip("\n"))
        return [*last, *errors]


class Trainers:
    """The trainers, below a process that runs accelerate's launcher. Signals come to this process: the first asks the
    trainers to save and end, through a file in the output folder, a second one ends all at once.

    No signal is passed on: torch's launchers end at one and leave the trainers alone, the processes that compile die
    of it, and LLVM takes USR1 for itself.
    """

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self, arguments, log, output_dir):
        self.log, self.output_dir, self.stop_file = log, output_dir, output_dir / STOP_FILE
        self.earlier_starts = self.starts()
        # Forked, so that torch and accelerate are imported once.
        self.process = multiprocessing.get_context("fork").Process(target=self.run_in_background, args=(arguments,))
        self.stopped_early = None  # the signal's number, where it came before training
        self.asked = False

    def run(self):
        """Wait for the end; returns the exit status."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever ignores it, and starts us so, leaves no status to read
        taken = [number for number in self.signals if signal.getsignal(number) != signal.SIG_IGN]  # as nohup has it
        for number in taken:  # the new process ignores them from its first moment on
            signal.signal(number, signal.SIG_IGN)
        self.process.start()
        for number in taken:
            signal.signal(number, self.handle)
        self.process.join()
        code = self.process.exitcode
        return code if code >= 0 else 128 - code

    def run_in_background(self, arguments):
        """In a session of its own, where the terminal's Ctrl-C does not come, with the log for a terminal."""
        os.setsid()
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torch's launcher would end the trainers after 30 s
        with open(os.devnull) as nothing, open(self.log.path, "ab") as log:
            os.dup2(nothing.fileno(), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        run_accelerate(arguments)

    def starts(self):
        """How many the run's folder notes; None where it cannot be read, of which the trainer says more."""
        with suppress(OSError):
            return len(read_starts(self.output_dir))

    def handle(self, number, frame):
        if self.asked:
            self.kill()
            return
        self.asked = True
        if self.starts() == self.earlier_starts:  # training has not begun: there is nothing to save
            self.stopped_early = number
            self.kill()
            return
        try:
            with written_whole(self.stop_file) as file:
                file.write_text(signal.Signals(number).name)
            print("stopping: the step is finished and saved (a second signal ends at once)", flush=True)
        except OSError as error:
            print(f"{self.stop_file} cannot be written ({error.strerror}): a second signal ends at once", flush=True)

    def kill(self):
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()


@one_line_errors
def run_accelerate(arguments):
    """`accelerate launch` with one line about a failure, where the trainers have not said it already.

    torchrun's own report is a traceback of the launcher, longer than the trainer's error and after it.
    """
    logging.disable()  # the launcher's only, which also complains when the first machine ends before it does
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        end_as(f"process {rank}", first.exitcode)
    except subprocess.CalledProcessError as error:
        end_as("the trainer", error.returncode)
    except (ConnectionError, DistError, RendezvousError) as error:
        raise InputError(
            f"the machines did not find each other ({first_line(error)}): check MAIN_ADDRESS, MAIN_PORT and that all "
            "are started"
        ) from None


def end_as(who, exitcode):
    """End with a line that names the signal, where one ended a process: the trainers say everything else themselves."""
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        remedy = "(see the lines above): run the same command to resume"
        if name == "SIGKILL":
            remedy = ("(the system killed it, most often for lack of memory: lower DATALOADER_NUM_WORKERS, or give it "
                      "more): run the same command to resume")  # fmt: skip
        elif name in CRASHES:
            remedy = "(a library crashed, and may again): see the lines above, try COMPILE=0, check driver and versions"
        raise InputError(f"{who} was ended by {name} {remedy}")
    raise SystemExit(1) from None


if __name__ == "__main__":
    main()
