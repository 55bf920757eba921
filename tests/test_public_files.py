"""What people's files are like: names, lists, pictures, masks, containers, and folders that hold something already."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from clips import encode, moving_video, read_masks, read_video, write_frames
from fuzz_files import fuzz
from PIL import Image
from torch._utils import ExceptionWrapper

import eval_DiffuEraser
from common.errors import InputError, one_line
from common.files import OWN_FILES
from common.weights import variant_of, weight_files
from dataset.finetune_dataset import FinetuneDataset
from dataset.folders import read_names, scan_ytvos
from dataset.images import (
    find_hole,
    image_size,
    list_frames,
    pair_by_name,
    read_frame,
    read_mask,
    read_mask_values,
    size_of,
    sort_folders,
)
from libs.inference.video import Masks, open_video
from libs.report.__main__ import write_report

# DAVIS's palette from the background to the eighth object
COLOURS = "000 800 080 880 008 808 088 888 400"
DAVIS_COLOURS = [16 * int(digit, 16) for digit in COLOURS.replace(" ", "")]


# Names and lists


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"kites\nmy kites\n", ["kites", "my kites"]),
        ("\ufeffkites\r\nmarbles\r\n".encode(), ["kites", "marbles"]),
        ("kites\r\n风筝\r\n".encode("utf-16"), ["kites", "风筝"]),
        (b"\n\n kites \n   \nmarbles", ["kites", "marbles"]),
        (b"bou\xe9e\n", ["bou\udce9e"]),  # a folder has these bytes
        ("风筝\r\nkites\r\n".encode("gbk"), "neither UTF-8 nor marked as UTF-16"),
        ("kites\n".encode("utf-16-le"), "UTF-16 without its mark"),
    ],
)
def test_lists(tmp_path, content, expected):
    (tmp_path / "bou\udce9e").mkdir()
    (tmp_path / "list.txt").write_bytes(content)
    if isinstance(expected, list):
        assert read_names(tmp_path / "list.txt", tmp_path) == expected
    else:
        with pytest.raises(InputError, match=expected):
            read_names(tmp_path / "list.txt", tmp_path)


def test_a_name_twice_is_said(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("kites\nkites\nmarbles\n")
    assert read_names(tmp_path / "list.txt", tmp_path) == ["kites", "marbles"]
    assert "names kites more than once" in capsys.readouterr().err


def test_numbers_sort_as_numbers(tmp_path, run, clip):
    frames = np.stack([np.full((48, 64, 3), 20 * i, np.uint8) for i in range(12)])
    folder = tmp_path / "YTBV/JPEGImages/unpadded"
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame_{i}.png")
    assert [path.stem for path in list_frames(folder)] == [f"frame_{i}" for i in range(12)]
    assert run(folder, clip.mask)[0] == 0
    assert np.array_equal(read_video(tmp_path / "out/frames")[0], frames)
    args = SimpleNamespace(davis_root="", ytvos_root=tmp_path / "YTBV", nframes=12, resolution=48)
    levels = FinetuneDataset(args).clip(0, 0).frames[:, 0, 0, 0].astype(int)
    assert set(np.diff(levels)) in ({20}, {-20})


def test_names_that_were_in_order_keep_it():
    """Training samples follow from the videos' order: hexadecimal names stay as text."""
    hexadecimal = [Path(name) for name in ("00f88c4f0a", "0a1b2c3d4e", "1b2c3d4e5f", "9a00000000")]
    assert sort_folders(hexadecimal[::-1]) == hexadecimal
    assert [path.name for path in sort_folders([Path(f"v{i}") for i in (10, 9, 1)])] == ["v1", "v9", "v10"]


def test_numbers_of_other_scripts(tmp_path):
    """Of digits that are no decimal ones, such as in circles or raised, names stay text."""
    names = ["图1①.png", "图1②.png", "图2².png", "图10①.png", "２.png", "１０.png"]  # full-width ones are decimal
    for name in names:
        (tmp_path / name).touch()
    assert {path.name for path in list_frames(tmp_path)} == set(names)
    assert [path.name for path in list_frames(tmp_path) if path.name in names[:4]] == names[:4]
    assert [path.name for path in list_frames(tmp_path) if path.name in names[4:]] == names[4:]


@pytest.mark.parametrize("name", ["2024-01-01T12:30:45", "100%d clip_%03d", "caf\udce9", "我的 clip's"])
def test_any_file_name(run, tmp_path, clip, name, capsys):
    """As a video file, as folders of frames and masks, and as the output folder."""
    video = encode(tmp_path / f"{name}.mp4", clip.frames)
    (tmp_path / name).mkdir()
    mask = clip.mask.rename(tmp_path / name / "00000.png")
    assert run(video, mask.parent, tmp_path / f"{name}-out")[0] == 0
    result = tmp_path / f"{name}-out"
    assert len(read_video(result / "result.mp4")[0]) == len(list_frames(result / "frames")) == 6
    assert run(result / "frames", mask, tmp_path / f"{name}-again")[0] == 0
    eval_DiffuEraser.main([f"--frames={tmp_path}", "--videos", f"{name}-out/frames", "--no_model", "--rivals",
                           "mean-colour", f"--output_dir={tmp_path / name}-scores"])  # fmt: skip
    capsys.readouterr()


def test_training_videos_of_any_name(train, videos, tmp_path):
    """Into the latent cache, the checkpoint's list of videos and the scan too."""
    shutil.copytree(videos / "YTBV", tmp_path / "YTBV")
    folders = sorted((tmp_path / "YTBV/JPEGImages").iterdir())
    folders[0].rename(folders[0].with_name("caf\udce9"))
    train(1, max_train_steps=1, davis_root="", ytvos_root=tmp_path / "YTBV", latent_cache=tmp_path, scan_data=True)
    assert "caf\udce9" in " ".join(json.loads((tmp_path / "run/scan.json").read_text()))


def test_a_relative_name_with_a_colon(run, clip, tmp_path, monkeypatch):
    encode(tmp_path / "12:30.mp4", clip.frames)
    monkeypatch.chdir(tmp_path)
    assert run("12:30.mp4", "mask.png", "out")[0] == 0


def test_what_systems_add_is_passed_over(tmp_path):
    folder = tmp_path / "JPEGImages/clip"
    write_frames(folder, moving_video(3, 16, 16)[0])
    for name in ("__MACOSX", ".ipynb_checkpoints", "@eaDir"):
        write_frames(tmp_path / "JPEGImages" / name, moving_video(3, 16, 16)[0])
    (folder / "._00000.png").write_bytes(b"\0\5\x16\7")
    assert [video.name for video in scan_ytvos(tmp_path)] == ["clip"]
    assert len(list_frames(folder)) == 3


def test_errors_say_what_a_folder_holds(tmp_path, run, clip):
    folder = tmp_path / "root/JPEGImages/clip"
    folder.mkdir(parents=True)
    for i in range(12):
        (folder / f"{i}.heic").write_bytes(b"")
    for call in (lambda: scan_ytvos(tmp_path / "root"), lambda: pair_by_name(folder, clip.folder)):
        with pytest.raises(InputError, match=r"holds.* 12 \.heic files.*\.jpg, \.png, \.webp"):
            call()
    status, _, error = run(folder, clip.mask)
    assert status == 1 and "12 .heic files" in error


# Pictures and masks


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [("jpg", "RGB"), *((s, m) for s in ("png", "webp", "tif") for m in ("RGB", "RGBA")), ("png", "P")],
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_frame_and_mask_are_turned_alike(tmp_path, suffix, mode, orientation):
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:10, :20] = 255
    image = Image.fromarray(picture).convert(mode)
    if mode == "RGBA":
        image.putpixel((47, 31), (0, 0, 0, 0))  # WebP drops an alpha that is opaque everywhere
    image.save(path, exif=exif)
    frame, mask = read_frame(path), read_mask(path)
    assert image_size(path) == size_of(frame) == size_of(mask) == ("48x32" if orientation < 5 else "32x48")
    assert np.mean((frame[..., 0] > 127) == (mask > 0)) > 0.97
    corners = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert frame[corners[orientation]].min() > 200


@pytest.mark.parametrize("suffix", ["bmp", "tif", "webp"])
def test_other_kinds_of_pictures(tmp_path, suffix):
    frames = moving_video(2, 32, 48)[0]
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{i}.{suffix}", lossless=True)
    assert np.array_equal(read_video(tmp_path)[0], frames)


def davis_masks(label, count=1):
    """(whether a pixel is the object, a palette image in DAVIS's colours)."""
    labels = np.zeros((64, 96), np.uint8)
    labels[20:44, 30:66] = label
    image = Image.fromarray(labels, mode="P")
    image.putpalette(DAVIS_COLOURS)
    return labels > 0, image


def check_hole(hole, truth, reach=2):
    """All of the object, and nothing farther from it than compression smears."""
    near = cv2.dilate(truth.astype(np.uint8), np.ones((2 * reach + 1,) * 2)) > 0
    assert (hole[truth] > 0).mean() > 0.98 and not (hole[~near] > 0).any()


@pytest.mark.parametrize("label", [1, 2, 4, 7, 8])
def test_davis_colours_in_any_file(tmp_path, label):
    truth, image = davis_masks(label)
    image.save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png") > 0, truth)
    for quality in (95, 60):
        image.convert("RGB").save(tmp_path / "a.jpg", quality=quality)
        check_hole(read_mask(tmp_path / "a.jpg"), truth)
        Image.open(tmp_path / "a.jpg").save(tmp_path / "b.png")
        check_hole(read_mask(tmp_path / "b.png"), truth)
    frames = np.repeat(np.asarray(image.convert("RGB"))[None], 3, axis=0)
    for hole in read_masks(encode(tmp_path / "a.mp4", frames)):
        check_hole(hole, truth)


@pytest.mark.parametrize("quality", [90, 30])
def test_white_masks_that_were_compressed(tmp_path, quality):
    truth = davis_masks(1)[0]
    Image.fromarray(truth.astype(np.uint8) * 255).save(tmp_path / "a.jpg", quality=quality)
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    for name in ("a.jpg", "a.png"):
        check_hole(read_mask(tmp_path / name), truth)


@pytest.mark.parametrize("quality", [5, 8, 15, 23])
def test_strongly_compressed_masks_of_small_objects(tmp_path, quality):
    """Their background is one value, but not 0, as labels have it."""
    truth = cv2.ellipse(np.zeros((120, 160), np.uint8), (80, 60), (14, 6), 30, 0, 360, 255, -1)
    Image.fromarray(truth).save(tmp_path / "a.jpg", quality=quality)
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    assert cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED)[0, 0] > 0
    for name in ("a.jpg", "a.png"):
        check_hole(read_mask(tmp_path / name), truth > 0, reach=6)


def test_strongly_compressed_boxes_on_the_blocks_of_a_jpeg(tmp_path):
    """Without ripples: two values, neither of them 0."""
    truth = np.zeros((96, 128), np.uint8)
    truth[16:48, 32:96] = 255
    Image.fromarray(truth).save(tmp_path / "a.jpg", quality=15)
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png"), truth)


def test_labels_of_any_number_are_hole():
    labels = np.kron(np.arange(48, dtype=np.uint8).reshape(6, 8), np.ones((12, 12), np.uint8))
    hole, note = find_hole(labels, exact=True)
    assert np.array_equal(hole > 0, labels > 0) and note == "48 values, any above 0 is hole"
    deep, _ = find_hole(labels.astype(np.uint16), exact=True)
    assert np.array_equal(deep, hole)


@pytest.mark.parametrize("brightest", [10, 72, 255])
def test_labels_beside_a_bright_one_are_hole(brightest):
    """An object of value 1 and an area of another, without a shade between them."""
    labels = np.zeros((60, 60), np.uint8)
    labels[5:45, 5:45], labels[50:54, 5:45] = 1, brightest
    hole, note = find_hole(labels, exact=True)
    assert np.array_equal(hole > 0, labels > 0) and note == "3 values, any above 0 is hole"


def test_labels_without_a_palette_are_hole(tmp_path):
    """As Pillow saves them from an array: of its palette only black is written."""
    truth = davis_masks(3)[0]
    Image.fromarray(truth.astype(np.uint8) * 3, mode="P").save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png") > 0, truth)


def test_mattes_are_named_and_their_share_is_printed(run, clip, tmp_path):
    matte = cv2.GaussianBlur(read_mask(clip.mask), (0, 0), 3)
    Image.fromarray(matte).save(tmp_path / "matte.png")
    hole, note = find_hole(*read_mask_values(tmp_path / "matte.png"))
    assert np.count_nonzero(matte > 127) < np.count_nonzero(hole) < np.count_nonzero(matte)
    assert note.startswith("shades of grey")
    status, output, _ = run(clip.folder, tmp_path / "matte.png")
    share = 100 * np.count_nonzero(hole) / hole.size
    assert status == 0 and f"hole {share:.1f} % of the picture; matte.png has shades of grey" in output


def test_animations_are_no_single_picture(run, clip, tmp_path):
    pictures = [Image.fromarray(frame) for frame in clip.frames]
    pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:])
    assert "a.webp holds 6 pictures" in run(tmp_path / "a.webp", clip.mask)[2]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=100)
    assert run(tmp_path / "a.gif", clip.mask)[0] == 0 and open_video(tmp_path / "a.gif").fps == 10


# Folders that hold something already


def test_nobodys_files_are_replaced(run, clip, tmp_path):
    out = tmp_path / "out"
    write_frames(out / "frames", 255 - clip.frames)
    before = {path: path.read_bytes() for path in (out / "frames").iterdir()}
    status, _, error = run(clip.folder, clip.mask)
    assert status == 1 and "holds frames, which no earlier result made" in error and "--overwrite" in error
    assert {path: path.read_bytes() for path in (out / "frames").iterdir()} == before
    assert not (out / "result.mp4").exists()
    write_frames(out / "frames", 255 - np.concatenate([clip.frames] * 2))  # more than the result will have
    before = {path.name: path.read_bytes() for path in (out / "frames").iterdir()}
    assert run(clip.folder, clip.mask, out, "--overwrite")[0] == 0
    assert np.array_equal(read_video(out / "frames")[0], clip.frames)
    assert {path.name: path.read_bytes() for path in (out / "frames.before").iterdir()} == before
    shutil.rmtree(out / "frames")
    (out / OWN_FILES).unlink()
    write_frames(out / "frames", clip.frames)
    status, _, error = run(clip.folder, clip.mask, out, "--overwrite")
    assert status == 1 and "holds frames.before already, where its frames would go" in error


def test_an_input_inside_an_earlier_result(run, clip, tmp_path):
    out = tmp_path / "out"
    assert run(clip.folder, clip.mask, out)[0] == 0
    shutil.copy(clip.mask, out / "frames/00003.png")
    status, _, error = run(clip.folder, out / "frames/00003.png", out)
    assert status == 1 and "the result would replace the clip" in error and (out / "frames/00003.png").is_file()


def test_an_earlier_result_is_replaced(run, clip, tmp_path):
    """Frames of a longer one go, a file of the user's beside them stays."""
    assert run(clip.folder, clip.mask)[0] == 0
    (tmp_path / "out/frames/00099.png").write_bytes(clip.mask.read_bytes())
    write_frames(tmp_path / "short", clip.frames[:2])
    assert run(tmp_path / "short", clip.mask)[0] == 0
    names = [path.name for path in list_frames(tmp_path / "out/frames")]
    assert names == ["00000.png", "00001.png", "00099.png"]


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_what_shares_a_file_with_an_earlier_result_is_kept(run, clip, tmp_path, link):
    """A result that was moved away and linked to, and a copy by `cp -al`."""
    assert run(clip.folder, clip.mask)[0] == 0
    result = tmp_path / "out/result.mp4"
    kept = result.rename(tmp_path / "kept.mp4")
    getattr(result, link)(kept)
    before = kept.read_bytes()
    write_frames(tmp_path / "short", clip.frames[:2])
    assert run(tmp_path / "short", clip.mask)[0] == 0
    assert kept.read_bytes() == before and len(open_video(result)) == 2


def test_nobodys_scores_are_replaced(clip, tmp_path, capsys):
    call = [f"--frames={tmp_path}", "--videos", "clip", "--no_model", "--rivals", "mean-colour",
            f"--output_dir={tmp_path / 'out'}"]  # fmt: skip
    (tmp_path / "out").mkdir()
    (tmp_path / "out/clip.png").write_text("mine")
    with pytest.raises(SystemExit):
        eval_DiffuEraser.main(call)
    assert "holds clip.png, which no earlier result made" in capsys.readouterr().err
    assert (tmp_path / "out/clip.png").read_text() == "mine"
    for _ in range(2):
        (tmp_path / "out/clip.png").unlink()
        eval_DiffuEraser.main(call)
    assert "hole " in capsys.readouterr().out


@pytest.mark.parametrize("place", ["frames/clip", "masks/clip/scores", "linked"])
def test_scores_are_not_written_among_pictures(tmp_path, capsys, place):
    """A contact sheet would be a frame of the next evaluation."""
    frames, holes = moving_video(3, 48, 64)
    write_frames(tmp_path / "frames/clip", frames)
    write_frames(tmp_path / "masks/clip", np.stack([holes] * 3, axis=-1))
    (tmp_path / "linked").symlink_to("frames/clip")
    before = sorted(tmp_path.rglob("*"))
    call = [f"--frames={tmp_path / 'frames'}", f"--masks={tmp_path / 'masks'}", f"--output_dir={tmp_path / place}"]
    with pytest.raises(SystemExit):
        eval_DiffuEraser.main([*call, "--no_model", "--baselines", "mean-colour"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "/clip, where contact sheets would count as frames" in error
    assert sorted(tmp_path.rglob("*")) == before


def test_nobodys_report_is_replaced(train, tmp_path):
    train(1, max_train_steps=1)
    page = tmp_path / "run/report.html"
    page.write_text("mine")
    with pytest.raises(InputError, match=r"holds report\.html, which no earlier result made"):
        write_report(tmp_path / "run")
    assert page.read_text() == "mine"
    write_report(tmp_path / "run", overwrite=True)
    write_report(tmp_path / "run")
    assert "step 1" in page.read_text()
    next((tmp_path / "run").glob("logs*/history.csv")).write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="holds files that are not a training run's"):
        write_report(tmp_path / "run")


def test_what_the_system_refuses_is_one_line(capsys):
    with pytest.raises(SystemExit):
        eval_DiffuEraser.main(["--no_model", f"--frames={'x' * 300}"])
    error = capsys.readouterr().err
    assert error.startswith("error: xxx") and "File name too long" in error and error.count("\n") == 1


def test_names_of_two_lines_are_whole_in_an_error_of_one(run, clip, tmp_path, capsys):
    status, _, error = run(tmp_path / "a\nb.mp4", clip.mask)
    assert status == 1 and error.startswith(f"error: {tmp_path}/a\\nb.mp4 does not exist") and error.count("\n") == 1
    with pytest.raises(SystemExit):
        eval_DiffuEraser.main(["--no_model", "--frames=" + 200 * "a\n"])
    assert capsys.readouterr().err == "error: " + 199 * "a\\n" + "a: File name too long\n"


def test_a_loader_worker_s_error_is_its_last_line():
    try:
        raise InputError("a/0.jpg is empty")
    except InputError:
        caught = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(InputError, match="Traceback") as raised:
        caught.reraise()
    assert one_line(raised.value) == "a/0.jpg is empty"


@pytest.mark.parametrize("which", ["video", "mask"])
def test_what_is_no_file(run, clip, tmp_path, which):
    """Links in a circle, and pipes, as a shell makes them of <(command)."""
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    for name, found in (("circle", "does not exist"), ("pipe", "is neither a file nor a folder")):
        inputs = {"video": clip.folder, "mask": clip.mask, which: tmp_path / name}
        status, _, error = run(**inputs)
        assert (
            status == 1
            and error == f"error: {tmp_path / name} {found}: a video file or a folder of frames was needed\n"
        )


def test_variants_are_named_and_taken_where_they_are(tmp_path):
    (tmp_path / "model.fp16.safetensors").write_bytes(b"")
    names = ("model", "pytorch_model")
    with pytest.raises(InputError, match=r"it has model\.fp16\.safetensors: add --variant=fp16"):
        weight_files(tmp_path, None, names)
    assert weight_files(tmp_path, "fp16", names) == [tmp_path / "model.fp16.safetensors"]
    (tmp_path / "model.fp16.safetensors").rename(tmp_path / "model.safetensors")
    assert weight_files(tmp_path, "fp16", names) == [tmp_path / "model.safetensors"]
    assert variant_of(tmp_path, "fp16", names) is None


def test_damaged_files_are_one_line():
    outcomes, failures, _ = fuzz(80)
    assert not failures and min(outcomes.values()) > 10


def test_masks_are_one_size(tmp_path):
    write_frames(tmp_path / "masks", moving_video(1, 16, 16)[0])
    Image.fromarray(np.zeros((20, 16), np.uint8)).save(tmp_path / "masks/1.png")
    with pytest.raises(InputError, match=r"1\.png is 16x20, 00000\.png is 16x16: one size"):
        Masks(tmp_path / "masks")
