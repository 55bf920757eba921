"""What toy/learn.sh does: a VAE and stage 1 from scratch."""

import json
import os
import re
import shutil
import subprocess
from functools import partial

import pytest
from conftest import REPOSITORY, error_line
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from common.errors import InputError
from libs.training.config import shell_variables
from toy import make_videos, make_weights, train_vae
from toy.join_videos import join_videos
from toy.make_videos import DAVIS_TRAIN, DAVIS_VAL

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_learning_from_scratch(train, videos, tmp_path, capsys):
    """The VAE learns, and its latents' scale is noted; stage 1 starts from the base model's UNet."""
    weights = tmp_path / "weights"
    make_weights.make_weights(weights)
    train_vae.main([f"--weights={weights}", f"--davis_root={videos / 'DAVIS'}", f"--ytvos_root={videos / 'YTBV'}",
                    "--resolution=32", "--steps=20", "--batch_size=4"])  # fmt: skip
    output = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"vae step \d+/20  loss ([\d.]+)", output)]
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0]
    assert re.search(r"sd-vae-ft-mse: \d+\.\d\d dB on 26 frames of held-out videos, scaling factor [\d.]+", output)
    config = json.loads((weights / "sd-vae-ft-mse/config.json").read_text())
    assert config["scaling_factor"] == AutoencoderKL.from_pretrained(weights / "sd-vae-ft-mse").config.scaling_factor
    assert f"scaling factor {config['scaling_factor']}" in output

    base = weights / "stable-diffusion-v1-5"
    train(1, base_model_name_or_path=base, vae_path=weights / "sd-vae-ft-mse", pretrained_stage1_path="")
    output = capsys.readouterr().out
    assert f"unet_main: UNet2DConditionModel from a UNet2DConditionModel in {base / 'unet'}" in output
    assert "brushnet: a copy of the UNet with a zero-initialised output" in output
    assert re.findall(r"step (\d)/2  loss \d", output) == ["1", "2"]
    trained, start = load_file(tmp_path / "run/unet_main" / WEIGHTS), load_file(base / "unet" / WEIGHTS)
    assert trained.keys() == start.keys() and sum(trained[key].equal(start[key]) for key in start) < 0.01 * len(start)


def test_nothing_of_the_users_is_replaced(videos, published_layout, tmp_path, capsys):
    """What these tools have made, also if they were stopped on the way, is made again."""
    davis, base = tmp_path / "dataset/DAVIS", tmp_path / "weights/stable-diffusion-v1-5"
    for name, text in (("train.txt", "bear\n"), ("val.txt", "goat\n")):
        (davis / "ImageSets/2017").mkdir(parents=True, exist_ok=True)
        (davis / "ImageSets/2017" / name).write_text(text)
    (tmp_path / "other/YTBV/JPEGImages").mkdir(parents=True)
    for folder in ("tokenizer", "../diffuEraser/unet_main", "../sd-vae-ft-mse"):
        (base / folder).mkdir(parents=True)
    (base / "tokenizer/merges.txt").write_text("#version: 0.2\ni n\n")
    (base / "../sd-vae-ft-mse/config.json").write_text("{}")
    before = files(tmp_path)
    refused = [
        (make_videos, "--output_dir", "dataset", "dataset/DAVIS was not drawn here, or not to its end: "),
        (make_videos, "--output_dir", "other", "other/YTBV was not drawn here, or not to its end: "),
        (make_weights, "--output_dir", "weights", "stable-diffusion-v1-5 was not made by this tool: another --output"),
        (train_vae, "--weights", "weights", "sd-vae-ft-mse would be replaced"),
    ]
    for tool, flag, folder, message in refused:
        assert message in error_line(capsys, tool.main, [f"{flag}={tmp_path / folder}"])
    assert files(tmp_path) == before

    made = ((make_videos, videos, "YTBV"), (make_weights, published_layout, "diffuEraser/brushnet"))
    for tool, source, last in made:
        shutil.copytree(source, tmp_path / "own")
        shutil.rmtree(tmp_path / "own" / last)
        tool.main([f"--output_dir={tmp_path / 'own'}"])
        assert files(tmp_path / "own") == files(source)
        shutil.rmtree(tmp_path / "own")


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_learning_is_not_changed_by_what_is_set_for_other_runs(tmp_path):
    """Its own variables count, and nothing is done beside an earlier run."""
    python, seen = tmp_path / "python", tmp_path / "seen"
    python.write_text(f'#!/bin/sh\ncase "$*" in *launch.launch*) env >> {seen}; esac\n')
    python.chmod(0o755)
    taken = {"RESOLUTION": "48", "LEARNING_RATE": "0.5", "DAVIS_ROOT": "davis", "YTVOS_ROOT": "ytvos"}
    others = dict.fromkeys(shell_variables() - taken.keys() - {"OMP_NUM_THREADS"}, "of another run")
    environment = {**os.environ, **others, **taken, "PYTHON": str(python), "RUN": str(tmp_path / "run")}
    learn = partial(subprocess.run, ["bash", "toy/learn.sh"], cwd=REPOSITORY, env=environment, capture_output=True)
    assert learn().returncode == 0
    lines = seen.read_text().splitlines()
    assert not any("of another run" in line for line in lines) and lines.count("RESOLUTION=48") == 3
    assert [line for line in lines if line.startswith("LEARNING_RATE=")][1:] == ["LEARNING_RATE=0.5"] * 2

    seen.unlink()
    (tmp_path / "run/start").mkdir(parents=True)
    again = learn(text=True)
    assert again.returncode == 1 and not again.stdout and not seen.exists()
    assert again.stderr == f"error: {tmp_path / 'run'} holds an earlier run: remove it, or set RUN to another folder\n"


def test_datasets_are_joined_by_links(videos, tmp_path):
    """Twice, which changes nothing; a second video of a name is refused, as it would be lost."""
    real = tmp_path / "real"
    for folder in ("JPEGImages/480p/bear", "Annotations/480p/bear", "ImageSets/2017"):
        (real / folder).mkdir(parents=True)
    (real / "ImageSets/2017/train.txt").write_text("bear")
    (real / "ImageSets/2017/val.txt").write_text("")
    for _ in range(2):
        join_videos(tmp_path / "joined", [real, videos / "DAVIS"], [videos / "YTBV"])
    davis = tmp_path / "joined/DAVIS"
    assert (davis / "ImageSets/2017/train.txt").read_text().split() == ["bear", *DAVIS_TRAIN]
    assert (davis / "ImageSets/2017/val.txt").read_text().split() == list(DAVIS_VAL)
    assert {path.name for path in (davis / "Annotations/480p").iterdir()} == {"bear", *DAVIS_TRAIN, *DAVIS_VAL}
    assert (davis / "JPEGImages/480p/bear").resolve() == (real / "JPEGImages/480p/bear").resolve()
    assert len(list((tmp_path / "joined/YTBV/Annotations").iterdir())) == 4
    (real / "JPEGImages/480p/kites").mkdir()
    with pytest.raises(InputError, match=r"kites is .*, not .*/DAVIS/JPEGImages/480p/kites"):
        join_videos(tmp_path / "again", [real, videos / "DAVIS"], [videos / "YTBV"])
