"""What is checked before any weights load: in one line where something is wrong, or, with --check_only, as a table."""

import math
import os
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from accelerate.tracking import LoggerType, get_available_trackers

from common.command_line import require
from common.distributed import check_distributed, count_processes, count_processes_here, distributed_type
from common.errors import InputError, one_line
from common.files import check_writable
from common.hardware import compiling_lacks, gpu_is_used
from common.run_files import CONFIG_FILE, RUN_FILES, read_starts
from common.weights import read_shapes, require_utf8
from dataset.crop import sides
from dataset.finetune_dataset import FinetuneDataset, frames_spanned
from dataset.folders import list_videos, scan_frames
from dataset.images import image_size, list_frames, pair_by_name
from dataset.pairs import scan_pairs
from libs.base_model import BaseModel
from libs.checkpoints.checkpoint import BEST_FILE, TrainerState, find_latest, list_checkpoints
from libs.checkpoints.convert import refuse_source_weights
from libs.checkpoints.resume import describe_run, global_batch, go_on_from
from libs.evaluation.metrics import SCORES
from libs.evaluation.networks import load_networks
from libs.inference.few_step import FewStepWeights
from libs.inference.prior import check_prior
from libs.training.config import resume_policy, without_effect
from libs.training.optimizer import bf16_adam, eight_bit_adam
from libs.unet_motion_model import refuse_long_clips

TRAINED_BYTES = 16  # per trained parameter in memory: weight, gradient and Adam's two moments, fp32
CHECKPOINT_BYTES = 12  # of these in a checkpoint: weight and moments
EIGHT_BIT_SAVES = 6  # of them, where moments have 8 bits
BF16_SAVES = 2  # of them, where weights have 16
EMA_BYTES = 4  # more with --ema_decay, in memory and in a checkpoint
SHARD_BYTES = 4  # more with FSDP, which writes the weights a second time, and what is frozen
FROZEN_BYTES = 2  # per frozen parameter, in half precision
FORWARD_GIB_PER_FRAME = 0.3  # of 512x512, held after a forward pass whose layers are recomputed
POLYNOMIAL_END = 1e-7  # learning rate at the end of diffusers' schedule
OF_THE_RUN = {"output_dir", "logging_dir", "latent_cache", "resume_from_checkpoint"}  # folders that it writes to


@dataclass
class Checks:
    """Runs checks one after the other, and keeps a row of the table for each of them."""

    keep_going: bool  # collect failures as rows instead of raising the first
    rows: list = field(default_factory=list)  # (name, "ok" or "FAILED", what was found, in words)

    def check(self, name, function, *args):
        """Run a check that returns what it found, in words, or raises InputError."""
        self.open(name, lambda: (None, function(*args)))

    def open(self, name, function, *args):
        """Run a check that returns (result, words): the result, None where it failed."""
        try:
            result, found = function(*args)
        except (InputError, OSError) as error:  # OSError: what no check foresaw
            if not self.keep_going:
                raise
            self.rows.append((name, "FAILED", one_line(error)))
            return None
        self.rows.append((name, "ok", found))
        return result

    @property
    def failed(self):
        return any(verdict == "FAILED" for _, verdict, _ in self.rows)

    def table(self):
        width = max(len(name) for name, _, _ in self.rows)
        return "\n".join(f"{name:<{width}}  {verdict:<6}  {found}" for name, verdict, found in self.rows)


@dataclass
class RunInputs:
    """What the checks have opened for the run."""

    base: BaseModel
    opened: dict  # {model: OpenedWeights or None}
    dataset: FinetuneDataset
    state: TrainerState  # where the run starts or goes on
    checkpoint: Path | None  # to resume from
    notes: list[str]  # newer checkpoints passed over, and what has changed since
    networks: list  # that score the validation videos, on the CPU

    @property
    def global_batch(self):
        """Clips in a step of all processes together."""
        return global_batch(self.state.settings)


def check_run(config, stage):
    """Check everything: (Checks, RunInputs). Raises InputError for the first thing wrong, except with --check_only."""
    checks = Checks(keep_going=config.check_only)
    checks.check("flags", check_flags, config)
    checks.check("engine", check_distributed, config)
    base = checks.open("frozen models", open_base_model, config)
    opened = checks.open("weights", open_models, config, stage)
    if base and opened:
        checks.check("model family", check_fit, config, base, opened)
    checks.check("output folder", check_output_dir, config, opened or {})
    if opened and config.pcm_weights:
        checks.check("few-step weights", check_few_step, config, opened)
    dataset = checks.open("training data", open_dataset, config)
    checks.check("validation", check_validation_videos, config)
    networks = checks.open("scores", open_networks, config) or []
    start = describe_run(config, stage, opened, dataset, resume_policy()) if opened and dataset else None
    state, checkpoint, notes = checks.open("checkpoints", find_start, config, stage, start) or (start, None, [])
    if opened:
        checks.check("disk space", check_disk_space, config, stage, opened)
        checks.check("memory", check_memory, config, stage, opened)
    notes += without_effect(config)
    return checks, RunInputs(base, opened, dataset, state, checkpoint, notes, networks)


def check_flags(config):
    """No flag is wrong on this machine, or beside another flag."""
    wrong = list(wrong_flags(config))
    require(not wrong, "; ".join(wrong))
    stride = f", frame stride {config.frame_stride}" if config.frame_stride > 1 else ""
    found = f"{config.nframes} frames of {config.resolution} px{stride}, mixed precision {config.mixed_precision}"
    return "; ".join([f"{found}, tracker {config.report_to}", *without_effect(config)])


def wrong_flags(config):
    """Yield what is wrong and what mends it: a tracker, a precision or a library that is not there, flags at odds."""
    known = [tracker.value for tracker in LoggerType]
    name = config.report_to
    if name not in (*known, "none"):
        yield f"--report_to={name}: one of {', '.join(known)}, none was needed"
    elif name not in (*(tracker.value for tracker in get_available_trackers()), "all", "none"):
        yield f"--report_to={name}: its package is not installed; pip install {name}, or --report_to=none"
    precision = config.mixed_precision
    if precision == "fp16" and not gpu_is_used():
        yield "mixed precision fp16 needs a GPU, and none was found: use --mixed_precision=no"
    if precision == "bf16" and gpu_is_used() and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield "this GPU has no bf16 (Ampere and newer have): use --mixed_precision=fp16, and LOW_MEMORY=1"
    for used, library in ((config.use_8bit_adam, eight_bit_adam), (config.bf16_weights, bf16_adam)):
        try:
            if used:
                library()
        except InputError as error:
            yield str(error)
    if config.bf16_weights and not config.use_8bit_adam:
        yield "--bf16_weights needs --use_8bit_adam (LOW_MEMORY=2 sets both)"
    if config.bf16_weights and precision != "bf16":
        yield f"--bf16_weights needs --mixed_precision=bf16, not {precision} (MIXED_PRECISION)"
    if config.bf16_weights and config.ema_decay is not None:
        yield "--ema_decay does not go with --bf16_weights, which round its small steps away: drop one"
    if config.lr_scheduler == "polynomial" and config.learning_rate <= POLYNOMIAL_END and not config.scale_lr:
        yield (f"--learning_rate={config.learning_rate}: more than {POLYNOMIAL_END} was needed, where "
               "--lr_scheduler=polynomial ends")  # fmt: skip
    if config.known_frames and config.nframes < 2:
        yield f"--known_frames={config.known_frames}: of --nframes=1 none is left to fill: use --nframes=2 or more"
    # diffusers divides by zero.
    if config.lr_scheduler == "polynomial" and config.lr_warmup_steps == config.max_train_steps:
        yield f"--lr_warmup_steps={config.lr_warmup_steps} are all of --max_train_steps: use another number of either"
    if config.compile and (lacking := compiling_lacks()):
        yield f"--compile needs {lacking}, which was not found: add it, or leave the flag out (COMPILE=0)"
    if config.cuda_graph and not gpu_is_used():
        yield "--cuda_graph needs a GPU, and none was found: leave the flag out (CUDA_GRAPH=0)"


def open_base_model(config):
    base = BaseModel(config)
    return base, f"{config.base_model_name_or_path}, {base.vae_folder}"


def open_models(config, stage):
    opened = stage.open_models(config)
    sources = [f"{name} from {weights.folder}" if weights else f"{name} new" for name, weights in opened.items()]
    return opened, ", ".join(sources)


def check_fit(config, base, opened):
    """UNet, BrushNet, VAE and text encoder must be of one family, and clips short enough for the motion modules."""
    unet = opened["unet_main"]
    for weights in filter(None, opened.values()):
        for key in ("block_out_channels", "cross_attention_dim"):
            if key in weights.config and list_of(weights.config[key]) != list_of(unet.config[key]):
                raise InputError(
                    f"{weights.folder} has {key} {weights.config[key]}, {unet.folder} has {unet.config[key]}: weights "
                    "of one model family were needed"
                )
        refuse_long_clips(weights, config.nframes)
    for folder, gives, size, key in (
        (base.text_encoder_folder, "embeddings", base.text_config["hidden_size"], "cross_attention_dim"),
        (base.vae_folder, "latents", base.vae_config["latent_channels"], "in_channels"),
    ):
        if size != unet.config[key]:
            raise InputError(
                f"{folder} gives {gives} of {size} values, {unet.folder} takes {unet.config[key]}: models of one "
                "family were needed"
            )
    return f"channels {list_of(unet.config['block_out_channels'])}"


def list_of(value):
    return list(value) if isinstance(value, (list, tuple)) else value


def check_output_dir(config, opened):
    """It can be written to, and holds no weights that the end of the run would overwrite."""
    folder = Path(config.output_dir)
    if config.latent_cache and not config.random_crop:
        check_writable(Path(config.latent_cache), "--latent_cache")
    refuse_source_weights(folder, [weights.folder for weights in opened.values() if weights], flag="--output_dir")
    refuse_sources(folder, config)
    check_writable(folder, "--output_dir")
    require_utf8(folder)
    files = (CONFIG_FILE, BEST_FILE, *(Path(config.logging_dir, name) for name in RUN_FILES))
    foreign = [name for name in files if Path(folder, name).is_file()]
    if foreign and not read_starts(folder):
        raise InputError(f"{folder}/{foreign[0]} is no training run's: choose another --output_dir, or it is lost")
    return str(folder)


def refuse_sources(folder, config):
    """Raises InputError for a folder that the run reads weights or data from, and for one among frames or masks, where
    it would count as a video. Beside them is room: weights/my-run, dataset/DAVIS/my-run."""
    folder = folder.resolve()
    read = {f.name: [getattr(config, f.name)] for f in fields(config) if f.metadata["metavar"] == "DIR"}
    full = {name: getattr(config, name) for name in ("validation_image", "validation_mask")}
    full |= {name: read[name] for name in ("paired_root", "mask_root", "masks_of_videos")}
    for name in ("davis_root", "ytvos_root"):
        parts = ("JPEGImages", "Annotations", "ImageSets")
        full[name] = [Path(root, part) for root in filter(None, read[name]) for part in parts]
    refused = [(name, {folder}, roots) for name, roots in read.items() if name not in OF_THE_RUN]
    refused += [(name, {folder, *folder.parents}, roots) for name, roots in full.items()]
    for name, folders, roots in refused:
        if not folders.isdisjoint(Path(root).resolve() for root in roots if root):
            raise InputError(
                f"--output_dir {config.output_dir} is also read from: choose another --output_dir than a folder of "
                f"--{name}"
            )


def check_few_step(config, opened):
    """Every tensor of --pcm_weights has its layer in the UNet, and --prior is one."""
    few_step = FewStepWeights(config.pcm_weights)
    layers = few_step.match(read_shapes(opened["unet_main"].files))
    for folder in config.validation_image:
        check_prior(config.prior, Path(folder), list_frames(folder)[: config.nframes])
    return f"{few_step.steps} steps, {len(layers)} layers; validation as deployed, prior {config.prior}"


def open_dataset(config):
    broken = {}
    if config.scan_data:
        # Every process finds the same; the machine's cores are shared out, and one of them writes it down.
        processes = max(1, len(os.sched_getaffinity(0)) // count_processes_here())
        first = int(os.environ.get("RANK", 0)) == 0
        everything = list_videos(config) + (scan_pairs(config.paired_root) if config.paired_root else [])
        broken = scan_frames(everything, Path(config.output_dir, "scan.json"), processes, remember=first)
    dataset = FinetuneDataset(config, broken=broken)
    if config.scan_data and first:
        for reason in dataset.left_out:
            print(f"broken: {reason}", flush=True)
    return dataset, describe_dataset(config, dataset)


def describe_dataset(config, dataset):
    """What is trained on, and what is left out, in words."""
    videos = set(dataset.videos)
    frames = sum(len(video.frames) for video in videos)
    what = "pairs" if config.paired_root and not dataset.pairs else "videos"
    found = f"{len(videos)} {what}, {frames} frames, {len(dataset)} clips an epoch"
    if dataset.pairs:
        frames = sum(len(video.frames) for video in dataset.pairs)
        found += f", {dataset.paired_share:.0%} of them of {len(dataset.pairs)} pairs, {frames} frames"
    if dataset.holes.objects:
        found += f", objects of {len(dataset.holes.objects.videos)} annotated video(s)"
    if dataset.holes.own:
        found += f", own masks of {len(dataset.holes.own)} video(s)"
    for count, reason in (
        (len(dataset.too_short), f"shorter than {dataset.span} frames"),
        (len(dataset.validation_videos), "used for validation"),
        (len(dataset.left_out), f"broken, such as {dataset.left_out[0]}" if dataset.left_out else ""),
    ):
        if count:
            found += f"; {count} left out: {reason}"
    return found


def check_validation_videos(config):
    """Every mask has its frame's size. (The lists were compared when the flags were parsed.)"""
    if not config.validation_image:
        return "off (--validation_image and --validation_mask turn it on)"
    if not config.validation_steps:
        return "off (--validation_steps=0)"
    counts = []
    for folders in zip(config.validation_image, config.validation_mask, strict=True):
        pairs = pair_by_name(*folders)
        for frame, mask in pairs:
            sizes = [image_size(path) for path in (frame, mask)]
            if sizes[0] != sizes[1]:
                raise InputError(
                    f"{mask} is {sizes[1]}, its frame {frame} {sizes[0]}: --validation_mask needs masks of the frames' "
                    "size"
                )
        counts.append(len(pairs))
    span = frames_spanned(config)
    short = sum(count < span for count in counts)
    note = f"; {short} shorter than {span} frames: sampled, but not in the held-out loss" if short else ""
    return f"{len(counts)} videos of {', '.join(map(str, counts))} frames with masks{note}"


def open_networks(config):
    """The networks that score validation videos, where there are any."""
    networks = load_networks(config, "cpu") if config.validation_steps and config.validation_image else []
    names = [SCORES[name].heading for network in networks for name in network.columns]
    return networks, ", ".join(["PSNR, SSIM, E_warp", *names])


def find_start(config, stage, start):
    """((TrainerState, checkpoint or None, notes), words) for --resume_from_checkpoint.

    Args:
        start: a fresh run's state, or None where the checks before have failed.
    """
    folder, skipped = choose_checkpoint(config)
    if folder is None:
        return (start, None, []), "none yet: a fresh start" if config.resume_from_checkpoint else "a fresh start"
    state = TrainerState.read(folder)
    if state.stage != stage.number:
        raise InputError(f"{folder} is of stage {state.stage}, this is stage {stage.number}: use another --output_dir")
    newer = [path for step, path in list_checkpoints(config.output_dir) if step > state.global_step]
    if newer and config.resume_from_checkpoint != "latest":
        raise InputError(
            f"{newer[-1]} is newer than {folder}: remove it, or continue {folder.name} in another --output_dir"
        )
    notes = [f"skipped: {line}" for line in skipped]
    words = f"resuming from {folder} at step {state.global_step}"
    if start is not None:
        state, changes = go_on_from(folder, state, start, resume_policy(), config.resume_anyway)
        notes += changes
    return (state, folder, notes), words


def choose_checkpoint(config):
    """(folder to resume from, or None, [why a newer one is passed over]) for --resume_from_checkpoint."""
    wanted, output_dir = config.resume_from_checkpoint, config.output_dir
    if not wanted:
        if present := list_checkpoints(output_dir):
            raise InputError(
                f"--output_dir {output_dir} holds checkpoints of an earlier run, such as {present[-1][1].name}: "
                "resume with --resume_from_checkpoint=latest, or choose another --output_dir"
            )
        return None, []
    if wanted == "latest":
        folder, skipped = find_latest(output_dir)
        if folder is None and skipped:
            raise InputError(f"none of the checkpoints in {output_dir} is complete; {skipped[0]}")
        return folder, skipped
    folder = Path(wanted)
    if not folder.is_dir():
        folder = Path(output_dir, folder.name)
    if not folder.is_dir():
        raise InputError(f"--resume_from_checkpoint={wanted} is no folder: a checkpoint-<step> folder was needed")
    return folder, []


def refuse_stale(config, found):
    """Raises InputError where a run that ended after the checks, and before the lock, has saved another checkpoint."""
    newest, _ = find_latest(config.output_dir)
    if config.resume_from_checkpoint in (None, "", "latest") and newest != found.checkpoint:
        raise InputError(f"{newest} has been written meanwhile: run the same command again")


def count_parameters(stage, opened):
    """(trained, frozen) parameters of the models; a BrushNet that is not given is as large as the UNet."""
    sizes = {name: (weights or opened["unet_main"]).parameters for name, weights in opened.items()}
    trained = sum(size for name, size in sizes.items() if name in stage.model_class.trains)
    return trained, sum(sizes.values()) - trained


def check_disk_space(config, stage, opened):
    """One checkpoint has to fit: it is written before an old one is deleted."""
    trained, frozen = count_parameters(stage, opened)
    needed = trained * (CHECKPOINT_BYTES - EIGHT_BIT_SAVES * config.use_8bit_adam - BF16_SAVES * config.bf16_weights)
    needed += trained * EMA_BYTES * (config.ema_decay is not None)
    if distributed_type() != "ddp":
        needed += trained * SHARD_BYTES + frozen * FROZEN_BYTES
    folder = Path(config.output_dir).resolve()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    if free < needed:
        raise InputError(
            f"a checkpoint takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {config.output_dir}: free some "
            "space, or choose another --output_dir"
        )
    return f"{free / 1e9:.0f} GB free, a checkpoint takes {needed / 1e9:.1f} GB"


def check_memory(config, stage, opened):
    """Weights, gradients and what is kept of them must fit the GPU; activations are an estimate from measured runs."""
    fixed, activations = estimate_memory(config, stage, opened)
    about = "more than" if config.mixed_precision == "no" else "about"  # what was measured was half precision
    if not gpu_is_used():
        return f"{about} {fixed + activations:.1f} GiB; no GPU was found"
    gpus = range(min(count_processes_here(), torch.cuda.device_count()))  # the smallest decides
    total = min(torch.cuda.get_device_properties(i).total_memory for i in gpus) / 2**30
    if fixed > total:
        raise InputError(
            f"weights, gradients and optimizer state take {fixed:.0f} GiB, the GPU has {total:.0f}: use "
            "--use_8bit_adam, --bf16_weights, or several GPUs with ACCELERATE_CONFIG=configs/accelerate/fsdp.yaml"
        )
    return f"{about} {fixed + activations:.0f} GiB, the GPU has {total:.0f}"


def estimate_memory(config, stage, opened):
    """GiB of a GPU: (of weights, gradients and optimizer state; of activations)."""
    trained, frozen = count_parameters(stage, opened)
    processes = count_processes()
    fixed = trained * TRAINED_BYTES + frozen * FROZEN_BYTES
    fixed /= processes if distributed_type() == "fsdp" else 1
    fixed += trained * EMA_BYTES * (config.ema_decay is not None)
    fixed -= trained * (EIGHT_BIT_SAVES * config.use_8bit_adam + 2 * BF16_SAVES * config.bf16_weights)  # gradients too
    frames = config.train_batch_size * config.nframes * math.prod(sides(config.resolution)) / 512**2
    width = list_of(opened["unet_main"].config["block_out_channels"])[0] / 320
    activations = frames * width * stage.gib_per_frame[2 if config.gradient_checkpointing else int(config.compile)]
    several = distributed_type() == "ddp" and processes * config.gradient_accumulation_steps > 1
    if several or (config.cuda_graph and config.gradient_checkpointing):
        # Gradients, which the measured runs did not hold in the forward pass.
        gradients = trained * (2 if config.bf16_weights else 4) / 2**30
        beside = FORWARD_GIB_PER_FRAME * frames * width if config.gradient_checkpointing else math.inf
        activations += min(gradients, beside)
    return fixed / 2**30, activations
