"""Does a part of the recipe pay? Small models go on from one start, with it and without it, several seeds each.

    python -m benchmarks.ablation                             # start, train, score and table
    python -m benchmarks.ablation train score table --arms guide mix --seeds 0 1 2 --minutes 9
    python -m benchmarks.ablation --stage 2                   # motion modules, beside stage 1 itself

    start   videos, weights, a VAE, and stage 1 by the guide's recipe: where all arms begin
    train   every arm with every seed, through the shell scripts, several at once on each GPU
    score   held-out videos: an object to remove whose truth is known, and known content to restore; of sampled results,
            and of the noise that a model predicts, which tells arms apart with fewer videos and seeds
    table   each arm beside the first one, with 95 % intervals over videos and seeds

What is done is not done again, and what --minutes stops goes on where it was. DAVIS_ROOT and YTVOS_ROOT may name real
videos, to which drawn ones are added. Small models from scratch are not the published model: they tell which way a
part turns the result, not how far.
"""

import itertools
import json
import os
import queue
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler

from common.command_line import Parser, at_least, require
from common.errors import one_line_errors
from common.files import write_json
from common.run_files import read_table, write_rows
from dataset.folders import read_names, scan_video
from libs.evaluation import cases
from libs.evaluation.cases import TASKS, make_cases, noise_seed
from libs.evaluation.intervals import compare_all, markdown
from libs.evaluation.metrics import Score
from libs.inference.load import add_inference_flags, check_inference_flags, load_pipeline
from libs.training.config import shell_variables
from libs.training.loss import EncodedBatch, predict, weighted_mse
from toy import train_vae
from toy.join_videos import join_videos
from toy.make_videos import make_videos
from toy.make_weights import make_weights

MIX = ["--mask_mix=blob=0.4,object=0.3,box=0.1,stroke=0.1,text=0.1"]
BORDER = ["--mask_border=0.3", "--mask_growth=-1,2"]  # pixels of 64: at 512 from -8 to 16
PASTE = ["--paste=0.3"]
LOSS = ["--loss_weights=1,0.5,0.05", "--loss_rim=1"]  # of 16 latents: at 512 four
EMA = ["--ema_decay=0.98"]
OWN_NOISES = "own-noises"
ARMS = {  # stage: {arm: flags of the trainer}; the first arm is what the others are compared with
    1: {
        "guide": [],
        "start": None,  # where all arms begin, to tell what training on brings at all
        "mix": MIX,
        "border": BORDER,
        "paste": PASTE,
        "weights": LOSS,
        "ema": EMA,
        "averaging": None,  # the guide's last checkpoints, averaged
        "all": [*MIX, *BORDER, *PASTE, *LOSS, *EMA],
    },
    2: {
        OWN_NOISES: None,  # stage 1 itself, frame by frame, each from a noise of its own, as stage 2's frames are
        "start": None,  # the same from one noise for all frames, as stage 1 is used: hardly any flicker
        "guide": [],
        "known": ["--known_frames=0.3"],
    },
}
AVERAGED = 3  # checkpoints, the last of CHECKPOINTS that a run of the guide's recipe saves
CHECKPOINTS = 10
SIZES = {  # of the models; drawn videos to train on beside 8, and held out beside 2; per stage the clips of a step
    "tiny": {"resolution": 32, "drawn": 0, "held_out": 0, "vae_steps": 10, "start_steps": 2, "rates": (1e-3, 1e-3),
             1: {"clips": 1, "frames": 2, "steps": 3}, 2: {"clips": 1, "frames": 3, "steps": 2}},
    "small": {"resolution": 32, "drawn": 60, "held_out": 20, "vae_steps": 700, "start_steps": 2500,
              "rates": (1e-3, 2e-4), 1: {"clips": 4, "frames": 2, "steps": 400},
              2: {"clips": 1, "frames": 22, "steps": 400}},
    "medium": {"resolution": 64, "drawn": 100, "held_out": 20, "vae_steps": 1500, "start_steps": 700,
               "rates": (5e-4, 1e-4), 1: {"clips": 64, "frames": 4, "steps": 200},
               2: {"clips": 4, "frames": 22, "steps": 400}},
}  # fmt: skip
SCORES = {**cases.SCORES, "noise": Score("error of the predicted noise in the hole", "", 4, False)}
TIMESTEPS = (100, 300, 500, 700, 900)  # at which it is predicted
LEAST_SECONDS = 45  # before the end of --minutes nothing begins: it would be loading then
SAMPLER_STEPS = 20


class Lab:
    """The folders of one start and its arms, and what is known about them from the command line."""

    def __init__(self, options):
        self.options, self.stage, self.size = options, options.stage, SIZES[options.size]
        self.steps = options.steps or self.size[self.stage]["steps"]
        self.root = Path(options.output_dir)
        self.data, self.weights, self.start = self.root / "data", self.root / "weights", self.root / "start"
        self.runs, made = self.root / f"stage{self.stage}", self.root / "start.json"
        size = json.loads(made.read_text())["size"] if made.is_file() else options.size
        require(
            size == options.size, f"{self.root} has {size} models, not {options.size} ones: --size={size} was needed"
        )
        self.deadline = time.monotonic() + 60 * options.minutes
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        self.gpus = visible.split(",") if torch.cuda.is_available() else [""]
        self.pairs = [(arm, seed) for seed in options.seeds for arm in options.arms]

    def folder(self, arm, seed):
        """Converted weights of a finished arm."""
        return self.start if arm in ("start", OWN_NOISES) else self.runs / f"{arm}-{seed}"

    def scores(self, arm, seed):
        return self.runs / f"{arm}-{seed}.csv"

    def base_flags(self):
        base = self.weights / "stable-diffusion-v1-5"
        return [f"--base_model_name_or_path={base}", f"--vae_path={self.weights / 'sd-vae-ft-mse'}"]

    def training(self, stage, output_dir, clips, rate, steps, flags):
        """The command of a run of the trainer that resumes where it was."""
        frames, resolution = self.size[stage]["frames"], self.size["resolution"]
        return [
            "bash", f"finetune_stage{stage}.sh", *self.base_flags(), f"--davis_root={self.data / 'DAVIS'}",
            f"--ytvos_root={self.data / 'YTBV'}", f"--resolution={resolution}", f"--nframes={frames}",
            f"--train_batch_size={clips}", f"--learning_rate={rate}", f"--max_train_steps={steps}",
            f"--output_dir={output_dir}", "--resume_from_checkpoint=latest", "--latent_cache=", "--validation_steps=0",
            "--probe_clips=0", "--dataloader_num_workers=2", "--report_to=none", *flags,
        ]  # fmt: skip

    def finetuning(self, arm, seed):
        """The command that goes on from the start, with an arm's flags."""
        models = [f"--pretrained_stage1_path={self.start}"]
        if self.stage == 2:
            adapter = self.weights / "animatediff-motion-adapter-v1-5-2"  # whose modules do nothing at first
            models = [f"--pretrained_stage1={self.start}", f"--motion_adapter_path={adapter}"]
        every = max(1, self.steps // CHECKPOINTS) if arm == "guide" else self.steps
        saved = [f"--checkpointing_steps={every}", f"--checkpoints_total_limit={AVERAGED}"]
        flags = [f"--seed={seed}", *models, *saved, *ARMS[self.stage][arm]]
        clips, rate = self.size[self.stage]["clips"], self.size["rates"][1]
        return self.training(self.stage, self.folder(arm, seed), clips, rate, self.steps, flags)

    def averaging(self, seed):
        """The command that averages the checkpoints of the guide's recipe."""
        source = self.folder("guide", seed)
        require(finished(source), f"averaging takes {source}'s checkpoints: train guide with seed {seed} first")
        output_dir = self.folder("averaging", seed)
        return [sys.executable, "save_checkpoint_stage1.py", f"--input_dir={source}", f"--output_dir={output_dir}",
                f"--average={AVERAGED}"]  # fmt: skip


def finished(folder):
    """The trainer and the converter write both models, or none, when all is done."""
    return Path(folder, "brushnet", "config.json").is_file()


def refuse_change(path, settings):
    """Raise InputError where `path` says that what is there was made with other settings; else write them."""
    before = json.loads(path.read_text()) if path.is_file() else settings
    require(before == settings, f"{path.with_suffix('')} was made with {before}, not {settings}: another --output_dir "
            "was needed")  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def once(path, function, *args, **kwargs):
    """Call a function unless `path`, an empty file that says it has been done, is there."""
    if not path.is_file():
        function(*args, **kwargs)
        path.touch()


# --- The steps --------------------------------------------------------------------------------------------------------


def start(lab):
    """What all arms have in common."""
    size, root = lab.size, lab.root
    steps = lab.options.start_steps or size["start_steps"]
    real = [os.environ.get(name) for name in ("DAVIS_ROOT", "YTVOS_ROOT")]
    refuse_change(root / "start.json", {"size": lab.options.size, "steps": steps, "real": real})
    drawn, (davis, ytvos) = root / "drawn", ([folder] if folder else [] for folder in real)
    once(root / "drawn.done", make_videos, drawn, seed=1, more=size["drawn"], held_out=size["held_out"])
    once(root / "data.done", join_videos, lab.data, [*davis, drawn / "DAVIS"], [*ytvos, drawn / "YTBV"])
    once(root / "weights.done", make_weights, lab.weights, lab.options.size)
    roots = [f"--davis_root={lab.data / 'DAVIS'}", f"--ytvos_root={lab.data / 'YTBV'}"]
    once(root / "vae.done", train_vae.main, [f"--weights={lab.weights}", *roots, f"--steps={size['vae_steps']}",
         f"--resolution={size['resolution']}"])  # fmt: skip
    if not finished(lab.start):
        schedule = ["--lr_scheduler=cosine", f"--lr_warmup_steps={steps // 7}", "--logging_steps=25"]
        flags = ["--pretrained_stage1_path=", "--checkpointing_steps=100000", *schedule]
        clips = max(1, size[1]["clips"] // len(lab.gpus))
        command = lab.training(1, lab.start, clips, size["rates"][0], steps, flags)
        gpus, variables = ",".join(lab.gpus), {"NUM_PROCESSES": str(len(lab.gpus))}
        run_command(command, gpus, root / "start.log", lab.deadline, variables)
        require_done(lab, {"start": finished(lab.start)}, root)


def train(lab):
    """Every arm with every seed; the averaged ones last, from the guide's checkpoints."""
    require(finished(lab.start), f"{lab.start} is not trained to its end: run the step `start` first")
    for averaged in (False, True):
        jobs = {}
        for arm, seed in lab.pairs:
            folder = lab.folder(arm, seed)
            if (arm == "averaging") == averaged and folder != lab.start:
                settings = {"steps": lab.steps, "flags": ARMS[lab.stage][arm]}
                refuse_change(folder.with_name(f"{folder.name}.json"), settings)
                if not finished(folder):
                    jobs[folder.name] = lab.averaging(seed) if averaged else lab.finetuning(arm, seed)
        run_jobs(lab, jobs, lambda name: finished(lab.runs / name))


def score(lab):
    """A CSV file of every arm and seed, each in a process of its own."""
    jobs = {}
    for arm, seed in lab.pairs:
        refuse_change(lab.runs / f"{arm}-{seed}.csv.json", {"frames": lab.options.frames})
        if not lab.scores(arm, seed).is_file():
            require(finished(lab.folder(arm, seed)), f"{arm} with seed {seed} is not trained yet: run `train` first")
            options = lab.options
            jobs[f"{arm}-{seed}"] = [
                sys.executable, "-m", "benchmarks.ablation", "score-one", f"--output_dir={lab.root}", f"--arms={arm}",
                f"--seeds={seed}", f"--stage={lab.stage}", f"--size={options.size}", f"--frames={options.frames}",
            ]  # fmt: skip
    run_jobs(lab, jobs, lambda name: Path(lab.runs, f"{name}.csv").is_file())


def score_one(lab):
    """In this process: a row for every task and held-out video."""
    ((arm, seed),) = lab.pairs
    parser, side = Parser(), lab.size["resolution"]
    add_inference_flags(parser)
    trained = lab.size[2]["frames"] if lab.stage == 2 else lab.options.frames  # frames of the motion modules' window
    window = lab.options.frames if lab.folder(arm, seed) == lab.start else trained
    args = parser.parse_args([*lab.base_flags(), f"--nframes={window}", f"--num_inference_steps={SAMPLER_STEPS}"])
    check_inference_flags(args)
    pipeline, prompt_embeds, _ = load_pipeline(args, lab.folder(arm, seed))
    if arm == OWN_NOISES:
        pipeline = replace(pipeline, shared_noise=False)
    davis, rows = lab.data / "DAVIS", []
    frames = davis / "JPEGImages/480p"
    videos = [scan_video(frames / name) for name in read_names(davis / "ImageSets/2017/val.txt", frames)]
    for task in TASKS:
        resolution = f"{side * 7 // 4 // 8 * 8}x{side}"
        for number, case in enumerate(make_cases(task, davis, videos, resolution, lab.options.frames)):
            filled = pipeline.fill(case.shown, case.holes, prompt_embeds, noise_seed(seed, number))
            error = noise_error(pipeline, case, trained, prompt_embeds, noise_seed(0, number))
            scores = {**case.score(filled), "noise": error}
            rows.append({"arm": arm, "seed": seed, "task": task, "video": case.video, **scores})
    write_rows(lab.scores(arm, seed), rows)


@torch.no_grad()
def noise_error(pipeline, case, frames, prompt_embeds, seed):
    """Mean squared error in the hole of the noise that the model predicts: training's loss on a case's first `frames`.
    These, timesteps and noises are those of all arms; nan where no hole is as large as a pixel of the latents."""
    window = slice(frames)
    truth, shown, holes = case.truth[window], case.shown[window], case.holes[window]
    conditioning = pipeline.encode_clip(shown, holes, None, seed, lambda frames: None).conditioning
    generator = torch.Generator(pipeline.device).manual_seed(seed)
    shape = (2, len(truth), *conditioning[0, :-1].shape)
    posterior, noise = torch.randn(shape, generator=generator, device=pipeline.device)
    latents, hole = pipeline.encode_whole(truth, posterior), (conditioning[:, -1:] == 0).float()
    scheduler = DDPMScheduler.from_config(pipeline.sampler.config)
    errors = []
    for timestep in TIMESTEPS:
        timesteps = torch.tensor([timestep], device=pipeline.device)
        encoded = EncodedBatch(latents, noise, conditioning, timesteps, prompt_embeds)
        with torch.autocast(pipeline.device.type, pipeline.dtype, enabled=pipeline.dtype != torch.float32):
            prediction, target = predict(pipeline.model, scheduler, encoded)
        errors.append(weighted_mse(prediction, target, hole, clips=1).item())
    return float(np.mean(errors)) if hole.any() else float("nan")


def table(lab):
    """Print and write what each arm changes; of all arms that are scored with these seeds."""
    values = defaultdict(dict)  # {(arm, task, score): {(video, seed): value}}
    first, *others = ARMS[lab.stage]
    for arm, seed in itertools.product(ARMS[lab.stage], lab.options.seeds):
        for row in read_table(lab.scores(arm, seed)):
            for name in SCORES:
                values[arm, row["task"], name][row["video"], seed] = float(row[name])
    rows = compare_all(values, first, others, TASKS, SCORES)
    require(rows, f"no arm is scored with the same seed as {first}: run `train score` with both first")
    write_rows(lab.root / f"table-stage{lab.stage}.csv", rows)
    text = "\n".join(markdown(rows, first, SCORES))
    Path(lab.root, f"table-stage{lab.stage}.md").write_text(text + "\n")
    print(text)


# --- Running ----------------------------------------------------------------------------------------------------------


def run_jobs(lab, jobs, is_done):
    """Run {name: command}, so many at once on each GPU. Raises InputError where one failed, after all others."""
    free, begun = queue.Queue(), time.monotonic()
    for gpu in lab.gpus * lab.options.jobs_per_gpu:
        free.put(gpu)

    def run(name):
        gpu = free.get()
        try:
            run_command(jobs[name], gpu, lab.runs / f"{name}.log", lab.deadline)
        finally:
            free.put(gpu)
        print(f"{name}: {'done' if is_done(name) else 'not done'} after {time.monotonic() - begun:.0f} s", flush=True)

    with ThreadPoolExecutor(free.qsize()) as pool:
        list(pool.map(run, jobs))
    require_done(lab, {name: is_done(name) for name in jobs}, lab.runs)


def run_command(command, gpu, log, deadline, variables=None):
    """Run a command on the GPUs named, its output added to a log; asked to save and end at the deadline."""
    seconds = deadline - time.monotonic()
    if seconds < LEAST_SECONDS:
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    chosen = {"CUDA_VISIBLE_DEVICES": gpu, "PYTHON": sys.executable, "LOG": str(log), "COMPILE": "0"}
    # Twenty-four processes with 64 threads each took more than four times as long to score as with two.
    chosen["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "2")
    # What a user has set for another run would be a flag of every arm, the one compared with among them.
    others = {name: value for name, value in os.environ.items() if name not in shell_variables()}
    environment = {**others, "NUM_PROCESSES": "1", **chosen, **(variables or {})}
    with open(log, "ab") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()


def require_done(lab, done, logs):
    """Raise InputError for what is not done: for lack of time, or because it failed."""
    missing = [name for name, is_done in done.items() if not is_done]
    late = lab.deadline - time.monotonic() < LEAST_SECONDS
    reason = "the time is over: the same command goes on" if late else f"see {logs}/{(missing or [''])[0]}.log"
    require(not missing, f"{len(missing)} of {len(done)} not done ({', '.join(missing)}); {reason}")


STEPS = {"start": start, "train": train, "score": score, "table": table}


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("step", nargs="*", help=f"{', '.join(STEPS)} (default: all); score-one: one arm and seed, in this process")
    add("--output_dir", default="ablation", metavar="DIR", help="everything goes there (default: %(default)s)")
    add("--stage", type=int, choices=ARMS, default=1, help="what the arms train (default: 1)")
    add("--arms", nargs="+", metavar="ARM", help=f"of stage 1: {', '.join(ARMS[1])}; 2: {', '.join(ARMS[2])}")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    add("--size", choices=SIZES, default="medium" if torch.cuda.is_available() else "small", help="of the models")
    add("--steps", type=int, help="of an arm (default: the size's)")
    add("--start_steps", type=int, help="of the common start (default: the size's)")
    add("--frames", type=int, default=26, help="of a held-out video are scored, at most (default: 26)")
    add("--jobs_per_gpu", type=int, default=1, help="arms that train at once on each GPU (default: 1)")
    add("--minutes", type=float, default=float("inf"), help="then everything saves and ends (default: never)")
    options = parser.parse_args(argv)
    known, steps = ARMS[options.stage], {**STEPS, "score-one": score_one}
    options.arms, options.step = options.arms or list(known), options.step or list(STEPS)
    for name in options.arms:
        require(name in known, f"{name!r} is no arm of stage {options.stage}: {', '.join(known)} are")
    for name in options.step:
        require(name in steps, f"{name!r} is no step: {', '.join(STEPS)} are")
    at_least(1, options, "steps", "start_steps", "frames", "jobs_per_gpu")
    lab = Lab(options)
    require(
        lab.steps >= AVERAGED or "averaging" not in options.arms,
        f"--steps={lab.steps}: averaging takes {AVERAGED} checkpoints; at least {AVERAGED} steps were needed",
    )
    for name in options.step:
        steps[name](lab)


if __name__ == "__main__":
    main()
