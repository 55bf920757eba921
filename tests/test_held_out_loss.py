"""The held-out loss: which clips it is measured on, by which processes, and what it is compared with."""

from types import SimpleNamespace

import pytest
import torch
from clips import moving_video, write_frames
from diffusers import DDPMScheduler
from test_step import KnownPosterior

import libs.training.held_out_loss
from dataset.finetune_dataset import FinetuneDataset
from libs.base_model import LoadedBase
from libs.training.held_out_loss import HeldOutLoss, spread
from libs.vae import FrozenVAE


@pytest.fixture
def make_held_out(videos, tmp_path, monkeypatch):
    """Of five clips of three frames, every other one of a video; of the videos 4, 5 and 6 frames long, two are."""
    monkeypatch.setattr(libs.training.held_out_loss, "gather_object", lambda found: found)
    lengths = (4, 5, 6)
    for length in lengths:
        write_frames(tmp_path / str(length), moving_video(length, 24, 40)[0])
    data = SimpleNamespace(davis_root=videos / "DAVIS", ytvos_root="", nframes=3, frame_stride=2, resolution=16)
    base = LoadedBase(FrozenVAE(KnownPosterior(), 3), DDPMScheduler(), torch.randn(2, 7, 16), torch.device("cpu"))
    accelerator = SimpleNamespace(
        num_processes=1, process_index=0, is_main_process=True, device=base.device, trackers=[]
    )

    def make(validation_steps):
        config = SimpleNamespace(
            output_dir=tmp_path, logging_dir="logs", validation_steps=validation_steps, probe_clips=5,
            validation_image=[str(tmp_path / str(length)) for length in lengths],
        )  # fmt: skip
        return HeldOutLoss(config, accelerator, FinetuneDataset(data), base)

    return make


@pytest.fixture
def held_out(make_held_out):
    return make_held_out(validation_steps=1)


def test_without_validation_nothing_is_measured(make_held_out):
    """--validation_steps=0 turns all of it off."""
    held_out, state = make_held_out(validation_steps=0), SimpleNamespace(global_step=0, probe_start=None)
    held_out.dataset.clip = lambda *of_clip: pytest.fail("a clip is drawn")
    held_out.start(torch.nn.Identity(), state)
    assert held_out.report(torch.nn.Identity(), state) == (None, {})


def test_clips_are_fixed_and_each_video_has_its_share(held_out, tmp_path, monkeypatch):
    """Crops and masks are of epochs that no run reaches; a video's mean is that of its own clips."""
    drawn, seen = [], []
    clip = held_out.dataset.clip

    def draw(index, epoch):
        drawn.append((index, epoch))
        return clip(index, epoch)

    def predict(model, noise_scheduler, encoded):
        seen.append(encoded)
        target = torch.zeros_like(encoded.latents)
        return target + len(seen), target

    held_out.dataset.clip = draw
    monkeypatch.setattr(libs.training.held_out_loss, "predict", predict)
    loss, _, by_video = held_out.measure(torch.nn.Identity(), 7)
    assert loss == 11 and by_video == {tmp_path / "5": (1 + 9 + 25) / 3, tmp_path / "6": (4 + 16) / 2}
    held_out.measure(torch.nn.Identity(), 8)
    indices, epochs = zip(*drawn, strict=True)
    assert indices == 2 * (0, 1, 0, 1, 0) and min(epochs) > 10**9
    assert drawn[:5] == drawn[5:] and len(set(drawn)) == 5
    for before, after in zip(seen[:5], seen[5:], strict=True):
        assert torch.equal(before.latents, after.latents) and torch.equal(before.noise, after.noise)
    assert len({encoded.noise.sum().item() for encoded in seen}) == 5


def test_a_resumed_run_compares_with_its_first_start(held_out, monkeypatch, caplog):
    monkeypatch.setattr(held_out, "measure", lambda model, step: (0.3, None, {}))
    state = SimpleNamespace(global_step=5, probe_start=0.6)
    with caplog.at_level("INFO", "diffueraser"):
        held_out.start(None, state)
        held_out.report(None, state)
    assert state.probe_start == 0.6 and caplog.messages == ["held-out loss 0.3000 at step 5, 0.500 of its start"]


def test_processes_share_the_clips(monkeypatch):
    """As many calls in each, so that none waits; none begins where one is too late."""
    monkeypatch.setattr(libs.training.held_out_loss, "gather_object", lambda found: found)
    calls = [list(spread(SimpleNamespace(num_processes=2, process_index=i), 3, str)) for i in range(2)]
    assert [len(of_process) for of_process in calls] == [2, 2] and {*calls[0], *calls[1]} == {0, 1, 2}
    monkeypatch.setattr(libs.training.held_out_loss, "gather_object", lambda found: found and [*found, True])
    assert spread(SimpleNamespace(num_processes=2, process_index=0), 3, str, too_late=lambda: False) == {}
