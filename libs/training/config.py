"""Every setting of a training run, once: flag, default, meaning, check, variable, and what resuming makes of a change.

The parser, the checks, the shell scripts' variables, what checkpoints record and compare, the model card and
docs/settings.md (python -m libs.training.settings_page > docs/settings.md) follow from here.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches

from common.command_line import (
    below_one,
    build_settings_parser,
    check_settings,
    default_of,
    one_or_more,
    parses,
    positive,
    python_list,
    require,
    seed_range,
    share,
    zero_or_more,
)
from common.distributed import DTYPES
from common.errors import InputError
from dataset.crop import RESOLUTION_HELP, multiples_of_8, resolution
from dataset.finetune_dataset import PROMPT
from dataset.images import pair_by_name
from dataset.mask_kinds import DEFAULT_MIX, MIX_HELP, NO_GROWTH, parse_growth, parse_mix
from dataset.pairs import settle_paired_share
from dataset.utils import FULL_SPAN, MASK_SPAN_HELP, mask_span, split_mask_span
from libs.checkpoints.checkpoint import HELD_OUT
from libs.checkpoints.resume import BATCH, CONTENT, LOGGED, OPTIMIZER, REFUSED, VIDEOS, ResumePolicy
from libs.training.loss_weights import loss_weights


def setting(
    default,
    help,
    *,
    group=None,  # heading in --help and in docs/settings.md; None: that of the setting before
    metavar=None,
    choices=None,
    parse=None,  # text -> value, where the field's type does not do
    check=None,  # value -> what was needed, or None
    default_text=None,  # where the default's value does not explain itself
    variable=None,  # of the shell scripts
    on_at=("1",),  # the variable's values that turn a flag on
    shell_default=None,  # theirs, where it is not the flag's
    may_be_empty=False,  # an empty variable is a value; elsewhere it means the default
    launcher=None,  # the launcher decides; in words, how
    on_change=None,  # what resuming makes of another value; None: nothing, it is not recorded
    per_machine=False,  # machines of one run may differ in it
    on_card=False,  # the model card says it
    sets_clips=False,  # the fixed clips of the held-out loss follow from it
    flag=True,
):
    """A field of a dataclass of settings."""
    metadata = {name: value for name, value in locals().items() if name != "default"}
    default = {"default_factory": default} if callable(default) else {"default": default}
    return field(**default, metadata=metadata)


def other_default(name, default):
    """A setting of both stages, with a stage's own default."""
    return field(default=default, metadata=TrainConfig.__dataclass_fields__[name].metadata)


# fmt: off
@dataclass
class TrainConfig:
    """The settings of both stages."""

    base_model_name_or_path: str = setting(
        "weights/stable-diffusion-v1-5", group="models", metavar="DIR", per_machine=True,
        help="Stable Diffusion 1.5: tokenizer, text_encoder and scheduler are taken from it")
    vae_path: str = setting(
        "weights/sd-vae-ft-mse", "VAE folder, or one with vae/ in it", metavar="DIR", per_machine=True)
    tokenizer_name: str | None = setting(
        None, "another tokenizer folder than the base model's", metavar="DIR", per_machine=True)
    revision: str | None = setting(None, "revision of models that are named by their Hugging Face Hub name")
    variant: str | None = setting(None, 'variant of weight files, such as "fp16"')

    davis_root: str = setting(
        "dataset/DAVIS", "DAVIS-2017's root; '' leaves it out", group="data", metavar="DIR",
        variable="DAVIS_ROOT", may_be_empty=True, on_change=VIDEOS, per_machine=True)
    ytvos_root: str = setting(
        "dataset/YTBV", "YouTube-VOS's root; '' leaves it out", metavar="DIR",
        variable="YTVOS_ROOT", may_be_empty=True, on_change=VIDEOS, per_machine=True)
    paired_root: str | None = setting(
        None, "pairs: per video with/, without/ and masks/, with an object, without it, and where it is", metavar="DIR",
        variable="PAIRED_ROOT", on_change=VIDEOS, per_machine=True)
    paired_share: float | None = setting(
        None, "share of the clips that come from pairs", metavar="P", check=share, variable="PAIRED_SHARE",
        default_text="0.3 with --paired_root, 1 where it is the only data", on_change=LOGGED, on_card=True)
    resolution: int | str = setting(
        512, RESOLUTION_HELP, metavar="PX|WxH", parse=resolution, check=multiples_of_8,
        variable="RESOLUTION", on_change=REFUSED, on_card=True, sets_clips=True)
    random_crop: bool = setting(
        False, "crop each clip at a random position instead of the centre; without the latent cache",
        variable="RANDOM_CROP", on_change=LOGGED, on_card=True, sets_clips=True)
    nframes: int = setting(
        10, "frames per clip", check=one_or_more,
        variable="NFRAMES", on_change=REFUSED, on_card=True, sets_clips=True)
    frame_stride: int = setting(
        1, "a clip takes every Nth frame of its video", check=one_or_more,
        variable="FRAME_STRIDE", on_change=REFUSED, on_card=True, sets_clips=True)
    mask_span: tuple = setting(
        FULL_SPAN, MASK_SPAN_HELP, metavar="MIN,MAX", parse=mask_span, default_text="0.3333,1",
        on_change=LOGGED, on_card=True, sets_clips=True)
    mask_original_margins: bool = setting(  # of --mask_span=original
        False, "", flag=False, on_change=LOGGED, sets_clips=True)
    mask_mix: str = setting(
        DEFAULT_MIX, MIX_HELP, metavar="KIND=SHARE,...", check=parses(parse_mix),
        variable="MASK_MIX", on_change=LOGGED, on_card=True, sets_clips=True)
    mask_growth: str = setting(
        NO_GROWTH, "pixels that a clip's holes grow to each side, drawn between two bounds; below 0 they shrink",
        metavar="MIN,MAX", check=parses(parse_growth),
        variable="MASK_GROWTH", on_change=LOGGED, on_card=True, sets_clips=True)
    mask_border: float = setting(
        0.0, "share of clips whose hole may touch the frame's border and be up to half outside", metavar="P",
        check=share, variable="MASK_BORDER", on_change=LOGGED, on_card=True, sets_clips=True)
    mask_root: str | None = setting(
        None, "a folder of masks per video, whose objects are borrowed as well as those of the datasets' Annotations/",
        metavar="DIR", variable="MASK_ROOT", on_change=VIDEOS, per_machine=True)
    masks_of_videos: str | None = setting(
        None, "a folder of masks per training video: a video named there has these holes, or a drawn one where a "
        "window has none", metavar="DIR", variable="MASKS_OF_VIDEOS", on_change=VIDEOS, per_machine=True)
    paste: float = setting(
        0.0, "share of clips into which another annotated video's object is pasted, to be removed", metavar="P",
        check=share, variable="PASTE", on_change=LOGGED, on_card=True, sets_clips=True)
    prompt: str = setting(
        PROMPT, "what the text encoder reads for every clip; run_diffueraser.py and eval_DiffuEraser.py take it over",
        metavar="TEXT", variable="PROMPT", may_be_empty=True, on_change=LOGGED, on_card=True, sets_clips=True)
    proportion_empty_prompts: float = setting(
        0.0, "share of clips trained with an empty prompt instead of --prompt", metavar="P", check=share,
        variable="PROPORTION_EMPTY_PROMPTS", on_change=LOGGED, sets_clips=True)
    known_frames: float = setting(
        0.0, "share of clips in which some frames have no hole, as in the second pass over a long clip; for stage 2",
        metavar="P", check=share, variable="KNOWN_FRAMES", on_change=LOGGED, sets_clips=True)
    scan_data: bool = setting(False, "read every frame before training; what is broken is left out")
    max_broken_share: float = setting(
        0.05, "stop when more than this share of the clips met came from broken videos", metavar="P", check=share)
    latent_cache: str | None = setting(
        None, "keep what the VAE makes of whole frames in this folder, for later epochs, runs and the other stage",
        metavar="DIR", variable="LATENT_CACHE", shell_default="latent-cache", may_be_empty=True, per_machine=True)
    latent_cache_gb: float = setting(
        16.0, "size above which nothing is added to it", metavar="GB", check=positive, per_machine=True)
    dataloader_num_workers: int = setting(
        lambda: min(4, len(os.sched_getaffinity(0))), "processes that load clips; 0: none", check=zero_or_more,
        default_text="one per core, at most 4", variable="DATALOADER_NUM_WORKERS", per_machine=True)

    output_dir: str = setting(
        "finetune-stage1", "checkpoints and results", group="run", metavar="DIR",
        variable="OUTPUT_DIR", per_machine=True)
    seed: int = setting(
        42, "data order, masks and noise follow from it", check=seed_range,
        variable="SEED", on_change=REFUSED, on_card=True, sets_clips=True)
    train_batch_size: int = setting(
        1, "clips per device and forward pass", check=one_or_more,
        variable="TRAIN_BATCH_SIZE", on_change=BATCH, on_card=True)
    gradient_accumulation_steps: int = setting(
        1, "forward passes per optimizer step", check=one_or_more,
        variable="GRADIENT_ACCUMULATION_STEPS", on_change=BATCH, on_card=True)
    num_train_epochs: int = setting(10000, "epochs, where --max_train_steps is not given", check=one_or_more)
    max_train_steps: int | None = setting(
        None, "optimizer steps in all, the same number in every process", check=one_or_more,
        variable="MAX_TRAIN_STEPS", on_change=LOGGED)
    mixed_precision: str = setting(
        lambda: os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), "overrides accelerate's own setting",
        choices=tuple(DTYPES), variable="MIXED_PRECISION", on_change=LOGGED, on_card=True,
        launcher="that of `ACCELERATE_CONFIG`, else `bf16` with `LOW_MEMORY=2`, `fp16` on a GPU and `no` without")
    gradient_checkpointing: bool = setting(
        False, "recompute layers in the backward pass: less memory", variable="LOW_MEMORY", on_at=("1", "2"),
        on_change=LOGGED)
    compile: bool = setting(
        False, "compile the models when a run starts: faster steps, less memory", variable="COMPILE", on_change=LOGGED,
        launcher="1 on a GPU with a C compiler, unless `LOW_MEMORY` or FSDP")
    cuda_graph: bool = setting(
        False, "replay forward and backward pass as one CUDA graph: faster, more memory; one machine", on_change=LOGGED,
        variable="CUDA_GRAPH",
        launcher="as `COMPILE`; 0 with `LOW_MEMORY`, several machines, or several GPUs that accumulate gradients")
    distributed_timeout: int = setting(
        1800, "how long a process waits for the others before it ends the run", metavar="SECONDS", check=one_or_more)
    allow_tf32: bool = setting(False, "TF32 in fp32 matrix products on Ampere and newer GPUs")
    check_only: bool = setting(False, "check weights, data, disk and memory, print a table, and exit")

    checkpointing_steps: int = setting(
        2000, "save every N optimizer steps", group="checkpoints", check=one_or_more, variable="CHECKPOINTING_STEPS")
    checkpoints_total_limit: int | None = setting(
        None, "keep the newest N only", check=one_or_more, default_text="all", variable="CHECKPOINTS_TOTAL_LIMIT")
    keep_best_checkpoint: bool = setting(False, "keep the best one too, by --best_by")
    best_by: str = setting(
        HELD_OUT, "what the best checkpoint is chosen by: the held-out loss, or a score of the validation videos, as "
        "deployed with --pcm_weights; these are then scored for every checkpoint",
        choices=(HELD_OUT, "psnr_hole", "lpips_hole"), variable="BEST_BY", on_change=LOGGED)
    resume_from_checkpoint: str | None = setting(
        None, 'a checkpoint folder, or "latest": the newest in --output_dir, a fresh start if there is none',
        metavar="DIR", variable="RESUME_FROM_CHECKPOINT", shell_default="latest", may_be_empty=True, per_machine=True)
    resume_anyway: bool = setting(
        False, "resume although settings or initial weights have changed that the checkpoint's meaning depends on")

    loss_weights: Sequence = setting(
        lambda: [1.0, 1.0, 1.0], "what squared errors count in the hole, on its rim and in the rest of the picture; "
        "the loss is divided by their sum over the clip", group="loss and averaging", metavar="HOLE,RIM,REST",
        parse=loss_weights, default_text="1,1,1", variable="LOSS_WEIGHTS", shell_default="1,1,1", on_change=LOGGED,
        on_card=True)
    loss_rim: int = setting(
        2, "width of that rim in latents, of 8 pixels each", check=zero_or_more, variable="LOSS_RIM", on_change=LOGGED)

    ema_decay: float | None = setting(
        None, "also keep an exponential moving average of the weights, D old + (1 - D) new after every step; it is "
        "validated and converted", metavar="D", check=below_one, variable="EMA_DECAY", on_change=LOGGED,
        on_card=True, default_text="off")

    learning_rate: float = setting(
        5e-6, "peak learning rate", group="optimizer", metavar="LR", check=positive,
        variable="LEARNING_RATE", on_change=LOGGED, on_card=True)
    scale_lr: bool = setting(False, "multiply the learning rate by the global batch size", on_change=LOGGED)
    lr_scheduler: str = setting(
        "constant", "schedule over optimizer steps", on_change=LOGGED, on_card=True,
        choices=("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"))
    lr_warmup_steps: int = setting(
        500, "optimizer steps of warm-up, where there is one", check=zero_or_more, on_change=LOGGED)
    lr_num_cycles: int = setting(1, "restarts of cosine_with_restarts", on_change=LOGGED)
    lr_power: float = setting(1.0, "power of polynomial", check=zero_or_more, on_change=LOGGED)
    use_8bit_adam: bool = setting(
        False, "AdamW with 8-bit state, from bitsandbytes or torchao", variable="LOW_MEMORY", on_at=("1", "2"),
        on_change=OPTIMIZER)
    bf16_weights: bool = setting(
        False, "keep trained weights and their gradients in bf16, rounded stochastically; with --use_8bit_adam of "
        "bitsandbytes, in mixed precision bf16", variable="LOW_MEMORY", on_at=("2",), on_change=OPTIMIZER)
    adam_beta1: float = setting(0.9, "decay of the mean of gradients", check=below_one, on_change=LOGGED)
    adam_beta2: float = setting(0.999, "decay of the mean of squared gradients", check=below_one, on_change=LOGGED)
    adam_weight_decay: float = setting(1e-2, "decoupled weight decay", check=zero_or_more, on_change=LOGGED)
    adam_epsilon: float = setting(1e-8, "added to the denominator", check=zero_or_more, on_change=LOGGED)
    max_grad_norm: float = setting(
        1.0, "gradients are clipped to this norm", metavar="NORM", check=positive, on_change=LOGGED)

    logging_dir: str = setting(
        "logs-finetune-stage1", "trackers and validation samples, a folder in --output_dir",
        group="logging and validation", metavar="DIR")
    logging_steps: int = setting(10, "a line in the log every N optimizer steps", check=one_or_more)
    report_to: str = setting("tensorboard", 'a tracker as accelerate knows it, "all" or "none"')
    tracker_project_name: str = setting("train_diffuEraser", "the trackers' project", metavar="NAME")
    validation_steps: int = setting(
        2000, "score and sample the validation videos every N optimizer steps and after the first; 0: never",
        check=zero_or_more, variable="VALIDATION_STEPS")
    validation_image: Sequence = setting(
        list, "Python list of folders of frames; they are left out of training", metavar="LIST", parse=python_list,
        on_change=LOGGED, per_machine=True, sets_clips=True,
        launcher="the first two videos of DAVIS's `val.txt` that have masks")
    validation_mask: Sequence = setting(
        list, "Python list of folders of masks, any value above 0 = hole, with the frames' names", metavar="LIST",
        parse=python_list, per_machine=True, launcher="their `Annotations/480p/`")
    validation_prompt: Sequence | None = setting(
        None, "Python list of prompts", metavar="LIST", parse=python_list, default_text="--prompt for every video")
    probe_clips: int = setting(
        16, "held-out loss: on N fixed clips of the validation videos, with fixed masks, timesteps and noises; 0: off",
        check=zero_or_more, on_change=LOGGED, sets_clips=True)
    validation_minutes: float = setting(
        10.0, "a validation begins no more videos after this time; those left are named", metavar="MIN", check=positive)
    pcm_weights: str | None = setting(
        None, "PCM's few-step weights: validation then fills holes as deployed, in 2 steps instead of 50 or 20",
        metavar="FILE", variable="PCM_WEIGHTS", per_machine=True)
    prior: str = setting(
        "telea", "what that starts from: telea, median or none, made on the spot, or a folder with a folder of frames "
        "per validation video, its object filled (synthetic holes start from telea then)", metavar="NAME|DIR",
        per_machine=True)
    validate_as_trained: bool = setting(False, "with --pcm_weights: also fill holes as without them")
    lpips_weights: str | None = setting(
        None, "score LPIPS too: folder with alexnet-owt-7be5be79.pth of torchvision and alex.pth of lpips 0.1",
        metavar="DIR", variable="LPIPS_WEIGHTS", per_machine=True)
    clip_weights: str | None = setting(
        None, "score TC too, the cosine of neighbouring frames' CLIP features: a CLIP model's folder or Hub name",
        metavar="DIR|NAME", variable="CLIP_WEIGHTS", per_machine=True)


@dataclass
class Stage1Config(TrainConfig):
    """UNet2D and BrushNet are trained."""

    nframes: int = other_default("nframes", 10)
    output_dir: str = other_default("output_dir", "finetune-stage1")
    logging_dir: str = other_default("logging_dir", "logs-finetune-stage1")
    pretrained_stage1_path: str | None = setting(
        None, "weights to start from: unet_main/ (UNet2D, or a UNetMotion whose 2D part is taken) and brushnet/; "
        "without it the UNet is the base model's", group="models", metavar="DIR", variable="PRETRAINED_STAGE1_PATH",
        shell_default="weights/diffuEraser", may_be_empty=True, on_change=CONTENT, per_machine=True)
    brushnet_model_name_or_path: str | None = setting(
        None, "BrushNet to start from, where --pretrained_stage1_path is not given", metavar="DIR",
        default_text="a copy of the UNet", on_change=CONTENT, per_machine=True)


@dataclass
class Stage2Config(TrainConfig):
    """The motion modules are trained."""

    nframes: int = other_default("nframes", 22)
    output_dir: str = other_default("output_dir", "finetune-stage2")
    logging_dir: str = other_default("logging_dir", "logs-finetune-stage2")
    pretrained_stage1: str = setting(
        "converted_weights/finetuned-stage1", "converted stage 1: unet_main/ and brushnet/, both frozen here",
        group="models", metavar="DIR", variable="PRETRAINED_STAGE1", on_change=CONTENT, per_machine=True)
    motion_adapter_path: str = setting(
        "weights/animatediff-motion-adapter-v1-5-2", "motion modules to start from: a MotionAdapter folder, or a "
        "UNetMotion's such as weights/diffuEraser/unet_main, which works better", metavar="DIR",
        variable="MOTION_ADAPTER", on_change=CONTENT, per_machine=True)
# fmt: on

CONFIGS = {1: Stage1Config, 2: Stage2Config}

# Variables of the shell scripts that belong to no flag: (name, default, meaning).
LAUNCHER_VARIABLES = (
    ("WEIGHTS", "`weights`", "the folder that the models' defaults above start with"),
    ("NUM_PROCESSES", "1; with `ACCELERATE_CONFIG` that file's number, else all GPUs", "GPUs to use on each machine"),
    ("OMP_NUM_THREADS", "all cores, shared out", "CPU threads of each process, without a GPU"),
    ("ACCELERATE_CONFIG", "`configs/accelerate/` `one_gpu.yaml`, `multi_gpu.yaml` or `multi_node.yaml`",
     "accelerate's configuration: one of these, `fsdp.yaml` or your own, whose processes, machines, address and "
     "precision count unless the variable is set"),
    ("NUM_MACHINES", "1", "how many machines"),
    ("MACHINE_RANK", "0; under SLURM the node's number", "which of them this one is"),
    ("MAIN_ADDRESS", "", "name or address of machine 0"),
    ("MAIN_PORT", "29500; on one machine any free one", "a port of machine 0"),
    ("LOG", "`finetune-stage<n>.log`, `-machine<rank>` beyond the first", "the log, which is appended to; set it to "
     "another one on each of several machines"),
    ("PYTHON", "the active environment's or `.venv/bin/python`", "the interpreter"),
)  # fmt: skip

# Flags of the original scripts that are gone, and what to use instead.
REMOVED_FLAGS = {
    "--train_data_dir": "folders of frames replaced videos: use --davis_root and --ytvos_root",
    "--csv_file": "folders of frames replaced the list of videos: use --davis_root and --ytvos_root",
    "--video_column": "folders of frames replaced the list of videos: use --davis_root and --ytvos_root",
    "--caption_column": "every clip is trained with one prompt: use --prompt or --proportion_empty_prompts",
    "--max_train_samples": "shorten ImageSets/2017/train.txt, or use --max_train_steps",
    "--cache_dir": "set the environment variable HF_HOME",
    "--hub_token": "nothing is uploaded: use `hf upload` on the converted folders",
    "--hub_model_id": "nothing is uploaded: use `hf upload` on the converted folders",
    "--push_to_hub": "nothing is uploaded: use `hf upload` on the converted folders",
    "--enable_xformers_memory_efficient_attention": "torch's own efficient attention is always on: drop it",
    "--set_grads_to_none": "gradients are set to None where that saves memory: drop the flag",
}


def build_parser(stage):
    """The parser of one stage."""
    return build_settings_parser(CONFIGS[stage.number], stage.description, REMOVED_FLAGS)


def parse_args(stage, argv=None):
    """The stage's config; raises InputError for whatever can be found wrong without weights or data."""
    config = CONFIGS[stage.number](**vars(build_parser(stage).parse_args(argv)))
    split_mask_span(config)
    check_settings(config)
    settle_paired_share(config)
    check_mask_root(config)
    check_validation(config)
    return config


def check_mask_root(config):
    """Pasted objects need frames, which it has none of: holes alone take shapes from there."""
    require(
        not config.mask_root or parse_mix(config.mask_mix).get("object"),
        f"--mask_root={config.mask_root}: no hole takes its shapes from there; add object to --mask_mix, such as "
        "blob=0.7,object=0.3, or leave it out",
    )


def check_validation(config):
    """The three validation lists belong together, entry by entry, frame by frame; what the best checkpoint is chosen by
    is measured."""
    if config.validation_prompt is None:
        config.validation_prompt = [config.prompt] * len(config.validation_image)
    lists = {name: getattr(config, name) for name in ("validation_image", "validation_mask", "validation_prompt")}
    if len({len(entries) for entries in lists.values()}) > 1:
        lengths = ", ".join(f"--{name} has {len(entries)}" for name, entries in lists.items())
        raise InputError(f"the validation lists differ in length: {lengths} entries; give one of each per video")
    for images, masks in zip(config.validation_image, config.validation_mask, strict=True):
        pair_by_name(images, masks)
    scored = config.validation_steps and config.validation_image
    if config.best_by == HELD_OUT:
        require(
            not config.keep_best_checkpoint or (scored and config.probe_clips),
            "--keep_best_checkpoint needs the held-out loss to choose by, which is off: give --validation_image and "
            "--validation_mask, with --validation_steps and --probe_clips above 0, or drop it",
        )
    else:
        require(
            scored,
            f"--best_by={config.best_by} needs validation videos to score: give --validation_image and "
            f"--validation_mask, or use --best_by={HELD_OUT}",
        )
    if config.best_by.startswith("lpips"):
        require(config.lpips_weights, f"--best_by={config.best_by} needs --lpips_weights")


def without_effect(config):
    """A line about each setting that was changed, and that others leave without effect. Not an error: command lines of
    the original scripts, and variables that are always set, go on working."""
    scheduler, (_, rim, rest) = config.lr_scheduler, config.loss_weights
    validates = bool(config.validation_image and config.validation_steps)
    read = (
        ("lr_warmup_steps", scheduler != "constant", "--lr_scheduler=constant has no warm-up"),
        ("lr_num_cycles", scheduler == "cosine_with_restarts", f"--lr_scheduler={scheduler} has no restarts"),
        ("lr_power", scheduler == "polynomial", f"--lr_scheduler={scheduler} has no power"),
        ("loss_rim", rim != rest, "--loss_weights are the same on the rim and in the rest"),
        ("pcm_weights", validates, "validation is off"),
        ("prior", config.pcm_weights and validates, "only validation with --pcm_weights starts from one"),
    )
    defaults = {f.name: default_of(f) for f in fields(config)}
    changed = ((name, is_read, why) for name, is_read, why in read if getattr(config, name) != defaults[name])
    return [f"--{name}={getattr(config, name)} has no effect: {why}" for name, is_read, why in changed if not is_read]


def settings_with(key):
    """{name: value} of the entry `key` of settings, of both stages, where it is set."""
    return {f.name: f.metadata[key] for cls in CONFIGS.values() for f in fields(cls) if f.metadata[key]}


def resume_policy():
    """What checkpoints record, and what resuming makes of a change."""
    on_change = {name: policy for name, policy in settings_with("on_change").items() if policy not in (CONTENT, VIDEOS)}
    defaults = {f.name: default_of(f) for f in fields(TrainConfig) if f.name in on_change}
    return ResumePolicy(on_change, defaults, what_sets_clips)


def what_sets_clips(settings):
    """The part of a run's recorded settings that the fixed clips of the held-out loss follow from.

    A setting that is newer than the record had its default.
    """
    defaults = resume_policy().defaults
    clips = {name: settings.get(name, defaults[name]) for name in settings_with("sets_clips")}
    if clips["paste"] or parse_mix(clips["mask_mix"]).get("object"):  # one of these videos', by its number
        clips["hole_videos"] = settings.get("hole_videos")
    return clips


def shell_variables():
    """Names of all variables that the shell scripts read."""
    return {*settings_with("variable").values(), *(name for name, _, _ in LAUNCHER_VARIABLES)}


def variables_that_look_misspelt(stage_number, environ):
    """A line about each variable that the stage does not read, but whose name is a flag's, or almost that of a variable
    which it reads and which is not set. Not an error: it may be another program's."""
    settings = {f.name.upper(): f for f in fields(CONFIGS[stage_number]) if f.metadata["flag"]}
    by_variable = {f.metadata["variable"] for f in settings.values()} - {None}
    read = {*by_variable, *(name for name, _, _ in LAUNCHER_VARIABLES)}
    alike = read - {"OMP_NUM_THREADS"}  # other libraries' variables are
    lines = []
    for name in sorted(environ.keys() - read):
        if f := settings.get(name.upper()):
            meant = f.metadata["variable"] or f"--{f.name}, behind the command,"
        else:
            meant = next(iter(get_close_matches(name.upper(), alike, 1, cutoff=0.85)), None)
        if meant and meant not in environ:
            lines.append(f"{name} is set, which stage {stage_number} does not read: was {meant} meant?")
    return lines


def switches():
    """Variables that are 0 or 1."""
    all_fields = [f for config in CONFIGS.values() for f in fields(config) if f.type is bool and f.metadata["variable"]]
    several_values = {f.metadata["variable"] for f in all_fields if f.metadata["on_at"] != ("1",)}
    return sorted({f.metadata["variable"] for f in all_fields} - several_values)


def flags_from_environment(stage_number, environ):
    """The trainer's flags that follow from the shell scripts' variables and their own defaults: ["--nframes=10", ...].

    Defaults in weights/ follow WEIGHTS. What the launcher decides is left out: --validation_image, --validation_mask,
    --compile, --cuda_graph and --mixed_precision.
    """
    flags, weights = [], environ.get("WEIGHTS") or "weights"
    for f in fields(CONFIGS[stage_number]):
        meta, default = f.metadata, f.metadata["shell_default"] or default_of(f)
        in_weights = str(default).startswith("weights/")
        if meta["launcher"] or not (meta["variable"] or in_weights):
            continue
        value = environ.get(meta["variable"] or "")
        if value is None or (value == "" and not meta["may_be_empty"]):
            value = default.replace("weights", weights, 1) if in_weights else default
        if f.type is bool:
            flags += [f"--{f.name}"] if value in meta["on_at"] else []
        elif value is not None:
            flags.append(f"--{f.name}={value}")
    return flags
