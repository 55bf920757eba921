"""A README.md for a converted folder, in the Hugging Face Hub's form: what it is, from which run, how good."""

import json
from pathlib import Path

from common.run_files import HELD_OUT_FILE, SCORES_FILE, read_rows
from libs.evaluation.metrics import SCORES, average

SIGNATURE = "<!-- written by the converter: remove this line to keep changes of your own -->"
TRAINED = {
    1: ("UNet2DConditionModel", "UNet and BrushNet were trained on single frames"),
    2: ("UNetMotionModel", "the motion modules were trained on clips, over stage 1's frozen UNet and BrushNet"),
}


def write_model_card(folder, stage, step, run_dir):
    """Write `folder`/README.md, unless one without our signature stands there.

    Args:
        run_dir: where the checkpoint was found; a run's folder tells settings and scores, any other one nothing.
    """
    path = Path(folder, "README.md")
    if path.is_file() and SIGNATURE not in path.read_text():
        return
    unet, trained = TRAINED[stage]
    lines = [
        "---", "library_name: diffusers", "base_model: lixiaowen/diffuEraser", "tags:", "- video-inpainting",
        "- diffueraser", "---", SIGNATURE, "", f"# DiffuEraser, finetuned (stage {stage}, step {step})", "",
        f"`unet_main/` ({unet}) and `brushnet/` (BrushNetModel), fp32: {trained}.",
        "Both replace the folders of their names in a DiffuEraser installation." if stage == 2 else
        "Stage 2 starts from this folder; DiffuEraser's inference needs stage 2's.",
    ]  # fmt: skip
    config = Path(run_dir, "config.json")
    if config.is_file():
        run = json.loads(config.read_text())[-1]
        settings, names = run["settings"], run.get("model_card", ())  # runs before 2026-11-26 name none
        # Names only: the folders they are in are nobody else's business.
        data = ", ".join(Path(settings[root]).name for root in ("davis_root", "ytvos_root") if settings[root])
        lines += ["", "## Settings", "", f"- data: {data}"]
        lines += [f"- {name}: {settings[name]}" for name in names if settings[name] is not None]
        lines += score_lines(Path(run_dir, settings["logging_dir"]), str(step))
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text("\n".join(lines) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def score_lines(folder, step):
    """What the run measured at that step, on its held-out videos."""
    losses = read_rows(folder / HELD_OUT_FILE)
    at_step = [f"- held-out loss: {float(row['held_out_loss']):.4f} (at the run's start "
               f"{float(losses[0]['held_out_loss']):.4f})" for row in losses if row["step"] == step]  # fmt: skip
    videos = [row for row in read_rows(folder / SCORES_FILE) if row["step"] == step]
    lines = ["", f"## Scores at step {step}", "", *at_step[-1:]] if at_step or videos else []
    if videos:
        means = average([{name: float(row[name]) for name in ("frames", *SCORES)} for row in videos])
        lines.append(f"- {len(videos)} held-out video(s), synthetic holes, known pixels pasted back: " + ", ".join(
            f"{heading} {means[name]:.{decimals}f}" for name, (heading, decimals) in SCORES.items()))  # fmt: skip
    return lines
