"""What is counted from step to step: losses for the log, and broken videos."""

import math
import resource
import time
from itertools import takewhile
from pathlib import Path

import torch

from common.distributed import sum_over_processes
from common.errors import InputError
from common.run_files import HISTORY_FILE, append_row
from libs.training.log import log, to_trackers

MAX_BAD_LOSSES = 5  # in a row, before a run is stopped
MIN_BROKEN = 5  # broken clips met, before their share means anything


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
        """A pass: loss () on the device; the gradients' norm before clipping, or None where they are not complete."""
        # Bad gradients that were used count as a bad loss. fp16's scaler skips them.
        scales = self.accelerator.scaler is not None or self.accelerator.optimizer_step_was_skipped
        if grad_norm is not None and not scales:
            loss = torch.where(torch.isfinite(grad_norm), loss, torch.nan)
        self.losses.append(loss)
        self.clips.append((step, videos))
        self.grad_norm = grad_norm
        self.steps += grad_norm is not None

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
        days, left = divmod(int(seconds * (self.max_train_steps - step)), 86400)
        log.info(
            "step %d/%d  loss %.4f  lr %.3g  grad norm %.3f  %.2f s/step  peak %.1f GiB  left %s%s",
            step, self.max_train_steps, loss, lr, grad_norm, seconds, memory, f"{days}d " if days else "",
            time.strftime("%H:%M:%S", time.gmtime(left)),
        )  # fmt: skip
        values = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "seconds_per_step": seconds, "peak_gib": memory}
        to_trackers(self.accelerator, lambda tracker: tracker.log(values, step=step))
        if self.accelerator.is_main_process:
            try:
                append_row(Path(self.accelerator.logging_dir, HISTORY_FILE), {"step": step, **values})
            except OSError as error:
                log.info("%s could not be written (%s): the report page will lack this step", HISTORY_FILE, error)
        self.restart()

    def refuse_bad_losses(self, last_checkpoint):
        """Raise InputError after MAX_BAD_LOSSES in a row, in all processes together."""
        bad, first = self.earlier_bad
        if sum_over_processes(self.accelerator, bad >= MAX_BAD_LOSSES):
            where = f"step {first[0]} (clip of {', '.join(first[1])})" if first else "a step of another process"
            raise InputError(
                f"the loss is not finite since {where}; the last good checkpoint is {last_checkpoint or 'none'}: lower "
                "--learning_rate, or use --mixed_precision=bf16"
            )


def peak_memory(device):
    """GiB: the most the GPU allocator held, or the process's resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class BrokenVideos:
    """Names every broken video once, and stops the run when too large a share of the clips met came from them."""

    def __init__(self, max_share):
        self.max_share, self.clips_met, self.broken_met, self.named = max_share, 0, 0, set()

    def note(self, batch):
        self.clips_met += len(batch["videos"])
        self.broken_met += len(batch["broken"])
        for line in batch["broken"]:
            video = line.partition(": ")[0]
            if video not in self.named:
                self.named.add(video)
                log.error("left out, another clip in its place: %s", line)  # also where another process met it
        share = self.broken_met / (self.clips_met + self.broken_met)
        if self.broken_met >= MIN_BROKEN and share > self.max_share:
            raise InputError(
                f"{share:.0%} of the clips met came from broken videos ({len(self.named)} named above): mend or "
                "remove them, leave them out with --scan_data, or raise --max_broken_share"
            )
