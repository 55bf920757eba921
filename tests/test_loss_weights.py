"""Weights of the loss: hole, rim and rest; today's loss without them; the held-out loss in the hole."""

import csv
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import error_line
from diffusers import DDPMScheduler
from test_step import KnownPosterior

import libs.training.held_out_loss
from common.run_files import append_row, read_rows
from libs.base_model import LoadedBase
from libs.training.loss import encode_batch, inpainting_loss, predict, weighted_mse
from libs.training.loss_weights import LossWeights, loss_weights
from libs.vae import FrozenVAE


def weights_of(text, rim=1):
    return LossWeights.of(SimpleNamespace(loss_weights=loss_weights(text), loss_rim=rim))


@pytest.fixture
def base():
    return LoadedBase(FrozenVAE(KnownPosterior(), 2), DDPMScheduler(), torch.randn(2, 7, 16), torch.device("cpu"))


@pytest.fixture
def batch():
    """Two clips of two frames of 6x7 latents; other holes in each frame, and none in the last."""
    generator = torch.Generator().manual_seed(0)
    holes = torch.zeros((2, 2, 48, 56), dtype=torch.uint8)
    holes[0, 0, 4:24, 16:32] = 255  # half of a latent that is known
    holes[0, 1, :8, :] = 255
    holes[1, 0, 40:, 48:] = 255
    frames = torch.randint(0, 256, (2, 2, 48, 56, 3), dtype=torch.uint8, generator=generator)
    return {"frames": frames, "holes": holes, "prompts": [0, 0], "noise_seeds": [5, 6]}


def model(noisy_latents, conditioning, timesteps, encoder_hidden_states):
    return 0.3 * noisy_latents + conditioning[:, :3]


def clip_of(batch, i):
    return {name: values[i : i + 1] for name, values in batch.items()}


@pytest.mark.parametrize("text", ["1,1,1", "2,2,2"])
def test_equal_weights_are_the_plain_mean_to_the_bit(base, batch, text):
    assert weights_of(text) is None
    encoded = encode_batch(base, batch, weights_of(text))
    assert encoded.weights is None
    plain = F.mse_loss(*predict(model, base.noise_scheduler, encoded))
    assert torch.equal(inpainting_loss(model, base, batch, weights_of(text)), plain)


def test_a_weighted_loss_by_hand(base, batch):
    """Latent by latent, with distances counted; a clip's loss is divided by the sum of its own weights."""
    loss = inpainting_loss(model, base, batch, weights_of("4,2,0.5", rim=2))
    encoded = encode_batch(base, batch)
    prediction, target = (tensor.numpy() for tensor in predict(model, base.noise_scheduler, encoded))
    clips = []
    for clip in range(2):
        errors = weights = 0
        for frame in (2 * clip, 2 * clip + 1):
            hole = batch["holes"][clip, frame % 2, ::8, ::8].numpy() == 255
            for y, x in np.ndindex(6, 7):
                distances = [max(abs(y - v), abs(x - u)) for v, u in np.argwhere(hole)] or [99]
                weight = 4 if min(distances) == 0 else 2 if min(distances) <= 2 else 0.5
                errors += weight * ((prediction[frame, :, y, x] - target[frame, :, y, x]) ** 2).mean()
                weights += weight
        clips.append(errors / weights)
    assert loss.item() == pytest.approx(np.mean(clips), rel=1e-5)
    assert loss.item() != pytest.approx(inpainting_loss(model, base, batch).item(), rel=1e-3)


def test_a_batch_of_two_is_the_mean_of_two(base, batch):
    weights = weights_of("4,2,0.5")
    one, two = (inpainting_loss(model, base, clip_of(batch, i), weights) for i in range(2))
    torch.testing.assert_close(inpainting_loss(model, base, batch, weights), (one + two) / 2)


def test_what_has_to_be_cleared_counts_as_the_hole(base, batch):
    """Where the conditioning shows an object that the target lacks, and the mask misses it; faint noise does not."""
    shown = batch["frames"].clone()
    shown[1, 1, 16:32, 24:40] = 255 - shown[1, 1, 16:32, 24:40]
    faint = batch["frames"][0].int() + torch.randint(-3, 4, batch["frames"][0].shape)
    shown[0] = faint.clamp(0, 255).to(torch.uint8)
    shown[0, 0, 8:24, 16:32] = 0  # inside the hole nothing is shown
    weights = weights_of("4,2,1")
    plain = encode_batch(base, batch, weights).weights
    pasted = encode_batch(base, {**batch, "conditioning_frames": shown}, weights).weights
    assert torch.equal(pasted[:3], plain[:3])
    expected = torch.ones(6, 7)
    expected[1:5, 2:6], expected[2:4, 3:5] = 2, 4
    assert (plain[3] == 1).all() and torch.equal(pasted[3, 0], expected)


def test_how_much_has_to_differ():
    """9 of 255 levels all over a latent, not 7, nor a single bright pixel."""
    learned = torch.zeros(1, 3, 8, 32)
    shown = learned.clone()
    shown[..., :8], shown[..., 8:16], shown[..., 4, 20] = 7 / 127.5, -9 / 127.5, 1
    weights = weights_of("4,2,1", rim=0).map(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 8, 32), learned, shown)
    assert weights.flatten().tolist() == [1, 4, 1, 1]


def test_a_clip_without_a_hole_and_weights_of_holes_alone():
    """Nothing counts in it: its loss is 0, and so are its gradients, also as fp16 scales them."""
    prediction = torch.randn(2, 4, 3, 3, requires_grad=True)
    weights = torch.zeros(2, 1, 3, 3)
    weights[1, 0, 1] = 1
    loss = weighted_mse(prediction, torch.zeros(2, 4, 3, 3), weights, clips=2)
    torch.testing.assert_close(loss, prediction[1, :, 1].square().mean() / 2)
    (65536 * loss).backward()
    assert (prediction.grad[0] == 0).all() and prediction.grad[1, :, 1].abs().sum() > 0


@pytest.mark.parametrize("text", ["1,1", "1,1,1,1", "-1,1,1", "0,0,0", "nan,1,1", "inf,1,1", "1,1,x", ""])
def test_bad_weights_are_one_line(train, capsys, text):
    assert "--loss_weights: three numbers hole,rim,rest" in error_line(capsys, train, 1, loss_weights=text)


def test_weights_reach_the_steps(train, tmp_path, capsys):
    """The first step's loss is another one, of the same weights; the settings are recorded."""

    def losses(**settings):
        train(1, max_train_steps=1, **settings)
        return re.findall(r"step 1/1  loss ([\d.]+)", capsys.readouterr().out)

    plain = losses(output_dir=tmp_path / "plain")
    assert losses(output_dir=tmp_path / "equal", loss_weights="3,3,3") == plain
    assert losses(output_dir=tmp_path / "other", loss_weights="1,0,0") != plain
    assert "loss_weights: [1.0, 0.0, 0.0]" in (tmp_path / "other/README.md").read_text()


def test_the_held_out_loss_in_the_hole_by_hand(train, videos, tmp_path, capsys, monkeypatch):
    """From what the model predicted, once per clip; the loss itself is as without weights."""
    seen, timesteps = [], []
    images, masks = (str(videos / "DAVIS" / kind / "480p/buoy") for kind in ("JPEGImages", "Annotations"))

    def watch(model, noise_scheduler, encoded):
        prediction, target = predict(model, noise_scheduler, encoded)
        errors, hole = (prediction - target).numpy() ** 2, encoded.conditioning[:, 4].numpy() == 0
        timesteps.append(encoded.timesteps.tolist())
        seen.append((errors.mean(), errors.transpose(0, 2, 3, 1)[hole].mean()))
        return prediction, target

    monkeypatch.setattr(libs.training.held_out_loss, "predict", watch)
    train(1, max_train_steps=1, resolution=64, validation_steps=100, probe_clips=3, loss_weights="5,1,1",
          report_to="tensorboard", validation_image=[images], validation_mask=[masks])  # fmt: skip
    assert timesteps == 2 * [[166], [500], [833]]  # the middles of three equal parts
    output = capsys.readouterr().out
    with open(tmp_path / "run/logs-finetune-stage1/held_out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, clips in zip(rows, (seen[:3], seen[3:]), strict=True):
        means = np.mean(clips, axis=0)
        assert [float(row["held_out_loss"]), float(row["held_out_loss_hole"])] == pytest.approx(list(means), rel=1e-5)
        assert f", in the hole {means[1]:.4f}" in output


def test_a_file_without_the_column_gets_it(tmp_path):
    """A run of an older version that goes on: what it measured is still there."""
    path = tmp_path / "held_out.csv"
    path.write_bytes(b"step,held_out_loss\r\n0,0.5\r\n10,0.4\r\n20,0.")
    append_row(path, {"step": 20, "held_out_loss": 0.3, "held_out_loss_hole": 0.6})
    append_row(path, {"step": 30, "held_out_loss": 0.2, "held_out_loss_hole": None})
    rows = read_rows(path)
    assert [row["held_out_loss"] for row in rows] == ["0.5", "0.4", "0.3", "0.2"]
    assert [row["held_out_loss_hole"] for row in rows] == ["", "", "0.6", ""]
    append_row(path, {"step": 40, "held_out_loss": 0.1})  # an older version again
    assert read_rows(path)[-1] == {"step": "40", "held_out_loss": "0.1", "held_out_loss_hole": ""}
