"""Random weights in the published layout: tiny (quickstart, tests), small or medium (toy/learn.sh), full-size.

python -m toy.make_weights --output_dir toy/weights
python -m toy.make_weights --output_dir toy/learn/weights --size small
python -m toy.make_weights --output_dir weights-random --size full --dtype float16
"""

import json
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from common.command_line import Parser, require
from common.errors import one_line_errors
from common.files import is_filled
from libs.brushnet_CA import BrushNetModel
from libs.unet_2d_condition import UNet2DConditionModel
from libs.unet_motion_model import MotionAdapter, UNetMotionModel

SMALL_UNET = {"block_out_channels": (32, 32, 64, 64), "attention_head_dim": 4, "cross_attention_dim": 32,
              "norm_num_groups": 8}  # fmt: skip
SMALL_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = {
    "tiny": {
        "unet": SMALL_UNET,
        "text": SMALL_TEXT,
        "vae": {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 64},
        "sample_size": 8,
    },
    "small": {  # what toy/learn.sh trains from scratch on 32-pixel frames: a VAE of 4 pixels per latent
        "unet": SMALL_UNET,
        "text": SMALL_TEXT,
        "vae": {"block_out_channels": (32, 64, 64), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 32},
        "sample_size": 8,
    },
    "medium": {  # the same on a GPU, on 64-pixel frames
        "unet": {**SMALL_UNET, "block_out_channels": (64, 128, 256, 256), "attention_head_dim": 8},
        "text": SMALL_TEXT,
        "vae": {"block_out_channels": (64, 128, 128), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 64},
        "sample_size": 16,
    },
    "full": {
        "unet": {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8, "cross_attention_dim": 768,
                 "norm_num_groups": 32},
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32,
                "sample_size": 256},
        "sample_size": 64,
    },
}  # fmt: skip
FROM_SCRATCH = ("small", "medium")  # motion modules do nothing yet, as AnimateDiff's training began (its section 4.2)
SCHEDULER = {  # stable-diffusion-v1-5/scheduler/scheduler_config.json
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
FOLDERS = ("stable-diffusion-v1-5", "sd-vae-ft-mse", "animatediff-motion-adapter-v1-5-2", "diffuEraser")
NO_MERGES = "#version: 0.2\n"


def make_weights(output_dir, size="tiny", dtype=torch.float32, seed=0):
    """Write FOLDERS. Raises: InputError where others' weights are."""
    ours = made_here(output_dir)
    for folder in (Path(output_dir, name) for name in FOLDERS):
        require(ours or not is_filled(folder), f"{folder} was not made by this tool: another --output_dir was needed")
    torch.manual_seed(seed)
    output_dir, spec = Path(output_dir), SIZES[size]
    base = output_dir / "stable-diffusion-v1-5"
    vocab_size = write_tokenizer(base / "tokenizer")
    write_text_encoder(base / "text_encoder", spec["text"], vocab_size, dtype)
    write_json(base / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_vae(output_dir / "sd-vae-ft-mse", spec["vae"], dtype)

    unet = UNet2DConditionModel(sample_size=spec["sample_size"], **spec["unet"])
    heads = spec["unet"]["attention_head_dim"]
    adapter = MotionAdapter(
        block_out_channels=spec["unet"]["block_out_channels"],
        motion_num_attention_heads=heads,
        motion_norm_num_groups=spec["unet"]["norm_num_groups"],
    )
    if size in FROM_SCRATCH:
        for name, parameter in adapter.named_parameters():
            if ".proj_out." in name:
                torch.nn.init.zeros_(parameter)
    save(adapter, output_dir / "animatediff-motion-adapter-v1-5-2", dtype)
    save(unet, base / "unet", dtype)
    with torch.no_grad():  # DiffuEraser's weights are not the base model's
        for parameter in [*unet.parameters(), *adapter.parameters()]:
            parameter.mul_(1.01)
    save(UNetMotionModel.from_unet2d(unet, adapter), output_dir / "diffuEraser" / "unet_main", dtype)
    brushnet = BrushNetModel.from_unet(unet)
    for convolution in [*brushnet.brushnet_down_blocks, brushnet.brushnet_mid_block, *brushnet.brushnet_up_blocks]:
        torch.nn.init.normal_(convolution.weight, std=0.1 / convolution.in_channels**0.5)  # as if it had been trained
    save(brushnet, output_dir / "diffuEraser" / "brushnet", dtype)


def made_here(output_dir):
    """Whether a folder's weights are random ones: a tokenizer without merges, which is written first, tells them."""
    merges = Path(output_dir, "stable-diffusion-v1-5/tokenizer/merges.txt")
    return merges.is_file() and merges.read_text() == NO_MERGES


def save(model, folder, dtype):
    model.save_config(folder)
    write_state_dict(folder / "diffusion_pytorch_model.safetensors", model.state_dict(), dtype)


def write_state_dict(path, state_dict, dtype):
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: t.to(dtype) if t.is_floating_point() else t for key, t in state_dict.items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def write_tokenizer(folder):
    """CLIP's files with an alphabet of bytes and no merges; returns the size of the vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [256 + i for i in range(256 - len(printable))]  # how byte-level BPE writes the other bytes
    letters = [chr(code) for code in printable + shifted]
    tokens = letters + [letter + "</w>" for letter in letters] + [BOS, EOS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "merges.txt").write_text(NO_MERGES)
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True,
         "add_prefix_space": False, "errors": "replace"},
    )  # fmt: skip
    return len(tokens)


def write_text_encoder(folder, spec, vocab_size, dtype):
    """Keys in the published form: under text_model., and with position_ids, which today's class has no more."""
    config = CLIPTextConfig(
        vocab_size=vocab_size, bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1, pad_token_id=1,
        max_position_embeddings=77, hidden_act="quick_gelu", **spec,
    )  # fmt: skip
    config.architectures = ["CLIPTextModel"]
    state_dict = {
        f"text_model.{key.removeprefix('text_model.')}": tensor
        for key, tensor in CLIPTextModel(config).state_dict().items()
    }
    state_dict["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    config.save_pretrained(folder)
    write_state_dict(folder / "model.safetensors", state_dict, dtype)


def random_vae(spec):
    blocks = len(spec["block_out_channels"])
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks, **spec
    )


def write_vae(folder, spec, dtype):
    """Attention keys in the published form (query, key, value, proj_attn); latents of unit variance, as SD's are."""
    vae = random_vae(spec)
    with torch.no_grad():
        vae.quant_conv.bias[4:] -= 12  # log-variances: a posterior as sharp as a trained one's
        smooth = torch.nn.functional.interpolate(torch.rand(8, 3, 4, 4) * 2 - 1, size=64, mode="bicubic")
        latents = vae.encode(smooth).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    published = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    state_dict = {}
    for key, tensor in vae.state_dict().items():
        for today, old in published.items():
            key = key.replace(today, old)
        state_dict[key] = tensor
    vae.save_config(folder)
    write_state_dict(folder / "diffusion_pytorch_model.safetensors", state_dict, dtype)


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--output_dir", default="toy/weights")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    diffusers.utils.logging.set_verbosity_error()
    make_weights(options.output_dir, options.size, getattr(torch, options.dtype), options.seed)


if __name__ == "__main__":
    main()
