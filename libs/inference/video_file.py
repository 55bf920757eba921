"""Video files through PyAV: what a container says of its frames is honoured, and said of those that are written.

Read: times, turns, colour matrix and range. Written: H.264 that every player and browser shows, with the
clip's times, pixel aspect and sound, in BT.709 and limited range, tagged. Files are opened here and handed to ffmpeg as
streams, so that a name may be any that the file system takes.
"""

import sys
from contextlib import contextmanager, suppress
from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter

from common.errors import InputError

DEFAULT_FPS = 24.0  # of folders of frames, and of videos that do not say
LIKELY_FPS = (1, 240)  # what a container claims beyond that is its clock's rate
FINEST_CLOCK, USUAL_CLOCK = 10**6, 90_000  # ticks a second: finer ones are more than an mp4 holds
LONGEST_LAST = 10  # times the usual: a last frame that is said to stand longer was cut from a longer video
LONGEST_BACK = 0.5  # seconds that a time may lie before the last: more is another file's beginning
MOST_OF = 0.9  # of the duration that a file promises
MOST_TWICE = 0.05  # share of frames that may stand at the same time; more, and there are no true times
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # ITU-T H.273
BT709, BT2020, UNSPECIFIED = 1, 9, (0, 2)  # H.273 again; PyAV takes the numbers
MATRICES = (1, 4, 5, 6, 7, 9)  # those that ffmpeg converts; any other it would take for BT.601
LIMITED_RANGE = 1  # luma 16-235
SD_SIDES = (1279, 576)  # up to this width and height, a video without tags is BT.601, larger ones BT.709, as players do
ACCURATE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
SOUND_OF_BROWSERS = ("aac", "mp3")  # copied; any other is encoded as AAC
LOWEST_MP3 = 16_000  # samples a second: fewer, as old recordings have them, are not allowed in an mp4
AAC_RATES = av.Codec("aac", "w").audio_rates
# Texts and lists that ffmpeg would play
NO_VIDEOS = ("tty", "hls", "concat", "dash", "sdp", "bin", "xbin", "adf", "idf")
DAMAGED = (av.FFmpegError, OSError)  # what reading raises; some of PyAV's errors are the system's
CRF = 10  # x264's quality: hardly a visible loss


class VideoFile:
    """A video file's frames, decoded anew in every pass: memory does not grow with their number.

    Opening decodes the file once, so that whatever cannot be read is said before any work. A file with fewer frames
    than it promises is read as far as it goes, with a line on stderr; so is one in HDR, whose values are not changed.

    Attributes: height and width as shown; time_base, in seconds; pts, a strictly increasing int64 per frame in units of
    time_base; last_duration, of the last frame in the same; start, in seconds, when the first stream begins; fps, the
    mean rate; sample_aspect_ratio; primaries and transfer, numbers of H.273; has_audio.

    Raises: InputError where nothing can be read, or frames differ in size.
    """

    def __init__(self, path):
        self.path = path
        with self.opened() as (container, stream):
            promised, self.time_base, rate = stream.frames, stream.time_base, stream.guessed_rate
            self.sample_aspect_ratio = stream.sample_aspect_ratio or Fraction(1)
            self.has_audio = first_sound(container) is not None
            self.start = Fraction(container.start_time or 0, av.time_base)
            duration = (container.duration or 0) / av.time_base
            end = stream.start_time + stream.duration if stream.duration and stream.start_time is not None else None
        pts, last = [], None
        for frame in self.decoded():
            if last is not None and (frame.width, frame.height) != (last.width, last.height):
                raise InputError(f"{path}: frame {len(pts)} is {frame.width}x{frame.height}, those before are "
                                 f"{last.width}x{last.height}: one size was needed; cut it there")  # fmt: skip
            pts.append(frame.pts)
            last = frame
        if last is None:
            raise InputError(f"{path} has no frame that can be decoded: fetch it again, or convert it with ffmpeg")
        self.set_times(pts, end, rate)
        self.set_looks(last)
        # No error: the number is an estimate, too high in files that were cut without encoding or whose rate varies.
        if len(pts) < promised:
            warn(f"{path} ends early: {len(pts)} frames can be decoded, it promises {promised}; going on with "
                 f"{len(pts)}, fetch it again if its end is missing")  # fmt: skip
        seconds = float((int(self.pts[-1]) + self.last_duration) * self.time_base)
        if not promised and seconds < MOST_OF * duration:
            warn(f"{path} ends early: its frames end after {seconds:.1f} s, the file says {duration:.1f}; going on "
                 f"with {len(pts)}, fetch it again if its end is missing")  # fmt: skip

    def set_looks(self, frame):
        """Note a frame's colours, size and turn as it is shown: `display` is the display matrix's upper left 2x2."""
        self.transfer = BT709 if frame.color_trc in UNSPECIFIED else frame.color_trc
        usual = BT2020 if self.transfer in HDR_TRANSFERS else BT709
        self.primaries = usual if frame.color_primaries in UNSPECIFIED else frame.color_primaries
        if self.transfer in HDR_TRANSFERS:
            warn(f"{self.path} is HDR ({HDR_TRANSFERS[self.transfer]}): its values are used and kept as they are, "
                 "which weights trained on SDR have not seen; convert it to SDR for better results")  # fmt: skip
        matrix = frame.side_data.get("DISPLAYMATRIX")
        self.display = np.frombuffer(matrix, np.int32).reshape(3, 3)[:2, :2] if matrix else np.eye(2)
        self.height, self.width = frame.height, frame.width
        if swaps_sides(self.display):
            self.height, self.width = self.width, self.height
            self.sample_aspect_ratio = 1 / self.sample_aspect_ratio

    def set_times(self, pts, end, rate):
        """Times as they are, uneven or not; the container's rate where frames have none, as in raw streams and AVI.

        Args:
            pts: of every frame, None where it has none, and `end`, of the last one, or None: in units of time_base.
            rate: frames a second as the container says, or None.
        """
        rate = Fraction(rate if rate and LIKELY_FPS[0] <= rate <= LIKELY_FPS[1] else DEFAULT_FPS)
        times = np.array([time for time in pts if time is not None], np.int64)
        steps = np.diff(times)
        if np.any(steps * float(self.time_base) < -LONGEST_BACK):
            warn(f"{self.path}: its times begin anew, as in files that were joined byte by byte: its frames get an "
                 "even rate and no sound; join them with ffmpeg to keep both")  # fmt: skip
            times, self.has_audio = times[:0], False
        if len(times) < len(pts) or np.count_nonzero(steps <= 0) > MOST_TWICE * len(pts):
            self.time_base, self.start, times, end = 1 / rate, Fraction(0), np.arange(len(pts)), len(pts)
        if self.time_base.denominator > FINEST_CLOCK:
            ticks = float(self.time_base * USUAL_CLOCK)
            self.time_base, times, end = Fraction(1, USUAL_CLOCK), np.round(times * ticks).astype(np.int64), None
        order = np.arange(len(pts))
        self.pts = np.maximum.accumulate(times - order) + order  # a time that comes twice is moved by a tick
        # A clock may tick more slowly than the rate, as that of time-lapses in AVI.
        steps = np.diff(self.pts) if len(pts) > 1 else np.array([max(1, round(1 / (rate * self.time_base)))])
        usual, last = max(1, int(np.median(steps))), end - int(self.pts[-1]) if end else 0
        self.last_duration = last if 0 < last <= LONGEST_LAST * usual else usual
        self.fps = float(1 / (Fraction(float(steps.mean())).limit_denominator(10**6) * self.time_base))

    def __len__(self):
        return len(self.pts)

    @contextmanager
    def opened(self):
        """(container, its video stream)."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115 - closed below
        except OSError as error:
            raise InputError(f"{self.path} cannot be read ({error.strerror}): see who may read it") from None
        with file:
            try:
                container = av.open(file, metadata_errors="replace", io_open=refuse_other_file)
            except (*DAMAGED, ValueError):
                container = None
            if container is None or container.format.name in NO_VIDEOS:
                raise InputError(
                    f"{self.path} is no video that can be decoded: convert it with ffmpeg, or give its frames"
                ) from None
            with container:
                stream = container.streams.best("video")
                if stream is None or stream.disposition & Disposition.attached_pic:
                    raise InputError(f"{self.path} has no pictures that move: a video was needed")
                stream.thread_type = "AUTO"
                yield container, stream

    def decoded(self):
        """PyAV's frames, in the order in which they are shown."""
        with self.opened() as (container, stream), suppress(*DAMAGED):  # the file may end in the middle of a packet
            for packet in container.demux(stream):
                with suppress(*DAMAGED):  # a damaged packet; what follows may be whole
                    yield from packet.decode()

    def frames(self, pixels="rgb24"):
        """(height, width, 3) uint8 RGB, one after the other; with "rgba" (height, width, 4)."""
        reformatter = VideoReformatter()
        for frame, _ in zip(self.decoded(), self.pts, strict=False):
            matrix = None
            if frame.colorspace in UNSPECIFIED and not frame.format.is_rgb:
                small = frame.width <= SD_SIDES[0] and frame.height <= SD_SIDES[1]
                matrix = "ITU601" if small else "ITU709"
            rgb = None
            if matrix or frame.format.is_rgb or frame.colorspace in MATRICES:
                with suppress(*DAMAGED, ValueError):
                    rgb = reformatter.reformat(frame, format=pixels, src_colorspace=matrix, interpolation=ACCURATE)
            if rgb is None:
                raise InputError(f"{self.path} has colours ({frame.format.name}, matrix {frame.colorspace}) that "
                                 "cannot be read: convert it to yuv420p with ffmpeg")  # fmt: skip
            yield np.ascontiguousarray(upright(rgb.to_ndarray(), self.display))


def upright(picture, display):
    """A picture (h, w, ...) turned and mirrored as ffmpeg's display matrix says, whose rows are where x and y go."""
    right, down = display[0, 0], display[1, 1]
    if swaps_sides(display):
        picture, right, down = picture.swapaxes(0, 1), display[1, 0], display[0, 1]
    return picture[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]


def swaps_sides(display):
    return abs(display[0, 1]) > abs(display[0, 0])


def refuse_other_file(url, flags, options):
    """Open no other file that a video file names, as playlists do."""
    raise FileNotFoundError(url)


def warn(line):
    print(f"warning: {line}", file=sys.stderr, flush=True)


class VideoWriter:
    """An mp4 written frame by frame, whole also where the program is interrupted.

    with VideoWriter("result.mp4", height, width, source=video) as writer:
        writer.write(frame)
    """

    def __init__(self, path, height, width, fps=None, source=None, crf=CRF):
        """
        Args:
            fps: an even rate; None: the source's own times, or 24 without a source.
            source: the VideoFile that the frames come from; gives times, pixel aspect, and, at its own speed, sound.
            crf: x264's constant rate factor: 6 more halve the file.
        """
        self.path, self.source, self.written, self.durations = path, source, 0, {}
        self.even = (-height % 2, -width % 2)  # 4:2:0 halves both sides
        rate = Fraction(fps or (source.fps if source else DEFAULT_FPS)).limit_denominator(100_000)
        if fps or source is None:
            self.time_base, self.pts = 1 / rate, None
        else:
            self.time_base, self.pts = source.time_base, source.pts - int(source.start // source.time_base)
        self.file = open(path, "wb")  # noqa: SIM115 - closed in __exit__
        self.container = av.open(self.file, "w", format="mp4")
        self.stream = self.container.add_stream("libx264", rate=rate)
        context = self.stream.codec_context
        context.height, context.width = height + self.even[0], width + self.even[1]
        context.pix_fmt, context.time_base = "yuv420p", self.time_base
        # Chroma lies in the middle of four pixels, as swscale makes it.
        context.options = {"crf": str(crf), "x264-params": "chromaloc=1"}
        context.sample_aspect_ratio = source.sample_aspect_ratio if source else Fraction(1)
        context.colorspace, context.color_range = BT709, LIMITED_RANGE
        context.color_primaries = source.primaries if source else BT709
        context.color_trc = source.transfer if source else BT709
        self.reformatter = VideoReformatter()
        self.sound = Sound(self.container, source) if source and source.has_audio and self.pts is not None else None

    def __enter__(self):
        return self

    def write(self, frame):
        """(height, width, 3) uint8 RGB."""
        frame = np.pad(frame, [(0, self.even[0]), (0, self.even[1]), (0, 0)], mode="edge")
        picture = self.reformatter.reformat(
            av.VideoFrame.from_ndarray(frame, format="rgb24"), format="yuv420p", dst_colorspace="ITU709",
            dst_color_range="MPEG", interpolation=ACCURATE,
        )  # fmt: skip
        picture.time_base, picture.pts = self.time_base, self.time_of(self.written)
        self.durations[picture.pts] = self.time_of(self.written + 1) - picture.pts
        self.written += 1
        with writing(self.path):
            self.mux(self.stream.encode(picture))

    def time_of(self, i):
        """When frame `i` is shown, in units of time_base; past the last one, when that ends."""
        if self.pts is None:
            return i
        return int(self.pts[i]) if i < len(self.pts) else int(self.pts[-1]) + self.source.last_duration

    def mux(self, packets):
        for packet in packets:
            if self.sound:  # as far as the pictures, so that neither has to wait in memory
                self.sound.copy_until(packet.dts * packet.time_base)
            packet.duration = self.durations.pop(packet.pts)
            self.container.mux(packet)

    def __exit__(self, kind, error, traceback):
        with writing(self.path), self.file:
            if self.written:
                self.mux(self.stream.encode(None))
                if self.sound:
                    whole = error is None and self.written == len(self.pts)
                    self.sound.copy_until(np.inf if whole else self.time_of(self.written) * self.time_base)
            self.container.close()


@contextmanager
def writing(path):
    """Raises InputError where the disk is full, or the clip is nothing that an mp4 can hold."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path} could not be written ({error.strerror}): free some space, or use --fps") from None


class Sound:
    """The first sound of a VideoFile, carried over into another container: copied, or encoded as AAC."""

    def __init__(self, container, source):
        self.container, self.start, self.last = container, source.start, None
        with source.opened() as (given, _):
            audio = first_sound(given)
            codec = audio.codec_context.codec.canonical_name
            self.encode = codec not in SOUND_OF_BROWSERS or (codec == "mp3" and audio.rate < LOWEST_MP3)
            if self.encode:
                self.stream = container.add_stream("aac", rate=audio.rate if audio.rate in AAC_RATES else 48_000)
            else:
                self.stream = container.add_stream_from_template(audio)
        self.packets = self.read(source)
        self.waiting = next(self.packets, None)

    def read(self, source):
        """Packets for the new stream, as many as can be read."""
        with source.opened() as (container, _):
            audio = first_sound(container)
            shift = round(self.start / audio.time_base)
            try:
                for packet in container.demux(audio):
                    if self.encode:
                        for frame in packet.decode():
                            frame.pts = None if frame.pts is None else frame.pts - shift
                            yield from self.stream.encode(frame)
                    elif packet.dts is not None:
                        packet.pts = packet.dts = packet.dts - shift
                        packet.stream = self.stream
                        yield packet
            except (*DAMAGED, ValueError) as error:  # ValueError: another layout from here on
                warn(f"{source.path}: its sound cannot be read to its end ({error})")
            if self.encode:
                yield from self.stream.encode(None)

    def copy_until(self, seconds):
        while self.waiting is not None and self.waiting.dts * self.waiting.time_base <= seconds:
            dts = self.waiting.dts
            if self.last is None or dts > self.last:  # mp4 takes no other
                self.container.mux(self.waiting)
                self.last = dts
            self.waiting = next(self.packets, None)


def first_sound(container):
    """The first audio stream that ffmpeg knows, or None."""
    return next((audio for audio in container.streams.audio if audio.codec_context), None)
