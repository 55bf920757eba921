"""Stage 2: the motion modules learn to keep time over stage 1's frames.

Only the motion modules are trained; UNet2D's layers and BrushNet are frozen, in half precision on a GPU.
"""

import common.libraries  # noqa: F401
from libs.inpainter import ClipInpainter, open_frame_models, train_motion_modules_only
from libs.training.loop import run
from libs.training.stage import Stage
from libs.unet_motion_model import MotionAdapter, UNetMotionModel


class Stage2(Stage):
    description = __doc__
    model_class = ClipInpainter
    gib_per_frame = (1.85, 1.1, 0.25)

    @staticmethod
    def open_models(config):
        source = {"revision": config.revision, "variant": config.variant}
        motion_modules = MotionAdapter.open_motion_part(config.motion_adapter_path, **source)
        return {**open_frame_models(config.pretrained_stage1, config.variant), "motion_modules": motion_modules}

    @staticmethod
    def load_models(opened, frozen_dtype):
        unet_main = UNetMotionModel.from_unet2d(opened["unet_main"].load(), opened["motion_modules"].load())
        return train_motion_modules_only(ClipInpainter(unet_main, opened["brushnet"].load(frozen_dtype)), frozen_dtype)


def main(argv=None):
    run(Stage2, argv)


if __name__ == "__main__":
    main()
