"""What a train script says of its stage."""

from pathlib import Path

from libs.brushnet_CA import BrushNetModel
from libs.unet_2d_condition import UNet2DConditionModel


class Stage:
    """Which models a stage has, where their weights come from, and what is trained."""

    description: str
    model_class: type  # the Inpainter of this stage
    gib_per_frame: tuple[float, float, float]  # measured at full size, 512x512: plain, compiled, with recomputation

    def __init_subclass__(cls):
        cls.number = cls.model_class.stage

    @staticmethod
    def open_models(config):
        """Check the stage's weights folders without reading a tensor: {name: OpenedWeights or None}."""

    @staticmethod
    def load_models(opened, frozen_dtype):
        """The Inpainter, its frozen parameters in `frozen_dtype`."""


def open_frame_models(folder, variant=None):
    """{name: OpenedWeights} of a converted folder, or of DiffuEraser's: the 2D part of unet_main/, and brushnet/."""
    return {
        "unet_main": UNet2DConditionModel.open_2d_part(Path(folder, "unet_main"), variant=variant),
        "brushnet": BrushNetModel.open(Path(folder, "brushnet"), variant=variant),
    }
