"""Reading and writing whole videos and their masks."""

import os
import sys
from pathlib import Path

import cv2
import imageio
import numpy as np

from common.errors import InputError
from common.files import written_whole
from dataset.images import LOSSY_THRESHOLD, binary, list_frames, read_frame, read_mask, size_of

# OpenCV's ffmpeg speaks on stderr of its own; what goes wrong is told below.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

GIF_FPS = 8
CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
MP4_QUALITY = 8  # of imageio's 0-10


def read_video(path):
    """(frames (f, h, w, 3) uint8 RGB, frames per second or None) of a folder of frames, an image, or a video file.

    A file with fewer frames than it promises is read as far as it goes, with a line on stderr.

    Raises: InputError where nothing can be read, or frames differ in size.
    """
    path = Path(path)
    if path.is_dir():
        paths = list_frames(path)
        if not paths:
            raise InputError(f"{path} holds no frames: .jpg or .png files, or a video file, were needed")
        return stack([(file.name, read_frame(file)) for file in paths], path), None
    if not path.is_file():
        raise InputError(f"{path} does not exist: a video file or a folder of frames was needed")
    if is_image(path):
        return read_frame(path)[None], None
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise InputError(f"{path} is no video that can be decoded: convert it with ffmpeg, or give its frames")
        promised, fps = round(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
        frames = []
        while True:
            found, frame = capture.read()
            if not found:
                break
            frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    finally:
        capture.release()
    if not frames:
        raise InputError(f"{path} has no frame that can be decoded: fetch it again, or convert it with ffmpeg")
    # No error: the number is an estimate, too high in files that were cut without re-encoding or whose rate varies.
    if len(frames) < promised:
        print(f"warning: {path} ends early: {len(frames)} frames can be decoded, it promises {promised}; going on with "
              f"{len(frames)}, fetch it again if its end is missing", file=sys.stderr, flush=True)  # fmt: skip
    return np.stack(frames), fps


def is_image(path):
    return Path(path).suffix.lower() in (".jpg", ".jpeg", ".png")


def stack(named_frames, where):
    """Frames of one size as one array."""
    first_name, first = named_frames[0]
    for name, frame in named_frames:
        if frame.shape != first.shape:
            raise InputError(
                f"{where}: {name} is {size_of(frame)}, {first_name} is {size_of(first)}: one size was needed"
            )
    return np.stack([frame for _, frame in named_frames])


def read_masks(path):
    """(f, h, w) uint8, 255 = hole, of a folder of masks, a single mask image, or a mask video.

    Any value above 0 is hole; in videos and JPEGs, whose values are not exact, any above 127.
    """
    path = Path(path)
    if path.is_dir():
        paths = list_frames(path)
        if not paths:
            raise InputError(f"{path} holds no masks: .png or .jpg files were needed")
        return stack([(file.name, read_mask(file)) for file in paths], path)
    if is_image(path) and path.is_file():
        return read_mask(path)[None]
    frames, _ = read_video(path)
    return binary(frames.max(axis=-1), LOSSY_THRESHOLD)


def dilate(holes, iterations):
    """(f, h, w) holes grown by a 3x3 cross, so that an object's rim does not show."""
    return np.stack([cv2.dilate(hole, CROSS, iterations=iterations) for hole in holes]) if iterations else holes


def resize(frames, holes, height, width):
    """Both at another size: frames by area, holes by nearest, so that they stay binary."""
    if holes.shape[1:] == (height, width):
        return frames, holes
    return (
        np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames]),
        np.stack([cv2.resize(hole, (width, height), interpolation=cv2.INTER_NEAREST) for hole in holes]),
    )


def upscale(frames, height, width):
    """The way back from a smaller size."""
    if frames.shape[1:3] == (height, width):
        return frames
    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC) for frame in frames])


def write_gif(path, frames):
    """Write (f, h, w, 3) uint8 frames as a looping GIF of 8 fps; renamed when whole, as a report may look on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        imageio.mimsave(partial, list(frames), format="gif", duration=1000 / GIF_FPS, loop=0)


def write_frames(folder, frames):
    """00000.png and so on, lossless, instead of those that an earlier clip has left there. Raises InputError."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("[0-9][0-9][0-9][0-9][0-9].png"):
        path.unlink()
    for i, frame in enumerate(frames):
        if not cv2.imwrite(str(folder / f"{i:05d}.png"), cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)):
            raise InputError(f"{folder}/{i:05d}.png could not be written: free some space, or see who may write there")


def write_mp4(path, frames, fps):
    """H.264, which every player and browser shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    even = all(side % 2 == 0 for side in frames.shape[1:3])
    imageio.mimsave(
        path, list(frames), format="FFMPEG", fps=fps, codec="libx264", quality=MP4_QUALITY, macro_block_size=1,
        pixelformat="yuv420p" if even else "yuv444p",  # 4:2:0 halves both sides
    )  # fmt: skip
