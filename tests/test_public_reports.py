"""Public bug reports through the real command line; the input is made here, the right value asserted.

Reports that one room can answer alone are tested there: schedulers and predictions (tests/models), flags of
other scripts (tests/cli/test_flags.py), resuming (tests/runs/test_resume.py), schemas and splits
(tests/data/reading), deep greys (tests/media), strengths and layouts of a LoRA (tests/export).
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from diffalign.cli import main
from diffalign.tiny import pipeline_path

pytestmark = pytest.mark.slow  # each trains or draws through the command line

SIZE = ["--steps", "2", "--height", "32", "--width", "32"]
TRAIN = [
    *("train", "--model.path", "tiny:sd15", "--data.resolution", "32", "--data.holdout", "0"),
    *("--training.steps", "2", "--model.lora.rank", "4", "--model.lora.targets", "to_q"),
    *("--optimizer.learning_rate", "0.01", "--checkpoint.every", "1"),
]


def png(folder: Path, name: str, gradient: str = "linear") -> Path:
    kind = Image.linear_gradient if gradient == "linear" else Image.radial_gradient
    folder.mkdir(parents=True, exist_ok=True)
    kind("L").resize((64, 64)).convert("RGB").save(folder / name)
    return folder / name


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Three pairs as a folder of winners and losers."""
    return make_pairs(tmp_path / "pairs")


def make_pairs(folder: Path) -> Path:
    for number in range(3):
        png(folder / "w", f"{number}.png")
        png(folder / "l", f"{number}.png", "radial")
        (folder / "w" / f"{number}.txt").write_text(f"a red circle {number}")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a LoRA on the tiny Stable Diffusion until its images move."""
    place = tmp_path_factory.mktemp("reports")
    (place / "prompts.txt").write_text("a red circle\n")
    argv = [*TRAIN, "--data.path", str(make_pairs(place / "pairs")), "--output", str(place / "run")]
    assert main(argv) == 0
    return place / "run"


def drawn(source: Path | str, output: Path, prompts: Path, *more: str) -> np.ndarray:
    argv = ["generate", str(source), "--prompts", str(prompts), *SIZE, "--output", str(output), *more]
    assert main(argv) == 0
    (file,) = output.rglob("*.png")
    return np.asarray(Image.open(file), dtype=int)


def test_a_folder_of_the_hubs_parquet_files_has_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The layout of Pick-a-Pic's and HPDv3's repositories."""
    images = [png(tmp_path, "a.png").read_bytes(), png(tmp_path, "b.png", "radial").read_bytes()]
    (tmp_path / "set").mkdir()
    for split, rows in (("train", 2), ("validation", 3), ("test", 4)):
        row = {
            "caption": f"{split} a cat",
            "jpg_0": images[0],
            "jpg_1": images[1],
            "label_0": 1.0,
            "label_1": 0.0,
        }
        file = tmp_path / "set" / f"{split}-00000-of-00001.parquet"
        parquet.write_table(pa.Table.from_pylist([row] * rows), file)
    argv = [*TRAIN, "--data.path", str(tmp_path / "set"), "--output", str(tmp_path / "run")]
    assert main([*argv, "--data.split", "train", "--training.steps", "1"]) == 0
    assert "data: 2 pairs" in capsys.readouterr().err
    assert main([*argv, "--data.split", "nosuch", "--overwrite", "true"]) == 2
    message = capsys.readouterr().err
    assert "nosuch" in message and all(name in message for name in ("train", "validation", "test"))
    assert main(["agreement", str(tmp_path / "set"), "--split", "test", "--rewards", "jpeg"]) == 0
    assert "4 pairs" in "".join(capsys.readouterr())


def test_every_module_of_an_export_has_a_name_that_comfyui_knows(trained: Path, tmp_path: Path) -> None:
    """Comfy-Org/ComfyUI 1144: it skips, in silence, names that are not in its table."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(pipeline_path("sd15"), subfolder="unet")
    known = {"lora_unet_" + n.replace(".", "_") for n, m in unet.named_modules() if hasattr(m, "weight")}
    file = tmp_path / "x.safetensors"
    assert main(["export", str(trained), "--to", "kohya", "--output", str(file)]) == 0
    state = load_file(file)
    stems = {key.removesuffix(".lora_up.weight") for key in state if key.endswith(".lora_up.weight")}
    assert len(stems) == sum(name.endswith("to_q") for name, _ in unet.named_modules()) > 0
    assert stems <= known and all(float(state[f"{stem}.alpha"]) == 4 for stem in stems)


def test_a_peft_folder_cut_out_of_a_run_draws_the_runs_images(trained: Path, tmp_path: Path) -> None:
    folder, prompts = tmp_path / "peft", trained.parent / "prompts.txt"
    folder.mkdir()
    state = load_file(trained / "aligned" / "pytorch_lora_weights.safetensors")
    renamed = {"base_model.model." + key.partition(".")[2]: value for key, value in state.items()}
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["to_q"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    ours = drawn(trained, tmp_path / "ours", prompts)
    theirs = drawn(folder, tmp_path / "theirs", prompts, "--base", "tiny:sd15")
    base = drawn("tiny:sd15", tmp_path / "base", prompts)
    assert np.abs(ours - theirs).max() <= 1 < np.abs(ours - base).max()


def test_a_checkpoint_of_a_run_is_a_model(trained: Path, tmp_path: Path) -> None:
    prompts = trained.parent / "prompts.txt"
    last, first = (drawn(trained / "checkpoints" / f"step-{n}", tmp_path / f"{n}", prompts) for n in (2, 1))
    assert np.abs(last - drawn(trained, tmp_path / "run", prompts)).max() <= 1
    assert np.abs(first - last).max() > 1


def test_a_network_published_alone_is_evaluated_on_its_base(tmp_path: Path) -> None:
    """As mhdang/dpo-sdxl-text2image-v1 is; here it is the base's own, so the gain is 0."""
    shutil.copytree(pipeline_path("sd15") / "unet", tmp_path / "dpo" / "unet")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    argv = ["evaluate", "--base", "tiny:sd15", "--aligned", str(tmp_path / "dpo"), "--rewards", "jpeg"]
    out = tmp_path / "out"
    assert main([*argv, "--prompts", str(tmp_path / "prompts.txt"), *SIZE, "--output", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    (model,) = report["models"].values()
    assert model["gain"] == 0


def test_a_wrong_model_to_evaluate_is_told_before_anything_is_drawn(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "readme.txt").write_text("x")
    prompts, out = trained.parent / "prompts.txt", tmp_path / "out"
    argv = ["evaluate", "--base", "tiny:sd15", "--aligned", f"{trained},{tmp_path / 'wrong'}"]
    assert main([*argv, "--prompts", str(prompts), "--rewards", "jpeg", *SIZE, "--output", str(out)]) == 2
    assert "wrong" in capsys.readouterr().err and not list(out.rglob("*.png"))


def test_a_pair_of_one_image_teaches_nothing_and_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png(tmp_path, "a.png"), png(tmp_path, "b.png", "radial")
    rows = [
        {"prompt": "x", "chosen": "a.png", "rejected": "a.png"},
        {"prompt": "y", "chosen": "a.png", "rejected": "b.png"},
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [*TRAIN, "--data.path", str(tmp_path / "set.jsonl"), "--training.steps", "1"]
    assert main([*argv, "--output", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert re.search(r"data: (1 pair\b|2 pairs.* 1 .*(same|identical|equal|tie))", said), said


def test_a_caption_of_another_encoding_and_files_of_a_mac(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pairs / "w" / "._1.png").write_bytes(b"\x00\x05\x16\x07")  # AppleDouble
    argv = [*TRAIN, "--data.path", str(pairs), "--training.steps", "1", "--output", str(tmp_path / "run")]
    assert main(argv) == 0
    said = capsys.readouterr().err
    assert "data: 3 pairs" in said and "0 unreadable" in said, said
    (pairs / "w" / "1.txt").write_bytes("un caf\xe9".encode("latin-1"))
    assert main([*argv, "--overwrite", "true"]) == 2
    assert "1.txt line 1: not UTF-8" in capsys.readouterr().err


def test_a_command_that_does_not_quantise_says_nothing_of_quantisation() -> None:
    """diffusers imports bitsandbytes and torchao where they are there, and both warn while imported."""
    code = "from diffalign.cli import main; main(['--version']); from diffusers import DiffusionPipeline"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = [line for line in done.stderr.splitlines() if re.search("torchao|gemm_4bit|Enum subclass", line)]
    assert not said
