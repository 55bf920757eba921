"""What Stable Diffusion 1.5 gives and nobody trains: tokenizer, text encoder, noise scheduler and VAE."""

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UniPCMultistepScheduler
from transformers import CLIPTextModel, CLIPTokenizer

from common.errors import InputError
from common.weights import library_errors, read_config, read_json, read_shapes, resolve_folder, variant_of, weight_files
from dataset.finetune_dataset import tokenize
from libs.vae import FrozenVAE

TEXT_ENCODER_NAMES = ("model", "pytorch_model")  # transformers' own, of safetensors and .bin


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


@dataclass(frozen=True)
class LoadedBase:
    """What a training step reads and never changes."""

    vae: FrozenVAE
    noise_scheduler: DDPMScheduler
    prompt_embeds: torch.Tensor  # (2, n, d): the prompt's, and the empty prompt's
    device: torch.device

    def close(self):
        """Wait for what the latent cache is writing."""
        if self.vae.cache:
            self.vae.cache.close()


class BaseModel:
    """The folders of these models; checked when made, read by the methods.

    Raises: InputError for a file that is missing, cut short or no JSON; of weights the headers are read.
    """

    def __init__(self, args):
        base, revision = args.base_model_name_or_path, args.revision
        self.variant = args.variant
        if args.tokenizer_name:
            self.tokenizer_folder = resolve_folder(args.tokenizer_name, None, revision)
        else:
            self.tokenizer_folder = resolve_folder(base, "tokenizer", revision)
        check_tokenizer(self.tokenizer_folder)
        self.text_encoder_folder = resolve_folder(base, "text_encoder", revision)
        self.text_config = read_json(Path(self.text_encoder_folder, "config.json"))
        if "hidden_size" not in self.text_config:
            raise InputError(
                f"{self.text_encoder_folder}/config.json has no hidden_size: a CLIP text encoder was needed"
            )
        read_shapes(weight_files(self.text_encoder_folder, self.variant, TEXT_ENCODER_NAMES))
        self.scheduler_folder = resolve_folder(base, "scheduler", revision)
        read_json(Path(self.scheduler_folder, "scheduler_config.json"))
        self.vae_folder = resolve_folder(args.vae_path, None, revision)
        if not Path(self.vae_folder, "config.json").is_file() and Path(self.vae_folder, "vae").is_dir():
            self.vae_folder = Path(self.vae_folder, "vae")
        self.vae_config = read_config(self.vae_folder, "AutoencoderKL")
        read_shapes(weight_files(self.vae_folder, self.variant))
        self.noise_scheduler = self.load_noise_scheduler()

    def load_noise_scheduler(self):
        """DDPM with the betas and prediction type of the base model's scheduler, whatever class that is."""
        with quiet_libraries(), library_errors(self.scheduler_folder):
            scheduler = DDPMScheduler.from_pretrained(self.scheduler_folder)
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(
                f"{self.scheduler_folder} has prediction_type {scheduler.config.prediction_type!r}: "
                "epsilon or v_prediction was needed"
            )
        return scheduler

    def load_sampler(self):
        """UniPC (https://arxiv.org/abs/2302.04867) from the same config, for validation."""
        with quiet_libraries(), library_errors(self.scheduler_folder):
            return UniPCMultistepScheduler.from_pretrained(self.scheduler_folder)

    def load_tokenizer(self):
        with quiet_libraries(), library_errors(self.tokenizer_folder):
            return CLIPTokenizer.from_pretrained(self.tokenizer_folder)

    @torch.no_grad()
    def encode_prompts(self, prompts, device):
        """(len(prompts), n, d) text embeddings, fp32; the text encoder is gone afterwards."""
        tokenizer = self.load_tokenizer()
        with library_errors(self.tokenizer_folder):
            input_ids = torch.stack([tokenize(tokenizer, prompt) for prompt in prompts])
        variant = variant_of(self.text_encoder_folder, self.variant, TEXT_ENCODER_NAMES)
        text_encoder = load_whole(CLIPTextModel, self.text_encoder_folder, variant=variant, dtype=torch.float32)
        return text_encoder(input_ids)[0].to(device)

    def load_vae(self, device, dtype, frames, cache=None):
        """The FrozenVAE, in `dtype`; its docstring tells `frames` and `cache`."""
        variant = variant_of(self.vae_folder, self.variant)
        vae = load_whole(AutoencoderKL, self.vae_folder, variant=variant, torch_dtype=dtype)
        return FrozenVAE(vae.to(device), frames, cache)


def check_tokenizer(folder):
    """tokenizer_config.json, which gives a prompt's length, and tokenizer.json or the older vocab.json + merges.txt."""
    vocabulary = ["tokenizer.json"] if Path(folder, "tokenizer.json").is_file() else ["vocab.json", "merges.txt"]
    for name in ("tokenizer_config.json", *vocabulary):
        if not Path(folder, name).is_file():
            raise InputError(f"{folder} has no {name}: fetch the folder again, or check the path")
    for path in sorted(Path(folder).glob("*.json")):
        read_json(path)
    merges = Path(folder, vocabulary[-1])
    if merges.read_bytes().startswith(b"version https://git-lfs"):
        raise InputError(f"{merges} is a Git LFS pointer, not a vocabulary: run git lfs pull")


def load_whole(cls, folder, needed=None, **settings):
    """A library's model from a folder, on the CPU. Raises InputError, which says what was `needed`, where a weight is
    missing."""
    with quiet_libraries(), library_errors(folder, needed or "fetch it again"):
        model, report = cls.from_pretrained(folder, output_loading_info=True, **settings)
    missing = sorted(report["missing_keys"])
    if missing:
        needed = needed or "weights of another model, or incomplete"
        raise InputError(f"{folder} lacks {missing[0]} ({len(missing)} in all): {needed}")
    return model
