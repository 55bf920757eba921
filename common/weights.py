"""Reading weights folders strictly: every key and shape is checked before a tensor is read."""

import hashlib
import inspect
import json
import math
import os
from pathlib import Path
from zipfile import is_zipfile

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from common.errors import InputError

WEIGHTS_NAME = "diffusion_pytorch_model"
OWN_FOLDERS = ("weights", "converted_weights")  # paths below them are never looked up on the Hub


class StrictLoading:
    """`from_pretrained` for diffusers models in which a missing, surplus or wrongly shaped key is an error.

    diffusers' own only warns about missing and surplus keys.
    """

    @classmethod
    def from_pretrained(cls, path, subfolder=None, torch_dtype=torch.float32, revision=None, variant=None):
        """Load a folder of config.json and diffusion_pytorch_model.safetensors (sharded or .bin too) onto the CPU.

        Args:
            path: a local folder, or a model's name on the Hugging Face Hub.
            torch_dtype: the weights' type, whatever they are stored in.
            variant: the "fp16" of diffusion_pytorch_model.fp16.safetensors.

        Raises: InputError for a missing folder or file, another class's config, and any key or shape that differs.
        """
        return cls.open(path, subfolder, revision, variant).load(torch_dtype)

    @classmethod
    def open(cls, path, subfolder=None, revision=None, variant=None):
        """What `from_pretrained` would load, checked but not read: OpenedWeights."""
        folder = resolve_folder(path, subfolder, revision)
        return OpenedWeights(cls, folder, read_config(folder, cls.__name__), variant)

    @classmethod
    def on_meta(cls, config):
        """The model a config describes, without memory for its weights."""
        accepted = inspect.signature(cls.__init__).parameters
        with torch.device("meta"):
            return cls(**{key: value for key, value in config.items() if key in accepted and not key.startswith("_")})


class OpenedWeights:
    """A weights folder whose keys and shapes were checked against the model class, before a tensor is read."""

    def __init__(self, cls, folder, config, variant=None, belongs=lambda key: True):
        """`belongs(key)` chooses the part of the folder's tensors that are this model's."""
        self.cls, self.folder, self.config, self.belongs = cls, folder, config, belongs
        self.files = weight_files(folder, variant)
        found = {key: shape for key, shape in read_shapes(self.files).items() if belongs(key)}
        self.parameters = sum(math.prod(shape) for shape in found.values())
        self.model = cls.on_meta(config)
        compare_shapes(shapes_of(self.model), found, folder)

    @property
    def source_class(self):
        """The class that the folder was saved as."""
        return json.loads(Path(self.folder, "config.json").read_text())["_class_name"]

    def tensors(self):
        """Yield (key, tensor), one in memory at a time."""
        return ((key, tensor) for key, tensor in read_tensors(self.files) if self.belongs(key))

    def load(self, torch_dtype=torch.float32):
        """The model on the CPU, once: its weights are the caller's alone."""
        model, self.model = self.model, None
        # copy=True: weights must not stay views of a file that a later run may replace.
        state_dict = {key: tensor.to(torch_dtype, copy=True) for key, tensor in self.tensors()}
        model.load_state_dict(state_dict, assign=True)
        return model.eval()


def resolve_folder(path, subfolder=None, revision=None):
    """The local folder of `path`, downloaded from the Hub where `path` is no local folder but a model's name."""
    folder = Path(path, subfolder or "")
    if folder.is_dir():
        return folder
    name = str(path)
    is_name = name.count("/") == 1 and not name.startswith((".", "/", "~", *(f"{own}/" for own in OWN_FOLDERS)))
    if not is_name or Path(path).exists() or Path(name).parent.exists():
        raise InputError(
            f"{folder.absolute()} is not a folder: a folder of weights was needed; check the path, or see in README.md "
            "how to download or convert it"
        )
    patterns = [f"{subfolder}/*"] if subfolder else None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns), subfolder or "")
    except OSError as error:  # every error of the Hub's client is one
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder} is not a folder, and the Hugging Face Hub gave no model {name}: {reason}") from None


def read_config(folder, *class_names):
    """The config.json of `folder`, which must be of one of the classes named."""
    path = Path(folder, "config.json")
    if not path.is_file():
        raise InputError(f"{path} is missing: a folder with a {class_names[0]}'s config and weights was needed")
    config = read_json(path)
    found = config.get("_class_name")
    if found not in class_names:
        raise InputError(f"{folder} holds a {found}: a {' or '.join(class_names)} was needed; check the path")
    return config


def read_json(path):
    """The object of a JSON file."""
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): fetch it again") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is a JSON {type(content).__name__}, not an object: fetch it again")
    return content


def weight_files(folder, variant=None, names=(WEIGHTS_NAME, WEIGHTS_NAME)):
    """The file, or the files of a sharded model, that hold a folder's weights; safetensors before .bin.

    Args:
        variant: such as "fp16", taken where the folder has it.
        names: of the safetensors and the .bin file, without variant and extension.
    """
    files = find_files(folder, variant, names) or find_files(folder, None, names)
    if files:
        return files
    extensions = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")
    others = sorted(path.name for path in Path(folder).iterdir() if path.name.endswith(extensions))
    variants = [name.split(".")[1] for name in others if name.startswith(names) and name.count(".") > 1]
    hint = f"; it has {others[0]}: add --variant={variants[0]}" if variants else ""
    raise InputError(f"{folder} has no {names[0]}.safetensors: a folder with a model's weights was needed{hint}")


def find_files(folder, variant, names):
    """The same for one variant; an empty list where the folder does not have it."""
    dot_variant = f".{variant}" if variant else ""
    for name, extension in zip(names, ("safetensors", "bin"), strict=True):
        file = Path(folder, f"{name}{dot_variant}.{extension}")
        index = Path(folder, f"{name}.{extension}.index{dot_variant}.json")
        if file.is_file():
            return [file]
        if index.is_file():
            return [Path(folder, shard) for shard in sorted(set(read_json(index).get("weight_map", {}).values()))]
    return []


def variant_of(folder, variant, names=(WEIGHTS_NAME, WEIGHTS_NAME)):
    """`variant` where the folder has it, as diffusers and transformers have to be told."""
    return variant if variant and find_files(folder, variant, names) else None


def open_weights(file):
    """`safe_open` with the project's errors."""
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise InputError(f"{file} is missing: fetch or convert it again") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is no complete safetensors file ({error}): fetch or convert it again") from None


def load_bin(file, device):
    """The state dict of a .bin file, with the project's errors; its tensors stay on the disk until they are used."""
    try:
        # Files of torch before 1.6 are no zip archives and cannot be mapped.
        return torch.load(file, map_location=device, weights_only=True, mmap=is_zipfile(file))
    except FileNotFoundError:
        raise InputError(f"{file} is missing: fetch it again") from None
    except Exception as error:  # those of pickle, zipfile and torch have no class in common
        raise InputError(f"{file} is no complete file of tensors ({type(error).__name__}): fetch it again") from None


def read_shapes(files):
    """{key: shape} of weight files; of safetensors only the headers are read."""
    shapes = {}
    for file in files:
        if file.suffix == ".bin":
            shapes.update({key: tuple(tensor.shape) for key, tensor in load_bin(file, "meta").items()})
        else:
            with open_weights(file) as weights:
                shapes.update({key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()})
    return shapes


def read_tensors(files):
    """Yield (key, tensor) of weight files, one tensor in memory at a time."""
    for file in files:
        if file.suffix == ".bin":
            yield from load_bin(file, "cpu").items()
        else:
            with open_weights(file) as weights:
                for key in weights.keys():
                    yield key, weights.get_tensor(key)


def shapes_of(model):
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def compare_shapes(expected, found, where):
    """Raise InputError, naming the first key and the number of others, where {key: shape} dictionaries differ."""
    missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise InputError(f"{where} lacks {missing[0]}{and_more(missing)}: weights of another model, or incomplete")
    if surplus:
        raise InputError(f"{where} has a surplus {surplus[0]}{and_more(surplus)}: weights of another model")
    wrong = [key for key in sorted(expected) if expected[key] != found[key]]
    if wrong:
        key = wrong[0]
        raise InputError(
            f"{where}: {key}{and_more(wrong)} has shape {found[key]}, its config needs {expected[key]}: "
            "config.json and weights do not belong together"
        )


def and_more(keys):
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


def fingerprint(files):
    """A short hash of weight files: their sizes and 64 blocks of 4 KiB of each, in a blink even for gigabytes."""
    digest = hashlib.sha256()
    for file in files:
        size = os.path.getsize(file)
        digest.update(f"{Path(file).name} {size}".encode())
        with open(file, "rb") as stream:
            for i in range(64):
                stream.seek(i * max(0, size - 4096) // 63)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:16]
