"""How the parts of a run are made: base models, model, data, optimizer and schedule; and a resumed start."""

import math
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader

from common.distributed import DTYPES, autocast_under_fsdp, refuse_differences
from common.weights import fingerprint, weight_files
from dataset.crop import sides
from dataset.loader import EpochSampler, TrainingClips
from libs.base_model import LoadedBase
from libs.checkpoints.checkpoint import register_hooks, saved_keys
from libs.checkpoints.resume import BATCH_SETTINGS
from libs.inpainter import cast_parameters
from libs.training.compile_ahead import CompileAhead
from libs.training.compiling import compile_encoder, compile_models
from libs.training.config import settings_with
from libs.training.cuda_graph import GraphedForwardBackward, leave_default_stream
from libs.training.latent_cache import LatentCache
from libs.training.log import log, log_compiling, log_parameters
from libs.training.loss import ForwardBackward
from libs.training.loss_weights import LossWeights
from libs.training.optimizer import make_optimizer, match_layout

SCALER_FILE = "scaler.pt"  # accelerate's, of fp16 runs


def require_agreement(accelerator, config, found):
    """Raise InputError where machines have other settings, weights or data; where files lie may differ."""
    refuse_differences(accelerator, what_must_agree(config, found, accelerator.device))


def what_must_agree(config, found, device):
    """{name: value} that all processes need in common."""
    settings = found.state.settings
    flags = {f"--{name}": value for name, value in vars(config).items() if name not in settings_with("per_machine")}
    files = {name: weights.files for name, weights in found.opened.items() if weights}
    files["VAE"] = weight_files(found.base.vae_folder, found.base.variant)
    return {
        **flags,
        **({"the GPU (--bf16_weights needs equal ones)": gpu_model(device)} if config.bf16_weights else {}),
        **{f"the {name}'s fingerprint": fingerprint(paths) for name, paths in files.items()},
        "the list of validation videos": settings["validation_image"],
        "the number of clips an epoch": len(found.dataset),
        "the number of pairs": len(found.dataset.pairs),
        "the hash of the videos' names and lengths": settings["videos"],
        "the hash of the names of videos that masks are of": settings["hole_videos"] or "none",
        "the networks that score": [network.columns for network in found.networks],
        "the checkpoint to resume from": found.checkpoint.name if found.checkpoint else "none",
    }


def gpu_model(device):
    """In words. Its random numbers, by which bf16 weights are rounded, follow from its number of multiprocessors."""
    if device.type != "cuda":
        return "none"
    model = torch.cuda.get_device_properties(device)
    return f"{model.name} with {model.multi_processor_count} multiprocessors"


def set_up_torch(config):
    """Seeds, products in TF32, the stream that everything runs in."""
    set_seed(config.seed)
    # torch's advice after a first step whose gradients overflowed, as they often do in fp16: it counts all the same.
    warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    if config.cuda_graph:
        leave_default_stream()


def start_compiling(config, stage, accelerator, found):
    """A context: CompileAhead, or None where layers are not compiled one by one before they run, or no step is left."""
    by_layer = config.compile and config.cuda_graph and not config.gradient_checkpointing
    if not by_layer or found.state.global_step >= last_step_of(config, found):
        return nullcontext()
    shapes, types = ("train_batch_size", "nframes", "resolution"), ("mixed_precision", "bf16_weights", "allow_tf32")
    configs = [weights and weights.config for weights in found.opened.values()]
    settings = [getattr(config, name) for name in (*shapes, *types, "use_8bit_adam")]
    return CompileAhead(accelerator.device, (stage.number, settings, configs, found.base.vae_config))


def load_base(config, accelerator, found):
    """(LoadedBase, (V, n, d) embeddings of the validation prompts).

    One embedding per prompt for the whole run; the text encoder is gone before the large models come.
    """
    device, half = accelerator.device, DTYPES[accelerator.mixed_precision]
    prompts = found.dataset.prompts
    embeds = found.base.encode_prompts([*prompts, *config.validation_prompt], device)
    cache = open_latent_cache(config, accelerator, found.base, half)
    vae = found.base.load_vae(device, half, config.nframes, cache)
    if config.compile:
        compile_encoder(vae.vae.encoder)
    base = LoadedBase(vae, found.base.noise_scheduler, embeds[: len(prompts)], device)
    return base, embeds[len(prompts) :]


def open_latent_cache(config, accelerator, base, dtype):
    """The LatentCache, or None where the run has none."""
    if config.latent_cache and config.random_crop:
        log.info("latent cache: off, because --random_crop shows another part of a frame every time")
    if not config.latent_cache or config.random_crop:
        return None
    factor = 2 ** (len(base.vae_config["block_out_channels"]) - 1)
    width, height = sides(config.resolution)
    return LatentCache(
        config.latent_cache,
        vae=fingerprint(weight_files(base.vae_folder, base.variant)),
        shape=(2 * base.vae_config["latent_channels"], height // factor, width // factor),
        dtype=dtype,
        limit_gb=config.latent_cache_gb,
        num_processes=accelerator.num_processes,
    )


def build_model(config, stage, accelerator, found):
    """The stage's Inpainter, ready for `accelerator.prepare`: frozen, recomputed and compiled as the settings say."""
    model = stage.load_models(found.opened, frozen_dtype=DTYPES[accelerator.mixed_precision])
    set_up_model(config, accelerator, model)
    log_parameters(model, config.checkpoints_total_limit)
    found.state.configs = {name: dict(getattr(model, name).config) for name in ("unet_main", "brushnet")}
    register_hooks(accelerator, saved_keys(model))
    return model


def set_up_model(config, accelerator, model):
    """Weights in bf16, recomputed layers and compiled ones, as the settings say, in place."""
    if config.bf16_weights:
        cast_parameters(model.parameters(), torch.bfloat16)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    autocast_under_fsdp(accelerator, model)
    if config.compile:
        by_layer = config.cuda_graph or config.gradient_checkpointing
        compile_models((model.unet_main, model.brushnet), by_layer, channels_last=not config.use_8bit_adam)


def make_loader(config, accelerator, found, cache, last_step):
    """The process's part of the batches from the start state to the last step."""
    state, clips = found.state, TrainingClips(found.dataset, cache)
    steps_left = max(0, last_step - state.global_step)
    log.info("%d steps are left", steps_left)
    order = EpochSampler(len(clips), config.seed, state.clips_done, state.clips_done + steps_left * found.global_batch)
    # No persistent workers: they live until the interpreter ends, which then waits 5 s for each of them. Forked, which
    # is not the default from Python 3.14 on: a cache cannot be sent to them.
    workers = config.dataloader_num_workers
    loader = DataLoader(
        clips,
        batch_size=config.train_batch_size,
        sampler=order,
        collate_fn=clips.collate,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        pin_memory=accelerator.device.type == "cuda",
    )
    return accelerator.prepare(loader)


def make_passes(config, accelerator, model, base, ahead, state):
    """The ForwardBackward of a prepared model, its layers compiled by `ahead`, a CompileAhead or None.

    Args:
        state: TrainerState, whose next step is the one that the log follows where it compiles.
    """
    begun = ahead and ahead.processes
    compiled = begun and ahead.run(accelerator.unwrap_model(model), base, example_batch(config))
    if config.compile and not compiled:
        log_compiling(state)
    passes = GraphedForwardBackward if config.cuda_graph else ForwardBackward
    return passes(accelerator, model, base, LossWeights.of(config))


def example_batch(config):
    """As `TrainingClips.collate` makes one, all black and without holes."""
    width, height = sides(config.resolution)
    clips, shape = config.train_batch_size, (config.train_batch_size, config.nframes, height, width)
    return {
        "frames": torch.zeros((*shape, 3), dtype=torch.uint8),
        "holes": torch.zeros(shape, dtype=torch.uint8),
        "prompts": [0] * clips,
        "noise_seeds": [0] * clips,
    }


def make_optimizer_and_schedule(config, accelerator, model, found):
    """(optimizer, learning rate schedule, the last step's number)."""
    learning_rate = config.learning_rate * (found.global_batch if config.scale_lr else 1)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(config, parameters, learning_rate, accelerator.device)
    last_step = last_step_of(config, found)
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=last_step,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    log.info(
        "global batch %d clips: %d process(es), each %d clip(s) %d time(s) a step; %.6g steps per epoch; the last step "
        "is %d", found.global_batch, *(found.state.settings[name] for name in BATCH_SETTINGS),
        len(found.dataset) / found.global_batch, last_step,
    )  # fmt: skip
    return optimizer, schedule, last_step


def last_step_of(config, found):
    """The last step's number. Steps are of all processes together: each of them sees its share of a global batch."""
    return config.max_train_steps or math.ceil(config.num_train_epochs * len(found.dataset) / found.global_batch)


def resume(accelerator, optimizer, schedule, found):
    """Load the checkpoint that the checks found fit, if any; the optimizer's settings come from the flags, not from it.

    Args:
        optimizer, schedule: as prepared.
    """
    checkpoint, state = found.checkpoint, found.state
    if not checkpoint:
        return
    followed = ("params", "lr", "initial_lr")  # rates follow from the schedule, below
    given = [{name: value for name, value in group.items() if name not in followed} for group in optimizer.param_groups]
    base_lrs = list(schedule.scheduler.base_lrs)
    scaler = accelerator.scaler
    if not Path(checkpoint, SCALER_FILE).is_file():  # it was written without fp16: there is none to load
        accelerator.scaler = None
    accelerator.load_state(str(checkpoint))
    accelerator.scaler = scaler
    accelerator.step = 0  # of accumulation: checkpoints are written between optimizer steps
    # The schedule's state brings the old learning rate back; the flag decides.
    schedule = schedule.scheduler
    schedule.base_lrs = base_lrs
    for group, values, base_lr, factor in zip(
        optimizer.param_groups, given, base_lrs, schedule.lr_lambdas, strict=True
    ):
        group.update(values, initial_lr=base_lr)
        lr = base_lr * factor(schedule.last_epoch)
        group["lr"] = group["lr"].fill_(lr) if torch.is_tensor(group["lr"]) else lr  # torchao's is a tensor
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
    match_layout(optimizer)
    epoch = state.clips_done // len(found.dataset)
    log.info("resumed from %s at step %d, epoch %d", checkpoint, state.global_step, epoch)
