"""The loop that both stages share: read this first, then loss.py.

What a step needs lives in objects of its own: models that are only read (LoadedBase), passes through the trained one
(ForwardBackward), averaged weights (Ema), the log's numbers (Meter), damaged videos (BrokenVideos), checkpoints
(Checkpoints), validation (Validation). setup.py makes most of them.
"""

import os
from contextlib import nullcontext

from common.distributed import lost_processes_named, make_accelerator, sum_over_processes, unsharded
from common.errors import one_line_errors
from common.files import locked
from libs.checkpoints.checkpoint import MODEL_FILE, weights_of
from libs.training.checks import check_run, refuse_stale
from libs.training.config import parse_args
from libs.training.ema import Ema
from libs.training.log import log, log_on_main_process, log_start, start_trackers
from libs.training.meter import BrokenVideos, Meter
from libs.training.saving import Checkpoints
from libs.training.setup import (
    build_model,
    load_base,
    make_loader,
    make_optimizer_and_schedule,
    make_passes,
    require_agreement,
    resume,
    set_up_torch,
    start_compiling,
)
from libs.training.stopping import StopRequest
from libs.training.validation import Validation

STOPPED = "stopped by %s at step %d; the same command with --resume_from_checkpoint=latest goes on"


@one_line_errors
def run(stage, argv=None):
    """Train one stage, a subclass of Stage: what `accelerate launch train_DiffuEraser_stage<n>.py` does."""
    config = parse_args(stage, argv)
    checks, found = check_run(config, stage)
    if config.check_only:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # every machine has its own files, and its own log
            print(checks.table(), flush=True)
        raise SystemExit(int(checks.failed))
    accelerator = make_accelerator(config)
    with (
        locked(config.output_dir) if accelerator.is_main_process else nullcontext(),
        StopRequest(config.output_dir) as stop,
        log_on_main_process(accelerator),
        lost_processes_named(config.output_dir),
    ):
        refuse_stale(config, found)
        log_start(config, stage, accelerator, checks, found)
        require_agreement(accelerator, config, found)
        start_trackers(accelerator, config)
        set_up_torch(config)
        with start_compiling(config, stage, accelerator, found) as ahead:
            train(config, stage, accelerator, found, stop, ahead)
        accelerator.end_training()


def train(config, stage, accelerator, found, stop, ahead):
    """Step until the last step, or until a signal asks to stop.

    Args:
        found: RunInputs, what the checks have opened.
        stop: StopRequest.
        ahead: CompileAhead or None.
    """
    base, validation_embeds = load_base(config, accelerator, found)
    validation = Validation(config, stage, accelerator, found, base, validation_embeds, stop)
    model = build_model(config, stage, accelerator, found)
    optimizer, schedule, last_step = make_optimizer_and_schedule(config, accelerator, model, found)
    loader = make_loader(config, accelerator, found, base.vae.cache, last_step)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    state, unwrapped = found.state, accelerator.unwrap_model(model)
    forward_backward = make_passes(config, accelerator, model, base, ahead, state)
    resume(accelerator, optimizer, schedule, found)
    ema = Ema(config.ema_decay, unwrapped, found.checkpoint)

    def weights():
        return {MODEL_FILE: weights_of(accelerator, model), **ema.files()}

    checkpoints = Checkpoints(config, stage, accelerator, state, found.checkpoint, weights)
    broken_videos, meter = BrokenVideos(config.max_broken_share), Meter(accelerator, last_step)
    first_step = state.global_step + 1
    with ema.in_use():
        validation.held_out_loss.start(unwrapped, state)
    model.train()
    for batch in loader:
        broken_videos.note(batch)
        with accelerator.accumulate(model):
            loss = forward_backward(batch)
            grad_norm = clip_gradients(accelerator, model, config.max_grad_norm)
            optimizer.step()
            forward_backward.clear_gradients(optimizer)
        meter.add(loss, grad_norm, state.global_step + 1, batch["videos"])
        if not accelerator.sync_gradients:
            continue  # more passes belong to this step

        # A step whose gradients overflowed, so that fp16's scaler left the weights alone, counts like any other.
        ema.update()
        schedule.step()
        state.global_step += 1
        state.clips_done += found.global_batch
        step, last = state.global_step, state.global_step == last_step
        if step % config.logging_steps == 0 or step == first_step or last:
            meter.report(step, float(schedule.get_last_lr()[0]))
            meter.refuse_bad_losses(checkpoints.last)
        # Save before validating: validation takes minutes, and the checkpoint is flushed to the disk meanwhile.
        stopping = not last and must_stop(config, accelerator, step, stop)
        saving = step % config.checkpointing_steps == 0 or last or stopping
        validating = validation.is_due(step, step == first_step, saving)
        if saving or validating:
            forward_backward.release()
        if saving:
            checkpoints.save(meter.bad_streak(), must=last or stopping)
        if stopping:
            checkpoints.finish()
            log.info(STOPPED, stop.signal, step)
            break
        if saving or validating:
            with checkpoints.finishing(), ema.in_use():
                measured = validation.run(unwrapped, state, sample=validating)
            if saving:
                checkpoints.mark_best(measured)
            model.train()
            meter.restart()  # neither counts as time per step
    else:
        checkpoints.convert()
    base.close()


def clip_gradients(accelerator, model, max_norm):
    """The gradients' norm before clipping, (); None in a pass that later ones of the same step add to."""
    if not accelerator.sync_gradients:
        return None
    return unsharded(accelerator.clip_grad_norm_(model.parameters(), max_norm))


def must_stop(config, accelerator, step, stop):
    """Whether a signal asks to stop; several processes agree on it at the steps that are logged."""
    if accelerator.num_processes == 1:
        return stop.signal is not None
    if step % config.logging_steps or not sum_over_processes(accelerator, stop.signal is not None):
        return False
    stop.received = stop.signal or "a signal to another process"
    return True
