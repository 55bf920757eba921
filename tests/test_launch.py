"""What users type: the shell scripts, `accelerate launch`, the converters, in processes of their own."""

import ast
import gc
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
from conftest import REPOSITORY, equal_files, wait_for_line
from diffusers.utils import is_bitsandbytes_available
from safetensors.torch import load_file

from common.errors import InputError
from launch import launch
from libs.training.config import CONFIGS, LAUNCHER_VARIABLES, variables_that_look_misspelt

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def environment(weights, videos, tmp_path):
    """The shell scripts' variables for a run of few, small steps."""
    return {
        **os.environ,
        "PYTHON": sys.executable,
        "WEIGHTS": str(weights),
        "DAVIS_ROOT": str(videos / "DAVIS"),
        "YTVOS_ROOT": str(videos / "YTBV"),
        "OUTPUT_DIR": str(tmp_path / "run"),
        "LOG": str(tmp_path / "run.log"),
        "LATENT_CACHE": str(tmp_path / "latents"),
        "RESOLUTION": "32",
        "NFRAMES": "3",
        "MAX_TRAIN_STEPS": "2",
        "CHECKPOINTING_STEPS": "1",
        "VALIDATION_STEPS": "0",
        "DATALOADER_NUM_WORKERS": "1",
    }


def run(command, environment, **changes):
    """The finished process of a command line."""
    environment = {**environment, **{name: str(value) for name, value in changes.items()}}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


def test_the_workflow(environment, published_layout, tmp_path):
    """Stage 1, resumed, converted; stage 2 from the converted folder, converted: the four commands of the guide."""
    environment["WEIGHTS"] = str(published_layout)
    log = Path(environment["LOG"])
    first = run(["bash", "finetune_stage1.sh"], environment, VALIDATION_STEPS=1)
    assert first.returncode == 0, first.stderr
    assert len(first.stdout.splitlines()) == 1 and "run.log" in first.stdout and not first.stderr
    text = log.read_text()
    assert len(re.findall(r"step \d+/2  loss \d\.\d+  lr 5e-06  grad norm", text)) == 2
    assert "\r" not in text and "Warning" not in text and "warn" not in text
    assert "unet_main: 2.4 M parameters, 2.4 M trained, 0.0 M frozen" in text
    gifs = sorted(path.relative_to(tmp_path) for path in (tmp_path / "run").rglob("*.gif"))
    assert [str(gif) for gif in gifs] == [
        f"run/logs-finetune-stage1/samples/sample-{step}/{n}.gif" for step in (1, 2) for n in (1, 2)
    ]
    assert list((tmp_path / "run/logs-finetune-stage1").rglob("events.out.tfevents.*"))

    again = run(["bash", "finetune_stage1.sh", "--checkpoints_total_limit=1"], environment, MAX_TRAIN_STEPS=3)
    assert again.returncode == 0, again.stderr
    assert "resumed from" in log.read_text() and log.read_text().startswith(text)  # the log is appended to
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]

    converted = run(
        [sys.executable, "save_checkpoint_stage1.py", "--input_dir", tmp_path / "run", "--output_dir", tmp_path / "c1"],
        environment,
    )
    assert converted.returncode == 0, converted.stderr
    assert "step 3" in converted.stdout and "sha256" in converted.stdout

    second = run(
        ["bash", "finetune_stage2.sh", "--logging_steps=1"],
        environment,
        OUTPUT_DIR=tmp_path / "run2",
        LOG=tmp_path / "run2.log",
        LOW_MEMORY=1,
        PRETRAINED_STAGE1=tmp_path / "c1",
        MOTION_ADAPTER=Path(environment["WEIGHTS"], "diffuEraser/unet_main"),
    )
    assert second.returncode == 0, second.stderr
    text = (tmp_path / "run2.log").read_text()
    assert "motion_modules: MotionAdapter from a UNetMotionModel" in text
    assert "Failed to load" not in text  # bitsandbytes' remark
    converted = run(
        [sys.executable, "save_checkpoint_stage2.py", "--input_dir", tmp_path / "run2/checkpoint-2",
         "--output_dir", tmp_path / "c2", "--pretrained_stage1", tmp_path / "c1"],
        environment,
    )  # fmt: skip
    assert converted.returncode == 0, converted.stderr
    assert equal_files(tmp_path / "c1/brushnet" / WEIGHTS, tmp_path / "c2/brushnet" / WEIGHTS)
    assert (tmp_path / "c2/unet_main" / WEIGHTS).is_file()


FAILURES = {  # (stage, variables, arguments, what the line says)
    "weights": (1, {"WEIGHTS": "/nowhere"}, [], "/nowhere/stable-diffusion-v1-5/tokenizer is not a folder"),
    "data": (1, {"DAVIS_ROOT": "/nowhere"}, [], "/nowhere/JPEGImages/480p is no folder"),
    "stage1": (2, {"PRETRAINED_STAGE1": "/nowhere"}, [], "/nowhere/unet_main is not a folder"),
    "number": (1, {"NUM_PROCESSES": "two"}, [], "NUM_PROCESSES=two: a number above 0 was needed"),
    "python": (1, {"PYTHON": "nopython"}, [], "nopython was not found: bash install.sh requirements.txt makes .venv"),
    "argument": (2, {}, ["--max_train_samples=5"], "--max_train_samples is gone: shorten"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_run(environment, tmp_path, name):
    """The trainer's status, the end of the log on the terminal, one line of error, no traceback."""
    stage, variables, arguments, message = FAILURES[name]
    failed = run(["bash", f"finetune_stage{stage}.sh", *arguments], environment, **variables)
    assert failed.returncode == 1
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    log = Path(environment["LOG"])
    assert "Traceback" not in failed.stderr + failed.stdout + (log.read_text() if log.exists() else "")
    assert not list(tmp_path.glob("run/checkpoint-*"))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_CONFIG": "fsdp"}, "fsdp is no file: ACCELERATE_CONFIG must be one of configs/accelerate/"),
        ({"NUM_PROCESSES": "0"}, "NUM_PROCESSES=0: a number above 0 was needed"),
        ({"LOW_MEMORY": "true"}, "LOW_MEMORY=true: 0, 1 or 2 was needed"),
        ({"RANDOM_CROP": "true"}, "RANDOM_CROP=true: 0 or 1 was needed"),
        ({"MIXED_PRECISION": "fp32"}, "MIXED_PRECISION=fp32: no (fp32), fp16 or bf16 was needed"),
        ({"RECIPE": "removal"}, "RECIPE=removal: there is one recipe, the default, and no part"),
        ({"LOG": "/proc/x/run.log"}, "LOG=/proc/x/run.log cannot be written to: choose another"),
        ({"NUM_MACHINES": "2"}, "NUM_MACHINES=2 needs MAIN_ADDRESS"),
        ({"NUM_MACHINES": "2", "MAIN_ADDRESS": "a", "MACHINE_RANK": "2"}, "MACHINE_RANK=2: a number from 0 to 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_variables_are_one_line(environment, monkeypatch, capsys, variables, message):
    """Found by the launcher itself, which starts nothing."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(launch, "Trainers", None)
    with mock.patch.dict(os.environ, {**environment, **variables}), pytest.raises(SystemExit) as stop:
        launch.main(["1"])
    printed = capsys.readouterr()
    assert stop.value.code == 1 and not printed.out
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and message in printed.err


@pytest.mark.parametrize(
    ("stage", "variables", "meant"),
    [
        (1, ["MAX_TRAIN_STEP"], "MAX_TRAIN_STEPS"),
        (1, ["RESOLUTON"], "RESOLUTION"),
        (2, ["outputdir"], "OUTPUT_DIR"),
        (2, ["MOTION_ADAPTER_PATH"], "MOTION_ADAPTER"),
        (1, ["USE_8BIT_ADAM"], "LOW_MEMORY"),
        (1, ["LR_SCHEDULER"], "--lr_scheduler, behind the command,"),
        (1, ["PRETRAINED_STAGE1"], "PRETRAINED_STAGE1_PATH"),
        (2, ["PRETRAINED_STAGE1_PATH"], "PRETRAINED_STAGE1"),
        (2, ["PRETRAINED_STAGE1_PATH", "PRETRAINED_STAGE1"], None),
        (1, ["MOTION_ADAPTER"], None),  # the other stage's, for a script that runs both
        (1, ["MKL_NUM_THREADS", "LANG", "LOGNAME", "PYTHONPATH", "MASTER_PORT", "WORLD_SIZE", "SLURM_NODEID"], None),
    ],
)
def test_variables_that_look_misspelt(stage, variables, meant):
    lines = variables_that_look_misspelt(stage, dict.fromkeys(variables, "1"))
    wanted = f"{variables[0]} is set, which stage {stage} does not read: was {meant} meant?"
    assert lines == ([wanted] if meant else [])


def test_a_misspelt_variable_is_said(told, capsys):
    told(0, {"LERNING_RATE": "1e-4"})
    assert capsys.readouterr().err == (
        "warning: LERNING_RATE is set, which stage 1 does not read: was LEARNING_RATE meant?\n"
    )


@pytest.fixture
def told(environment):
    """(GPUs, variables) -> what stage 1's launcher tells accelerate on such a machine, and in which environment."""

    def find(gpus, variables):
        with mock.patch.dict(os.environ, {**environment, **variables}), pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.cuda.is_available", lambda: gpus > 0)
            patch.setattr("torch.cuda.device_count", lambda: gpus)
            patch.setattr(launch, "compiling_lacks", lambda: None if gpus else "a GPU")
            patch.setattr(launch, "run_accelerate", lambda arguments: calls.append((arguments, dict(os.environ))))
            patch.chdir(REPOSITORY)
            calls = []
            launch.main(["1", "--check_only"])
            return calls[0]

    return find


def test_validation_follows_the_flag(environment, monkeypatch, videos):
    """--davis_root behind the script wins over the variable, for validation too."""
    for other, flag in (("/nowhere", str(videos / "DAVIS")), (str(videos / "DAVIS"), "")):
        with mock.patch.dict(os.environ, {**environment, "DAVIS_ROOT": other}):
            given = launch.read_flags([f"--davis_root={flag}"])
            _, note = launch.trainer_flags(1, launch.choose_engine(launch.read_engine_config()), given)
        assert (note is None) == bool(flag)


def test_no_masks_of_davis_for_other_validation_videos(environment, videos):
    with mock.patch.dict(os.environ, {**environment, "DAVIS_ROOT": str(videos / "DAVIS")}):
        for extra, masks in (([], True), (["--validation_image=['a', 'b']"], False)):
            engine = launch.choose_engine(launch.read_engine_config())
            flags, note = launch.trainer_flags(1, engine, launch.read_flags(extra))
            assert any(flag.startswith("--validation_mask=") for flag in flags) == masks and note is None


def test_one_machine_of_a_cluster_has_the_usual_log(environment):
    with mock.patch.dict(os.environ, {**environment, "SLURM_NODEID": "3"}):
        assert launch.choose_engine(launch.read_engine_config()).rank == 0


@pytest.mark.parametrize("shell", ["bash", "sh"])  # sh is dash on Debian and Ubuntu
def test_help(environment, shell):
    result = run([shell, "finetune_stage1.sh", "--help"], environment)
    assert result.returncode == 0 and result.stdout.startswith("usage: train_DiffuEraser_stage1.py")
    assert not Path(environment["LOG"]).exists()


@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        ({}, ["--compile", "--cuda_graph"]),
        ({"CUDA_GRAPH": "0"}, ["--compile"]),
        ({"COMPILE": "0"}, []),
        ({"COMPILE": "0", "CUDA_GRAPH": "1"}, ["--cuda_graph"]),
        ({"LOW_MEMORY": "1"}, ["--gradient_checkpointing", "--use_8bit_adam"]),
        ({"LOW_MEMORY": "1", "COMPILE": "1"}, ["--gradient_checkpointing", "--use_8bit_adam", "--compile"]),
        ({"LOW_MEMORY": "2"}, ["--gradient_checkpointing", "--use_8bit_adam", "--bf16_weights"]),
        ({"NUM_PROCESSES": "2"}, ["--compile", "--cuda_graph"]),
        ({"NUM_PROCESSES": "2", "GRADIENT_ACCUMULATION_STEPS": "2"}, ["--compile"]),
        ({"NUM_MACHINES": "2", "MAIN_ADDRESS": "node1"}, ["--compile"]),
        ({"ACCELERATE_CONFIG": "configs/accelerate/fsdp.yaml", "NUM_PROCESSES": "1"}, []),
    ],
    ids=lambda value: "-".join(value) or "none",
)
def test_what_makes_steps_fast_or_small_on_gpus(told, variables, flags):
    arguments, _ = told(2, variables)
    known = {"--compile", "--cuda_graph", "--gradient_checkpointing", "--use_8bit_adam", "--bf16_weights"}
    assert [flag for flag in arguments if flag in known] == flags


def test_a_configuration_for_the_cpu(told, tmp_path):
    """On a machine that has GPUs: nothing that needs one is asked for."""
    config = tmp_path / "cpu.yaml"
    config.write_text("distributed_type: 'NO'\nnum_machines: 1\nnum_processes: 1\nuse_cpu: true\n")
    arguments, _ = told(2, {"ACCELERATE_CONFIG": str(config)})
    assert "--mixed_precision=no" in arguments and not {"--compile", "--cuda_graph"} & set(arguments)


def test_a_signal_before_training(environment):
    """The trainer's place is taken by a process that has not begun to train; another run writes to the same log, and an
    earlier one has been in the folder."""
    Path(environment["OUTPUT_DIR"]).mkdir()
    Path(environment["OUTPUT_DIR"], "config.json").write_text('[{"command": [], "settings": {"logging_dir": ""}}]')
    code = f"""import os, sys; sys.path.insert(0, {str(REPOSITORY)!r})
from launch import launch
begin = "echo '  stage 1 on cpu'; echo starting; exec tail -f /dev/null"
launch.run_accelerate = lambda _: os.execlp("bash", "bash", "-c", begin)
launch.main(["1"])"""
    script = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for_line(Path(environment["LOG"]), "starting")
    script.send_signal(signal.SIGTERM)
    output, _ = script.communicate(timeout=300)
    assert script.returncode == 128 + signal.SIGTERM and len(output.splitlines()) == 2, output
    assert output.endswith("stopped before training began: there was nothing to save\n")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_trainer(environment, processes):
    """As the system kills it when memory runs out: one line that says so, and nothing else in the log."""
    log = Path(environment["LOG"])
    environment |= {"MAX_TRAIN_STEPS": "5000", "DATALOADER_NUM_WORKERS": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"NUM_PROCESSES": str(processes)}
    script = subprocess.Popen(
        ["bash", "finetune_stage1.sh", "--logging_steps=1", "--report_to=none"],
        cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for_line(log, "step 2/5000")
        below = psutil.Process(script.pid).children(recursive=True)
        trainers = [process for process in below if "launch.launch" not in process.cmdline()]
        trainers[-1].kill()
        _, error = script.communicate(timeout=300)
    finally:
        for process in below:
            if process.is_running():
                process.kill()
    assert script.returncode == 1
    last = error.splitlines()[-1]
    who = "the trainer" if processes == 1 else r"process \d"
    assert re.match(rf"error: {who} was ended by SIGKILL \(the system killed it, .*DATALOADER_NUM_WORKERS", last), error
    said = log.read_text().splitlines()
    assert said[-1] == last and not [line for line in said if not re.match(r"\d{4}-|=====|command:|error", line)]


def test_a_crash_is_not_to_be_repeated():
    with pytest.raises(InputError, match=r"ended by SIGSEGV \(a library crashed") as raised:
        launch.end_as("the trainer", -signal.SIGSEGV)
    assert "same command" not in str(raised.value)


def test_paths_with_quotes(environment, tmp_path, videos):
    """Validation videos whose path has an apostrophe; the logged command can be pasted. Started by a program that
    ignores SIGCHLD, as some job systems do: the trainer's status is still read."""
    davis = tmp_path / 'the user\'s "DAVIS"'
    davis.symlink_to(videos / "DAVIS")
    command = ["env", "--ignore-signal=CHLD", "bash", "finetune_stage1.sh"]
    result = run(command, environment, DAVIS_ROOT=davis, MAX_TRAIN_STEPS=1)
    assert result.returncode == 0 and not result.stderr, result.stderr
    command = re.search("^command: (.*)", Path(environment["LOG"]).read_text(), re.M)[1]
    flags = dict(word.split("=", 1) for word in shlex.split(command) if "=" in word)
    assert "--output_dir=" in command and flags["--davis_root"] == str(davis)
    for name in ("--validation_image", "--validation_mask"):
        folders = ast.literal_eval(flags[name])
        assert len(folders) == 2 and all(Path(folder).is_dir() for folder in folders)


def test_large_libraries_are_imported_quickly():
    """By every script, before anything imports them as it comes."""
    scripts = [path for path in REPOSITORY.glob("*.py") if "__main__" in path.read_text()]
    assert len(scripts) == 6
    for script in scripts:
        imports = re.findall(r"^ *(?:from|import) ((?:common|dataset|libs)[.\w]*)", script.read_text(), re.M)
        assert imports[0] == "common.libraries", script
    assert gc.isenabled() and gc.get_freeze_count() > 100_000 and not is_bitsandbytes_available()


OWN_CONFIG = """compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
machine_rank: 0
main_process_ip: null
mixed_precision: 'bf16'
num_machines: 1
num_processes: 4
"""
ENGINES = [  # (GPUs, variables, what accelerate is told)
    (8, {}, "one_gpu.yaml --num_processes=1 --num_machines=1 "),
    (8, {"NUM_PROCESSES": "2"}, "multi_gpu.yaml --num_processes=2 --num_machines=1 "),
    (8, {"ACCELERATE_CONFIG": "configs/accelerate/fsdp.yaml"}, "fsdp.yaml --num_processes=8 --num_machines=1 "),
    (1, {"ACCELERATE_CONFIG": "configs/accelerate/fsdp.yaml"}, "fsdp.yaml --num_processes=1 --num_machines=1 "),
    (1, {}, "allocator: expandable_segments:True"),
    (0, {}, "allocator: None"),
    (1, {"PYTORCH_CUDA_ALLOC_CONF": "own"}, "allocator: own"),
    (8, {"ACCELERATE_CONFIG": "own.yaml"}, "own.yaml --num_processes=4 --num_machines=1 "),
    (8, {"ACCELERATE_CONFIG": "own.yaml"}, " --mixed_precision=bf16 "),
    (8, {"ACCELERATE_CONFIG": "own.yaml", "NUM_PROCESSES": "2"}, "own.yaml --num_processes=2 --num_machines=1 "),
    (8, {"NUM_MACHINES": "2", "MAIN_ADDRESS": "a", "NUM_PROCESSES": "8"}, "multi_node.yaml --num_processes=16 "),
]


@pytest.mark.parametrize(("gpus", "variables", "words"), ENGINES)
def test_the_engine(told, tmp_path, gpus, variables, words):
    """Variables come before the user's own configuration, and that before the defaults."""
    own = tmp_path / "own.yaml"
    own.write_text(OWN_CONFIG)
    if variables.get("ACCELERATE_CONFIG") == "own.yaml":
        variables = {**variables, "ACCELERATE_CONFIG": str(own)}
    arguments, environment = told(gpus, variables)
    assert words in f"{' '.join(arguments)} allocator: {environment.get('PYTORCH_ALLOC_CONF')}"


def test_the_launcher_itself_never_asks_cuda(environment, monkeypatch):
    """It forks the process in which accelerate asks, which would fail then: "Cannot re-initialize CUDA in forked
    subprocess". torch asks CUDA where NVML does not answer, as for CUDA_VISIBLE_DEVICES=MIG-<uuid>."""
    own = os.getpid()

    def ask(answer):
        assert os.getpid() != own
        return answer

    monkeypatch.setattr("torch.cuda.is_available", lambda: ask(True))
    monkeypatch.setattr("torch.cuda.device_count", lambda: ask(3))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: ask((9, 0)))
    with mock.patch.dict(os.environ, environment):
        engine = launch.choose_engine(launch.read_engine_config())
        launch.trainer_flags(1, engine, launch.read_flags([]))
    assert engine.gpus == 3


def test_a_driver_too_old_for_cuda(environment, monkeypatch, capsys):
    """NVML finds the GPU: one line says what is wrong, and nothing is trained on the CPU instead."""

    def fail():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(launch, "compiling_lacks", fail)
    with mock.patch.dict(os.environ, environment), pytest.raises(SystemExit) as stop:
        launch.main(["1"])
    assert stop.value.code == 1
    assert "error: CUDA does not work here (The NVIDIA driver on your system is too old" in capsys.readouterr().err


def test_a_cuda_that_ends_its_process():
    with pytest.raises(InputError, match="CUDA ended the process that asked it"):
        launch.in_another_process(partial(os._exit, 3))


def test_more_processes_than_gpus(told, capsys):
    """accelerate would start two on one GPU, where NCCL fails and says that another machine is lost."""
    with pytest.raises(SystemExit):
        told(1, {"NUM_PROCESSES": "2"})
    assert capsys.readouterr().err.startswith("error: 2 processes on this machine need as many GPUs, and 1 were found")


@pytest.mark.parametrize("script", ["finetune_stage1.sh", "finetune_stage2.sh", "install.sh", "quickstart.sh"])
def test_scripts_started_with_sh_go_on_in_bash(script):
    lines = [line for line in Path(REPOSITORY, script).read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == '[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh'


@pytest.mark.parametrize("arguments", [[], ["--help"], ["3"]])
def test_a_stage_is_1_or_2(capsys, arguments):
    with pytest.raises(SystemExit):
        launch.main(arguments)
    assert capsys.readouterr().err.endswith("is no stage: 1 or 2 was needed\n")


def test_a_log_on_a_full_disk():
    with pytest.raises(InputError, match=r"LOG=/dev/full cannot be written to: choose another \(No space left"):
        launch.Log("/dev/full").write("a line")


def test_a_log_that_two_runs_write_to(environment):
    """Said, and not refused: jobs of a cluster may share one."""
    code = f"""import sys; sys.path.insert(0, {str(REPOSITORY)!r})
from launch import launch
launch.run_accelerate = print
launch.main(["1"])"""
    log, said = launch.Log(environment["LOG"]), f"warning: another run is writing to {environment['LOG']} too"
    assert not log.is_shared() and launch.Log(log.path).is_shared()
    assert run([sys.executable, "-c", code], environment).stderr.startswith(said) and said in log.path.read_text()
    os.close(log.descriptor)
    assert not launch.Log(log.path).is_shared()
    assert not launch.Log("/dev/null").is_shared() and not launch.Log("/dev/null").is_shared()


def test_the_end_of_a_log_that_was_emptied(tmp_path):
    log = launch.Log(tmp_path / "run.log")
    log.write("an earlier run's line " * 9)
    log = launch.Log(log.path)
    log.path.write_text("===== stage 1\ncommand: accelerate launch\nerror: one\nstep 1\n")
    assert log.end() == ["step 1", "error: one"]
    log.path.unlink()
    assert log.end() == []


WRONG_CONFIGS = {  # what it holds, and what the line says
    "another_version": ("distributed_type: 'NO'\nsome_new_key: 3\n", "had unknown keys (['some_new_key'])"),
    "broken": ("distributed_type: NO\n\tx: [1\n", "cannot start any token"),
    "empty": ("", "cannot be used"),
    "cloud": (
        "compute_environment: AMAZON_SAGEMAKER\ndistributed_type: 'NO'\nmixed_precision: 'no'\nec2_instance_type: a\n"
        "iam_role_name: a\n",
        "had unknown keys (['ec2_instance_type', 'iam_role_name'])",
    ),
    "no_number": ("distributed_type: MULTI_GPU\nnum_processes: two\n", "num_processes: two: a number was needed"),
    "precision": ("distributed_type: 'NO'\nmixed_precision: fp7\n", "mixed_precision: fp7: no, fp16 or bf16"),
    "deepspeed": ("distributed_type: DEEPSPEED\n", "ACCELERATE_CONFIG=configs/accelerate/fsdp.yaml"),
}


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_a_wrong_configuration_is_one_line(told, tmp_path, capsys, name):
    text, message = WRONG_CONFIGS[name]
    config = tmp_path / "own.yaml"
    config.write_text(text)
    with pytest.raises(SystemExit) as stop:
        told(0, {"ACCELERATE_CONFIG": str(config)})
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    assert str(config) in error and message in error


@pytest.mark.parametrize(
    "text", ["\ufeffdistributed_type: 'NO'\r\nnum_processes: 3\r\n", '{"distributed_type": "NO", "num_processes": 3}']
)
def test_a_configuration_from_elsewhere(told, tmp_path, text):
    """Windows' line ends and byte-order mark, and JSON."""
    config = tmp_path / ("own.json" if text.startswith("{") else "own.yaml")
    config.write_text(text)
    assert "--num_processes=3" in told(0, {"ACCELERATE_CONFIG": str(config)})[0]


def test_the_quickstart_sets_or_unsets_every_variable():
    """What a user has exported for another run has no influence on it."""
    read = {f.metadata["variable"] for config in CONFIGS.values() for f in fields(config)} - {None}
    read |= {name for name, _, _ in LAUNCHER_VARIABLES} | {"SLURM_NODEID"}
    read -= {"OMP_NUM_THREADS"}
    assert len(read) > 25
    quickstart = Path(REPOSITORY, "quickstart.sh").read_text()
    unset = re.search(r"^source .*", quickstart, re.M)[0]
    environment = {**os.environ, **dict.fromkeys(read, "another run's")}
    left = subprocess.run(["bash", "-ec", f"{unset}; env"], cwd=REPOSITORY, env=environment, capture_output=True,
                          text=True, check=True).stdout  # fmt: skip
    left = set(re.findall(r"^(\w+)=another run's$", left, re.M))
    assert left and not left - set(re.findall(r"\b([A-Z][A-Z_0-9]+)=", quickstart))


def test_validation_is_off_without_masks(environment, tmp_path, videos):
    bare = tmp_path / "DAVIS"
    bare.mkdir()
    (bare / "JPEGImages").symlink_to(videos / "DAVIS/JPEGImages")
    (bare / "ImageSets").symlink_to(videos / "DAVIS/ImageSets")
    result = run(["bash", "finetune_stage1.sh"], environment, DAVIS_ROOT=bare, MAX_TRAIN_STEPS=1, VALIDATION_STEPS=1)
    assert result.returncode == 0, result.stderr
    assert "validation is off" in result.stdout and "--validation_image" in result.stdout


def test_two_processes_train_as_one_with_the_whole_batch(environment, tmp_path):
    """Each sees its share of the data, in three passes a step; losses and weights are those of one process. The two
    recompute their layers besides, whose gradients must come past DDP."""
    logs, settings = {}, {"MAX_TRAIN_STEPS": 3, "LEARNING_RATE": 1, "OMP_NUM_THREADS": 1, "VALIDATION_STEPS": 5}
    for processes, batch, accumulation in ((1, 6, 1), (2, 1, 3)):
        changes = {"NUM_PROCESSES": processes, "TRAIN_BATCH_SIZE": batch, "GRADIENT_ACCUMULATION_STEPS": accumulation}
        changes |= {**settings, "NFRAMES": 1}
        changes |= {"LOG": tmp_path / f"{processes}.log", "OUTPUT_DIR": tmp_path / str(processes)}
        # Adam with a huge epsilon is gradient descent: it does not blow rounding up to whole steps of its own.
        command = ["bash", "finetune_stage1.sh", "--adam_epsilon=1e3", "--adam_weight_decay=0"]
        command += ["--gradient_checkpointing"] if processes == 2 else []
        result = run([*command, "--logging_steps=1", "--probe_clips=2"], environment, **changes)
        assert result.returncode == 0, result.stderr
        logs[processes] = (tmp_path / f"{processes}.log").read_text()
        assert f"{processes} process(es)" in logs[processes]
        assert "global batch 6 clips" in logs[processes] and "7.33333 steps per epoch" in logs[processes]
        assert "3 steps are left" in logs[processes]
        assert "Warning" not in logs[processes]
    losses = {n: [float(loss) for loss in re.findall(r"/3  loss ([\d.]+)", log)] for n, log in logs.items()}
    assert len(losses[1]) == 3 and losses[1] == pytest.approx(losses[2], abs=2e-4)
    # The held-out loss of the same weights: the same bits.
    held_out = [(tmp_path / f"{n}/logs-finetune-stage1/held_out.csv").read_text().splitlines() for n in (1, 2)]
    assert held_out[0][1] == held_out[1][1] and held_out[0][1].startswith("0,")
    for n in (1, 2):
        assert "validation: 2 videos" in logs[n] and "Telea" in logs[n]
    weights = [load_file(tmp_path / str(n) / "unet_main" / WEIGHTS) for n in (1, 2)]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=0, atol=2e-6, msg=key)

    # Interrupted and resumed, bit for bit.
    whole = tmp_path / "2" / "unet_main" / WEIGHTS
    kept = whole.rename(tmp_path / "whole.safetensors")
    shutil.rmtree(tmp_path / "2" / "checkpoint-3")
    shutil.rmtree(tmp_path / "2" / "checkpoint-2")
    again = run(command, environment, **changes)
    assert again.returncode == 0, again.stderr
    assert "checkpoint-1 at step 1" in (tmp_path / "2.log").read_text()
    assert equal_files(kept, whole)


@pytest.mark.skipif("REAL_VIDEOS" not in os.environ, reason="REAL_VIDEOS names no folder with DAVIS/ and YTBV/")
@pytest.mark.parametrize("stage", [1, 2])
def test_real_videos(environment, weights, stage):
    """Both stages from the shell scripts on real footage, validation on held-out videos included."""
    result = run(
        ["bash", f"finetune_stage{stage}.sh", "--probe_clips=2"],
        environment,
        DAVIS_ROOT=Path(os.environ["REAL_VIDEOS"], "DAVIS"),
        YTVOS_ROOT=Path(os.environ["REAL_VIDEOS"], "YTBV"),
        PRETRAINED_STAGE1=weights / "diffuEraser",
        MOTION_ADAPTER=weights / "diffuEraser/unet_main",
        RESOLUTION=64,
        NFRAMES=5,
        MAX_TRAIN_STEPS=20,
        CHECKPOINTING_STEPS=20,
        LEARNING_RATE=1e-3,
        VALIDATION_STEPS=1000,
    )
    assert result.returncode == 0, result.stderr
    text = Path(environment["LOG"]).read_text()
    share = float(re.findall(r"([\d.]+) of its start", text)[-1])
    assert share < 0.9, text
