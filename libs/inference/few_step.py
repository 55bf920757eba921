"""Few-step weights: the LoRA of a phased consistency model (PCM, https://arxiv.org/abs/2405.18407), folded into a UNet.

A file has kohya's names: lora_unet_<layer, its dots as underscores>.lora_down.weight (rank, in, ...), .lora_up.weight
(out, rank, ...) and .alpha. Folded, a layer's weight is W + alpha / rank * up @ down, for convolutions too.
"""

import re
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import TCDScheduler
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from common.errors import InputError, and_more
from common.weights import open_weights, shapes_of

PREFIX = "lora_unet_"
PARTS = ("lora_down.weight", "lora_up.weight", "alpha")
MOST_STEPS = 50  # that TCDScheduler's timesteps are chosen from


class FewStepWeights:
    """A file of them, its headers read. Raises: InputError where it is none, or not made for these steps.

    Args:
        steps: how many the sampler is to take; None: as many as the file's name says.
    """

    def __init__(self, file, steps=None):
        self.file = Path(file)
        with open_weights(self.file) as tensors:
            self.shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
        self.steps = choose_steps(self.file, steps)
        self.layers = sorted({key.partition(".")[0] for key in self.shapes})

    def match(self, unet_shapes):
        """{layer in the file: the name of the UNet's weight}: every tensor belongs to a layer, and fits.

        Args:
            unet_shapes: {name: shape} of the UNet's parameters, such as a weights folder's headers give.

        Raises: InputError, naming the first tensor that does not fit, or that layers of one kind have and this lacks.
        """
        weights = {PREFIX + name.removesuffix(".weight").replace(".", "_"): name for name, shape in unet_shapes.items()
                   if name.endswith(".weight") and len(shape) > 1}  # fmt: skip
        foreign = [key for key in sorted(self.shapes) if key.partition(".")[0] not in weights]
        foreign += [key for key in sorted(self.shapes) if key.partition(".")[2] not in PARTS]
        if foreign or not self.shapes:
            what = f"{foreign[0]}{and_more(foreign)} belongs to no layer of the UNet" if foreign else "no tensors in it"
            raise InputError(f"{self.file}: {what}: few-step weights of Stable Diffusion 1.5 in kohya's form, such as "
                             "PCM's, were needed")  # fmt: skip
        for layer in self.layers:
            self.check_layer(layer, unet_shapes[weights[layer]])
        kinds = {kind_of(weights[layer]) for layer in self.layers}
        lacking = [
            layer for layer, name in sorted(weights.items()) if kind_of(name) in kinds and layer not in self.layers
        ]
        if lacking:
            raise InputError(f"{self.file} lacks {lacking[0]}{and_more(lacking)}, and has other layers of its kind: "
                             "incomplete, fetch it again")  # fmt: skip
        return {layer: weights[layer] for layer in self.layers}

    def check_layer(self, layer, weight):
        """Raises InputError where a layer's tensors are not all there, or make no change of its weight's shape."""
        missing = [part for part in PARTS if f"{layer}.{part}" not in self.shapes]
        if missing:
            raise InputError(f"{self.file} lacks {layer}.{missing[0]}: incomplete, or no LoRA in kohya's form")
        rank = self.shapes[f"{layer}.{PARTS[0]}"][:1]
        needed = ((*rank, *weight[1:]), (weight[0], *rank), (1,))
        for part, shape in zip(PARTS, needed, strict=True):
            found = self.shapes[f"{layer}.{part}"]
            if without_ones(found) != without_ones(shape):
                raise InputError(f"{self.file}: {layer}.{part} has shape {found}, {shape} was needed: few-step weights "
                                 "of another model family")  # fmt: skip

    @torch.no_grad()
    def changes(self, unet):
        """Yield (weight, change) of every layer: tensors of one shape on one device, this process's part of a sharded
        weight. The change is fp32."""
        parameters = dict(unet.named_parameters())
        layers = self.match(shapes_of(parameters))
        with open_weights(self.file) as tensors:
            for layer, name in layers.items():
                weight = parameters[name]
                down, up, alpha = (tensors.get_tensor(f"{layer}.{part}").to(weight.device).float() for part in PARTS)
                change = (alpha / len(down) * (up.flatten(1) @ down.flatten(1))).view(weight.shape)
                if isinstance(weight, DTensor):  # every process has read the file: nothing is sent
                    change = distribute_tensor(change, weight.device_mesh, weight.placements, src_data_rank=None)
                    weight, change = weight.to_local(), change.to_local()
                yield weight, change

    @torch.no_grad()
    def fold(self, unet):
        """Change the UNet's weights for good; added up in fp32, whatever type they have."""
        for weight, change in self.changes(unet):
            weight.copy_(weight.float() + change)

    @contextmanager
    @torch.no_grad()
    def folded(self, unet, model=None):
        """The UNet with folded weights for a while; its old weights' bits are put back, also after an error.

        Args:
            model: what the UNet is a part of, where FSDP has sharded that: some of the UNet's weights are gathered with
                the model's own.

        In place, because compiled models, CUDA graphs and FSDP hold on to a weight's memory. The copies of the weights
        that change (3.2 GiB of SD 1.5's UNet in fp32) are gone afterwards.
        """
        originals, model = [], unet if model is None else model
        forget_gathered(model)  # its parameters are the shards then
        try:
            for weight, change in self.changes(unet):
                originals.append((weight, weight.clone()))
                weight.copy_(weight.float() + change)
            yield
        finally:
            for weight, original in originals:
                weight.copy_(original)
            forget_gathered(model)


def forget_gathered(model):
    """Let FSDP gather weights anew; it keeps some between forward passes, and shows them as the parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def kind_of(name):
    """What a weight of any block is: "attentions..proj_in.weight" of "up_blocks.1.attentions.2.proj_in.weight"."""
    return re.sub(r"\d+", "", re.sub(r"^(down_blocks|mid_block|up_blocks)\.(\d+\.)?", "", name))


def without_ones(shape):
    """A shape without its trailing ones: linear layers and 1x1 convolutions are written in either way."""
    return without_ones(shape[:-1]) if shape and shape[-1] == 1 else tuple(shape)


def choose_steps(file, steps):
    """How many steps the sampler takes: those that the file's name says, or `steps` if given. Raises InputError."""
    named = re.search(r"(\d+)[-_]?step", file.name)
    made_for = int(named[1]) if named else None
    if "lcm" in file.name.lower():
        raise InputError(f"{file} needs LCM's sampler: use pcm_sd15_smallcfg_2step_converted.safetensors or its "
                         "siblings of 4, 8 or 16 steps")  # fmt: skip
    if made_for is None and steps is None:
        raise InputError(f"{file}: its name says no number of steps: name it such as {file.stem}_2step.safetensors; "
                         "run and eval may add --num_inference_steps instead")  # fmt: skip
    if made_for and steps not in (None, made_for):
        raise InputError(f"--num_inference_steps={steps}: {file} was made for {made_for}; leave it out, or give "
                         f"the file of {steps} steps")  # fmt: skip
    steps = steps or made_for
    if steps > MOST_STEPS:
        raise InputError(f"--num_inference_steps={steps}: few-step weights take {MOST_STEPS} at most")
    return steps


class FewStepSampler(TCDScheduler):
    """Trajectory consistency sampling (https://arxiv.org/abs/2402.19159) without new noise (eta 0), as PCM is used.

    It remembers nothing from step to step, so that windows may be stepped one after the other.
    """

    def __init__(self, prediction_type="epsilon"):
        super().__init__(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                         timestep_spacing="trailing", prediction_type=prediction_type)  # fmt: skip

    def step(self, model_output, timestep, sample, return_dict=True):
        self._step_index = None  # it is looked up from the timestep
        return super().step(model_output, timestep, sample, eta=0.0, return_dict=return_dict)
