"""Which weights a conversion takes: a checkpoint's, their EMA, or the mean over several checkpoints of one run."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from common.errors import InputError
from common.run_files import HELD_OUT_FILE, read_rows, read_starts
from common.weights import compare_shapes, open_weights, read_shapes
from libs.checkpoints.checkpoint import (
    EMA_FILE,
    HELD_OUT,
    MODEL_FILE,
    TrainerState,
    is_checkpoint,
    is_original_form,
    list_checkpoints,
)

LAST = "step"
ORDERS = LAST, HELD_OUT  # the last checkpoints, or those of the lowest held-out loss


@dataclass(frozen=True)
class CheckpointWeights:
    """Of checkpoints of one run, oldest first, whose mean is taken. `file`: MODEL_FILE or EMA_FILE."""

    folders: tuple[Path, ...]
    state: TrainerState  # of the newest
    file: str

    @classmethod
    def of(cls, folders, no_ema=False):
        """Raises InputError where the checkpoints are not of one run, or only some have an EMA."""
        states = [TrainerState.read(folder, weights_only=True) for folder in folders]
        with_ema = [EMA_FILE in state.files and not no_ema for state in states]
        if len(set(with_ema)) > 1:
            without = folders[with_ema.index(False)]
            raise InputError(f"{without} has no {EMA_FILE}, others have: add --no_ema, or average fewer checkpoints")
        found = cls(tuple(folders), states[-1], EMA_FILE if with_ema[-1] else MODEL_FILE)
        shapes = read_shapes([folders[-1] / found.file])
        for folder, state in zip(folders[:-1], states, strict=False):
            refuse_another_run(folder, state, folders[-1], states[-1])
            compare_shapes(shapes, read_shapes([folder / found.file]), folder)
        return found

    def tensors(self, prefix):
        """Yield (key without the prefix, tensor) of the keys that have it, one in memory at a time.

        The mean is taken in fp64, where a sum of equal fp32 values is exact: equal checkpoints keep their values.
        """
        with ExitStack() as stack:
            first, *others = (stack.enter_context(open_weights(folder / self.file)) for folder in self.folders)
            for key in first.keys():
                if not key.startswith(prefix):
                    continue
                tensor = first.get_tensor(key)
                if others:
                    total = tensor.double()
                    for other in others:
                        total += other.get_tensor(key)
                    tensor = (total / len(self.folders)).float()
                yield key.removeprefix(prefix), tensor

    @property
    def facts(self):
        """What conversion.json says of it; {} of a checkpoint's own weights."""
        averaged = {"averaged": [folder.name for folder in self.folders]} if len(self.folders) > 1 else {}
        return averaged | ({"ema_decay": self.state.settings["ema_decay"]} if self.file == EMA_FILE else {})

    @property
    def words(self):
        """The same in words, or ""."""
        words = []
        if EMA_FILE in self.state.files:
            words.append(f"EMA of decay {self.facts['ema_decay']}" if self.file == EMA_FILE else "without the EMA")
        if len(self.folders) > 1:
            words.append(f"mean of {', '.join(folder.name for folder in self.folders)}")
        return ", ".join(words)

    @property
    def measured(self):
        """Whether the run's validation at this step was of these weights."""
        return len(self.folders) == 1 and self.file == (EMA_FILE if EMA_FILE in self.state.files else MODEL_FILE)


def refuse_another_run(folder, state, newest, newest_state):
    """Raise InputError unless both have the same stage, models and start weights, wherever these lie."""

    def facts(state):
        # diffusers' own notes, _use_default_values, are in another order in every process.
        models = {
            name: {key: value for key, value in config.items() if not key.startswith("_")}
            for name, config in state.configs.items()
        }
        fingerprints = {name: fingerprint for name, (_, fingerprint) in state.weights.items()}
        return {"stage": state.stage, "models": models, "start weights": fingerprints}

    theirs = facts(newest_state)
    different = [name for name, value in facts(state).items() if value != theirs[name]]
    if different:
        raise InputError(f"{folder} and {newest} are of two runs: they differ in {different[0]}; move one of them away")


def choose_checkpoints(run_dir, count, order):
    """The folders of `count` complete checkpoints of a run, oldest first.

    Args:
        order: LAST or HELD_OUT.

    Raises: InputError where the folder is one checkpoint, or there are too few, or some are the original scripts'.
    """
    if count < 1:
        raise InputError(f"--average={count}: at least 1 was needed")
    if order not in ORDERS:
        raise InputError(f"--average_by={order}: one of {', '.join(ORDERS)} was needed")
    if is_checkpoint(run_dir):
        raise InputError(
            f"{run_dir} is one checkpoint: --average and --average_by choose in a run's folder; set input_dir to "
            f"{run_dir.parent}"
        )
    losses = held_out_losses(run_dir) if order == HELD_OUT else {}
    found = []
    for step, folder in list_checkpoints(run_dir):
        if is_original_form(folder):
            raise InputError(f"{folder} was written by the original DiffuEraser scripts: convert one of them alone")
        try:
            TrainerState.read(folder, weights_only=True)
        except InputError as error:
            print(f"skipped: {error}")
            continue
        if order == LAST or step in losses:
            found.append((step, folder))
    if len(found) < count:
        measured = " with a held-out loss" if order == HELD_OUT else ""
        raise InputError(f"{run_dir} has {len(found)} complete checkpoints{measured}, --average={count} needs {count}")
    best_first = sorted(found, key=lambda entry: (losses.get(entry[0], 0), -entry[0]))
    return [folder for _, folder in sorted(best_first[:count])]


def held_out_losses(run_dir):
    """{step: held-out loss}, finite ones. Raises InputError where there are none."""
    starts = read_starts(run_dir)
    file = Path(run_dir, starts[-1]["settings"]["logging_dir"] if starts else "", HELD_OUT_FILE)
    try:
        losses = {int(row["step"]): float(row["held_out_loss"]) for row in read_rows(file)}
    except (ValueError, KeyError) as error:
        raise InputError(f"{file} is no longer what a run wrote ({error}): use --average_by={LAST}") from None
    losses = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    if not losses:
        raise InputError(f"{file} has no held-out losses: use --average_by={LAST}")
    return losses
