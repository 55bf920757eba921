"""Held-out videos while training: the held-out loss, scores of sampled videos, and pictures.

Two holes are filled in every validation video: the object's, whose true background nobody knows (GIFs), and a
synthetic one, drawn as in training but over known content, which is scored. Nothing here touches what training's random
numbers or weights are, and whatever goes wrong here is one line in the log.
"""

import time
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import imageio
import numpy as np
import torch
from accelerate.utils import gather_object

from common.errors import first_line
from common.run_files import CONTACT_SHEET, HELD_OUT_FILE, SCORES_FILE, append_row
from dataset.folders import scan_video
from dataset.images import pair_by_name, read_frames, read_mask
from dataset.loader import TrainingClips
from dataset.utils import draw_holes
from libs.evaluation.baselines import telea
from libs.evaluation.contact_sheet import contact_sheet, show_in_trackers, stack_sheets
from libs.evaluation.metrics import SCORES, Reference, average, table
from libs.inference.composition import MASK_DILATIONS, paste
from libs.inference.pipeline import Pipeline
from libs.inference.video import dilate, resize, stack, write_gif
from libs.training.log import log
from libs.training.loss import inpainting_loss

PROBE_EPOCH = 2**31  # an epoch that no run reaches: the probe clips' crops and masks are not trained on
# What may go wrong: CUDA's out of memory is a RuntimeError, an InputError a ValueError.
FAILURES = (RuntimeError, OSError, ValueError, cv2.error)


@dataclass(frozen=True, eq=False)  # hashed by identity
class ValidationVideo:
    folder: Path
    frames: np.ndarray  # (f, h, w, 3) uint8, RGB
    object_holes: np.ndarray  # (f, h, w) uint8, 255 = hole: the object
    synthetic_holes: np.ndarray  # the same, a random shape over known content
    prompt_embeds: torch.Tensor  # (1, n, d)

    @property
    def name(self):
        return self.folder.name

    @cached_property
    def reference(self):
        return Reference(self.frames, self.synthetic_holes)

    @cached_property
    def telea_scores(self):
        return self.score(telea(self.frames, self.synthetic_holes))

    @cached_property
    def own_scores(self):
        """The ceiling: equal pixels, and the warping error that the video's own motion leaves."""
        return self.score(self.frames)

    def score(self, result):
        return {"frames": self.reference.scored_frames, **self.reference.score(result)}


def load_validation_video(images, masks, prompt_embeds, args, number):
    """The first `args.nframes` frames and their object masks, any value above 0 = hole, dilated 4 times by a 3x3 cross.

    Frames keep their shape; where the short side exceeds `args.resolution`, they are shrunk to it, so that small runs
    validate quickly. The synthetic holes follow from the seed and the video's number.
    """
    pairs = pair_by_name(images, masks)[: args.nframes]
    frames = np.stack(read_frames([frame for frame, _ in pairs]))
    holes = stack([(path.name, read_mask(path)) for _, path in pairs], masks)
    scale = min(1, args.resolution / min(holes.shape[1:]))
    height, width = (round(side * scale) for side in holes.shape[1:])
    frames, holes = resize(frames, dilate(holes, MASK_DILATIONS), height, width)
    synthetic = draw_holes(len(frames), height, width, args, number)
    return ValidationVideo(Path(images), frames, holes, synthetic, prompt_embeds)


def set_aside(path, step):
    """Rename held_out.csv to held_out-until-<step>.csv, so that one file holds what can be compared."""
    if path.is_file():
        path.replace(path.with_stem(f"{path.stem}-until-{step}"))


class Validation:
    """What the trainer asks for while it runs. Processes share the work; all of them have to make every call."""

    def __init__(self, args, stage, accelerator, dataset, base, sampler, validation_embeds, stop):
        """
        Args:
            dataset: the FinetuneDataset that is trained on, whose crops and masks the probe clips have.
            base: LoadedBase.
            validation_embeds: (V, n, d), one per validation video.
            stop: StopRequest; once there is a signal, no more videos are begun.
        """
        self.args, self.stage, self.accelerator, self.device = args, stage, accelerator, accelerator.device
        self.base, self.sampler, self.stop = base, sampler, stop
        self.folder = Path(args.output_dir, args.logging_dir)
        pairs = zip(args.validation_image, args.validation_mask, strict=True) if args.validation_steps else ()
        self.videos = [
            load_validation_video(images, masks, validation_embeds[i : i + 1], args, i)
            for i, (images, masks) in enumerate(pairs)
        ]
        held_out = [scan_video(Path(folder)) for folder in args.validation_image] if self.videos else []
        self.probe = copy(dataset)  # its crops and masks, of other videos
        self.probe.videos = [video for video in held_out if len(video.frames) >= args.nframes]
        self.probe_clips = args.probe_clips if self.probe.videos else 0
        self.measured_at = self.held_out = None  # step and value of the newest held-out loss

    def start(self, model, state):
        """The held-out loss before the first step, with which later ones are compared."""
        if self.probe_clips and state.probe_start is None:
            if state.global_step and self.accelerator.is_main_process:  # the losses so far are of other clips
                self.guarded(state.global_step, set_aside, self.folder / HELD_OUT_FILE, state.global_step)
            state.probe_start, _ = self.measure(model, state.global_step)
            if state.probe_start is not None:
                log.info("held-out loss %.4f at step %d, on %d fixed clips of %d video(s)", state.probe_start,
                         state.global_step, self.probe_clips, len(self.probe.videos))  # fmt: skip

    def run(self, model, state):
        """Held-out loss, scores and pictures at a step. A failure costs what it was about to find, not the run.

        Args:
            model: unwrapped: DDP's forward would wait for processes that have nothing left to do.
        """
        begin, step = time.perf_counter(), state.global_step
        by_video = self.report_held_out_loss(model, state) if self.probe_clips else {}
        if self.videos:
            found = self.sample_videos(model, step)
            if self.accelerator.is_main_process:
                self.guarded(step, self.report, step, found, by_video)
            self.accelerator.wait_for_everyone()
            left = [video.name for i, video in enumerate(self.videos) if i not in found]
            log.info("validation: %d videos in %s, %.0f s%s%s", len(found), self.samples_folder(step),
                     time.perf_counter() - begin, f"; without {', '.join(left)}" if left else "",
                     self.free_memory())  # fmt: skip

    def loss_at(self, model, state):
        """The held-out loss at this step, measured unless it was just now; None: there is none."""
        if self.probe_clips and self.measured_at != state.global_step:
            self.report_held_out_loss(model, state)
        return self.held_out

    def report_held_out_loss(self, model, state):
        """Measure and log it: {video's folder: loss}."""
        step = state.global_step
        loss, by_video = self.measure(model, step)
        if loss is not None:
            share = f", {loss / state.probe_start:.3f} of its start" if state.probe_start else ""
            log.info("held-out loss %.4f at step %d%s", loss, step, share)
            self.accelerator.log({"held_out_loss": loss}, step=step)
        return by_video

    @torch.compiler.set_stance("force_eager")  # used too rarely to compile variants of the models for it
    @torch.no_grad()
    def measure(self, model, step):
        """The held-out loss on fixed clips, masks and noises, at timesteps spread evenly: comparable from step to step.

        Returns: its mean and {video's folder: mean}, or None and {} where it could not be measured.
        """
        n, videos, total = self.probe_clips, self.probe.videos, self.base.noise_scheduler.config.num_train_timesteps

        def measure_clip(i):
            batch = TrainingClips(self.probe).collate([self.probe.clip(i % len(videos), PROBE_EPOCH + i)])
            timesteps = torch.tensor([(2 * i + 1) * total // (2 * n)], device=self.device)
            return inpainting_loss(model, self.base, batch, timesteps).item()

        model.eval()
        # Clip by clip and averaged in one order: any number of processes finds the same bits.
        losses = self.spread(n, lambda i: self.guarded(step, measure_clip, i))
        self.measured_at, self.held_out = step, None
        if None in losses.values():
            return None, {}
        by_video = {
            video.folder: float(np.mean([losses[i] for i in range(k, n, len(videos))]))
            for k, video in enumerate(videos[:n])
        }
        self.held_out = float(np.mean([losses[i] for i in range(n)]))
        if self.accelerator.is_main_process:
            row = {"step": step, "held_out_loss": self.held_out}
            self.guarded(step, append_row, self.folder / HELD_OUT_FILE, row)
        return self.held_out, by_video

    def spread(self, count, function, time_limit=None):
        """{i: function(i)} for i below `count`, spread over the processes, as many calls in each of them. With a
        `time_limit` none begins after so many seconds, or after a signal to stop."""
        begin, results = time.perf_counter(), {}
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        for first in range(0, count, processes):
            if time_limit is not None:
                late = time.perf_counter() - begin > time_limit or self.stop.signal is not None
                if any(gather_object([late])):
                    break
            i = (first + rank) % count
            results[i] = function(i)
        return dict(gather_object(list(results.items())))

    def guarded(self, step, function, *args):
        """What `function` returns; None and a line in the log where it fails."""
        try:
            return function(*args)
        except FAILURES as error:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # so that training does not meet the fragments of what did not fit
            log.error("validation at step %d failed, training goes on: %s", step, first_line(error))
            return None

    def samples_folder(self, step):
        return self.folder / "samples" / f"sample-{step}"

    @torch.compiler.set_stance("force_eager")
    def sample_videos(self, model, step):
        """{video's number: (scores, contact sheet)}; writes the GIFs of the removed objects."""
        model.eval()
        pipeline = Pipeline(
            model, self.base.vae, self.sampler, self.device, self.args.nframes, 0, self.stage.model_class.inference_steps,
            self.stage.model_class.shared_noise,
        )  # fmt: skip

        def sample(i):
            video = self.videos[i]
            # Both before anything else that may fail in one process: a sharded model's layers need all of them.
            removed, filled = (
                pipeline.fill(video.frames, holes, video.prompt_embeds, self.args.seed)
                for holes in (video.object_holes, video.synthetic_holes)
            )
            write_gif(self.samples_folder(step) / f"{i + 1}.gif", removed)
            result = paste(video.frames, filled, video.synthetic_holes)
            scores = video.score(result)
            sheets = [
                contact_sheet(f"{video.name}, step {step}: {what}", video.frames, holes, frames)
                for what, holes, frames in (
                    (f"synthetic hole, PSNR in it {scores['psnr_hole']:.2f} dB", video.synthetic_holes, result),
                    ("object removed", video.object_holes, removed),
                )
            ]
            return scores, stack_sheets(sheets)

        limit = 60 * self.args.validation_minutes
        found = self.spread(len(self.videos), lambda i: self.guarded(step, sample, i), limit)
        return {i: result for i, result in sorted(found.items()) if result is not None}

    def report(self, step, found, losses_by_video):
        """Table, CSV, contact sheet and trackers (main process)."""
        if not found:
            return
        scores = {self.videos[i]: result[0] for i, result in found.items()}
        rows = {
            f"step {step}": average(list(scores.values())),
            "OpenCV Telea": average([video.telea_scores for video in scores]),
            "the video itself": average([video.own_scores for video in scores]),
        }
        for line in table(rows):
            log.info("%s", line)
        for i, (values, _) in found.items():
            video = self.videos[i]
            row = {"step": step, "number": i + 1, "video": video.name}
            row |= {"held_out_loss": losses_by_video.get(video.folder, ""), **values}
            append_row(self.folder / SCORES_FILE, row)
        path = self.samples_folder(step) / CONTACT_SHEET
        imageio.imwrite(path, stack_sheets([sheet for _, sheet in found.values()]))
        means = rows[f"step {step}"]
        self.accelerator.log({f"validation/{name}": means[name] for name in SCORES}, step=step)
        gifs = {f"{i + 1}-{self.videos[i].name}": self.samples_folder(step) / f"{i + 1}.gif" for i in found}
        show_in_trackers(self.accelerator.trackers, step, gifs, path)

    def free_memory(self):
        """Give back what only validation needed; says in words what is held afterwards."""
        if self.device.type != "cuda":
            return ""
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved(self.device) / 2**30
        return f"; peak so far {peak:.1f} GiB, {held:.1f} GiB held afterwards"
