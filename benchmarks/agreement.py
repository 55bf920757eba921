"""How far the fast and the small variants of the trainer are from the plain one, on a GPU or a CPU.

    python -m benchmarks.agreement --variants latent_cache use_8bit_adam

Prints a JSON line per variant: the losses of 100 steps of the trainer at tiny size against those of its plain run, with
the same clips, masks and noises.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from toy.make_videos import make_videos
from toy.make_weights import make_weights

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
    for result in compare_runs(options.variants):
        print(json.dumps(result), flush=True)
