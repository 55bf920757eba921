"""What of a video a clip shows: the shape and position of its crop, and every Nth frame."""

import argparse
import hashlib
import os
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import equal_files
from PIL import Image

from common.errors import InputError
from common.weights import fingerprint, weight_files
from dataset.crop import Crop, multiples_of_8, resolution, sides
from dataset.finetune_dataset import FinetuneDataset
from libs.checkpoints.convert import convert
from libs.inpainter import INPAINTERS
from libs.training.checks import check_memory
from libs.training.config import parse_args
from libs.training.latent_cache import CHECKSUM_BYTES
from libs.training.setup import open_latent_cache
from train_DiffuEraser_stage1 import Stage1


def dataset_of(root, **settings):
    args = {"davis_root": "", "ytvos_root": root, "nframes": 5, "resolution": 64, **settings}
    return FinetuneDataset(SimpleNamespace(**args))


def write_video(root, frames, name="video"):
    """A YouTube-VOS root with one video more, of PNG files: no decoder's rounding."""
    folder = root / "JPEGImages" / name
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """12 frames of 192x128, of random blocks of 2x2: their averages are exact."""
    rng = np.random.default_rng(0)
    drawn = (rng.integers(0, 256, (64, 96, 3), np.uint8) for _ in range(12))
    return write_video(tmp_path_factory.mktemp("blocks"), [f.repeat(2, axis=0).repeat(2, axis=1) for f in drawn])


@pytest.fixture(scope="module")
def ramps(tmp_path_factory):
    """12 frames of 240x160 whose colours are a pixel's column, its row, and 20 times the frame's number."""
    rows, columns = np.mgrid[:160, :240].astype(np.uint8)
    frames = [np.stack([columns, rows, np.full_like(rows, 20 * i)], axis=-1) for i in range(12)]
    return write_video(tmp_path_factory.mktemp("ramps"), frames)


def digest(clip):
    text = f"{clip.prompt} {clip.noise_seed} {[path.name for path in clip.paths]}"
    return hashlib.sha256(clip.frames.tobytes() + clip.holes.tobytes() + text.encode()).hexdigest()[:12]


# Computed on 2026-11-26 with the code that knew squares in the centre only.
GUIDE = ["2eba3d02789b", "544a35f1bee7", "3e16261518a5", "c6a5be173334"]
WITH_OPTIONS = ["ef72d590fa8f", "99ab7a58582a", "7e4b94cebf39", "57c6432ccc1f"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, GUIDE),
        ({"resolution": "64x64", "frame_stride": 1, "random_crop": False}, GUIDE),
        ({"known_frames": 0.5, "proportion_empty_prompts": 0.5, "mask_span": (0.2, 0.6)}, WITH_OPTIONS),
    ],
)
def test_the_guide_s_samples_stay_what_they_were(blocks, settings, expected):
    """Bit for bit, for a seed."""
    dataset = dataset_of(blocks, **settings)
    assert [digest(dataset.clip(0, epoch)) for epoch in range(4)] == expected


def test_a_square_crop_is_made_as_it_was(blocks):
    """The centre's square, areas averaged when it shrinks, bilinear when it grows."""
    for side, method in ((40, cv2.INTER_AREA), (128, cv2.INTER_LINEAR), (200, cv2.INTER_LINEAR)):
        clip = dataset_of(blocks, resolution=side).clip(0, 0)
        for path, frame in zip(clip.paths, clip.frames, strict=True):
            square = np.asarray(Image.open(path))[:, 32:160]
            assert np.array_equal(frame, cv2.resize(square, (side, side), interpolation=method))


@pytest.mark.parametrize(
    ("text", "value", "pixels"),
    [("512", 512, (512, 512)), ("512x512", 512, (512, 512)), ("512x288", "512x288", (512, 288))],
)
def test_a_resolution_is_written_in_one_way(text, value, pixels):
    assert resolution(text) == value and sides(value) == pixels and multiples_of_8(value) is None


@pytest.mark.parametrize("text", ["512x", "x512", "512x288x3", "", "512X288", "wide", "1.5"])
def test_what_is_no_resolution(text):
    with pytest.raises(argparse.ArgumentTypeError, match="a number such as 512, or 512x288, was needed, not "):
        resolution(text)


@pytest.mark.parametrize(
    ("value", "use"), [("512x290", "512x288"), ("0x64", "8x64"), (0, "8"), ("508x512", "512"), ("64x-8", "64x8")]
)
def test_sides_that_are_no_multiples_of_8(value, use):
    assert multiples_of_8(value) == f"a multiple of 8 was needed; use {use}"


@pytest.mark.parametrize(
    ("frame", "shape", "box", "corner"),
    [
        ((854, 480), 512, (480, 480), (187, 0)),
        ((480, 854), 512, (480, 480), (0, 187)),
        ((854, 480), "512x288", (853, 480), (0, 0)),
        ((1280, 720), "512x288", (1280, 720), (0, 0)),
        ((480, 854), "512x288", (480, 270), (0, 292)),
        ((854, 480), "288x512", (270, 480), (292, 0)),
        ((100, 100), "64x32", (100, 50), (0, 25)),
        ((3, 2), "512x8", (3, 1), (0, 0)),  # a frame too small for the shape: a row of pixels
    ],
)
def test_the_largest_box_of_the_shape_in_the_centre(frame, shape, box, corner):
    crop = Crop.of(*frame[::-1], shape)
    assert (crop.box, crop.corner, crop.size) == (box, corner, sides(shape))


@pytest.mark.parametrize("shape", ["96x32", "32x96", "160x96", "240x400"])
@pytest.mark.parametrize("random_crop", [False, True])
def test_frames_and_points_land_where_the_crop_says(ramps, shape, random_crop):
    """Every pixel of a clip shows the column and row that the way back from its position names."""
    dataset, positions = dataset_of(ramps, resolution=shape, random_crop=random_crop), set()
    width, height = sides(shape)
    for epoch in range(6):
        frames = dataset.clip(0, epoch).frames
        rng = np.random.default_rng([42, epoch, 0, 3]) if random_crop else None
        crop = Crop.of(160, 240, shape, rng)
        assert min(crop.corner) >= 0 and crop.corner[0] + crop.box[0] <= 240 and crop.corner[1] + crop.box[1] <= 160
        assert 240 in crop.box or 160 in crop.box
        at = np.stack(np.meshgrid(np.arange(240.0), np.arange(160.0)), axis=-1)  # every source pixel's x and y
        mapped = crop.map_points(at)
        inside = ((mapped >= 0) & (mapped <= np.array([width - 1, height - 1]))).all(axis=-1)
        x, y = np.round(mapped[inside]).astype(int).T
        step = max(1, 1 / crop.scale.min())  # of source pixels that a pixel of the result stands for
        for frame in frames:
            assert np.abs(frame[y, x, :2] - at[inside]).max() <= step
            assert len(np.unique(frame[..., 2])) == 1
        positions.add(crop.corner)
    assert (len(positions) > 3) == random_crop


def test_a_mask_s_pixel_shows_the_middle_of_what_it_stands_for():
    """Its first pixel would move masks right and down."""
    mask, small = np.zeros((64, 64), np.uint8), np.empty((16, 16), np.uint8)
    mask[1:4, 5:8] = 255
    Crop.of(64, 64, 16).resize(mask, out=small, nearest=True)
    assert np.argwhere(small).tolist() == [[0, 1]]


def test_the_whole_room_is_drawn_from():
    corners = {Crop.of(10, 14, 8, np.random.default_rng(i)).corner for i in range(200)}
    assert corners == {(x, 0) for x in range(5)}
    corners = {Crop.of(14, 10, 8, np.random.default_rng(i)).corner for i in range(200)}
    assert corners == {(0, y) for y in range(5)}


def test_a_random_crop_follows_from_seed_epoch_and_index(ramps, blocks):
    """Its holes follow, the rest of the sample is the centre crop's, and it differs from epoch to epoch."""
    centre, dataset, again = (dataset_of(ramps, random_crop=random) for random in (False, True, True))
    firsts = set()
    for epoch in range(8):
        plain, clip, same = (source.clip(0, epoch) for source in (centre, dataset, again))
        assert np.array_equal(clip.frames, same.frames) and np.array_equal(clip.holes, same.holes)
        assert (clip.paths, clip.noise_seed, clip.prompt) == (plain.paths, plain.noise_seed, plain.prompt)
        assert len({frame[0, 0, 0] for frame in clip.frames}) == 1  # one position for all frames
        firsts.add(int(clip.frames[0, 0, 0, 0]))
    assert len(firsts) > 4
    other = dataset_of(ramps, random_crop=True, seed=1)
    assert {int(other.clip(0, epoch).frames[0, 0, 0, 0]) for epoch in range(8)} != firsts


def test_holes_follow_the_random_crop(ramps):
    """What both crops show of the source has a hole in both or in neither, but for how an edge is cut."""
    for epoch in range(6):
        plain, clip = (dataset_of(ramps, random_crop=random, resolution=160).clip(0, epoch) for random in (False, True))
        shift = int(clip.frames[0, 0, 0, 0]) - int(plain.frames[0, 0, 0, 0])  # in columns; nothing is scaled
        a, b = plain.holes[:, :, max(0, shift) :], clip.holes[:, :, max(0, -shift) :]
        shared = min(a.shape[2], b.shape[2])
        assert shared == 160 - abs(shift) and shift != 0
        assert np.mean(a[:, :, :shared] != b[:, :, :shared]) < 0.002
        assert np.mean(plain.holes != clip.holes) > 0.01


def test_every_nth_frame(ramps):
    """Forth and back, from every start that leaves room."""
    dataset, starts = dataset_of(ramps, frame_stride=2), set()
    for epoch in range(60):
        clip = dataset.clip(0, epoch)
        numbers = clip.frames[:, 0, 0, 2].astype(int) // 20
        assert set(np.diff(numbers)) in ({2}, {-2}) and [int(path.stem) for path in clip.paths] == numbers.tolist()
        starts.add(min(numbers))
    assert starts == {0, 1, 2, 3}


def test_videos_too_short_for_the_stride(ramps, tmp_path):
    write_video(tmp_path, [np.zeros((64, 64, 3), np.uint8)] * 9, "short")
    assert len(dataset_of(tmp_path, frame_stride=2)) == 1
    with pytest.raises(
        InputError,
        match=r"fewer than 13 frames, which 5 take at --frame_stride=3 \(the longest video has 12\); "
        "lower --nframes or --frame_stride or add longer videos",
    ):
        dataset_of(ramps, frame_stride=3)
    write_video(tmp_path, [np.zeros((64, 64, 3), np.uint8)] * 8, "shorter")
    dataset = dataset_of(tmp_path, frame_stride=2)
    assert [video.name for video in dataset.too_short] == ["shorter"]


def test_the_latent_cache_tells_shapes_apart(weights, tmp_path):
    """And a square's keys are those of the caches that users have."""
    frame = tmp_path / "frame.png"
    frame.write_text("a frame")
    vae = weights / "sd-vae-ft-mse"
    base = SimpleNamespace(
        vae_folder=vae, variant=None, vae_config={"block_out_channels": [1] * 4, "latent_channels": 4}
    )

    def cache_of(resolution, *more):
        flags = [f"--resolution={resolution}", f"--latent_cache={tmp_path / 'cache'}", *more]
        return open_latent_cache(parse_args(Stage1, flags), SimpleNamespace(num_processes=1), base, torch.float16)

    caches = [cache_of(shape) for shape in ("64", "64x32", "32x64", "32x128", "64x40")]
    assert [cache.shape for cache in caches[:3]] == [(8, 8, 8), (8, 4, 8), (8, 8, 4)]
    assert len({cache.key(frame) for cache in caches}) == 5 and cache_of("64x64").key(frame) == caches[0].key(frame)
    identity = f"{fingerprint(weight_files(vae, None))} (8, 8, 8) torch.float16 {os.path.realpath(frame)}"
    stat = frame.stat()
    identity += f" {stat.st_size} {stat.st_mtime_ns}"
    assert caches[0].key(frame) == hashlib.sha256(identity.encode()).hexdigest()[:32]
    assert cache_of("64", "--random_crop") is None


def test_memory_is_estimated_by_area():
    model = SimpleNamespace(parameters=1000, config={"block_out_channels": [320]})

    def estimate(*flags):
        return check_memory(parse_args(Stage1, flags), Stage1, {"unet_main": model, "brushnet": model})

    half = estimate("--resolution=512x256", "--nframes=10")
    assert half == estimate("--resolution=512", "--nframes=5") != estimate("--resolution=512", "--nframes=10")


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_on_other_shapes(train, videos, weights, tmp_path, monkeypatch, capsys, stage):
    """Wide clips of every second frame, validated, converted and resumed; with random crops the cache is off."""
    monkeypatch.setattr(INPAINTERS[stage], "inference_steps", 1)
    buoy, cache, run = videos / "DAVIS/JPEGImages/480p/buoy", tmp_path / "cache", tmp_path / "run"
    settings = {
        "resolution": "64x32", "frame_stride": 2, "random_crop": stage == 2 or None, "latent_cache": cache,
        "validation_image": [str(buoy)], "validation_mask": [str(videos / "DAVIS/Annotations/480p/buoy")],
        "validation_steps": 3, "probe_clips": 1,
    }  # fmt: skip
    train(stage, checkpointing_steps=1, **settings)
    said = "latent cache: off, because --random_crop" in capsys.readouterr().out
    sizes = {path.stat().st_size for path in cache.glob("*/*")}
    assert (said, sizes) == ((False, {8 * 4 * 8 * 4 + CHECKSUM_BYTES}) if stage == 1 else (True, set()))
    logs = run / f"logs-finetune-stage{stage}"
    assert Image.open(logs / "samples/sample-1/1.gif").size == (64, 38)  # whole frames of 160x96, shrunk as a crop is
    assert len((logs / "held_out.csv").read_text().split()) == 4  # header, start, two steps

    convert(stage, run, tmp_path / "converted", weights / "diffuEraser" if stage == 2 else None)
    card = (tmp_path / "converted/README.md").read_text()
    assert f"- resolution: 64x32\n- random_crop: {stage == 2}\n" in card and "- frame_stride: 2\n" in card
    shutil.rmtree(run / "checkpoint-2")
    train(stage, resume_from_checkpoint="latest", **{**settings, "validation_steps": 0})
    assert "resumed from" in capsys.readouterr().out
    for name in ("unet_main", "brushnet"):
        weights_file = f"{name}/diffusion_pytorch_model.safetensors"
        assert equal_files(run / weights_file, tmp_path / "converted" / weights_file)
