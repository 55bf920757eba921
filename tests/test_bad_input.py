"""Wrong inputs through the real entry point: status 1, one line that says what, where and what to change."""

import importlib
import json
import re
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import BF16, error_line, reset_accelerate
from PIL import Image
from safetensors.torch import load_file, save_file

BRANCH = "diffuEraser/brushnet/diffusion_pytorch_model.safetensors"
TOKENIZER, TEXT_ENCODER = "stable-diffusion-v1-5/tokenizer", "stable-diffusion-v1-5/text_encoder"
VAE = "sd-vae-ft-mse/diffusion_pytorch_model.safetensors"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5\n"
SCHEDULER = "stable-diffusion-v1-5/scheduler/scheduler_config.json"
STAGES = {1: "train_DiffuEraser_stage1", 2: "train_DiffuEraser_stage2"}


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path):
    """Without its last bytes, as an interrupted download leaves it."""
    path.write_bytes(path.read_bytes()[:-100])


def text_encoder_as_bin(ctx):
    """The older form of the same weights, cut short."""
    folder = ctx.weights / TEXT_ENCODER
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    cut(folder / "pytorch_model.bin")


def empty_davis(ctx):
    lists = ctx.videos / "DAVIS/ImageSets/2017"
    (lists / "train.txt").write_text("")


def absent_videos(ctx):
    (ctx.videos / "DAVIS/ImageSets/2017/train.txt").write_text("kites\nunicorn\npegasus\n")


def other_model_size(ctx):
    edit_json(ctx.weights / "diffuEraser/brushnet/config.json", cross_attention_dim=48)


class Context:
    """The weights and videos, as copies where a case damages them."""

    def __init__(self, weights, videos, folder, damage):
        self.weights, self.videos, self.run, self.folder = weights, videos, folder / "run", folder
        folder.mkdir()
        if damage:
            self.weights = shutil.copytree(weights, folder / "weights")
            self.videos = shutil.copytree(videos, folder / "videos")
            damage(self)


def change_weights(file, change):
    save_file({key: change(tensor) for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


# name: (stage, damage or None, overrides as a function of the context, what the line must say)
CASES = {
    "resolution": (1, None, {"resolution": 100}, "--resolution=100: a multiple of 8 was needed; use 96"),
    "resolution_zero": (1, None, {"resolution": 0}, "--resolution=0: a multiple of 8 was needed; use 8"),
    "resolution_height": (
        1, None, {"resolution": "512x290"}, "--resolution=512x290: a multiple of 8 was needed; use 512x288"),
    "resolution_half": (1, None, {"resolution": "512x"}, "a number such as 512, or 512x288, was needed, not '512x'"),
    "resolution_of_three": (
        2, None, {"resolution": "512x288x3"}, "a number such as 512, or 512x288, was needed, not '512x288x3'"),
    "stride_zero": (1, None, {"frame_stride": 0}, "--frame_stride=0: at least 1 was needed"),
    "stride_too_large": (
        1, None, {"frame_stride": 13},
        "fewer than 27 frames, which 3 take at --frame_stride=13 .the longest video has 26.; lower --nframes or"),
    "nframes_zero": (1, None, {"nframes": 0}, "--nframes=0: at least 1"),
    "nframes_above_the_adapters": (2, None, {"nframes": 33}, "takes 32 frames at most; lower --nframes"),
    "nframes_longer_than_videos": (1, None, {"nframes": 27}, "the longest video has 26"),
    "unknown_flag": (1, None, {"frames": 3}, "unrecognized arguments: --frames=3; was --nframes meant.* --help"),
    "no_number": (1, None, {"learning_rate": "fast"}, "--learning_rate: invalid float value: 'fast'"),
    "removed_flag": (1, None, {"csv_file": "a.csv"}, "--csv_file is gone: .*--davis_root"),
    "removed_switch": (2, None, {"enable_xformers_memory_efficient_attention": True}, "is gone: torch's own"),
    "abbreviation": (1, None, {"resol": 64}, "unrecognized arguments: --resol=64"),
    "negative_rate": (1, None, {"learning_rate": -1}, "--learning_rate=-1.0: a positive number"),
    "share_of_prompts": (1, None, {"proportion_empty_prompts": 2}, "a share between 0 and 1"),
    "mask_span": (1, None, {"mask_span": "1,0.5"}, "0 < smallest <= largest <= 1"),
    "limit_zero": (1, None, {"checkpoints_total_limit": 0}, "--checkpoints_total_limit=0: at least 1"),
    "no_list": (1, None, {"validation_image": "buoy"}, "a Python list such as"),
    "unequal_lists": (
        1, None, lambda c: {"validation_image": [str(c.videos / "DAVIS/JPEGImages/480p/buoy")]},
        "--validation_image has 1, --validation_mask has 0"),
    "validation_folder": (
        1, None, {"validation_image": ["/no/frames"], "validation_mask": ["/no/masks"]}, "/no/frames is no folder"),
    "mask_missing": (
        1, lambda c: (c.videos / "DAVIS/Annotations/480p/buoy/00003.png").unlink(),
        lambda c: {"validation_image": [str(c.videos / "DAVIS/JPEGImages/480p/buoy")],
                   "validation_mask": [str(c.videos / "DAVIS/Annotations/480p/buoy")]},
        "no mask for 1 of the 26 frames .* such as 00003.jpg"),
    "davis_missing": (1, None, {"davis_root": "/no/DAVIS"}, "/no/DAVIS/JPEGImages/480p is no folder.*--davis_root"),
    "ytvos_missing": (1, None, {"ytvos_root": "/no/YTBV"}, "/no/YTBV/JPEGImages is no folder.*--ytvos_root"),
    "ytvos_empty": (
        1, lambda c: [shutil.rmtree(p) for p in (c.videos / "YTBV/JPEGImages").iterdir()], {},
        "holds no folder of frames"),
    "no_dataset": (1, None, {"davis_root": "", "ytvos_root": ""}, "no dataset was given"),
    "train_list_missing": (
        1, lambda c: (c.videos / "DAVIS/ImageSets/2017/train.txt").unlink(), {}, "train.txt is missing"),
    "train_list_empty": (1, empty_davis, {}, "names no video"),
    "train_list_absent": (1, absent_videos, {}, "names unicorn and 1 more, which .* lacks"),
    "stage1_not_converted": (
        2, lambda c: (c.folder / "checkpoint-2").mkdir(), lambda c: {"pretrained_stage1": c.folder / "checkpoint-2"},
        "checkpoint-2 is a checkpoint: convert it first, by save_checkpoint_stage1.py"),
    "motion_adapter_one_folder_up": (
        2, None, lambda c: {"motion_adapter_path": c.weights / "diffuEraser"},
        "a MotionAdapter's config and weights was needed; unet_main/ in it may be what is meant"),
    "resume_from_a_run": (
        1, lambda c: (c.folder / "run/checkpoint-2").mkdir(parents=True),
        lambda c: {"resume_from_checkpoint": c.folder / "run"},
        "run has no trainer_state.json: it is no complete checkpoint; choose one in it, such as checkpoint-2"),
    "base_missing": (1, None, {"base_model_name_or_path": "/no/base"}, "/no/base/tokenizer is not a folder"),
    "vae_missing": (1, None, {"vae_path": "/no/vae"}, "/no/vae is not a folder"),
    "vae_without_weights": (
        1, lambda c: (c.weights / "sd-vae-ft-mse/diffusion_pytorch_model.safetensors").unlink(), {},
        "sd-vae-ft-mse has no diffusion_pytorch_model.safetensors"),
    "text_encoder_without_weights": (
        1, lambda c: (c.weights / "stable-diffusion-v1-5/text_encoder/model.safetensors").unlink(), {},
        "text_encoder has no model"),
    "tokenizer_without_vocabulary": (
        1, lambda c: (c.weights / "stable-diffusion-v1-5/tokenizer/vocab.json").unlink(), {},
        "tokenizer has no vocab.json"),
    "tokenizer_without_merges": (
        1, lambda c: (c.weights / TOKENIZER / "merges.txt").unlink(), {}, "tokenizer has no merges.txt"),
    "tokenizer_merges_lfs_pointer": (
        1, lambda c: (c.weights / TOKENIZER / "merges.txt").write_text(LFS_POINTER), {}, "merges.txt is a Git LFS"),
    "tokenizer_vocabulary_broken": (
        1, lambda c: (c.weights / TOKENIZER / "vocab.json").write_text(LFS_POINTER), {}, "vocab.json is not JSON"),
    "tokenizer_map_broken": (
        1, lambda c: (c.weights / TOKENIZER / "special_tokens_map.json").write_text("{"), {}, "map.json is not JSON"),
    "vocabulary_of_another_tokenizer": (
        1, lambda c: (c.weights / TOKENIZER / "vocab.json").write_text("{}"), {}, "tokenizer is of no use"),
    "tokenizer_without_config": (
        1, lambda c: (c.weights / TOKENIZER / "tokenizer_config.json").unlink(), {}, "has no tokenizer_config.json"),
    "vae_cut_short": (1, lambda c: cut(c.weights / VAE), {}, "sd-vae-ft-mse/.* is no complete safetensors file"),
    "vae_lfs_pointer": (
        1, lambda c: (c.weights / VAE).write_text(LFS_POINTER), {}, "sd-vae-ft-mse/.* is no complete safetensors file"),
    "text_encoder_cut_short": (
        1, lambda c: cut(c.weights / TEXT_ENCODER / "model.safetensors"), {}, "model.safetensors is no complete"),
    "text_encoder_bin_cut_short": (1, text_encoder_as_bin, {}, "pytorch_model.bin is no complete file of tensors"),
    "text_encoder_config_broken": (
        1, lambda c: (c.weights / TEXT_ENCODER / "config.json").write_text("{"), {}, "config.json is not JSON"),
    "text_encoder_config_of_no_model": (
        1, lambda c: (c.weights / TEXT_ENCODER / "config.json").write_text("{}"), {}, "config.json has no hidden_size"),
    "scheduler_of_no_use": (
        1, lambda c: edit_json(c.weights / SCHEDULER, beta_start="x"), {}, "scheduler is of no use"),
    "scheduler_broken": (1, lambda c: (c.weights / SCHEDULER).write_text("{"), {}, "scheduler_config.json is not JSON"),
    "scheduler_no_object": (1, lambda c: (c.weights / SCHEDULER).write_text("[]"), {}, "is a JSON list, not an object"),
    "scheduler_missing": (1, lambda c: (c.weights / SCHEDULER).unlink(), {}, "scheduler_config.json cannot be read"),
    "prediction_type": (
        1, lambda c: edit_json(c.weights / SCHEDULER, prediction_type="sample"), {},
        "prediction_type 'sample': epsilon or v_prediction"),
    "stage1_weights_missing": (
        1, None, {"pretrained_stage1_path": "/no/weights"}, "/no/weights/unet_main is not a folder"),
    "two_brushnets": (
        1, None, {"brushnet_model_name_or_path": "elsewhere"},
        "--brushnet_model_name_or_path=elsewhere: BrushNet is also in --pretrained_stage1_path=.*: leave one of both"),
    "falling_below_the_rate": (
        1, None, {"lr_scheduler": "polynomial", "learning_rate": 1e-7},
        "--learning_rate=1e-07: more than 1e-07 was needed, where --lr_scheduler=polynomial ends"),
    "nothing_to_fall": (
        1, None, {"lr_scheduler": "polynomial", "lr_warmup_steps": 2, "max_train_steps": 2},
        "--lr_warmup_steps=2 are all of --max_train_steps: use another number"),
    "rising_to_infinity": (1, None, {"lr_power": -1}, "--lr_power=-1.0: 0 or more was needed"),
    "wrong_class": (
        1, None, lambda c: {"pretrained_stage1_path": None,
                            "brushnet_model_name_or_path": c.weights / "diffuEraser/unet_main"},
        "holds a UNetMotionModel: a BrushNetModel was needed"),
    "wrong_shape": (1, other_model_size, {}, "has shape .*config.json and weights do not belong together"),
    "adapter_of_another_class": (
        2, None, lambda c: {"motion_adapter_path": c.weights / "diffuEraser/brushnet"},
        "holds a BrushNetModel: a MotionAdapter or UNetMotionModel was needed"),
    "broken_config": (
        1, lambda c: (c.weights / "diffuEraser/brushnet/config.json").write_text("{"), {}, "is not JSON"),
    "config_of_no_model": (
        1, lambda c: edit_json(c.weights / "diffuEraser/brushnet/config.json", norm_num_groups=7), {},
        "brushnet/config.json is of no use .num_channels .32. must be divisible"),
    "fp16_only": (
        2, lambda c: (c.weights / BRANCH).rename((c.weights / BRANCH).with_suffix(".fp16.safetensors")),
        lambda c: {"pretrained_stage1": c.weights / "diffuEraser"},
        "it has diffusion_pytorch_model.fp16.safetensors: add --variant=fp16"),
    "weights_cut_short": (
        1, lambda c: (c.weights / "diffuEraser/brushnet/diffusion_pytorch_model.safetensors").write_bytes(b"123"), {},
        "is no complete safetensors file"),
    "weights_not_finite": (
        1, lambda c: change_weights(c.weights / BRANCH, lambda tensor: tensor * float("nan")), {},
        "brushnet holds values that are not finite in .*: fetch or convert it again"),
    "weights_quantised": (
        1, lambda c: change_weights(c.weights / BRANCH, lambda tensor: tensor.char()), {},
        "brushnet holds torch.int8 in .*: fetch or convert it again"),
    "output_is_source_weights": (
        1, lambda c: shutil.copytree(c.weights / "diffuEraser", c.weights / "copy"),
        lambda c: {"output_dir": c.weights / "copy"}, "holds weights that no converter wrote"),
    "output_is_where_stage1_starts": (
        1, None, lambda c: {"output_dir": c.weights / "diffuEraser"}, "is also read from: choose another --output_dir"),
    "output_holds_the_motion_modules": (
        2, lambda c: shutil.copytree(c.weights / "diffuEraser", c.weights / "copy"),
        lambda c: {"output_dir": c.weights / "diffuEraser", "pretrained_stage1": c.weights / "copy",
                   "motion_adapter_path": c.weights / "diffuEraser/unet_main"},
        "is also read from: choose another --output_dir"),
    "output_has_a_foreign_config": (
        1, lambda c: (c.run.mkdir(), (c.run / "config.json").write_text("{}")), {},
        "run/config.json is no training run's: choose another --output_dir"),
    "output_has_a_foreign_csv": (
        1, lambda c: ((c.run / "logs").mkdir(parents=True), (c.run / "logs/history.csv").write_text("mine")),
        {"logging_dir": "logs"}, "run/logs/history.csv is no training run's: choose another --output_dir"),
    "output_has_a_foreign_scan": (
        1, lambda c: (c.run.mkdir(), (c.run / "scan.json").write_text("[]")), {"scan_data": True},
        "run/scan.json is no earlier scan's"),
    "output_is_the_data": (
        1, lambda c: None, lambda c: {"output_dir": c.videos / "DAVIS"},
        "DAVIS is also read from: choose another --output_dir than a folder of --davis_root"),
    "output_is_among_the_videos": (
        1, lambda c: None, lambda c: {"output_dir": c.videos / "YTBV/JPEGImages/run"},
        "JPEGImages/run is also read from: choose another --output_dir than a folder of --ytvos_root"),
    "output_is_a_validation_video": (
        1, lambda c: shutil.copytree(c.videos / "DAVIS/JPEGImages/480p/buoy", c.run),
        lambda c: {"validation_image": [str(c.run)],
                   "validation_mask": [str(c.videos / "DAVIS/Annotations/480p/buoy")]},
        "run is also read from: .* than a folder of --validation_image"),
    "output_is_the_base_model": (
        2, lambda c: None, lambda c: {"output_dir": c.weights / "stable-diffusion-v1-5"},
        "is also read from: choose another --output_dir than a folder of --base_model_name_or_path"),
    "output_is_no_utf8": (1, None, lambda c: {"output_dir": f"{c.run}\udce9"}, "run.* is no UTF-8, as names of"),
    "output_is_a_file": (
        1, lambda c: c.run.write_text(""), {}, "--output_dir .*run cannot be written to"),
    "output_is_read_only": (1, None, {"output_dir": "/proc/run"}, "--output_dir /proc/run cannot be written to"),
    "tracker": (1, None, {"report_to": "abacus"}, "--report_to=abacus: one of"),
    "tracker_not_installed": (1, None, {"report_to": "wandb"}, "--report_to=wandb: its package is not installed"),
    "fp16_without_gpu": (1, None, {"mixed_precision": "fp16"}, "fp16 needs a GPU"),
    "compile_without_gpu": (1, None, {"compile": True}, "--compile needs a GPU, which was not found"),
    "bf16_weights_of_fp32_adamw": (1, None, {"bf16_weights": True, "mixed_precision": "bf16"},
                                   "--bf16_weights needs --use_8bit_adam \\(LOW_MEMORY=2 sets both"),
    "bf16_weights_in_fp32": (1, None, {**BF16, "mixed_precision": "no"},
                             "--bf16_weights needs --mixed_precision=bf16, not no"),
    "bf16_weights_averaged": (1, None, {**BF16, "ema_decay": 0.99}, "--ema_decay does not go with --bf16_weights"),
    "known_frame_alone": (1, None, {"known_frames": 0.5, "nframes": 1}, "--known_frames=0.5: of --nframes=1 none"),
    "cuda_graph_without_gpu": (1, None, {"cuda_graph": True}, "--cuda_graph needs a GPU, and none was found"),
    "latent_cache_is_a_file": (
        1, lambda c: (c.folder / "cache").write_text(""), lambda c: {"latent_cache": c.folder / "cache"},
        "--latent_cache .*cache cannot be written to"),
    "latent_cache_size": (1, None, {"latent_cache_gb": 0}, "--latent_cache_gb=0.0: a positive number"),
    "checkpoint_missing": (1, None, {"resume_from_checkpoint": "checkpoint-7"}, "checkpoint-7 is no folder"),
    "checkpoint_empty": (
        1, lambda c: (c.run / "checkpoint-7").mkdir(parents=True), {"resume_from_checkpoint": "checkpoint-7"},
        "checkpoint-7 has no trainer_state.json"),
    "image_broken": (
        1, lambda c: [p.write_bytes(b"version https://git-lfs") for p in (c.videos / "DAVIS").rglob("*.jpg")],
        {"ytvos_root": ""}, "20 broken videos in a row, the last of them .*Git LFS pointer"),
    "mask_of_another_size": (
        1, lambda c: Image.new("L", (8, 8)).save(c.videos / "DAVIS/Annotations/480p/buoy/00000.png"),
        lambda c: {"validation_image": [str(c.videos / "DAVIS/JPEGImages/480p/buoy")],
                   "validation_mask": [str(c.videos / "DAVIS/Annotations/480p/buoy")], "validation_steps": 1},
        "is 8x8, its frame .* 160x96"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, weights, videos, flags, tmp_path, capsys):
    stage, damage, overrides, message = CASES[name]
    ctx = Context(weights, videos, tmp_path / "copy", damage)
    settings = {
        "base_model_name_or_path": ctx.weights / "stable-diffusion-v1-5",
        "vae_path": ctx.weights / "sd-vae-ft-mse",
        "davis_root": ctx.videos / "DAVIS",
        "ytvos_root": ctx.videos / "YTBV",
        "output_dir": ctx.run,
    }
    if stage == 1:
        settings["pretrained_stage1_path"] = ctx.weights / "diffuEraser"
    settings.update(overrides(ctx) if callable(overrides) else overrides)
    reset_accelerate()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(STAGES[stage]).main(flags(stage, **settings))
    reset_accelerate()
    captured = capsys.readouterr()
    assert stop.value.code == 1
    assert captured.err.count("\n") == 1, captured.err
    assert re.search(f"^error: .*{message}", captured.err), captured.err


@pytest.mark.parametrize("settings", [{"mixed_precision": "fp16"}, {"compile": True}, {"cuda_graph": True}])
def test_a_gpu_that_the_configuration_leaves_alone(train, monkeypatch, capsys, settings):
    """use_cpu in accelerate's configuration: a captured graph would be empty, and replay nothing."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(SystemExit):
        train(1, **settings)
    assert "needs a GPU" in capsys.readouterr().err


def test_an_engine_that_accumulates_otherwise(train, monkeypatch, capsys):
    """A DeepSpeed configuration's entry reaches accelerate through this variable, before the flag."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(SystemExit):
        train(1, gradient_accumulation_steps=2)
    assert "gradient_accumulation_steps: 4, the run --gradient_accumulation_steps=2" in capsys.readouterr().err


def test_a_tracker_that_does_not_start(train, tmp_path, capsys, monkeypatch):
    """For want of a folder, or for a reason that only its own library has a class for, as those of MLflow and W&B."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/logs-finetune-stage1").write_text("a file where the tracker wants a folder")
    error = error_line(capsys, train, 1, report_to="tensorboard")
    assert error.startswith("error: --report_to=tensorboard did not start (")
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", mock.Mock(side_effect=Exception("no")))
    assert "did not start (no): log in" in error_line(capsys, train, 1, report_to="tensorboard")


@pytest.mark.parametrize("name", [name for name in CASES if re.match("vae|text_encoder|tokenizer|scheduler", name)])
def test_frozen_models_are_checked_before_any_loads(name, weights, flags, tmp_path, capsys):
    """--check_only, which loads nothing, finds them too."""
    stage, damage, overrides, message = CASES[name]
    ctx = SimpleNamespace(weights=tmp_path / "copy")
    shutil.copytree(weights, ctx.weights, ignore=shutil.ignore_patterns("unet", "diffuEraser", "animatediff*"))
    if damage:
        damage(ctx)
    base, vae = ctx.weights / "stable-diffusion-v1-5", ctx.weights / "sd-vae-ft-mse"
    settings = {"base_model_name_or_path": base, "vae_path": vae, **overrides, "check_only": True}
    reset_accelerate()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(STAGES[stage]).main(flags(stage, **settings))
    reset_accelerate()
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert stop.value.code == 1 and len(failed) == 1 and re.search(f"^frozen models +FAILED +.*{message}", failed[0])
