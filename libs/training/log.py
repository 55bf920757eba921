"""What the log says: one line per event, from the main process."""

import logging
import platform
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import accelerate
import diffusers
import torch
import transformers
from accelerate.utils import DistributedType
from torch._dynamo.utils import counters

from common.errors import InputError, first_line
from common.files import write_json
from common.run_files import CONFIG_FILE, read_starts
from libs.training.config import settings_with

log = logging.getLogger("diffueraser")


@contextmanager
def log_on_main_process(accelerator):
    """Plain lines on stdout, one process's only."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)


def log_start(config, stage, accelerator, checks, found):
    """Everything that tells one run from another, in the log and, run by run, in <output_dir>/config.json."""
    if accelerator.is_local_main_process and not accelerator.is_main_process:
        print(f"  stage {stage.number} on this machine too: the first machine's log is the run's", flush=True)
    versions = {
        "python": platform.python_version(),
        **{library.__name__: library.__version__ for library in (torch, diffusers, accelerate, transformers)},
    }
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type
    engine = "" if accelerator.distributed_type == DistributedType.NO else f" ({accelerator.distributed_type.value})"
    log.info("stage %d on %s, %d process(es)%s, mixed precision %s, seed %d", stage.number, device,
             accelerator.num_processes, engine, accelerator.mixed_precision, config.seed)  # fmt: skip
    log.info("versions: %s", ", ".join(f"{name} {version}" for name, version in versions.items()))
    for name, _, words in checks.rows[1:]:
        log.info("%s: %s", name, words)
    for name, weights in found.opened.items():
        if weights is None:
            log.info("%s: a copy of the UNet with a zero-initialised output", name)
        else:
            log.info("%s: %s from a %s in %s", name, weights.cls.__name__, weights.source_class, weights.folder)
    for line in found.notes:
        log.info("%s", line)
    if accelerator.is_main_process:
        runs = read_starts(config.output_dir)
        card = list(settings_with("on_card"))  # what the converters, which know no settings, say in the model card
        runs.append({"command": sys.argv, "settings": vars(config), "model_card": card, "versions": versions})
        write_json(Path(config.output_dir, CONFIG_FILE), runs)


def log_parameters(model, checkpoints_total_limit):
    """Total, trained and frozen parameters of each model."""
    for name in ("unet_main", "brushnet"):
        parameters = list(getattr(model, name).parameters())
        total = sum(parameter.numel() for parameter in parameters) / 1e6
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad) / 1e6
        log.info("%s: %.1f M parameters, %.1f M trained, %.1f M frozen", name, total, trained, total - trained)
    kept = "all are kept" if checkpoints_total_limit is None else f"the newest {checkpoints_total_limit} are kept"
    log.info("checkpoints: %s", kept)


def log_compiling(state, interval=20):
    """Say that the first step compiles and, every `interval` seconds, how far it is, until `state`, a TrainerState,
    counts that step as done. Returns the thread that does so."""
    log.info("compiling in the first step: half a minute in later starts, else minutes (COMPILE=0 turns it off)")

    def count():
        return sum(counters["inductor"][f"fxgraph_cache_{how}"] for how in ("hit", "miss", "bypass"))

    def watch():
        begin, earlier, step = time.perf_counter(), count(), state.global_step
        while True:
            time.sleep(interval)
            pieces = count() - earlier
            if state.global_step > step:
                return
            if pieces:
                log.info("compiling: %d pieces after %.0f s", pieces, time.perf_counter() - begin)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def start_trackers(accelerator, config):
    """Those of --report_to. Raises InputError where one does not start, such as W&B's without a login."""
    if config.report_to == "none":
        return
    # Trackers take numbers and strings only.
    settings = {
        name: value if isinstance(value, (int, float, str, bool)) else str(value)
        for name, value in vars(config).items()
    }
    try:
        accelerator.init_trackers(config.tracker_project_name, config=settings)
    except Exception as error:  # those of trackers have no class in common
        raise InputError(
            f"--report_to={config.report_to} did not start ({first_line(error)}): log in, or use "
            "--report_to=tensorboard"
        ) from None


def to_trackers(accelerator, send):
    """Call `send` with every tracker. One that fails costs its curves, not the run: TensorBoard's writer ends with its
    first error, such as of a full disk, and raises that ever after."""
    for tracker in list(accelerator.trackers):
        try:
            send(tracker)
        except Exception as error:  # as above
            accelerator.trackers.remove(tracker)
            log.error("%s gets no more values in this start, training goes on: %s", tracker.name, first_line(error))
