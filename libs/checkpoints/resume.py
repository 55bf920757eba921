"""What a run depends on, and whether it may go on from a checkpoint: known before any weights load."""

import hashlib
import math
import os
from dataclasses import replace
from pathlib import Path

from common.distributed import engine_name
from common.errors import InputError
from common.weights import fingerprint
from libs.checkpoints.checkpoint import TrainerState

# What a checkpoint's position in the data and its optimizer state depend on: changes are refused.
DECISIVE_SETTINGS = ("nframes", "resolution", "seed")
IN_WORDS = {"clips": "clips an epoch", "videos": "videos, by a hash of names and lengths,"}
# What may change as long as their product, the global batch, stays: a step then is the mean over the same clips.
BATCH_SETTINGS = ("num_processes", "train_batch_size", "gradient_accumulation_steps")
# On what clips the held-out loss is measured: on other ones it compares with nothing measured before.
PROBE_SETTINGS = ("validation_image", "probe_clips", "mask_span", "mask_original_margins")
# What may change on the way, and is logged then.
HARMLESS_SETTINGS = (
    *PROBE_SETTINGS, "learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power",
    "max_train_steps", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay",
    "mixed_precision", "gradient_checkpointing", "compile", "cuda_graph", "proportion_empty_prompts",
)  # fmt: skip


def describe_run(args, stage, opened, dataset):
    """The TrainerState of a run's start; a checkpoint's is compared with it.

    Args:
        opened: {model: OpenedWeights or None}.
    """
    names = (*DECISIVE_SETTINGS, *BATCH_SETTINGS[1:], *HARMLESS_SETTINGS, "use_8bit_adam")
    settings = {
        "engine": engine_name(),
        "num_processes": int(os.environ.get("WORLD_SIZE", 1)),
        "clips": len(dataset),
        "videos": hash_of_videos(dataset),
        **{name: getattr(args, name) for name in names},
        "mask_span": list(args.mask_span),  # as it is read back from JSON
        "validation_image": [Path(folder).name for folder in args.validation_image],
    }
    weights = {name: [str(w.folder), fingerprint(w.files)] for name, w in opened.items() if w}
    return TrainerState(stage=stage.number, weights=weights, settings=settings)


def hash_of_videos(dataset):
    """Of names and lengths in their order, which say what clip an index stands for; not of where they lie."""
    lines = [f"{video.folder.name} {len(video.frames)}" for video in dataset.videos]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def global_batch(settings):
    """Clips in a step of all processes together."""
    return math.prod(settings[name] for name in BATCH_SETTINGS)


def go_on_from(checkpoint, saved, now, resume_anyway):
    """(the run's TrainerState at the checkpoint, lines about what has changed since).

    Args:
        saved, now: the TrainerStates of the checkpoint and of this run's start.

    Raises: InputError for changes that would give position or optimizer state another meaning, unless resume_anyway,
        and for optimizer state of another form in any case.
    """
    refuse_other_optimizer(checkpoint, saved.settings, now.settings)
    decisive = [
        f"weights of {name} from {saved.weights[name][0]}, now from {now.weights[name][0]}"
        for name in saved.weights.keys() & now.weights.keys()
        if saved.weights[name][1] != now.weights[name][1]
    ]
    harmless = HARMLESS_SETTINGS
    if global_batch(saved.settings) == global_batch(now.settings):
        harmless += BATCH_SETTINGS
    changes = []
    # Early checkpoints know fewer settings: those count as unchanged.
    for name, value in now.settings.items():
        before = saved.settings.get(name, value)
        if before == value:
            continue
        if name in harmless:
            changes.append(f"changed since the checkpoint: {name} from {before} to {value}")
        else:
            decisive.append(f"{IN_WORDS.get(name, name)} {before}, now {value}")
    if decisive and not resume_anyway:
        raise InputError(
            f"{checkpoint} was written with {'; '.join(decisive)}: go back to that, choose another --output_dir, or "
            "give --resume_anyway"
        )
    state = replace(saved, weights=now.weights, settings=now.settings)
    if probe({**now.settings, **saved.settings}) != probe(now.settings):
        changes.append("the held-out loss is measured on other clips from here on, and starts anew")
        state.probe_start = None
    return state, changes


def probe(settings):
    """What the clips follow from that the held-out loss is measured on."""
    return {name: settings[name] for name in (*PROBE_SETTINGS, *DECISIVE_SETTINGS)}


def refuse_other_optimizer(checkpoint, saved, now):
    """Every engine has its own form of optimizer state, 8-bit AdamW another one; DeepSpeed's also depends on the number
    of processes."""
    kept = "or convert the checkpoint and start another run from the converted folder"
    if saved["engine"] != now["engine"]:
        raise InputError(
            f"{checkpoint} holds optimizer state of {saved['engine']}, this run's engine is {now['engine']}: choose "
            f"the same ACCELERATE_CONFIG, {kept}"
        )
    if saved.get("use_8bit_adam", now["use_8bit_adam"]) != now["use_8bit_adam"]:
        before, after = ("8-bit AdamW", "fp32 AdamW") if saved["use_8bit_adam"] else ("fp32 AdamW", "8-bit AdamW")
        change = "add --use_8bit_adam" if saved["use_8bit_adam"] else "drop --use_8bit_adam (LOW_MEMORY=1 sets it)"
        raise InputError(f"{checkpoint} holds optimizer state of {before}, this run's is {after}: {change}, {kept}")
    if now["engine"] == "deepspeed" and saved["num_processes"] != now["num_processes"]:
        raise InputError(
            f"{checkpoint} was written by {saved['num_processes']} processes, now there are {now['num_processes']}: "
            "DeepSpeed needs the same number; FSDP would take any"
        )
