"""Convert a stage 2 checkpoint into unet_main/ (UNetMotion) and brushnet/ for inference.

Edit the lines below, or give them as options of the same names; --help shows more.
"""

input_dir = "finetune-stage2"  # a checkpoint such as "finetune-stage2/checkpoint-6000"; a run's folder: its newest
output_dir = "converted_weights/finetuned-stage2"
pretrained_stage1 = "converted_weights/finetuned-stage1"  # what the run started from: its weights stayed as they were
model_config = "weights/diffuEraser"  # only read for checkpoints of the original scripts
variant = None  # of the files in pretrained_stage1, such as "fp16"
export_motion_adapter = False  # also write motion_adapter/, which diffusers' MotionAdapter loads

if __name__ == "__main__":
    import common.libraries  # noqa: F401
    from libs.checkpoints.convert import main

    main(
        stage=2,
        input_dir=input_dir,
        output_dir=output_dir,
        pretrained_stage1=pretrained_stage1,
        model_config=model_config,
        variant=variant,
        export_motion_adapter=export_motion_adapter,
    )
