"""A README.md for a converted folder, in the Hugging Face Hub's form: what it is, from which run, how good."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from common.files import written_whole
from common.run_files import HELD_OUT_FILE, SCORES_FILE, of_form, read_rows, read_starts, validation_form
from libs.evaluation.metrics import SCORES, average

SIGNATURE = "<!-- written by the converter: remove this line to keep changes of your own -->"
ABOUT = {
    1: """`unet_main/` (UNet2DConditionModel) and `brushnet/` (BrushNetModel), fp32: trained on single frames.
Stage 2 starts from this folder; DiffuEraser's inference needs stage 2's.""",
    2: """`unet_main/` (UNetMotionModel) and `brushnet/` (BrushNetModel), fp32: motion modules trained on clips, over
stage 1's frozen UNet and BrushNet. Both replace the folders of their names in a DiffuEraser installation.""",
}


def write_model_card(folder, stage, step, run_dir, weights="", measured=True):
    """Write `folder`/README.md, unless one without our signature stands there.

    Args:
        run_dir: where the checkpoint was found; a run's folder tells settings and scores, any other one nothing.
        weights: which ones they are, where they are not the checkpoint's own.
        measured: the scores of that step are of these weights.
    """
    path = Path(folder, "README.md")
    if path.is_file() and SIGNATURE not in path.read_text(errors="replace"):
        print(f"{path} is kept as it is: no converter wrote it", flush=True)
        return
    tags = ["video-inpainting", "diffueraser"]
    data = ModelCardData(library_name="diffusers", base_model="lixiaowen/diffuEraser", tags=tags)
    title = f"# DiffuEraser, finetuned (stage {stage}, step {step})"
    lines = ["---", data.to_yaml(), "---", SIGNATURE, "", title, "", ABOUT[stage]]
    lines += ["", f"Weights: {weights}."] if weights else []
    for start in read_starts(run_dir)[-1:]:
        settings, names = start["settings"], start.get("model_card", ())  # runs before 2026-11-26 name none
        # Names only: the folders they are in are nobody else's business.
        roots = ("davis_root", "ytvos_root", "paired_root")  # the last is newer than some runs
        roots = ", ".join(Path(settings[root]).name for root in roots if settings.get(root))
        lines += ["", "## Settings", "", f"- data: {roots}"]
        lines += [f"- {name}: {settings[name]}" for name in names if settings[name] is not None]
        scores = score_lines(Path(run_dir, settings["logging_dir"]), str(step), validation_form(settings))
        lines += ["", f"## Scores at step {step}", "", *scores] if scores and measured else []
    with written_whole(path) as partial:
        ModelCard("\n".join(lines) + "\n").save(partial)


def score_lines(folder, step, form):
    """What the run measured at that step, on its validation videos."""
    losses = {row["step"]: float(row["held_out_loss"]) for row in read_rows(folder / HELD_OUT_FILE)}
    videos = [row for row in read_rows(folder / of_form(SCORES_FILE, form)) if row["step"] == step]
    lines = []
    if step in losses:
        lines.append(f"- held-out loss: {losses[step]:.4f} (at the run's start {next(iter(losses.values())):.4f})")
    if videos:
        names = [name for name in ("frames", *SCORES) if videos[0].get(name)]
        means = average([{name: float(row[name]) for name in names} for row in videos])
        scores = ", ".join(f"{SCORES[name].heading} {means[name]:.{SCORES[name].decimals}f}" for name in names[1:])
        how = "filled as deployed, " if form else ""
        lines.append(f"- {len(videos)} held-out video(s), synthetic holes, {how}known pixels pasted back: {scores}")
    return lines
