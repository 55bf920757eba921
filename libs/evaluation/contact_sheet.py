"""Contact sheets, and samples in TensorBoard and Weights & Biases."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 6  # frames of a sheet, spread evenly over time
TILE_SIDE = 160  # of a tile's longer side
MARGIN, LINE = 108, 20  # left of the tiles, for the rows' labels; height of a line of text
GAP = 4


def contact_sheet(title, frames, holes, result):
    """(h, w, 3) uint8: input, mask, masked input, result and their difference, one row each, over time.

    Args:
        frames, result: (f, h, w, 3) uint8 RGB.
        holes: (f, h, w) uint8, non-zero = hole.
    """
    f, height, width = holes.shape
    scale = min(1, TILE_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    chosen = np.unique(np.linspace(0, f - 1, COLUMNS).round().astype(int))
    hole = holes[..., None] > 0
    rows = {
        "input": frames,
        "mask (white = hole)": np.where(hole, 255, np.zeros_like(frames)),
        "masked input": np.where(hole, 0, frames),
        "result": result,
        "|result - input|": np.abs(result.astype(int) - frames),
    }
    font, title_font = ImageFont.load_default(12), ImageFont.load_default(13)
    columns = {t: MARGIN + k * (size[0] + GAP) for k, t in enumerate(chosen)}  # where they begin, in pixels
    lines = {label: 2 * LINE + k * (size[1] + GAP) for k, label in enumerate(rows)}
    content = max(len(columns) * (size[0] + GAP), round(title_font.getlength(title)) + GAP)
    sheet = Image.new("RGB", (MARGIN + content, 2 * LINE + len(lines) * (size[1] + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 2), title, "black", title_font)
    for t, x in columns.items():
        draw.text((x, LINE + 2), f"frame {t}", "#555555", font)
    for label, y in lines.items():
        draw.multiline_text((4, y + 2), label.replace(" (", "\n("), "black", font)
        for t, x in columns.items():
            tile = Image.fromarray(rows[label][t].astype(np.uint8)).resize(size, Image.Resampling.BOX)
            sheet.paste(tile, (x, y))
    return np.asarray(sheet)


def stack_sheets(sheets):
    """Sheets below each other, the narrower ones filled up with white."""
    width = max(sheet.shape[1] for sheet in sheets)
    padded = [
        np.pad(sheet, ((0, 2 * GAP), (0, width - sheet.shape[1]), (0, 0)), constant_values=255) for sheet in sheets
    ]
    return np.concatenate(padded)


def show_in_tracker(tracker, step, gifs, sheet):
    """The samples in TensorBoard's images or W&B's media.

    Args:
        tracker: one of accelerate's.
        gifs: {video: path of a GIF}.
        sheet: path of the contact sheet.
    """
    if tracker.name == "tensorboard":
        # As `add_video` would store it, which needs another package to make the GIF.
        for name, path in {**gifs, "contact_sheet": sheet}.items():
            add_encoded_image(tracker.writer, f"samples/{name}", path.read_bytes(), step)
    elif tracker.name == "wandb":
        import wandb

        media = {f"samples/{name}": wandb.Video(str(path), format="gif") for name, path in gifs.items()}
        tracker.log({**media, "samples/contact_sheet": wandb.Image(str(sheet))}, step=step)


def add_encoded_image(writer, tag, content, step):
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height = Image.open(io.BytesIO(content)).size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
