"""What people's videos are like: times, colours, turns, sound, containers; read and written."""

import os
import tracemalloc
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.stream import Disposition
from clips import CopyingPipeline, encode, moving_video, read_video, write_frames
from PIL import Image

import run_diffueraser
from common.errors import InputError
from libs.inference.video import Masks, open_video
from libs.inference.video_file import VideoWriter

# A chart of eight known colours
BARS = np.array([191, 0, 0, 0, 191, 0, 0, 0, 191, 191, 191, 0, 0, 191, 191, 191, 0, 191, 191, 191, 191, 74, 203, 221])
BARS = BARS.reshape(8, 3)


def bars(height=64, width=256):
    return np.repeat(BARS.astype(np.uint8), width // 8, axis=0)[None].repeat(height, axis=0)


def bars_error(frame):
    width = frame.shape[1] // 8
    shown = frame[frame.shape[0] // 2, width // 2 :: width].astype(int)
    return np.abs(shown - BARS).max()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pixels": "yuvj420p", "full": True, "tags": (1, 2)},
        {"matrix": "ITU601", "tags": (6, 1)},
        {"matrix": "ITU601", "tags": None},  # small and untagged
        {"codec": "libvpx-vp9", "container": "webm"},
        {"codec": "libsvtav1"},
        {"codec": "libx264rgb", "pixels": "rgb24", "tags": None, "container": "matroska"},
    ],
    ids=["709", "full", "601", "untagged", "vp9", "av1", "rgb"],
)
def test_colours_in_and_out(run, tmp_path, settings):
    """A chart of known colours, within 3 levels, in frames/ and in the tagged result.mp4."""
    chart = [bars()] * 2
    mask = np.zeros((64, 256), np.uint8)
    mask[:8, :8] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert run(encode(tmp_path / "chart", chart, **settings), tmp_path / "mask.png")[0] == 0
    assert bars_error(read_video(tmp_path / "out/frames")[0][0]) <= 3
    assert bars_error(read_video(tmp_path / "out/result.mp4")[0][0]) <= 3
    with av.open(tmp_path / "out/result.mp4") as result:
        context = result.streams.video[0].codec_context
        tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        assert tags == (1, 1, 1, 1) and context.pix_fmt == "yuv420p" and context.profile == "High"


def test_large_videos_without_tags_are_709(tmp_path):
    chart = bars(720, 1280)
    video = open_video(encode(tmp_path / "a.mp4", [chart], tags=None))
    assert bars_error(next(video.frames())) <= 3


def test_hdr_is_named_and_kept(run, clip, tmp_path):
    path = encode(
        tmp_path / "a.mp4", clip.frames, pixels="yuv420p10le", codec="libx265", tags=(9, 1, 18), matrix="BT2020"
    )
    status, _, errors = run(path, clip.mask)
    assert status == 0 and errors.count("\n") == 1 and "a.mp4 is HDR (HLG)" in errors
    with av.open(tmp_path / "out/result.mp4") as result:
        context = result.streams.video[0].codec_context
        assert (context.color_primaries, context.color_trc) == (9, 18)


def times(path):
    video = open_video(path)
    return [float((t - video.pts[0]) * video.time_base) for t in video.pts]


@pytest.mark.parametrize(("container", "codec", "sound"), [("mp4", "libx264", "aac"), ("webm", "libvpx", "libopus")])
def test_uneven_times_and_sound_are_kept(run, clip, tmp_path, container, codec, sound):
    given = encode(tmp_path / "clip.x", clip.frames, codec, container, times=(0, 200, 400, 433, 466, 500),
                   time_base=Fraction(1, 1000), sound=sound)  # fmt: skip
    assert open_video(given).fps == 10
    assert run(given, clip.mask)[0] == 0
    result = tmp_path / "out/result.mp4"
    assert times(result) == pytest.approx([0, 0.2, 0.4, 0.433, 0.466, 0.5], abs=1e-3)
    with av.open(result) as shown:
        audio = shown.streams.audio[0]
        assert audio.codec_context.name == "aac"
        samples = np.concatenate([frame.to_ndarray()[0] for frame in shown.decode(audio)])
        assert float(audio.duration * audio.time_base) == pytest.approx(0.5, abs=0.05)
        assert np.abs(samples).max() > 0.1


def test_an_even_rate_has_no_sound(run, clip, tmp_path):
    given = encode(tmp_path / "clip.mp4", clip.frames, sound="aac")
    assert run(given, clip.mask, tmp_path / "out", "--fps=20")[0] == 0
    result = open_video(tmp_path / "out/result.mp4")
    assert result.fps == 20 and not result.has_audio


def test_raw_streams_have_the_usual_rate(clip, tmp_path):
    video = open_video(encode(tmp_path / "clip.avi", clip.frames, container="avi"))
    assert len(video) == 6 and video.fps == 10  # AVI's frames have no times of their own


def test_one_frame_of_a_time_lapse(run, clip, tmp_path):
    """Its clock ticks once in ten seconds."""
    path = encode(tmp_path / "a.avi", clip.frames[:1], "mjpeg", "avi", pixels="yuvj420p", time_base=Fraction(10))
    assert run(path, clip.mask)[0] == 0
    assert open_video(path).fps == pytest.approx(0.1) and len(read_video(tmp_path / "out/result.mp4")[0]) == 1


def test_turned_videos_are_shown_upright(run, tmp_path):
    frames, holes = moving_video(4, 48, 64)
    path = encode(tmp_path / "a.mp4", frames, rotation=90, aspect=Fraction(4, 3))
    Image.fromarray(np.rot90(holes[0])).save(tmp_path / "mask.png")
    assert run(path, tmp_path / "mask.png")[0] == 0
    shown = read_video(tmp_path / "out/frames")[0]
    errors = [np.abs(shown[0].astype(int) - np.rot90(frames[0], turns)).mean() for turns in (1, 3)]
    assert errors[0] < 15 < errors[1]  # of chroma, and of the opposite turn
    result = open_video(tmp_path / "out/result.mp4")
    assert (result.height, result.width, result.sample_aspect_ratio) == (64, 48, Fraction(3, 4))
    Image.fromarray(holes[0]).save(tmp_path / "lying.png")  # as the frames lie in the file
    status, _, error = run(path, tmp_path / "lying.png")
    assert status == 1 and "lying.png is 64x48" in error and "turn --mask" in error


@pytest.mark.parametrize("display", [(-1, 0, 0, 1), (1, 0, 0, -1), (0, -1, -1, 0), (0, 1, 1, 0)])
def test_mirrored_videos_are_shown_as_they_play(tmp_path, display):
    """Where a display matrix sends x and y, as cameras and editors write it into the track's header."""
    frames = moving_video(2, 48, 64)[0]
    content = encode(tmp_path / "a.mp4", frames).read_bytes()
    matrix = np.array([1, 0, 0, 0, 1, 0, 0, 0, 1 << 14]) << 16
    turned = matrix.copy()
    turned[[0, 1, 3, 4]] = np.array(display) << 16
    place = content.index(matrix.astype(">i4").tobytes(), content.index(b"tkhd"))
    (tmp_path / "a.mp4").write_bytes(
        content[:place] + turned.astype(">i4").tobytes() + content[place + turned.astype(">i4").nbytes :]
    )
    (xx, xy), (_, yy) = np.reshape(display, (2, 2))
    expected = frames[0].swapaxes(0, 1)[::xy, ::xy] if xy else frames[0][::yy, ::xx]  # x goes down, y goes right
    shown = next(open_video(tmp_path / "a.mp4").frames())
    assert shown.shape == expected.shape and np.abs(shown.astype(int) - expected).mean() < 15


def test_files_joined_byte_by_byte(run, clip, tmp_path):
    part = encode(tmp_path / "a.ts", [*clip.frames, *clip.frames], container="mpegts", sound="aac").read_bytes()
    (tmp_path / "a.ts").write_bytes(part + part)
    status, _, errors = run(tmp_path / "a.ts", clip.mask)
    assert status == 0 and errors.count("\n") == 1 and "its times begin anew" in errors
    assert times(tmp_path / "out/result.mp4") == pytest.approx(np.arange(24) / 10, abs=1e-3)


@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [
        ("matroska", "pcm_s16le", 37800),
        ("mov", "pcm_s24le", 192000),
        ("matroska", "ac3", 48000),
        ("avi", "libmp3lame", 11025),
    ],
)
def test_sound_of_any_rate_and_codec_is_aac(run, clip, tmp_path, container, codec, rate):
    given = encode(tmp_path / "a", clip.frames, container=container, sound=codec, sound_rate=rate)
    assert run(given, clip.mask)[0] == 0
    with av.open(tmp_path / "out/result.mp4") as shown:
        assert shown.streams.audio[0].codec_context.name == "aac" and any(shown.decode(audio=0))


def test_a_cover_is_no_video(run, clip, tmp_path):
    """A picture that belongs to a song."""
    with av.open(tmp_path / "song.mp4", "w") as song:
        sound = song.add_stream("aac", rate=8000)
        cover = song.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        song.mux(cover.encode(av.VideoFrame.from_ndarray(clip.frames[0], format="rgb24")) + cover.encode(None))
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        tone.rate = 8000
        song.mux(sound.encode(tone) + sound.encode(None))
    status, _, error = run(tmp_path / "song.mp4", clip.mask)
    assert status == 1 and error.count("\n") == 1 and "no pictures that move" in error


def test_matrices_that_cannot_be_converted_are_refused(run, clip, tmp_path):
    status, _, error = run(encode(tmp_path / "a.mp4", clip.frames, tags=(8, 1)), clip.mask)
    assert status == 1 and error.count("\n") == 1 and "matrix 8" in error


def test_a_tagged_gamut_is_kept(run, clip, tmp_path):
    assert run(encode(tmp_path / "a.mp4", clip.frames, tags=(1, 1, 13), primaries=12), clip.mask)[0] == 0
    with av.open(tmp_path / "out/result.mp4") as result:
        context = result.streams.video[0].codec_context
        assert (context.color_primaries, context.color_trc) == (12, 13)


def test_transparent_pixels_of_mask_videos_are_no_hole(clip, tmp_path):
    pictures = [Image.new("RGBA", (64, 48), (255, 255, 255, 0)) for _ in range(2)]
    for picture in pictures:
        picture.paste((255, 255, 255, 255), (10, 10, 20, 20))
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], disposal=2)
    assert Masks(tmp_path / "a.gif").shares[0] == pytest.approx(100 / (48 * 64))


@pytest.mark.parametrize("size", [(47, 64), (48, 63), (47, 63)])
def test_odd_sizes_are_even_in_the_mp4_only(run, tmp_path, size):
    frames, holes = moving_video(2, *size)
    write_frames(tmp_path / "clip", frames)
    Image.fromarray(holes[0]).save(tmp_path / "mask.png")
    assert run(tmp_path / "clip", tmp_path / "mask.png")[0] == 0
    assert np.array_equal(read_video(tmp_path / "out/frames")[0], frames)
    assert read_video(tmp_path / "out/result.mp4")[0].shape == (2, 48, 64, 3)


@pytest.mark.parametrize(
    "content", [b"", b"hello\n" * 500, b"#EXTM3U\n#EXTINF:1,\nclip.mp4\n"], ids=["empty", "text", "list"]
)
def test_what_is_no_video(run, clip, tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    status, _, error = run(tmp_path / "a.mp4", clip.mask)
    assert status == 1 and error.count("\n") == 1 and "is no video that can be decoded" in error


def test_an_interrupted_result_plays(tmp_path):
    """Ctrl-C in the middle: what was written is whole."""
    frames = moving_video(9, 48, 64)[0]
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4", 48, 64, 10) as writer:
        for i, frame in enumerate(frames):
            if i == 5:
                raise KeyboardInterrupt
            writer.write(frame)
    assert len(read_video(tmp_path / "a.mp4")[0]) == 5


def test_memory_does_not_grow_with_the_clip(tmp_path, monkeypatch):
    """Reading, composing and writing hold what two cores read ahead, of a clip of 120 frames of 1.4 MB."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    frame = np.random.default_rng(0).integers(0, 256, (480, 960, 3), np.uint8)
    with VideoWriter(tmp_path / "a.mp4", 480, 960) as writer:
        for _ in range(120):
            writer.write(frame)
    mask = np.zeros((480, 960), np.uint8)
    mask[:9, :9] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    args = SimpleNamespace(video=tmp_path / "a.mp4", mask=tmp_path / "mask.png", mask_dilation=4, soft_edge=0, seed=0,
                           fps=None, as_deployed=False, prior="none")  # fmt: skip
    tracemalloc.start()
    video, masks = run_diffueraser.open_clip(args)
    clip = run_diffueraser.prepare(video, masks, args)
    result = run_diffueraser.remove_object(CopyingPipeline(), None, clip, None, (48, 96), args)
    run_diffueraser.write_result(tmp_path, video, result, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * frame.nbytes and len(open_video(tmp_path / "result.mp4")) == 120


def test_a_full_disk_while_writing_is_one_line():
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    expected = pytest.raises(InputError, match=r"full could not be written \(No space left")
    with expected, VideoWriter("/dev/full", 480, 640, 10) as writer:
        for _ in range(30):
            writer.write(noise)
