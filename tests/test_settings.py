"""The settings stand once: what follows from them (parser, page, variables, resuming) agrees with them."""

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY

from common.errors import InputError
from dataset.finetune_dataset import FinetuneDataset
from libs.checkpoints.checkpoint import TrainerState
from libs.checkpoints.resume import BATCH, BATCH_SETTINGS, LOGGED, describe_run, go_on_from
from libs.inpainter import INPAINTERS
from libs.training.checks import count_parameters
from libs.training.config import (
    CONFIGS,
    LAUNCHER_VARIABLES,
    build_parser,
    flags_from_environment,
    parse_args,
    resume_policy,
    settings_with,
    what_sets_clips,
)
from libs.training.settings_page import settings_page
from train_DiffuEraser_stage1 import Stage1
from train_DiffuEraser_stage2 import Stage2

STAGES = {1: Stage1, 2: Stage2}


def test_the_page_is_what_the_settings_say():
    """Otherwise: python -m libs.training.settings_page > docs/settings.md"""
    page = (REPOSITORY / "docs/settings.md").read_text()
    assert page == settings_page() + "\n"
    for config_class in CONFIGS.values():
        for field in fields(config_class):
            assert (f"| `--{field.name}` |" in page) == field.metadata["flag"]
    assert all(f"| `{name}` |" in page for name, _, _ in LAUNCHER_VARIABLES)


@pytest.mark.parametrize("stage", [1, 2])
def test_every_check_names_flag_and_value(stage):
    checked = [field.name for field in fields(CONFIGS[stage]) if field.metadata["check"]]
    assert len(checked) > 20
    for name in checked:
        with pytest.raises(InputError, match=rf"^--{name}=-1(\.0)?: .* needed"):
            parse_args(STAGES[stage], [f"--{name}=-1"])
    for flag, needed in (
        ("--seed=4294967296", "a number from 0 to 4294967295 was needed"),
        ("--adam_beta1=1", "a number from 0 to below 1 was needed"),
        ("--max_train_steps=0", "at least 1 was needed, or leave the flag out"),
        ("--resolution=1", "a multiple of 8 was needed; use 8"),
    ):
        with pytest.raises(InputError, match=needed):
            parse_args(STAGES[stage], [flag])


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("--max_train_step=5", "--max_train_steps"),
        ("--max-train-steps=5", "--max_train_steps"),
        ("MAX_TRAIN_STEPS=5", "--max_train_steps"),  # which belongs before the command
        ("--LR_scheduler", "--lr_scheduler"),
        ("--gpus", None),
    ],
)
def test_an_unknown_flag_says_which_one_is_alike(argument, meant):
    with pytest.raises(InputError) as raised:
        parse_args(Stage1, [argument, "cosine"])
    hint = f"was {meant} meant? " if meant else ""
    assert str(raised.value) == f"unrecognized arguments: {argument} cosine; {hint}--help lists the options"


def test_a_precision_from_accelerate_that_is_unknown(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert parse_args(Stage1, []).mixed_precision == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match="--mixed_precision=fp8: one of fp16, bf16, no was needed"):
        parse_args(Stage1, [])


def test_a_help_text_says_the_default():
    help_text = " ".join(build_parser(Stage2).format_help().split())
    for text in (
        "frames per clip (default: 22)",
        "(default: 0.3333,1)",
        "(default: all)",
        "optimizer: --learning_rate",
    ):
        assert text in help_text
    assert "--csv_file" not in help_text and "original_margins" not in help_text


def values(stage, environ):
    return vars(build_parser(STAGES[stage]).parse_args(flags_from_environment(stage, environ)))


@pytest.mark.parametrize("stage", [1, 2])
def test_variables_set_their_flags_and_no_other(stage):
    """Whatever the launcher does not decide; an empty variable is a value only where the setting says so."""
    default = values(stage, {})
    names = {field.name: field.metadata for field in fields(CONFIGS[stage]) if field.metadata["variable"]}
    assert len(names) > 15
    for variable in {meta["variable"] for meta in names.values()}:
        own = {name for name, meta in names.items() if meta["variable"] == variable and not meta["launcher"]}
        others = {"LOSS_WEIGHTS": "4,2,1", "BEST_BY": "psnr_hole", "LOW_MEMORY": "2"}
        given = values(stage, {variable: others.get(variable, "1")})
        assert {name for name in given if given[name] != default[name]} <= own
        assert all(str(given[name]) in ("1", "1.0", "True", "[4.0, 2.0, 1.0]", "psnr_hole") for name in own)
        emptied = values(stage, {variable: ""})
        may = {name for name in own if names[name]["may_be_empty"]}
        assert {name: emptied[name] for name in may} == dict.fromkeys(may, "")
        assert {name for name in emptied if emptied[name] != default[name]} == may


def test_defaults_of_the_shell_scripts():
    """Where they are not the flags', and where weights are looked for."""
    default, alone = values(1, {}), vars(build_parser(Stage1).parse_args([]))
    assert {name: default[name] for name in default if default[name] != alone[name]} == {
        "pretrained_stage1_path": "weights/diffuEraser", "resume_from_checkpoint": "latest",
        "latent_cache": "latent-cache",
    }  # fmt: skip
    default, moved = values(2, {}), values(2, {"WEIGHTS": "/data/w", "LOW_MEMORY": "0"})
    assert {name: moved[name] for name in moved if moved[name] != default[name]} == {
        "base_model_name_or_path": "/data/w/stable-diffusion-v1-5", "vae_path": "/data/w/sd-vae-ft-mse",
        "motion_adapter_path": "/data/w/animatediff-motion-adapter-v1-5-2",
    }  # fmt: skip


def test_what_machines_may_differ_in():
    """Paths, but for the one inside the output folder; nothing that a result depends on, but for where it is read."""
    local = settings_with("per_machine")
    paths = [f.name for cls in CONFIGS.values() for f in fields(cls) if f.metadata["metavar"] == "DIR"]
    assert set(paths) - local.keys() == {"logging_dir"}
    assert set(local) - set(paths) == {
        "validation_image",
        "validation_mask",
        "latent_cache_gb",
        "dataloader_num_workers",
        "pcm_weights",
        "prior",
        "clip_weights",
    }


class Dataset(list):
    videos, pairs, holes = [], [], SimpleNamespace(sources=list)


def described(stage=1, **changes):
    args = parse_args(STAGES[stage], [])
    for name, value in changes.items():
        setattr(args, name, value)
    return describe_run(args, STAGES[stage], {}, Dataset(), resume_policy())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_checkpoint_s_settings_keep_their_names(stage):
    """Those of every checkpoint so far; a name that changes would count as a setting that is newer than they are."""
    assert set(described(stage).settings) == {
        "engine", "num_processes", "clips", "videos", "nframes", "resolution", "seed", "train_batch_size",
        "gradient_accumulation_steps", "validation_image", "probe_clips", "mask_span", "mask_original_margins",
        "learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "max_train_steps",
        "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay", "mixed_precision",
        "gradient_checkpointing", "compile", "cuda_graph", "proportion_empty_prompts", "use_8bit_adam",
        "prompt", "known_frames", "random_crop", "frame_stride", "loss_weights", "loss_rim", "ema_decay",
        "mask_mix", "mask_growth", "mask_border", "paste", "paired_share", "best_by",  # since 2026-11-26
        "bf16_weights", "hole_videos",  # since 2026-11-27
    }  # fmt: skip


def another(name, value):
    other = {"mask_span": (0.1, 0.2), "validation_image": ["a"], "mixed_precision": "bf16", "lr_scheduler": "cosine"}
    other |= {
        "prompt": "grass",
        "loss_weights": [4.0, 2.0, 1.0],
        "mask_mix": "box=1",
        "mask_growth": "1,2",
        "best_by": "psnr_hole",
    }
    if name in other:
        return other[name]
    return not value if isinstance(value, bool) else (value or 0) + 1


@pytest.mark.parametrize("name", resume_policy().on_change)
def test_resuming_with_another_value(name):
    policy = resume_policy()
    saved, value = described(), getattr(parse_args(Stage1, []), name)
    saved.probe_start = 0.5
    now = described(**{name: another(name, value)})
    if policy.on_change[name] == LOGGED:
        state, changes = go_on_from("checkpoint-1", saved, now, policy, resume_anyway=False)
        assert changes[0].startswith(f"changed since the checkpoint: {name} from ") and state.settings == now.settings
        assert (state.probe_start is None) == (name in settings_with("sets_clips")) == (len(changes) == 2)
        return
    with pytest.raises(InputError, match=f"checkpoint-1 .*({name} {value}, now|8-bit AdamW|bf16 weights)"):
        go_on_from("checkpoint-1", saved, now, policy, resume_anyway=False)
    if policy.on_change[name] == BATCH:  # the same global batch, divided otherwise
        saved.settings["num_processes"] = 2
        _, changes = go_on_from("checkpoint-1", saved, now, policy, resume_anyway=False)
        assert [line.split()[4] for line in changes] == ["num_processes", name]


def test_what_the_fixed_clips_follow_from(videos):
    """All that the dataset draws a clip by; else a best checkpoint would be one of other clips."""
    args = parse_args(Stage1, [f"--davis_root={videos / 'DAVIS'}", f"--ytvos_root={videos / 'YTBV'}"])
    args.resolution, args.nframes = 32, 3
    other = {"random_crop": True, "frame_stride": 2, "mask_span": (0.1, 0.2), "mask_original_margins": True,
             "mask_mix": "box=1", "mask_growth": "3,3", "mask_border": 1.0, "proportion_empty_prompts": 1.0,
             "known_frames": 1.0, "seed": 1, "nframes": 4, "resolution": 40}  # fmt: skip

    def clips(**changes):
        dataset = FinetuneDataset(SimpleNamespace(**{**vars(args), **changes}))
        found = [dataset.clip(0, epoch) for epoch in range(3)]
        return [(clip.frames.tobytes(), clip.holes.tobytes(), clip.prompt) for clip in found]

    same = clips()
    changing = {name for name, value in other.items() if clips(**{name: value}) != same}
    assert changing == other.keys() and changing <= settings_with("sets_clips").keys()


@pytest.mark.parametrize("kind", ["videos", "pairs"])
def test_other_videos_on_resuming(monkeypatch, kind):
    """Their names, lengths and order say what an index stands for; where they lie may change."""

    def described_with(*videos):
        found = [SimpleNamespace(folder=Path(folder), frames=range(count)) for folder, count in videos]
        monkeypatch.setattr(Dataset, kind, found)
        return described()

    assert described_with(("a/caf\udce9", 5)).settings["videos"]  # a name in Latin-1
    saved = described_with(("a/bear", 5), ("a/hike", 6))
    moved = described_with(("b/bear", 5), ("b/hike", 6))
    assert go_on_from("checkpoint-1", saved, moved, resume_policy(), resume_anyway=False)[1] == []
    for others in ((("a/bear", 5), ("a/hike", 7)), (("a/bear", 5), ("a/camel", 6)), (("a/hike", 6), ("a/bear", 5))):
        with pytest.raises(InputError, match="videos, by a hash of names and lengths, "):
            go_on_from("checkpoint-1", saved, described_with(*others), resume_policy(), resume_anyway=False)


def test_other_weights_on_resuming():
    """Their content decides; the checkpoint's own are those of models that have none to start from."""
    saved, now = described(), described()
    saved.weights = {"unet_main": ["a", "0123"], "brushnet": ["a", "0123"]}
    now.weights = {"unet_main": ["b", "0123"]}
    state, changes = go_on_from("checkpoint-1", saved, now, resume_policy(), resume_anyway=False)
    assert state.weights == now.weights and changes == []
    now.weights = {"unet_main": ["b", "4567"]}
    with pytest.raises(InputError, match="weights of unet_main from a, now from b"):
        go_on_from("checkpoint-1", saved, now, resume_policy(), resume_anyway=False)


def test_where_holes_come_from_on_resuming(monkeypatch):
    """Objects or videos' own masks that are turned on or off are logged; those of other videos are refused."""
    none = described()
    sources, policy = iter((["object of bear"], ["object of hike"])), resume_policy()
    monkeypatch.setattr(Dataset, "holes", SimpleNamespace(sources=lambda: next(sources)))
    bear, hike = described(), described()
    for saved, now, use in ((none, bear, "used from here on"), (bear, none, "not used any more")):
        _, changes = go_on_from("checkpoint-1", saved, now, policy, resume_anyway=False)
        assert changes == [f"changed since the checkpoint: masks of videos are {use}"]
    with pytest.raises(InputError, match="videos that masks and objects are taken from"):
        go_on_from("checkpoint-1", bear, hike, policy, resume_anyway=False)


@pytest.mark.parametrize(
    ("changes", "anew"), [({}, False), ({"mask_mix": "blob=0.7,object=0.3"}, True), ({"paste": 0.5}, True)]
)
def test_other_annotated_videos_on_resuming_anyway(monkeypatch, changes, anew):
    """The held-out loss's fixed clips borrow objects as training's do, where these do."""
    sources, policy = iter((["object of bear"], ["object of hike"])), resume_policy()
    monkeypatch.setattr(Dataset, "holes", SimpleNamespace(sources=lambda: next(sources)))
    saved, now = described(**changes), described(**changes)
    saved.probe_start = 0.5
    state, notes = go_on_from("checkpoint-1", saved, now, policy, resume_anyway=True)
    assert (state.probe_start is None) == bool(notes) == anew
    assert (what_sets_clips(saved.settings) != what_sets_clips(now.settings)) == anew  # so with the best checkpoint


def test_a_setting_that_is_newer_than_the_checkpoint():
    saved, now = described(), described()
    for name in ("compile", "probe_clips", "bf16_weights", "hole_videos"):
        del saved.settings[name]
    assert go_on_from("checkpoint-1", saved, now, resume_policy(), resume_anyway=False)[1] == []
    assert set(BATCH_SETTINGS) <= set(saved.settings) and isinstance(saved, TrainerState)


def test_a_newer_setting_was_at_its_default():
    """A checkpoint from before --frame_stride had every frame; --random_crop would change what is measured."""
    saved = described()
    del saved.settings["frame_stride"], saved.settings["random_crop"]
    saved.probe_start = 0.5
    with pytest.raises(InputError, match="checkpoint-1 was written with frame_stride 1, now 2: go back"):
        go_on_from("checkpoint-1", saved, described(frame_stride=2), resume_policy(), resume_anyway=False)
    state, changes = go_on_from("checkpoint-1", saved, described(random_crop=True), resume_policy(), False)
    assert len(changes) == 2 and "random_crop from False to True" in changes[0] and state.probe_start is None


@pytest.mark.parametrize(("before", "now"), [("64", "64x64"), ("64x32", "64x32")])
def test_one_shape_written_in_two_ways(before, now):
    saved, state = (
        described(resolution=parse_args(Stage1, [f"--resolution={text}"]).resolution) for text in (before, now)
    )
    assert saved.settings["resolution"] == json.loads(json.dumps(state.settings["resolution"]))
    assert go_on_from("checkpoint-1", saved, state, resume_policy(), resume_anyway=False)[1] == []
    other = described(resolution="32x64")
    with pytest.raises(InputError, match=f"resolution {before}, now 32x64"):
        go_on_from("checkpoint-1", saved, other, resume_policy(), resume_anyway=False)


@pytest.mark.parametrize("stage", [1, 2])
def test_what_the_memory_check_counts_is_what_trains(stage, flags):
    """Motion modules' weights come with tables of positions, which are no parameters."""
    args = parse_args(STAGES[stage], flags(stage))
    opened = STAGES[stage].open_models(args)
    model = STAGES[stage].load_models(opened, None)
    tables = sum(buffer.numel() for name, buffer in model.named_buffers() if "motion_modules" in name)
    trained, frozen = count_parameters(STAGES[stage], opened)
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    assert (trained, frozen) == (sizes[True] + tables, sizes[False])


@pytest.mark.parametrize("stage", [1, 2])
def test_clips_are_as_long_as_the_windows_of_inference(stage):
    assert parse_args(STAGES[stage], []).nframes == INPAINTERS[stage].nframes
