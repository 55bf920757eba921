"""Contracts of the four model classes: published layout, strict loading, the branch, recomputation."""

import argparse
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import DATA, assert_holds
from safetensors.torch import load_file, save_file

from common.errors import InputError
from common.weights import resolve_folder, shapes_of
from libs.base_model import BaseModel
from libs.brushnet_CA import BrushNetModel
from libs.unet_2d_condition import UNet2DConditionModel
from libs.unet_motion_model import MotionAdapter, UNetMotionModel, adapter_config, refuse_long_clips
from tests.reference import fill_by_formula, parity_case

LAYOUT = DATA / "published_layout"
PUBLISHED = {
    "stable-diffusion-v1-5/unet": UNet2DConditionModel,
    "diffuEraser/unet_main": UNetMotionModel,
    "diffuEraser/brushnet": BrushNetModel,
    "animatediff-motion-adapter-v1-5-2": MotionAdapter,
}


@pytest.fixture
def tiny():
    case, _ = parity_case("batch2")
    unet = UNet2DConditionModel(**case["configs"]["unet"])
    fill_by_formula(unet, 1)
    adapter = MotionAdapter(**case["configs"]["motion_adapter"])
    return unet, adapter


@pytest.mark.parametrize("folder", PUBLISHED)
def test_published_layout(folder, tmp_path):
    """Full-size models have exactly the published keys and shapes, and their saved configs say the same model."""
    cls, config = PUBLISHED[folder], json.loads((LAYOUT / folder / "config.json").read_text())
    model = cls.on_meta(config)
    expected = {key: tuple(shape) for key, shape in json.loads((LAYOUT / folder / "keys.json").read_text()).items()}
    assert shapes_of(model.state_dict()) == expected

    model.save_config(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["_class_name"] == config["_class_name"] == cls.__name__
    unused = {"conditioning_channels", "conditioning_embedding_out_channels", "attention_head_dim", "mid_block_type"}
    for key, value in config.items():
        if key != "_diffusers_version" and not (cls is UNetMotionModel and key in unused):
            assert saved[key] == value, key
    if cls is BrushNetModel:
        assert saved.keys() == config.keys()


def test_saved_and_loaded_again(tiny, tmp_path):
    unet, adapter = tiny
    for name, model in {
        "unet": unet,
        "adapter": adapter,
        "motion": UNetMotionModel.from_unet2d(unet, adapter),
        "brushnet": BrushNetModel.from_unet(unet),
    }.items():
        model.save_pretrained(tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path, subfolder=name)
        assert_holds(loaded, model.state_dict())
        assert json.loads((tmp_path / name / "config.json").read_text())["_class_name"] == type(model).__name__


def test_half_precision_files_are_upcast(tiny, tmp_path):
    unet, _ = tiny
    unet.half().save_pretrained(tmp_path)
    assert {p.dtype for p in UNet2DConditionModel.from_pretrained(tmp_path).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("conv_in.bias"), "lacks conv_in.bias"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "surplus extra"),
        (lambda tensors: tensors.update({"conv_in.bias": torch.zeros(7)}), "conv_in.bias has shape"),
    ],
    ids=["missing", "surplus", "wrong_shape"],
)
def test_loading_is_strict(tiny, tmp_path, damage, message):
    tiny[0].save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(InputError, match=message):
        UNet2DConditionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("form", ["bin", "sharded", "sharded_bin", "variant"])
def test_forms_of_weight_files(tiny, tmp_path, form):
    """What diffusers writes: .bin instead of safetensors, several shards with an index, an fp16 variant."""
    unet, _ = tiny
    folder = tmp_path / form
    settings = {
        "bin": {"safe_serialization": False},
        "sharded": {"max_shard_size": "1MB"},
        "sharded_bin": {"max_shard_size": "1MB", "safe_serialization": False},
        "variant": {"variant": "fp16"},
    }[form]
    unet.save_pretrained(folder, **settings)
    assert ("sharded" in form) == (len([path for path in folder.iterdir() if path.suffix != ".json"]) > 1)
    loaded = UNet2DConditionModel.from_pretrained(folder, variant=settings.get("variant"))
    assert_holds(loaded, unet.state_dict())


@pytest.mark.parametrize("cls", [UNet2DConditionModel, UNetMotionModel, BrushNetModel])
def test_arguments_of_diffusers_from_pretrained(cls, tiny, tmp_path, monkeypatch):
    """They do what they do there, from a folder and from the Hub, or say why not."""
    unet, adapter = tiny
    made = {BrushNetModel: BrushNetModel.from_unet, UNetMotionModel: lambda unet: cls.from_unet2d(unet, adapter)}
    model = made.get(cls, lambda unet: unet)(unet)
    model.save_pretrained(tmp_path / "part")
    same = {"low_cpu_mem_usage": False, "use_safetensors": True, "device_map": None, "torch_dtype": torch.float16}
    loaded = cls.from_pretrained(pretrained_model_name_or_path=str(tmp_path), subfolder="part", variant="fp16", **same)
    assert_holds(loaded, model.half().state_dict())
    with pytest.raises(InputError, match=r"it has diffusion_pytorch_model\.safetensors"):
        cls.from_pretrained(tmp_path / "part", use_safetensors=False)
    with pytest.raises(TypeError, match=r"does not support device_map: .* use \.to\(device\)"):
        cls.from_pretrained(tmp_path / "part", device_map="auto")
    asked = []
    monkeypatch.setattr("common.weights.snapshot_download", lambda *names, **options: asked.append(options) or tmp_path)
    hub = {"cache_dir": tmp_path / "cache", "local_files_only": True, "token": "t", "revision": "main"}
    cls.from_pretrained("someone/model", subfolder="part", torch_dtype=None, force_download=False, **hub)
    assert asked == [{**hub, "allow_patterns": ["part/*"]}]


def test_cross_attention_kwargs(tiny):
    """A LoRA's scale, as in diffusers; the original's pipelines pass it always. Anything else would do nothing."""
    unet, adapter = tiny
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, unet.config.cross_attention_dim)
    models = (unet, UNetMotionModel.from_unet2d(unet, adapter), BrushNetModel.from_unet(unet))
    for model in models:
        extra = {"num_frames": 1} if isinstance(model, UNetMotionModel) else {}
        extra |= {"brushnet_cond": torch.randn(2, 5, 8, 8)} if isinstance(model, BrushNetModel) else {}

        def call(model=model, extra=extra, **kwargs):
            return model(sample, 7, text, return_dict=False, **extra, **kwargs)[0]

        plain = call()
        for kwargs in (None, {}, {"scale": 1.0}):
            result = call(cross_attention_kwargs=kwargs)
            assert all(torch.equal(a, b) for a, b in zip(result, plain, strict=True))
        with pytest.raises(TypeError, match="does not support cross_attention_kwargs gligen"):
            call(cross_attention_kwargs={"scale": 1.0, "gligen": {}})


def test_the_scale_of_a_lora(tiny, monkeypatch):
    """diffusers' own function sets it before the layers run, and takes it back after them."""
    calls = []
    monkeypatch.setattr("diffusers.utils.USE_PEFT_BACKEND", True)
    for name in ("scale_lora_layers", "unscale_lora_layers"):
        monkeypatch.setattr(f"diffusers.utils.peft_utils.{name}", lambda model, scale, name=name: calls.append(scale))
    unet, _ = tiny
    text = torch.randn(1, 7, unet.config.cross_attention_dim)
    unet(torch.randn(1, 4, 8, 8), 7, text, cross_attention_kwargs={"scale": 0.5})
    assert calls == [0.5, 0.5]


def test_a_vae_in_a_subfolder(weights, tmp_path):
    """As in Stable Diffusion's own repository."""
    shutil.copytree(weights / "sd-vae-ft-mse", tmp_path / "vae")
    settings = {"tokenizer_name": None, "revision": None, "variant": None}
    args = argparse.Namespace(
        base_model_name_or_path=str(weights / "stable-diffusion-v1-5"), vae_path=str(tmp_path), **settings
    )
    frozen = BaseModel(args)
    assert frozen.vae_folder == tmp_path / "vae" and frozen.load_vae("cpu", torch.float32, 1).scale == 8


def test_wrong_class_and_missing_files(tiny, tmp_path):
    tiny[0].save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds a UNet2DConditionModel: a BrushNetModel was needed"):
        BrushNetModel.from_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no diffusion_pytorch_model\.safetensors"):
        UNet2DConditionModel.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        UNet2DConditionModel.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("path", ["weights/sd-vae-ft-mse", "converted_weights/finetuned-stage1", "./a/b", "a/b/c"])
def test_own_folders_are_not_looked_up_on_the_hub(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.weights.snapshot_download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(InputError, match=f"^{tmp_path / path}/unet is not a folder: .* README.md how to download"):
        resolve_folder(path, "unet")


def test_parts_of_a_motion_folder(tiny, tmp_path):
    """Stage 1 takes the 2D part, stage 2 the motion modules, both bit for bit."""
    unet, adapter = tiny
    motion = UNetMotionModel.from_unet2d(unet, adapter)
    motion.save_pretrained(tmp_path)
    opened = UNet2DConditionModel.open_2d_part(tmp_path)
    assert opened.source_class == "UNetMotionModel"
    part = opened.load()
    assert_holds(part, unet.state_dict())
    assert part.config["attention_head_dim"] == motion.config["num_attention_heads"] == 2
    modules = MotionAdapter.open_motion_part(tmp_path).load()
    assert_holds(modules, adapter.state_dict())


def test_the_config_of_motion_modules():
    """Heads leave no trace in shapes: read wrong, they would change what the modules compute, and nothing else."""
    motion = {"block_out_channels": (8, 16), "layers_per_block": 1, "motion_num_attention_heads": 2,
              "norm_num_groups": 4, "motion_max_seq_length": 24, "use_motion_mid_block": False}  # fmt: skip
    adapter = MotionAdapter(**adapter_config(motion))
    block = adapter.down_blocks[0].motion_modules
    attention = block[0].transformer_blocks[0].attn1
    assert len(block) == 1 and attention.heads == 2 and block[0].norm.num_groups == 4 and adapter.mid_block is None
    assert block[0].transformer_blocks[0].pos_embed.pe.shape == (1, 24, 8)


def test_clips_as_long_as_the_position_tables():
    weights = SimpleNamespace(config={"motion_max_seq_length": 24}, folder="unet_main")
    refuse_long_clips(weights, 24)
    with pytest.raises(InputError, match=r"--nframes=25: unet_main takes 24 frames at most"):
        refuse_long_clips(weights, 25)


def test_from_unet2d_copies(tiny):
    unet, adapter = tiny
    motion = UNetMotionModel.from_unet2d(unet, adapter)
    before = motion.conv_in.weight.clone()
    unet.conv_in.weight.data.zero_()
    assert torch.equal(motion.conv_in.weight, before)


def test_freeze_unet2d_params(tiny):
    motion = UNetMotionModel.from_unet2d(*tiny)
    motion.freeze_unet2d_params()
    for name, parameter in motion.named_parameters():
        assert parameter.requires_grad == ("motion_modules" in name)


def test_brushnet_from_unet(tiny):
    unet, _ = tiny
    brushnet = BrushNetModel.from_unet(unet)
    weight = brushnet.conv_in_condition.weight
    assert torch.equal(weight[:, :4], unet.conv_in.weight) and torch.equal(weight[:, 4:8], unet.conv_in.weight)
    assert not weight[:, 8].any()
    assert torch.equal(brushnet.conv_in_condition.bias, unet.conv_in.bias)
    assert brushnet.conv_in_condition.bias is not unet.conv_in.bias
    shared = brushnet.state_dict().keys() & unet.state_dict().keys()
    assert len(shared) > 500
    assert_holds(brushnet, {key: tensor for key, tensor in unet.state_dict().items() if key in shared})


@pytest.mark.parametrize("motion", [False, True])
def test_untrained_brushnet_changes_nothing(tiny, motion):
    unet, adapter = tiny
    frames = 2
    latents, text, t = torch.randn(frames, 4, 10, 6), torch.randn(frames, 5, 16), torch.tensor([7, 7])
    down, mid, up = BrushNetModel.from_unet(unet)(latents, t, text, torch.randn(frames, 5, 10, 6), return_dict=False)
    features = {"down_block_add_samples": down, "mid_block_add_sample": mid, "up_block_add_samples": up}
    if motion:
        unet, text, t = UNetMotionModel.from_unet2d(unet, adapter), text[:1], t[:1]
        features["num_frames"] = frames
    with_branch = unet(latents, t, text, **features).sample
    without = unet(latents, t, text, **({"num_frames": frames} if motion else {})).sample
    assert torch.equal(with_branch, without)
    assert len(down) == 12 and len(up) == 15  # the lists passed in are not consumed


def test_conditioning_scale(tiny):
    unet, _ = tiny
    brushnet = BrushNetModel.from_unet(unet)
    fill_by_formula(brushnet, 2)
    inputs = torch.randn(1, 4, 8, 8), 5, torch.randn(1, 5, 16), torch.randn(1, 5, 8, 8)
    plain, doubled = brushnet(*inputs), brushnet(*inputs, conditioning_scale=2.0)
    torch.testing.assert_close(doubled.mid_block_res_sample, 2 * plain.mid_block_res_sample)
    torch.testing.assert_close(doubled.up_block_res_samples[-1], 2 * plain.up_block_res_samples[-1])


def test_timesteps_may_be_numbers_or_tensors(tiny):
    unet, _ = tiny
    latents, text = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 16)
    expected = unet(latents, torch.tensor([9, 9, 9]), text).sample
    for timestep in (9, torch.tensor(9), torch.tensor([9])):
        assert torch.equal(unet(latents, timestep, text).sample, expected)


def test_unsupported_arguments_are_refused(tiny):
    unet, _ = tiny
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    unet(
        latents, 1, text, timestep_cond=None, cross_attention_kwargs=None, is_controlnet=False
    )  # as the original's pipelines call it
    with pytest.raises(TypeError, match="cross_attention_kwargs ip_adapter_masks"):
        unet(latents, 1, text, cross_attention_kwargs={"scale": 0.5, "ip_adapter_masks": [latents]})
    for setting in ({"brushnet_conditioning_channel_order": "bgr"}, {"global_pool_conditions": True}):
        with pytest.raises(ValueError, match="channel order 'rgb' without global pooling only"):
            BrushNetModel(**setting)
    with pytest.raises(ValueError, match="all three or none"):
        unet(latents, 1, text, mid_block_add_sample=torch.zeros(1))


def test_gradient_checkpointing_recomputes_whole_layers(tiny):
    """Less is kept for the backward pass, in BrushNet too: nothing of a layer but its inputs."""
    unet, _ = tiny
    brushnet = BrushNetModel.from_unet(unet)
    saved = {}
    for recompute in (False, True):
        if recompute:
            brushnet.enable_gradient_checkpointing()
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t)
        with hooks:
            brushnet(torch.randn(2, 4, 16, 16), 3, torch.randn(2, 5, 16), torch.randn(2, 5, 16, 16))
        saved[recompute] = sum(sizes)
    assert saved[True] < 0.5 * saved[False]


def test_freeu_is_refused():
    case, _ = parity_case("batch2")
    with pytest.raises(ValueError, match="FreeU is not supported"):
        UNet2DConditionModel(**case["configs"]["unet"]).enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
