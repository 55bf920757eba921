"""Scoring the videos of a plan, in one process or several: what a video's method gave becomes a file of numbers."""

import multiprocessing
import os
from typing import NamedTuple

import numpy as np
import torch

from common.errors import InputError, first_line, one_line_errors
from common.files import write_json
from dataset.images import list_frames
from libs.comparison.clips import save_clips
from libs.comparison.methods import TRUTH
from libs.comparison.plan import FPS, Plan
from libs.evaluation.cases import noise_seed
from libs.evaluation.contact_sheet import contact_sheet, stack_sheets
from libs.evaluation.metrics import Reference
from libs.evaluation.networks import load_networks
from libs.evaluation.vfid import load_i3d
from libs.inference.composition import paste
from libs.inference.prior import read_prior
from libs.inference.video import describe_holes, write_image


class Tools(NamedTuple):
    """What a process loads once."""

    fills: dict  # {name of a method: what Method.load returns}
    networks: list
    i3d: object | None

    @classmethod
    def load(cls, plan):
        """Networks first: their files are checked before models load."""
        networks, path = load_networks(plan.args), plan.args.i3d_weights
        i3d = load_i3d(path) if path else None
        return cls({method.name: method.load(plan.args) for method in plan.methods}, networks, i3d)


def score(plan, tools=None):
    """Score what is left of a plan, with as many processes as were asked for. Raises InputError where one failed.

    Args:
        tools: those that this process has loaded, if it is the only one.
    """
    jobs = plan.jobs_left()
    done, count = len(plan.jobs) - len(jobs), min(plan.args.num_processes, len(jobs))
    if done:
        print(f"{done} of {len(plan.jobs)} scored before, with these settings", flush=True)
    if tools or not jobs:
        score_jobs(plan, jobs, tools)
        return
    # Spawned: a forked process cannot use a GPU. Each takes every `count`th job, so that all have about as many.
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=score_in_process, args=(plan.args, jobs[rank::count], rank, count, os.getpid()))
                 for rank in range(count)]  # fmt: skip
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = [process for process in processes if process.exitcode]
    if failed:
        raise InputError(f"{len(failed)} of {count} processes failed (exit status {failed[0].exitcode}), see above: "
                         "the same command goes on where they were")  # fmt: skip


@one_line_errors
def score_in_process(args, jobs, rank, count, parent):
    """Score these jobs on the GPU of this process's number, as long as the process lives that has started it."""
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(rank % torch.accelerator.device_count())
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    plan = Plan.of(args)
    score_jobs(plan, jobs, Tools.load(plan), goes_on=lambda: os.getppid() == parent)


def score_jobs(plan, jobs, tools, goes_on=lambda: True):
    """Score each (number of a video, seed) in turn; a video for which that fails is noted, and named at the end."""
    for number, seed in jobs:
        if not goes_on():
            return
        key = plan.key(number)
        try:
            clip = plan.protocol.read(plan.folders[number], number, seed, plan.args)
            part = score_clip(plan, tools, number, seed, clip, find_prior(plan, number, clip))
        except (InputError, torch.OutOfMemoryError) as error:
            part = {"broken": first_line(error)}
        write_json(plan.part(number, seed), {"key": key, **part})


def find_prior(plan, number, clip):
    """Another method's frames (f, h, w, 3) uint8 of a video, in the clip's size, or None."""
    if not plan.protocol.takes_priors:
        return None
    folder = plan.folders[number]
    return read_prior(plan.args.prior, folder, list_frames(folder), clip.holes.shape[1:], plan.size)


def score_clip(plan, tools, number, seed, clip, prior):
    """{"rows": {method: {"frames": n, score: value}}, "features": {method: VFID's}} of a clip.

    With the first seed all methods are scored, and the results written to be looked at; with a later one only the
    methods whose scores follow from the seed.
    """
    first = seed == plan.seeds[0]
    reference = Reference(clip.truth, clip.holes, clip.shown, tools.networks)
    rows, features, results = {}, {}, {}
    for method in plan.methods:
        if not first and not plan.varies(method):
            continue
        raw = tools.fills[method.name](clip, prior, noise_seed(seed, number))
        results[method.name] = result = paste(clip.shown, raw, clip.holes) if plan.protocol.pasted else raw
        rows[method.name] = {"frames": reference.scored_frames, **reference.score(result, raw)}
        if tools.i3d and clip.truth is not None:
            features[method.name] = tools.i3d.describe(result, plan.folders[number].name).tolist()
    if first:
        write_pictures(plan, number, clip, results)
    return {"rows": rows, "features": features}


def write_pictures(plan, number, clip, results):
    """What the page plays of a video, and its contact sheet; a line says what it is.

    Args:
        results: {method: (f, h, w, 3) uint8 RGB}.
    """
    name = plan.folders[number].name
    if clip.truth is clip.shown:
        results.pop(TRUTH)
    save_clips(plan.output_dir, name, clip.shown, clip.holes, results, FPS)
    sheets = [contact_sheet(f"{name}: {method}", clip.shown, clip.holes, result)
              for method, result in results.items() if method != TRUTH]  # fmt: skip
    write_image(plan.sheet(number), stack_sheets(sheets))
    shares = [float(np.count_nonzero(hole) / hole.size) for hole in clip.holes]
    frames, height, width, _ = clip.shown.shape
    print(f"{name}: {frames} frames of {width}x{height}, {describe_holes(shares, clip.note)}", flush=True)
