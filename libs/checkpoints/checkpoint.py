"""Checkpoints: written whole or not at all, found, pruned, and resumed from.

checkpoint-<step>/ holds model.safetensors (keys unet_main.* and brushnet.*, only what is not frozen), ema.safetensors
where the run has an EMA, what `accelerator.save_state` writes (the optimizer and others; FSDP's shards), and
trainer_state.json, which is written last.
"""

import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.distributed import unsharded_state_dict
from common.errors import InputError
from common.files import flush, list_numbered, write_json
from common.weights import compare_shapes, open_weights, read_shapes, read_tensors, shapes_of

MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"  # the same keys, of runs with --ema_decay
STATE_FILE = "trainer_state.json"
BEST_FILE = "best_checkpoint.json"  # in the run's folder
HELD_OUT = "held_out_loss"  # a measure of checkpoints; the others are scores of the validation videos
PARTIAL_SUFFIX, OLD_SUFFIX = ".partial", ".replaced"  # no names that users give to copies of their own, as ".old"
UMASK = os.umask(0)  # read here, not in a thread: everybody could change the files that others make meanwhile
os.umask(UMASK)


@dataclass
class TrainerState:
    """Where a run is, and what its checkpoint's weights belong to."""

    stage: int
    global_step: int = 0  # optimizer steps done
    clips_done: int = 0  # by all processes together, since the first epoch's start
    probe_start: float | None = None  # the held-out loss before the first step
    configs: dict = field(default_factory=dict)  # {"unet_main": config, "brushnet": config}
    weights: dict = field(default_factory=dict)  # {model: [folder, fingerprint]} that the run started from
    settings: dict = field(default_factory=dict)  # what the run's steps depend on
    files: dict = field(default_factory=dict)  # {name: bytes} of all other files of the checkpoint

    def write(self, folder):
        """Last of all: a checkpoint is whole when this says so, and every file has the size it had then."""
        paths = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
        files = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
        Path(folder, STATE_FILE).write_text(json.dumps({**asdict(self), "files": files}, indent=1))

    @classmethod
    def read(cls, folder, weights_only=False):
        """Raises InputError for a folder that is no complete checkpoint of these scripts.

        Args:
            weights_only: the optimizer's and other states may be missing, as in a checkpoint kept for conversion.
        """
        if is_original_form(folder):
            raise InputError(
                f"{folder} was written by the original DiffuEraser scripts, whose optimizer state does not fit: "
                "convert it, then start from the converted folder without --resume_from_checkpoint"
            )
        try:
            state = cls(**json.loads(Path(folder, STATE_FILE).read_text()))
        except FileNotFoundError:
            inside = [path.name for _, path in list_checkpoints(folder)]
            other = f"one in it, such as {inside[-1]}" if inside else "another"
            raise InputError(f"{folder} has no {STATE_FILE}: it is no complete checkpoint; choose {other}") from None
        except (ValueError, TypeError) as error:
            raise InputError(f"{folder}/{STATE_FILE} is not readable ({error}): choose another checkpoint") from None
        for name, size in {} if weights_only else state.files.items():
            path = Path(folder, name)
            found = path.stat().st_size if path.is_file() else "no"
            if found != size:
                raise InputError(f"{path} has {found} bytes, {size} were written: choose another checkpoint")
        with open_weights(Path(folder, MODEL_FILE)):  # opening compares the header with the file's size
            return state


def is_checkpoint(folder):
    """Whether a folder is meant as one checkpoint, and not as a run's."""
    return Path(folder, MODEL_FILE).is_file() or Path(folder).name.startswith("checkpoint-")


def is_original_form(folder):
    """Whether the original scripts wrote this checkpoint: unet_main and brushnet as two models, without a prefix."""
    if not Path(folder, "model_1.safetensors").is_file() or not Path(folder, MODEL_FILE).is_file():
        return False
    return any(key.removeprefix("module.") == "conv_in.weight" for key in read_shapes([Path(folder, MODEL_FILE)]))


def list_checkpoints(run_dir):
    """[(step, folder)] of everything that is named like a finished checkpoint, oldest first."""
    return [(step, path) for step, path in list_numbered(run_dir, "checkpoint") if path.is_dir()]


def find_latest(run_dir, for_conversion=False):
    """The newest complete checkpoint in a run's folder, or None; and one line for each newer one passed over.

    For conversion, weights are enough, and checkpoints of the original scripts will do.
    """
    skipped = []
    for _, folder in reversed(list_checkpoints(run_dir)):
        if for_conversion and is_original_form(folder):
            return folder, skipped
        try:
            TrainerState.read(folder, weights_only=for_conversion)
        except InputError as error:
            if is_original_form(folder):
                raise
            skipped.append(str(error))
        else:
            return folder, skipped
    return None, skipped


def saved_keys(model):
    """The keys of a checkpoint: all but frozen parameters (motion modules keep their position tables)."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return [key for key in model.state_dict() if key not in frozen]


def weights_of(accelerator, model):
    """{key: tensor} of a prepared model for a file. With FSDP they are unsharded, which all processes take part in, and
    the main process alone has them."""
    unwrapped = accelerator.unwrap_model(model)
    keys = saved_keys(unwrapped)
    if accelerator.is_fsdp2:
        return unsharded_state_dict(accelerator, model, keys)
    state_dict = unwrapped.state_dict()
    return {key: state_dict[key].contiguous() for key in keys}  # compiled models are in channels_last


def register_hooks(accelerator, keys):
    """Keep save_state from writing the one prepared module, as `write_checkpoint` does, and let load_state read just
    `keys` of it, without DDP's prefix. FSDP writes and reads its own shards all the same."""

    def save_hook(models, weights, output_dir):
        weights.clear()

    def load_hook(models, input_dir):
        if not models:
            return
        model = accelerator.unwrap_model(models.pop())
        files = [Path(input_dir, MODEL_FILE)]
        state_dict = model.state_dict()
        compare_shapes(shapes_of({key: state_dict[key] for key in keys}), read_shapes(files), input_dir)
        for key, tensor in read_tensors(files):
            state_dict[key].copy_(tensor)

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)


def write_checkpoint(accelerator, run_dir, state, weights):
    """Write checkpoint-<step> under its partial name. Returns the path that `finish_checkpoint` moves it to.

    Args:
        weights: {file name: {key: tensor}}, written by a thread of the main process while save_state writes the
            optimizer's state, which takes as long.
    """
    folder = Path(run_dir, f"checkpoint-{state.global_step}")
    partial = partial_of(folder)
    if accelerator.is_main_process:
        clean_up(run_dir)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    torch.serialization.set_crc32_options(False)  # torch.load never checks them; half of torch.save's time
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()  # the thread may copy in another stream than trained them
    try:
        with ThreadPoolExecutor(1) as thread:  # a file at a time: all its tensors are copied to the machine's memory
            files = [
                thread.submit(save_file, tensors, partial / name, metadata={"format": "pt"})
                for name, tensors in weights.items()
                if accelerator.is_main_process
            ]
            accelerator.save_state(str(partial))
            for file in files:
                file.result()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            state.write(partial)
    except BaseException:
        if accelerator.is_main_process:  # a full disk needs the space
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def finish_checkpoint(folder):
    """Give a checkpoint its final name when it is on the disk; one that fails leaves nothing (main process)."""
    partial = partial_of(folder)
    try:
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # there only if something went wrong


def partial_of(folder):
    return folder.with_name(folder.name + PARTIAL_SUFFIX)


def clean_up(run_dir):
    """Remove what killed runs have left half-written; what one was about to replace gets its name back."""
    for path in Path(run_dir).glob("checkpoint-*"):
        if path.name.endswith(PARTIAL_SUFFIX):
            shutil.rmtree(path)
        elif path.name.endswith(OLD_SUFFIX):
            final = path.with_name(path.name.removesuffix(OLD_SUFFIX))
            shutil.rmtree(path) if final.exists() else path.rename(final)


def replace_folder(partial, folder):
    """Flush `partial` and give it the name `folder`, in whose place nothing half-written can ever stand."""
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            path.chmod(0o666 & ~UMASK)  # safetensors writes files that only their owner can read
        flush(path)
    flush(partial)
    old = folder.with_name(folder.name + OLD_SUFFIX)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_best(run_dir):
    """{"checkpoint": name, "step": n, measure: value, "clips": ...} of the best checkpoint, or None."""
    path = Path(run_dir, BEST_FILE)
    return json.loads(path.read_text()) if path.is_file() else None


def measure_of(best):
    """(measure, value) by which a checkpoint was noted as the best."""
    found, *_ = ((name, value) for name, value in best.items() if name not in ("checkpoint", "step", "clips"))
    return found


def mark_best(run_dir, step, value, clips, complete=lambda clips: clips, measure=HELD_OUT, higher_is_better=False):
    """Note checkpoint-<step> as the best one if its value of a measure is better than that of the one noted so far,
    which counts only if it comes before (a run that was resumed from an earlier step has left it behind) and has the
    same measure on the same `clips`, whatever tells them. Returns whether it is noted.

    Args:
        complete: makes of an older version's clips what they are called today.
    """
    best = read_best(run_dir)
    counts = best and measure in best and best["step"] < step and complete(best.get("clips", clips)) == clips
    sign = 1 if higher_is_better else -1
    if not math.isfinite(value) or (counts and sign * best[measure] >= sign * value):
        return False
    note = {"checkpoint": f"checkpoint-{step}", "step": step, measure: value, "clips": clips}
    write_json(Path(run_dir, BEST_FILE), note)
    return True


def prune(run_dir, step, total_limit, keep_best=False):
    """Delete all but the newest `total_limit` checkpoints up to `step` (None: keep all), and the best if asked to.

    One above `step` is of no use: the run would have resumed from it, were it complete.
    """
    if total_limit is not None:
        earlier = [folder for number, folder in list_checkpoints(run_dir) if number <= step]
        best = read_best(run_dir) if keep_best else None
        for folder in earlier[:-total_limit]:
            if not best or folder.name != best["checkpoint"]:
                shutil.rmtree(folder)
