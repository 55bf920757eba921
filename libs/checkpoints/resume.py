"""What a run depends on, and whether it may go on from a checkpoint: known before any weights load."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from common.distributed import count_processes, distributed_type
from common.errors import InputError
from common.weights import fingerprint
from libs.checkpoints.checkpoint import TrainerState

# What resuming makes of a setting that has changed since the checkpoint, as docs/settings.md says it.
REFUSED = "refused"  # the position in the data or the optimizer's state would mean something else
OPTIMIZER = "refused always: another form of optimizer state"
BATCH = "logged if processes x batch x accumulation stay, else refused"  # a step then is the mean over the same clips
LOGGED = "logged"
CONTENT = "path free; other content refused"
VIDEOS = "path free; other videos, by name and number of frames, refused"
IN_WORDS = {
    "clips": "clips an epoch",
    "videos": "videos, by a hash of names and lengths,",
    "hole_videos": "videos that masks and objects are taken from, by a hash of names,",
}
# Their product is the global batch.
BATCH_SETTINGS = ("num_processes", "train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class ResumePolicy:
    """What the settings say of themselves."""

    on_change: dict  # {setting: REFUSED, OPTIMIZER, BATCH or LOGGED} of those that checkpoints record
    defaults: dict  # {setting: value} of the same: what a run had that was older than the setting
    what_sets_clips: Callable  # settings -> what of them the fixed clips of the held-out loss follow from


def describe_run(config, stage, opened, dataset, policy):
    """The TrainerState of a run's start; a checkpoint's is compared with it.

    Args:
        opened: {model: OpenedWeights or None}.
        policy: ResumePolicy.
    """
    settings = {
        "engine": distributed_type(),
        "num_processes": count_processes(),
        "clips": len(dataset),
        "videos": hash_of_names(f"{video.folder.name} {len(video.frames)}" for video in dataset.videos + dataset.pairs),
        "hole_videos": hash_of_names(dataset.holes.sources()),
        **{name: getattr(config, name) for name in policy.on_change},
        "mask_span": list(config.mask_span),  # as it is read back from JSON
        "validation_image": [Path(folder).name for folder in config.validation_image],
    }
    weights = {name: [str(w.folder), fingerprint(w.files)] for name, w in opened.items() if w}
    return TrainerState(stage=stage.number, weights=weights, settings=settings)


def hash_of_names(lines):
    """Of names in their order, which say what an index or a draw stands for; not of where they lie. "" of none."""
    text = "\n".join(lines)
    return text and hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]


def global_batch(settings):
    """Clips in a step of all processes together."""
    return math.prod(settings[name] for name in BATCH_SETTINGS)


def go_on_from(checkpoint, saved, now, policy, resume_anyway):
    """(the run's TrainerState at the checkpoint, lines about what has changed since).

    Args:
        saved, now: the TrainerStates of the checkpoint and of this run's start.
        policy: ResumePolicy.

    Raises: InputError for changes that would give position or optimizer state another meaning, unless resume_anyway,
        and for optimizer state of another form in any case.
    """
    refuse_other_optimizer(checkpoint, saved.settings, now.settings)
    decisive = [
        f"weights of {name} from {saved.weights[name][0]}, now from {now.weights[name][0]}"
        for name in saved.weights.keys() & now.weights.keys()
        if saved.weights[name][1] != now.weights[name][1]
    ]
    same_batch = global_batch(saved.settings) == global_batch(now.settings)
    changes, earlier = [], {**now.settings, **policy.defaults, **saved.settings}
    for name, value in now.settings.items():
        before = earlier[name]
        if before == value:
            continue
        if name == "hole_videos" and "" in (before, value):
            use = "used from here on" if value else "not used any more"
            changes.append(f"changed since the checkpoint: masks of videos are {use}")
        elif policy.on_change.get(name) == LOGGED or (name in BATCH_SETTINGS and same_batch):
            changes.append(f"changed since the checkpoint: {name} from {before} to {value}")
        else:
            decisive.append(f"{IN_WORDS.get(name, name)} {before}, now {value}")
    if decisive and not resume_anyway:
        raise InputError(
            f"{checkpoint} was written with {'; '.join(decisive)}: go back to that, choose another --output_dir, or "
            "give --resume_anyway"
        )
    state = replace(saved, weights=now.weights, settings=now.settings)
    if policy.what_sets_clips(earlier) != policy.what_sets_clips(now.settings):
        changes.append("the held-out loss is measured on other clips from here on, and starts anew")
        state.probe_start = None
    return state, changes


def refuse_other_optimizer(checkpoint, saved, now):
    """FSDP has its own form of optimizer state, and so have 8-bit AdamW and bf16 weights."""
    kept = "or convert the checkpoint and start another run from the converted folder"
    if saved["engine"] != now["engine"]:
        raise InputError(
            f"{checkpoint} holds optimizer state of {saved['engine']}, this run's engine is {now['engine']}: choose "
            f"the same ACCELERATE_CONFIG, {kept}"
        )
    forms = {"use_8bit_adam": ("8-bit AdamW", "fp32 AdamW", 1), "bf16_weights": ("bf16 weights", "fp32 weights", 2)}
    for flag, (used, unused, level) in forms.items():
        before, after = (settings.get(flag, False) for settings in (saved, now))
        if before != after:
            states = [used if value else unused for value in (before, after)]
            change = f"add --{flag}" if before else f"drop --{flag} (LOW_MEMORY={level} sets it)"
            raise InputError(
                f"{checkpoint} holds optimizer state of {states[0]}, this run's is {states[1]}: {change}, {kept}"
            )
