"""A converted folder, ready to fill holes: the options and the loading that eval_DiffuEraser.py and run_diffueraser.py
share."""

import argparse
from pathlib import Path

import torch

from common.command_line import at_least, require, variable
from common.distributed import DTYPES
from common.errors import InputError
from common.hardware import accelerator_or_cpu
from common.weights import read_config, read_shapes
from libs.base_model import BaseModel
from libs.brushnet_CA import BrushNetModel
from libs.checkpoints.convert import read_prompt
from libs.inference.composition import MASK_DILATIONS
from libs.inference.few_step import FewStepSampler, FewStepWeights
from libs.inference.pipeline import Pipeline
from libs.inference.prior import ON_THE_SPOT
from libs.inference.windows import BLENDINGS
from libs.inpainter import INPAINTERS
from libs.unet_motion_model import refuse_long_clips

PCM_FILE = "PCM_Weights/sd15/pcm_sd15_smallcfg_2step_converted.safetensors"  # as DiffuEraser's installation has it
DEFAULTS = {  # flag: the project's own, as deployed
    "prior": ("none", "telea"),
    "blend": ("predictions", "latents"),
    "two_passes": (False, True),
    "mask_dilation": (MASK_DILATIONS, 8),  # run_diffueraser.py
    "soft_edge": (8, None),  # None: `compose_as_deployed`
    "max_side": (None, 960),
}


def add_inference_flags(parser):
    """How a hole is filled, for an argparse parser."""
    add = parser.add_argument_group("models").add_argument
    add("--weights", default="converted_weights/finetuned-stage2", metavar="DIR",
        help="converted folder of stage 1 or 2: unet_main/ and brushnet/ (default: %(default)s)")  # fmt: skip
    folder = variable("WEIGHTS", "weights")  # as the shell scripts have it
    add("--base_model_name_or_path", default=f"{folder}/stable-diffusion-v1-5", metavar="DIR",
        help="tokenizer, text_encoder and scheduler are taken from it (default: %(default)s)")  # fmt: skip
    add("--vae_path", default=f"{folder}/sd-vae-ft-mse", metavar="DIR",
        help="VAE folder, or one with vae/ in it (default: %(default)s)")  # fmt: skip
    add("--pcm_weights", default=variable("PCM_WEIGHTS"), metavar="FILE",
        help="PCM's few-step weights, folded into the UNet: 2 to 16 steps instead of 20 or 50 (default: the variable "
        f"PCM_WEIGHTS; as deployed {folder}/{PCM_FILE})")  # fmt: skip
    add("--tokenizer_name", metavar="DIR", help="another tokenizer folder than the base model's")
    add("--revision", help="revision of models that are named by their Hugging Face Hub name")
    add("--variant", help='variant of weight files, such as "fp16"')
    add_sampling_flags(parser.add_argument_group("sampling").add_argument)


def add_sampling_flags(add):
    add("--as_deployed", action="store_true",
        help="as DiffuEraser's own inference does it: few-step weights, prior, empty prompt, windows, two passes; "
        "other flags still win")  # fmt: skip
    add("--nframes", type=int, metavar="N", help="frames per window (default: the stage's, 10 or 22)")
    add("--overlap", type=int, metavar="N",
        help="frames that windows share (default: a third; 0 in stage 1; as deployed a quarter)")  # fmt: skip
    add("--blend", choices=BLENDINGS,
        help="what is blended where windows overlap: the model's predictions, or the latents of windows that were "
        f"denoised one by one, with few-step weights only ({own_default('blend')})")  # fmt: skip
    add("--two_passes", action=argparse.BooleanOptionalAction,
        help="of a clip of more than two windows, first fill a few frames spread over it, which are known frames of "
        "the second pass (default: as deployed only)")  # fmt: skip
    add("--prior", metavar="|".join([*ON_THE_SPOT, "PATH"]),
        help="start from a rough fill: each frame's by Telea, the clip's median over time, noise only, or frames that "
        f"another method has made ({own_default('prior')})")  # fmt: skip
    add("--num_inference_steps", type=int, metavar="N",
        help="steps of UniPC (default: the stage's, 50 or 20) or of few-step weights (the file's)")  # fmt: skip
    add("--prompt", help="what to fill the hole with (default: what the weights were trained with; as deployed none)")
    add("--seed", type=int, default=42, help="the result's noise follows from it (default: 42)")
    add("--mixed_precision", choices=DTYPES, help="weights and arithmetic (default: fp16 on a GPU, else no)")


def own_default(flag):
    """Both defaults in words, for a flag's help."""
    ours, theirs = ("no limit" if value is None else value for value in DEFAULTS[flag])
    return f"default: {ours}; as deployed {theirs}"


def check_inference_flags(args):
    """Give every flag of the parser that was left out its default. Raises InputError for numbers that no weights make
    right."""
    for flag, defaults in DEFAULTS.items():
        if getattr(args, flag, defaults) is None:
            setattr(args, flag, defaults[args.as_deployed])
    if args.as_deployed and args.pcm_weights is None:
        args.pcm_weights = str(Path(variable("WEIGHTS", "weights"), PCM_FILE))
    at_least(1, args, "nframes", "num_inference_steps")
    at_least(0, args, "overlap", "seed")
    require(args.blend != "latents" or args.pcm_weights, "--blend=latents needs few-step weights, as UniPC remembers a "
            "frame's earlier steps: add --pcm_weights=FILE")  # fmt: skip
    if args.pcm_weights:
        FewStepWeights(args.pcm_weights, args.num_inference_steps)


def choose_prompt(args, weights):
    """What the text encoder reads: --prompt, or what the folder `weights` was trained with."""
    if args.prompt is not None:
        return args.prompt
    return "" if args.as_deployed else read_prompt(weights)


def load_pipeline(args, weights):
    """(Pipeline, (1, n, d) embedding of the prompt, stage's number) of the converted folder `weights`.

    Args:
        args: of a parser with `add_inference_flags`, after `check_inference_flags`.
    """
    folder = Path(weights)
    if not Path(folder, "unet_main").is_dir():
        raise InputError(f"{folder} has no unet_main/: a converted folder was needed; run save_checkpoint_stage<n>.py")
    by_unet = {cls.unet_class.__name__: cls for cls in INPAINTERS.values()}
    inpainter = by_unet[read_config(folder / "unet_main", *by_unet)["_class_name"]]
    unet = inpainter.unet_class.open(folder, "unet_main", variant=args.variant)
    brushnet = BrushNetModel.open(folder, "brushnet", variant=args.variant)
    base = BaseModel(args)
    few_step = FewStepWeights(args.pcm_weights, args.num_inference_steps) if args.pcm_weights else None
    if few_step:
        few_step.match(read_shapes(unet.files))
    most = base.noise_scheduler.config.num_train_timesteps - 1  # beyond, UniPC's result is no number
    require(few_step or (args.num_inference_steps or 1) <= most,
            f"--num_inference_steps={args.num_inference_steps}: {most} at most were needed")  # fmt: skip
    nframes, overlap = window_sizes(args, inpainter, unet)

    device, dtype = choose_device(args)
    prompt_embeds = base.encode_prompts([choose_prompt(args, weights)], device)
    model = inpainter(unet.load(dtype), brushnet.load(dtype)).to(device).eval()
    if few_step:
        few_step.fold(model.unet_main)
        sampler, steps = FewStepSampler(base.noise_scheduler.config.prediction_type), few_step.steps
    else:
        sampler, steps = base.load_sampler(), args.num_inference_steps or inpainter.inference_steps
    pipeline = Pipeline(
        model=model,
        vae=base.load_vae(device, dtype, nframes),
        sampler=sampler,
        num_inference_steps=steps,
        device=device,
        nframes=nframes,
        overlap=overlap,
        shared_noise=inpainter.shared_noise,
        dtype=dtype,
        blending=BLENDINGS[args.blend],
        two_passes=args.two_passes,
        prior_scheduler=base.load_sampler(),
    )
    return pipeline, prompt_embeds, inpainter.stage


def choose_device(args):
    device = accelerator_or_cpu()
    dtype = DTYPES[args.mixed_precision or ("no" if device.type == "cpu" else "fp16")]
    if dtype == torch.float16 and device.type == "cpu":
        raise InputError("--mixed_precision=fp16 needs a GPU, and none was found: use --mixed_precision=no")
    return device, dtype


def window_sizes(args, inpainter, unet):
    """(frames per window, frames shared): checked against the motion modules' longest clip."""
    nframes = args.nframes or inpainter.nframes
    refuse_long_clips(unet, nframes)
    # The frames of stage 1 do not see each other: sharing some would only take time.
    default = 0 if inpainter.shared_noise else nframes // 4 if args.blend == "latents" else nframes // 3
    overlap = default if args.overlap is None else args.overlap
    if not 0 <= overlap < nframes:
        raise InputError(f"--overlap={overlap}, --nframes={nframes}: 0 or more, and less than --nframes, was needed")
    return nframes, overlap
