"""Pictures in folders: how a frame and a mask are read, in which order they come, and which of them belong together.

Files are read as bytes and decoded from memory, so that a name may be any that the file system takes.
"""

import io
import os
import re
import struct
import warnings
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from common.command_line import require
from common.errors import InputError

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what goes wrong is told below

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
KINDS = ".jpg, .png, .webp, .bmp or .tif files"
SYSTEM_NAMES = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db")
MOST_PIXELS = 2**26  # 8192 x 8192; a damaged header may promise gigabytes
NOISE = 24  # of 255: what compression leaves in a mask's background stays below
MANY = 0.05  # share of a mask's bright pixels; fewer grey ones are its edges
PALETTE = b"\x03"  # a PNG's colour type, in its 26th byte
JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
START_OF_FRAME = (b"\xc0", b"\xc1", b"\xc2")  # the segments that hold a JPEG's size: baseline, extended, progressive
# What Pillow raises for files that are damaged or cut short.
UNREADABLE = (OSError, ValueError, SyntaxError, IndexError, KeyError, TypeError, OverflowError, struct.error)
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class BrokenFrame(InputError):
    """A frame that is no whole image of its video's size; `video` names what it belongs to, if not the clip's own."""

    def __init__(self, message, video=None):
        super().__init__(message)
        self.video = video


def read_frame(path):
    """(h, w, 3) uint8, RGB, upright as EXIF says, alpha left out. Raises BrokenFrame for whatever is no whole image."""
    return decode(path, read_bytes(path), cv2.IMREAD_COLOR_RGB)


def read_bytes(path):
    """An image file's content. Raises BrokenFrame for what can be told broken without decoding."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise BrokenFrame(f"{path} cannot be read ({error.strerror})") from None
    if not content:
        raise BrokenFrame(f"{path} is empty")
    if content.startswith(b"version https://git-lfs"):
        raise BrokenFrame(f"{path} is a Git LFS pointer, not an image: run git lfs pull")
    scan = scan_jpeg if content.startswith(JPEG) else scan_png if content.startswith(PNG) else scan_other
    height, width, whole = scan(content)
    if not whole:  # OpenCV would fill the rest of a JPEG with grey
        raise BrokenFrame(f"{path} is cut short ({len(content)} bytes)")
    if height * width > MOST_PIXELS:
        raise BrokenFrame(f"{path} promises more than {MOST_PIXELS} pixels: a damaged header")
    return content


def decode(path, content, mode):
    """What OpenCV makes of an image file's content, (h, w) or (h, w, channels); `mode` is one of its cv2.IMREAD_*."""
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), mode)
    except (cv2.error, MemoryError):  # more pixels than OpenCV, or this machine, takes
        image = None
    if image is None:
        raise BrokenFrame(f"{path} is no readable image ({len(content)} bytes)")
    return image


def scan_jpeg(jpeg):
    """(height, width, whether the picture is whole, whatever follows it): cameras append previews and videos.

    The end marker is looked for behind the leading segments, one of which may hold a thumbnail with a marker of its
    own; in the picture's data it cannot occur by chance, as an ff there is followed by 00 or a restart marker.
    """
    place, height, width = 2, 0, 0
    while jpeg[place : place + 1] == b"\xff" and jpeg[place + 1 : place + 2] != b"\xda":  # start of the picture's data
        if jpeg[place + 1 : place + 2] == b"\xff":  # any number of them may fill the space before a marker
            place += 1
            continue
        if jpeg[place + 1 : place + 2] in START_OF_FRAME:
            height, width = (int.from_bytes(jpeg[place + k : place + k + 2], "big") for k in (5, 7))
        place += 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
    return height, width, jpeg.rfind(b"\xff\xd9", place) >= 0


def scan_png(png):
    """The same of a PNG, whose chunks say how long they are: OpenCV would allocate what a damaged one says."""
    whole = any(name == b"IEND" for name, _, _ in png_chunks(png))
    return int.from_bytes(png[20:24], "big"), int.from_bytes(png[16:20], "big"), whole


def png_chunks(png):
    """Yield (name, start, end) of a PNG's chunks, up to IEND: length, name, data and checksum are png[start:end]."""
    end, name = len(PNG), b""
    while end < len(png) and name != b"IEND":
        start, name = end, png[end + 4 : end + 8]
        end += 12 + int.from_bytes(png[start : start + 4], "big")
        yield name, start, end


def scan_other(content):
    """The same of any other image, taken for whole; its size is (0, 0) where Pillow does not know it."""
    try:
        with pillow(io.BytesIO(content)) as image:
            return image.height, image.width, True
    except Image.DecompressionBombError:
        return MOST_PIXELS, 2, True
    except UNREADABLE:
        return 0, 0, True


@contextmanager
def pillow(file):
    """An image file opened by Pillow, whose header alone is read, and which is not to say what it thinks of it."""
    with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
        yield image


def image_size(path):
    """Such as 854x480: the size of what `read_frame` and `read_mask` return, from the file's header alone."""
    try:
        with pillow(path) as image:
            turned = orientation(image) in TURNED
            width, height = image.size
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no readable image ({error}): fetch it again") from None
    return f"{height}x{width}" if turned else f"{width}x{height}"


def orientation(image):
    """EXIF's, 1 to 8, of a file opened by Pillow; 1, upright, of TIFFs, which Pillow and OpenCV turn themselves."""
    return 1 if image.format == "TIFF" else image.getexif().get(0x0112, 1)


def upright(picture, image):
    """What OpenCV or Pillow decoded as it lies in the file (h, w, ...), turned as the file's EXIF says."""
    found = orientation(image)
    picture = picture.swapaxes(0, 1) if found in TURNED else picture
    columns, rows = -1 if found in (2, 3, 6, 7) else 1, -1 if found in (3, 4, 7, 8) else 1
    return np.ascontiguousarray(picture[::rows, ::columns])


def read_frames(paths, read=read_frame):
    """Frames, or what else `read` makes of pictures, of one size."""
    frames = [read(path) for path in paths]
    for path, frame in zip(paths, frames, strict=True):
        if frame.shape != frames[0].shape:
            raise BrokenFrame(f"{path} is {size_of(frame)}, {paths[0].name} is {size_of(frames[0])}")
    return frames


def size_of(frame):
    """Such as 854x480, of a frame (480, 854, 3) or a mask (480, 854)."""
    return f"{frame.shape[1]}x{frame.shape[0]}"


def read_mask(path):
    """(h, w) uint8, 255 = hole. See `find_hole`."""
    return find_hole(*read_mask_values(path))[0]


def read_mask_values(path):
    """A mask file's own values (h, w) uint8 or uint16, and whether they are exact, which JPEG and lossy WebP are not.

    Of colours the brightest channel; transparent pixels are 0.
    """
    content = read_bytes(path)
    if has_palette(content):
        indices, values = read_palette(path, content)
        return cv2.LUT(indices, values), True
    mask = decode(path, content, cv2.IMREAD_UNCHANGED)
    if mask.ndim == 3 and mask.shape[2] == 4:
        mask = np.where(mask[..., 3] > 0, mask[..., :3].max(axis=-1), 0)
        with suppress(*UNREADABLE), pillow(io.BytesIO(content)) as image:
            mask = upright(mask, image)  # OpenCV turns nothing that it reads with alpha
    else:
        mask = decode(path, content, cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR)  # turned as EXIF says
        mask = mask.max(axis=-1) if mask.ndim == 3 else mask
    lossy = content.startswith(JPEG) or (content.startswith(b"RIFF") and b"VP8 " in content[:64])
    return mask, not lossy


def has_palette(content):
    return content.startswith(PNG) and content[25:26] == PALETTE


def read_palette(path, content):
    """A palette PNG's indices (h, w) uint8, and the value (256,) uint8 of each: 0 = background.

    The background is what is black or transparent, as its index may be any: Pillow's `quantize` puts white first. Where
    nothing is black, it is index 0, as labels have it. Where the whole palette is, the indices are the values: labels
    are saved without a palette too.
    """
    if not checksums_agree(content):  # Pillow skips those of the pixels
        raise BrokenFrame(f"{path} is no readable image (its checksums do not agree)")
    try:
        with pillow(io.BytesIO(content)) as image:
            image.apply_transparency()
            colours = np.array(image.getpalette("RGBA"), np.uint8).reshape(-1, 4)
            indices = upright(np.array(image), image)
    except UNREADABLE as error:
        raise BrokenFrame(f"{path} is no readable image ({error})") from None
    values = np.zeros(256, np.uint8)
    values[: len(colours)] = colours[:, :3].max(axis=1)
    if not values.any():
        values = np.arange(256, dtype=np.uint8)
    elif len(colours) > 1 and values[: len(colours)].all():  # one colour alone is a frame that is all hole
        values[0] = 0
    values[: len(colours)][colours[:, 3] == 0] = 0
    return indices, values


def checksums_agree(png):
    """Whether a whole PNG's chunks agree with their checksums; those that readers may skip do not count."""
    return all(
        zlib.crc32(png[start + 4 : end - 4]) == int.from_bytes(png[end - 4 : end], "big")
        for name, start, end in png_chunks(png)
        if name[:1].isupper()
    )


def find_hole(values, exact):
    """(hole (h, w) uint8, 255 = hole; what is worth saying about a mask that is not two-valued, or "").

    Labels and drawn masks are exact: any value above 0 is hole. Compressed masks and mattes are not: their hole is what
    is brighter than a quarter of the brightest value, as DAVIS's colours are 64 to 192 and compression's ripples less.

    Args:
        values: (h, w) of a mask in its own units.
        exact: whether the file keeps values as they were drawn.
    """
    if values.dtype != np.uint8:
        values = scale_to_bytes(values)
    brightest = int(values.max())
    grey = (values > NOISE) & (values < brightest * 3 // 4)
    shaded = np.count_nonzero(grey) > MANY * np.count_nonzero(values > NOISE)
    if exact and not was_compressed(values, grey, shaded):
        levels = np.count_nonzero(np.bincount(values.ravel()))
        threshold, note = 0, f"{levels} values, any above 0 is hole" if levels > 2 else ""
    else:
        threshold = max(NOISE, brightest // 4)
        note = f"shades of grey, what is above {threshold} of 255 is hole" if shaded else ""
    return np.where(values > threshold, 255, 0).astype(np.uint8), note


def was_compressed(values, grey, shaded):
    """Whether a mask (h, w) uint8, whose file keeps values as they are, was compressed before it was saved there.

    Labels are areas of one value, whatever value that is. What was compressed is near 0 or near the brightest, with
    shades between them at every edge; soft edges are no areas. Its background may be one: strong compression makes it
    one value that is not 0.

    Args:
        grey: (h, w) bool, what is neither background nor near the brightest.
        shaded: whether that is more than its edges.
    """
    inner, grey = values[1:, 1:], grey[1:, 1:]
    faint = (inner > 0) & (inner < NOISE)
    if values.max() <= NOISE or not faint.any():
        return False
    if values.min() > 0:  # without a background of 0, every pixel would be hole
        return True
    flat = (inner == values[1:, :-1]) & (inner == values[:-1, 1:])
    areas = shaded and np.count_nonzero(flat & grey) > 0.25 * np.count_nonzero(grey)
    sharp = np.count_nonzero(np.bincount(values.ravel())[NOISE + 1 :]) == 1
    return flat[faint].mean() <= 0.5 or not (areas or sharp or values.max() < 3 * NOISE)


def scale_to_bytes(values):
    """Deeper values as uint8, those above 0 at least 1."""
    if not np.issubdtype(values.dtype, np.integer):
        top = max(values.max(), 1)
    elif values.max() > 255:
        top = np.iinfo(values.dtype).max
    else:
        top = 255  # labels, in 16 bits
    return np.where(values > 0, np.clip(values * (255.0 / top), 1, 255), 0).astype(np.uint8)


def is_hidden(name):
    """Of files and folders that systems add and nobody looks at, such as ._00000.jpg of macOS."""
    return name.startswith(".") or name in SYSTEM_NAMES


def natural_key(name):
    """Numbers as numbers: 2 before 10. Names that are padded with zeros keep their order."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], name  # int takes no ² or ①


def sort_folders(folders):
    """Folders of videos: by number where all names are one text around a number, else as text.

    YouTube-VOS's names are hexadecimal, and training samples follow from the videos' order.
    """
    texts = {re.sub(r"[0-9]+", "0", path.name, count=1) for path in folders}
    numbered = len(texts) == 1 and not re.search(r"0.*[0-9]", next(iter(texts)))
    return sorted(folders, key=lambda path: natural_key(path.name) if numbered else path.name)


def list_frames(folder):
    """A folder's images in the order of their names, numbers as numbers; hidden files are none.

    Raises: BrokenFrame where two have one name, such as a frame and its mask.
    """
    names = [n for n in os.listdir(folder) if n.lower().endswith(FRAME_SUFFIXES) and not is_hidden(n)]
    paths = tuple(Path(folder, name) for name in sorted(names, key=lambda n: (natural_key(Path(n).stem), n)))
    for path, following in pairwise(paths):
        if path.stem == following.stem:
            raise BrokenFrame(f"{folder} holds {path.name} and {following.name}: one picture per frame was needed")
    return paths


def describe_content(folder):
    """Such as "12 .gif files, 2 folders": what an error says of a folder without frames."""
    with os.scandir(folder) as entries:
        kinds = Counter(
            "folder" if entry.is_dir() else f"{Path(entry.name).suffix or 'nameless'} file"
            for entry in entries
            if not is_hidden(entry.name)
        )
    counts = [f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in kinds.most_common(3)]
    return ", ".join(counts) or "nothing"


def pair_by_name(images, masks, flags=("--validation_image", "--validation_mask")):
    """[(frame path, mask path)] of a video, in the frames' order; every frame needs a mask of its name."""
    for folder, flag, content in zip((images, masks), flags, ("frames", "masks"), strict=True):
        require(Path(folder).is_dir(), f"{folder} is no folder: {flag} needs folders of {content}")
    require(
        Path(images).resolve() != Path(masks).resolve(),
        f"{masks} is the frames' own folder: {flags[1]} needs folders of masks",
    )
    frames = list_frames(images)
    require(
        frames,
        f"{images} holds no frames but {describe_content(images)}: {flags[0]} needs folders with {KINDS} in them",
    )
    by_name = {path.stem: path for path in list_frames(masks)}
    missing = [path.name for path in frames if path.stem not in by_name]
    if missing:
        raise InputError(
            f"{masks} has no mask for {len(missing)} of the {len(frames)} frames in {images}, such as {missing[0]}: "
            f"{flags[1]} needs a mask of every frame's name (it holds {describe_content(masks)})"
        )
    return [(path, by_name[path.stem]) for path in frames]
