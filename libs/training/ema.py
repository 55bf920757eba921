"""An exponential moving average (EMA) of the weights: smoother than the last step's, which random timesteps shake.

By torch's own update rather than diffusers' EMAModel, whose s - (1 - decay) (s - w) is not w to the bit at decay 0, and
which starts three kernels for each of stage 1's 1,424 tensors, where torch starts one for many.
"""

from contextlib import contextmanager
from pathlib import Path

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common.weights import compare_shapes, read_shapes, read_tensors, shapes_of
from libs.checkpoints.checkpoint import EMA_FILE, saved_keys
from libs.training.log import log


class Ema:
    """The average of all that trains, 4 bytes per parameter, in every process the same. Off where `decay` is None.

    Args:
        model: unwrapped, with the weights that the run starts from, or goes on with.
        checkpoint: the folder that it goes on from, or None.
    """

    def __init__(self, decay, model, checkpoint):
        self.model, self.on = model, decay is not None
        if not self.on:
            return
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.averages = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.average = get_ema_multi_avg_fn(decay)
        start = "the weights that the run starts from"
        if checkpoint:
            resumed = Path(checkpoint, EMA_FILE).is_file()
            start = f"that of {checkpoint}" if resumed else f"the weights of {checkpoint}, which has none"
            if resumed:
                self.load(Path(checkpoint, EMA_FILE))
        log.info("EMA of decay %s, from %s: it is validated and converted", decay, start)

    def update(self):
        """After an optimizer step."""
        if self.on:
            self.average(list(self.averages.values()), list(self.weights.values()), None)

    @contextmanager
    def in_use(self):
        """The model has the averages for a while; its weights' bits are put back, also after an error."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self):
        """In place, as compiled models and CUDA graphs hold on to a weight's memory; no third copy of the model."""
        for name in self.averages if self.on else ():
            weight = self.weights[name].clone()
            self.weights[name].copy_(self.averages[name])
            self.averages[name].copy_(weight)

    def files(self):
        """{file name: {key: tensor}} for a checkpoint, with the keys of model.safetensors; {} where it is off."""
        if not self.on:
            return {}
        state_dict = {**self.model.state_dict(), **self.averages}
        return {EMA_FILE: {key: state_dict[key].contiguous() for key in saved_keys(self.model)}}

    def load(self, file):
        state_dict = self.model.state_dict()
        compare_shapes(shapes_of({key: state_dict[key] for key in saved_keys(self.model)}), read_shapes([file]), file)
        for key, tensor in read_tensors([file]):
            if key in self.averages:
                self.averages[key].copy_(tensor)
