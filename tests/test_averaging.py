"""Averaged weights: the mean of several checkpoints in a converter, and a run's exponential moving average."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import equal_files
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

import libs.training.checks
import save_checkpoint_stage1
from common.distributed import check_distributed
from common.errors import InputError
from common.run_files import append_row, read_rows
from libs.checkpoints.average import held_out_losses
from libs.checkpoints.convert import convert, main
from libs.training.checks import check_disk_space, check_memory
from libs.training.config import parse_args
from libs.training.ema import Ema
from train_DiffuEraser_stage1 import Stage1

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def validation(videos):
    """Flags of a run with one validation video, whose held-out loss is on one clip."""
    images, masks = (str(videos / "DAVIS" / kind / "480p/buoy") for kind in ("JPEGImages", "Annotations"))
    return {"validation_steps": 100, "validation_minutes": 1e-9, "probe_clips": 1, "validation_image": [images],
            "validation_mask": [masks]}  # fmt: skip


def marker_of(folder):
    return json.loads((folder / "brushnet/conversion.json").read_text())


def test_the_mean_of_checkpoints(train, validation, tmp_path, capsys):
    """Of the last ones, or of those with the lowest held-out loss; equal ones keep their bits."""
    run, out = tmp_path / "run", tmp_path / "out"
    train(1, max_train_steps=3, checkpointing_steps=1, **validation)
    flags = {name: value for name, value in vars(save_checkpoint_stage1).items() if not name.startswith("_")}
    main(1, [f"--input_dir={run}", f"--output_dir={out}", "--average=2"], **flags)
    assert "stage 1, step 3; mean of checkpoint-2, checkpoint-3)" in capsys.readouterr().out
    assert marker_of(out)["averaged"] == ["checkpoint-2", "checkpoint-3"] and marker_of(out)["step"] == 3
    card = (out / "README.md").read_text()
    assert "Weights: mean of checkpoint-2, checkpoint-3." in card and "## Scores" not in card
    two, three = (load_file(run / f"checkpoint-{step}/model.safetensors") for step in (2, 3))
    for name in ("unet_main", "brushnet"):
        for key, value in load_file(out / name / WEIGHTS).items():
            both = (tensors[f"{name}.{key}"].double() for tensors in (two, three))
            assert torch.equal(value, (sum(both) / 2).float()), key

    held_out = run / "logs-finetune-stage1/held_out.csv"
    held_out.write_text("step,held_out_loss\n0,0.1\n1,0.3\n2,nan\n3,0.4\n")
    convert(1, run, out, average=2, average_by="held_out_loss")
    assert marker_of(out)["averaged"] == ["checkpoint-1", "checkpoint-3"]
    convert(1, run, out, average_by="held_out_loss")
    assert marker_of(out)["step"] == 1 and "averaged" not in marker_of(out)
    assert "## Scores at step 1" in (out / "README.md").read_text()
    with pytest.raises(InputError, match=r"2 complete checkpoints with a held-out loss, --average=3 needs 3"):
        convert(1, run, out, average=3, average_by="held_out_loss")

    for step in (1, 2):  # the newest one, under the others' names
        shutil.rmtree(run / f"checkpoint-{step}")
        shutil.copytree(run / "checkpoint-3", run / f"checkpoint-{step}")
    convert(1, run, tmp_path / "mean", average=3)
    for name in ("unet_main", "brushnet"):
        assert (tmp_path / "mean" / name / WEIGHTS).read_bytes() == (run / name / WEIGHTS).read_bytes()


def test_checkpoints_that_make_no_mean(train, tmp_path, capsys):
    """One line each, and nothing is written."""
    run, out = tmp_path / "run", tmp_path / "out"
    train(1, checkpointing_steps=1)

    def refused(message, input_dir=run, **settings):
        with pytest.raises(InputError, match=message) as error:
            convert(1, input_dir, out, **{"average": 2, **settings})
        assert "\n" not in str(error.value) and not out.exists()

    refused(r"run has 2 complete checkpoints, --average=3 needs 3", average=3)
    refused(r"checkpoint-2 is one checkpoint: .* set input_dir to .*run$", input_dir=run / "checkpoint-2")
    refused(r"--average=0: at least 1 was needed", average=0)
    refused(r"--average_by=loss: one of step, held_out_loss was needed", average_by="loss")
    refused(r"held_out\.csv has no held-out losses: use --average_by=step", average_by="held_out_loss")
    file = run / "checkpoint-1/trainer_state.json"
    state = json.loads(file.read_text())
    for changed, what in (
        ({"weights": {**state["weights"], "brushnet": ["elsewhere", "0123"]}}, "start weights"),
        ({"configs": {}}, "models"),
        ({"stage": 2}, "stage"),
    ):
        file.write_text(json.dumps({**state, **changed}))
        refused(f"checkpoint-1 and .*checkpoint-2 are of two runs: they differ in {what}; move one")
    file.write_text(json.dumps({**state, "files": {**state["files"], "ema.safetensors": 1}}))
    refused(r"checkpoint-2 has no ema\.safetensors, others have: add --no_ema")
    # As another process writes it, of a run that was resumed.
    state["configs"]["unet_main"]["_use_default_values"].reverse()
    file.write_text(json.dumps({**state, "weights": {name: ["moved", w[1]] for name, w in state["weights"].items()}}))
    convert(1, run, tmp_path / "of two starts", average=2)
    model = run / "checkpoint-1/model.safetensors"
    save_file({key.replace("conv_in.bias", "x"): tensor for key, tensor in load_file(model).items()}, model)
    refused(r"checkpoint-1 lacks unet_main\.conv_in\.bias")
    model.unlink()
    refused(r"run has 1 complete checkpoints, --average=2 needs 2")
    assert "skipped: " in capsys.readouterr().out
    for name in ("model", "model_1"):
        save_file({"conv_in.weight": torch.zeros(1)}, run / f"checkpoint-1/{name}.safetensors")
    refused(r"checkpoint-1 was written by the original DiffuEraser scripts: convert one of them alone")


def test_held_out_losses_are_those_of_the_newest_start(tmp_path):
    """Which may have another folder of logs."""
    starts = [{"command": [], "settings": {"logging_dir": name}} for name in ("old", "new")]
    (tmp_path / "config.json").write_text(json.dumps(starts))
    for name, loss in (("old", 0.5), ("new", 0.25)):
        append_row(tmp_path / name / "held_out.csv", {"step": 1, "held_out_loss": loss})
    assert held_out_losses(tmp_path) == {1: 0.25}


def test_an_average_by_hand(tmp_path):
    """The recursion over what trains; diffusers' EMAModel finds the same, and at decay 0 it is the model to the bit."""
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    path = [torch.randn(2, 3) * 10.0**-i for i in range(6)]
    model.weight.data.copy_(path[0])
    average, zero = Ema(0.9, model, None), Ema(0.0, model, None)
    theirs = EMAModel([model.weight], decay=0.9, min_decay=0.9, update_after_step=-1)
    by_hand = path[0].double()
    for value in path[1:]:
        model.weight.data.copy_(value)
        average.update()
        zero.update()
        theirs.step([model.weight])
        by_hand = 0.9 * by_hand + 0.1 * value.double()
        assert torch.equal(zero.averages["weight"], model.weight)
    assert list(average.averages) == ["weight"]
    torch.testing.assert_close(average.averages["weight"], by_hand.float())
    torch.testing.assert_close(average.averages["weight"], theirs.shadow_params[0])

    before, place = average.averages["weight"].clone(), model.weight.data_ptr()
    with pytest.raises(RuntimeError), average.in_use():
        assert torch.equal(model.weight, before) and model.weight.data_ptr() == place
        raise RuntimeError
    assert torch.equal(model.weight, path[-1]) and torch.equal(average.averages["weight"], before)


def test_the_file_of_an_average(tmp_path):
    """It is of compiled models too, whose weights are in channels_last; one that lacks a weight is refused, as the
    average would go on from elsewhere."""
    model = torch.nn.Conv2d(3, 2, 2).to(memory_format=torch.channels_last)
    average = Ema(0.9, model, None)
    average.update()
    for name, tensors in average.files().items():
        save_file(tensors, tmp_path / name)
    file = tmp_path / "ema.safetensors"
    resumed = Ema(0.9, torch.nn.Conv2d(3, 2, 2), tmp_path)
    assert all(torch.equal(resumed.averages[name], average.averages[name]) for name in ("weight", "bias"))
    save_file({"weight": load_file(file)["weight"]}, file)
    with pytest.raises(InputError, match=r"ema\.safetensors lacks bias"):
        Ema(0.9, model, tmp_path)


def test_a_run_with_an_average(train, validation, tmp_path, capsys):
    """Resumed bit for bit; validating it leaves the weights that train alone; it is what is converted."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(1, output_dir=whole, max_train_steps=4, ema_decay=0.9, **validation)
    output = capsys.readouterr().out
    assert "EMA of decay 0.9, from the weights that the run starts from" in output
    assert "stage 1, step 4; EMA of decay 0.9)" in output
    train(1, output_dir=parts, max_train_steps=2, ema_decay=0.9)
    train(1, output_dir=parts, max_train_steps=4, ema_decay=0.9, resume_from_checkpoint="latest")
    assert f"EMA of decay 0.9, from that of {parts}/checkpoint-2" in capsys.readouterr().out
    checkpoint = whole / "checkpoint-4"
    for name in ("model", "ema"):
        assert equal_files(checkpoint / f"{name}.safetensors", parts / f"checkpoint-4/{name}.safetensors")
    own, average = load_file(checkpoint / "model.safetensors"), load_file(checkpoint / "ema.safetensors")
    assert own.keys() == average.keys() and not any(torch.equal(own[key], average[key]) for key in own)
    assert "ema.safetensors" in json.loads((checkpoint / "trainer_state.json").read_text())["files"]

    def converted(folder):
        return load_file(folder / "unet_main" / WEIGHTS)

    assert all(torch.equal(value, average[f"unet_main.{key}"]) for key, value in converted(whole).items())
    assert marker_of(whole)["ema_decay"] == 0.9
    card = (whole / "README.md").read_text()
    assert "Weights: EMA of decay 0.9." in card and "## Scores at step 4" in card
    convert(1, whole, tmp_path / "own", no_ema=True)
    assert all(torch.equal(value, own[f"unet_main.{key}"]) for key, value in converted(tmp_path / "own").items())
    card = (tmp_path / "own/README.md").read_text()
    assert "ema_decay" not in marker_of(tmp_path / "own") and "without the EMA" in card and "## Scores" not in card
    convert(1, parts, tmp_path / "mean", average=2)
    earlier = load_file(parts / "checkpoint-2/ema.safetensors")
    for key, value in converted(tmp_path / "mean").items():
        both = (tensors[f"unet_main.{key}"].double() for tensors in (earlier, average))
        assert torch.equal(value, (sum(both) / 2).float()), key
    (checkpoint / "ema.safetensors").unlink()
    with pytest.raises(InputError, match=r"ema\.safetensors is missing"):
        convert(1, whole, tmp_path / "missing")


def test_what_is_validated_is_the_average(train, validation, tmp_path):
    """One that does not move has the loss of the start, and the best checkpoint is chosen by it."""
    settings = {**validation, "max_train_steps": 2, "learning_rate": 1e-2}
    train(1, output_dir=tmp_path / "plain", **settings)
    train(1, output_dir=tmp_path / "slow", ema_decay=0.99999999, **settings)
    losses = {}
    for name in ("plain", "slow"):
        rows = read_rows(tmp_path / name / "logs-finetune-stage1/held_out.csv")
        losses[name] = [float(row["held_out_loss"]) for row in rows]
    start = losses["plain"][0]
    assert losses["slow"] == pytest.approx([start] * 3, rel=1e-5)
    assert losses["plain"][1:] != pytest.approx([start] * 2, rel=1e-3)
    model = "checkpoint-2/model.safetensors"
    assert equal_files(tmp_path / "plain" / model, tmp_path / "slow" / model)


def test_an_average_that_comes_and_goes(train, tmp_path, capsys):
    """Stage 2, whose checkpoints have tables of positions too. One that comes later and hardly moves stays at the
    weights of the checkpoint that the run goes on from."""
    train(2, nframes=1, max_train_steps=1)
    train(2, nframes=1, max_train_steps=2, ema_decay=0.99999999, resume_from_checkpoint="latest")
    output = capsys.readouterr().out
    assert "EMA of decay 0.99999999, from the weights of" in output and "checkpoint-1, which has none" in output
    checkpoint = tmp_path / "run/checkpoint-2"
    average = load_file(checkpoint / "ema.safetensors")
    start = load_file(tmp_path / "run/checkpoint-1/model.safetensors")
    torch.testing.assert_close(average, start, rtol=0, atol=1e-6)
    train(2, nframes=1, max_train_steps=3, resume_from_checkpoint="latest")
    output = capsys.readouterr().out
    assert "changed since the checkpoint: ema_decay from 0.99999999 to None" in output and "EMA of" not in output
    assert not (tmp_path / "run/checkpoint-3/ema.safetensors").exists()


def test_fsdp_shards_no_average(monkeypatch):
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("common.distributed.gpu_is_used", lambda: True)
    settings = SimpleNamespace(use_8bit_adam=False, compile=False, cuda_graph=False, ema_decay=0.0)
    with pytest.raises(InputError, match="--ema_decay does not go with fsdp, which shards the weights: drop it"):
        check_distributed(settings)


def test_what_an_average_takes(monkeypatch, flags):
    """Four bytes more of every parameter that trains, in memory and in a checkpoint."""
    monkeypatch.setattr(libs.training.checks, "count_parameters", lambda stage, opened: (10**8, 0))
    args = parse_args(Stage1, flags(1))
    opened = Stage1.open_models(args)

    def found():
        memory, disk = (check(args, Stage1, opened) for check in (check_memory, check_disk_space))
        return [float(re.search(rf"([\d.]+) {unit}", words)[1]) for unit, words in (("GiB", memory), ("GB$", disk))]

    monkeypatch.setattr(libs.training.checks, "gpu_is_used", lambda: False)
    gib, gb = found()
    args.ema_decay = 0.999
    assert found() == [pytest.approx(gib + 0.4, abs=0.11), pytest.approx(gb + 0.4)]
