"""User errors through the real command line: the message, status 2, no traceback."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from diffalign.cli import main
from tests.cli.conftest import finished, world  # noqa: F401

TRAIN = ["train", "good.yaml", "--output", "{out}"]

# (name, arguments, fragments of the message). {out} is a new folder.
CASES = [
    # the command line
    ("unknown command", ["trian"], ["unknown command 'trian'", "did you mean train"]),
    ("train without anything", ["train"], ["needs a config or flags", "diffalign models NAME"]),
    ("unknown flag", [*TRAIN, "--learning_rat", "1"], ["--learning_rat'", "did you mean --learning_rate"]),
    ("flag without value", [*TRAIN, "--training.steps"], ["--training.steps needs a value"]),
    (
        "unsupported diffusers flag",
        [*TRAIN, "--unet_init", "unet"],
        ["--unet_init is not supported", "--model.path"],
    ),
    (
        "unknown option of a command",
        ["generate", "model", "--prompts", "prompts.txt", "--sed", "1"],
        ["--sed", "--seed"],
    ),
    ("option out of range", ["demo", "--prompts", "0"], ["--prompts", "'0'", "1 or more"]),
    # the configuration
    (
        "missing config",
        ["train", "tiny_sdxl_dop"],
        ["no config file 'tiny_sdxl_dop'", "did you mean tiny_sdxl_dpo"],
    ),
    ("config is a folder", ["train", "model"], ["model is a folder"]),
    ("YAML syntax", ["train", "syntax.yaml"], ["syntax.yaml line", "not valid YAML"]),
    (
        "unknown key",
        ["train", "unknown.yaml"],
        ["'model.lora.rnak'", "unknown.yaml", "did you mean model.lora.rank"],
    ),
    ("unknown dotted flag", [*TRAIN, "--model.lora.rnak", "4"], ["did you mean model.lora.rank"]),
    ("wrong type", [*TRAIN, "--training.steps", "many"], ["training.steps='many'", "a whole number"]),
    ("wrong choice", [*TRAIN, "--model.train", "all"], ["model.train", "'all'", "full, lora"]),
    ("unknown optimizer", [*TRAIN, "--optimizer.type", "lion"], ["optimizer.type", "'lion'", "adamw8bit"]),
    ("unknown scheduler", [*TRAIN, "--lr_scheduler", "piecewise"], ["'piecewise'", "cosine"]),
    ("out of range", [*TRAIN, "--data.resolution", "100"], ["data.resolution=100", "multiple of 8"]),
    (
        "every 0th block",
        [*TRAIN, "--model.gradient_checkpointing", "0"],
        ["model.gradient_checkpointing=0", "true (all blocks), false", "every N-th"],
    ),
    (
        "checkpoints by a word",
        [*TRAIN, "--model.gradient_checkpointing=some"],
        ["model.gradient_checkpointing='some'", "true, false or a whole number"],
    ),
    ("rank 0", [*TRAIN, "--rank", "0"], ["model.lora.rank=0", "1 to 65,536"]),
    ("unknown method", [*TRAIN, "--method", "dop"], ["unknown method", "did you mean dpo"]),
    ("unknown field of the method", [*TRAIN, "--method.bta", "1"], ["'bta'", "did you mean beta"]),
    ("method out of range", [*TRAIN, "--method.beta", "-1"], ["method.beta=-1", "more than 0"]),
    ("unknown loss", [*TRAIN, "--method.loss", "ipoo"], ["method.loss", "did you mean ipo"]),
    ("loss out of range", [*TRAIN, "--label_smoothing", "0.7"], ["label_smoothing=0.7", "< 0.5"]),
    (
        "time out of range",
        [*TRAIN, "--method.time", "{type: uniform, low: 2}"],
        ["low=2", "0 <= low < high <= 1"],
    ),
    ("unknown family", [*TRAIN, "--model.family", "sdxll"], ["unknown model family", "did you mean sdxl"]),
    ("unknown tracker", [*TRAIN, "--report_to", "comet_ml"], ["unknown tracker", "tensorboard"]),
    ("tracker not installed", [*TRAIN, "--report_to", "wandb"], ["logging.trackers", "pip install wandb"]),
    ("8-bit adam not installed", [*TRAIN, "--use_8bit_adam"], ["optimizer.type=adamw8bit", "pip install"]),
    ("validation without prompts", [*TRAIN, "--validation.every", "5"], ["validation.prompts is empty"]),
    ("fp16 on the CPU", [*TRAIN, "--training.mixed_precision", "fp16"], ["fp16 needs a GPU"]),
    ("output is a file", ["train", "good.yaml", "--output", "a-file"], ["output='a-file' is a file"]),
    # the model
    ("no model", ["train", "--data.path", "pairs.parquet"], ["model.path is not set", "--model.path"]),
    (
        "no such model folder",
        [*TRAIN, "--model.path", "./nowhere/x"],
        ["model.path='./nowhere/x'", "no such file or folder"],
    ),
    ("no such hub model", [*TRAIN, "--model.path", "nobody/nothing"], ["'nobody/nothing'", "hub"]),
    ("not a pipeline", [*TRAIN, "--model.path", "bare"], ["not a diffusers pipeline folder"]),
    ("no such tiny model", [*TRAIN, "--model.path", "tiny:sd9"], ["'tiny:sd9'", "tiny:sdxl"]),
    ("another family", [*TRAIN, "--model.family", "sd15"], ["model.family='sd15'", "is sdxl"]),
    ("no such VAE", [*TRAIN, "--model.vae", "./no-vae"], ["model.vae='./no-vae'", "no such folder"]),
    ("no such variant", [*TRAIN, "--model.variant", "fp16"], ["model.variant='fp16'"]),
    (
        "LoRA target that matches nothing",
        [*TRAIN, "--model.lora.targets", "to_x"],
        ["model.lora.targets", "to_x"],
    ),
    ("attention back-end not here", [*TRAIN, "--model.attention", "cudnn"], ["cudnn", "math"]),
    ("xformers not installed", [*TRAIN, "--enable_xformers_memory_efficient_attention"], ["xformers"]),
    # the data
    ("no data", ["train", "--model.path", "model"], ["data.path is not set", "--data.path"]),
    ("missing data file", [*TRAIN, "--data.path", "./gone.parquet"], ["./gone.parquet", "no parquet file"]),
    (
        "unknown data format",
        [*TRAIN, "--data.path", "words.csv"],
        ["words.csv", "found a, b; needed caption"],
    ),
    ("no such hub dataset", [*TRAIN, "--data.path", "nobody/nothing"], ["'nobody/nothing'"]),
    (
        "empty set",
        [*TRAIN, "--data.path", "empty.parquet"],
        ["empty.parquet", "nothing to learn from", "0 pairs"],
    ),
    ("only ties", [*TRAIN, "--data.path", "ties.parquet"], ["nothing to learn from", "2 ties"]),
    (
        "corrupt parquet",
        [*TRAIN, "--data.path", "corrupt.parquet"],
        ["corrupt.parquet", "not readable as parquet"],
    ),
    (
        "parquet without columns",
        [*TRAIN, "--data.path", "columns.parquet"],
        ["found image, text", "needed caption"],
    ),
    ("one-sided folder", [*TRAIN, "--data.path", "one-sided"], ["no rival in l/ for a.png"]),
    ("folder without captions", [*TRAIN, "--data.path", "captionless"], ["no caption for a", "a.txt"]),
    ("folder without preferences", [*TRAIN, "--data.path", "bare"], ["'bare'", "without preferences"]),
    ("broken jsonl", [*TRAIN, "--data.path", "broken.jsonl"], ["broken.jsonl", "line 1", "not JSON"]),
    (
        "jsonl with missing images",
        [*TRAIN, "--data.path", "missing-image.jsonl"],
        ["none of the first 2 files was found", "gone.png", "data.root"],
    ),
    # checkpoints
    ("no such checkpoint", [*TRAIN, "--resume", "step-7"], ["no checkpoint 'step-7'"]),
    (
        "a run is there already",
        ["train", "good.yaml", "--output", "run"],
        ["of an earlier run", "--resume latest"],
    ),
    (
        "resume with another config",
        ["train", "run/config.yaml", "--resume", "latest", "--method.beta", "7"],
        ["made with other settings", "beta"],
    ),
    (
        "incompatible checkpoint",
        ["train", "good.yaml", "--output", "{out}", "--resume", "run/checkpoints/step-2", "--rank", "3"],
        ["made with other settings", "rank"],
    ),
    # the other commands
    (
        "no such prompt file",
        ["generate", "model", "--prompts", "gone.txt"],
        ["prompt file 'gone.txt'", "no such file"],
    ),
    ("empty prompt file", ["generate", "model", "--prompts", "blank.txt"], ["blank.txt: no prompts"]),
    ("prompt file of another kind", ["generate", "model", "--prompts", "a-file"], ["cannot read", ".txt"]),
    ("no such embedded prompts", ["generate", "model", "--prompts", "tiny:tset"], ["tiny:tset", "tiny:test"]),
    ("LoRA without its base", ["generate", "lora", "--prompts", "prompts.txt"], ["is a LoRA", "--base"]),
    (
        "device not here",
        ["generate", "model", "--prompts", "prompts.txt", "--device", "tpu"],
        ["'tpu'", "auto, cpu"],
    ),
    (
        "unknown dtype",
        ["generate", "model", "--prompts", "prompts.txt", "--dtype", "half"],
        ["--dtype 'half'", "float16"],
    ),
    ("no reward", ["score", "bare", "--rewards", ","], ["--rewards ',' names nothing"]),
    (
        "unknown reward",
        ["score", "captionless/w", "--prompts", "prompts.txt", "--rewards", "judg"],
        ["did you mean judge"],
    ),
    ("nothing to score", ["score", "bare", "--rewards", "jpeg"], ["'bare' has no images"]),
    ("images without prompts", ["score", "captionless/w", "--rewards", "jpeg"], ["has no prompt", "a.txt"]),
    ("no such images", ["score", "nowhere", "--rewards", "jpeg"], ["nowhere"]),
    (
        "scores in another format",
        ["score", "pairs.parquet", "--rewards", "jpeg", "--output", "x.csv"],
        [".jsonl or .parquet"],
    ),
    (
        "evaluate nothing",
        ["evaluate", "--prompts", "prompts.txt", "--rewards", "jpeg"],
        ["--run FOLDER, --runs FOLDER,FOLDER, or --base MODEL"],
    ),
    (
        "evaluate no run",
        ["evaluate", "--run", "bare", "--prompts", "prompts.txt", "--rewards", "jpeg"],
        ["no run directory"],
    ),
    (
        "unknown reward to evaluate",
        ["evaluate", "--run", "run", "--prompts", "prompts.txt", "--rewards", "jpg"],
        ["jpeg"],
    ),
    (
        "frames of an image model",
        ["generate", "model", "--prompts", "prompts.txt", "--frames", "9", "--output", "{out}"],
        ["num_frames=9", "draws images"],
    ),
    (
        "an output in a file",
        ["score", "captionless", "--rewards", "jpeg", "--output", "a-file/s.jsonl"],
        ["a-file"],
    ),
    ("a reward twice", ["score", "captionless", "--rewards", "jpeg,jpeg"], ["'jpeg' twice"]),
    (
        "a weight of 0",
        ["pairs", "captionless", "--rewards", "0*jpeg", "--output", "p.jsonl"],
        ["the weight '0'"],
    ),
    ("estimate of unknown shapes", ["estimate", "--model.path", "nobody/nothing"], ["nobody/nothing"]),
    (
        "estimate at no speed",
        ["estimate", "tiny_sdxl_dpo", "--tflops", "fast"],
        ["--tflops 'fast'", "a number"],
    ),
    ("demo of no method", ["demo", "--method", "ppo"], ["'ppo'", "dpo"]),
    ("demo of no recipe", ["demo", "--recipe", "tiny_sdxl_dop"], ["did you mean tiny_sdxl_dpo"]),
    ("unknown method to describe", ["methods", "dop"], ["did you mean dpo"]),
]


@pytest.fixture(scope="module")
def place(world, finished):  # noqa: F811
    (world / "lora").mkdir()
    (world / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    return world


@pytest.mark.parametrize(("argv", "fragments"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input(argv, fragments, place, tmp_path, monkeypatch, capsys):
    if torch.accelerator.is_available() and {"fp16", "cudnn", "tpu"} & set(argv):
        pytest.skip("is right where there is a GPU")
    monkeypatch.chdir(place)
    for package in ("wandb", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    before = sorted(os.listdir(place))
    assert main([word.format(out=tmp_path / "run") if word == "{out}" else word for word in argv]) == 2
    message = capsys.readouterr().err
    assert "error: " in message
    for fragment in fragments:
        assert fragment in message.partition("error: ")[2]
    assert "Traceback" not in message
    assert sorted(os.listdir(place)) == before


def test_the_table_is_long_enough():
    assert len(CASES) >= 30 and len({case[0] for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    "argv", [["train", "unknown.yaml"], ["generate", "model", "--prompts", "gone.txt"], ["trian"]]
)
def test_in_a_process_of_its_own_the_status_is_2_and_the_message_one_line(argv, place):
    done = subprocess.run(
        [sys.executable, "-m", "diffalign", *argv],
        cwd=place,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(__file__)))},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not done.stdout


def test_a_full_disk_is_said_and_leaves_no_half_file(place, tmp_path, monkeypatch, capsys):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.chdir(place)
    monkeypatch.setattr(os, "replace", full)
    assert main(["train", "good.yaml", "--output", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "no space" in message.lower() and "Traceback" not in message
    monkeypatch.undo()
    assert not list((tmp_path / "run").rglob("*.safetensors"))
