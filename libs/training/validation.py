"""Validation while training: the loss on fixed clips, scores of sampled videos, and pictures.

Two holes are filled in every validation video: the object's, whose true background nobody knows (GIFs), and a
synthetic one, drawn as in training but over known content, which is scored. Nothing here touches training's random
numbers or weights, and whatever goes wrong here is one line in the log. With few-step weights holes are filled as
deployed.
"""

import hashlib
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from common.run_files import AS_DEPLOYED, CONTACT_SHEET, SCORES_FILE, append_row, of_form
from dataset.crop import Crop
from dataset.images import pair_by_name, read_frames, read_mask
from dataset.utils import draw_holes
from libs.checkpoints.checkpoint import HELD_OUT
from libs.evaluation.baselines import telea
from libs.evaluation.cases import noise_seed
from libs.evaluation.contact_sheet import contact_sheet, show_in_tracker, stack_sheets
from libs.evaluation.metrics import SCORES, Reference, average, table
from libs.evaluation.networks import on_device
from libs.inference.composition import MASK_DILATIONS, paste
from libs.inference.few_step import FewStepWeights
from libs.inference.pipeline import Pipeline, deployed_pipeline
from libs.inference.prior import ON_THE_SPOT, make_prior, read_prior
from libs.inference.video import dilate, resize, stack, write_gif, write_image
from libs.training.held_out_loss import HeldOutLoss, attempt, spread
from libs.training.log import log, to_trackers

AS_TRAINED = ""  # the form of validation that samples as the stage trains; the other one is AS_DEPLOYED


@dataclass(frozen=True, eq=False)  # hashed by identity
class ValidationVideo:
    folder: Path
    frames: np.ndarray  # (f, h, w, 3) uint8, RGB
    object_holes: np.ndarray  # (f, h, w) uint8, 255 = hole: the object
    synthetic_holes: np.ndarray  # the same, a random shape over known content
    prompt_embeds: torch.Tensor  # (1, n, d)
    prior: np.ndarray | None  # of --prior's folder, like frames
    networks: list  # that score it too

    @property
    def name(self):
        return self.folder.name

    @cached_property
    def reference(self):
        return Reference(self.frames, self.synthetic_holes, networks=self.networks)

    @cached_property
    def telea_scores(self):
        return self.score(telea(self.frames, self.synthetic_holes))

    @cached_property
    def own_scores(self):
        """The ceiling: equal pixels, and the warping error that the video's own motion leaves."""
        return self.score(self.frames)

    def score(self, result):
        with on_device(self.networks, self.prompt_embeds.device):
            return {"frames": self.reference.scored_frames, **self.reference.score(result)}


def load_validation_video(images, masks, prompt_embeds, config, number, networks):
    """The first `nframes` frames and their object masks, any value above 0 = hole, dilated 4 times by a 3x3 cross.

    Whatever the clips' shape and stride are, these are whole frames that follow each other, as in what users fill.
    Where a crop of `config.resolution` is shrunk, so are they, so that small runs validate quickly. The synthetic holes
    follow from the seed and the video's number.
    """
    pairs = pair_by_name(images, masks)[: config.nframes]
    paths = [frame for frame, _ in pairs]
    frames = np.stack(read_frames(paths))
    holes = stack([(path.name, read_mask(path)) for _, path in pairs], masks)
    scale = min(1, Crop.of(*holes.shape[1:], config.resolution).scale.min())
    height, width = (round(side * scale) for side in holes.shape[1:])
    frames, holes = resize(frames, dilate(holes, MASK_DILATIONS), height, width)
    synthetic = draw_holes(len(frames), height, width, config, number)
    prior = read_prior(config.prior, Path(images), paths, (height, width)) if config.pcm_weights else None
    return ValidationVideo(Path(images), frames, holes, synthetic, prompt_embeds, prior, networks)


class Validation:
    """What the loop asks for. Processes share the work; all of them have to make every call.

    Args:
        found: what the checks have opened.
        base: LoadedBase.
        prompt_embeds: (V, n, d), one per validation video.
        stop: StopRequest; once there is a signal, no more videos are begun.
    """

    def __init__(self, config, stage, accelerator, found, base, prompt_embeds, stop):
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        self.inpainter, self.base, self.sampler, self.stop = stage.model_class, base, found.base.load_sampler(), stop
        self.few_step = FewStepWeights(config.pcm_weights) if config.pcm_weights else None
        self.forms = [AS_DEPLOYED] if config.pcm_weights else []
        if config.validate_as_trained or not config.pcm_weights:
            self.forms.append(AS_TRAINED)
        self.folder = Path(config.output_dir, config.logging_dir)
        pairs = zip(config.validation_image, config.validation_mask, strict=True) if config.validation_steps else ()
        self.videos = [
            load_validation_video(images, masks, prompt_embeds[i : i + 1], config, i, found.networks)
            for i, (images, masks) in enumerate(pairs)
        ]
        self.held_out_loss = HeldOutLoss(config, accelerator, found.dataset, base)

    def is_due(self, step, first, saving):
        """Whether holes are to be filled: every N steps, after the `first` step of a start, and where their score is
        what chooses among the checkpoints that are saved."""
        every = self.config.validation_steps
        return every > 0 and (step % every == 0 or first or (saving and self.config.best_by != HELD_OUT))

    def run(self, model, state, sample):
        """{measure: value} at a step, in the main process: the held-out loss, or None; where all videos were scored,
        the means of scores, and "setups", a list of `setup` per video, with their form in their names. A failure costs
        what it was about to find, not the run.

        Args:
            model: unwrapped: DDP's forward would wait for processes that have nothing left to do.
            sample: fill holes too, for scores and pictures.
        """
        step = state.global_step
        held_out_loss, losses_by_video = self.held_out_loss.report(model, state)
        measured = {HELD_OUT: held_out_loss}
        model.eval()
        for form in self.forms if sample and self.videos else ():
            begin = time.perf_counter()
            found = attempt(step, self.device, self.sample_videos, model, step, form) or {}
            if self.accelerator.is_main_process:
                means = attempt(step, self.device, self.report, step, found, losses_by_video, form)
                if means and len(found) == len(self.videos):
                    measured |= {f"{score}{form}": value for score, value in means.items()}
                    measured[f"setups{form}"] = [self.setup(i, form) for i in found]
            self.accelerator.wait_for_everyone()
            left = [video.name for i, video in enumerate(self.videos) if i not in found]
            log.info("validation%s: %d videos in %s, %.0f s%s%s", form.replace("-", " "), len(found),
                     self.samples_folder(step), time.perf_counter() - begin,
                     f"; without {', '.join(left)}" if left else "", self.free_memory())  # fmt: skip
        return measured

    def samples_folder(self, step):
        return self.folder / "samples" / f"sample-{step}"

    @contextmanager
    def pipeline(self, model, form):
        """The Pipeline of a form: what trains, from noise; or with few-step weights, as it is deployed."""
        nframes, shared_noise = self.config.nframes, self.inpainter.shared_noise
        if form == AS_DEPLOYED:
            with self.few_step.folded(model.unet_main, model):
                yield deployed_pipeline(model, self.few_step, self.base, self.device, nframes, shared_noise)
        else:
            yield Pipeline(
                model=model,
                vae=self.base.vae,
                sampler=self.sampler,
                device=self.device,
                nframes=nframes,
                overlap=0,
                num_inference_steps=self.inpainter.inference_steps,
                shared_noise=shared_noise,
            )

    def setup(self, i, form):
        """A hash of what the scores of a video follow from, besides weights: those with another one do not compare."""
        how = self.config.validation_prompt[i]
        if form == AS_DEPLOYED:
            prior = self.config.prior if self.config.prior in ON_THE_SPOT else "telea"  # see `fill`
            how = f"{Path(self.config.pcm_weights).name} from {prior}"
        return hashlib.sha256(self.videos[i].synthetic_holes.tobytes() + how.encode()).hexdigest()[:12]

    def fill(self, pipeline, form, i, holes):
        """The whole generated frames of a video; as deployed with an empty prompt, and from a prior."""
        video, seed = self.videos[i], noise_seed(self.config.seed, i)
        if form != AS_DEPLOYED:
            return pipeline.fill(video.frames, holes, video.prompt_embeds, seed)
        prior = video.prior
        if prior is None:
            prior = make_prior(self.config.prior, video.frames, holes)
        elif holes is video.synthetic_holes:  # a folder's frames have the object filled: here they would show the truth
            prior = make_prior("telea", video.frames, holes)
        return pipeline.fill(video.frames, holes, self.base.prompt_embeds[1:], seed, prior)

    @torch.compiler.set_stance("force_eager")
    def sample_videos(self, model, step, form):
        """{number of a video: (scores, contact sheet)}; writes the GIFs of the removed objects."""
        begin, limit = time.perf_counter(), 60 * self.config.validation_minutes

        def sample(i, pipeline):
            video = self.videos[i]
            # Both before anything else that may fail in one process: a sharded model's layers need all of them.
            removed, filled = (
                self.fill(pipeline, form, i, holes) for holes in (video.object_holes, video.synthetic_holes)
            )
            write_gif(self.samples_folder(step) / f"{i + 1}{form}.gif", removed)
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

        def too_late():
            return time.perf_counter() - begin > limit or self.stop.signal is not None

        with self.pipeline(model, form) as pipeline:
            found = spread(
                self.accelerator, len(self.videos), lambda i: attempt(step, self.device, sample, i, pipeline), too_late
            )
        return {i: result for i, result in sorted(found.items()) if result is not None}

    def report(self, step, found, losses_by_video, form):
        """Table, CSV, contact sheet and trackers (main process). Returns the mean scores; None without a video."""
        if not found:
            return None
        scores = {self.videos[i]: result[0] for i, result in found.items()}
        name = f"step {step}" + form.replace("-", " ").replace(" as", ", as", 1)
        rows = {
            name: average(list(scores.values())),
            "OpenCV Telea": average([video.telea_scores for video in scores]),
            "the video itself": average([video.own_scores for video in scores]),
        }
        for line in table(rows):
            log.info("%s", line)
        for i, (values, _) in found.items():
            video = self.videos[i]
            row = {"step": step, "number": i + 1, "video": video.name, "setup": self.setup(i, form)}
            row |= {"held_out_loss": losses_by_video.get(video.folder, ""), **values}
            append_row(self.folder / of_form(SCORES_FILE, form), row)
        path = self.samples_folder(step) / of_form(CONTACT_SHEET, form)
        write_image(path, stack_sheets([sheet for _, sheet in found.values()]))
        means = {score: value for score, value in rows[name].items() if score in SCORES}
        scalars = {f"validation{form}/{score}": value for score, value in means.items()}
        gifs = {f"{i + 1}-{self.videos[i].name}{form}": self.samples_folder(step) / f"{i + 1}{form}.gif" for i in found}

        def send(tracker):
            tracker.log(scalars, step=step)
            show_in_tracker(tracker, step, gifs, path)

        to_trackers(self.accelerator, send)
        return means

    def free_memory(self):
        """Give back what only validation needed; says in words what is held afterwards."""
        if self.device.type != "cuda":
            return ""
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved(self.device) / 2**30
        return f"; peak so far {peak:.1f} GiB, {held:.1f} GiB held afterwards"
