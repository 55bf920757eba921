"""Converters: bits, classes, configs, refusals, and checkpoints of the original scripts."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import assert_holds, equal_files
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import libs.checkpoints.convert
from common.errors import InputError
from libs.base_model import BaseModel
from libs.brushnet_CA import BrushNetModel
from libs.checkpoints.convert import convert, main, read_prompt
from libs.checkpoints.model_card import write_model_card
from libs.inference.load import choose_prompt
from libs.inpainter import FrameInpainter
from libs.unet_2d_condition import UNet2DConditionModel
from libs.unet_motion_model import UNetMotionModel

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_both_stages(train, tmp_path, weights):
    """Stage 1 trains all, stage 2 only motion modules; the folders load strictly and hold the checkpoint's bits."""
    train(1, output_dir=tmp_path / "s1")
    convert(1, tmp_path / "s1", tmp_path / "c1")
    assert sorted(path.name for path in (tmp_path / "c1").iterdir()) == ["README.md", "brushnet", "unet_main"]
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "c1" / "unet_main")
    start = UNet2DConditionModel.open_2d_part(weights / "diffuEraser" / "unet_main").load()
    changed = [not torch.equal(a, b) for a, b in zip(unet.parameters(), start.parameters(), strict=True)]
    assert sum(changed) > 0.99 * len(changed)

    train(2, output_dir=tmp_path / "s2", pretrained_stage1=tmp_path / "c1")
    convert(2, tmp_path / "s2" / "checkpoint-2", tmp_path / "c2", tmp_path / "c1", export_motion_adapter=True)
    motion = UNetMotionModel.from_pretrained(tmp_path / "c2", subfolder="unet_main")
    before = UNetMotionModel.from_pretrained(weights / "diffuEraser" / "unet_main").state_dict()
    after = motion.state_dict()
    assert_holds(unet, {key: value for key, value in after.items() if "motion_modules" not in key})
    for key, value in after.items():
        if "motion_modules" in key:
            assert torch.equal(value, before[key]) == key.endswith("pos_embed.pe"), key
    with pytest.raises(InputError, match="c1 is also read from"):  # stage 1 would be gone, which other runs start from
        convert(2, tmp_path / "s2", tmp_path / "c1", tmp_path / "c1")
    adapter = diffusers.MotionAdapter.from_pretrained(tmp_path / "c2/motion_adapter").state_dict()
    modules = {key: value for key, value in motion.state_dict().items() if "motion_modules" in key}
    assert adapter.keys() == modules.keys() and all(torch.equal(adapter[key], modules[key]) for key in adapter)
    assert equal_files(tmp_path / "c1" / "brushnet" / WEIGHTS, tmp_path / "c2" / "brushnet" / WEIGHTS)
    for name in ("unet_main", "brushnet"):  # the end of a run writes the same two folders
        assert equal_files(tmp_path / "c2" / name / WEIGHTS, tmp_path / "s2" / name / WEIGHTS)
    config = json.loads((tmp_path / "c2/unet_main/config.json").read_text())
    assert config["_class_name"] == "UNetMotionModel" and "time_cond_proj_dim" in config  # the original reads it
    assert (tmp_path / "c2/unet_main" / WEIGHTS).stat().st_mode & 0o044 == 0o044  # others may read them


def test_model_card(train, videos, tmp_path, monkeypatch):
    """Valid for the Hub's own tools, with settings and the scores of its step; a user's own text is kept."""
    monkeypatch.setattr(FrameInpainter, "inference_steps", 2)
    train(
        1,
        max_train_steps=1,
        validation_steps=1,
        probe_clips=2,
        validation_image=[str(videos / "DAVIS/JPEGImages/480p/buoy")],
        validation_mask=[str(videos / "DAVIS/Annotations/480p/buoy")],
    )
    convert(1, tmp_path / "run", tmp_path / "c1")
    card = ModelCard.load(tmp_path / "c1" / "README.md")
    assert card.data.library_name == "diffusers" and "video-inpainting" in card.data.tags
    assert "stage 1, step 1" in card.text and "- data: DAVIS, YTBV" in card.text and "- seed: 42" in card.text
    assert "held-out loss: " in card.text and "PSNR hole " in card.text
    assert str(tmp_path) not in card.text and str(videos) not in card.text
    scores = tmp_path / "run/logs-finetune-stage1/scores.csv"  # as of a run that was killed and did step 1 again
    scores.write_text(scores.read_text() + scores.read_text().splitlines()[-1] + "\n")
    convert(1, tmp_path / "run", tmp_path / "c1")
    assert ModelCard.load(tmp_path / "c1" / "README.md").text == card.text and "- 1 held-out video(s)" in card.text
    (tmp_path / "c1" / "README.md").write_text("mine")
    convert(1, tmp_path / "run", tmp_path / "c1")
    assert (tmp_path / "c1" / "README.md").read_text() == "mine"


@pytest.mark.parametrize("content", ['{"_class_name": "UNetMotionModel"}', "[]", '["a", 1]', '[{"settings": {}}]', "{"])
def test_a_config_that_is_not_a_runs_is_passed_over(content, tmp_path):
    """The original scripts' output folders hold config.json files of other forms."""
    (tmp_path / "config.json").write_text(content)
    write_model_card(tmp_path, 2, "70", tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "(stage 2, step 70)" in text and "## Settings" not in text


def test_a_model_card_that_cannot_be_written(train, tmp_path, monkeypatch, capsys):
    """The disk is full after both models, or the run's files are not whole: one line, and the models stay."""
    train(1, max_train_steps=1)

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(libs.checkpoints.convert, "write_model_card", fail)
        convert(1, tmp_path / "run", tmp_path / "c1")
    lines = capsys.readouterr().out.splitlines()
    assert "README.md could not be written ([Errno 28] No space left on device); both models are whole" in lines[-1]
    (tmp_path / "run/logs-finetune-stage1/held_out.csv").write_text("step,held_out_loss\n1,low\n")
    convert(1, tmp_path / "run", tmp_path / "c1")
    assert "README.md could not be written" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "c1").iterdir()) == ["brushnet", "unet_main"]


def test_a_full_disk_between_the_models(train, tmp_path, monkeypatch):
    """One line, and the folder is not removed with the model that is there."""
    train(1, max_train_steps=1)
    replace = libs.checkpoints.convert.replace_folder

    def fail_second(partial, folder):
        if folder.name == "brushnet":
            raise OSError(28, "No space left on device")
        replace(partial, folder)

    monkeypatch.setattr(libs.checkpoints.convert, "replace_folder", fail_second)
    with pytest.raises(InputError, match=r"could not be written .*No space left on device.*: free some space"):
        convert(1, tmp_path / "run", tmp_path / "c1")
    assert [path.name for path in (tmp_path / "c1").iterdir()] == ["unet_main"]


def test_whoever_reads_the_output_has_ended(train, tmp_path, monkeypatch, capsys):
    """As `| head -1` does: that is no full disk, nothing is said, and neither model is there."""
    train(1, max_train_steps=1)
    assert not capsys.readouterr().err
    reader, writer = map(os.fdopen, os.pipe(), "rw")
    write_model = libs.checkpoints.convert.write_model

    def write_and_close(*args):
        assert reader.readline().startswith("converting ")
        reader.close()
        return write_model(*args)

    monkeypatch.setattr(libs.checkpoints.convert, "write_model", write_and_close)
    with writer, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", writer)
        with pytest.raises(SystemExit) as stop:
            main(1, [], input_dir=str(tmp_path / "run"), output_dir=str(tmp_path / "c1"), model_config=None)
    assert stop.value.code == 141 and not capsys.readouterr().err and not (tmp_path / "c1").exists()


@pytest.mark.parametrize(
    ("argument", "hint"), [("--input=x", ""), ("--input_dri=x", "was --input_dir meant? "), ("x", "")]
)
def test_a_mistyped_option_is_one_line(argument, hint, capsys):
    with pytest.raises(SystemExit) as stop:
        main(1, [argument], input_dir="run", output_dir="out", model_config=None)
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"error: unrecognized arguments: {argument}; {hint}--help lists the options\n"


@pytest.mark.parametrize("prefix", ["", "module."], ids=["one_process", "ddp"])
@pytest.mark.parametrize("stage", [1, 2])
def test_checkpoints_of_the_original_scripts(published_layout, tmp_path, stage, prefix, capsys):
    """Two whole models as model.safetensors and model_1.safetensors, without any config."""
    source = published_layout / "diffuEraser"
    unet = (
        UNet2DConditionModel.open_2d_part(source / "unet_main").load()
        if stage == 1
        else UNetMotionModel.from_pretrained(source, subfolder="unet_main")
    )
    brushnet = BrushNetModel.from_pretrained(source, subfolder="brushnet")
    checkpoint = tmp_path / "run" / "checkpoint-70"
    checkpoint.mkdir(parents=True)
    for model, name in ((unet, "model"), (brushnet, "model_1")):
        state_dict = {prefix + key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(state_dict, checkpoint / f"{name}.safetensors")
    unet.save_config(tmp_path / "run")  # as the original's end of a run leaves one

    main(stage, [f"--input_dir={tmp_path / 'run'}", f"--output_dir={tmp_path / 'out'}", f"--model_config={source}"],
         input_dir=None, output_dir=None, model_config=None)  # fmt: skip
    output = capsys.readouterr().out
    assert "step 70" in output and "README.md" not in output
    assert f"stage {stage}, step 70" in (tmp_path / "out" / "README.md").read_text()
    loaded = type(unet).from_pretrained(tmp_path / "out" / "unet_main")
    assert_holds(loaded, unet.state_dict())
    heads = "attention_head_dim" if stage == 1 else "num_attention_heads"
    assert loaded.config[heads] == unet.config[heads] == 4
    branch = BrushNetModel.from_pretrained(tmp_path / "out" / "brushnet")
    assert branch.config["attention_head_dim"] == 4
    assert_holds(branch, brushnet.state_dict())
    with pytest.raises(InputError, match=f"is a stage {stage} checkpoint: use save_checkpoint_stage{stage}"):
        convert(3 - stage, checkpoint, tmp_path / "wrong")
    for name in ("model.safetensors", "model_1.safetensors"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[:-100])
        with pytest.raises(InputError, match=f"{name} is no complete safetensors file"):
            convert(stage, checkpoint, tmp_path / "cut", model_config=source)
        (checkpoint / name).write_bytes(content)
    assert not (tmp_path / "wrong").exists() and not (tmp_path / "cut").exists()


def test_heads_and_groups_leave_no_trace_in_shapes(tmp_path):
    """They come from the first config of the original checkpoint's sizes, or are SD1.5's and AnimateDiff's."""
    unet = {
        "down_blocks.0.resnets.0.conv1.weight": torch.zeros(4, 4),
        "down_blocks.1.resnets.0.conv1.weight": torch.zeros(8, 4),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.zeros(4, 6),
        "down_blocks.0.motion_modules.0.pos_embed.pe": torch.zeros(1, 24, 4),
    }
    for name, tensors in (("model", unet), ("model_1", {"conv_in.bias": torch.zeros(4)})):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    sizes = {"block_out_channels": [4, 8], "cross_attention_dim": 6}
    heads = {"norm_num_groups": 2, "num_attention_heads": 3, "motion_num_attention_heads": 5}
    for name, config in (("own", sizes | heads), ("others", sizes | heads | {"cross_attention_dim": 7}),
                         ("stage1", sizes | {"norm_num_groups": 4, "attention_head_dim": 2})):  # fmt: skip
        (tmp_path / name / "unet_main").mkdir(parents=True)
        (tmp_path / name / "unet_main/config.json").write_text(json.dumps(config))

    def found(*folders):
        folders = [folder and tmp_path / folder for folder in folders]
        parts = libs.checkpoints.convert.original_parts(2, tmp_path, folders)
        unet, brushnet = (parts[name][1] for name in ("unet_main", "brushnet"))
        assert unet["motion_max_seq_length"] == 24 and sizes == {name: unet[name] for name in sizes} == {
            name: brushnet[name] for name in sizes
        }
        assert brushnet["attention_head_dim"] == unet["num_attention_heads"]
        return tuple(unet[name] for name in heads)

    assert found(None, None) == found("others") == (32, 8, 8)
    assert found(None, "own") == found("others", "own") == found("own", "stage1") == (2, 3, 5)
    assert found("stage1", None) == (4, 2, 2)


class OneLayer(torch.nn.Linear):
    """What writing a folder takes of a model."""

    @classmethod
    def on_meta(cls, config):
        return cls(2, 1, device="meta")

    def save_config(self, folder):
        Path(folder, "config.json").write_text("{}")


def test_folders_are_fp32_with_their_checksum(tmp_path):
    """Of weights in any type; a conversion that was killed is no obstacle."""
    tensors = {"weight": torch.rand(1, 2).bfloat16(), "bias": torch.rand(1).bfloat16()}
    (tmp_path / "out/conversion.partial/unet_main").mkdir(parents=True)
    parts = {"unet_main": (OneLayer, {}, tensors.items())}
    libs.checkpoints.convert.write_folders(parts, ["unet_main"], tmp_path / "out", {"step": 7})
    file = tmp_path / "out/unet_main" / WEIGHTS
    written = load_file(file)
    assert all(written[name].dtype == torch.float32 and torch.equal(written[name], tensors[name]) for name in tensors)
    marker = json.loads((tmp_path / "out/unet_main/conversion.json").read_text())
    assert marker == {"step": 7, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unet_main"]


@pytest.mark.parametrize("existing", [True, False])
def test_a_conversion_that_fails_leaves_the_output_folder(tmp_path, existing):
    """Where there was one; it has made none."""
    if existing:
        (tmp_path / "out").mkdir()
    parts = {"unet_main": (OneLayer, {}, [("weight", torch.zeros(1, 2))])}
    with pytest.raises(InputError, match="unet_main lacks bias"):
        libs.checkpoints.convert.write_folders(parts, ["unet_main"], tmp_path / "out", {})
    assert list(tmp_path.rglob("*")) == ([tmp_path / "out"] if existing else [])


def test_refusals_leave_everything_as_it_was(train, tmp_path, weights):
    train(1, output_dir=tmp_path / "s1", max_train_steps=1)
    checkpoint = tmp_path / "s1" / "checkpoint-1"
    sources = {path: path.read_bytes() for path in (weights / "diffuEraser").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="holds weights that no converter wrote"):
        convert(1, checkpoint, weights / "diffuEraser")
    assert all(path.read_bytes() == content for path, content in sources.items())
    with pytest.raises(InputError, match="is also read from"):
        convert(1, checkpoint, checkpoint)
    with pytest.raises(InputError, match="is a stage 1 checkpoint: use save_checkpoint_stage1"):
        convert(2, checkpoint, tmp_path / "out", pretrained_stage1=weights / "diffuEraser")
    with pytest.raises(InputError, match="is no folder"):
        convert(1, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(InputError, match="no complete checkpoint"):
        convert(1, tmp_path, tmp_path / "out")

    model = checkpoint / "model.safetensors"
    tensors = load_file(model)
    save_file({key: t for key, t in tensors.items() if key != "brushnet.conv_in_condition.bias"}, model)
    with pytest.raises(InputError, match=r"brushnet lacks conv_in_condition\.bias"):
        convert(1, checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nobodys_files_are_replaced(train, tmp_path, capsys):
    """In a converted folder, in its place, and as its model card."""
    train(1, output_dir=tmp_path / "s1", max_train_steps=1)
    out = tmp_path / "out"
    convert(1, tmp_path / "s1", out)
    (out / "README.md").write_bytes(b"\xe9")
    convert(1, tmp_path / "s1", out)
    assert "README.md is kept as it is" in capsys.readouterr().out
    (out / "brushnet/notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"brushnet holds notes\.txt, which no converter wrote: move it, or change"):
        convert(1, tmp_path / "s1", out)
    shutil.rmtree(out / "brushnet")
    (out / "brushnet").write_text("mine")
    with pytest.raises(InputError, match="brushnet is no folder, and no converter wrote it"):
        convert(1, tmp_path / "s1", out)
    assert (out / "brushnet").read_text() == "mine" and (out / "README.md").read_bytes() == b"\xe9"


def test_stage_2_wants_the_stage_1_it_was_trained_on(train, tmp_path, weights):
    """Of several files in one folder, that of the run's --variant."""
    other = tmp_path / "other"
    shutil.copytree(weights / "diffuEraser", other)
    for name in ("unet_main", "brushnet"):
        shutil.copy(other / name / WEIGHTS, other / name / WEIGHTS.replace(".", ".fp16.", 1))
    path = other / "brushnet" / WEIGHTS
    tensors = load_file(path)
    tensors["conv_in_condition.bias"] += 1
    save_file(tensors, path)
    train(2, output_dir=tmp_path / "s2", max_train_steps=1, pretrained_stage1=other, variant="fp16")
    with pytest.raises(InputError, match="is not what the checkpoint was trained on"):
        convert(2, tmp_path / "s2", tmp_path / "out", pretrained_stage1=other)
    convert(2, tmp_path / "s2", tmp_path / "out", pretrained_stage1=other, variant="fp16")
    assert equal_files(tmp_path / "out/brushnet" / WEIGHTS, weights / "diffuEraser/brushnet" / WEIGHTS)


def test_converting_twice_replaces_the_first(train, tmp_path):
    train(1, output_dir=tmp_path / "s1", checkpointing_steps=1)
    for step in (1, 2):
        convert(1, tmp_path / "s1" / f"checkpoint-{step}", tmp_path / "out")
        assert json.loads((tmp_path / "out/brushnet/conversion.json").read_text())["step"] == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "s1"]


def test_the_prompt_goes_from_training_to_inference(train, tmp_path, weights, monkeypatch):
    """It is what the text encoder reads, and what run and eval fill holes with unless they are told otherwise."""
    encode, read = BaseModel.encode_prompts, []

    def watch(base, prompts, device):
        read.append(prompts)
        return encode(base, prompts, device)

    monkeypatch.setattr(BaseModel, "encode_prompts", watch)
    train(1, max_train_steps=1, prompt="grass")
    assert read == [["grass", ""]]
    args = SimpleNamespace(prompt=None, as_deployed=False)
    assert choose_prompt(args, tmp_path / "run") == "grass"
    assert choose_prompt(args, weights / "diffuEraser") == "clean background"
    assert choose_prompt(SimpleNamespace(prompt="", as_deployed=False), tmp_path / "run") == ""
    assert choose_prompt(SimpleNamespace(prompt=None, as_deployed=True), tmp_path / "run") == ""
    convert(1, tmp_path / "run", tmp_path / "again")
    assert read_prompt(tmp_path / "again") == "grass"
