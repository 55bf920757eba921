"""What the log says: one line per event, from the main process."""

import json
import logging
import platform
import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import accelerate
import diffusers
import torch
import transformers

log = logging.getLogger("diffueraser")

ADAM_BYTES = 12  # per trained parameter in a checkpoint: the weight and Adam's two moments, fp32


@contextmanager
def log_on_main_process(accelerator):
    """Plain lines on stdout, one process's only; a progress bar on a terminal does not break them."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)


def log_start(args, stage, accelerator, dataset, opened):
    """Everything that tells one run from another, in the log and in <output_dir>/config.json."""
    versions = {
        "python": platform.python_version(),
        **{library.__name__: library.__version__ for library in (torch, diffusers, accelerate, transformers)},
    }
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type
    log.info("stage %d on %s, %d process(es), mixed precision %s, seed %d", stage.number, device,
             accelerator.num_processes, accelerator.mixed_precision, args.seed)  # fmt: skip
    log.info("versions: %s", ", ".join(f"{name} {version}" for name, version in versions.items()))
    log.info(
        "data: %d clips an epoch; of the training videos %d are left out as shorter than %d frames, %d as used for "
        "validation", len(dataset), len(dataset.too_short), args.nframes, len(dataset.held_out),
    )  # fmt: skip
    if not args.validation_steps:
        log.info("validation is off (--validation_steps=0)")
    elif not args.validation_image:
        log.info("no validation videos: --validation_image and --validation_mask give them")
    for name, weights in opened.items():
        if weights is None:
            log.info("%s: a copy of the UNet with a zero-initialised output", name)
        else:
            log.info("%s: %s from a %s in %s", name, weights.cls.__name__, weights.source_class, weights.folder)
    if accelerator.is_main_process:
        settings = {"settings": vars(args), "versions": versions, "command": sys.argv}
        Path(args.output_dir, "config.json").write_text(json.dumps(settings, indent=1))


def log_parameters(model, checkpoints_total_limit):
    """Total, trained and frozen parameters of each model, and what a checkpoint of them takes."""
    all_trained = 0
    for name in ("unet_main", "brushnet"):
        parameters = list(getattr(model, name).parameters())
        total = sum(parameter.numel() for parameter in parameters)
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        all_trained += trained
        log.info("%s: %.1f M parameters, %.1f M trained, %.1f M frozen", name, total / 1e6, trained / 1e6,
                 (total - trained) / 1e6)  # fmt: skip
    kept = "all are kept" if checkpoints_total_limit is None else f"the newest {checkpoints_total_limit} are kept"
    log.info("a checkpoint takes about %.1f GB; %s", all_trained * ADAM_BYTES / 1e9, kept)


def flat_settings(args):
    """Trackers take numbers and strings only."""
    return {
        name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in vars(args).items()
    }


class Meter:
    """Sums up steps for a line of the log; the loss stays on its device until then."""

    def __init__(self, accelerator, max_train_steps):
        self.accelerator, self.max_train_steps = accelerator, max_train_steps
        self.losses = []
        self.restart()

    def restart(self):
        """Start timing anew, so that a validation does not count as steps."""
        self.start, self.steps = time.perf_counter(), 0

    def add(self, loss, grad_norm):
        self.losses.append(loss)
        self.grad_norm = grad_norm

    def report(self, step, lr):
        """Log a line for the steps since the last one."""
        loss = self.accelerator.reduce(torch.stack(self.losses).mean(), "mean").item()
        grad_norm = float(self.grad_norm)
        self.losses.clear()
        seconds = (time.perf_counter() - self.start) / max(1, self.steps)
        memory = peak_memory(self.accelerator.device)
        left = time.strftime("%H:%M:%S", time.gmtime(seconds * (self.max_train_steps - step) % 86400))
        days = int(seconds * (self.max_train_steps - step) // 86400)
        log.info(
            "step %d/%d  loss %.4f  lr %.3g  grad norm %.3f  %.2f s/step  peak %.1f GiB  left %s%s",
            step, self.max_train_steps, loss, lr, grad_norm, seconds, memory, f"{days}d " if days else "", left,
        )  # fmt: skip
        self.accelerator.log(
            {"loss": loss, "lr": lr, "grad_norm": grad_norm, "seconds_per_step": seconds, "peak_gib": memory}, step=step
        )
        self.restart()


def peak_memory(device):
    """GiB: the most the GPU allocator held, or the process's resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
