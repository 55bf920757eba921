"""What makes steps fast and small changes nothing in what they compute."""

import errno
import multiprocessing
import os
import shutil
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from conftest import equal_files, reset_accelerate
from diffusers import AutoencoderKL
from safetensors.torch import load_file

import libs.training.log
import libs.unet_walk
from libs.brushnet_CA import BrushNetModel
from libs.checkpoints.checkpoint import (
    TrainerState,
    finish_checkpoint,
    register_hooks,
    saved_keys,
    weights_of,
    write_checkpoint,
)
from libs.inpainter import ClipInpainter, FrameInpainter, train_motion_modules_only
from libs.recompute import run_recomputed
from libs.training.compiling import compile_models
from libs.training.cuda_graph import GraphedForwardBackward
from libs.training.latent_cache import LatentCache
from libs.training.log import log_compiling
from libs.training.loss import ForwardBackward
from libs.training.optimizer import eight_bit_adam, match_layout
from libs.training.setup import set_up_torch
from libs.unet_2d_condition import UNet2DConditionModel
from libs.unet_motion_model import MotionAdapter, UNetMotionModel
from libs.vae import FrozenVAE, frames_at_once
from tests.live_memory import peak_bytes
from tests.reference import fill_by_formula, parity_case

SMALL = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 2, "cross_attention_dim": 16,
    "norm_num_groups": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


def small_model(stage):
    unet = UNet2DConditionModel(sample_size=8, **SMALL)
    brushnet = BrushNetModel.from_unet(unet)
    fill_by_formula(unet, 1)
    fill_by_formula(brushnet, 2)
    if stage == 1:
        return FrameInpainter(unet, brushnet)
    adapter = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4
    )
    fill_by_formula(adapter, 3)
    return train_motion_modules_only(ClipInpainter(UNetMotionModel.from_unet2d(unet, adapter), brushnet), torch.float32)


def gradients(model, inputs):
    model.zero_grad()
    model(*inputs).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


def test_the_latent_cache_changes_nothing(train, tmp_path):
    """Without, with an empty and with a full cache, two clips at a time: the same weights, bit for bit."""
    settings = {"latent_cache": tmp_path / "cache", "train_batch_size": 2}
    train(1, output_dir=tmp_path / "none", train_batch_size=2, max_train_steps=3)
    train(1, output_dir=tmp_path / "empty", max_train_steps=3, **settings)
    held = {path: path.read_bytes() for path in (tmp_path / "cache").glob("*/*")}
    assert 12 <= len(held) <= 18 and len({len(content) for content in held.values()}) == 1  # of 6 clips of 3 frames
    train(1, output_dir=tmp_path / "full", max_train_steps=3, **settings)
    assert {path: path.read_bytes() for path in (tmp_path / "cache").glob("*/*")} == held
    final = "unet_main/diffusion_pytorch_model.safetensors"
    assert equal_files(tmp_path / "none" / final, tmp_path / "empty" / final)
    assert equal_files(tmp_path / "none" / final, tmp_path / "full" / final)


@pytest.fixture
def frames(tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(3)]
    for path in paths:
        path.write_text(path.name)
    return paths


def test_loader_workers_have_the_cache_with_python_3_14(train, tmp_path, monkeypatch):
    """There a process is not forked by default."""
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", get_context("forkserver"))
    assert multiprocessing.get_start_method() == "forkserver"
    train(1, latent_cache=tmp_path / "cache", dataloader_num_workers=1, max_train_steps=1)
    assert list((tmp_path / "cache").glob("*/*"))


def test_a_frame_is_held_until_it_changes(tmp_path, frames):
    cache = LatentCache(tmp_path / "cache", "vae", (8, 2, 2), torch.float16)
    posteriors, missing = cache.read(frames)
    assert posteriors.shape == (3, 8, 2, 2) and all(missing) and len(set(missing)) == 3
    values = torch.randn(2, 8, 2, 2).half()
    cache.add(missing[:2], values)
    cache.close()
    posteriors, missing = cache.read(frames)
    assert torch.equal(posteriors[:2], values) and missing[:2] == [None, None] and missing[2]
    (tmp_path / "linked").symlink_to(frames[0])
    assert cache.read([tmp_path / "linked"])[1] == [None]
    os.utime(frames[0], (1, 1))
    assert cache.read(frames)[1][0]
    for other in ({"vae": "another"}, {"shape": (8, 4, 4)}, {"dtype": torch.bfloat16}):
        settings = {"vae": "vae", "shape": (8, 2, 2), "dtype": torch.float16, **other}
        assert all(LatentCache(tmp_path / "cache", **settings).read(frames)[1])


def test_a_damaged_file_is_not_held(tmp_path, frames):
    cache = LatentCache(tmp_path / "cache", "vae", (8, 2, 2), torch.float32)
    cache.add(cache.read(frames)[1], torch.randn(3, 8, 2, 2))
    cache.close()
    files = [cache.file(cache.key(path)) for path in frames]
    files[0].write_bytes(files[0].read_bytes()[:-5])
    files[1].write_bytes(bytes(files[1].stat().st_size))
    assert [key is None for key in cache.read(frames)[1]] == [False, False, True]


def test_the_cache_is_bounded(tmp_path, frames, caplog):
    room_for_four = 4.5 * 8 * 2 * 2 * 4 / 1e9
    cache = LatentCache(tmp_path / "cache", "vae", (8, 2, 2), torch.float32, room_for_four, num_processes=2)
    keys = cache.read(frames)[1]
    with caplog.at_level("INFO", logger="diffueraser"):
        cache.add(keys, torch.randn(3, 8, 2, 2))  # more than one process's share
        cache.add(keys, torch.randn(3, 8, 2, 2))
    assert [record.getMessage().count("has reached --latent_cache_gb") for record in caplog.records] == [1]
    cache.add(keys[:2], torch.randn(2, 8, 2, 2))
    cache.add(keys[2:], torch.randn(1, 8, 2, 2))
    cache.close()
    assert [key is None for key in cache.read(frames)[1]] == [True, True, False]


def test_the_cache_may_have_no_bound(tmp_path, frames):
    cache = LatentCache(tmp_path / "cache", "vae", (8, 2, 2), torch.float32, float("inf"), num_processes=2)
    cache.add(cache.read(frames)[1], torch.randn(3, 8, 2, 2))
    cache.close()
    assert not any(cache.read(frames)[1])


def test_the_bound_is_in_bytes(tmp_path, frames):
    """Frames of another resolution and what is half-written count at their size; nothing is deleted but what a killed
    run has left half-written."""
    small, large = (8, 2, 2), (8, 4, 4)  # 132 and 516 bytes a file
    cache = LatentCache(tmp_path / "cache", "vae", large, torch.float32)
    cache.add(cache.read(frames)[1][:1], torch.randn(1, *large))
    cache.close()
    (held,) = (tmp_path / "cache").glob("*/*")
    others = [held.with_name(name) for name in (f"{0:032x}.4711", "holiday.jpg")]  # half-written; somebody's own
    for file in others:
        file.write_bytes(bytes(100))
    abandoned = held.with_name(f"{1:032x}.4711")
    for file in (abandoned, others[1]):
        file.write_bytes(bytes(100))
        os.utime(file, (0, 0))
    for limit, kept in ((516 + 200 + 132 - 1, 0), (516 + 200 + 132, 1)):
        cache = LatentCache(tmp_path / "cache", "vae", small, torch.float32, limit / 1e9)
        assert all(file.is_file() for file in others) and not abandoned.exists()
        cache.add(cache.read(frames)[1][:1], torch.randn(1, *small))
        cache.close()
        assert [key is None for key in cache.read(frames)[1]].count(True) == kept


def test_a_cache_that_is_deleted_or_anothers(monkeypatch, tmp_path, frames):
    """It is made anew while the run goes on; what another user's killed run has left half-written stays."""
    cache = LatentCache(tmp_path / "cache", "vae", (8, 2, 2), torch.float32)
    shutil.rmtree(tmp_path / "cache")
    cache.add(cache.read(frames)[1], torch.randn(3, 8, 2, 2))
    cache.close()
    assert cache.read(frames)[1] == [None] * 3
    held = next((tmp_path / "cache").glob("*/*"))
    abandoned = held.with_name(f"{1:032x}.4711")
    abandoned.touch()
    os.utime(abandoned, (0, 0))
    monkeypatch.setattr("os.unlink", Mock(side_effect=PermissionError))
    LatentCache(tmp_path / "cache", "vae", (8, 2, 2), torch.float32)
    assert abandoned.is_file()


def test_a_full_disk_ends_what_is_added(monkeypatch, tmp_path, frames, caplog):
    """It is said once, nothing half-written stays, and no further frame is tried."""
    cache = LatentCache(tmp_path / "cache", "vae", (8, 2, 2), torch.float32)
    keys = cache.read(frames)[1]
    replace = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(Path, "replace", replace)
    with caplog.at_level("INFO", logger="diffueraser"):
        for _ in range(2):
            cache.add(keys, torch.randn(3, 8, 2, 2))
            cache.close()
    assert replace.call_count == 1 and not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))
    assert len(caplog.messages) == 1 and "cannot be written (No space left on device)" in caplog.text


def test_frames_are_encoded_in_slices_of_one_size():
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pixels, sizes = torch.randn(7, 3, 16, 16), []
    vae.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    posteriors = FrozenVAE(vae, frames=3).posterior(pixels)
    assert posteriors.shape == (7, 8, 8, 8) and sizes == [3, 3, 3]
    torch.testing.assert_close(posteriors, vae.encode(pixels).latent_dist.parameters)
    half, noise = posteriors.half(), torch.randn(7, 4, 8, 8)
    latents = [FrozenVAE(vae, frames=3).sample(posterior, noise) for posterior in (half, half.float())]
    assert latents[0].dtype == torch.float32 and torch.equal(*latents)
    assert [frames_at_once(n, 512, 512) for n in (1, 10, 11, 12, 22, 24)] == [1, 10, 11, 6, 11, 8]
    sizes = [(256, 64, 64), (2, 1024, 1024), (3, 1024, 1024), (10, 1080, 1920), (1, 4096, 4096)]
    assert [frames_at_once(*size) for size in sizes] == [256, 2, 2, 1, 1]


def test_plain_and_compiled_models_resume_from_each_other(tmp_path):
    """Compiled ones are in channels_last, and with them Adam's moments."""

    def step(folder, seed, memory_format):
        """A step from the folder's checkpoint, where there is one, and a checkpoint: its weights."""
        reset_accelerate()
        accelerator = Accelerator(cpu=True)
        model = small_model(1).to(memory_format=memory_format)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True))
        register_hooks(accelerator, saved_keys(model))
        if folder.exists():
            accelerator.load_state(str(folder))
            match_layout(optimizer)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step()
        weights = {"model.safetensors": weights_of(accelerator, model)}
        finish_checkpoint(write_checkpoint(accelerator, folder.parent, TrainerState(1, int(folder.name[-1])), weights))
        return load_file(folder / "model.safetensors")

    formats = (torch.channels_last, torch.contiguous_format, torch.channels_last)
    for seed, memory_format in enumerate(formats):
        plain = step(tmp_path / "checkpoint-1", seed, torch.contiguous_format)
        mixed = step(tmp_path / "checkpoint-2", seed, memory_format)
        torch.testing.assert_close(mixed, plain)
    reset_accelerate()


def test_the_first_layers_are_recomputed_piece_by_piece(monkeypatch):
    case, _ = parity_case("odd_size")
    unet, brushnet = UNet2DConditionModel(**case["configs"]["unet"]), BrushNetModel(**case["configs"]["brushnet"])
    fill_by_formula(unet, 1)
    fill_by_formula(brushnet, 2)
    model = FrameInpainter(unet, brushnet).double()
    inputs = torch.randn(6, 4, 9, 8), torch.randn(6, 5, 9, 8), torch.tensor([20, 900]), torch.randn(2, 7, 16)
    inputs = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    expected = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    sizes = {0: [], -1: []}
    for blocks, index in ((unet.down_blocks, 0), (unet.up_blocks, -1)):
        blocks[index].resnets[index].register_forward_pre_hook(lambda m, args, i=index: sizes[i].append(len(args[0])))
    monkeypatch.setattr(libs.unet_walk, "MAX_RECOMPUTED", 6 * 32 * 9 * 8 // 4)
    found = gradients(model, inputs)
    assert sizes == {0: [2, 2, 1, 1] * 2, -1: [6] * 2}  # forward, then backward
    for gradient, value in zip(expected, found, strict=True):
        torch.testing.assert_close(value, gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("stage", "bf16_weights", "gib"), [(1, False, 17.2), (2, False, 10.4), (1, True, 10.7), (2, True, 9.3)]
)
def test_the_low_memory_peak(stage, bf16_weights, gib):
    """At full size, without data; a GPU needs up to 1 GiB more. Stage 1 with no layer in pieces: 17.6; stage 2
    with motion modules recomputed together with the layer before: 11.7 and 10.6."""
    assert peak_bytes(stage, True, use_8bit_adam=True, bf16_weights=bf16_weights) < gib * 2**30


@pytest.mark.parametrize("stage", [1, 2])
def test_recomputed_layers_give_the_same_gradients(stage):
    model = small_model(stage).double()
    inputs = torch.randn(6, 4, 8, 8), torch.randn(6, 5, 8, 8), torch.tensor([20, 900]), torch.randn(2, 7, 16)
    inputs = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    expected = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    for found, gradient in zip(gradients(model, inputs), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-12)


def test_layers_are_recomputed_in_the_same_precision():
    model = small_model(1)
    model.enable_gradient_checkpointing()
    dtypes = []
    model.unet_main.mid_block.resnets[0].conv1.register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))
    inputs = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 8, 8), torch.tensor([20]), torch.randn(1, 7, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*inputs).square().mean()
    loss.backward()
    assert dtypes == [torch.bfloat16, torch.bfloat16]


def test_layers_are_recomputed_with_the_same_settings_of_torch():
    """In the backward pass's own thread too, as on a GPU, where torch 2.13 has the defaults: layers would be compiled
    in 8 forms at most, and the next one ends the run."""
    module, found = torch.nn.Linear(2, 2), []

    def layer(module, sample):
        found.append(torch._dynamo.config.recompile_limit)
        return module(sample)

    with torch._dynamo.config.patch(recompile_limit=77):
        loss = run_recomputed(layer, [module], [torch.randn(3, 2)]).sum()
        backward = Thread(target=loss.backward)
        backward.start()
        backward.join()
    assert found == [77, 77] and module.weight.grad is not None


@pytest.mark.filterwarnings("default")  # torch's tracing warns in passing
@pytest.mark.parametrize("stage", [1, 2])
def test_each_model_is_traced_as_one_graph(stage):
    """What `compile_models` asks for; without generating code, which would take minutes."""
    model = small_model(stage)
    inputs = torch.randn(4, 4, 8, 8), torch.randn(4, 5, 8, 8), torch.tensor([20, 900]), torch.randn(2, 7, 16)
    expected = gradients(model, inputs)
    for part in (model.unet_main, model.brushnet):
        part.compile(fullgraph=True, dynamic=False, backend="eager")
    for gradient, value in zip(expected, gradients(model, inputs), strict=True):
        torch.testing.assert_close(value, gradient, rtol=1e-4, atol=1e-5)
    assert all("_orig_mod" not in key for key in model.state_dict())  # checkpoints keep their keys
    torch._dynamo.reset()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("stage", "channels_last", "recompute"), [(1, True, False), (1, False, True), (2, False, True)]
)
def test_equal_layers_are_compiled_once(stage, channels_last, recompute, monkeypatch):
    """Not stage 2 in channels_last, compiled or not: torch's group norm of five dimensions crashes on CPUs then."""
    graphs = []
    compiled = torch.compile
    backend = {"backend": lambda graph, inputs: graphs.append(graph) or graph.forward}
    monkeypatch.setattr(torch, "compile", lambda function, **settings: compiled(function, **settings, **backend))
    model = small_model(stage)
    inputs = torch.randn(4, 4, 8, 8), torch.randn(4, 5, 8, 8), torch.tensor([20, 900]), torch.randn(2, 7, 16)
    expected = gradients(model, inputs)
    if recompute:
        model.enable_gradient_checkpointing()
    compile_models((model.unet_main, model.brushnet), by_layer=True, channels_last=channels_last)
    for gradient, value in zip(expected, gradients(model, inputs), strict=True):
        torch.testing.assert_close(value, gradient, rtol=1e-4, atol=1e-5)
    layers = [layer for layer in model.modules() if type(layer).__name__ in model._no_split_modules]
    assert 0 < len(graphs) < len(layers) * (1 + recompute)  # with gradients, and without before they are recomputed
    first_pass = len(graphs)
    gradients(model, inputs)
    assert len(graphs) == first_pass
    torch._dynamo.reset()


def test_the_log_says_how_far_compiling_is(monkeypatch):
    """What was compiled before does not count, nor is anything said once the step is done."""
    found, lines = {"fxgraph_cache_hit": 3, "fxgraph_cache_miss": 0, "fxgraph_cache_bypass": 0}, []
    state, grown = SimpleNamespace(global_step=7), iter([{}, {"fxgraph_cache_miss": 2}, {}, {"fxgraph_cache_hit": 7}])

    def sleep(seconds):
        found.update(next(grown))
        state.global_step += found["fxgraph_cache_hit"] == 7

    clock = SimpleNamespace(sleep=sleep, perf_counter=lambda: 0)
    monkeypatch.setattr(libs.training.log, "time", clock)
    monkeypatch.setattr(libs.training.log, "counters", {"inductor": found})
    monkeypatch.setattr(libs.training.log, "log", SimpleNamespace(info=lambda *args: lines.append(args[0] % args[1:])))
    log_compiling(state).join()
    assert lines[1:] == ["compiling: 2 pieces after 0 s"] * 2


@pytest.fixture
def ddp():
    """DDP around a model, in a group of one process, with buckets that hold some layers of `small_model` each."""
    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    yield lambda model: torch.nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True, bucket_cap_mb=0.1
    )
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("default")
def test_each_model_stays_one_graph_in_ddp(ddp, monkeypatch):
    """torch would cut graphs in DDP where a bucket is full, whole graphs asked for or not."""
    graphs = []
    compiled = torch.nn.Module.compile
    backend = {"backend": lambda graph, inputs: graphs.append(graph) or graph.forward}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **settings: compiled(model, **settings, **backend))
    model = small_model(1)
    compile_models((model.unet_main, model.brushnet), by_layer=False)
    inputs = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8, 8), torch.tensor([20]), torch.randn(1, 7, 16)
    ddp(model)(*inputs).square().mean().backward()
    assert len(graphs) == 2


def test_ddp_is_captured_after_the_passes_that_it_times(ddp, monkeypatch):
    """Events that are read on the host cannot be captured."""
    rates, accelerator = [], SimpleNamespace(gradient_accumulation_steps=1)
    model = torch.nn.Linear(2, 2)
    assert GraphedForwardBackward(accelerator, model, None).warm_up == 3
    wrapped = ddp(model)
    monkeypatch.setattr(wrapped, "_set_ddp_runtime_logging_sample_rate", rates.append)
    assert GraphedForwardBackward(accelerator, wrapped, None).warm_up > 10 and rates[0] > 10**9


def test_a_graph_s_run_leaves_the_default_stream(monkeypatch):
    streams = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "another")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    for cuda_graph in (False, True):
        set_up_torch(SimpleNamespace(seed=0, allow_tf32=False, cuda_graph=cuda_graph))
    assert streams == ["another"]


@pytest.mark.gpu
def test_eight_bit_updates_wait_for_gradients():
    """bitsandbytes' kernels start in the default stream, gradients come from another: the same weights."""
    results = []
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            torch.manual_seed(0)
            weight = torch.nn.Parameter(torch.randn(4096, 4096, device="cuda"))
            optimizer = eight_bit_adam()([weight], lr=0.1)
            for _ in range(5):
                product = torch.randn(4096, 4096, device="cuda")
                for _ in range(20):
                    product = (product @ weight.detach()).clamp(-1, 1)
                weight.grad = product
                optimizer.step()
            results.append(weight.detach().clone())
    torch.cuda.synchronize()
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_accumulated_gradients_stay_in_ddp_s_buckets(ddp):
    """No second set of gradients beside the buckets in the passes that are not averaged yet."""
    reset_accelerate()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = ddp(torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    forward_backward = ForwardBackward(accelerator, model, None)
    places = []
    for step in range(6):
        accelerator.gradient_state._set_sync_gradients(step % 2 == 1)
        with nullcontext() if accelerator.sync_gradients else model.no_sync():
            loss = model(torch.randn(4, 3)).mean()
            loss.backward()
        places.append([parameter.grad.data_ptr() for parameter in model.parameters()])
        if accelerator.sync_gradients:
            optimizer.step()
            forward_backward.clear_gradients(optimizer)
            assert not any(parameter.grad.any() for parameter in model.parameters())
    assert places[2] == places[3] == places[4] == places[5]
    reset_accelerate()
