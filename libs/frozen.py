"""What is only read: tokenizer, text encoder, noise scheduler and VAE, loaded without a word from the libraries."""

import json
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UniPCMultistepScheduler
from transformers import CLIPTextModel, CLIPTokenizer

from dataset.finetune_dataset import tokenize
from libs.diffusion import Codec, frames_at_once
from libs.errors import InputError
from libs.weights import read_config, resolve_folder, weight_files


@contextmanager
def quiet_libraries():
    """No progress bars, and no remarks on ignored config entries; published files are full of old ones."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)


class FrozenModels:
    """The folders of the frozen models; checked when made, read by the methods."""

    def __init__(self, args):
        base, revision = args.base_model_name_or_path, args.revision
        self.variant = args.variant
        if args.tokenizer_name:
            self.tokenizer_folder = resolve_folder(args.tokenizer_name, None, revision)
        else:
            self.tokenizer_folder = resolve_folder(base, "tokenizer", revision)
        require_file(self.tokenizer_folder, "vocab.json", "tokenizer.json")
        self.text_encoder_folder = resolve_folder(base, "text_encoder", revision)
        self.text_config = json.loads(require_file(self.text_encoder_folder, "config.json").read_text())
        require_file(self.text_encoder_folder, "model*.safetensors", "pytorch_model*.bin")
        self.scheduler_folder = resolve_folder(base, "scheduler", revision)
        require_file(self.scheduler_folder, "scheduler_config.json")
        self.vae_folder = resolve_folder(args.vae_path, None, revision)
        if not Path(self.vae_folder, "config.json").is_file() and Path(self.vae_folder, "vae").is_dir():
            self.vae_folder = Path(self.vae_folder, "vae")
        self.vae_config = read_config(self.vae_folder, "AutoencoderKL")
        weight_files(self.vae_folder, self.variant)
        self.noise_scheduler = self.load_noise_scheduler()

    def load_noise_scheduler(self):
        """DDPM with the betas and prediction type of the base model's scheduler, whatever class that is."""
        with quiet_libraries():
            scheduler = DDPMScheduler.from_pretrained(self.scheduler_folder)
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(
                f"{self.scheduler_folder} has prediction_type {scheduler.config.prediction_type!r}: "
                "epsilon or v_prediction was needed"
            )
        return scheduler

    def load_sampler(self):
        """UniPC (https://arxiv.org/abs/2302.04867) from the same config, for validation."""
        with quiet_libraries():
            return UniPCMultistepScheduler.from_pretrained(self.scheduler_folder)

    def load_tokenizer(self):
        with quiet_libraries():
            return CLIPTokenizer.from_pretrained(self.tokenizer_folder)

    @torch.no_grad()
    def encode_prompts(self, prompts, device):
        """(len(prompts), n, d) text embeddings, fp32; the text encoder is gone afterwards."""
        tokenizer = self.load_tokenizer()
        with quiet_libraries():
            text_encoder, report = CLIPTextModel.from_pretrained(
                self.text_encoder_folder, variant=self.variant, dtype=torch.float32, output_loading_info=True
            )
        refuse_missing(report, self.text_encoder_folder)
        input_ids = torch.stack([tokenize(tokenizer, prompt) for prompt in prompts])
        return text_encoder(input_ids)[0].to(device)

    def load_codec(self, device, dtype, nframes, cache=None):
        with quiet_libraries():
            vae, report = AutoencoderKL.from_pretrained(
                self.vae_folder, variant=self.variant, torch_dtype=dtype, output_loading_info=True
            )
        refuse_missing(report, self.vae_folder)
        return Codec(vae.to(device), frames_at_once(nframes), cache)


def require_file(folder, *patterns):
    """The first file in `folder` that matches one of the patterns."""
    for pattern in patterns:
        for path in sorted(Path(folder).glob(pattern)):
            return path
    raise InputError(f"{folder} has no {patterns[0]}: fetch the folder again, or check the path")


def refuse_missing(report, folder):
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"{folder} lacks {missing[0]} ({len(missing)} in all): weights of another model, or incomplete"
        )
