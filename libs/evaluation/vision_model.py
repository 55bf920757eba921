"""Image models of transformers, read without torchvision, which its own image processors ask for."""

from pathlib import Path

import torch
from transformers import AutoConfig

from common.command_line import require
from common.errors import InputError, first_line
from common.weights import may_be_hub_name
from libs.base_model import quiet_libraries


def load_vision_model(cls, path, types, needed):
    """A model of class `cls` on the CPU, in fp32, from a folder or by its name on the Hugging Face Hub.

    Args:
        types: the config's model_type has to be one of these.
        needed: what an error says was needed.

    Raises: InputError for anything else.
    """
    require(Path(path).is_dir() or may_be_hub_name(path), f"{path} is no folder: {needed}")
    try:
        with quiet_libraries():
            config = AutoConfig.from_pretrained(path)
            if config.model_type not in types:
                raise InputError(f"{path} holds a {config.model_type}: {needed}")
            if hasattr(config, "vision_config"):  # some published CLIPs tell its projection's size outside of it only
                config.vision_config.projection_dim, config = config.projection_dim, config.vision_config
            model, report = cls.from_pretrained(path, config=config, dtype=torch.float32, output_loading_info=True)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # those of transformers, safetensors and the Hub's client have no class in common
        raise InputError(f"{path} is of no use ({first_line(error)}): {needed}") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"{path} lacks {missing[0]} ({len(missing)} in all): {needed}")
    return model.eval().requires_grad_(False)


def normalize(picture, mean, std, device):
    """(1, 3, h, w) float of a picture (h, w, 3) uint8."""
    pixels = torch.from_numpy(picture.copy()).to(device).permute(2, 0, 1)[None].float() / 255
    return (pixels - pixels.new_tensor(mean).view(3, 1, 1)) / pixels.new_tensor(std).view(3, 1, 1)
