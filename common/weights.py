"""Reading weights folders strictly: every key and shape is checked before a tensor is read."""

import hashlib
import inspect
import json
import math
import os
import re
from contextlib import contextmanager
from pathlib import Path
from zipfile import is_zipfile

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from common.errors import InputError, and_more, first_line

WEIGHTS_NAME = "diffusion_pytorch_model"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")  # diffusers' names and huggingface_hub's
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack")  # that an error names
OWN_FOLDERS = ("weights", "converted_weights")  # paths below them are never looked up on the Hub


class StrictLoading:
    """`from_pretrained` for diffusers models in which a missing, surplus or wrongly shaped key is an error.

    diffusers' own only warns about missing and surplus keys.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, torch_dtype=None, revision=None,
                        variant=None, use_safetensors=None, low_cpu_mem_usage=True, **others):  # fmt: skip
        """Load a folder of config.json and diffusion_pytorch_model.safetensors (sharded or .bin too) onto the CPU.

        Args:
            pretrained_model_name_or_path: a local folder, or a model's name on the Hugging Face Hub.
            torch_dtype: the weights' type, whatever they are stored in; None is fp32.
            variant: the "fp16" of diffusion_pytorch_model.fp16.safetensors, taken where the folder has it.
            use_safetensors: True or False take safetensors or .bin files only.
            low_cpu_mem_usage: accepted as diffusers has it; no weight is ever initialised to be overwritten.
            others: HUB_OPTIONS; what else diffusers takes raises a TypeError.

        Raises: InputError for a missing folder or file, another class's config, and any key or shape that differs.
        """
        given = [name for name, value in others.items() if name not in HUB_OPTIONS and value]
        if given:
            raise TypeError(f"{cls.__name__}.from_pretrained does not support {', '.join(given)}: weights are loaded "
                            "strictly, and onto the CPU; use .to(device)")  # fmt: skip
        hub = {name: others[name] for name in HUB_OPTIONS if others.get(name)}
        folder = resolve_folder(pretrained_model_name_or_path, subfolder, revision, **hub)
        config = read_config(folder, cls.__name__)
        return OpenedWeights(cls, folder, config, variant, use_safetensors=use_safetensors).load(torch_dtype)

    @classmethod
    def open(cls, path, subfolder=None, revision=None, variant=None):
        """What `from_pretrained` would load, checked but not read: OpenedWeights."""
        folder = resolve_folder(path, subfolder, revision)
        return OpenedWeights(cls, folder, read_config(folder, cls.__name__), variant)

    @classmethod
    def on_meta(cls, config):
        """The model a config describes, without memory for its weights."""
        with torch.device("meta"):
            return cls(**accepted_entries(cls, config))


def accepted_entries(cls, config):
    """Those of a config that a model class takes: no notes of diffusers', such as _class_name."""
    accepted = inspect.signature(cls.__init__).parameters
    return {key: value for key, value in config.items() if key in accepted}


class OpenedWeights:
    """A weights folder whose keys and shapes were checked against the model class, before a tensor is read."""

    def __init__(self, cls, folder, config, variant=None, belongs=lambda key: True, use_safetensors=None):
        """`belongs(key)` chooses the part of the folder's tensors that are this model's."""
        self.cls, self.folder, self.config, self.belongs = cls, folder, config, belongs
        self.files = weight_files(folder, variant, use_safetensors=use_safetensors)
        found = {key: shape for key, shape in read_shapes(self.files).items() if belongs(key)}
        self.parameters = sum(math.prod(shape) for shape in found.values())
        with library_errors(f"{folder}/config.json"):
            self.model = cls.on_meta(config)
        compare_shapes(shapes_of(self.model.state_dict()), found, folder)

    @property
    def source_class(self):
        """The class that the folder was saved as."""
        return json.loads(Path(self.folder, "config.json").read_text())["_class_name"]

    def tensors(self):
        """Yield (key, tensor), one in memory at a time."""
        return ((key, tensor) for key, tensor in read_tensors(self.files) if self.belongs(key))

    def load(self, torch_dtype=None):
        """The model on the CPU, once: its weights are the caller's alone. In fp32 unless told otherwise."""
        model, self.model = self.model, None
        state_dict = {}
        for key, tensor in self.tensors():
            # copy=True: weights must not stay views of a file that a later run may replace.
            state_dict[key] = tensor.to(torch_dtype or torch.float32, copy=True)
            wider = max(tensor, state_dict[key], key=torch.Tensor.element_size)  # half precision is slow to sum up
            self.check_values(key, tensor.dtype, wider)
        model.load_state_dict(state_dict, assign=True)
        return model.eval()

    def check_values(self, key, stored, tensor):
        """Raises InputError for quantised weights, which are integers, and for values that are not finite."""
        found = "" if stored.is_floating_point else str(stored)
        # A sum tells it without a mask as large as the weights; in fp32 it cannot overflow.
        if not found and not tensor.sum(dtype=torch.float32).isfinite():
            found = "values that are not finite"
        if found:
            raise InputError(f"{self.folder} holds {found} in {key}: fetch or convert it again")


def resolve_folder(path, subfolder=None, revision=None, **hub):
    """The local folder of `path`, downloaded from the Hub where `path` is no local folder but a model's name.

    Args:
        hub: HUB_OPTIONS for the download.
    """
    folder = Path(path, subfolder or "")
    require_utf8(folder)
    if folder.is_dir():
        return folder
    parent = folder.parent
    if parent.is_dir() and parent.name.startswith("checkpoint-"):
        raise InputError(f"{parent} is a checkpoint: convert it first, by save_checkpoint_stage1.py or _stage2.py")
    if not may_be_hub_name(path):
        raise InputError(
            f"{folder.absolute()} is not a folder: a folder of weights was needed; check the path (or the variable "
            "WEIGHTS, where weights/ is elsewhere), or see in README.md how to download or convert it"
        )
    patterns = [f"{subfolder}/*"] if subfolder else None
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns, **hub), subfolder or "")
    except OSError as error:  # every error of the Hub's client is one
        reason = first_line(error)
        raise InputError(f"{folder} is not a folder, and the Hugging Face Hub gave no model {path}: {reason}") from None


def may_be_hub_name(path):
    """Whether what is no local folder may be a model's name on the Hugging Face Hub, such as org/name."""
    name = str(path)
    is_name = name.count("/") == 1 and not name.startswith((".", "/", "~", *(f"{own}/" for own in OWN_FOLDERS)))
    return is_name and not Path(path).exists() and not Path(name).parent.exists()


def read_config(folder, *class_names):
    """The config.json of `folder`, which must be of one of the classes named."""
    path = Path(folder, "config.json")
    if not path.is_file():
        configs = sorted(Path(folder).glob("*/config.json"))
        inside = [f"{other.parent.name}/" for other in configs if read_json(other).get("_class_name") in class_names]
        hint = f"; {' or '.join(inside)} in it may be what is meant" if inside else ""
        raise InputError(f"{path} is missing: a folder with a {class_names[0]}'s config and weights was needed{hint}")
    config = read_json(path)
    found = config.get("_class_name")
    if found not in class_names:
        raise InputError(f"{folder} holds a {found}: a {' or '.join(class_names)} was needed; check the path")
    return config


@contextmanager
def library_errors(what, remedy="fetch it again"):
    """Raises InputError for whatever a library makes of files that are not what they are named for."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # those of diffusers, transformers and the Hub's client have no class in common
        raise InputError(f"{what} is of no use ({first_line(error)}): {remedy}") from None


def require_utf8(path):
    """Raises InputError for a name that safetensors cannot open."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path} is no UTF-8, as names of weights must be: rename it, or link to it") from None


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


def weight_files(folder, variant=None, names=(WEIGHTS_NAME, WEIGHTS_NAME), use_safetensors=None):
    """The file, or the files of a sharded model, that hold a folder's weights; safetensors before .bin.

    Args:
        variant: such as "fp16", taken where the folder has it.
        names: of the safetensors and the .bin file, without variant and extension.
        use_safetensors: True or False take one of both only.
    """
    files = find_files(folder, variant, names, use_safetensors) or find_files(folder, None, names, use_safetensors)
    if files:
        return files
    form = rf"(?:{'|'.join(names)})\.([^.]+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)"  # with a variant; shards too
    found = sorted(path.name for path in Path(folder).iterdir() if path.suffix in WEIGHTS_SUFFIXES)
    variants = [match[1] for match in (re.fullmatch(form, name) for name in found) if match]
    hint = (f"; it has {found[0]}" if found else "") + (f": add --variant={variants[0]}" if variants else "")
    raise InputError(f"{folder} has no {names[0]}.safetensors: a folder with a model's weights was needed{hint}")


def find_files(folder, variant, names, use_safetensors=None):
    """The same for one variant; an empty list where the folder does not have it."""
    dot_variant = f".{variant}" if variant else ""
    for name, extension in zip(names, ("safetensors", "bin"), strict=True):
        if use_safetensors not in (None, extension == "safetensors"):
            continue
        file = Path(folder, f"{name}{dot_variant}.{extension}")
        index = Path(folder, f"{name}.{extension}.index{dot_variant}.json")
        if file.is_file():
            return [file]
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise InputError(f"{index} has no weight_map, which tells the shards' names: fetch it again")
            return [Path(folder, shard) for shard in sorted(set(shards.values()))]
    return []


def variant_of(folder, variant, names=(WEIGHTS_NAME, WEIGHTS_NAME)):
    """`variant` where the folder has it, as diffusers and transformers have to be told."""
    return variant if variant and find_files(folder, variant, names) else None


def open_weights(file):
    """`safe_open` with the project's errors."""
    require_utf8(file)
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise InputError(
            f"{file} is missing: fetch it (README and docs/inference.md say where from), or convert it"
        ) from None
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


def read_state_dict(path, shapes, needed, ignored=lambda key: False):
    """The tensors of a published .pt or .pth file, of which every key and shape is checked.

    Args:
        shapes: {key: shape}.
        needed: what an error says was needed.
        ignored: whether a key counts neither there nor in the file.

    Raises: InputError for anything else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {needed}") from None
    except Exception as error:  # those of pickle, zipfile and torch have no class in common
        raise InputError(f"{path} is no file of tensors or is cut short ({type(error).__name__}): {needed}") from None
    content = content if isinstance(content, dict) else {}
    state_dict = {str(key): value for key, value in content.items() if not ignored(str(key))}
    expected = {key: shape for key, shape in shapes.items() if not ignored(key)}
    found = {key: tuple(getattr(value, "shape", ())) for key, value in state_dict.items()}
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        differs = f"{found.get(wrong[0], 'missing')}, not {expected.get(wrong[0], 'there')}"
        raise InputError(f"{path}: {wrong[0]}{and_more(wrong)} is {differs}: {needed}")
    return state_dict


def read_shapes(files):
    """{key: shape} of weight files; of safetensors only the headers are read."""
    shapes = {}
    for file in files:
        if file.suffix == ".bin":
            shapes.update(shapes_of(load_bin(file, "meta")))
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


def shapes_of(tensors):
    """{key: shape} of a state dict."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


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
