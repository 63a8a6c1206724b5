"""The benchmark of edits over an untrained base: pairs that a run reads, rows that resume, and the page."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import edit_world, edits, edits_tuning, record
from benchmarks.edit_world import JUDGE, SCORES
from benchmarks.edits import ARMS
from diffalign.tiny.scenes import caption, render
from diffalign.tiny_build import kontext


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Make the record in its own folder, with few pairs and steps and a base of a second."""
    before = torch.get_num_threads()
    monkeypatch.setattr(record, "HERE", tmp_path / "benchmarks")
    monkeypatch.setattr(record, "WORK", tmp_path / "work")
    monkeypatch.setattr(edit_world, "MINUTES", 0.01)
    monkeypatch.setattr(edit_world, "PAIRS", 8)
    monkeypatch.setattr(edit_world, "STEPS", 2)
    monkeypatch.setattr(edit_world, "SAMPLING", replace(edit_world.SAMPLING, num_inference_steps=2))
    monkeypatch.setattr(kontext, "COUNT", 16)
    monkeypatch.setattr(edits, "ARMS", tuple(replace(arm, steps=2) for arm in ARMS))
    edit_world.pairs.cache_clear()
    yield
    edit_world.pairs.cache_clear()
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)


def test_a_row_is_made_once_over_one_base(monkeypatch: pytest.MonkeyPatch) -> None:
    edits.main(["--arms", "renders", "--seeds", "1", "--prompts", "4"])
    (row,) = record.rows("edits-")
    assert (row["arm"], row["seed"], row["pairs"]) == ("renders", 0, 8)
    assert {name: len(values) for name, values in row["scores"].items()} == dict.fromkeys(SCORES, 4)
    (start,) = record.rows("edit-base")
    says = next(arm.says for arm in ARMS if arm.name == "renders")
    page = (record.HERE / "edits.md").read_text(encoding="utf-8")
    gain = sum(row["scores"][JUDGE]) / 4 - sum(start["scores"][JUDGE]) / 4
    assert f"| renders: {says} | {gain:+.3f} [" in page and "| 8 | 2 of 32 | 1 |" in page
    assert f"| renders: {edits.QUESTIONS[JUDGE]} |" in page and "own:" not in page

    monkeypatch.setattr(edit_world, "trained", lambda *_: pytest.fail("the row is there"))
    monkeypatch.setattr(kontext, "train", lambda *_: pytest.fail("the base is there"))
    edits.main(["--arms", "renders", "--seeds", "1", "--prompts", "4"])


def test_pairs_of_the_base_are_its_best_and_worst_image_by_the_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that are the target, the source or grey, in a known order, take the place of the base's."""

    def drawn(_: object, of: list, seed: int, samples: int) -> list[Image.Image]:
        assert (seed, samples) == (edit_world.SAMPLE_SEED, 4)
        grey = Image.new("RGB", (32, 32), "grey")
        of_first = [grey, render(of[0].target), render(of[0].source), grey]
        return [*of_first, *[render(edit.source) for edit in of[1:] for _ in range(samples)]]

    monkeypatch.setattr(edit_world, "drawn", drawn)
    (row,) = edit_world.ranked(None, 3)  # the images of the others are all alike
    path = edit_world.written([row], record.WORK / "ranked")
    assert edit_world.count(str(path)) == 1
    line = json.loads(path.read_text(encoding="utf-8"))
    images = {
        name: Image.open(path.parent / line[name]).convert("RGB") for name in ("source", "chosen", "rejected")
    }
    assert images["rejected"].getextrema() == ((128, 128),) * 3
    assert edit_world.edits.right(images["source"], caption_of(line), line["prompt"]) == 7 / 8
    assert edit_world.edits.right(images["chosen"], caption_of(line), line["prompt"]) == 1


def caption_of(line: dict[str, str]) -> str:
    """Return the caption of the source of the first edit that pairs are made of."""
    import numpy as np

    first = np.random.default_rng((edit_world.SAMPLE_SEED, 0))
    edit = edit_world.edits.sample(first, "train", kontext.KINDS)
    assert line["prompt"] == edit.instruction
    return caption(edit.source)


def test_the_ceiling_is_near_one_and_a_copy_of_the_source_follows_nothing() -> None:
    top = edit_world.ceiling(24)
    assert min(sum(top[name]) / 24 for name in SCORES) > 0.9
    of = edit_world.held(24)
    copied = edit_world.scores([render(edit.source) for edit in of], of)
    assert copied[JUDGE] == [7 / 8] * 24 and copied["followed"] == [0.0] * 24 and copied["kept"] == [1.0] * 24


def test_a_trial_is_an_arm_with_three_numbers() -> None:
    arm = edits_tuning.arm_of("own,300,3e-4,40")
    assert (arm.name, arm.own, arm.beta, arm.rate, arm.steps) == ("own", True, 300.0, 3e-4, 40)
    for words in ("own,300", "owl,300,3e-4,40"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{words}'; allowed: ARM,BETA,RATE,STEPS"):
            edits_tuning.arm_of(words)
