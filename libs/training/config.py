"""The command line of both stages: flags, defaults, and every check that needs no weights."""

import argparse
import ast
import os

from common.command_line import HelpFormatter, Parser, require
from common.distributed import DTYPES
from common.errors import InputError
from dataset.finetune_dataset import PROMPT
from dataset.images import pair_by_name
from dataset.utils import FULL_SPAN

# Flags of the original scripts that are gone, and what to use instead.
REMOVED_FLAGS = {
    "--train_data_dir": "folders of frames replaced videos: use --davis_root and --ytvos_root",
    "--csv_file": "folders of frames replaced the list of videos: use --davis_root and --ytvos_root",
    "--video_column": "folders of frames replaced the list of videos: use --davis_root and --ytvos_root",
    "--caption_column": f"every clip is trained with the prompt '{PROMPT}': use --proportion_empty_prompts",
    "--max_train_samples": "shorten ImageSets/2017/train.txt, or use --max_train_steps",
    "--cache_dir": "set the environment variable HF_HOME",
    "--hub_token": "nothing is uploaded: use `hf upload` on the converted folders",
    "--hub_model_id": "nothing is uploaded: use `hf upload` on the converted folders",
    "--push_to_hub": "nothing is uploaded: use `hf upload` on the converted folders",
    "--enable_xformers_memory_efficient_attention": "torch's own efficient attention is always on: drop it",
    "--set_grads_to_none": "gradients are always set to None: drop the flag",
}
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


class Removed(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        raise InputError(f"{option_string} is gone: {REMOVED_FLAGS[option_string]}")


def python_list(text):
    """'["a", "b"]' as a list of strings; 'None' or nothing as an empty list."""
    try:
        value = ast.literal_eval(text) if text.strip() else []
    except (ValueError, SyntaxError):
        raise argparse.ArgumentTypeError(f'a Python list such as \'["a", "b"]\' was needed, not {text!r}') from None
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise argparse.ArgumentTypeError(f"a Python list of strings was needed, not {text!r}")
    return value


def mask_span(text):
    """'0.33,1' as two shares of a frame's side, or 'original' for the original's margins."""
    if text == "original":
        return text
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'original' or two numbers such as 0.33,1 were needed, not {text!r}"
        ) from None
    if not 0 < low <= high <= 1:
        raise argparse.ArgumentTypeError(f"0 < smallest <= largest <= 1 was needed, not {text!r}")
    return low, high


def add_mask_span(add):
    """The synthetic masks' flag; `split_mask_span` reads it."""
    add(
        "--mask_span",
        type=mask_span,
        default=FULL_SPAN,
        metavar="MIN,MAX",
        help="share of each side of the frame that a mask's box takes; 'original': the original code's smaller masks "
        f"(default: {FULL_SPAN[0]:.4f},{FULL_SPAN[1]:g})",
    )


def split_mask_span(args):
    """args.mask_span as two shares, args.mask_original_margins as a bool."""
    args.mask_original_margins = args.mask_span == "original"
    if args.mask_original_margins:
        args.mask_span = FULL_SPAN


def build_parser(stage):
    """The parser of one stage; `stage` gives the flags and defaults that differ."""
    parser = Parser(description=stage.description, allow_abbrev=False, formatter_class=HelpFormatter)

    group = parser.add_argument_group("models")
    add = group.add_argument
    add(
        "--base_model_name_or_path",
        default="weights/stable-diffusion-v1-5",
        metavar="DIR",
        help="Stable Diffusion 1.5: tokenizer, text_encoder and scheduler are taken from it",
    )
    add("--vae_path", default="weights/sd-vae-ft-mse", metavar="DIR", help="VAE folder, or one with vae/ in it")
    stage.add_model_flags(add)
    add("--tokenizer_name", metavar="DIR", help="another tokenizer folder than the base model's")
    add("--revision", help="revision of models that are named by their Hugging Face Hub name")
    add("--variant", help='variant of weight files, such as "fp16"')

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--davis_root", default="dataset/DAVIS", metavar="DIR", help="DAVIS-2017's root; '' leaves it out")
    add("--ytvos_root", default="dataset/YTBV", metavar="DIR", help="YouTube-VOS's root; '' leaves it out")
    add("--resolution", type=int, default=512, metavar="PX", help="side of the square crops, a multiple of 8")
    add("--nframes", type=int, default=stage.model_class.nframes, metavar="N", help="frames per clip")
    add_mask_span(add)
    add(
        "--proportion_empty_prompts",
        type=float,
        default=0.0,
        metavar="P",
        help=f"share of clips trained with an empty prompt instead of '{PROMPT}'",
    )
    add("--scan_data", action="store_true", help="read every frame before training; what is broken is left out")
    add(
        "--max_broken_share",
        type=float,
        default=0.05,
        metavar="P",
        help="stop when more than this share of the clips met came from broken videos",
    )
    add(
        "--latent_cache",
        metavar="DIR",
        help="keep what the VAE makes of whole frames in this folder, for later epochs, runs and the other stage",
    )
    add("--latent_cache_gb", type=float, default=16.0, metavar="GB", help="size above which nothing is added to it")
    cores = len(os.sched_getaffinity(0))
    add("--dataloader_num_workers", type=int, default=min(4, cores), metavar="N",
        help="processes that load clips; 0: none")  # fmt: skip

    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--output_dir", default=f"finetune-stage{stage.number}", metavar="DIR", help="checkpoints and results")
    add("--seed", type=int, default=42, help="data order, masks and noise follow from it")
    add("--train_batch_size", type=int, default=1, metavar="N", help="clips per device and forward pass")
    add("--gradient_accumulation_steps", type=int, default=1, metavar="N", help="forward passes per optimizer step")
    add("--num_train_epochs", type=int, default=10000, metavar="N", help="epochs, where --max_train_steps is not given")
    add("--max_train_steps", type=int, metavar="N", help="optimizer steps in all, the same number in every process")
    add("--mixed_precision", choices=tuple(DTYPES), default=os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        help="overrides accelerate's own setting")  # fmt: skip
    add("--gradient_checkpointing", action="store_true", help="recompute layers in the backward pass: less memory")
    add("--compile", action="store_true", help="compile the models in the first step: faster steps, less memory")
    add(
        "--cuda_graph",
        action="store_true",
        help="replay forward and backward pass as one CUDA graph: faster, more memory; one GPU",
    )
    add("--distributed_timeout", type=int, default=1800, metavar="SECONDS",
        help="how long a process waits for the others before it ends the run")  # fmt: skip
    add("--allow_tf32", action="store_true", help="TF32 in fp32 matrix products on Ampere and newer GPUs")

    add("--check_only", action="store_true", help="check weights, data, disk and memory, print a table, and exit")

    group = parser.add_argument_group("checkpoints")
    add = group.add_argument
    add("--checkpointing_steps", type=int, default=2000, metavar="N", help="save every N optimizer steps")
    add("--checkpoints_total_limit", type=int, metavar="N", help="keep the newest N only (default: all)")
    add("--keep_best_checkpoint", action="store_true", help="keep the one with the lowest held-out loss too")
    add(
        "--resume_from_checkpoint",
        metavar="DIR",
        help='a checkpoint folder, or "latest": the newest in --output_dir, a fresh start if there is none',
    )

    add(
        "--resume_anyway",
        action="store_true",
        help="resume although settings or initial weights have changed that the checkpoint's meaning depends on",
    )

    group = parser.add_argument_group("optimizer")
    add = group.add_argument
    add("--learning_rate", type=float, default=5e-6, metavar="LR", help="peak learning rate")
    add("--scale_lr", action="store_true", help="multiply the learning rate by the global batch size")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="schedule over optimizer steps")
    add("--lr_warmup_steps", type=int, default=500, metavar="N", help="optimizer steps of warm-up, where there is one")
    add("--lr_num_cycles", type=int, default=1, metavar="N", help="restarts of cosine_with_restarts")
    add("--lr_power", type=float, default=1.0, help="power of polynomial")
    add("--use_8bit_adam", action="store_true", help="AdamW with 8-bit state, from bitsandbytes or torchao")
    add("--adam_beta1", type=float, default=0.9, help="decay of the mean of gradients")
    add("--adam_beta2", type=float, default=0.999, help="decay of the mean of squared gradients")
    add("--adam_weight_decay", type=float, default=1e-2, help="decoupled weight decay")
    add("--adam_epsilon", type=float, default=1e-8, help="added to the denominator")
    add("--max_grad_norm", type=float, default=1.0, metavar="NORM", help="gradients are clipped to this norm")

    group = parser.add_argument_group("logging and validation")
    add = group.add_argument
    add(
        "--logging_dir",
        default=f"logs-finetune-stage{stage.number}",
        metavar="DIR",
        help="trackers and validation samples, a folder in --output_dir",
    )
    add("--logging_steps", type=int, default=10, metavar="N", help="a line in the log every N optimizer steps")
    add("--report_to", default="tensorboard", help='a tracker as accelerate knows it, "all" or "none"')
    add("--tracker_project_name", default="train_diffuEraser", metavar="NAME", help="the trackers' project")
    add(
        "--validation_steps",
        type=int,
        default=2000,
        metavar="N",
        help="score and sample the validation videos every N optimizer steps and after the first; 0: never",
    )
    add(
        "--validation_image",
        type=python_list,
        default=[],
        metavar="LIST",
        help="Python list of folders of frames; they are left out of training",
    )
    add(
        "--validation_mask",
        type=python_list,
        default=[],
        metavar="LIST",
        help="Python list of folders of masks, any value above 0 = hole, with the frames' names",
    )
    add(
        "--validation_prompt",
        type=python_list,
        default=None,
        metavar="LIST",
        help=f"Python list of prompts (default: '{PROMPT}' for every video)",
    )
    add(
        "--probe_clips",
        type=int,
        default=16,
        metavar="N",
        help="held-out loss: on N fixed clips of the validation videos, with fixed masks, timesteps and noises; 0: off",
    )
    add(
        "--validation_minutes",
        type=float,
        default=10.0,
        metavar="MIN",
        help="a validation begins no more videos after this time; those left are named",
    )

    for flag in REMOVED_FLAGS:
        parser.add_argument(flag, nargs="?", action=Removed, help=argparse.SUPPRESS)
    return parser


def parse_args(stage, argv=None):
    """Parse and check; raises InputError for whatever can be found wrong without weights or data."""
    args = build_parser(stage).parse_args(argv)
    split_mask_span(args)

    positive = ("resolution", "nframes", "train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
                "checkpointing_steps", "logging_steps", "distributed_timeout")  # fmt: skip
    for name in positive:
        require(getattr(args, name) >= 1, f"--{name}={getattr(args, name)}: at least 1 was needed")
    for name in ("dataloader_num_workers", "lr_warmup_steps", "validation_steps", "probe_clips", "seed"):
        require(getattr(args, name) >= 0, f"--{name}={getattr(args, name)}: 0 or more was needed")
    for name in ("max_train_steps", "checkpoints_total_limit"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name}={value}: at least 1 was needed, or leave the flag out")
    require(
        args.mixed_precision in DTYPES, f"mixed precision {args.mixed_precision}: one of {', '.join(DTYPES)} was needed"
    )
    for name in ("adam_beta1", "adam_beta2"):
        value = getattr(args, name)
        require(0 <= value < 1, f"--{name}={value}: a number from 0 to below 1 was needed")
    for name in ("adam_epsilon", "adam_weight_decay"):
        require(getattr(args, name) >= 0, f"--{name}={getattr(args, name)}: 0 or more was needed")
    require(args.seed < 2**32, f"--seed={args.seed}: a number below 4294967296 was needed")
    nearest = max(8, round(args.resolution / 8) * 8)
    require(args.resolution % 8 == 0, f"--resolution={args.resolution}: a multiple of 8 was needed; use {nearest}")
    require(args.learning_rate > 0, f"--learning_rate={args.learning_rate}: a positive number was needed")
    require(args.latent_cache_gb > 0, f"--latent_cache_gb={args.latent_cache_gb}: a positive number was needed")
    minutes = args.validation_minutes
    require(minutes > 0, f"--validation_minutes={minutes}: a positive number was needed")
    require(args.max_grad_norm > 0, f"--max_grad_norm={args.max_grad_norm}: a positive number was needed")
    share = args.proportion_empty_prompts
    require(0 <= share <= 1, f"--proportion_empty_prompts={share}: a share between 0 and 1 was needed")
    share = args.max_broken_share
    require(0 <= share <= 1, f"--max_broken_share={share}: a share between 0 and 1 was needed")
    check_validation(args)
    return args


def check_validation(args):
    """The three validation lists belong together, entry by entry, frame by frame."""
    if args.validation_prompt is None:
        args.validation_prompt = [PROMPT] * len(args.validation_image)
    lists = {name: getattr(args, name) for name in ("validation_image", "validation_mask", "validation_prompt")}
    if len({len(entries) for entries in lists.values()}) > 1:
        lengths = ", ".join(f"--{name} has {len(entries)}" for name, entries in lists.items())
        raise InputError(f"the validation lists differ in length: {lengths} entries; give one of each per video")
    for images, masks in zip(args.validation_image, args.validation_mask, strict=True):
        pair_by_name(images, masks)
