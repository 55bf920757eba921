"""Stage 2: the motion modules learn to keep time over stage 1's frames.

Only the motion modules are trained; UNet2D's layers and BrushNet are frozen, in half precision on a GPU.
"""

from libs.diffusion import Inpainter
from libs.training import Stage, open_frame_models, run
from libs.unet_motion_model import MotionAdapter, UNetMotionModel


class ClipInpainter(Inpainter):
    """UNetMotion over whole clips; BrushNet, frozen, on every frame on its own."""

    trains_brushnet = False
    _no_split_modules = (*Inpainter._no_split_modules, "AnimateDiffTransformer3D")

    def call_unet(self, noisy_latents, per_clip, per_frame, num_frames, features):
        return self.unet_main(noisy_latents, *per_clip, num_frames=num_frames, **features, return_dict=False)


def freeze(model, frozen_dtype):
    """Leave only the motion modules trainable; the rest is kept in `frozen_dtype`."""
    model.brushnet.requires_grad_(False)
    model.unet_main.freeze_unet2d_params()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(frozen_dtype)
    return model


class Stage2(Stage):
    number = 2
    description = __doc__
    nframes = 22
    inference_steps = 20
    shared_noise = False
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
        return freeze(ClipInpainter(unet_main, opened["brushnet"].load(frozen_dtype)), frozen_dtype)


def main(argv=None):
    run(Stage2, argv)


if __name__ == "__main__":
    main()
