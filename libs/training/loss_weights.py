"""How much an error counts, by where it lies: in the hole, on its rim, or in the rest of the picture."""

import argparse
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Mean difference over a latent's pixels, in [-1, 1], from which on two pictures differ: 8 of 255 levels. JPEG leaves
# less in flat areas; the edge of a shadow, or an object in an eighth of the pixels, more.
NOTICEABLE = 8 / 127.5


@dataclass(frozen=True)
class LossWeights:
    hole: float
    rim: float  # known latents within `rim_width` of the hole
    rest: float
    rim_width: int  # latents, of 8 pixels each

    @classmethod
    def of(cls, config):
        """A run's; None where all errors count alike, and the loss is the plain mean."""
        hole, rim, rest = config.loss_weights
        return None if hole == rim == rest else cls(hole, rim, rest, config.loss_rim)

    def map(self, latent_masks, masks, pixel_values, masked_pixel_values):
        """The weight of every latent, (N, 1, h, w).

        Where the conditioning shows something other than what is learned (a pasted object, its shadow), that has to be
        cleared: it counts as the hole does.

        Args:
            latent_masks, masks: (N, 1, h, w) and (N, 1, 8h, 8w), 1 = keep, 0 = hole.
            pixel_values: (N, 3, 8h, 8w) in [-1, 1], what is learned.
            masked_pixel_values: the same of what is shown around the hole.
        """
        difference = (pixel_values - masked_pixel_values).abs().mean(dim=1, keepdim=True) * masks
        to_clear = F.adaptive_avg_pool2d(difference, latent_masks.shape[-2:]) > NOTICEABLE
        hole = (latent_masks == 0) | to_clear
        near = F.max_pool2d(hole.float(), 2 * self.rim_width + 1, stride=1, padding=self.rim_width) > 0
        outside = torch.where(near, self.rim, self.rest)
        return torch.where(hole, self.hole, outside)


def loss_weights(text):
    """'4,2,1' as the three weights [hole, rim, rest]."""
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != 3 or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise argparse.ArgumentTypeError(
            f"three numbers hole,rim,rest such as 4,2,1 were needed, none below 0 and not all 0, not {text!r}"
        )
    return weights
