"""The loop that both stages share: set-up, steps, validation, checkpoints, and the end of a run."""

import math
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader

from dataset.finetune_dataset import PROMPTS, EpochSampler, FinetuneDataset, TrainingClips
from libs.checkpoints import TrainerState, register_hooks, save_checkpoint, saved_keys
from libs.conversion import convert, fingerprint
from libs.diffusion import batch_loss
from libs.errors import InputError
from libs.frozen import FrozenModels
from libs.options import parse_args
from libs.preflight import (
    check_fit,
    check_output_dir,
    check_precision,
    check_tracker,
    checkpoint_to_resume,
    eight_bit_adam,
)
from libs.reporting import Meter, flat_settings, log, log_on_main_process, log_parameters, log_start
from libs.validation import inpaint, load_validation_video, write_gif

PROBE_EPOCH = 2**31  # an epoch that no run reaches: the probe's clips and masks are not trained on


class Stage:
    """What a train script says of its stage."""

    number: int
    description: str
    nframes: int
    inference_steps: int  # of the validation samples
    shared_noise: bool  # validation starts all frames from the same noise

    @staticmethod
    def add_model_flags(add):
        """Declare the stage's own flags: `add` is an argparse group's add_argument."""

    @staticmethod
    def open_models(args):
        """Check the stage's weights folders without reading a tensor: {name: OpenedWeights or None}."""

    @staticmethod
    def load_models(opened, frozen_dtype):
        """The Inpainter in training mode, what is frozen in `frozen_dtype`."""

    @staticmethod
    def frozen_weights(opened):
        """{unet_main, brushnet: OpenedWeights} of what a checkpoint leaves out."""
        return {}


def run(stage, argv=None):
    """Train one stage: what `accelerate launch train_DiffuEraser_stage<n>.py` does."""
    args = parse_args(stage, argv)
    check_tracker(args.report_to)
    check_precision(args)
    if args.use_8bit_adam:
        eight_bit_adam()

    # Everything that can be wrong is found before the first tensor is read.
    frozen = FrozenModels(args)
    opened = stage.open_models(args)
    check_fit(args, frozen, opened)
    dataset = FinetuneDataset(args)
    check_output_dir(args)
    checkpoint, skipped = checkpoint_to_resume(args, stage)

    accelerator = Accelerator(
        # Several processes without a GPU (gloo): accelerate would let each of them train on its own.
        cpu=int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available(),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir, args.logging_dir))),
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        step_scheduler_with_optimizer=False,  # the loop steps it, once per optimizer step in every process
    )
    with log_on_main_process(accelerator):
        log_start(args, stage, accelerator, dataset, opened)
        for line in skipped:
            log.info("skipped: %s", line)
        trainer = Trainer(args, stage, accelerator, dataset, frozen, opened)
        if checkpoint:
            trainer.resume(checkpoint)
        elif args.resume_from_checkpoint:
            log.info("no checkpoint in %s yet: a fresh start", args.output_dir)
        trainer.train()
        accelerator.end_training()


class Trainer:
    """Models, optimizer and data of one run, and its position."""

    def __init__(self, args, stage, accelerator, dataset, frozen, opened):
        self.args, self.stage, self.accelerator, self.device = args, stage, accelerator, accelerator.device
        set_seed(args.seed)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)

        # One embedding per prompt for the whole run; the text encoder is gone before the large models come.
        prompts = [*PROMPTS, *args.validation_prompt]
        embeds = frozen.encode_prompts(prompts, self.device)
        self.prompt_embeds, validation_embeds = embeds[: len(PROMPTS)], embeds[len(PROMPTS) :]
        self.codec = frozen.load_codec(self.device, half)
        self.noise_scheduler, self.sampler = frozen.noise_scheduler, frozen.load_sampler()
        self.validation_videos = [
            load_validation_video(images, masks, validation_embeds[i : i + 1], args.nframes, args.resolution)
            for i, (images, masks) in enumerate(zip(args.validation_image, args.validation_mask, strict=True))
        ]

        model = stage.load_models(opened, frozen_dtype=half)
        if args.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        log_parameters(model, args.checkpoints_total_limit)
        self.state = TrainerState(
            stage=stage.number,
            configs={name: dict(getattr(model, name).config) for name in ("unet_main", "brushnet")},
            frozen_from={
                name: [str(weights.folder), fingerprint(weights.files)]
                for name, weights in stage.frozen_weights(opened).items()
            },
        )
        register_hooks(accelerator, saved_keys(model))

        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        learning_rate = args.learning_rate
        if args.scale_lr:
            learning_rate *= args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        optimizer = make_optimizer(args, parameters, learning_rate, self.device)
        self.clips = TrainingClips(dataset)
        self.clip_order = EpochSampler(len(dataset), args.seed)
        self.dataloader = accelerator.prepare(self.make_dataloader())

        # Steps are counted after prepare: every process sees its share of the data only.
        self.steps_per_epoch = math.ceil(len(self.dataloader) / args.gradient_accumulation_steps)
        self.max_train_steps = args.max_train_steps or args.num_train_epochs * self.steps_per_epoch
        lr_scheduler = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=self.max_train_steps,
            num_cycles=args.lr_num_cycles,
            power=args.lr_power,
        )
        self.model, self.optimizer, self.lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
        log.info(
            "%d steps per epoch of %d batches in every process; global batch %d clips; the last step is %d",
            self.steps_per_epoch,
            len(self.dataloader),
            args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes,
            self.max_train_steps,
        )
        if args.report_to != "none":
            accelerator.init_trackers(args.tracker_project_name, config=flat_settings(args))

    def make_dataloader(self):
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.clips,
            batch_size=self.args.train_batch_size,
            sampler=self.clip_order,
            collate_fn=TrainingClips.collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
        )

    def resume(self, checkpoint):
        saved = TrainerState.read(checkpoint)
        for name, (folder, expected) in saved.frozen_from.items():
            if self.state.frozen_from[name][1] != expected:
                raise InputError(
                    f"{checkpoint} was trained on other frozen weights ({folder}): start from those, or use another "
                    "--output_dir"
                )
        self.accelerator.load_state(str(checkpoint))
        self.state = saved
        log.info("resumed from %s at step %d, epoch %d", checkpoint, self.state.global_step, self.state.epoch)

    def train(self):
        args, state, accelerator = self.args, self.state, self.accelerator
        first_step = state.global_step + 1
        if args.probe_clips and state.probe_start is None:
            state.probe_start = self.measure_probe()
            log.info("probe loss %.4f at the start, on %d fixed clips", state.probe_start, args.probe_clips)
        meter = Meter(accelerator, self.max_train_steps)
        self.model.train()
        while state.global_step < self.max_train_steps:
            for batch in self.epoch_batches():
                with accelerator.accumulate(self.model):
                    loss = self.loss(batch)
                    grad_norm = optimize(accelerator, self.model, self.optimizer, loss, args.max_grad_norm)
                meter.add(loss.detach(), grad_norm)
                state.batches_done += 1
                if state.batches_done == len(self.dataloader):
                    state.epoch, state.batches_done = state.epoch + 1, 0
                if not accelerator.sync_gradients:
                    continue

                if not accelerator.optimizer_step_was_skipped:  # fp16's scaler skips steps whose gradients overflow
                    self.lr_scheduler.step()
                state.global_step += 1
                step = state.global_step
                meter.steps += 1
                if step % args.logging_steps == 0 or step == first_step or step == self.max_train_steps:
                    meter.report(step, self.lr_scheduler.get_last_lr()[0])
                validating = args.validation_steps and (step % args.validation_steps == 0 or step == first_step)
                if validating:
                    self.validate()
                if step % args.checkpointing_steps == 0 or step == self.max_train_steps:
                    self.save()
                if validating or step % args.checkpointing_steps == 0:
                    meter.restart()  # neither counts as time per step
                if step == self.max_train_steps:
                    break
        self.finish()

    def epoch_batches(self):
        """The batches of the current epoch that are not done yet; those done are skipped without loading them."""
        self.clip_order.current_epoch = self.state.epoch
        if self.state.batches_done == 0:
            return self.dataloader
        return self.accelerator.skip_first_batches(self.dataloader, self.state.batches_done)

    def loss(self, batch, timesteps=None):
        return batch_loss(
            self.model, self.codec, self.noise_scheduler, self.prompt_embeds, batch, self.device, timesteps
        )

    @torch.no_grad()
    def measure_probe(self):
        """Mean loss on fixed clips, masks and noises, at timesteps spread evenly: comparable from step to step."""
        n, total = self.args.probe_clips, self.noise_scheduler.config.num_train_timesteps
        losses = []
        for i in range(n):
            batch = TrainingClips.collate([self.clips[PROBE_EPOCH, i * len(self.clips) // n]])
            timesteps = torch.tensor([(2 * i + 1) * total // (2 * n)], device=self.device)
            losses.append(self.loss(batch, timesteps))
        return torch.stack(losses).mean().item()

    def validate(self):
        """Write the validation GIFs and measure the probe loss; every process has its share of the videos."""
        args, accelerator, step = self.args, self.accelerator, self.state.global_step
        start = time.perf_counter()
        # Unwrapped: processes sample different numbers of videos, and DDP's forward would wait for the others.
        model = accelerator.unwrap_model(self.model).eval()
        folder = Path(args.output_dir, args.logging_dir, "samples", f"sample-{step}")
        for i in range(accelerator.process_index, len(self.validation_videos), accelerator.num_processes):
            frames = inpaint(
                model,
                self.codec,
                self.sampler,
                self.validation_videos[i],
                self.stage.inference_steps,
                self.stage.shared_noise,
                args.seed,
                self.device,
            )
            write_gif(folder / f"{i + 1}.gif", frames)
        if args.probe_clips:
            self.report_probe()
        self.model.train()
        accelerator.wait_for_everyone()
        if self.validation_videos:
            seconds = time.perf_counter() - start
            log.info("validation: %d videos in %s, %.0f s", len(self.validation_videos), folder, seconds)

    def report_probe(self):
        probe, start = self.measure_probe(), self.state.probe_start
        log.info("probe loss %.4f at step %d, %.3f of its start", probe, self.state.global_step, probe / start)
        self.accelerator.log({"probe_loss": probe}, step=self.state.global_step)

    def save(self):
        start = time.perf_counter()
        folder = save_checkpoint(self.accelerator, self.args.output_dir, self.state, self.args.checkpoints_total_limit)
        log.info("saved %s in %.0f s", folder, time.perf_counter() - start)

    def finish(self):
        """The last checkpoint, converted into the two folders that inference loads."""
        args, step = self.args, self.state.global_step
        if args.probe_clips and not (args.validation_steps and step % args.validation_steps == 0):
            self.report_probe()
        if self.accelerator.is_main_process:
            checkpoint = Path(args.output_dir, f"checkpoint-{step}")
            convert(self.stage.number, checkpoint, args.output_dir, getattr(args, "pretrained_stage1", None))
        self.accelerator.wait_for_everyone()
        log.info("done at step %d: %s/unet_main and %s/brushnet", step, args.output_dir, args.output_dir)


def optimize(accelerator, model, optimizer, loss, max_grad_norm):
    """Backward, clip, and the optimizer's step where gradients are complete; returns their norm before clipping."""
    accelerator.backward(loss)
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm) if accelerator.sync_gradients else None
    optimizer.step()
    optimizer.zero_grad()
    return grad_norm


def make_optimizer(args, parameters, learning_rate, device):
    settings = {
        "lr": learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        return eight_bit_adam()(parameters, **settings)
    # Fused: one kernel, and fp16's scaler needs no look at the gradients from the host.
    return torch.optim.AdamW(parameters, fused=device.type == "cuda", **settings)
