"""What recipes say of themselves, and where a name leads that is none."""

import pytest

from diffalign.config.files import find_config, shipped_configs
from diffalign.config.recipes import Recipe, header, recipes
from diffalign.errors import UserError

TEXT = """\
# A method on a model: one sentence
#   in two lines.
#
# Source: here,
#   and there.
# GPUs: 8 of 24 GB, as theirs: 8 processes. On N GPUs less.
# Time: none.
#
#   accelerate launch -m diffalign train it \\
#     --data.path pairs.parquet
output: runs/it
# no part of the header
"""


def test_a_header_is_read():
    title, notes, commands = header(TEXT)
    assert title == "A method on a model: one sentence in two lines."
    assert notes["Source"] == "here, and there."
    assert list(notes) == ["Source", "GPUs", "Time"]
    assert commands == ("accelerate launch -m diffalign train it \\", "--data.path pairs.parquet")


@pytest.mark.parametrize(
    ("note", "gpus", "size"),
    [
        ("8 of 24 GB, as theirs: 8 processes.", "8 of 24 GB", (8, 24)),
        ("one of 12 GB with bf16 (RTX 3060): about 6 GiB", "one of 12 GB with bf16", (1, 12)),
        ("any of 16 GB or more: 5 GiB in training", "any of 16 GB or more", (1, 16)),
        ("as sd15_dpo, less the reference", "as sd15_dpo", (10**6, 0)),
    ],
)
def test_gpus_are_their_number_and_memory(note, gpus, size):
    recipe = Recipe("it", "", "sdxl", "dpo", {"GPUs": note}, ())
    assert (recipe.gpus, recipe.size) == (gpus, size)


def test_every_recipe_has_title_gpus_and_command():
    found = {recipe.name: recipe for recipe in recipes()}
    assert list(found) == list(shipped_configs())
    for name, recipe in found.items():
        assert recipe.title and recipe.commands, name
        assert recipe.gpus or name == "tiny_sd15_dpo", name
    assert (found["flux_dpo_lora_24gb"].family, found["flux_dpo_lora_24gb"].size) == ("flux", (1, 24))
    assert (found["tiny_sd15_dpo"].family, found["sdxl_npo_lora"].method) == ("sd15", "dpo")


def test_an_unknown_recipe_names_those_of_its_model_alone():
    with pytest.raises(UserError) as raised:
        find_config("flux_24gb")
    said = str(raised.value)
    assert "did you mean flux_dpo_lora_24gb" in said and "flux_srpo" in said and "sdxl" not in said
    with pytest.raises(UserError, match="diffalign models NAME"):
        find_config("nothing_like_it")
