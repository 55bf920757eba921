"""What a train script says of its stage."""


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
