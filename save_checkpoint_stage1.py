"""Convert a stage 1 checkpoint into unet_main/ (UNet2D) and brushnet/ for inference or stage 2.

Edit the lines below, or give them as options of the same names; --help shows more.
"""

input_dir = "finetune-stage1"  # a checkpoint such as "finetune-stage1/checkpoint-6000"; a run's folder: its newest
output_dir = "converted_weights/finetuned-stage1"
model_config = "weights/diffuEraser"  # only read for checkpoints of the original scripts

if __name__ == "__main__":
    import common.libraries  # noqa: F401
    from libs.checkpoints.convert import main

    main(stage=1, input_dir=input_dir, output_dir=output_dir, model_config=model_config)
