"""Clips for tests: written and read whole, encoded as other programs do, and copied by run_diffueraser.py."""

from fractions import Fraction
from types import SimpleNamespace

import av
import cv2
import numpy as np
import torch

from libs.inference.video import Masks, open_video, write_image
from libs.inference.video_file import ACCURATE, VideoWriter

OPTIONS = {"libx264": {"crf": "5"}, "libvpx": {"deadline": "realtime"}}


def moving_video(length, height, width, pan=1, hole_speed=2):
    """(frames (f, h, w, 3) uint8: a smooth texture that pans, holes (f, h, w) uint8: a square that moves)."""
    rng = np.random.default_rng(7)
    coarse = rng.uniform(0, 255, (8, 24, 3)).astype(np.float32)
    texture = cv2.resize(coarse, (width + pan * length, height), interpolation=cv2.INTER_LINEAR)
    frames = np.stack([texture[:, pan * t : pan * t + width] for t in range(length)]).astype(np.uint8)
    holes = np.zeros((length, height, width), np.uint8)
    side = height // 3
    for t in range(length):
        left = (4 + hole_speed * t) % (width - side)
        holes[t, 6 : 6 + side, left : left + side] = 255
    return frames, holes


def read_video(path):
    """(frames (f, h, w, 3) uint8 RGB, frames per second or None) of a whole clip."""
    video = open_video(path)
    return np.stack(list(video.frames())), video.fps


def read_masks(path):
    """(f, h, w) uint8, 255 = hole, of all masks."""
    return np.stack(list(Masks(path).frames()))


def write_frames(folder, frames):
    """00000.png and so on, lossless."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(frames):
        write_image(folder / f"{i:05d}.png", frame)


def write_mp4(path, frames, fps):
    """(f, h, w, 3) uint8 RGB at an even rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, *frames.shape[1:3], fps) as writer:
        for frame in frames:
            writer.write(frame)


def encode(path, frames, codec="libx264", container="mp4", times=None, time_base=Fraction(1, 10), sound=None,
           pixels="yuv420p", matrix="ITU709", full=False, tags=(1, 1), rotation=None, aspect=None,
           sound_rate=48000, primaries=None):  # fmt: skip
    """A video file as other programs write them; `tags` are matrix and range, or None, and `sound` a codec."""
    times = range(len(frames)) if times is None else times
    with open(path, "wb") as file, av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=1 / time_base, options=OPTIONS.get(codec, {}))
        context = stream.codec_context
        context.height, context.width, context.pix_fmt, context.time_base = *frames[0].shape[:2], pixels, time_base
        if tags:
            context.colorspace, context.color_range = tags[:2]
            context.color_trc = tags[2] if len(tags) > 2 else 1
        if primaries:
            context.color_primaries = primaries
        if rotation:
            stream.set_display_rotation(rotation)
        if aspect:
            context.sample_aspect_ratio = aspect
        audio = out.add_stream(sound, rate=sound_rate) if sound else None
        for time, frame in zip(times, frames, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format=pixels, dst_colorspace=matrix, dst_color_range="JPEG" if full else "MPEG", interpolation=ACCURATE
            )
            picture.pts, picture.time_base = time, time_base
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
        if audio:
            samples = np.sin(np.arange(int(48000 * (times[-1] + 1) * time_base)) / 17) * 9000
            tone = av.AudioFrame.from_ndarray(samples.astype(np.int16)[None], format="s16", layout="mono")
            tone.rate, tone.pts, tone.time_base = 48000, 0, Fraction(1, 48000)
            out.mux(audio.encode(tone))
            out.mux(audio.encode(None))
    return path


class CopyingPipeline:
    """Fills holes with what is there, so that frames in are frames out."""

    nframes, device = 8, torch.device("cpu")
    windows = SimpleNamespace(at_step=lambda length, number: [(0, length)])

    def count_work(self, length, with_prior):
        return length

    def stream(self, frames, holes, prompt_embeds, seed, prior, progress):
        return iter(frames)
