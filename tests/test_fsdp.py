"""Runs under FSDP2, on the CPU: the losses and weights of one plain process."""

import re

import fsdp_on_cpu
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from forked import finish, start
from safetensors.torch import load_file

from libs.checkpoints.convert import convert

FINAL = "unet_main/diffusion_pytorch_model.safetensors"


def losses(log):
    return [float(loss) for loss in re.findall(r"step \d+/\d+  loss ([\d.]+)", log)]


def run_fsdp(processes, stage, flags):
    """The log of a run under accelerate's FSDP2 engine, on the CPU, in the environment that its launcher makes."""
    launcher = launch_command_parser().parse_args([
        "--config_file=configs/accelerate/fsdp.yaml", "--num_machines=1", f"--num_processes={processes}",
        "--num_cpu_threads_per_process=1", "--main_process_port=0", "--mixed_precision=no", "script",
    ])  # fmt: skip
    environment = prepare_multi_gpu_env(_validate_launch_command(launcher)[0])
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launcher.main_process_port)}
    environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    ranks = [
        start(fsdp_on_cpu.main, stage, flags, environment={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    logs = [finish(*rank) for rank in ranks]
    assert not any("Warning" in log for log in logs), logs
    return logs[0]


def assert_equal_weights(first, second, atol):
    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=0, atol=atol, msg=key)


def test_fsdp_trains_as_one_process_with_the_whole_batch(train, flags, tmp_path, capsys):
    """Sharded over two processes, resumed on three, converted: losses and weights of one plain process."""
    # Adam with a huge epsilon is gradient descent: it does not blow rounding up to whole steps of its own.
    settings = {"learning_rate": 1, "adam_epsilon": 1e3, "adam_weight_decay": 0, "nframes": 1, "checkpointing_steps": 1}
    train(1, output_dir=tmp_path / "plain", train_batch_size=6, **settings)
    expected = losses(capsys.readouterr().out)

    run = {"output_dir": tmp_path / "fsdp", "train_batch_size": 1, **settings}
    log = run_fsdp(2, 1, flags(1, max_train_steps=1, gradient_accumulation_steps=3, **run))
    assert "2 process(es) (FSDP)" in log and "global batch 6 clips" in log and "7.33333 steps per epoch" in log
    assert losses(log) == pytest.approx(expected[:1], abs=2e-4)
    log = run_fsdp(3, 1, flags(1, gradient_accumulation_steps=2, resume_from_checkpoint="latest", **run))
    assert "num_processes from 2 to 3" in log and losses(log) == pytest.approx(expected[1:], abs=2e-4)
    convert(1, tmp_path / "fsdp", tmp_path / "converted")
    assert_equal_weights(tmp_path / "plain" / FINAL, tmp_path / "converted" / FINAL, atol=2e-6)

    capsys.readouterr()
    with pytest.raises(SystemExit):
        train(1, resume_from_checkpoint="latest", **{**run, "train_batch_size": 6})
    assert "holds optimizer state of fsdp, this run's engine is ddp" in capsys.readouterr().err


def test_fsdp_of_frozen_and_recomputed_layers(train, flags, videos, tmp_path, capsys):
    """Stage 2 in half precision: frozen layers, gradient checkpointing, one validation video for two processes."""
    images, masks = (str(videos / "DAVIS" / kind / "480p/buoy") for kind in ("JPEGImages", "Annotations"))
    settings = {
        "mixed_precision": "bf16", "gradient_checkpointing": True, "nframes": 2, "max_train_steps": 1,
        "validation_steps": 1, "validation_image": [images], "validation_mask": [masks],
    }  # fmt: skip
    train(2, output_dir=tmp_path / "plain", train_batch_size=2, **settings)
    expected = losses(capsys.readouterr().out)
    log = run_fsdp(2, 2, flags(2, output_dir=tmp_path / "fsdp", train_batch_size=1, **settings))
    assert losses(log) == pytest.approx(expected, abs=2e-3)  # rounded weights of norms
    gifs = [path.relative_to(tmp_path / "fsdp") for path in tmp_path.glob("fsdp/logs*/samples/*/*.gif")]
    assert [str(gif) for gif in gifs] == ["logs-finetune-stage2/samples/sample-1/1.gif"]
