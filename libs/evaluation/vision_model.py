"""Image models of transformers, read without torchvision, which its own image processors ask for."""

from pathlib import Path

import torch
from transformers import AutoConfig

from common.command_line import require
from common.weights import library_errors, may_be_hub_name
from libs.base_model import load_whole, quiet_libraries


def load_vision_model(cls, path, types, needed):
    """A model of class `cls` on the CPU, in fp32, from a folder or by its name on the Hugging Face Hub.

    Args:
        types: the config's model_type has to be one of these.
        needed: what an error says was needed.

    Raises: InputError for anything else.
    """
    require(Path(path).is_dir() or may_be_hub_name(path), f"{path} is no folder: {needed}")
    with quiet_libraries(), library_errors(path, needed):
        config = AutoConfig.from_pretrained(path)
        require(config.model_type in types, f"{path} holds a {config.model_type}: {needed}")
        if hasattr(config, "vision_config"):  # some published CLIPs tell its projection's size outside of it only
            config.vision_config.projection_dim, config = config.projection_dim, config.vision_config
    return load_whole(cls, path, needed, config=config, dtype=torch.float32).eval().requires_grad_(False)


def normalize(picture, mean, std, device):
    """(1, 3, h, w) float of a picture (h, w, 3) uint8."""
    pixels = torch.from_numpy(picture.copy()).to(device).permute(2, 0, 1)[None].float() / 255
    return (pixels - pixels.new_tensor(mean).view(3, 1, 1)) / pixels.new_tensor(std).view(3, 1, 1)
