"""README fits one screen, and its counts, recipes, commands and links are correct."""

import re

from benchmarks.readme import README, filled
from diffalign.cli import COMMANDS
from diffalign.config.files import shipped_configs

TEXT = README.read_text(encoding="utf-8")


def test_it_fits():
    assert len(TEXT.encode()) <= 6_000


def test_the_counts_are_those_of_the_registries():
    assert filled(TEXT) == TEXT, "run python -m benchmarks.readme"


def test_every_command_and_recipe_that_it_names_is_there():
    code = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S))
    named = {
        *re.findall(r"^diffalign ([a-z]\S*)", code, re.M),
        *re.findall(r"`diffalign ([a-z][a-z-]*)", TEXT),
    }
    assert named
    assert named <= set(COMMANDS)
    recipes = {*shipped_configs(), *shipped_configs("rewards"), "sdxl_real_size", "tiny_build"}
    assert set(re.findall(r"\b(?:sdxl|sd15|tiny)_[a-z0-9_]+\b", TEXT)) <= recipes


def test_pictures_and_links_lead_somewhere():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", TEXT)
    assert links
    for target in links:
        assert (README.parent / target).exists(), target
