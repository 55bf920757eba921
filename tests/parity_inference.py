"""How far inference as deployed is from what the original's own code computed.

python -m tests.parity_inference CASE_FOLDER...

A case folder holds case.json, io.safetensors and compose.npz, recorded in fp32; its few-step weights lie in it, or
beside it. Status 1 where a UNet call's input or prediction, or the final latents, are off by more than 1e-4, composed
frames by more than one grey level, or masks at all.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler

from common.errors import InputError, one_line_errors
from common.weights import read_json, read_tensors
from libs.base_model import quiet_libraries
from libs.brushnet_CA import BrushNetModel
from libs.inference.composition import compose_as_deployed, grow_as_deployed
from libs.inference.few_step import FewStepWeights
from libs.inference.pipeline import ClipLatents, deployed_pipeline
from libs.inpainter import ClipInpainter
from libs.unet_2d_condition import UNet2DConditionModel
from libs.unet_motion_model import MotionAdapter, UNetMotionModel
from tests.reference import fill_by_formula

LARGEST = {
    "weights": 1e-6,
    "windows": 0,
    "inputs": 1e-4,
    "predictions": 1e-4,
    "latents": 1e-4,
    "masks": 0,
    "composed": 1,
}


class RecordedVAE:
    """Stands for the VAE, which the cases do without: after the first pass it gives the recorded frames' latents."""

    scale, channels = 8, 4

    def __init__(self, known):
        self.known = known  # (n, 4, h, w)

    def decode(self, latents):
        return torch.zeros(len(latents), 3, *(self.scale * side for side in latents.shape[2:]))

    def encode(self, pixel_values, noise):
        return self.known


class Recorder(torch.nn.Module):
    """A model that keeps what it was called with and what it said."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, []

    def forward(self, latents, conditioning, timesteps, prompt_embeds):
        pred = self.model(latents, conditioning, timesteps, prompt_embeds)
        self.calls.append(
            SimpleNamespace(sample=latents, conditioning=conditioning, timestep=timesteps.item(), pred=pred)
        )
        return pred


def find_weights(folder, case):
    """The case's few-step weights: the file that it names, else the only one in its folder or in the one above."""
    for place in (folder, folder.parent):
        named = place / Path(case.get("lora") or "").name
        if named.is_file():
            return named
    for place in (folder, folder.parent):
        found = [path for path in place.glob("*.safetensors") if path.name != "io.safetensors"]
        if len(found) == 1:
            return found[0]
    raise InputError(f"{folder}: no file of few-step weights in it or beside it")


def build_model(case):
    """(ClipInpainter by the cases' formula, how far its sums are from the recorded ones)."""
    parts = {
        "unet": UNet2DConditionModel(**case["configs"]["unet"]),
        "brushnet": BrushNetModel(**case["configs"]["brushnet"]),
        "motion_adapter": MotionAdapter(**case["configs"]["motion_adapter"]),
    }
    off = max(abs(fill_by_formula(model, case["seeds"][name]) - case["abs_sum"][name]) for name, model in parts.items())
    unet = UNetMotionModel.from_unet2d(parts["unet"], parts["motion_adapter"])
    return ClipInpainter(unet, parts["brushnet"]).eval(), off


def run_case(folder):
    """{what: worst difference} of a case folder; see LARGEST."""
    case, io = read_json(folder / "case.json"), dict(read_tensors([folder / "io.safetensors"]))
    model, off = build_model(case)
    with quiet_libraries():
        scheduler = UniPCMultistepScheduler.from_config(case["noise_scheduler_config"])
    with patch("libs.inference.few_step.choose_steps", lambda file, steps: steps):  # whatever the file's name says
        few_step = FewStepWeights(find_weights(folder, case), case["steps"])
    recorder, spread = Recorder(model), case.get("sample_index") or []
    known = io["main.conditioning"][spread, :4]
    base = SimpleNamespace(vae=RecordedVAE(known), noise_scheduler=scheduler)
    pipeline = deployed_pipeline(recorder, few_step, base, torch.device("cpu"), case["nframes"], shared_noise=False)

    noise = io["noise_pre"].repeat(-(-case["frames"] // case["nframes"]), 1, 1, 1)[: case["frames"]]
    conditioning, prior = io["main.conditioning"].clone(), io["main.prior_latents"].clone()
    if spread:  # what they were before the first pass
        conditioning[spread], prior[spread] = io["pre.conditioning"], io.get("pre.prior_latents", prior[spread])
    with few_step.folded(model.unet_main), torch.no_grad():
        latents = pipeline.denoise_clip(ClipLatents(conditioning, prior, noise), io["prompt_embeds"])
    expected = io["main.latents"]  # of all frames, or of the first ones
    return {"weights": off, **compare_calls(case, io, pipeline, recorder.calls),
            "latents": distance(latents[: len(expected)], expected), **compare_pixels(case, folder)}  # fmt: skip


def compare_calls(case, io, pipeline, calls):
    """Every call of every pass: its window, input and prediction."""
    expected = [(each["name"], i, call) for each in case["passes"] for i, call in enumerate(each["calls"])]
    planned = [
        (each["name"], step, [*range(*window)])
        for each in case["passes"]
        for step in range(case["steps"])
        for window in pipeline.windows.at_step(len(io[f"{each['name']}.conditioning"]), step)
    ]
    wrong = planned != [(name, call["step"], call["frames"]) for name, _, call in expected]
    first = pipeline.first_pass_frames(case["frames"])
    wrong += len(calls) != len(expected) or first != (case.get("sample_index") or [])
    kept, inputs, predictions = case["kept_frames_of_each_call"], [], []
    for ours, (name, i, call) in zip(calls, expected, strict=False):
        wrong += ours.timestep != call["timestep"]
        inputs.append(distance(ours.conditioning, io[f"{name}.conditioning"][call["frames"]]))
        for tensor, found, differences in (("sample", ours.sample, inputs), ("pred", ours.pred, predictions)):
            if f"{name}.call{i}.{tensor}" in io:
                differences.append(distance(found[kept], io[f"{name}.call{i}.{tensor}"]))
        if i == 0 and f"{name}.latents_in" in io:
            inputs.append(distance(ours.sample, io[f"{name}.latents_in"][call["frames"]]))
    return {"windows": int(wrong), "inputs": max(inputs), "predictions": max(predictions)}


def compare_pixels(case, folder):
    """Masks and composition of the recorded frames."""
    pixels = np.load(folder / "compose.npz")
    masks = [grow_as_deployed(mask, case["mask_dilation_iter"]) for mask in pixels["raw_masks"]]
    composed = map(compose_as_deployed, pixels["frames"], pixels["filled"], pixels["masks"])
    return {"masks": int(np.count_nonzero(np.stack(masks) != pixels["masks"])),
            "composed": int(np.abs(np.stack(list(composed)).astype(int) - pixels["composed"]).max())}  # fmt: skip


def distance(found, expected):
    """The largest absolute difference; infinite for another shape."""
    if found.shape != expected.shape:
        return float("inf")
    return (found - expected).abs().max().item()


@one_line_errors
def main(folders):
    if not folders:
        raise SystemExit(__doc__)
    failed = False
    for folder in map(Path, folders):
        try:
            found = run_case(folder)
        except (KeyError, FileNotFoundError) as error:  # of io.safetensors and case.json, or compose.npz itself
            missing = getattr(error, "filename", None) or error.args[0]
            raise InputError(f"{folder} is no complete case: {missing} is missing") from None
        over = [what for what, value in found.items() if not value <= LARGEST[what]]
        failed |= bool(over)
        print(f"{folder.name}: " + ", ".join(f"{what} {value:.3g}" for what, value in found.items())
              + (f"; TOO FAR: {', '.join(over)}" if over else ""), flush=True)  # fmt: skip
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
