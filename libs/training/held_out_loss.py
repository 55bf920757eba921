"""The held-out loss: training's own loss on fixed clips of the validation videos, which are never trained on.

Clips are drawn as in training, then they, timesteps and noises are fixed, so that it compares from step to step; all
errors count alike. It comes with the mean squared error in the holes alone.
"""

from copy import copy
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object

from common.errors import first_line
from common.run_files import HELD_OUT_FILE, append_row
from dataset.folders import scan_video
from dataset.loader import TrainingClips
from libs.training.log import log, to_trackers
from libs.training.loss import encode_batch, predict, weighted_mse

FIXED_EPOCH = 2**31  # an epoch that no run reaches: the fixed clips' crops and masks are not trained on
# What may go wrong: CUDA's out of memory is a RuntimeError, the machine's a MemoryError, an InputError a ValueError.
FAILURES = (RuntimeError, MemoryError, OSError, ValueError, cv2.error)


class HeldOutLoss:
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
        self.dataset.videos = [video for video in videos if len(video.frames) >= dataset.span]
        self.dataset.pairs = []
        self.clips = config.probe_clips if self.dataset.videos else 0

    def start(self, model, state):
        """Measure it before the first step, for later ones to be compared with."""
        step = state.global_step
        if not self.clips or state.probe_start is not None:
            return
        if step and self.accelerator.is_main_process:  # the losses so far are of other clips
            attempt(step, self.accelerator.device, set_aside, self.file, step)
        state.probe_start, in_hole, _ = self.measure(model, step)
        if state.probe_start is not None:
            log.info("held-out loss %.4f at step %d, on %d fixed clips of %d video(s)%s", state.probe_start, step,
                     self.clips, len(self.dataset.videos), hole_words(in_hole))  # fmt: skip

    def report(self, model, state):
        """Measure and log it: (its mean or None, {video's folder: mean})."""
        step = state.global_step
        loss, in_hole, by_video = self.measure(model, step) if self.clips else (None, None, {})
        if loss is not None:
            share = f", {loss / state.probe_start:.3f} of its start" if state.probe_start else ""
            log.info("held-out loss %.4f at step %d%s%s", loss, step, share, hole_words(in_hole))
            scalars = {"held_out_loss": loss, "held_out_loss_hole": in_hole}
            scalars = {name: value for name, value in scalars.items() if value is not None}
            to_trackers(self.accelerator, lambda tracker: tracker.log(scalars, step=step))
        return loss, by_video

    @torch.compiler.set_stance("force_eager")  # used too rarely to compile variants of the models for it
    @torch.no_grad()
    def measure(self, model, step):
        """Its mean, that in the hole, and {video's folder: mean}; None, None and {} where it could not be measured.

        Timesteps are spread evenly over the clips. In the hole: the mean over the clips that have one at the latents'
        size, None where no clip has.
        """
        n, videos, device = self.clips, self.dataset.videos, self.accelerator.device
        total = self.base.noise_scheduler.config.num_train_timesteps

        def measure_clip(i):
            batch = TrainingClips(self.dataset).collate([self.dataset.clip(i % len(videos), FIXED_EPOCH + i)])
            timesteps = torch.tensor([(2 * i + 1) * total // (2 * n)], device=device)
            encoded = encode_batch(self.base, batch, timesteps=timesteps)
            prediction, target = predict(model, self.base.noise_scheduler, encoded)
            hole = (encoded.masks == 0).float()
            in_hole = weighted_mse(prediction, target, hole, clips=1).item() if hole.any() else None
            return F.mse_loss(prediction, target).item(), in_hole

        model.eval()
        # Clip by clip and averaged in one order: any number of processes finds the same bits.
        losses = spread(self.accelerator, n, lambda i: attempt(step, device, measure_clip, i))
        if None in losses.values():
            return None, None, {}
        of_frames, in_holes = zip(*(losses[i] for i in range(n)), strict=True)
        by_video = {video.folder: float(np.mean(of_frames[k :: len(videos)])) for k, video in enumerate(videos[:n])}
        mean, in_holes = float(np.mean(of_frames)), [loss for loss in in_holes if loss is not None]
        in_hole = float(np.mean(in_holes)) if in_holes else None
        if self.accelerator.is_main_process:
            row = {"step": step, "held_out_loss": mean, "held_out_loss_hole": in_hole}
            attempt(step, device, append_row, self.file, row)
        return mean, in_hole, by_video


def hole_words(in_hole):
    return "" if in_hole is None else f", in the hole {in_hole:.4f}"


def set_aside(path, step):
    """Rename held_out.csv to held_out-until-<step>.csv, so that one file holds what can be compared.

    With a number behind it where a run that did not get beyond this step has left such a file.
    """
    if path.is_file():
        names = (f"{path.stem}-until-{step}{number}" for number in ("", *(f"-{i}" for i in range(2, 1000))))
        path.replace(next(kept for kept in map(path.with_stem, names) if not kept.exists()))


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
        log.error("validation at step %d failed, training goes on: %s", step, first_line(error))
    # The error is gone, and with its traceback what the function held.
    if device.type == "cuda":
        torch.cuda.empty_cache()  # so that training does not meet the fragments of what did not fit
    return None
