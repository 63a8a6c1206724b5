import yaml

from diffalign.export.card import Card


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
