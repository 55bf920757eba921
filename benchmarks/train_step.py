"""Seconds, memory and parts of a full-size training step: random weights, the trainer's own step functions.

    python -m benchmarks.train_step                                # every variant of both stages
    python -m benchmarks.train_step --stages 2 --variants compiled

Prints one JSON line per stage, variant and state of the latent cache (empty, or holding every frame). Of a CUDA graph
forward and backward pass are one part, the VAE's time in it and beside it. The batch is on the GPU already;
`benchmarks/data_loading.py` measures the loader, a run of the shell scripts both together.
"""

import argparse
import gc
import json
import statistics
import time

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler

from common.distributed import DTYPES
from dataset.crop import RESOLUTION_HELP, resolution, sides
from dataset.finetune_dataset import to_tensors
from libs.base_model import LoadedBase
from libs.checkpoints.checkpoint import TrainerState
from libs.training.compile_ahead import CompileAhead
from libs.training.compiling import compile_encoder
from libs.training.config import CONFIGS
from libs.training.cuda_graph import WARM_UP
from libs.training.optimizer import make_optimizer
from libs.training.setup import make_passes, set_up_model
from libs.vae import FrozenVAE
from toy.full_size import make_model
from toy.make_weights import SCHEDULER, SIZES, random_vae

VARIANTS = {  # flags of the trainer
    "plain": {},
    "checkpointed": {"gradient_checkpointing": True},
    "compiled": {"compile": True},
    "graphed": {"compile": True, "cuda_graph": True},
    "low_memory": {"gradient_checkpointing": True, "use_8bit_adam": True},
    "low_memory_compiled": {"gradient_checkpointing": True, "use_8bit_adam": True, "compile": True},
    "bf16_weights": {
        "gradient_checkpointing": True,
        "use_8bit_adam": True,
        "bf16_weights": True,
        "mixed_precision": "bf16",
    },
}


class Parts:
    """CUDA events around parts of a step, read after it."""

    def __init__(self):
        self.events = []

    def wrap(self, name, function):
        def timed(*args, **kwargs):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            result = function(*args, **kwargs)
            end.record()
            self.events.append((name, start, end))
            return result

        return timed

    def read(self):
        """{part: milliseconds} since the last call."""
        torch.cuda.synchronize()
        parts = {}
        for name, start, end in self.events:
            parts[name] = parts.get(name, 0) + start.elapsed_time(end)
        self.events.clear()
        return parts


def make_vae(dtype, nframes):
    with torch.device("cuda"):
        vae = random_vae(SIZES["full"]["vae"])
    return FrozenVAE(torch.nn.Module.to(vae, dtype), nframes)


def make_batch(nframes, width, height):
    batch = {
        "frames": torch.randint(0, 256, (1, nframes, height, width, 3), dtype=torch.uint8, device="cuda"),
        "holes": torch.zeros((1, nframes, height, width), dtype=torch.uint8, device="cuda"),
        "prompts": [0],
        "noise_seeds": [0],
    }
    batch["holes"][:, :, height // 4 : height // 2, width // 4 : width // 2] = 255
    return batch


class Step:
    """A stage's model, optimizer and batch, and the trainer's own step on them."""

    def __init__(self, flags, stage):
        torch.manual_seed(0)
        torch.cuda.set_stream(torch.cuda.Stream() if flags.cuda_graph else torch.cuda.default_stream())
        self.flags, self.stage, self.nframes = flags, stage, flags.nframes
        self.accelerator = accelerator = Accelerator(mixed_precision=flags.mixed_precision)
        dtype = DTYPES[flags.mixed_precision]
        told = stage, flags.resolution, flags.mixed_precision
        ahead = CompileAhead(accelerator.device, told) if flags.compile and flags.cuda_graph else None
        vae, model = make_vae(dtype, self.nframes), make_model(stage, dtype)
        self.batch = make_batch(self.nframes, *sides(flags.resolution))
        set_up_model(flags, accelerator, model)
        if flags.compile:
            compile_encoder(vae.vae.encoder)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(flags, parameters, flags.learning_rate, accelerator.device)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        prompt_embeds = torch.randn(2, 77, 768, device="cuda")
        self.base = LoadedBase(vae, DDPMScheduler.from_config(SCHEDULER), prompt_embeds, accelerator.device)
        begin = time.perf_counter()
        self.forward_backward = make_passes(flags, accelerator, self.model, self.base, ahead, TrainerState(stage))
        self.ahead_s, self.parts = time.perf_counter() - begin, Parts()
        self.time_parts()

    def time_parts(self):
        wrap, accelerator = self.parts.wrap, self.accelerator
        self.base.vae.posterior = wrap("vae", self.base.vae.posterior)
        if self.flags.cuda_graph:
            self.forward_backward.replay = wrap("vae, forward and backward", self.forward_backward.replay)
        else:
            self.model.forward = wrap("forward", self.model.forward)
            accelerator.backward = wrap("backward", accelerator.backward)
        accelerator.clip_grad_norm_ = wrap("clip", accelerator.clip_grad_norm_)
        self.optimizer.step = wrap("optimizer", self.optimizer.step)

    def run(self, steps):
        """Seconds and parts of each step, and the last loss."""
        seconds, all_parts = [], []
        for step in range(steps):
            self.batch["noise_seeds"] = [step]
            torch.cuda.synchronize()
            start = time.perf_counter()
            loss = self.forward_backward(self.batch)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.forward_backward.clear_gradients(self.optimizer)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            all_parts.append(self.parts.read())
        return seconds, all_parts, loss

    def fill_cache(self):
        """As if the latent cache held every frame."""
        pixel_values, _, _ = to_tensors(self.batch["frames"], self.batch["holes"])
        posteriors = self.base.vae.posterior(pixel_values.flatten(0, 1))
        self.batch["posteriors"] = posteriors.unflatten(0, (1, self.nframes))
        self.batch["missing"], self.base.vae.cache = [None] * self.nframes, True


def measure(options, stage, variant):
    """One result with an empty latent cache, and one with a full one."""
    flags = argparse.Namespace(**{**vars(CONFIGS[stage]()), **vars(options), **VARIANTS[variant]})
    step = Step(flags, stage)
    for cached in (False, True):
        if cached:
            step.fill_cache()
        warm_up, _, _ = step.run(flags.warmup)
        torch.cuda.reset_peak_memory_stats()
        seconds, all_parts, loss = step.run(flags.steps)
        yield {
            "stage": stage,
            "variant": variant,
            "frames_cached": cached,
            "nframes": step.nframes,
            "resolution": flags.resolution,
            "precision": step.flags.mixed_precision,
            "median_s": round(statistics.median(seconds), 3),
            "min_s": round(min(seconds), 3),
            "first_step_s": round(warm_up[0], 1),
            "compiled_ahead_s": round(step.ahead_s, 1),
            "allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 1),
            "parts_ms": {name: round(statistics.median(p[name] for p in all_parts)) for name in all_parts[-1]},
            "loss_finite": bool(torch.isfinite(loss)),
            "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name(),
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2), default=(1, 2))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=tuple(VARIANTS))
    parser.add_argument("--resolution", type=resolution, default=512, help=RESOLUTION_HELP)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="fp16")
    parser.add_argument("--learning_rate", type=float, default=5e-6)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=WARM_UP + 2)
    options = parser.parse_args()
    for stage in options.stages:
        for variant in options.variants:
            for result in measure(options, stage, variant):
                print(json.dumps(result), flush=True)
            gc.collect()
            torch.cuda.empty_cache()
