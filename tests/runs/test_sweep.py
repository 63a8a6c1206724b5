"""Strengths of a LoRA side by side, and the commands export and generate on a LoRA file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffalign.cli import main
from diffalign.config.schema import LoraConfig, ModelConfig
from diffalign.errors import UserError
from diffalign.evaluation.drawing.samples import read_samples
from diffalign.export.adapters import set_strength
from diffalign.export.aligned import open_aligned, save_aligned
from diffalign.models.loading import load
from diffalign.models.lora import add_lora, trainable
from diffalign.runs.sweep import read_scales
from tests.tiny_pipelines import make_sd15


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write a base and a LoRA file outside of any run."""
    root = tmp_path_factory.mktemp("world")
    base = make_sd15(root / "base")
    model = load(ModelConfig(path=str(base)))
    add_lora(model.network, LoraConfig(rank=2, alpha=4.0))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in trainable(model.network):
            parameter += 0.3 * torch.randn(parameter.shape, generator=g)
    save_aligned(model, root / "aligned", "card")
    return base, root / "aligned" / "pytorch_lora_weights.safetensors"


def test_strengths_are_those_of_a_lora_trained_with_that_scale(world: tuple[Path, Path]) -> None:
    base, lora = world
    model = open_aligned(ModelConfig(path=str(base)), lora.parent)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    x = torch.randn(1, 3, 16)
    layer = model.network.get_submodule(name)
    plain = load(ModelConfig(path=str(base))).network.get_submodule(name)
    state = load_file(lora)
    stem = f"lora_unet_{name}".replace(".", "_")
    product = 2 * state[f"{stem}.lora_up.weight"] @ state[f"{stem}.lora_down.weight"]
    for scale in (0.0, 0.5, 1.0, -1.0):
        set_strength(model, scale)
        torch.testing.assert_close(layer(x), plain(x) + scale * x @ product.T)
    with pytest.raises(UserError, match="no LoRA"):
        set_strength(load(ModelConfig(path=str(base))), 0.5)


def test_scales_are_numbers() -> None:
    assert read_scales("0,0.5,1,1") == [0, 0.5, 1]
    for text in ("", "a", "nan", "0,inf"):
        with pytest.raises(UserError, match="--lora-scale"):
            read_scales(text)


def test_a_lora_file_is_drawn_at_three_strengths(world: tuple[Path, Path], tmp_path: Path) -> None:
    base, lora = world
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    drawing = ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "2", "--height", "32", "--width", "32"]
    out = tmp_path / "out"
    command = ["generate", str(lora), "--base", str(base), *drawing, "--output", str(out)]
    assert main([*command, "--lora-scale", "0,0.5,1"]) == 0
    first = {s: read_samples(out / f"scale-{s}")[0].source for s in ("0", "0.5", "1")}
    shown = {s: np.asarray(Image.open(file), int) for s, file in first.items()}  # type: ignore[arg-type]
    assert main(["generate", str(base), *drawing, "--output", str(tmp_path / "plain")]) == 0
    plain = np.asarray(Image.open(read_samples(tmp_path / "plain")[0].source), int)
    assert np.array_equal(shown["0"], plain)
    assert abs(shown["0.5"] - plain).sum() > 0 and not np.array_equal(shown["0.5"], shown["1"])
    with Image.open(out / "grid.png") as grid:
        assert grid.size == (3 * 32, 16 + 2 * 32)
        assert np.array_equal(np.asarray(grid.crop((64, 16, 96, 48)), int), shown["1"])


def test_the_command_writes_what_it_names(
    world: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, lora = world
    out = tmp_path / "x.safetensors"
    arguments = ["--base", str(base), "--output", str(out)]
    assert main(["export", str(lora), "--to", "kohya", *arguments, "--mix", f"{lora}=-1"]) == 0
    said = capsys.readouterr()
    assert "LoRA in kohya layout" in said.err and "ComfyUI: put x.safetensors into models/loras" in said.out
    state = load_file(out)
    for key in (k for k in state if k.endswith("lora_up.weight")):
        down = state[key.replace("lora_up", "lora_down")]
        assert (state[key].flatten(1) @ down.flatten(1)).abs().max() < 1e-5
    for wrong, words in (
        (["--to", "kohyaa"], "did you mean kohya"),
        (["--to", "kohya"], "--overwrite"),
        (["--to", "kohya", "--mix", "nowhere=1"], "is not there"),
        (["--to", "kohya", "--mix", f"{lora}=x"], "no number"),
        (["--to", "merged", "--rank", "2"], "no LoRA in it"),
    ):
        assert main(["export", str(lora), *wrong, *arguments]) == 2
        assert words in capsys.readouterr().err
    assert main(["export", str(base), "--to", "kohya"]) == 2
    assert "--base" in capsys.readouterr().err
