"""TC: the mean cosine of CLIP's image features of neighbouring frames, of a whole video; more is better.

Frames are prepared as CLIP's authors do. Published numbers compare only where all of this is the same, and the field
does not agree on it: VideoPainter takes ViT-B/32 on squeezed frames without CLIP's normalisation
(https://github.com/TencentARC/VideoPainter: evaluate/metrics.py), others ViT-L/14 or ViT-H/14 as here.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import CLIPVisionModelWithProjection

from common.hardware import full_precision
from libs.evaluation.vision_model import load_vision_model, normalize

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of RGB in 0..1
NEEDED = "--clip_weights needs a CLIP model's folder or Hub name, such as openai/clip-vit-large-patch14"


class TemporalConsistency(nn.Module):
    columns = ("tc",)

    def __init__(self, model):
        super().__init__()
        self.model, self.side = model, model.config.image_size

    def prepare(self, frame):
        """(side, side, 3) uint8: the centre of a frame whose shorter side was brought to CLIP's."""
        height, width = frame.shape[:2]
        shorter = min(height, width)
        size = [self.side if side == shorter else int(self.side * side / shorter) for side in (width, height)]
        picture = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))
        top, left = ((side - self.side) // 2 for side in picture.shape[:2])
        return picture[top : top + self.side, left : left + self.side]

    @full_precision()
    @torch.inference_mode()
    def describe(self, frame):
        """The (d,) image feature, of length 1."""
        pixels = normalize(self.prepare(frame), MEAN, STD, self.model.device)
        return F.normalize(self.model(pixel_values=pixels).image_embeds[0], dim=0)

    def score(self, video, result):
        """[{"tc": cosine}] of every two neighbouring frames. `video`: Reference, which says nothing here."""
        features = torch.stack([self.describe(frame) for frame in result])
        return [{"tc": cosine.item()} for cosine in (features[1:] * features[:-1]).sum(dim=1)]


def load_clip(path):
    """TemporalConsistency with the image half of a CLIP model, on the CPU."""
    types = ("clip", "clip_vision_model")
    return TemporalConsistency(load_vision_model(CLIPVisionModelWithProjection, path, types, NEEDED))
