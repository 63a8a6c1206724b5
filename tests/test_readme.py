"""README says what there is: its tables, its recipes and its commands."""

import re

from benchmarks.readme import README, filled
from diffalign.cli import COMMANDS
from diffalign.config.io import shipped_configs

TEXT = README.read_text(encoding="utf-8")


def test_tables_are_the_registries():
    assert filled(TEXT) == TEXT, "run python -m benchmarks.readme"


def test_every_command_and_recipe_that_it_names_is_there():
    code = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S))
    assert set(re.findall(r"^diffalign ([a-z-]+)", code, re.M)) <= set(COMMANDS)
    assert set(COMMANDS) <= set(re.findall(r"`(?:diffalign )?([a-z-]+)", TEXT))
    assert set(re.findall(r"\b(?:sdxl|sd15|tiny)_[a-z0-9_]+\b", TEXT)) <= {
        *shipped_configs(),
        *shipped_configs("rewards"),
        "tiny_clip",
        "sdxl_real_size",
    }


def test_pictures_and_links_lead_somewhere():
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", TEXT):
        assert (README.parent / target).exists(), target
