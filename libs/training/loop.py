"""The loop that both stages share: set-up, steps, validation, checkpoints, and the end of a run."""

import math
import os
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from safetensors import SafetensorError
from torch.utils.data import DataLoader

from common.distributed import DTYPES, autocast_under_fsdp, lost_processes_named, make_accelerator, require_agreement
from common.errors import InputError, first_line, one_line_errors
from common.files import locked
from common.weights import fingerprint, weight_files
from dataset.finetune_dataset import PROMPTS
from dataset.loader import EpochSampler, TrainingClips
from libs.base_model import LoadedBase
from libs.checkpoints.checkpoint import find_latest, mark_best, prune, register_hooks, save_checkpoint, saved_keys
from libs.checkpoints.convert import convert
from libs.checkpoints.resume import BATCH_SETTINGS, global_batch
from libs.training.checks import check_run
from libs.training.config import parse_args, settings_with, what_sets_clips
from libs.training.cuda_graph import TrainingStep
from libs.training.latent_cache import LatentCache
from libs.training.log import Meter, log, log_on_main_process, log_parameters, log_start, start_trackers
from libs.training.optimizer import make_optimizer, match_layout
from libs.training.stopping import StopRequest
from libs.training.validation import Validation

SCALER_FILE = "scaler.pt"  # accelerate's, of fp16 runs
MAX_BAD_LOSSES = 5  # in a row, before a run is stopped
MIN_BROKEN = 5  # broken clips met, before their share means anything


@one_line_errors
def run(stage, argv=None):
    """Train one stage: what `accelerate launch train_DiffuEraser_stage<n>.py` does."""
    args = parse_args(stage, argv)
    checks, inputs = check_run(args, stage)
    if args.check_only:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # every machine has its own files, and its own log
            print(checks.table(), flush=True)
        raise SystemExit(int(checks.failed))
    with StopRequest(args.output_dir) as stop:  # before the processes meet: the log's first line comes later
        train(args, stage, checks, inputs, stop)


def train(args, stage, checks, inputs, stop):
    accelerator = make_accelerator(args)
    alone = locked(args.output_dir) if accelerator.is_main_process else nullcontext()
    with alone, log_on_main_process(accelerator), lost_processes_named(args.output_dir):
        log_start(args, stage, accelerator, checks, inputs.opened)
        for line in inputs.notes:
            log.info("%s", line)
        require_agreement(accelerator, what_must_agree(args, inputs))
        start_trackers(accelerator, args)
        trainer = Trainer(args, stage, accelerator, inputs, stop)
        if inputs.checkpoint:
            trainer.resume(inputs.checkpoint)
        trainer.train()
        if trainer.base.vae.cache:
            trainer.base.vae.cache.close()
        accelerator.end_training()


def what_must_agree(args, inputs):
    """{name: value} that all processes need in common."""
    per_machine = settings_with("per_machine")
    flags = {f"--{name}": value for name, value in vars(args).items() if name not in per_machine}
    files = {name: weights.files for name, weights in inputs.opened.items() if weights}
    files["VAE"] = weight_files(inputs.base.vae_folder, inputs.base.variant)
    return {
        **flags,
        **{f"the {name}'s fingerprint": fingerprint(paths) for name, paths in files.items()},
        "the list of validation videos": inputs.state.settings["validation_image"],
        "the number of clips an epoch": len(inputs.dataset),
        "the checkpoint to resume from": inputs.checkpoint.name if inputs.checkpoint else "none",
    }


class Trainer:
    """Models, optimizer and data of one run, and its position."""

    def __init__(self, args, stage, accelerator, inputs, stop):
        self.args, self.stage, self.accelerator, self.device = args, stage, accelerator, accelerator.device
        self.stop = stop
        base, opened, dataset = inputs.base, inputs.opened, inputs.dataset
        set_seed(args.seed)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
        half = DTYPES[accelerator.mixed_precision]

        # One embedding per prompt for the whole run; the text encoder is gone before the large models come.
        prompts = [*PROMPTS, *args.validation_prompt]
        embeds = base.encode_prompts(prompts, self.device)
        prompt_embeds, validation_embeds = embeds[: len(PROMPTS)], embeds[len(PROMPTS) :]
        cache = self.open_latent_cache(base, half) if args.latent_cache else None
        vae = base.load_vae(self.device, half, args.nframes, cache)
        self.base = LoadedBase(vae, base.noise_scheduler, prompt_embeds, self.device)
        self.validation = Validation(
            args, stage, accelerator, dataset, self.base, base.load_sampler(), validation_embeds, stop
        )

        model = stage.load_models(opened, frozen_dtype=half)
        if args.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        autocast_under_fsdp(accelerator, model)
        if args.compile:
            model.compile_models(channels_last=not args.use_8bit_adam)
            vae.compile_encoder()
            log.info("compiling in the first step: about five minutes, less in later starts (COMPILE=0 turns it off)")
        log_parameters(model, args.checkpoints_total_limit)
        self.state = inputs.state
        self.state.configs = {name: dict(getattr(model, name).config) for name in ("unet_main", "brushnet")}
        register_hooks(accelerator, saved_keys(model))

        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.global_batch = global_batch(self.state.settings)
        learning_rate = args.learning_rate * (self.global_batch if args.scale_lr else 1)
        optimizer = make_optimizer(args, parameters, learning_rate, self.device)
        self.base_lrs = [learning_rate] * len(optimizer.param_groups)
        self.clips = TrainingClips(dataset, cache)
        self.clip_order = EpochSampler(len(dataset), args.seed)
        self.dataloader = accelerator.prepare(self.make_dataloader())

        # Steps of all processes together: each of them sees its share of a global batch.
        epochs_of_steps = math.ceil(args.num_train_epochs * len(dataset) / self.global_batch)
        self.max_train_steps = args.max_train_steps or epochs_of_steps
        lr_scheduler = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=self.max_train_steps,
            num_cycles=args.lr_num_cycles,
            power=args.lr_power,
        )
        self.model, self.optimizer, self.lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
        self.step = TrainingStep(
            accelerator, self.model, self.optimizer, self.base, args.max_grad_norm, args.cuda_graph
        )
        log.info(
            "global batch %d clips: %d process(es), each %d clip(s) %d time(s) a step; %.6g steps per epoch; the last "
            "step is %d",
            self.global_batch, *(self.state.settings[name] for name in BATCH_SETTINGS),
            len(dataset) / self.global_batch, self.max_train_steps,
        )  # fmt: skip
        self.last_checkpoint = None
        self.clips_met, self.broken_met, self.broken_seen = 0, 0, set()

    def open_latent_cache(self, base, dtype):
        args, config = self.args, base.vae_config
        side = args.resolution // 2 ** (len(config["block_out_channels"]) - 1)
        return LatentCache(
            args.latent_cache,
            vae=fingerprint(weight_files(base.vae_folder, base.variant)),
            shape=(2 * config["latent_channels"], side, side),
            dtype=dtype,
            limit_gb=args.latent_cache_gb,
            num_processes=self.accelerator.num_processes,
        )

    def make_dataloader(self):
        # No persistent workers: they live until the interpreter ends, which then waits 5 s for each of them.
        return DataLoader(
            self.clips,
            batch_size=self.args.train_batch_size,
            sampler=self.clip_order,
            collate_fn=self.clips.collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.device.type == "cuda",
        )

    def resume(self, checkpoint):
        """Load a checkpoint that the checks found fit; settings of the optimizer come from the flags, not from it."""
        optimizer, accelerator = self.optimizer, self.accelerator
        settings = ("betas", "eps", "weight_decay")
        given = [{name: group[name] for name in settings} for group in optimizer.param_groups]
        scaler = accelerator.scaler
        if not Path(checkpoint, SCALER_FILE).is_file():  # it was written without fp16: there is none to load
            accelerator.scaler = None
        accelerator.load_state(str(checkpoint))
        match_layout(optimizer)
        accelerator.scaler = scaler
        accelerator.step = 0  # of accumulation: checkpoints are written between optimizer steps
        # The schedule's state brings the old learning rate back; the flag decides.
        schedule = self.lr_scheduler.scheduler
        schedule.base_lrs = list(self.base_lrs)
        for group, values, base_lr, factor in zip(
            optimizer.param_groups, given, self.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group.update(values, initial_lr=base_lr)
            lr = base_lr * factor(schedule.last_epoch)
            group["lr"] = group["lr"].fill_(lr) if torch.is_tensor(group["lr"]) else lr  # torchao's is a tensor
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
        self.last_checkpoint = checkpoint
        log.info("resumed from %s at step %d, epoch %d", checkpoint, self.state.global_step,
                 self.state.clips_done // len(self.clips))  # fmt: skip

    def train(self):
        """Step until the last step, or until a signal asks to stop."""
        args, state, accelerator = self.args, self.state, self.accelerator
        first_step = state.global_step + 1
        self.validation.start(accelerator.unwrap_model(self.model), state)
        meter = self.meter = Meter(accelerator, self.max_train_steps)
        steps_left = max(0, self.max_train_steps - state.global_step)
        self.clip_order.start = state.clips_done
        self.clip_order.stop = state.clips_done + steps_left * self.global_batch
        log.info("%d steps are left", steps_left)
        self.model.train()
        for batch in self.dataloader:
            self.note_broken(batch)
            with accelerator.accumulate(self.model):
                loss, grad_norm = self.step(batch)
            # Bad gradients that were used. fp16's scaler skips them, inside a fused optimizer without saying so.
            if grad_norm is not None and accelerator.scaler is None and not accelerator.optimizer_step_was_skipped:
                loss = torch.where(torch.isfinite(grad_norm), loss, torch.nan)
            meter.add(loss, grad_norm, state.global_step + 1, batch["videos"])
            if not accelerator.sync_gradients:
                continue

            if not accelerator.optimizer_step_was_skipped:  # fp16's scaler skips steps whose gradients overflow
                self.lr_scheduler.step()
            state.global_step += 1
            state.clips_done += self.global_batch
            meter.steps += 1
            step, last = state.global_step, state.global_step == self.max_train_steps
            if step % args.logging_steps == 0 or step == first_step or last:
                meter.report(step, float(self.lr_scheduler.get_last_lr()[0]))
                self.stop_at_bad_losses()
            # A checkpoint first: validation takes minutes, in which much may happen.
            stopping = not last and self.must_stop()
            saving = step % args.checkpointing_steps == 0 or last or stopping
            if saving:
                self.save(must=last or stopping)
            if stopping:
                log.info("stopped by %s at step %d; the same command with --resume_from_checkpoint=latest goes on",
                         self.stop.signal, step)  # fmt: skip
                return
            validating = args.validation_steps and (step % args.validation_steps == 0 or step == first_step)
            if validating:
                self.validate()
            if saving:
                self.mark_best()
            if saving or validating:
                meter.restart()  # neither counts as time per step
        self.finish()

    def must_stop(self):
        """Whether a signal asks to stop; several processes agree on it at the steps that are logged."""
        if self.accelerator.num_processes == 1:
            return self.stop.signal is not None
        if self.state.global_step % self.args.logging_steps:
            return False
        if not self.sum_over_processes(self.stop.signal is not None):
            return False
        self.stop.received = self.stop.signal or "a signal to another process"
        return True

    def sum_over_processes(self, value):
        """What all processes decide by, together: one that went its own way would leave the others waiting."""
        return self.accelerator.reduce(torch.tensor(float(value), device=self.device), "sum").item()

    def note_broken(self, batch):
        """Name every broken video once, and stop when there are too many."""
        self.clips_met += len(batch["videos"])
        self.broken_met += len(batch["broken"])
        for line in batch["broken"]:
            video = line.partition(": ")[0]
            if video not in self.broken_seen:
                self.broken_seen.add(video)
                log.error("left out, another clip in its place: %s", line)  # also where another process met it
        share = self.broken_met / (self.clips_met + self.broken_met)
        if self.broken_met >= MIN_BROKEN and share > self.args.max_broken_share:
            raise InputError(
                f"{share:.0%} of the clips met came from broken videos ({len(self.broken_seen)} named above): mend or "
                "remove them, leave them out with --scan_data, or raise --max_broken_share"
            )

    def stop_at_bad_losses(self):
        bad, first = self.meter.earlier_bad
        if self.sum_over_processes(bad >= MAX_BAD_LOSSES):
            step, videos = first or (self.state.global_step, ["another process"])
            checkpoint, _ = find_latest(self.args.output_dir)
            raise InputError(
                f"the loss is not finite since step {step} (clip of {', '.join(videos)}); the last good checkpoint is "
                f"{checkpoint or 'none'}: lower --learning_rate, or use --mixed_precision=bf16"
            )

    def validate(self):
        self.step.release()
        self.validation.run(self.accelerator.unwrap_model(self.model), self.state)
        self.model.train()

    def save(self, must):
        """Save a checkpoint. One that fails leaves the earlier ones and the run alone, unless it `must` be saved."""
        args, start = self.args, time.perf_counter()
        bad, _ = self.meter.bad_streak()
        if self.sum_over_processes(bad):
            losses = f"the last {bad} losses" if bad else "losses of another process"
            reason = f"no checkpoint at step {self.state.global_step}: {losses} are not finite"
            if must:
                raise InputError(
                    f"{reason}; the last good one is {self.last_checkpoint}: resume with a lower --learning_rate"
                )
            log.info(reason)
            return
        self.step.release()  # compiled models are saved in another memory format: a copy of 4 GiB
        try:
            self.last_checkpoint = save_checkpoint(self.accelerator, args.output_dir, self.state)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_write_error(error):
                raise
            # Other processes wait for this one: then only ending is left.
            reason = f"checkpoint of step {self.state.global_step} could not be written ({first_line(error)})"
            if must or self.accelerator.num_processes > 1:
                raise InputError(f"{reason}: free some space and run the same command to resume") from None
            log.info("%s: free some space; the next one is tried after %d steps", reason, args.checkpointing_steps)
            return
        log.info("saved %s in %.0f s", self.last_checkpoint, time.perf_counter() - start)
        if self.accelerator.is_main_process:
            try:
                prune(args.output_dir, self.state.global_step, args.checkpoints_total_limit, args.keep_best_checkpoint)
            except OSError as error:
                log.info("older checkpoints could not be deleted (%s)", error)

    def mark_best(self):
        """Note the checkpoint just written as the best one, if its held-out loss is the lowest so far."""
        held_out = self.validation.loss_at(self.accelerator.unwrap_model(self.model), self.state)
        self.model.train()
        saved = self.last_checkpoint is not None and self.last_checkpoint.name == f"checkpoint-{self.state.global_step}"
        if held_out is None or not saved or not self.accelerator.is_main_process:
            return
        try:
            if mark_best(self.args.output_dir, self.state.global_step, held_out, what_sets_clips(self.state.settings)):
                log.info("%s is the best checkpoint so far, by held-out loss", self.last_checkpoint.name)
        except OSError as error:
            log.info("the best checkpoint could not be noted (%s)", error)

    def finish(self):
        """The last checkpoint, converted into the two folders that inference loads."""
        args, step = self.args, self.state.global_step
        if self.accelerator.is_main_process:
            convert(self.stage.number, self.last_checkpoint, args.output_dir, getattr(args, "pretrained_stage1", None))
        self.accelerator.wait_for_everyone()
        log.info("done at step %d: %s/unet_main and %s/brushnet", step, args.output_dir, args.output_dir)


def is_write_error(error):
    """Whether a checkpoint failed for the disk's sake; torch's writers raise plain RuntimeErrors then."""
    return isinstance(error, (OSError, SafetensorError)) or any(
        name in str(error) for name in ("PytorchStreamWriter", "inline_container", "iostream")
    )
