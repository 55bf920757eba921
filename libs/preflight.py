"""What is checked before any weights load."""

import importlib
import importlib.util
import os
import tempfile
from pathlib import Path

import torch
from accelerate.tracking import LoggerType, get_available_trackers

from libs.checkpoints import TrainerState, find_latest
from libs.conversion import refuse_source_weights
from libs.errors import InputError


def check_tracker(name):
    known = [tracker.value for tracker in LoggerType]
    if name not in (*known, "none"):
        raise InputError(f"--report_to={name}: one of {', '.join(known)}, none was needed")
    available = [tracker.value for tracker in get_available_trackers()]
    if name not in (*available, "all", "none"):
        raise InputError(f"--report_to={name}: its package is not installed; pip install {name}, or --report_to=none")


def check_precision(args):
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "fp16" and not torch.cuda.is_available():
        raise InputError("mixed precision fp16 needs a GPU, and none was found: use --mixed_precision=no")


def check_fit(args, frozen, opened):
    """UNet, BrushNet, VAE and text encoder must be of one family, and clips short enough for the motion modules."""
    unet = opened["unet_main"].config
    for weights in filter(None, opened.values()):
        for key in ("block_out_channels", "cross_attention_dim"):
            if key in weights.config and list_of(weights.config[key]) != list_of(unet[key]):
                raise InputError(
                    f"{weights.folder} has {key} {weights.config[key]}, {opened['unet_main'].folder} has {unet[key]}: "
                    "weights of one model family were needed"
                )
        longest = weights.config.get("motion_max_seq_length")
        if longest and args.nframes > longest:
            raise InputError(
                f"--nframes={args.nframes}: {weights.folder} takes {longest} frames at most; lower --nframes"
            )
    if frozen.text_config["hidden_size"] != unet["cross_attention_dim"]:
        raise InputError(
            f"{frozen.text_encoder_folder} gives embeddings of {frozen.text_config['hidden_size']} values, "
            f"{opened['unet_main'].folder} takes {unet['cross_attention_dim']}: models of one family were needed"
        )
    if frozen.vae_config["latent_channels"] != unet["in_channels"]:
        raise InputError(
            f"{frozen.vae_folder} makes latents of {frozen.vae_config['latent_channels']} channels, "
            f"{opened['unet_main'].folder} takes {unet['in_channels']}: models of one family were needed"
        )


def list_of(value):
    return list(value) if isinstance(value, (list, tuple)) else value


def check_output_dir(args):
    """It can be written to, and holds no weights that the end of the run would overwrite."""
    folder = Path(args.output_dir)
    pretrained_stage1 = getattr(args, "pretrained_stage1", None)
    refuse_source_weights(folder, [pretrained_stage1] if pretrained_stage1 else [], flag="--output_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be written to ({error.strerror}): choose another") from None


def checkpoint_to_resume(args, stage):
    """(folder or None, lines about newer ones passed over) that --resume_from_checkpoint asks for."""
    wanted = args.resume_from_checkpoint
    if not wanted:
        return None, []
    if wanted == "latest":
        folder, skipped = find_latest(args.output_dir)
    else:
        folder, skipped = Path(wanted), []
        if not folder.is_dir():
            folder = Path(args.output_dir, folder.name)
        if not folder.is_dir():
            raise InputError(f"--resume_from_checkpoint={wanted} is no folder: a checkpoint-<step> folder was needed")
    if folder:
        found = TrainerState.read(folder).stage
        if found != stage.number:
            raise InputError(f"{folder} is of stage {found}, this is stage {stage.number}: use another --output_dir")
    return folder, skipped


def eight_bit_adam():
    """The AdamW with 8-bit state of whichever library is installed."""
    for name in ("bitsandbytes.optim", "torchao.optim"):
        if importlib.util.find_spec(name.split(".")[0]):
            return importlib.import_module(name).AdamW8bit
    raise InputError("--use_8bit_adam needs bitsandbytes or torchao: pip install bitsandbytes, or drop the flag")
