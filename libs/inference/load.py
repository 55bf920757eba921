"""A converted folder, ready to fill holes: the options and the loading that eval_DiffuEraser.py and run_diffueraser.py
share."""

import os
from pathlib import Path

import torch

from common.command_line import at_least
from common.distributed import DTYPES
from common.errors import InputError
from common.weights import read_config
from dataset.finetune_dataset import PROMPT
from libs.base_model import BaseModel
from libs.brushnet_CA import BrushNetModel
from libs.inference.pipeline import Pipeline
from libs.inpainter import INPAINTERS


def add_inference_flags(parser):
    """How a hole is filled, for an argparse parser."""
    add = parser.add_argument_group("models").add_argument
    add("--weights", default="converted_weights/finetuned-stage2", metavar="DIR",
        help="converted folder of stage 1 or 2: unet_main/ and brushnet/ (default: %(default)s)")  # fmt: skip
    folder = os.environ.get("WEIGHTS", "weights")  # as the shell scripts have it
    add("--base_model_name_or_path", default=f"{folder}/stable-diffusion-v1-5", metavar="DIR",
        help="tokenizer, text_encoder and scheduler are taken from it (default: %(default)s)")  # fmt: skip
    add(
        "--vae_path",
        default=f"{folder}/sd-vae-ft-mse",
        metavar="DIR",
        help="VAE folder, or one with vae/ in it (default: %(default)s)",
    )
    add("--tokenizer_name", metavar="DIR", help="another tokenizer folder than the base model's")
    add("--revision", help="revision of models that are named by their Hugging Face Hub name")
    add("--variant", help='variant of weight files, such as "fp16"')
    add = parser.add_argument_group("sampling").add_argument
    add("--nframes", type=int, metavar="N", help="frames per window (default: the stage's, 10 or 22)")
    add("--overlap", type=int, metavar="N", help="frames that windows share (default: a third; 0 in stage 1)")
    add("--num_inference_steps", type=int, metavar="N", help="steps of UniPC (default: the stage's, 50 or 20)")
    add("--prompt", default=PROMPT, help="what to fill the hole with (default: %(default)s)")
    add("--seed", type=int, default=42, help="the result's noise follows from it (default: 42)")
    add("--mixed_precision", choices=DTYPES, help="weights and arithmetic (default: fp16 on a GPU, else no)")


def check_inference_flags(args):
    """Raises InputError for numbers that no weights make right."""
    at_least(1, args, "nframes", "num_inference_steps")
    at_least(0, args, "overlap", "seed")


def load_pipeline(args, weights):
    """(Pipeline, (1, n, d) embedding of the prompt, stage's number) of the converted folder `weights`.

    Args:
        args: of a parser with `add_inference_flags`.
    """
    folder = Path(weights)
    if not Path(folder, "unet_main").is_dir():
        raise InputError(f"{folder} has no unet_main/: a converted folder was needed; run save_checkpoint_stage<n>.py")
    class_name = read_config(folder / "unet_main", *(cls.unet_class.__name__ for cls in INPAINTERS.values()))[
        "_class_name"
    ]
    inpainter = next(cls for cls in INPAINTERS.values() if cls.unet_class.__name__ == class_name)
    unet = inpainter.unet_class.open(folder, "unet_main")
    brushnet = BrushNetModel.open(folder, "brushnet")
    base = BaseModel(args)
    nframes, overlap = window_sizes(args, inpainter, unet)

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = DTYPES[args.mixed_precision or ("no" if device.type == "cpu" else "fp16")]
    if dtype == torch.float16 and device.type == "cpu":
        raise InputError("--mixed_precision=fp16 needs a GPU, and none was found: use --mixed_precision=no")
    prompt_embeds = base.encode_prompts([args.prompt], device)
    model = inpainter(unet.load(dtype), brushnet.load(dtype)).to(device).eval()
    pipeline = Pipeline(
        model=model,
        vae=base.load_vae(device, dtype, nframes),
        sampler=base.load_sampler(),
        device=device,
        nframes=nframes,
        overlap=overlap,
        num_inference_steps=args.num_inference_steps or inpainter.inference_steps,
        shared_noise=inpainter.shared_noise,
        dtype=dtype,
    )
    return pipeline, prompt_embeds, inpainter.stage


def window_sizes(args, inpainter, unet):
    """(frames per window, frames shared): checked against the motion modules' longest clip."""
    nframes = args.nframes or inpainter.nframes
    longest = unet.config.get("motion_max_seq_length")
    if longest and nframes > longest:
        raise InputError(f"--nframes={nframes}: {unet.folder} takes {longest} frames at most; lower --nframes")
    # The frames of stage 1 do not see each other: sharing some would only take time.
    default = 0 if inpainter.shared_noise else nframes // 3
    overlap = default if args.overlap is None else args.overlap
    if nframes < 1 or not 0 <= overlap < nframes:
        raise InputError(f"--overlap={overlap}, --nframes={nframes}: 0 or more, and less than --nframes, was needed")
    return nframes, overlap
