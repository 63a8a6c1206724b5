"""Published tables: every published run has a page, its numbers sources, and its counts are its recipe's."""

import json
import math
import re

import pytest

from benchmarks.reproduce import RESULT, flops, hours, units, written
from diffalign.config.files import shipped_configs
from diffalign.config.recipes import recipes
from diffalign.runs.validate import read_run

CONTENT = written()
COUNTS = json.loads(RESULT.read_text("utf-8"))["rows"]


def test_every_published_run_has_an_entry():
    published = {r.name for r in recipes() if re.search(r"the (published|released) run\b", r.title)}
    # DanceGRPO, MixGRPO and SRPO: the released settings with LoRA in place of all weights, no table of these.
    missing = published - set(CONTENT["recipes"]) - {"flux_dancegrpo", "flux_srpo", "flux_mixgrpo"}
    assert not missing
    assert set(COUNTS) == set(CONTENT["recipes"]) <= set(shipped_configs())


@pytest.mark.parametrize("name", CONTENT["recipes"])
def test_numbers_stand_with_their_source(name):
    entry = CONTENT["recipes"][name]
    for key in ("data", "model", "steps", "hardware", "evaluation", "figures", "missing", "evaluate"):
        assert entry[key].strip(), key
        for source in re.findall(r"\[([a-z0-9_]+)\]", entry[key]):
            assert source in CONTENT["sources"], source
    for key in ("steps", "figures"):
        if re.search(r"\d", re.sub(r"SD 1\.5|SDXL 1\.0", "", entry[key])):
            assert "[" in entry[key], key


@pytest.mark.parametrize("name", CONTENT["recipes"])
def test_counts_are_those_of_the_recipe(name):
    row, work = COUNTS[name], CONTENT["recipes"][name]["work"]
    factors, named = units(read_run(shipped_configs()[name]), work)
    assert (row["factors"], row["counted"]) == (factors, named)
    assert row["flops"] == pytest.approx(flops(row["cost"], work, math.prod(factors)))
    assert row["h100_hours"] == pytest.approx(hours(row["flops"]))


def test_hours_by_hand():
    """Diffusion-DPO on SDXL: 4,096,000 pairs of 68.29 TFLOP at 395.6 TFLOP/s."""
    assert COUNTS["sdxl_dpo"]["flops"] == pytest.approx(4_096_000 * 68.2905e12, rel=1e-4)
    assert COUNTS["sdxl_dpo"]["h100_hours"] == pytest.approx(4_096_000 * 68.2905 / 395.6 / 3600, rel=1e-4)
