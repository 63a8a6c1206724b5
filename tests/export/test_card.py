from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffalign.config.schema import LoraConfig, ModelConfig
from diffalign.export.aligned import absent_components, save_aligned
from diffalign.export.card import Card
from diffalign.models.loading import load
from diffalign.models.lora import add_lora
from diffalign.models.precision import only_errors
from tests import tiny_pipelines, video_pipelines


def front_matter(text: str) -> dict[str, object]:
    _, matter, _ = text.split("---\n", 2)
    values: dict[str, object] = yaml.safe_load(matter)
    return values


def test_front_matter_is_what_the_hub_reads() -> None:
    card = Card(
        "owner/base",
        "sdxl",
        adapted=True,
        method="Diffusion-DPO",
        license="openrail++",
        tags=("mine", "lora"),
    )
    assert front_matter(card.text()) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "license": "openrail++",
        "tags": ["text-to-image", "diffusers", "lora", "preference-alignment", "diffalign", "mine"],
    }


def test_a_local_base_is_not_claimed_to_be_on_the_hub() -> None:
    for base in ("tiny:sdxl", "/data/model", "./model"):
        matter = front_matter(Card(base, "sd15", adapted=False, method="SFT").text())
        assert "base_model" not in matter
        assert "license" not in matter


def test_loading_takes_five_lines() -> None:
    for adapted in (True, False):
        text = Card("owner/base", "sd15", adapted=adapted, method="Diffusion-DPO").text()
        code = text.split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
        assert len([line for line in code.splitlines() if line]) <= 5
        assert ("load_lora_weights" in code) == adapted
        assert ("owner/base" in code) == adapted


def test_numbers_and_settings_are_written_down() -> None:
    settings = {"model": {"lora": {"targets": ("to_k", "to_q")}}, "seed": 0, "resume": None}
    text = Card(
        "owner/base",
        "sdxl",
        True,
        "DPO",
        title="Mine",
        numbers={"win rate": 0.61234, "steps": 100},
        settings=settings,
    ).text()
    assert "# Mine\n" in text
    assert "| win rate | 0.6123 |" in text
    assert "| steps | 100 |" in text
    block = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block) == {
        "model": {"lora": {"targets": ["to_k", "to_q"]}},
        "seed": 0,
        "resume": None,
    }


def test_a_tiny_base_is_found_where_it_is_shipped() -> None:
    text = Card("tiny:sdxl", "sdxl", adapted=True, method="Diffusion-DPO").text()
    assert 'StableDiffusionXLPipeline.from_pretrained(pipeline_path("sdxl"))' in text
    assert "from diffalign.tiny import pipeline_path" in text


def test_what_a_pipeline_is_without_or_wants_besides_is_said() -> None:
    without = Card("a/b", "sd3", False, "Flow-DPO", absent=("text_encoder_3", "tokenizer_3")).text()
    assert 'from_pretrained("path/to/this/folder", text_encoder_3=None, tokenizer_3=None)' in without
    moving = Card("a/b", "animatediff", True, "DPO", settings={"model": {"motion_adapter": "c/d"}}).text()
    assert 'from_pretrained("a/b", motion_adapter=MotionAdapter.from_pretrained("c/d"))' in moving
    assert front_matter(moving)["pipeline_tag"] == "text-to-video" and ".frames[0]" in moving


def test_a_lora_that_diffusers_cannot_load_is_loaded_by_peft() -> None:
    code = Card("a/b", "pixart", True, "DPO").text().split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert 'PeftModel.from_pretrained(pipeline.transformer, "path/to/this/folder")' in code
    assert "load_lora_weights" not in code


def test_the_lines_say_what_a_single_file_and_half_precision_want() -> None:
    lines = Card("a/b.safetensors", "sdxl", True, "DPO", settings={"model": {"dtype": "float16"}}).loading(
        "x"
    )
    assert lines[0] == "import torch"
    made = 'StableDiffusionXLPipeline.from_single_file("a/b.safetensors", torch_dtype=torch.float16)'
    assert f"pipeline = {made}" in lines and 'pipeline.load_lora_weights("x")' in lines
    wan = Card("a/b", "wan", True, "DPO", settings={"model": {"dtype": "bfloat16"}}).loading("x")
    assert 'torch_dtype={"default": torch.bfloat16, "vae": torch.float32}' in "\n".join(wan)
    assert wan[-1].endswith(".frames[0]")


MAKERS: dict[str, Any] = {
    "sd3": lambda folder: tiny_pipelines.make_sd3(folder, t5_too=False),
    "pixart": tiny_pipelines.make_pixart,
    "wan": video_pipelines.make_wan,
    "text_to_video": video_pipelines.make_text_to_video,
}


@pytest.mark.parametrize("name", [*MAKERS, "animatediff"])
def test_the_lines_load_what_a_run_leaves(tmp_path: Path, name: str) -> None:
    """One of each kind: a text encoder that is absent, a LoRA by peft of an image and of a video family, a
    video family with a LoRA loader, a motion adapter.
    """
    motion = None
    if name == "animatediff":
        base = tiny_pipelines.make_sd15(tmp_path / "base")
        motion = str(video_pipelines.make_motion_adapter(tmp_path / "motion"))
    else:
        base = MAKERS[name](tmp_path / "base")
    model = load(ModelConfig(path=str(base), dtype="bfloat16", motion_adapter=motion))
    add_lora(model.network, LoraConfig(rank=2))
    settings = {"model": {"dtype": "bfloat16", "motion_adapter": motion}}
    card = Card(str(base), name, True, "DPO", settings=settings, absent=absent_components(model))
    save_aligned(model, tmp_path / "aligned", card.text())
    lines, space = card.loading(str(tmp_path / "aligned")), dict[str, Any]()
    with only_errors("diffusers"):
        exec("\n".join(lines[:-1]), space)
    pipeline: Any = space["pipeline"]
    network = getattr(pipeline, model.family.network_name)
    assert network.peft_config and pipeline.vae.dtype == model.pipeline.vae.dtype
    assert any("lora_A" in key for key in network.state_dict())
    assert lines[-1].endswith(".images[0]" if name in ("sd3", "pixart") else ".frames[0]")


def test_a_lora_over_an_earlier_adapter_says_that_both_are_needed() -> None:
    both = Card("owner/base", "sdxl", adapted=True, method="DPO", started=("me/style", "runs/one/aligned"))
    assert "`me/style`, `runs/one/aligned` folded in" in both.text() and "diffalign export" in both.text()
    for other in (replace(both, adapted=False), replace(both, started=())):
        assert "folded in" not in other.text()
