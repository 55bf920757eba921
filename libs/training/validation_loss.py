"""The validation loss: training's own loss on fixed clips of the validation videos (the log's "held-out loss").

Crops, masks, timesteps and noises are fixed, so that it compares from step to step; nothing of it is trained on.
"""

from copy import copy
from pathlib import Path

import cv2
import numpy as np
import torch
from accelerate.utils import gather_object

from common.errors import first_line
from common.run_files import HELD_OUT_FILE, append_row
from dataset.folders import scan_video
from dataset.loader import TrainingClips
from libs.training.log import log
from libs.training.loss import inpainting_loss

FIXED_EPOCH = 2**31  # an epoch that no run reaches: the fixed clips' crops and masks are not trained on
# What may go wrong: CUDA's out of memory is a RuntimeError, an InputError a ValueError.
FAILURES = (RuntimeError, OSError, ValueError, cv2.error)


class ValidationLoss:
    """Processes share the clips; all of them have to make every call.

    Args:
        dataset: the FinetuneDataset that is trained on, whose crops and masks the fixed clips have.
        base: LoadedBase.
    """

    def __init__(self, config, accelerator, dataset, base):
        self.accelerator, self.base = accelerator, base
        self.file = Path(config.output_dir, config.logging_dir, HELD_OUT_FILE)
        videos = [scan_video(Path(folder)) for folder in config.validation_image] if config.validation_steps else []
        self.dataset = copy(dataset)  # its crops and masks, of other videos, and no pairs
        self.dataset.videos = [video for video in videos if len(video.frames) >= config.nframes]
        self.dataset.pairs = []
        self.clips = config.probe_clips if self.dataset.videos else 0
        self.step = self.value = None  # where it was measured last, and what was found

    def start(self, model, state):
        """Measure it before the first step: later ones are compared with that."""
        step = state.global_step
        if not self.clips or state.probe_start is not None:
            return
        if step and self.accelerator.is_main_process:  # the losses so far are of other clips
            attempt(step, self.accelerator.device, set_aside, self.file, step)
        state.probe_start, _ = self.measure(model, step)
        if state.probe_start is not None:
            log.info("held-out loss %.4f at step %d, on %d fixed clips of %d video(s)", state.probe_start, step,
                     self.clips, len(self.dataset.videos))  # fmt: skip

    def at(self, model, state):
        """Its value at the current step, measured unless it was just now; None: there is none."""
        if self.clips and self.step != state.global_step:
            self.report(model, state)
        return self.value

    def report(self, model, state):
        """Measure and log it: {video's folder: loss}."""
        step = state.global_step
        loss, by_video = self.measure(model, step) if self.clips else (None, {})
        if loss is not None:
            share = f", {loss / state.probe_start:.3f} of its start" if state.probe_start else ""
            log.info("held-out loss %.4f at step %d%s", loss, step, share)
            self.accelerator.log({"held_out_loss": loss}, step=step)
        return by_video

    @torch.compiler.set_stance("force_eager")  # used too rarely to compile variants of the models for it
    @torch.no_grad()
    def measure(self, model, step):
        """Its mean and {video's folder: mean}, or None and {} where it could not be measured.

        Timesteps are spread evenly over the clips.
        """
        n, videos, device = self.clips, self.dataset.videos, self.accelerator.device
        total = self.base.noise_scheduler.config.num_train_timesteps

        def measure_clip(i):
            batch = TrainingClips(self.dataset).collate([self.dataset.clip(i % len(videos), FIXED_EPOCH + i)])
            timesteps = torch.tensor([(2 * i + 1) * total // (2 * n)], device=device)
            return inpainting_loss(model, self.base, batch, timesteps).item()

        model.eval()
        # Clip by clip and averaged in one order: any number of processes finds the same bits.
        losses = spread(self.accelerator, n, lambda i: attempt(step, device, measure_clip, i))
        self.step, self.value = step, None
        if None in losses.values():
            return None, {}
        by_video = {
            video.folder: float(np.mean([losses[i] for i in range(k, n, len(videos))]))
            for k, video in enumerate(videos[:n])
        }
        self.value = float(np.mean([losses[i] for i in range(n)]))
        if self.accelerator.is_main_process:
            attempt(step, device, append_row, self.file, {"step": step, "held_out_loss": self.value})
        return self.value, by_video


def set_aside(path, step):
    """Rename held_out.csv to held_out-until-<step>.csv, so that one file holds what can be compared."""
    if path.is_file():
        path.replace(path.with_stem(f"{path.stem}-until-{step}"))


def spread(accelerator, count, function, too_late=None):
    """{i: function(i)} for i below `count`, spread over the processes, as many calls in each of them.

    Args:
        too_late: asked before every call; once it is true in any process, none begins any more.
    """
    results, processes = {}, accelerator.num_processes
    for first in range(0, count, processes):
        if too_late is not None and any(gather_object([too_late()])):
            break
        i = (first + accelerator.process_index) % count
        results[i] = function(i)
    return dict(gather_object(list(results.items())))


def attempt(step, device, function, *args):
    """What `function` returns; None and a line in the log where it fails: validation must not cost the run."""
    try:
        return function(*args)
    except FAILURES as error:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # so that training does not meet the fragments of what did not fit
        log.error("validation at step %d failed, training goes on: %s", step, first_line(error))
        return None
