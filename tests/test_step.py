"""The training step: batches, seeds, targets, optimizers, and steps that a CUDA graph replays."""

import argparse
import importlib.util
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import bitsandbytes.optim.optimizer
import pytest
import torch
from accelerate import Accelerator
from conftest import reset_accelerate
from diffusers import DDPMScheduler

import libs.training.cuda_graph
import libs.training.loss
import libs.training.optimizer
import libs.training.setup
from common.errors import InputError
from dataset.finetune_dataset import to_tensors
from libs.base_model import LoadedBase
from libs.brushnet_CA import BrushNetModel
from libs.checkpoints.resume import BATCH_SETTINGS
from libs.inpainter import ClipInpainter, FrameInpainter, train_motion_modules_only
from libs.training.config import parse_args
from libs.training.cuda_graph import Captured, GraphedForwardBackward
from libs.training.loss import Draws, EncodedBatch, ForwardBackward, denoising_loss, inpainting_loss
from libs.training.optimizer import PIECE, bf16_adam, eight_bit_adam, make_optimizer, pieces, round_stochastically
from libs.unet_2d_condition import UNet2DConditionModel
from libs.unet_motion_model import MotionAdapter, UNetMotionModel
from libs.vae import FrozenVAE
from tests.reference import fill_by_formula, parity_case
from train_DiffuEraser_stage1 import Stage1


def make_model(stage):
    case, _ = parity_case("batch2")
    unet = UNet2DConditionModel(**case["configs"]["unet"])
    brushnet = BrushNetModel(**case["configs"]["brushnet"])
    fill_by_formula(unet, 1)
    fill_by_formula(brushnet, 2)
    if stage == 1:
        return FrameInpainter(unet, brushnet).double()
    adapter = MotionAdapter(**case["configs"]["motion_adapter"])
    fill_by_formula(adapter, 3)
    return train_motion_modules_only(
        ClipInpainter(UNetMotionModel.from_unet2d(unet, adapter), brushnet), torch.float32
    ).double()


@pytest.mark.parametrize("stage", [1, 2])
def test_batch_two_is_the_mean_of_two_batches_of_one(stage):
    model, scheduler, f = make_model(stage), DDPMScheduler(), 3
    latents, noise, conditioning = (torch.randn(2 * f, c, 8, 8, dtype=torch.float64) for c in (4, 4, 5))
    timesteps, text = torch.tensor([20, 900]), torch.randn(2, 7, 16, dtype=torch.float64)

    def loss(clips):
        frames = slice(clips.start * f, clips.stop * f)
        encoded = EncodedBatch(latents[frames], noise[frames], conditioning[frames], timesteps[clips], text[clips])
        return denoising_loss(model, scheduler, encoded)

    both = loss(slice(0, 2))
    torch.testing.assert_close(both, (loss(slice(0, 1)) + loss(slice(1, 2))) / 2)
    both.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    ((loss(slice(0, 1)) + loss(slice(1, 2))) / 2).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-5, atol=1e-7, msg=name)


def test_what_needs_no_gradients_keeps_no_graph():
    """BrushNet's features in sampling, and in stage 2 always; what stage 2 freezes is in the type that is asked for."""
    clip = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8, 8), torch.tensor([300]), torch.randn(1, 7, 16)
    for stage, enabled in ((1, True), (1, False), (2, True)):
        model, features = make_model(stage).float(), []
        model.brushnet.register_forward_hook(lambda module, args, out, to=features: to.append(out[1].requires_grad))
        with torch.set_grad_enabled(enabled):
            model(*clip)
        assert features == [enabled and stage == 1]
    dtypes = {p.requires_grad: p.dtype for p in train_motion_modules_only(model, torch.bfloat16).parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_draws_follow_from_each_clips_seed():
    shape = (3, 4, 8, 8)
    both = Draws.from_seeds([5, 6], shape, 1000, torch.device("cpu"))
    alone = Draws.from_seeds([6], shape, 1000, torch.device("cpu"))
    assert torch.equal(both.noise[3:], alone.noise) and torch.equal(both.latents[3:], alone.latents)
    assert torch.equal(both.timesteps[1:], alone.timesteps)
    assert not torch.equal(alone.noise, alone.latents) and not torch.equal(alone.latents, alone.conditioning)
    timesteps = {Draws.from_seeds([seed], (1, 1, 1, 1), 5, torch.device("cpu")).timesteps.item() for seed in range(100)}
    assert timesteps == set(range(5))


def test_velocity_prediction():
    model, f = make_model(1), 2
    latents, noise, conditioning = (torch.randn(f, c, 8, 8, dtype=torch.float64) for c in (4, 4, 5))
    inputs = (latents, noise, conditioning, torch.tensor([300]), torch.randn(1, 7, 16, dtype=torch.float64))
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    loss = denoising_loss(model, scheduler, EncodedBatch(*inputs))
    noisy = scheduler.add_noise(latents, noise, torch.tensor([300, 300]))
    a = scheduler.alphas_cumprod[300]
    velocity = a.sqrt() * noise - (1 - a).sqrt() * latents
    torch.testing.assert_close(loss, (model(noisy, *inputs[2:]) - velocity).square().mean().float())


class KnownPosterior(torch.nn.Module):
    """A VAE of 8 pixels per latent: posterior means are pixels averaged over 8x8, the standard deviation is 0.5."""

    config = SimpleNamespace(block_out_channels=(1, 1, 1, 1), latent_channels=3, scaling_factor=0.2)
    dtype = torch.float32

    def encode(self, pixels):
        means = torch.nn.functional.avg_pool2d(pixels, 8)
        log_variances = torch.full_like(means, 2 * torch.tensor(0.5).log())
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=torch.cat([means, log_variances], dim=1)))


def test_a_batch_reaches_the_model_as_it_should():
    """Latents are scaled posterior samples, masked frames' too; each clip has its own prompt, draws and timestep."""
    f, prompt_embeds, scheduler = 2, torch.randn(2, 7, 16), DDPMScheduler(num_train_timesteps=50)
    batch = {
        "frames": torch.randint(0, 256, (2, f, 16, 24, 3), dtype=torch.uint8),
        "holes": torch.zeros((2, f, 16, 24), dtype=torch.uint8),
        "prompts": [1, 0],
        "noise_seeds": [5, 6],
    }
    batch["holes"][:, :, 8:, :8] = 255
    seen = []

    def model(*inputs):
        seen.extend(inputs)
        return torch.zeros_like(inputs[0])

    base = LoadedBase(FrozenVAE(KnownPosterior(), f), scheduler, prompt_embeds, torch.device("cpu"))
    loss = inpainting_loss(model, base, batch)
    noisy_latents, conditioning, timesteps, encoder_hidden_states = seen
    draws = Draws.from_seeds([5, 6], (f, 3, 2, 3), 50, torch.device("cpu"))
    pixel_values, masked, _ = (tensor.flatten(0, 1) for tensor in to_tensors(batch["frames"], batch["holes"]))

    def sample(pixels, noise):
        return 0.2 * (torch.nn.functional.avg_pool2d(pixels, 8) + 0.5 * noise)

    latents = sample(pixel_values, draws.latents)
    frame_timesteps = draws.timesteps.repeat_interleave(f)
    torch.testing.assert_close(noisy_latents, scheduler.add_noise(latents, draws.noise, frame_timesteps))
    torch.testing.assert_close(conditioning[:, :3], sample(masked, draws.conditioning))
    assert (conditioning[:, 3:] == torch.tensor([[1.0, 1, 1], [0, 1, 1]])).all()
    assert torch.equal(timesteps, draws.timesteps) and torch.equal(encoder_hidden_states, prompt_embeds[[1, 0]])
    torch.testing.assert_close(loss, draws.noise.square().mean())


def test_the_optimizer_is_adamw_with_the_flags_settings():
    flags = argparse.Namespace(
        adam_beta1=0.8, adam_beta2=0.9, adam_weight_decay=0.1, adam_epsilon=1e-3, use_8bit_adam=False,
        bf16_weights=False,
    )  # fmt: skip
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = make_optimizer(flags, [parameter], 0.5, torch.device("cpu"))
    mean = square = 0
    expected = 2.0
    for step, gradient in enumerate((3.0, -1.0), start=1):
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
        mean, square = 0.8 * mean + 0.2 * gradient, 0.9 * square + 0.1 * gradient**2
        update = mean / (1 - 0.8**step) / ((square / (1 - 0.9**step)) ** 0.5 + 1e-3)
        expected = expected * (1 - 0.5 * 0.1) - 0.5 * update
    assert parameter.item() == pytest.approx(expected, rel=1e-5)


def test_eight_bit_adam_follows_adamw_and_never_waits_for_the_gpu(monkeypatch):
    """Two large steps of every value, whose moments are kept in bytes."""
    monkeypatch.setattr(bitsandbytes.optim.optimizer, "sync_gpu", None)  # as it is, it would be called, and fail
    settings = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.01, "adam_epsilon": 1e-8}
    flags = argparse.Namespace(**settings, bf16_weights=False)
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(3, 4096, generator=generator)
    results = []
    for flags.use_8bit_adam in (False, True):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = make_optimizer(flags, [parameter], 0.1, torch.device("cpu"))
        for parameter.grad in gradients:
            optimizer.step()
        results.append(parameter.detach())
    assert optimizer.state[parameter]["state1"].dtype == torch.uint8
    assert (results[0] - start).abs().mean() > 0.1 and (results[1] - results[0]).abs().mean() < 0.003


def test_stochastic_rounding_keeps_the_mean():
    """Every value becomes one of its two bf16 neighbours; one that bf16 has, itself, with either sign."""
    exact = torch.tensor([0.0, 1.0, -2.5, 2.0**-40, 2.0**127])
    values = torch.tensor([1 + 0.25 * 2**-7, -1 - 0.75 * 2**-7, 1e-3, -3.14159265])
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(round_stochastically(exact, generator).float(), exact)
    many = round_stochastically(values.repeat(40_000, 1), generator)
    assert many.dtype == torch.bfloat16 and [len(column.unique()) for column in many.T] == [2] * 4
    step = (many.float().amax(0) - many.float().amin(0)).clamp(min=1e-9)
    assert ((many.float() - values).abs() < step).all()
    assert ((many.double().mean(0) - values).abs() < 4 * 0.5 * step / 40_000**0.5).all()


@pytest.mark.parametrize("shape", [(64, 64), (100,)], ids=["moments of 8 bits", "of 32"])
def test_bf16_weights_follow_fp32_ones(shape, monkeypatch):
    """200 steps of a thousandth of a bf16 weight's last place: rounding to the nearest would stay where it began."""
    monkeypatch.setattr(libs.training.optimizer, "PIECE", 1)  # two weights are two pieces
    settings = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.0, "adam_epsilon": 1e-8}
    flags = argparse.Namespace(**settings, use_8bit_adam=True)
    results = {}
    for flags.bf16_weights, dtype in ((False, torch.float32), (True, torch.bfloat16), (True, torch.bfloat16)):
        weights = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for _ in range(2)]
        optimizer = make_optimizer(flags, weights, 1e-3 * 2**-7, torch.device("cpu"))
        for _ in range(200):
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            optimizer.step()
        before, results[dtype] = results.get(dtype), weights
    assert all(torch.equal(*pair) for pair in zip(before, weights, strict=True))  # alike in every run and process
    assert not torch.equal(*weights) and all(weight.dtype == torch.bfloat16 for weight in weights)
    assert optimizer.state.keys() == set(weights)
    if len(shape) == 2:  # 4096 chances of 0.2 to be a place lower
        expected = results[torch.float32][0].mean().item()
        assert expected == pytest.approx(1 - 0.2 * 2**-7, abs=1e-5)
        assert weights[0].float().mean().item() == pytest.approx(expected, abs=4 * 0.7 * 2**-8 / 64)
        assert weights[0].min() > 1 - 8 * 2**-8  # they are not the same ones' chances in every step


@pytest.mark.parametrize("values", [1 << 24, 4200, 1], ids=["one piece", "two pieces", "a piece each"])
def test_bf16_weights_are_updated_each_by_its_gradients(values, monkeypatch):
    """Two steps as large as the weights take every weight to where fp32 ones come, rounded twice."""
    monkeypatch.setattr(libs.training.optimizer, "PIECE", values)
    settings = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.1, "adam_epsilon": 1e-8}
    flags = argparse.Namespace(**settings, use_8bit_adam=True)
    shapes = [(5,), (64, 64), (3, 10, 2), (4, 8, 16, 16)]
    torch.manual_seed(0)
    start, *gradients = ([torch.randn(shape).bfloat16().float() for shape in shapes] for _ in range(3))
    start.append(torch.ones(3))  # its weight has no gradient
    results = []
    for flags.bf16_weights, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        weights = [torch.nn.Parameter(tensor.to(dtype, copy=True)) for tensor in start]
        weights[1].data = weights[1].data.T.contiguous().T
        weights[3].data = weights[3].data.to(memory_format=torch.channels_last)
        optimizer = make_optimizer(flags, weights, 1.0, torch.device("cpu"))
        for step_gradients in gradients:
            for weight, gradient in zip(weights, step_gradients, strict=False):
                weight.grad = gradient.to(dtype)
            optimizer.step()
        results.append([weight.detach().float() for weight in weights])
    assert optimizer.param_groups[0]["params"] == weights and optimizer.state.keys() == set(weights[:-1])
    for exact, rounded in zip(*results, strict=True):
        assert ((rounded - exact).abs() <= 2 * 2**-7 * exact.abs().clamp(min=2)).all()


def test_bf16_weights_take_little_memory_in_fp32():
    weights = [torch.zeros(size) for size in (PIECE // 2, PIECE // 2, 1, PIECE + 1, 2, 3)]
    assert [list(map(len, piece)) for piece in pieces(weights)] == [[PIECE // 2] * 2, [1], [PIECE + 1], [2, 3]]
    assert list(pieces([])) == []


def test_without_an_eight_bit_optimizer(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "torchao" or None)
    with pytest.raises(InputError, match="--bf16_weights needs bitsandbytes: pip install bitsandbytes, or drop"):
        bf16_adam()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--use_8bit_adam needs bitsandbytes or torchao: pip install bitsandbytes"):
        eight_bit_adam()


def test_rate_warm_up_and_clipping_reach_the_optimizer(train, monkeypatch, capsys):
    """scale_lr multiplies by the global batch; gradients that arrive are no longer than the limit."""
    norms = []
    make = libs.training.setup.make_optimizer

    def watch(*args):
        optimizer = make(*args)
        optimizer.register_step_pre_hook(lambda optimizer, *_: norms.append(norm_of(optimizer)))
        return optimizer

    def norm_of(optimizer):
        return torch.stack([p.grad.norm() for p in optimizer.param_groups[0]["params"] if p.grad is not None]).norm()

    monkeypatch.setattr(libs.training.setup, "make_optimizer", watch)
    train(
        1, max_train_steps=3, learning_rate=1e-5, scale_lr=True, train_batch_size=2, gradient_accumulation_steps=2,
        lr_scheduler="linear", lr_warmup_steps=2, max_grad_norm=1e-3,
    )  # fmt: skip
    output = capsys.readouterr().out
    assert [f"lr {rate}  " in output for rate in ("2e-05", "4e-05", "0")] == [True] * 3  # after steps 1, 2 and 3
    assert len(norms) == 3 and all(norm == pytest.approx(1e-3, rel=1e-2) for norm in norms)


def test_schedules_follow_their_flags(flags):
    """To the last step, which follows from the epochs: 3 of 10 clips are 7.5 steps of 4."""
    found = SimpleNamespace(dataset=range(10), global_batch=4, state=SimpleNamespace(settings=dict.fromkeys(
        BATCH_SETTINGS, 1)))  # fmt: skip
    for settings, factor in (
        ({"lr_scheduler": "polynomial", "lr_power": 2}, (1 - 4 / 8) ** 2),
        ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2}, 1),
    ):
        config = parse_args(Stage1, flags(1, max_train_steps=None, num_train_epochs=3, lr_warmup_steps=0, **settings))
        accelerator = SimpleNamespace(device=torch.device("cpu"))
        made = libs.training.setup.make_optimizer_and_schedule(config, accelerator, torch.nn.Linear(1, 1), found)
        optimizer, schedule, last_step = made
        for _ in range(4):
            optimizer.step()
            schedule.step()
        assert last_step == 8 and schedule.get_last_lr() == [pytest.approx(1e-3 * factor, rel=1e-3)]


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs without a GPU: what is captured runs anew, on the captured tensors. Lists the captures."""
    captures = []

    def capture(step, inputs):
        places = [parameter.grad for parameter in step.model.parameters()]
        values = [None if place is None else place.clone() for place in places]
        loss = step.backward(inputs)
        gradients = [parameter.grad for parameter in step.model.parameters()]
        captures.append(inputs)

        def replay():
            held = [parameter.grad for parameter in step.model.parameters()]
            for parameter, place in zip(step.model.parameters(), places, strict=True):
                parameter.grad = place  # None: the backward pass writes gradients, else it adds to them
            loss.copy_(step.backward(inputs))
            for parameter, gradient, before in zip(step.model.parameters(), gradients, held, strict=True):
                gradient.copy_(parameter.grad)
                parameter.grad = before  # a replay writes to memory, it gives nobody a tensor

        for place, value in zip(places, values, strict=True):
            if place is not None:
                place.copy_(value)  # capturing computes nothing
        return Captured(SimpleNamespace(replay=replay), inputs, loss, None)

    monkeypatch.setattr(torch.cuda, "use_mem_pool", lambda pool: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(GraphedForwardBackward, "capture", capture)
    return captures


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_replayed_steps_are_steps(graphs, monkeypatch, accumulation):
    """After a few as they are, and again after the graph was given up in between: with the same losses and weights."""
    for module in (libs.training.loss, libs.training.cuda_graph):
        monkeypatch.setattr(
            module, "encode_batch", lambda base, batch, _=None: SimpleNamespace(x=batch.clone(), weights=None)
        )
        monkeypatch.setattr(module, "denoising_loss", lambda model, _, encoded: model(encoded.x).square().mean())
    results, releases = [], (accumulation, 5 * accumulation)  # before the first capture, and later
    for cuda_graph in (False, True):
        reset_accelerate()
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        model = torch.nn.Linear(3, 2)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        passes = GraphedForwardBackward if cuda_graph else ForwardBackward
        step = passes(accelerator, model, SimpleNamespace(noise_scheduler=None))
        losses = []
        for i in range(8 * accumulation):
            before = len(graphs)
            with accelerator.accumulate(model):
                losses.append(step(torch.randn(4, 3)))
                assert not losses[-1].requires_grad  # a Meter keeps many of them, and no graph
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                step.clear_gradients(optimizer)
            assert len(graphs) == before or i not in releases  # none at once after a release
            if i + 1 in releases:
                step.release()
        results.append((torch.stack(losses), model.weight.detach().clone()))
    assert len(graphs) == 2
    torch.testing.assert_close(*results, rtol=0, atol=0)
    reset_accelerate()


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (torch.AcceleratorError("CUDA error: operation not permitted\nSearch for it"), InputError),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), torch.OutOfMemoryError),
    ],
)
def test_a_capture_that_fails_says_why(monkeypatch, cause, expected):
    """Not what torch says of it afterwards, that the capture could not be ended."""

    @contextmanager
    def graph(*args, **settings):
        try:
            yield
        finally:
            raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")

    def fail(*args):
        raise cause

    for name in ("CUDAGraph", "MemPool"):
        monkeypatch.setattr(torch.cuda, name, lambda: SimpleNamespace(id=None))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(libs.training.cuda_graph, "denoising_loss", fail)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    accelerator, base = SimpleNamespace(gradient_accumulation_steps=1), SimpleNamespace(noise_scheduler=None)
    step = GraphedForwardBackward(accelerator, None, base)
    with pytest.raises(expected, match=str(cause).splitlines()[0]):
        step.capture(None)
