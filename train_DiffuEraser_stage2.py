"""Stage 2: the motion modules learn to keep time over stage 1's frames.

Only the motion modules are trained; UNet2D's layers and BrushNet are frozen, in half precision on a GPU.
"""

from libs.inpainter import ClipInpainter, train_motion_modules_only
from libs.training.loop import run
from libs.training.stage import Stage, open_frame_models
from libs.unet_motion_model import MotionAdapter, UNetMotionModel


class Stage2(Stage):
    number = 2
    description = __doc__
    model_class = ClipInpainter
    trained = ("motion_modules",)
    gib_per_frame = (1.85, 1.2, 0.25)

    @staticmethod
    def add_model_flags(add):
        add(
            "--pretrained_stage1",
            default="converted_weights/finetuned-stage1",
            metavar="DIR",
            help="converted stage 1: unet_main/ and brushnet/, both frozen here",
        )
        add("--motion_adapter_path", default="weights/animatediff-motion-adapter-v1-5-2", metavar="DIR",
            help="motion modules to start from: a MotionAdapter folder, or a UNetMotion's such as "
            "weights/diffuEraser/unet_main, which works better")  # fmt: skip

    @staticmethod
    def open_models(args):
        source = {"revision": args.revision, "variant": args.variant}
        motion_modules = MotionAdapter.open_motion_part(args.motion_adapter_path, **source)
        return {**open_frame_models(args.pretrained_stage1), "motion_modules": motion_modules}

    @staticmethod
    def load_models(opened, frozen_dtype):
        unet_main = UNetMotionModel.from_unet2d(opened["unet_main"].load(), opened["motion_modules"].load())
        return train_motion_modules_only(ClipInpainter(unet_main, opened["brushnet"].load(frozen_dtype)), frozen_dtype)


def main(argv=None):
    run(Stage2, argv)


if __name__ == "__main__":
    main()
