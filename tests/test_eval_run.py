"""eval_DiffuEraser.py and run_diffueraser.py as users call them, on converted folders of both stages."""

import csv
import errno
import re
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from clips import moving_video, read_masks, read_video, write_frames, write_mp4
from conftest import error_line
from PIL import Image

import eval_DiffuEraser
import run_diffueraser
from common.errors import InputError
from dataset.images import read_mask
from libs.checkpoints.convert import convert
from libs.comparison import methods
from libs.inference.load import PCM_FILE, check_inference_flags


@pytest.fixture
def models(weights):
    return [
        f"--base_model_name_or_path={weights / 'stable-diffusion-v1-5'}",
        f"--vae_path={weights / 'sd-vae-ft-mse'}",
        "--num_inference_steps=2",
    ]


@pytest.fixture
def clip(tmp_path):
    """A folder with video.mp4, mask.mp4, frames/, masks/ and mask.png: 7 frames of 66x50."""
    frames, holes = moving_video(7, 50, 66)
    masks = np.repeat(holes[..., None], 3, axis=3)
    folder = tmp_path / "clip"
    write_mp4(folder / "video.mp4", frames, 12)
    write_mp4(folder / "mask.mp4", masks, 12)
    write_frames(folder / "frames", frames)
    write_frames(folder / "masks", masks)
    Image.fromarray(holes[0] // 255).save(folder / "mask.png")  # 0 and 1, as DAVIS's annotations are
    return folder


def read_result(folder):
    frames, _ = read_video(folder / "frames")
    return frames


@pytest.mark.parametrize(("video", "mask"), [("frames", "masks"), ("video.mp4", "mask.mp4"), ("frames", "mask.png")])
def test_run(weights, models, clip, tmp_path, capsys, video, mask):
    """Any kind of clip and mask: the clip's size, length and speed; pixels far from the hole are the clip's own."""
    run_diffueraser.main([f"--video={clip / video}", f"--mask={clip / mask}", f"--weights={weights / 'diffuEraser'}",
                          f"--output_dir={tmp_path / 'out'}", "--nframes=4", "--overlap=2", "--mask_dilation=2",
                          "--soft_edge=3", *models])  # fmt: skip
    output = capsys.readouterr()
    assert "stage 2, 3 windows of 4 frames" in output.out and not output.err
    result, (given, _) = read_result(tmp_path / "out"), read_video(clip / video)
    holes = np.broadcast_to(read_masks(clip / mask), result.shape[:3])
    assert result.shape == given.shape == (7, 50, 66, 3)
    far = np.stack([cv2.dilate(hole, np.ones((15, 15), np.uint8)) == 0 for hole in holes])
    assert far.any() and np.array_equal(result[far], given[far])
    assert (np.abs(result.astype(int) - given)[holes > 0] > 20).mean() > 0.5
    shown, fps = read_video(tmp_path / "out" / "result.mp4")
    assert shown.shape == result.shape and fps == (12 if video.endswith("mp4") else 24)
    assert np.abs(shown.astype(int) - result).mean() < 12  # compressed


def test_run_of_stage_1_in_odd_sizes(train, models, clip, tmp_path, capsys):
    """A converted stage 1 is told from its config; 65x49 pixels stay 65x49; a lower resolution inside."""
    train(1, max_train_steps=1)
    convert(1, tmp_path / "run", tmp_path / "c1")
    frames, holes = moving_video(3, 49, 65)
    write_frames(tmp_path / "odd", frames)
    write_frames(tmp_path / "odd-masks", np.repeat(holes[..., None], 3, axis=3))
    run_diffueraser.main([f"--video={tmp_path / 'odd'}", f"--mask={tmp_path / 'odd-masks'}", "--resolution=32",
                          f"--weights={tmp_path / 'c1'}", f"--output_dir={tmp_path / 'out'}", *models])  # fmt: skip
    assert "stage 1, 1 windows of 3 frames" in capsys.readouterr().out
    assert read_result(tmp_path / "out").shape == frames.shape
    assert read_video(tmp_path / "out/result.mp4")[0].shape == (3, 50, 66, 3)  # even, as players need it


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"video": "nothing.mp4"}, "nothing.mp4 does not exist"),
        ({"mask": "nothing"}, "nothing does not exist"),
        ({"video": "noise.mp4"}, "noise.mp4 is no video that can be decoded"),
        ({"video": "blank.mp4"}, "blank.mp4 has no frame that can be decoded"),
        ({"mask": "small.png"}, "small.png is 20x20"),
        ({"mask": "empty.png"}, "marks nothing"),
        ({"mask": "full.png"}, "marks every pixel"),
        ({"mask": "frames"}, "is the clip itself"),
        ({"mask": "three"}, "has 3 masks"),
        ({"weights": "clip"}, "has no unet_main/"),
        ({"nframes": 64}, "takes 32 frames at most"),
        ({"overlap": 40}, "--overlap=40"),
        ({"nframes": 0}, "--nframes=0: 1 or more"),
        ({"num_inference_steps": -3}, "--num_inference_steps=-3: 1 or more"),
        ({"num_inference_steps": 1000}, "--num_inference_steps=1000: 999 at most"),
        ({"resolution": -5}, "--resolution=-5: 8 or more"),
        ({"fps": -1}, "--fps=-1.0: a positive number"),
        ({"fps": "nan"}, "--fps=nan: a positive number"),
        ({"fps": 1e-9}, "--fps=1e-09: a positive number"),
        ({"seed": -1}, "--seed=-1: 0 or more"),
    ],
)
def test_bad_clips_are_one_line(weights, models, clip, capsys, tmp_path, changes, expected):
    noise = np.random.default_rng(0)
    (clip / "noise.mp4").write_bytes(noise.bytes(5000))
    write_mp4(clip / "blank.mp4", moving_video(60, 50, 66)[0], 12)
    cut_short(clip / "blank.mp4", share=0)
    Image.fromarray(np.full((20, 20), 255, np.uint8)).save(clip / "small.png")
    Image.fromarray(np.zeros((50, 66), np.uint8)).save(clip / "empty.png")
    Image.fromarray(np.full((50, 66), 1, np.uint8)).save(clip / "full.png")
    write_frames(clip / "three", np.full((3, 50, 66, 3), 255, np.uint8))
    given = {"video": "frames", "mask": "masks", **changes}
    paths = [f"--{name}={clip / given.pop(name)}" for name in ("video", "mask")]
    given["weights"] = tmp_path / given["weights"] if "weights" in given else weights / "diffuEraser"
    arguments = [*paths, f"--output_dir={tmp_path / 'out'}", *models, *(f"--{name}={given[name]}" for name in given)]
    assert expected in error_line(capsys, run_diffueraser.main, arguments)
    assert not list(tmp_path.glob("out/*"))


def test_no_result_is_lost(weights, models, clip, capsys, monkeypatch):
    """A folder that cannot be written is found before any model loads."""
    monkeypatch.setattr(run_diffueraser, "load_pipeline", None)
    with pytest.raises(SystemExit):
        run_diffueraser.main([f"--video={clip / 'frames'}", f"--mask={clip / 'masks'}", "--output_dir=/proc/x",
                              f"--weights={weights / 'diffuEraser'}", *models])  # fmt: skip
    assert capsys.readouterr().err.startswith("error: --output_dir /proc/x cannot be written to")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--size=8x8"], "argument --size: 16x16 or more was needed, not '8x8'"),
        (["--size=0x0"], "16x16 or more was needed, not '0x0'"),
        (["--size=100x15"], "16x16 or more was needed"),
        (["--no_model", "--baselines"], "leave nothing to score"),
        (["--nframes=0"], "--nframes=0: 1 or more"),
        (["--num_inference_steps=-3"], "--num_inference_steps=-3: 1 or more"),
        (["--output_dir=/proc/x"], "--output_dir /proc/x cannot be written to"),
    ],
)
def test_bad_evaluations_are_one_line(videos, tmp_path, capsys, monkeypatch, arguments, expected):
    monkeypatch.setattr(methods, "load_pipeline", None)
    arguments = [f"--frames={videos / 'DAVIS/JPEGImages/480p'}", f"--output_dir={tmp_path}", *arguments]
    assert expected in error_line(capsys, eval_DiffuEraser.main, arguments)


def test_what_is_a_hole(tmp_path):
    """Any value above 0 in a PNG: grey of 8 and 16 bits, a colour, a palette's index, white where it is opaque."""
    hole = np.zeros((8, 8), bool)
    hole[2:5, 3:7] = True
    indexed = Image.fromarray(hole.astype(np.uint8)).convert("P")
    indexed.putpalette([0, 0, 0, 128, 0, 0])
    indexed.save(tmp_path / "palette.png")
    white = np.full((8, 8, 4), 255, np.uint8)
    white[..., 3] = 255 * hole
    blue = np.zeros((8, 8, 3), np.uint8)
    blue[hole] = (0, 0, 1)
    pictures = {"alpha": white, "colour": blue, "grey": hole.astype(np.uint8), "deep": hole.astype(np.uint16) * 200}
    for name, picture in pictures.items():
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    for name in ("palette", *pictures):
        assert np.array_equal(read_mask(tmp_path / f"{name}.png"), 255 * hole.astype(np.uint8)), name


def test_weights_lie_where_the_variable_says(monkeypatch):
    monkeypatch.setenv("WEIGHTS", "/elsewhere")
    args = run_diffueraser.build_parser().parse_args(["--video=v", "--mask=m", "--output_dir=o"])
    assert args.base_model_name_or_path == "/elsewhere/stable-diffusion-v1-5"
    assert args.vae_path == "/elsewhere/sd-vae-ft-mse"


def test_empty_variables_count_as_not_set(monkeypatch):
    """As under the shell scripts: `PCM_WEIGHTS= python run_diffueraser.py --as_deployed` takes the default file."""
    monkeypatch.setenv("WEIGHTS", "")
    monkeypatch.setenv("PCM_WEIGHTS", "")
    args = run_diffueraser.build_parser().parse_args(["--video=v", "--mask=m", "--output_dir=o", "--as_deployed"])
    assert args.vae_path == "weights/sd-vae-ft-mse"
    with pytest.raises(InputError, match=f"^weights/{PCM_FILE} is missing"):
        check_inference_flags(args)


@pytest.fixture
def masks_of_buoy(videos, tmp_path):
    """A folder of masks that has those of one video."""
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/buoy").symlink_to(videos / "DAVIS/Annotations/480p/buoy")
    return tmp_path / "masks"


def test_masks_of_all_videos_are_looked_for_first(videos, masks_of_buoy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(eval_DiffuEraser.Tools, "load", None)
    with pytest.raises(SystemExit):
        eval_DiffuEraser.main([f"--frames={videos / 'DAVIS/JPEGImages/480p'}", f"--masks={masks_of_buoy}",
                               "--videos", "buoy", "kites", f"--output_dir={tmp_path / 'out'}"])  # fmt: skip
    assert "kites" in capsys.readouterr().err


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def fail(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(InputError, match=r"00000\.png could not be written \(No space left"):
        write_frames(tmp_path, moving_video(5, 16, 16)[0])


def test_a_result_does_not_replace_its_clip(weights, models, clip, capsys):
    with pytest.raises(SystemExit):
        run_diffueraser.main([f"--video={clip / 'frames'}", f"--mask={clip / 'masks'}", f"--output_dir={clip}",
                              f"--weights={weights / 'diffuEraser'}", *models])  # fmt: skip
    assert "the result would replace the clip" in capsys.readouterr().err


def test_frames_too_small_for_the_flow(tmp_path, capsys):
    """OpenCV would end the process without a word."""
    write_frames(tmp_path / "frames/tiny", moving_video(3, 15, 100)[0])
    with pytest.raises(SystemExit):
        eval_DiffuEraser.main([f"--frames={tmp_path / 'frames'}", "--no_model", f"--output_dir={tmp_path / 'out'}"])
    assert "tiny is 100x15: 16x16 or more was needed; use --size" in capsys.readouterr().err


def cut_short(path, share=0.5):
    """Blank what follows the first `share` of the pictures; the index stays, so that the file still opens."""
    content = path.read_bytes()
    pictures, index = content.index(b"mdat") + 4, content.rindex(b"moov") - 4
    end = pictures + int(share * (index - pictures))
    path.write_bytes(content[:end] + bytes(index - end) + content[index:])


def test_a_video_that_ends_early_is_said(weights, models, clip, tmp_path, capsys):
    """The frames that are there are used; masks of the promised length do not fit them."""
    frames, holes = moving_video(60, 50, 66)
    write_mp4(clip / "short.mp4", frames, 12)
    cut_short(clip / "short.mp4", share=0.7)
    write_frames(clip / "sixty", np.repeat(holes[..., None], 3, axis=3))
    settings = [f"--video={clip / 'short.mp4'}", f"--weights={weights / 'diffuEraser'}", "--nframes=32", *models,
                "--num_inference_steps=1", f"--output_dir={tmp_path / 'out'}"]  # fmt: skip
    with pytest.raises(SystemExit):
        run_diffueraser.main([*settings, f"--mask={clip / 'sixty'}"])
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and re.search(r"short\.mp4 ends early: (\d+) frames .* promises 60", warning)
    decoded = int(re.search(r"early: (\d+) frames", warning)[1])
    assert 5 < decoded < 60 and f"has 60 masks, {clip / 'short.mp4'} has {decoded} frames" in error
    run_diffueraser.main([*settings, f"--mask={clip / 'mask.png'}"])
    assert capsys.readouterr().err.splitlines() == [warning]
    assert len(read_result(tmp_path / "out")) == decoded


def test_a_video_cut_without_encoding_is_read(clip, capsys):
    """Its index counts the frames before the cut, which are there but not shown."""
    write_mp4(clip / "whole.mp4", moving_video(60, 50, 66)[0], 12)
    with av.open(clip / "whole.mp4") as whole, av.open(clip / "cut.mp4", "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts = (time - round(0.7 / packet.time_base) for time in (packet.pts, packet.dts))
                packet.stream = stream
                cut.mux(packet)
    frames, _ = read_video(clip / "cut.mp4")
    assert 40 < len(frames) < 60 and "cut.mp4 ends early" in capsys.readouterr().err


def read_scores(path):
    with open(path, newline="") as file:
        return {(row["method"], row["video"]): row for row in csv.DictReader(file)}


def test_eval(weights, videos, models, tmp_path, capsys):
    """Two videos of a list, two folders, rivals: table and CSV; the same seed gives the same scores."""
    arguments = [
        f"--frames={videos / 'DAVIS/JPEGImages/480p'}", "--videos", str(videos / "DAVIS/ImageSets/2017/val.txt"),
        f"--weights={weights / 'diffuEraser'}", f"--baseline={weights / 'diffuEraser'}", "--size=80x48",
        "--rivals", "telea", "mean-colour", *models,
    ]  # fmt: skip
    for output in ("first", "second"):
        eval_DiffuEraser.main([f"--output_dir={tmp_path / output}", *arguments])
    text = capsys.readouterr().out
    assert "buoy: 26 frames of 80x48" in text  # whole videos
    rows = read_scores(tmp_path / "first/scores.csv")
    assert rows == read_scores(tmp_path / "second/scores.csv")
    assert {video for _, video in rows} == {"buoy", "lantern"}
    assert rows["the video itself", "buoy"]["psnr"] == "inf" and rows["telea", "buoy"]["frames"] == "26"
    model = weights / "diffuEraser"
    psnr = [float(rows[name, "buoy"]["psnr_hole"]) for name in ("telea", str(model))]
    assert psnr[0] > psnr[1] > 0  # random weights
    difference = next(line for line in text.splitlines() if line.startswith("difference")).split()
    assert set(difference[2:]) <= {"0.00", "0.0000"}  # of a folder and itself
    assert (tmp_path / "first/lantern.png").is_file()


def test_eval_on_given_masks_without_a_model(videos, masks_of_buoy, tmp_path, capsys):
    flags = [f"--frames={videos / 'DAVIS/JPEGImages/480p'}", f"--masks={masks_of_buoy}", "--no_model",
             f"--output_dir={tmp_path / 'out'}"]  # fmt: skip
    eval_DiffuEraser.main([*flags, "--videos", "buoy"])
    assert "temporal-median" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        eval_DiffuEraser.main([*flags, "--videos", "kites"])
    assert capsys.readouterr().err.startswith("error: ")


def test_half_precision_needs_a_gpu(weights, models, clip, tmp_path, capsys):
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        run_diffueraser.main([f"--video={clip / 'frames'}", f"--mask={clip / 'masks'}", "--mixed_precision=fp16",
                              f"--weights={weights / 'diffuEraser'}", f"--output_dir={tmp_path}", *models])  # fmt: skip
    assert "--mixed_precision=no" in capsys.readouterr().err
