"""What the log says: one line per event, from the main process."""

import importlib.util
import json
import logging
import math
import platform
import resource
import sys
import time
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import accelerate
import diffusers
import torch
import transformers
from accelerate.utils import DistributedType

from common.errors import InputError, first_line
from common.files import write_json
from common.run_files import HISTORY_FILE, append_row
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


def log_start(args, stage, accelerator, checks, opened):
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
             accelerator.num_processes, engine, accelerator.mixed_precision, args.seed)  # fmt: skip
    log.info("versions: %s", ", ".join(f"{name} {version}" for name, version in versions.items()))
    for name, _, found in checks.rows[1:]:
        log.info("%s: %s", name, found)
    for name, weights in opened.items():
        if weights is None:
            log.info("%s: a copy of the UNet with a zero-initialised output", name)
        else:
            log.info("%s: %s from a %s in %s", name, weights.cls.__name__, weights.source_class, weights.folder)
    if accelerator.is_main_process:
        path = Path(args.output_dir, "config.json")
        runs = json.loads(path.read_text()) if path.is_file() else []
        card = list(settings_with("on_card"))  # what the converters, which know no settings, say in the model card
        runs.append({"command": sys.argv, "settings": vars(args), "model_card": card, "versions": versions})
        write_json(path, runs)


def log_parameters(model, checkpoints_total_limit):
    """Total, trained and frozen parameters of each model."""
    for name in ("unet_main", "brushnet"):
        parameters = list(getattr(model, name).parameters())
        total = sum(parameter.numel() for parameter in parameters) / 1e6
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad) / 1e6
        log.info("%s: %.1f M parameters, %.1f M trained, %.1f M frozen", name, total, trained, total - trained)
    kept = "all are kept" if checkpoints_total_limit is None else f"the newest {checkpoints_total_limit} are kept"
    log.info("checkpoints: %s", kept)


def start_trackers(accelerator, args):
    """Those of --report_to. Raises InputError where one does not start, such as W&B's without a login."""
    if args.report_to == "none":
        return
    failures = (OSError, RuntimeError, ValueError)
    if args.report_to in ("wandb", "all") and importlib.util.find_spec("wandb"):
        from wandb.errors import Error  # no requirement of the project

        failures += (Error,)
    # Trackers take numbers and strings only.
    settings = {
        name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in vars(args).items()
    }
    try:
        accelerator.init_trackers(args.tracker_project_name, config=settings)
    except failures as error:
        raise InputError(
            f"--report_to={args.report_to} did not start ({first_line(error)}): log in, or use --report_to=tensorboard"
        ) from None


class Meter:
    """Sums up steps for a line of the log; the loss stays on its device until then."""

    def __init__(self, accelerator, max_train_steps):
        self.accelerator, self.max_train_steps = accelerator, max_train_steps
        self.losses, self.clips = [], []  # since the last line
        self.earlier_bad = (0, None)  # the streak of bad losses that the last line ended with
        self.restart()

    def restart(self):
        """Start timing anew, so that a validation does not count as steps."""
        self.start, self.steps = time.perf_counter(), 0

    def add(self, loss, grad_norm, step, videos):
        self.losses.append(loss)
        self.clips.append((step, videos))
        self.grad_norm = grad_norm

    def bad_streak(self):
        """(number of the latest losses in a row that are not finite, (step, videos) of the first of them)."""
        values = torch.stack(self.losses).tolist() if self.losses else []
        bad = len(list(takewhile(lambda value: not math.isfinite(value), reversed(values))))
        if bad < len(values):
            return bad, self.clips[-bad] if bad else None
        earlier, first = self.earlier_bad
        return earlier + bad, first or (self.clips[0] if bad else None)

    def report(self, step, lr):
        """Log a line for the steps since the last one."""
        loss = self.accelerator.reduce(torch.stack(self.losses).mean(), "mean").item()
        grad_norm = float(self.grad_norm)
        self.earlier_bad = self.bad_streak()
        self.losses.clear()
        self.clips.clear()
        seconds = (time.perf_counter() - self.start) / max(1, self.steps)
        memory = peak_memory(self.accelerator.device)
        left = time.strftime("%H:%M:%S", time.gmtime(seconds * (self.max_train_steps - step) % 86400))
        days = int(seconds * (self.max_train_steps - step) // 86400)
        log.info(
            "step %d/%d  loss %.4f  lr %.3g  grad norm %.3f  %.2f s/step  peak %.1f GiB  left %s%s",
            step, self.max_train_steps, loss, lr, grad_norm, seconds, memory, f"{days}d " if days else "", left,
        )  # fmt: skip
        values = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "seconds_per_step": seconds, "peak_gib": memory}
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            try:
                append_row(Path(self.accelerator.logging_dir, HISTORY_FILE), {"step": step, **values})
            except OSError as error:
                log.info("%s could not be written (%s): the report page will lack this step", HISTORY_FILE, error)
        self.restart()


def peak_memory(device):
    """GiB: the most the GPU allocator held, or the process's resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
