"""How far the fast and the small variants of a step are from the plain one, on a GPU or a CPU.

    python -m benchmarks.agreement --variants latent_cache use_8bit_adam

Prints JSON lines. First, for each parity case and stage, an fp16 step against fp32: losses, and the relative error of
all gradients together. These tiny models are ill-conditioned (one channel per norm group, 1x1 pixels inside), so the
same error is given for the fp32 step with weights rounded to fp16: what any fp16 step has to expect. Then the losses of
100 steps of the real trainer at tiny size, variant by variant, against its plain run (same clips, masks and noises).
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import DDPMScheduler

from libs.brushnet_CA import BrushNetModel
from libs.inpainter import ClipInpainter, FrameInpainter, train_motion_modules_only
from libs.training.loss import EncodedBatch, denoising_loss
from libs.unet_2d_condition import UNet2DConditionModel
from libs.unet_motion_model import MotionAdapter, UNetMotionModel
from toy.make_videos import make_videos
from toy.make_weights import make_weights
from toy.reference import fill_by_formula, parity_case

VARIANTS = {
    "plain": [],
    "fp32": ["--mixed_precision=no"],
    "gradient_checkpointing": ["--gradient_checkpointing"],
    "use_8bit_adam": ["--use_8bit_adam"],
    "latent_cache": ["--latent_cache={folder}/latents"],
    "compile": ["--compile"],
    "cuda_graph": ["--cuda_graph"],
}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_model(case, stage, dtype):
    configs, seeds = case["configs"], case["seeds"]
    unet, brushnet = UNet2DConditionModel(**configs["unet"]), BrushNetModel(**configs["brushnet"])
    adapter = MotionAdapter(**configs["motion_adapter"])
    for model, name in ((unet, "unet"), (brushnet, "brushnet"), (adapter, "motion_adapter")):
        fill_by_formula(model, seeds[name])
    if stage == 1:
        return FrameInpainter(unet, brushnet).to(DEVICE)
    return train_motion_modules_only(ClipInpainter(UNetMotionModel.from_unet2d(unet, adapter), brushnet), dtype).to(
        DEVICE
    )


def step(name, stage, dtype, rounded=False):
    """Loss and all gradients, one after the other, of a parity case."""
    case, io = parity_case(name)
    model = make_model(case, stage, dtype)
    if rounded:
        model = model.half().float()
    inputs = EncodedBatch(
        *(io[key].to(DEVICE) for key in ("latents", "noise", "conditioning", "timesteps", "prompt_embeds"))
    )
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        loss = denoising_loss(model, DDPMScheduler(**case["scheduler"]), inputs)
    (loss * 1024).backward()  # as a gradient scaler would, against underflow
    gradients = [parameter.grad.float().flatten() / 1024 for parameter in model.parameters() if parameter.requires_grad]
    return loss.item(), torch.cat(gradients)


def compare_steps():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name in ("batch2", "odd_size"):
        for stage in (1, 2):
            loss, gradients = step(name, stage, torch.float32)
            half_loss, half_gradients = step(name, stage, torch.float16)
            _, rounded_gradients = step(name, stage, torch.float32, rounded=True)
            yield {
                "case": name,
                "stage": stage,
                "reference_loss": parity_case(name)[0][f"stage{stage}_loss"],
                "fp32_loss": loss,
                "fp16_loss": half_loss,
                "gradient_error": relative_error(half_gradients, gradients),
                "gradient_error_of_rounded_weights": relative_error(rounded_gradients, gradients),
            }


def relative_error(found, expected):
    return round(((found - expected).norm() / expected.norm()).item(), 4)


def train(folder, flags):
    """Losses of 100 steps, one by one."""
    with tempfile.TemporaryDirectory(dir=folder) as run:
        command = [
            sys.executable, "train_DiffuEraser_stage1.py",
            f"--base_model_name_or_path={folder}/weights/stable-diffusion-v1-5",
            f"--vae_path={folder}/weights/sd-vae-ft-mse",
            f"--pretrained_stage1_path={folder}/weights/diffuEraser",
            f"--davis_root={folder}/DAVIS", f"--ytvos_root={folder}/YTBV", f"--output_dir={run}",
            "--resolution=64", "--nframes=4", "--max_train_steps=100", "--logging_steps=1", "--learning_rate=1e-3",
            "--report_to=none", f"--mixed_precision={'fp16' if DEVICE == 'cuda' else 'no'}",
            *(flag.format(folder=folder) for flag in flags),
        ]  # fmt: skip
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return torch.tensor([float(loss) for loss in re.findall(r"step \d+/\d+  loss ([\d.]+)", output)])


def compare_runs(variants):
    with tempfile.TemporaryDirectory() as folder:
        make_weights(Path(folder, "weights"))
        make_videos(Path(folder))
        plain = train(folder, VARIANTS["plain"])
        for variant in variants:
            losses = train(folder, VARIANTS[variant])
            yield {
                "variant": variant,
                "first_10": round(losses[:10].mean().item(), 4),
                "last_10": round(losses[-10:].mean().item(), 4),
                "plain_last_10": round(plain[-10:].mean().item(), 4),
                "mean_difference": round((losses - plain).abs().mean().item(), 5),
                "max_difference": round((losses - plain).abs().max().item(), 5),
            }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=tuple(VARIANTS))
    options = parser.parse_args()
    for result in compare_steps():
        print(json.dumps(result), flush=True)
    for result in compare_runs(options.variants):
        print(json.dumps(result), flush=True)
