"""How the run is distributed, as accelerate's configuration chose: one process, DDP or FSDP2.

What these do differently stands here; training, checkpoints and converters see whole tensors and one error.
"""

import math
import os
import re
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
    parse_flag_from_env,
)

from common.errors import InputError, first_line
from common.hardware import gpu_is_used

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}


def distributed_type():
    """Either "fsdp" or "ddp" (one process included), as `accelerate launch` passes it on."""
    return "fsdp" if parse_flag_from_env("ACCELERATE_USE_FSDP") else "ddp"


def check_distributed(args):
    """What the distributed type needs is there. Raises InputError; returns the type and the processes in words."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise InputError(
            "the configuration asks for DeepSpeed, which is not supported: FSDP2 shards the same state with "
            "ACCELERATE_CONFIG=configs/accelerate/fsdp.yaml"
        )
    sharded = distributed_type() == "fsdp"
    if sharded and not gpu_is_used():
        raise InputError(
            "the configuration asks for fsdp, and accelerate shards on GPUs only, of which none was found: use "
            "ACCELERATE_CONFIG=configs/accelerate/multi_gpu.yaml"
        )
    if sharded and os.environ.get("FSDP_VERSION") != "2":
        raise InputError(
            "FSDP of version 1 is not supported: set fsdp_version: 2, as configs/accelerate/fsdp.yaml does"
        )
    if sharded and args.use_8bit_adam:
        raise InputError("--use_8bit_adam does not go with fsdp, which shards the optimizer state: drop one of them")
    if sharded and args.compile:
        raise InputError("--compile does not go with fsdp, whose layers gather their weights: drop it (COMPILE=0)")
    if sharded and args.ema_decay is not None:
        raise InputError("--ema_decay does not go with fsdp, which shards the weights: drop it (EMA_DECAY=)")
    processes, machines = count_processes(), count_machines()
    if args.cuda_graph:
        check_cuda_graph(args, sharded, processes, machines)
    if processes == 1:
        return "fsdp, one process" if sharded else "one process"
    return f"{distributed_type()}, {processes} processes" + (f" on {machines} machines" if machines > 1 else "")


def check_cuda_graph(args, sharded, processes, machines):
    """One graph holds a whole step of DDP, and nothing watches what it sends for a machine that is lost."""
    other = "FSDP" if sharded else "several machines" if machines > 1 else None
    if processes > 1 and args.gradient_accumulation_steps > 1:
        other = other or "--gradient_accumulation_steps on several GPUs"
    if other:
        raise InputError(f"--cuda_graph does not go with {other}: drop it (CUDA_GRAPH=0)")


def count_processes():
    """Processes of all machines together, as `accelerate launch` passes it on."""
    return int(os.environ.get("WORLD_SIZE", 1))


def count_processes_here():
    """Processes of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def count_machines():
    return math.ceil(count_processes() / count_processes_here())


def make_accelerator(args):
    accelerator = Accelerator(
        # Several processes without a GPU (gloo): accelerate would let each of them train on its own.
        cpu=count_processes() > 1 and not torch.accelerator.is_available(),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir, args.logging_dir))),
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        step_scheduler_with_optimizer=False,  # the loop steps it, once per optimizer step in every process
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=args.distributed_timeout)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # no second copy of the gradients
        ],
    )
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        raise InputError(
            f"accelerate's configuration says gradient_accumulation_steps: {accelerator.gradient_accumulation_steps}, "
            f"the run --gradient_accumulation_steps={args.gradient_accumulation_steps}: take the line out of the file"
        )
    if accelerator.is_fsdp2 and accelerator.mixed_precision != "no":
        from torch.distributed.fsdp import MixedPrecisionPolicy  # a second of every launcher's start, if above

        # Layers compute in half precision and gradients are averaged in fp32, as with DDP and autocast.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=DTYPES[accelerator.mixed_precision], reduce_dtype=torch.float32
        )
    return accelerator


def autocast_under_fsdp(accelerator, model):
    """FSDP2 gives layers half-precision weights without autocast, which fp32 inputs such as position tables would not
    fit."""
    dtype = DTYPES[accelerator.mixed_precision]
    if accelerator.distributed_type == DistributedType.FSDP and dtype != torch.float32:
        model.forward = torch.autocast(accelerator.device.type, dtype)(model.forward)


def unsharded(value):
    """A tensor that FSDP2 may have spread over the processes, as a plain one."""
    return value.full_tensor() if hasattr(value, "full_tensor") else torch.as_tensor(value)


def unsharded_state_dict(accelerator, model, keys):
    """{key: tensor} of a sharded model, on the CPU of the main process, and {} in the others.

    All processes take part, tensor by tensor: no GPU ever holds more than one of them.
    """
    state_dict = accelerator.unwrap_model(model).state_dict()
    result = {}
    for key in keys:
        tensor = unsharded(state_dict[key].detach())
        if accelerator.is_main_process:
            result[key] = tensor.cpu().contiguous()
    return result


def sum_over_processes(accelerator, value):
    """What all processes decide by, together: one that went its own way would leave the others waiting."""
    return accelerator.reduce(torch.tensor(float(value), device=accelerator.device), "sum").item()


def refuse_differences(accelerator, facts):
    """Raise InputError, naming the first thing that differs, where the {name: value} of the processes are not equal."""
    if accelerator.num_processes == 1:
        return
    first, *others = gather_object([facts])
    for index, other in enumerate(others, start=1):
        for name, value in first.items():
            if other[name] != value:
                raise InputError(
                    f"{name} is {value} in process 0 and {other[name]} in process {index}: all machines need the same "
                    "settings, weights and data, and one output folder that they share"
                )


@contextmanager
def lost_processes_named(output_dir):
    """Turn the errors of torch's communication into one line: another process is gone, or cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        # NCCL's are of a subclass, gloo's are plain RuntimeErrors.
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        # Without the source line in front and the advice behind: "Timed out waiting 1800000ms for recv operation ..."
        reason = re.sub(r"^\[[^]]*\] *", "", first_line(error)).split(". ")[0]
        raise InputError(
            f"another process has ended or cannot be reached ({reason}): see the logs of the other machines, then run "
            f"the same command on all of them to go on from the newest checkpoint in {output_dir}"
        ) from None
