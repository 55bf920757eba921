"""LPIPS: how different two frames look to a network whose layers were weighted by people's judgement.

Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (https://arxiv.org/abs/1801.03924),
version 0.1 with AlexNet, as the package lpips 0.1.4 computes it. That package needs torchvision for five convolutions,
which are written here instead; tests/test_networks.py holds numbers of the package itself.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import InputError
from common.hardware import full_precision
from common.weights import read_state_dict, shapes_of

ALEXNET, LINEAR = "alexnet-owt-*.pth", "alex.pth"
NEEDED = (
    "--lpips_weights needs a folder with two published files: alexnet-owt-7be5be79.pth of torchvision and alex.pth of "
    "lpips (lpips/weights/v0.1)"
)
TAPS = (1, 4, 7, 9, 11)  # the ReLUs that are compared
CHANNELS = (64, 192, 384, 256, 256)  # theirs
SMALLEST = 31  # pixels: of less nothing is left after AlexNet's poolings
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of RGB in -1..1
EPSILON = 1e-10


class Lpips(nn.Module):
    """AlexNet's convolutions, with the names of torchvision's state dict, and a weight for each of their channels."""

    columns = ("lpips", "lpips_hole")

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.linear = nn.ParameterList(torch.empty(1, channels, 1, 1) for channels in CHANNELS)

    def forward(self, first, second):
        """(b, 1, h, w) distances, a map for every layer at that layer's size, of (b, 3, h, w) pictures in -1..1."""
        pairs = zip(self.unit_features(first), self.unit_features(second), self.linear, strict=True)
        return [((a - b).square() * weight).sum(dim=1, keepdim=True) for a, b, weight in pairs]

    def unit_features(self, x):
        """Yield what each tap shows, its channels scaled to length 1 at every position."""
        x = (x - x.new_tensor(SHIFT).view(3, 1, 1)) / x.new_tensor(SCALE).view(3, 1, 1)
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in TAPS:
                yield x / (x.norm(dim=1, keepdim=True) + EPSILON)

    @full_precision()
    @torch.inference_mode()
    def compare(self, truth, result):
        """(LPIPS of a frame, its map (h, w)) of two frames (h, w, 3) uint8 RGB; less is better, 0 is equal.

        Raises: InputError where they are too small.
        """
        height, width = truth.shape[:2]
        if min(height, width) < SMALLEST:
            raise InputError(f"frames of {width}x{height} are too small for LPIPS: {SMALLEST}x{SMALLEST} were needed")
        frames = (torch.from_numpy(frame).to(self.linear[0].device) for frame in (truth, result))
        maps = self(*(frame.permute(2, 0, 1)[None].float() / 127.5 - 1 for frame in frames))
        # As published: the number is the mean of the layers' own maps, and the picture the sum of the enlarged ones.
        whole = sum(layer.mean() for layer in maps).item()
        large = sum(F.interpolate(layer, (height, width), mode="bilinear", align_corners=False) for layer in maps)
        return whole, large[0, 0].cpu().numpy()

    def score(self, video, result):
        """[{column: value}] of the frames that have a hole; [] where the truth is not known. `video`: Reference."""
        found = []
        for t in video.numbers if video.truth is not None else ():
            whole, local = self.compare(video.truth[t], result[t])
            found.append({"lpips": whole, "lpips_hole": float(local[video.holes[t] > 0].mean())})
        return found


def load_lpips(folder):
    """Lpips on the CPU with the weights of the two files in a folder.

    Raises: InputError for anything but the published files, of which every key and shape is checked.
    """
    alexnet = sorted(Path(folder).glob(ALEXNET))
    if not alexnet or not Path(folder, LINEAR).is_file():
        lacking = LINEAR if alexnet else ALEXNET
        raise InputError(f"{folder} has no {lacking}: {NEEDED}" if Path(folder).is_dir() else f"{folder}: {NEEDED}")
    model = Lpips()
    shapes = shapes_of(model.features.state_dict(prefix="features."))
    trunk = read_state_dict(alexnet[0], shapes, NEEDED, lambda key: key.startswith("classifier."))
    shapes = {f"lin{k}.model.1.weight": (1, channels, 1, 1) for k, channels in enumerate(CHANNELS)}
    linear = read_state_dict(Path(folder, LINEAR), shapes, NEEDED)
    weights = {f"linear.{k}": linear[key] for k, key in enumerate(shapes)}
    model.load_state_dict(trunk | weights)
    return model.float().eval().requires_grad_(False)
