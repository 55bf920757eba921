"""Imports the large libraries in half the time: scripts import it before anything else.

What is imported stays: to search it for garbage after every 700 new objects takes a third of the time. Another sixth
goes to bitsandbytes, which diffusers imports for quantized models; here it is for 8-bit optimizers, which import it.
"""
# ruff: noqa: E402, F401

import gc

gc.disable()

import diffusers.utils.import_utils

diffusers.utils.import_utils._bitsandbytes_available = False

import diffusers.models.unets.unet_motion_model
import transformers.models.clip.modeling_clip

gc.freeze()
gc.enable()
