"""Inference as DiffuEraser deploys it: few-step weights, windows, two passes, priors, streams, flags of run and eval.

PARITY_INFERENCE=DIR runs the case folders in another place too.
"""

import json
import os
import re
import shutil
import weakref
from collections import OrderedDict
from contextlib import nullcontext
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import parity_inference
import pytest
import torch
import torch.nn.functional as F
from clips import moving_video, read_video, write_frames
from conftest import DATA, error_line
from parity_inference import LARGEST, run_case
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_sampling import PixelVAE
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import eval_DiffuEraser
import run_diffueraser
from common.errors import InputError
from common.threads import AHEAD
from dataset.images import read_frame
from libs.evaluation.baselines import telea, temporal_median
from libs.inference.composition import compose_as_deployed, grow_as_deployed, size_as_deployed
from libs.inference.few_step import PARTS, PREFIX, FewStepSampler, FewStepWeights, choose_steps
from libs.inference.load import PCM_FILE, check_inference_flags, choose_prompt
from libs.inference.pipeline import deployed_pipeline
from libs.inference.prior import make_prior
from libs.inference.streams import Mapped, Stream
from libs.inference.windows import CrossFadedLatents
from libs.unet_2d_condition import UNet2DConditionModel
from libs.unet_motion_model import UNetMotionModel

PCM = "pcm_sd15_smallcfg_2step_converted.safetensors"
CASES = [DATA / "parity_inference/two_passes"]
if "PARITY_INFERENCE" in os.environ:
    CASES += sorted(path.parent for path in Path(os.environ["PARITY_INFERENCE"]).glob("*/case.json"))


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_parity_with_the_original(folder):
    assert {what: value for what, value in run_case(folder).items() if not value <= LARGEST[what]} == {}


def test_folders_that_are_no_case(tmp_path, capsys):
    assert f"{tmp_path}/case.json cannot be read" in error_line(capsys, parity_inference.main, [tmp_path])
    for file in (CASES[0] / "case.json", CASES[0].parent / PCM):
        shutil.copy(file, tmp_path)
    io = load_file(CASES[0] / "io.safetensors")
    del io["noise_pre"]
    save_file(io, tmp_path / "io.safetensors")
    assert "no complete case: noise_pre is missing" in error_line(capsys, parity_inference.main, [tmp_path])


def write_lora(path, unet, rank=4, alpha=2.0, change=lambda tensors: None):
    """PCM's form: every layer of the blocks, none of the motion modules; random."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    for name, weight in unet.named_parameters():
        if name.endswith(".weight") and weight.dim() > 1 and "block" in name and "motion_modules" not in name:
            layer = PREFIX + name.removesuffix(".weight").replace(".", "_")
            up = (weight.shape[0], rank, *(1 for _ in weight.shape[2:]))
            for part, shape in zip(PARTS, ((rank, *weight.shape[1:]), up, ()), strict=True):
                tensors[f"{layer}.{part}"] = 0.1 * torch.randn(shape, generator=generator)
            tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="session")
def weights(published_layout):
    """Few-step weights name its layers."""
    return published_layout


@pytest.fixture
def unet(weights):
    return UNetMotionModel.from_pretrained(weights / "diffuEraser", "unet_main")


@pytest.fixture
def pcm(unet, tmp_path):
    return write_lora(tmp_path / PCM, unet)


def side_branch(tensors, layer):
    """A forward hook that adds what the layer's LoRA makes of its input."""
    down, up, alpha = (tensors[f"{layer}.{part}"] for part in PARTS)

    def add(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            inner = F.conv2d(inputs[0], down, None, module.stride, module.padding)
            return output + alpha / len(down) * F.conv2d(inner, up)
        return output + alpha / len(down) * (inputs[0] @ down.T @ up.T)

    return add


def predict(unet):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 4, 8, 8, generator=generator)
    text = torch.randn(1, 5, unet.config.cross_attention_dim, generator=generator)
    frames = {"num_frames": 3} if isinstance(unet, UNetMotionModel) else {}
    text = text if frames else text.expand(3, -1, -1)
    with torch.no_grad():
        return unet(latents, torch.tensor([500]) if frames else 500, text, **frames).sample


@pytest.mark.parametrize("stage", [1, 2])
def test_folded_is_the_side_branch(unet, pcm, stage):
    """In both stages' UNets, convolutions of both sizes and linear layers."""
    if stage == 1:
        own, unet = unet.state_dict(), UNet2DConditionModel(**unet_2d_config(unet))
        unet.load_state_dict({key: own[key] for key in unet.state_dict()})
    before, few_step = predict(unet), FewStepWeights(pcm)
    layers = few_step.match({name: weight.shape for name, weight in unet.named_parameters()})
    tensors, hooks = load_file(pcm), []
    for layer, name in layers.items():
        module = unet.get_submodule(name.removesuffix(".weight"))
        hooks.append(module.register_forward_hook(side_branch(tensors, layer)))
    expected = predict(unet)
    for hook in hooks:
        hook.remove()
    with few_step.folded(unet):
        folded = predict(unet)
    assert (folded - expected).abs().max() < 1e-5 < 0.01 < (folded - before).abs().max()
    assert torch.equal(predict(unet), before)
    few_step.fold(unet)
    assert torch.equal(predict(unet), folded)


def unet_2d_config(unet):
    names = ("sample_size", "block_out_channels", "layers_per_block", "cross_attention_dim", "norm_num_groups")
    return {name: unet.config[name] for name in names} | {"attention_head_dim": unet.config["num_attention_heads"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("failing", ["nothing", "the validation", "the file"])
def test_a_validation_leaves_every_bit(unet, pcm, dtype, failing):
    """Weights are the same tensors in the same memory with the same bits, whatever goes wrong."""
    unet.to(dtype)
    before = {name: (weight, weight.data_ptr(), weight.clone()) for name, weight in unet.named_parameters()}
    few_step = FewStepWeights(pcm)
    if failing == "the file":  # half of the weights are folded by then
        tensors = load_file(pcm)
        last = sorted(tensors)[-1]
        save_file({key: tensor for key, tensor in tensors.items() if key != last}, pcm)
    raised = {"nothing": nullcontext(), "the validation": pytest.raises(torch.OutOfMemoryError),
              "the file": pytest.raises(SafetensorError)}  # fmt: skip
    with raised[failing], few_step.folded(unet):
        changed = sum(not torch.equal(weight, copy) for weight, _, copy in before.values())
        assert changed == len(few_step.layers)
        if failing == "the validation":
            raise torch.OutOfMemoryError
    for name, weight in unet.named_parameters():
        same, place, copy = before[name]
        assert weight is same and weight.data_ptr() == place and torch.equal(weight, copy)


@pytest.mark.parametrize(("of_weights", "of_file"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_what_is_folded_is_rounded_once(tmp_path, of_weights, of_file):
    """Products and sums are fp32, whatever type the weights or the file have."""

    def convert(tensors):
        tensors.update({key: tensor.to(of_file) for key, tensor in tensors.items()})

    unet = nn.Sequential(OrderedDict(mid_block=nn.Linear(64, 64))).to(of_weights)
    few_step = FewStepWeights(write_lora(tmp_path / PCM, unet, change=convert))
    down, up, alpha = (load_file(few_step.file)[f"{PREFIX}mid_block.{part}"].float() for part in PARTS)
    expected = (unet.mid_block.weight.detach().float() + alpha / len(down) * (up @ down)).to(of_weights)
    with few_step.folded(unet):
        assert torch.equal(unet.mid_block.weight, expected)
    few_step.fold(unet)
    assert torch.equal(unet.mid_block.weight, expected)


def fold_shards(rank, folder):
    """A process of two: whether the root's weights lie in shards when folding begins, as after a training step, or are
    gathered, as after a forward pass, no folded ones stay behind."""
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    unet = nn.Sequential(OrderedDict(up_block=nn.Conv2d(3, 5, 3, padding=1), mid_block=nn.Linear(8, 7)))
    unet.load_state_dict(torch.load(folder / "unet.pt"))
    few_step, pixels = FewStepWeights(folder / PCM), torch.ones(2, 3, 8, 8)
    with torch.no_grad():
        before = unet(pixels)
        with few_step.folded(unet):
            expected = unet(pixels)
        model = nn.Sequential(OrderedDict(unet_main=unet))
        fully_shard(unet.up_block, mesh=init_device_mesh("cpu", (2,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))  # the root; mid_block is gathered with it
        for begin in ("in shards", "gathered", "in shards"):
            model.reshard()
            if begin == "gathered":
                model(pixels)
            with few_step.folded(unet, model):
                assert torch.equal(model(pixels), expected) and not torch.equal(expected, before), begin
            assert torch.equal(model(pixels), before), begin


def test_sharded_weights_are_folded_too(tmp_path):
    """Under FSDP2, two processes: shards are changed, and have their bits back."""
    unet = nn.Sequential(OrderedDict(up_block=nn.Conv2d(3, 5, 3, padding=1), mid_block=nn.Linear(8, 7)))
    torch.save(unet.state_dict(), tmp_path / "unet.pt")
    write_lora(tmp_path / PCM, unet, rank=2)
    processes = [get_context("fork").Process(target=fold_shards, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]


LAYER = f"{PREFIX}mid_block_resnets_0_conv1"
OTHER_FAMILY = f"{PREFIX}down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"


def put(key, *shape):
    return lambda tensors: tensors.update({key: torch.ones(shape)})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(f"{LAYER}.lora_up.weight"), f"lacks {LAYER}.lora_up.weight"),
        (lambda t: t.pop(f"{LAYER}.lora_down.weight"), f"lacks {LAYER}.lora_down.weight"),
        (lambda t: t.pop(f"{LAYER}.alpha"), f"lacks {LAYER}.alpha"),
        (lambda t: [t.pop(f"{LAYER}.{part}") for part in PARTS], f"lacks {LAYER}, and has other layers of its kind"),
        (put(f"{LAYER}.lora_mid.weight", 1), f"{LAYER}.lora_mid.weight belongs to no layer"),
        (put("lora_te_x.alpha", 1), "lora_te_x.alpha belongs to no layer"),
        (put(f"{PREFIX}input_blocks_1.alpha", 1), "input_blocks_1.alpha belongs to no layer"),
        (put(f"{LAYER}.lora_up.weight", 7, 4, 1, 1), f"{LAYER}.lora_up.weight has shape (7, 4, 1, 1)"),
        (put(f"{LAYER}.alpha", 2), f"{LAYER}.alpha has shape (2,)"),
        (put(OTHER_FAMILY, 4, 2048), f"{OTHER_FAMILY} has shape (4, 2048), (4, 32) was needed"),
    ],
)  # fmt: skip
def test_every_tensor_of_the_file_is_accounted_for(unet, tmp_path, change, expected):
    few_step = FewStepWeights(write_lora(tmp_path / PCM, unet, change=change))
    with pytest.raises(InputError, match=re.escape(expected)) as found:
        few_step.match({name: tuple(weight.shape) for name, weight in unet.named_parameters()})
    assert "\n" not in str(found.value) and PCM in str(found.value)


def test_one_by_one_convolutions_are_written_in_either_way(unet, pcm):
    with FewStepWeights(pcm).folded(unet):
        expected = predict(unet)
    tensors = load_file(pcm)
    save_file({key: t.flatten(1) if t.shape[2:] == (1, 1) else t for key, t in tensors.items()}, pcm)
    with FewStepWeights(pcm).folded(unet):
        assert torch.equal(predict(unet), expected)


@pytest.mark.parametrize(("name", "asked", "steps"), [(PCM, None, 2), (PCM.replace("2step", "16step"), None, 16),
                                                      ("pcm_4-step.safetensors", None, 4), (PCM, 2, 2),
                                                      ("a.safetensors", 8, 8), ("a.safetensors", 50, 50)])  # fmt: skip
def test_steps_come_from_the_name(name, asked, steps):
    assert choose_steps(Path(name), asked) == steps


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [
        (PCM, 4, "made for 2"),
        ("mine.safetensors", None, "add --num_inference_steps"),
        ("mine.safetensors", 51, "50 at most"),
        ("pcm_sd15_lcmlike_lora_converted.safetensors", 4, "LCM's sampler"),
        ("LCM_4step.safetensors", None, "LCM's sampler"),
    ],
)
def test_steps_that_the_file_was_not_made_for(name, asked, expected):
    with pytest.raises(InputError, match=expected):
        choose_steps(Path(name), asked)


def test_windows_as_deployed():
    windows = CrossFadedLatents(22, 5)
    starts = [[start for start, _ in windows.at_step(50, number)] for number in range(4)]
    assert starts == [[0, 17, 28], [0, 11, 28]] * 2
    assert windows.at_step(30, 1) == [(0, 22), (8, 30)] and windows.at_step(22, 1) == [(0, 22)]
    assert [stop - start for start, stop in windows.at_step(9, 1)] == [9]


@pytest.mark.parametrize("nframes", [4, 16, 22])
def test_windows_of_every_length(nframes):
    """Whole windows that end where the clip does; from a start on each by the same step, but for the last."""
    overlap, windows = nframes // 4, CrossFadedLatents(nframes, nframes // 4)
    for length in range(nframes + 1, 6 * nframes):
        for number, moved in ((0, 0), (1, nframes // 2)):
            found = windows.at_step(length, number)
            assert found[0][0] == 0 and found[-1][1] == length and {b - a for a, b in found} == {nframes}
            later = [start for start, _ in found[number:]]
            assert later[0] == min(moved, length - nframes)
            assert {b - a for a, b in pairwise(later[:-1])} <= {nframes - overlap}
            assert len(later) == 1 or 0 < later[-1] - later[-2] <= nframes - overlap


def test_latents_are_cross_faded():
    """Windows of 0 and 1 over 2 and 3 shared frames: the last shared frame is the later window's alone."""
    sampler = SimpleNamespace(step=lambda pred, timestep, sample, return_dict: (pred,))
    values = iter([0.0, 1.0, 0.0, 1.0])

    def predict(start, stop):
        return torch.full((stop - start, 4, 1, 1), next(values))

    windows = CrossFadedLatents(6, 2)
    even = windows.step(torch.zeros(10, 4, 1, 1), 0, None, sampler, predict)[:, 0].flatten()
    odd = windows.step(torch.zeros(9, 4, 1, 1), 1, None, sampler, predict)[:, 0].flatten()
    assert even.tolist() == pytest.approx([0] * 4 + [1 / 3, 1] + [1] * 4)
    assert odd.tolist() == pytest.approx([0] * 3 + [1 / 4, 1 / 2, 1] + [1] * 3)


def test_the_sampler_takes_every_window_alike():
    sampler = FewStepSampler()
    sampler.set_timesteps(2)
    assert sampler.timesteps.tolist() == [999, 499]
    noise, sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    first, second = (sampler.step(noise, torch.tensor(999), sample, return_dict=False)[0] for _ in range(2))
    assert torch.equal(first, second)


def deployed(vae=None, nframes=4, steps=2, shared_noise=False):
    """As deployed, with a model that predicts nothing; `seen` collects (latents, conditioning) of its calls."""
    seen = []

    def model(latents, conditioning, timestep, prompt_embeds):
        seen.append((latents.clone(), conditioning))
        return torch.zeros_like(latents)

    base = SimpleNamespace(vae=vae or PixelVAE(), noise_scheduler=FewStepSampler())
    few_step = SimpleNamespace(steps=steps)
    return deployed_pipeline(model, few_step, base, torch.device("cpu"), nframes, shared_noise), seen


def test_noise_repeats_and_the_prior_shines_through():
    frames, holes = moving_video(8, 16, 16)
    pipeline, seen = deployed()
    pipeline.fill(frames, holes, None, 0)
    noise = seen[0][0]
    assert torch.equal(seen[0][0], seen[1][0][[1, 2, 3, 0]])  # windows from 0 and 3 on
    for prior in (frames, np.zeros_like(frames)):
        pipeline, seen = deployed()
        pipeline.fill(frames, holes, None, 0, prior=prior)
        truth = PixelVAE().encode(torch.from_numpy(prior[:4]).permute(0, 3, 1, 2) / 127.5 - 1, None)
        assert torch.allclose(seen[0][0], 0.0683 * truth + 0.9977 * noise, atol=1e-3)


def test_frames_that_do_not_see_each_other_share_their_noise():
    """Stage 1's; and windows that do not overlap."""
    frames, holes = moving_video(8, 16, 16)
    pipeline, seen = deployed(shared_noise=True)
    pipeline.fill(frames, holes, None, 0)
    assert pipeline.overlap == 0 and all(torch.equal(noise, seen[0][0][0]) for noise in seen[0][0])


def test_the_first_pass_makes_known_frames():
    frames, holes = moving_video(10, 16, 16)
    pipeline, seen = deployed()
    pipeline.fill(frames, holes, None, 0, prior=frames)
    assert pipeline.first_pass_frames(10) == [0, 2, 5, 7] and pipeline.first_pass_frames(8) == []
    masks = [conditioning[:, 3] for _, conditioning in seen]
    assert all((mask.amin(dim=(1, 2)) == 0).all() for mask in masks[:2])  # two steps of the first pass
    assert torch.equal(masks[2].amin(dim=(1, 2)), torch.tensor([1.0, 0, 1, 0]))  # frames 0 to 3 of the second
    assert len(seen) == 2 + sum(len(pipeline.windows.at_step(10, number)) for number in range(2)) == 2 + 3 + 4


def test_priors_on_the_spot():
    frames, holes = moving_video(6, 24, 32, pan=0, hole_speed=3)
    assert make_prior("none", frames, holes) is None
    assert np.array_equal(np.stack(list(make_prior("telea", frames, holes))), telea(frames, holes))
    median = np.stack(list(make_prior("median", frames, holes)))
    assert np.array_equal(median, temporal_median(frames, holes))
    assert np.abs(median.astype(int) - frames).max() <= 1  # nothing moves but the mask


def test_sizes_and_masks_as_deployed():
    assert size_as_deployed(1080, 1920, 960) == (536, 960) and size_as_deployed(241, 433, 960) == (240, 432)
    mask = np.zeros((40, 40), np.uint8)
    mask[10:20, 10:20] = mask[30, 30] = 255
    grown = grow_as_deployed(mask, 3)
    assert grown[8:22, 8:22].all() and np.count_nonzero(grown) == 14**2  # the speck is gone
    frame, new = np.zeros((40, 40, 3), np.uint8), np.full((40, 40, 3), 200, np.uint8)
    result = compose_as_deployed(frame, new, grown)
    assert (result[grown > 0] == 200).all() and not result[33:].any() and 0 < result[23, 15, 0] < 200


def test_streams_are_read_in_chunks(tmp_path, monkeypatch):
    """From files and from arrays the same pixels; of the frames that were read, no more than a few chunks are held, and
    what two cores read ahead for each of two streams."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    frames, holes = moving_video(60, 16, 24)
    write_frames(tmp_path, frames)
    alive, most = weakref.WeakSet(), []

    class Frame(np.ndarray):
        __hash__ = object.__hash__

    def read(path):
        frame = read_frame(path).view(Frame)
        alive.add(frame)
        most.append(len(alive))
        return frame

    pipeline, _ = deployed()
    expected = pipeline.fill(frames, holes, None, 0, prior=make_prior("telea", frames, holes))
    files = Mapped(read, sorted(tmp_path.glob("*.png")))
    masks = Stream(60, lambda: iter(holes))
    result = np.stack(list(pipeline.stream(files, masks, None, 0, make_prior("telea", files, masks))))
    held = 2 * pipeline.nframes + 2 * (2 * AHEAD + 1)
    assert np.array_equal(result, expected) and max(most) <= held < 45 and len(most) > 60


@pytest.fixture
def command(weights, pcm, tmp_path):
    """overrides -> run_diffueraser.py's arguments for a clip of 11 frames of 67x50 and its masks."""
    frames, holes = moving_video(11, 50, 67)
    write_frames(tmp_path / "frames", frames)
    write_frames(tmp_path / "masks", np.repeat(holes[..., None], 3, axis=3))

    def make(**overrides):
        settings = {
            "video": tmp_path / "frames", "mask": tmp_path / "masks", "weights": weights / "diffuEraser",
            "base_model_name_or_path": weights / "stable-diffusion-v1-5", "vae_path": weights / "sd-vae-ft-mse",
            "output_dir": tmp_path / "out", "pcm_weights": pcm, "as_deployed": True, "nframes": 4, "mask_dilation": 2,
        } | overrides  # fmt: skip
        given = {name: value for name, value in settings.items() if value is not None}
        return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]

    return make


def run(arguments):
    run_diffueraser.main(arguments)
    return read_video(Path(next(a for a in arguments if a.startswith("--output_dir")).partition("=")[2], "frames"))[0]


def test_run_as_deployed(command, tmp_path, capsys):
    """Sides of multiples of 8, what is far from the hole untouched, another prior another result; flags still win."""
    result = run(command())
    assert result.shape == (11, 48, 64, 3) and "windows of 4 frames" in capsys.readouterr().out
    write_frames(tmp_path / "black", np.zeros((11, 50, 67, 3), np.uint8))
    changes = {"prior": tmp_path / "black"}, {"blend": "predictions", "max_side": 40}, {"no-two_passes": True}
    results = [result, *(run(command(**change)) for change in changes)]
    assert results[2].shape == (11, 24, 40, 3) and len({picture.tobytes() for picture in results}) == len(results)
    assert np.array_equal(run(command(prior="telea", prompt="", blend="latents", two_passes=True)), result)
    assert run(command(as_deployed=None)).shape == (11, 50, 67, 3)


def test_eval_as_deployed_by_its_defaults(command, weights, pcm, tmp_path, monkeypatch):
    """With the few-step weights where a DiffuEraser installation has them."""
    monkeypatch.setenv("WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.delenv("PCM_WEIGHTS", raising=False)
    found = tmp_path / "weights" / PCM_FILE
    found.parent.mkdir(parents=True)
    shutil.copy(pcm, found)
    for part in ("frames", "masks"):
        shutil.move(tmp_path / part, tmp_path / "videos" / part / "clip")
    models = [flag for flag in command() if flag.startswith(("--weights", "--base_model", "--vae_path"))]
    eval_DiffuEraser.main([f"--frames={tmp_path / 'videos/frames'}", f"--masks={tmp_path / 'videos/masks'}", *models,
                           f"--output_dir={tmp_path / 'out'}", "--as_deployed", "--baselines"])  # fmt: skip
    settings = json.loads((tmp_path / "out/evaluation.json").read_text())["settings"]
    assert settings["pcm_weights"] == str(found) and settings["files"][str(found)]
    assert settings["blend"] == "latents" and settings["two_passes"]
    assert not settings.keys() & {"mask_dilation", "soft_edge", "max_side"}  # run_diffueraser.py's alone


def test_flags_have_two_defaults(command):
    for given, expected in (({}, ("telea", "latents", True, 2, None, 960, "")),
                            ({"as_deployed": None}, ("none", "predictions", False, 2, 8, None, "clean background")),
                            ({"mask_dilation": None}, ("telea", "latents", True, 8, None, 960, "")),
                            ({"prompt": "a", "soft_edge": 3}, ("telea", "latents", True, 2, 3, 960, "a"))):  # fmt: skip
        args = run_diffueraser.build_parser().parse_args(command(**given))
        check_inference_flags(args)
        flags = (args.prior, args.blend, args.two_passes, args.mask_dilation, args.soft_edge, args.max_side)
        assert (*flags, choose_prompt(args, "/no/folder")) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prior": "small"}, "has 11 frames of 60x50"),
        ({"prior": "short"}, "has 10 frames of 67x50"),
        ({"prior": "nothing"}, "nothing does not exist"),
        ({"prior": "frames"}, "frames is the clip itself: what another method made of it was needed"),
        ({"num_inference_steps": 4}, "was made for 2"),
        ({"pcm_weights": "", "as_deployed": None, "blend": "latents"}, "--blend=latents needs few-step weights"),
        ({"max_side": 4}, "--max_side=4: 8 or more"),
        ({"max_side": 9}, "8x0 pixels, 8x8 or more was needed"),
    ],
)
def test_bad_input_is_one_line(command, pcm, tmp_path, capsys, monkeypatch, changes, expected):
    """Found before anything loads, and nothing is written."""
    frames = moving_video(11, 50, 67)[0]
    write_frames(tmp_path / "small", frames[:, :, :60])
    write_frames(tmp_path / "short", frames[:10])
    if "prior" in changes:
        changes = {"prior": tmp_path / changes["prior"]}
    monkeypatch.setattr("libs.inference.load.BaseModel.encode_prompts", None)
    assert expected in error_line(capsys, run_diffueraser.main, command(**changes))
    assert not list(tmp_path.glob("out/*"))


def keep_only(key, *shape):
    return lambda tensors: (tensors.clear(), put(key, *shape)(tensors))


BAD_WEIGHTS = {  # a file's name: what is done to its tensors, and the line's part
    f"sdxl-{PCM}": (keep_only(f"{PREFIX}input_blocks_4_1_proj_in.lora_up.weight", 640, 4), "input_blocks_4_1_proj_in"),
    f"peft-{PCM}": (keep_only("base_model.model.mid_block.resnets.0.conv1.lora_A.weight", 4, 64), "base_model.model"),
    f"diffusers-{PCM}": (keep_only("unet.mid_block.resnets.0.conv1.lora.up.weight", 64, 4), "belongs to no layer"),
    f"sd2-{PCM}": (put(OTHER_FAMILY, 4, 1024), "has shape (4, 1024), (4, 32) was needed"),
    f"empty-{PCM}": (dict.clear, "no tensors in it"),
    f"missing-{PCM}": (lambda tensors: tensors.pop(f"{LAYER}.alpha"), f"lacks {LAYER}.alpha"),
    f"surplus-{PCM}": (put("lora_te_x.alpha", 1), "lora_te_x.alpha belongs to no layer"),
    "unnamed.safetensors": (None, "its name says no number of steps: name it such as unnamed_2step.safetensors"),
    f"torn-{PCM}": (lambda tensors: None, "is no complete safetensors file"),
    f"pickled-{PCM}.bin": (None, "is no complete safetensors file"),
    f"folder-{PCM}": (None, "is no complete safetensors file"),
    f"nowhere-{PCM}": (None, "is missing: fetch"),
}  # fmt: skip


@pytest.mark.parametrize("door", ["run", "eval", "stage 1", "stage 2"])
def test_bad_weights_are_one_line(door, command, unet, train, flags, videos, tmp_path, capsys, monkeypatch):
    """Through every script, before weights load, and nothing is written; --check_only has it in its table."""
    monkeypatch.setattr("common.weights.OpenedWeights.load", None)
    for name, (change, expected) in BAD_WEIGHTS.items():
        file = tmp_path / name
        if change:
            write_lora(file, unet, change=change)
        if name == "unnamed.safetensors":
            write_lora(file, unet)
        if name.startswith("torn"):
            file.write_bytes(file.read_bytes()[:5000])
        if name.startswith("pickled"):
            torch.save({}, file)
        if name.startswith("folder"):
            file.mkdir()
        if door == "run":
            line = error_line(capsys, run_diffueraser.main, command(pcm_weights=file))
        elif door == "eval":
            models = [flag for flag in command(pcm_weights=file) if re.match("--(weights|base|vae|output|pcm)", flag)]
            frames = [f"--frames={videos / 'DAVIS/JPEGImages/480p'}", "--videos", "buoy"]
            line = error_line(capsys, eval_DiffuEraser.main, [*frames, *models])
        else:
            line = error_line(capsys, train, int(door[-1]), pcm_weights=file, output_dir=tmp_path / "out")
            with pytest.raises(SystemExit):
                train(int(door[-1]), pcm_weights=file, output_dir=tmp_path / "out", check_only=True)
            row = re.search("^few-step weights +FAILED .*", capsys.readouterr().out, re.MULTILINE)[0]
            assert str(file) in row and expected in row
        assert str(file) in line and expected in line
        assert not list(tmp_path.glob("out/*"))


def test_eval_takes_priors(videos, tmp_path, capsys):
    """Another method's frames are a row of their own; those of another number are refused."""
    frames = [f"--frames={videos / 'DAVIS/JPEGImages/480p'}", "--videos", "buoy", "--no_model", "--baselines=telea"]
    other = f"--output_dir={tmp_path / 'other'}"
    given = read_video(videos / "DAVIS/JPEGImages/480p/buoy")[0]
    write_frames(tmp_path / "prior/buoy", given)
    eval_DiffuEraser.main([*frames, f"--prior={tmp_path / 'prior'}", f"--output_dir={tmp_path / 'out'}"])
    assert re.search(r"prior \S+ +.*inf", capsys.readouterr().out)
    for bad, expected in ((given[1:], "holds 25 frames"), (given[:, 1:], "needs frames of the video's size"),
                          (given[[*range(26), 0]], "holds 27 frames")):  # fmt: skip
        write_frames(tmp_path / "bad/buoy", bad)
        assert expected in error_line(capsys, eval_DiffuEraser.main, [*frames, f"--prior={tmp_path / 'bad'}", other])
        assert not list(tmp_path.glob("other/*"))
