"""Stage 1: UNet2D and BrushNet learn to fill holes in single frames.

Everything in both models is trained; the frames of a clip do not see each other.
"""

import common.libraries  # noqa: F401
from common.command_line import require
from libs.brushnet_CA import BrushNetModel
from libs.inpainter import FrameInpainter, open_frame_models
from libs.training.loop import run
from libs.training.stage import Stage
from libs.unet_2d_condition import UNet2DConditionModel


class Stage1(Stage):
    description = __doc__
    model_class = FrameInpainter
    gib_per_frame = (2.1, 1.3, 0.13)

    @staticmethod
    def open_models(config):
        if config.pretrained_stage1_path:
            require(
                not config.brushnet_model_name_or_path,
                f"--brushnet_model_name_or_path={config.brushnet_model_name_or_path}: BrushNet is also in "
                f"--pretrained_stage1_path={config.pretrained_stage1_path}: leave one of both out (by an empty "
                "PRETRAINED_STAGE1_PATH, under the shell script)",
            )
            return open_frame_models(config.pretrained_stage1_path, config.variant)
        source = {"revision": config.revision, "variant": config.variant}
        brushnet = config.brushnet_model_name_or_path
        return {
            "unet_main": UNet2DConditionModel.open(config.base_model_name_or_path, "unet", **source),
            "brushnet": BrushNetModel.open(brushnet, **source) if brushnet else None,
        }

    @staticmethod
    def load_models(opened, frozen_dtype):
        unet = opened["unet_main"].load()
        brushnet = opened["brushnet"].load() if opened["brushnet"] else BrushNetModel.from_unet(unet)
        return FrameInpainter(unet, brushnet)


def main(argv=None):
    run(Stage1, argv)


if __name__ == "__main__":
    main()
