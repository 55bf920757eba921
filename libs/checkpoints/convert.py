"""Checkpoint -> Hugging Face folders unet_main/ and brushnet/, fp32, that DiffuEraser's inference loads.

Tensors go from file to file: no optimizer, no GPU, no second copy of a model in memory.
"""

import argparse
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from common.command_line import Parser
from common.errors import InputError, one_line_errors
from common.weights import WEIGHTS_NAME, compare_shapes, fingerprint, read_json, read_tensors, require_utf8, shapes_of
from dataset.finetune_dataset import PROMPT
from libs.brushnet_CA import BrushNetModel
from libs.checkpoints.average import LAST, ORDERS, CheckpointWeights, choose_checkpoints
from libs.checkpoints.checkpoint import (
    PARTIAL_SUFFIX,
    find_latest,
    is_checkpoint,
    is_original_form,
    replace_folder,
)
from libs.checkpoints.model_card import write_model_card
from libs.inpainter import INPAINTERS, open_frame_models
from libs.unet_motion_model import MotionAdapter

# Step, prompt and checksum. A folder that has it was made by a converter, which may replace it; others hold sources.
MARKER_FILE = "conversion.json"
HELP = {  # on the arguments of `convert`, which are the options of both converters
    "input_dir": "a checkpoint-<step> folder, or a run's folder: its newest complete checkpoint",
    "output_dir": "where unet_main/ and brushnet/ are written",
    "pretrained_stage1": "the converted stage 1 that the run started from",
    "model_config": "folder whose unet_main/config.json tells the attention heads of an original script's checkpoint",
    "variant": 'of the weight files in pretrained_stage1, such as "fp16"',
    "export_motion_adapter": "also write the motion modules as motion_adapter/, which diffusers' MotionAdapter loads",
    "average": "the mean of so many checkpoints of a run's folder",
    "average_by": "the last ones, or those of the lowest held-out loss",
    "no_ema": "of a run with --ema_decay, the weights that were trained",
}
CONVERTED, MOTION_ADAPTER = ("unet_main", "brushnet"), "motion_adapter"  # folders that a converter writes


def convert(stage, input_dir, output_dir, pretrained_stage1=None, model_config=None, variant=None,
            export_motion_adapter=False, average=1, average_by=LAST, no_ema=False):  # fmt: skip
    """Write `output_dir`/unet_main, /brushnet and README.md from a checkpoint; prints step, tensors and checksums.

    Args: HELP says what they are; pretrained_stage1 and export_motion_adapter are stage 2's.

    Raises: InputError where anything does not fit; `output_dir` is untouched then.
    """
    input_dir, output_dir = Path(input_dir), Path(output_dir)
    of_run = average != 1 or average_by != LAST
    checkpoints = choose_checkpoints(input_dir, average, average_by) if of_run else [find_checkpoint(input_dir)]
    checkpoint, source, words = checkpoints[-1], None, ""
    require_utf8(output_dir)
    names = (*CONVERTED, MOTION_ADAPTER) if export_motion_adapter else CONVERTED
    refuse_source_weights(output_dir, [*checkpoints, *filter(None, [pretrained_stage1])], names=names)
    if is_original_form(checkpoint):
        step = checkpoint.name.rpartition("-")[2]
        marker = {"stage": stage, "step": step}
        parts = original_parts(stage, checkpoint, [pretrained_stage1, model_config])
    else:
        source = CheckpointWeights.of(checkpoints, no_ema)
        state, words = source.state, source.words
        if state.stage != stage:
            raise InputError(
                f"{checkpoint} is a stage {state.stage} checkpoint: use save_checkpoint_stage{state.stage}.py"
            )
        step = state.global_step
        marker = {"stage": stage, "step": step, "prompt": state.settings.get("prompt", PROMPT), **source.facts}
        parts = own_parts(source, pretrained_stage1, variant)

    print(f"converting {checkpoint} (stage {stage}, step {step}{words and f'; {words}'})", flush=True)
    write_folders(parts, names, output_dir, marker)
    try:
        write_model_card(output_dir, stage, step, checkpoint.parent, words, source is None or source.measured)
    except (OSError, ValueError, LookupError, TypeError) as error:  # or the run's files are not what they should be
        print(f"{output_dir}/README.md could not be written ({error}); both models are whole", flush=True)


def write_folders(parts, names, output_dir, marker):
    """Write a folder of each of `names` below `output_dir`: `parts`, and what is derived from them.

    All are whole on the disk before the first takes its place, so that a failure leaves what was there; only a kill
    between two renames would leave folders of two conversions, whose conversion.json say so.
    """
    created = not output_dir.exists()
    partial = output_dir / f"conversion{PARTIAL_SUFFIX}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        for name, (cls, config, tensors) in parts.items():
            summary = write_model(partial / name, cls, config, tensors, marker)
            print(f"{output_dir / name}: {summary}", flush=True)
        if MOTION_ADAPTER in names:
            opened = MotionAdapter.open_motion_part(partial / "unet_main")
            summary = write_model(partial / MOTION_ADAPTER, MotionAdapter, opened.config, opened.tensors(), marker)
            print(f"{output_dir / MOTION_ADAPTER}: {summary}", flush=True)
        for name in names:
            replace_folder(partial / name, output_dir / name)
        partial.rmdir()
    except (InputError, OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if created and output_dir.exists() and not any(output_dir.iterdir()):
            output_dir.rmdir()
        if isinstance(error, (InputError, BrokenPipeError)):  # the latter of stdout
            raise
        raise InputError(
            f"output_dir {output_dir} could not be written ({error}): free some space, or change it"
        ) from None


def find_checkpoint(input_dir):
    """`input_dir` itself, or the newest complete checkpoint in it."""
    if not input_dir.is_dir():
        raise InputError(
            f"{input_dir} is no folder: a checkpoint-<step> folder or a run's folder was needed; see input_dir"
        )
    if is_checkpoint(input_dir):
        return input_dir
    checkpoint, skipped = find_latest(input_dir, for_conversion=True)
    for line in skipped:
        print(f"skipped: {line}")
    if checkpoint is None:
        raise InputError(f"{input_dir} has no complete checkpoint-<step> folder: set input_dir to one")
    return checkpoint


def refuse_source_weights(output_dir, sources, flag="output_dir", names=CONVERTED):
    """Never write over what a conversion reads, nor over folders in which not all is of a conversion."""
    written = {output_dir.resolve(), *((output_dir / name).resolve() for name in names)}
    for source in sources:
        if Path(source).resolve() in written:
            raise InputError(f"{flag} {output_dir} is also read from: choose another {flag}")
    own = {"config.json", f"{WEIGHTS_NAME}.safetensors", MARKER_FILE}
    for folder in (output_dir / name for name in names):
        if os.path.lexists(folder) and not folder.is_dir():
            raise InputError(f"{folder} is no folder, and no converter wrote it: choose another {flag}")
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if found and MARKER_FILE not in found:
            raise InputError(f"{folder} holds weights that no converter wrote: choose another {flag}")
        if foreign := sorted(found - own):
            raise InputError(f"{folder} holds {foreign[0]}, which no converter wrote: move it, or change {flag}")


def own_parts(source, pretrained_stage1, variant):
    """{model: (class, config, [(key, tensor)])} of checkpoints of these scripts: CheckpointWeights."""
    state = source.state
    classes = {"unet_main": INPAINTERS[state.stage].unet_class, "brushnet": BrushNetModel}
    frozen = {name: [] for name in classes}
    if state.stage == 2:
        if not pretrained_stage1:
            raise InputError(
                "a stage 2 checkpoint holds motion modules only: set pretrained_stage1 to the run's stage 1"
            )
        opened = open_frame_models(pretrained_stage1, variant)
        check_frozen(state, opened, pretrained_stage1)
        frozen = {name: weights.tensors() for name, weights in opened.items()}

    def tensors(name):
        yield from frozen[name]
        yield from source.tensors(f"{name}.")

    return {name: (cls, state.configs[name], tensors(name)) for name, cls in classes.items()}


def check_frozen(state, opened, pretrained_stage1):
    """The stage 1 weights must be those that the motion modules were trained on."""
    for name, weights in opened.items():
        folder, expected = state.weights[name]
        if fingerprint(weights.files) != expected:
            raise InputError(
                f"{pretrained_stage1}/{name} is not what the checkpoint was trained on ({folder}): set "
                "pretrained_stage1 to that folder, or restore its weights"
            )


def original_parts(stage, checkpoint, config_folders):
    """{model: (class, config, tensors)} of a checkpoint that the original scripts wrote: two whole models."""
    state_dicts = {
        name: {key.removeprefix("module."): tensor for key, tensor in read_tensors([Path(checkpoint, file)])}
        for name, file in (("unet_main", "model.safetensors"), ("brushnet", "model_1.safetensors"))
    }
    is_motion = any("motion_modules" in key for key in state_dicts["unet_main"])
    if is_motion != (stage == 2):
        found = 2 if is_motion else 1
        raise InputError(f"{checkpoint} is a stage {found} checkpoint: use save_checkpoint_stage{found}.py")

    sizes = infer_sizes(checkpoint, state_dicts["unet_main"])
    sizes["norm_num_groups"], heads, motion_heads = find_untold(sizes, config_folders)
    if stage == 2:
        position_table = next(t for key, t in state_dicts["unet_main"].items() if key.endswith("pos_embed.pe"))
        unet_config = {
            **sizes,
            "num_attention_heads": heads,
            "motion_num_attention_heads": motion_heads,
            "motion_max_seq_length": position_table.shape[1],
        }
    else:
        unet_config = {**sizes, "attention_head_dim": heads}
    configs = {"unet_main": unet_config, "brushnet": {**sizes, "attention_head_dim": heads}}
    classes = {"unet_main": INPAINTERS[stage].unet_class, "brushnet": BrushNetModel}
    return {name: (classes[name], configs[name], state_dicts[name].items()) for name in classes}


def infer_sizes(checkpoint, state_dict):
    """The entries of an SD1.5-like config that a UNet's shapes tell."""
    try:
        blocks = 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("down_blocks."))
        channels = [state_dict[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(blocks)]
        cross_attention = next(
            key for key in state_dict if key.endswith("attentions.0.transformer_blocks.0.attn2.to_k.weight")
        )
    except (KeyError, StopIteration, ValueError):
        raise InputError(f"{checkpoint} does not hold a DiffuEraser UNet: choose another input_dir") from None
    return {"block_out_channels": channels, "cross_attention_dim": state_dict[cross_attention].shape[1]}


def find_untold(sizes, config_folders):
    """(norm groups, spatial heads, motion heads), which leave no trace in shapes: from a config of the same sizes, or
    SD1.5's and AnimateDiff's."""
    for folder in filter(None, config_folders):
        path = Path(folder, "unet_main", "config.json")
        if path.is_file():
            config = json.loads(path.read_text())
            if all(config.get(key) == value for key, value in sizes.items()):
                heads = config.get("num_attention_heads") or config["attention_head_dim"]
                motion_heads = config.get("motion_num_attention_heads", heads)
                print(f"attention heads: {heads}, in motion modules {motion_heads} (from {path})")
                return config["norm_num_groups"], heads, motion_heads
    print("attention heads: 8, as in SD1.5 (no config of the checkpoint's sizes was found; see model_config)")
    return 32, 8, 8


def write_model(folder, cls, config, tensors, marker):
    """Check every key and shape, then write config.json, the weights in fp32, and the marker; returns a summary."""
    state_dict = {key: tensor.to(torch.float32).contiguous() for key, tensor in tensors}
    model = cls.on_meta(config)
    compare_shapes(shapes_of(model.state_dict()), shapes_of(state_dict), folder.name)
    folder.mkdir(parents=True)
    model.save_config(folder)
    file = Path(folder, f"{WEIGHTS_NAME}.safetensors")
    save_file(state_dict, file, metadata={"format": "pt"})
    with open(file, "rb") as stream:
        checksum = hashlib.file_digest(stream, "sha256").hexdigest()
    Path(folder, MARKER_FILE).write_text(json.dumps({**marker, "sha256": checksum}, indent=1))
    millions = sum(tensor.numel() for tensor in state_dict.values()) / 1e6
    return f"{cls.__name__}, {len(state_dict)} tensors, {millions:.1f} M values, sha256 {checksum[:16]}"


def read_prompt(folder):
    """What the weights of a converted folder were trained with; of any other folder "clean background"."""
    marker = Path(folder, "unet_main", MARKER_FILE)
    return read_json(marker).get("prompt", PROMPT) if marker.is_file() else PROMPT


@one_line_errors
def main(stage, argv=None, **defaults):
    """The command line of both converters: every constant is also an option of its name, and which weights to take."""
    description = f"Convert a stage {stage} checkpoint into unet_main/ and brushnet/."
    parser = Parser(description, argparse.ArgumentDefaultsHelpFormatter)
    for name, value in defaults.items():
        form = {"action": "store_true"} if isinstance(value, bool) else {"metavar": "DIR" if value else "NAME"}
        parser.add_argument(f"--{name}", default=value, help=HELP[name], **form)
    add = parser.add_argument
    add("--average", type=int, default=1, metavar="N", help=HELP["average"])
    add("--average_by", choices=ORDERS, default=LAST, help=HELP["average_by"])
    add("--no_ema", action="store_true", help=HELP["no_ema"])
    convert(stage, **vars(parser.parse_args(argv)))
