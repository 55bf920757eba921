"""When a run's checkpoints are written, kept and converted, and what a failure costs."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from safetensors import SafetensorError

from common.distributed import sum_over_processes
from common.errors import InputError, first_line
from common.run_files import AS_DEPLOYED
from libs.checkpoints.checkpoint import HELD_OUT, finish_checkpoint, mark_best, prune, write_checkpoint
from libs.checkpoints.convert import convert
from libs.evaluation.metrics import SCORES, measure_words
from libs.training.config import what_sets_clips
from libs.training.log import log

BEST_FILE_ERRORS = (OSError, ValueError, LookupError, TypeError)  # also of a best_checkpoint.json that is not ours


class Checkpoints:
    """Those of one run. Processes make every call together.

    Args:
        state: TrainerState, moved on by the loop.
        last: the checkpoint that the run goes on from, or None.
        weights: a function that gives the {file name: {key: tensor}} of a checkpoint.
    """

    def __init__(self, config, stage, accelerator, state, last, weights):
        self.config, self.stage, self.accelerator, self.state, self.last = config, stage, accelerator, state, last
        self.weights = weights
        self.written = None  # (path, start of saving, must) of one that `finishing` has to flush and name

    def save(self, bad_streak, must):
        """Write a checkpoint, which `finishing` or `finish` must follow. One that fails, here or there, leaves the
        earlier ones and the run alone, unless it `must` be saved.

        Args:
            bad_streak: of Meter; weights after losses that are not finite are not worth keeping.
        """
        step, start = self.state.global_step, time.perf_counter()
        bad, _ = bad_streak
        scales = self.accelerator.scaler is not None  # fp16's skips steps of such losses: the weights are whole
        if not scales and sum_over_processes(self.accelerator, bad):
            losses = f"the last {bad} losses" if bad else "losses of another process"
            reason = f"no checkpoint at step {step}: {losses} are not finite"
            if must:
                raise InputError(f"{reason}; the last good one is {self.last}: resume with a lower --learning_rate")
            log.info(reason)
            return
        with self.disk_may_fail(must):
            folder = write_checkpoint(self.accelerator, self.config.output_dir, self.state, self.weights())
            self.written = folder, start, must

    @contextmanager
    def finishing(self):
        """Flush and name what `save` has written while the block runs: a third of the time that saving stage 1 takes,
        which needs neither the GPU nor the run's state. However the block ends, this waits and raises what `save` would
        have raised. Only then is the new checkpoint the last one."""
        if self.written is None:
            yield
            return
        (folder, start, must), self.written = self.written, None
        with ThreadPoolExecutor(1) as thread:
            finished = thread.submit(self.finish_in_main_process, folder, start)
            try:
                yield
            finally:
                with self.disk_may_fail(must):
                    self.last = finished.result()
        self.accelerator.wait_for_everyone()

    def finish(self):
        """The same, with nothing to do meanwhile."""
        with self.finishing():
            pass

    def finish_in_main_process(self, folder, start):
        if self.accelerator.is_main_process:
            finish_checkpoint(folder)
            log.info("saved %s in %.0f s", folder, time.perf_counter() - start)
            config, step = self.config, self.state.global_step
            try:
                prune(config.output_dir, step, config.checkpoints_total_limit, config.keep_best_checkpoint)
            except BEST_FILE_ERRORS as error:
                log.info("older checkpoints could not be deleted (%s)", error)
        return folder

    @contextmanager
    def disk_may_fail(self, must):
        """Where the disk fails the block: InputError if the run has to end, one line in the log otherwise."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_write_error(error):
                raise
            # Other processes wait for this one: then only ending is left.
            reason = f"checkpoint of step {self.state.global_step} could not be written ({first_line(error)})"
            if must or self.accelerator.num_processes > 1:
                raise InputError(f"{reason}: free some space and run the same command to resume") from None
            steps = self.config.checkpointing_steps
            log.info("%s: free some space; the next one is tried after %d steps", reason, steps)

    def mark_best(self, measured):
        """Note the checkpoint just written as the best one, if it is the best so far by --best_by.

        Args:
            measured: what Validation.run has found. Scores are those as deployed where there are few-step weights.
        """
        step, by = self.state.global_step, self.config.best_by
        saved = self.last is not None and self.last.name == f"checkpoint-{step}"
        form = AS_DEPLOYED if by != HELD_OUT and self.config.pcm_weights else ""
        measure = by + form
        value = measured.get(measure)
        if not saved or not self.accelerator.is_main_process:
            return
        if value is None:
            if by != HELD_OUT:
                log.info("not all validation videos were scored: this checkpoint cannot become the best by %s", by)
            return
        clips, higher = what_sets_clips(self.state.settings), by in SCORES and SCORES[by].higher_is_better
        if by != HELD_OUT:
            clips["setups"] = measured[f"setups{form}"]

        def complete(noted):  # older versions did not note these
            later = {name: clips.get(name) for name in ("hole_videos", "proportion_empty_prompts")}
            return {**noted, **what_sets_clips({**later, **noted})}

        try:
            if mark_best(self.config.output_dir, step, value, clips, complete, measure, higher):
                log.info("%s is the best checkpoint so far, by %s", self.last.name, measure_words(measure))
        except BEST_FILE_ERRORS as error:
            log.info("the best checkpoint could not be noted (%s)", error)

    def convert(self):
        """The last checkpoint as the two folders that inference loads."""
        config, folder = self.config, self.config.output_dir
        if self.accelerator.is_main_process:
            source = getattr(config, "pretrained_stage1", None)
            convert(self.stage.number, self.last, folder, source, variant=config.variant)
        self.accelerator.wait_for_everyone()
        log.info("done at step %d: %s/unet_main and %s/brushnet", self.state.global_step, folder, folder)


def is_write_error(error):
    """Whether a checkpoint failed for the disk's sake; torch's writers raise plain RuntimeErrors then."""
    return isinstance(error, (OSError, SafetensorError)) or any(
        name in str(error) for name in ("PytorchStreamWriter", "inline_container", "iostream")
    )
