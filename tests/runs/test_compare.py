"""``diffalign.compare``: models by name, pipelines, or what they have drawn, side by side."""

import json

import numpy as np
import pytest

import diffalign
from diffalign import tiny
from diffalign.errors import UserError
from diffalign.evaluation.drawing.sampling import SamplingSettings
from tests.evaluation.fakes import PaintingPipeline, brightness
from tests.evaluation.test_evaluate_report import NASTY, PROMPTS, Checker, shades

QUIET = {"progress": False}
TINY = SamplingSettings(num_inference_steps=1, guidance_scale=1.0)


def test_what_is_drawn_already_is_shown_with_scores():
    shown = diffalign.compare(
        shades(100), shades(110), [NASTY, *PROMPTS[1:]], {"light": brightness}, shown=3, **QUIET
    )
    page = Checker(shown._repr_html_())
    assert len(page.all("img")) == 6
    assert "light 100" in page.texts and "The aligned model is better." in page.texts
    assert shown.evaluation.primary.comparison.gain.value == pytest.approx(10)
    plain = diffalign.compare(shades(100), shades(110), PROMPTS, **QUIET)
    assert plain.evaluation is None and plain.contest is None
    assert len(Checker(plain._repr_html_()).all("img")) == 2 * len(PROMPTS)


def test_pipelines_draw_from_the_same_noise_beside_drawn_images(tmp_path):
    base, bold = PaintingPipeline(), PaintingPipeline(lift=9)
    first = diffalign.compare(base, bold, PROMPTS, {"light": brightness}, images_per_prompt=2, **QUIET)
    gain = first.evaluation.primary.comparison.gain
    assert gain.value == pytest.approx(9, abs=1e-4) and first.prompts[:2] == (PROMPTS[0],) * 2
    files = []
    for i, image in enumerate(first.base):
        image.save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
    models = {"files": files, "bold": bold}
    second = diffalign.compare(base, models, PROMPTS, {"light": brightness}, images_per_prompt=2, **QUIET)
    assert second.contest.names == ("files", "bold") and second.contest.best == "bold"
    assert second.contest.evaluations["files"].primary.comparison.ties == 2 * len(PROMPTS)
    page = Checker(second._repr_html_())
    assert len(page.all("img")) == 3 * 12 and "files" in page.texts


def test_names_of_models_prompts_and_rewards(tmp_path):
    rows = [{"prompt": p, "category": "ab"[i % 2]} for i, p in enumerate(tiny.prompts("test", 6))]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = diffalign.compare(
        "tiny:sdxl", "tiny:sdxl", tmp_path / "p.jsonl", "judge, taste", limit=4, settings=TINY, **QUIET
    )
    assert [r.name for r in shown.evaluation.rewards] == ["judge", "taste"]
    assert shown.evaluation.primary.comparison.ties == 4 == len(shown.prompts)
    assert shown.contest.categories == {"category": ("a", "b", "a", "b")}


@pytest.mark.parametrize(
    ("aligned", "options", "words"),
    [
        ({}, {}, "one or more"),
        ({"base": shades(1)}, {}, "none of them 'base'"),
        (shades(1)[1:], {}, "11 images of aligned, but 12 prompts of 1: there must be 12"),
        (shades(1), {"rewards": "brightnes"}, "unknown reward 'brightnes'"),
        ("no/such/folder/here", {}, "no such file or folder"),
        (None, {}, "aligned is a NoneType; allowed: a pipeline, the name of one, or a list of images"),
        (shades(1)[0], {}, "aligned is a Image; allowed: a pipeline"),
        ([*shades(1)[1:], np.zeros((8, 8, 3))], {}, r"aligned\[11\] is a ndarray; allowed: a pipeline"),
        ({1: shades(1)}, {}, r"aligned models are \[1\]; allowed: one or more names"),
        (shades(1), {"rewards": brightness}, "rewards is a .*; allowed: names, such as"),
        (shades(1), {"rewards": [None]}, r"rewards\[0\] is a NoneType; allowed: names, such as"),
        (shades(1), {"rewards": {"mine": "taste"}}, r"rewards\['mine'\] is a str; allowed: a reward"),
        (shades(1), {"limit": -1}, "limit=-1; allowed: a whole number, 1 or more"),
        (shades(1), {"images_per_prompt": 0}, "images_per_prompt=0; allowed: a whole number, 1 or more"),
        (shades(1), {"batch_size": 1.5}, "batch_size=1.5; allowed: a whole number, 1 or more"),
        (shades(1), {"seed": -1}, "seed=-1; allowed: a whole number, 0 to"),
        (shades(1), {"settings": {"guidance_scale": 5.0}}, "settings is a dict; allowed: such as Sampling"),
        (
            shades(1),
            {"rewards": "taste", "device": "gpu"},
            "device 'gpu' is not available here; allowed: auto",
        ),
    ],
)
def test_bad_arguments(aligned, options, words):
    with pytest.raises(UserError, match=words):
        diffalign.compare(shades(1), aligned, PROMPTS, **options, **QUIET)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (None, "prompts is a NoneType; allowed: a file of prompts"),
        ([*PROMPTS[1:], 7], r"prompts\[11\] is a int; allowed: a file of prompts"),
    ],
)
def test_prompts_that_are_none(prompts, words):
    with pytest.raises(UserError, match=words):
        diffalign.compare(shades(1), shades(2), prompts, **QUIET)
