"""A prior: a rough fill of the holes that sampling starts from, where DiffuEraser takes ProPainter's result."""

from libs.evaluation.baselines import median_plate, telea, with_plate
from libs.inference.streams import Mapped, pick

ON_THE_SPOT = ("telea", "median", "none")  # what else --prior takes beside a path
MEDIAN_FRAMES = 100  # of a clip, spread over it, that a median is taken of: 123 MB at 854x480


def make_prior(name, frames, holes):
    """A stream of filled frames, made when read, of streams of frames and holes; None for "none".

    telea: each frame for itself. median: each pixel's median over up to 100 frames of the clip that show it, which is
    its true background where a mask moves and the camera stands.
    """
    if name == "none":
        return None
    if name == "telea":
        return Mapped(lambda frame, hole: telea(frame[None], hole[None])[0], frames, holes)
    count = min(len(frames), MEDIAN_FRAMES)
    numbers = [i * len(frames) // count for i in range(count)]
    plate, never_seen = median_plate(pick(frames, numbers), pick(holes, numbers))
    return Mapped(lambda frame, hole: with_plate(frame, hole, plate, never_seen), frames, holes)
