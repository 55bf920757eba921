"""The networks that score a video, each by the flag that names its weights; without it the columns are left out."""

from contextlib import contextmanager
from typing import NamedTuple

from common.hardware import accelerator_or_cpu
from libs.evaluation.lpips import Lpips, load_lpips
from libs.evaluation.metrics import SCORES
from libs.evaluation.removal_coherence import RemovalCoherence, load_dinov2
from libs.evaluation.temporal_consistency import TemporalConsistency, load_clip


class Source(NamedTuple):
    load: callable  # path -> network on the CPU
    columns: tuple
    metavar: str
    help: str


SOURCES = {  # by flag
    "lpips_weights": Source(
        load_lpips, Lpips.columns, "DIR",
        "score LPIPS too: folder with torchvision's alexnet-owt-7be5be79.pth and alex.pth of lpips 0.1"),
    "clip_weights": Source(
        load_clip, TemporalConsistency.columns, "DIR|NAME",
        "score TC too, the cosine of neighbouring frames' CLIP features: a CLIP model's folder or Hub name, such as "
        "openai/clip-vit-large-patch14"),
    "dinov2_weights": Source(
        load_dinov2, RemovalCoherence.columns, "DIR|NAME",
        "score RC-S and RC-T too, whether what is in the hole belongs there: a DINOv2 model's folder or Hub name; "
        "published numbers have facebook/dinov2-giant"),
}  # fmt: skip


def add_network_flags(add):
    """`add`: an argument group's add_argument."""
    for name, source in SOURCES.items():
        add(f"--{name}", metavar=source.metavar, help=source.help)


def load_networks(args, device=None):
    """[network] of those flags that are given, on the GPU if there is one. Raises InputError for bad files."""
    networks = [source.load(getattr(args, name)) for name, source in SOURCES.items() if getattr(args, name, None)]
    for network in networks:
        network.to(device or accelerator_or_cpu())
    return networks


@contextmanager
def on_device(networks, device):
    """For as long as they score: between validations they take none of a GPU's memory."""
    try:
        for network in networks:
            network.to(device)
        yield
    finally:
        for network in networks:
            network.to("cpu")


def missing_networks(args):
    """A line on the scores that were left out for want of a flag; "" where none was."""
    lacking = {name: source.columns for name, source in SOURCES.items() if not getattr(args, name)}
    words = [f"{' and '.join(SCORES[c].heading for c in columns)} (--{name})" for name, columns in lacking.items()]
    return f"left out, as their networks' weights were not named: {', '.join(words)}" if words else ""
